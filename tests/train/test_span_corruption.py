"""Runs with spans of captions masked: they learn, resume, and refuse what has no masks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.contrastive_samples import write_captions
from tests.helpers.tiny_models import assert_same_bits, interrupted, parsed
from vlm_tune import check, plan
from vlm_tune.api import sft
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import DataError, RecipeError

SENTINELS = [f"<extra_id_{number}>" for number in range(3)]


def corruption_recipe(
    tiny_recipe: Callable[..., str],
    folder: Path,
    kind: str = "seq2seq",
    output: str = "run",
    **changes: Any,
) -> Recipe:
    """A tiny T5 whose tokenizer has three sentinels, on eight captions."""
    settings: dict[str, Any] = {
        "objective": {"kind": "span_corruption", "rate": 0.4, "mean_span": 1.5},
        "model__llm__added_special_tokens": SENTINELS,
        "evaluate__samples": 0,
    }
    for seed, part in enumerate(("train", "validation")):
        path = write_captions(folder, part, seed)
        settings[f"data__{part}"] = [{"kind": "file", "path": str(path)}]
    return parsed(tiny_recipe(kind, output=output), **(settings | changes))


def logged(run: Path, event: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == event]


def test_a_run_learns_spans_and_is_scored_by_their_loss(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """On other images; the words around the color are the same in all captions."""
    recipe = corruption_recipe(
        tiny_recipe, tmp_path, train__steps=30, train__batch_size=8, evaluate__every=15
    )
    run = sft(recipe)
    losses = logged(run.folder, "evaluate")
    assert len(losses) == 2 and losses[-1] < 0.5 * logged(run.folder, "train")[0]
    history = json.loads((run.folder / "stages" / "1-main" / "done.json").read_text())["history"]
    assert {entry["best_by"] for entry in history} == {"loss"}


def test_a_resumed_run_masks_the_same_spans(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    changes = {"train__log_every": 1, "train__checkpoints": {"every": 2}, "train__batch_size": 3}
    one, two = (
        corruption_recipe(tiny_recipe, tmp_path, output=output, **changes)
        for output in ("one", "two")
    )
    sft(one)
    interrupted(lambda show: sft(two, show=show), stage=0, step=2)
    sft(two, resume=True)
    assert_same_bits(tmp_path / "one" / "model", tmp_path / "two" / "model")


def test_a_plan_counts_what_the_encoder_then_reads(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    masked = corruption_recipe(tiny_recipe, tmp_path)
    plain = corruption_recipe(tiny_recipe, tmp_path, objective={"kind": "language_modeling"})
    lengths = [plan(recipe).stages[0].peak.length for recipe in (masked, plain)]
    assert lengths[0] > lengths[1]


def test_a_test_part_is_an_error_of_the_last_stage_alone(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    test = [{"kind": "file", "path": str(write_captions(tmp_path, "test", 2))}]
    with pytest.raises(DataError, match="no answers to score"):
        sft(corruption_recipe(tiny_recipe, tmp_path, data__test=test))
    stages = [{"name": "mask"}, {"name": "answer", "objective": {"kind": "language_modeling"}}]
    recipe = corruption_recipe(
        tiny_recipe, tmp_path, output="two", data__test=test, stages=stages, train__steps=1
    )
    assert sft(recipe).result["n"] == 8


def test_a_tokenizer_without_sentinels_is_an_error(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    recipe = corruption_recipe(tiny_recipe, tmp_path, model__llm__added_special_tokens=[])
    with pytest.raises(DataError, match="sentinel tokens"):
        sft(recipe)
    (error,) = check(recipe).errors
    assert "sentinel tokens" in error.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "causal"}, "needs an encoder-decoder"),
        ({"data__group": "image"}, "group: none"),
        ({"data__packing": True}, "packing: false"),
        ({"evaluate__best": "exact_match"}, "by its loss"),
    ],
)
def test_what_can_not_be_masked_or_scored_is_a_fault_of_the_recipe(
    changes: dict[str, Any], message: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        corruption_recipe(tiny_recipe, tmp_path, **changes)
