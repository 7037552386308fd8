"""A whole run trains on the same rows in the same order however its steps are split.

4x1, 2x2, 1x4, and two processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.forked_runs import ended, start
from tests.helpers.tiny_models import parsed
from vlm_tune.api import sft
from vlm_tune.config.recipe import Recipe
from vlm_tune.train.step_trace import Step, read_trace

KINDS: dict[str, dict[str, Any]] = {
    "rows": {},
    "branches": {"data__group": "image", "data__row_length": 256},
    "packed": {"data__packing": True, "data__row_length": 64},
    "tokens": {"train__batch_tokens": 240},
    "packed tokens": {"data__packing": True, "data__row_length": 64, "train__batch_tokens": 240},
    "streamed": {
        "data__streaming": True,
        "data__shuffle_buffer": 4,
        "train__epochs": None,
        "train__steps": 7,
    },
    "augmented": {"data__augment": {"flip": 0.5, "colour": 0.3, "crop": 0.7}},
}


@pytest.fixture
def unlike(color_rows: Path) -> Path:
    """Ten rows, no two of the same length."""
    rows = [json.loads(line) for line in color_rows.read_text().splitlines()]
    rows += [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]}
        for text in ("so?", "is it so?")
    ]
    for place, row in enumerate(rows):
        row["messages"][0]["content"] += " and again" * (place * 7 % 10)
    color_rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return color_rows


def recipe(
    tiny_recipe: Callable[..., str], kind: str, output: str, size: int, accumulation: int
) -> Recipe:
    changes = {
        "train__steps": None,
        "train__epochs": 2.4,
        "train__log_every": 100,
        "data__validation": [],
        "evaluate__samples": 0,
    }
    changes |= {
        "train__batch_size": size,
        "train__gradient_accumulation": accumulation,
        "train__cache_features": False,
        **KINDS[kind],
    }
    if tokens := KINDS[kind].get("train__batch_tokens"):
        changes["train__batch_tokens"] = tokens * size // 4
    return parsed(tiny_recipe("causal", output=output), **changes)


def assert_same_run(one: Path, other: Path) -> list[Step]:
    """Asserts that two runs saw the same samples and had the same loss at every step."""
    first, second = (read_trace(run / "stages" / "1-main") for run in (one, other))
    assert len(first) > 2 and [step.samples for step in second] == [step.samples for step in first]
    assert [step.loss for step in second] == pytest.approx([step.loss for step in first], rel=1e-5)
    return first


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_splits_the_steps_of_a_whole_run(
    kind: str, tiny_recipe: Callable[..., str], unlike: Path
) -> None:
    splits = [(4, 1), (1, 4), *([(2, 2)] if kind == "rows" else [])]
    runs = [
        sft(recipe(tiny_recipe, kind, f"{size}x{often}", size, often)).folder
        for size, often in splits
    ]
    steps = [assert_same_run(runs[0], run) for run in runs[1:]].pop()
    # The test can tell: different steps see different samples.
    assert len({step.samples for step in steps}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "packed tokens", "streamed"])
def test_two_processes_split_the_steps_of_a_whole_run(
    kind: str, tiny_recipe: Callable[..., str], unlike: Path, tmp_path: Path
) -> None:
    alone = sft(recipe(tiny_recipe, kind, "alone", 4, 1)).folder
    split = recipe(tiny_recipe, kind, "two", 1, 2)
    assert ended(start(partial(sft, split), tmp_path / "said", ranks=2)) == [0, 0], (
        tmp_path / "said.0"
    ).read_text()
    assert_same_run(alone, tmp_path / "two")
