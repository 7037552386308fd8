"""The bench's own arithmetic.

Both row forms hold the same questions, and useful work is counted right.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import material, ours
from benchmarks.peers import PEERS, probe
from benchmarks.runs import Length, Run, within
from benchmarks.scaling import exponent
from benchmarks.throughput import Comparison
from tests.helpers.tiny_models import examples_of, save_llm
from vlm_tune.config.load import parse_recipe
from vlm_tune.data.prepare.run import conversations, prepare
from vlm_tune.model.build import build_processor
from vlm_tune.model.language.masks import tree_mask


def test_both_row_forms_hold_the_same_questions(tmp_path: Path) -> None:
    answers = material.write_rows(tmp_path, 3)
    forms = {
        form: [json.loads(line) for line in (tmp_path / f"{form}.jsonl").read_text().splitlines()]
        for form in ("single", "multi")
    }
    questions = {
        form: sorted(
            (row["images"][0], question["content"], answer["content"])
            for row in rows
            for question, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True)
        )
        for form, rows in forms.items()
    }
    assert questions["single"] == questions["multi"]
    assert sorted(answer for _, _, answer in questions["multi"]) == answers
    assert (len(forms["single"]), len(forms["multi"])) == (len(answers), 3)
    assert all((tmp_path / row["images"][0]).is_file() for row in forms["single"])


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_useful_work_by_the_formula(kind: str, tmp_path: Path) -> None:
    """4·T·N + 6·T·N_lora + 12·L·h·d_h·A + 4·S·d·V, with A counted from the decoder's own mask."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    answers = material.write_rows(tmp_path, 2)
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=64,
        )
    ).save_pretrained(tmp_path / "tower")
    blank = ours.recipe("causal", tmp_path, tmp_path, tmp_path / "run", batch=2, steps=1)
    rows = list(conversations(parse_recipe(blank).data, parse_recipe(blank).data.train, 0))
    folder = save_llm(tmp_path / ("llm" if kind == "causal" else "t5"), kind, rows)
    text = ours.recipe(kind, tmp_path, folder, tmp_path / "run", batch=2, steps=1)
    work = ours.work(text)
    assert work.answers == answers
    recipe = parse_recipe(text)
    examples = examples_of(
        prepare(recipe.data, recipe.data.train, build_processor(recipe, []), seed=recipe.seed)
    )
    assert work.mean.tokens == pytest.approx(
        sum(len(example.input_ids) for example in examples) / len(answers)
    )
    assert work.mean.supervised == pytest.approx(
        sum(example.supervised for example in examples) / len(answers)
    )
    if kind == "seq2seq":
        assert work.operations > 4 * work.mean.tokens * 2 * (4 * 32 * 32 + 3 * 32 * 48)
        return
    pairs = 0
    for example in examples:
        visible_until = (
            np.full(len(example.input_ids), len(example.input_ids))
            if example.visible_until is None
            else example.visible_until
        )
        pairs += int(tree_mask(torch.as_tensor(np.array(visible_until))[None]).sum())
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    frozen, low = sum(a * b for a, b in shapes), sum(16 * (a + b) for a, b in shapes)
    tokens, supervised = work.mean.tokens * len(answers), work.mean.supervised * len(answers)
    config = json.loads((folder / "config.json").read_text())
    wanted = (
        2 * tokens * (4 * frozen + 6 * low)
        + 12 * 2 * 32 * pairs
        + 4 * supervised * 32 * config["vocab_size"]
    )
    assert work.operations * len(answers) == pytest.approx(wanted)


def test_answers_are_matched_one_to_one() -> None:
    assert within(["no", "yes"], ["is it? yes", "red? no"])
    assert not within(["no", "no"], ["red? no", "is it? yes"])


def test_a_peers_batches_are_counted_as_our_rows_are(tmp_path: Path) -> None:
    """Padded labels and masks give the amounts of the rows: one formula serves all trainers."""
    ignored, rows = probe.IGNORED, [[0, 0, 1, 1, 0, 1], [0, 1, 1]]
    labels = [
        [5 if supervised else ignored for supervised in row] + [ignored] * (7 - len(row))
        for row in rows
    ]
    mask = [[1] * len(row) + [0] * (7 - len(row)) for row in rows]
    counts = probe.counts(labels, mask, seq2seq=False)
    assert (counts["questions"], counts["padded"]) == (3, 14)
    examples = [
        SimpleNamespace(input_ids=row, labels=row, visible_until=None, supervised=sum(row))
        for row in rows
    ]
    assert _amount(counts) == sum(
        (ours.amount(row, seq2seq=False) for row in examples), ours.Amount()
    )
    answers = [[5, 5, 1], [5, 1]]
    counts = probe.counts(
        [[*row, *[ignored] * (4 - len(row))] for row in answers], mask, seq2seq=True
    )
    pairs = zip(rows, answers, strict=True)
    examples = [
        SimpleNamespace(input_ids=row, labels=answer, supervised=len(answer))
        for row, answer in pairs
    ]
    assert _amount(counts) == sum(
        (ours.amount(row, seq2seq=True) for row in examples), ours.Amount()
    )


def _amount(counts: dict[str, int]) -> ours.Amount:
    return ours.Amount(**{key: counts[key] for key in ours.Amount.__dataclass_fields__})


@pytest.mark.parametrize("name", list(PEERS))
def test_the_sweep_finds_the_fastest_of_separable_settings(name: str) -> None:
    gains = {"bf16_weights": 3.0, None: 2.0, "multi": 4.0, 8: 1.5, 16: 1.2}

    class Known(Comparison):
        def measure(
            self,
            name: str,
            settings: dict[str, Any],
            length: Length,
            runs: list[Run],
            timeout: Any = None,
        ) -> Run:
            runs.append(
                Run(
                    name,
                    settings,
                    questions_per_s=math.prod(gains.get(value, 1.0) for value in settings.values()),
                )
            )
            return runs[-1]

    options = Namespace(
        against=[name], finalists=2, sweep_only=False, sweep_steps=1, quick=False, recipe=None
    )
    comparison = Known(options, None, {})  # type: ignore[arg-type]
    comparison.tune(name)
    peer = PEERS[name]
    all_settings = [
        dict(zip(peer.sweep, values, strict=True)) for values in product(*peer.sweep.values())
    ]
    every = [
        {**settings, "batch": batch}
        for settings in all_settings
        for batch in peer.batches[settings["rows"]]
    ]
    best = max(
        every, key=lambda settings: math.prod(gains.get(value, 1.0) for value in settings.values())
    )
    assert comparison.settings[name][0] == best
    tried = [run.settings for run in comparison.sweep]
    assert all(
        {settings[key] for settings in tried} == set(values) for key, values in peer.sweep.items()
    )
    again = Known(options, None, {name: comparison.settings[name]})  # type: ignore[arg-type]
    assert again.settings == comparison.settings


def test_exponent_of_a_power() -> None:
    assert exponent([1, 2, 4, 8], [3.0, 6.0 * 2**0.5, 12.0 * 2, 24.0 * 8**0.5]) == pytest.approx(
        1.5
    )
