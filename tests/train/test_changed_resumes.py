"""What a run does when it is resumed with another recipe, and says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small import interrupted, parsed

from vlm_tune.api import sft, verify_run
from vlm_tune.train.trace import DIGESTS, read_trace

QUICK: dict[str, Any] = {
    "data__validation": [],
    "evaluate__samples": 0,
    "train__log_every": 1,
    "train__batch_size": 4,
    "train__steps": None,
    "train__epochs": 2,
    "train__checkpoints": {"every": 1, "keep": 3},
}


@pytest.fixture
def forty(color_rows: Path) -> Path:
    """Forty rows of unlike length."""
    rows = []
    for number, line in enumerate(5 * color_rows.read_text().splitlines()):
        row = json.loads(line)
        row["messages"][0]["content"] += f" {number}" * (number % 7 + 1)
        rows.append(json.dumps(row) + "\n")
    color_rows.write_text("".join(rows))
    return color_rows


def events(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [event for event in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if event["event"] == kind]


def seen(run: Path, first: int, last: int) -> int:
    """The digest of all samples of the steps `first` to `last`."""
    steps = read_trace(run / "stages" / "1-main")
    return sum(int(step.samples, 16) for step in steps if first <= step.step <= last) % DIGESTS


@pytest.mark.parametrize("changes", [{"train__batch_size": 8}, {"train__batch_tokens": 200, "data__packing": True, "data__row_length": 96}])
def test_another_batch_size_goes_on_with_the_rows_that_are_left(
    changes: dict[str, Any], tiny_recipe: Callable[..., str], forty: Path, tmp_path: Path
) -> None:
    whole = sft(parsed(tiny_recipe("causal", output="whole"), **QUICK)).folder
    assert [event["epoch"] for event in events(whole)] == pytest.approx([step / 10 for step in range(1, 21)])
    rows = seen(whole, 1, 10)
    assert seen(whole, 11, 20) == rows
    recipe = parsed(tiny_recipe("causal"), **QUICK)
    interrupted(lambda show: sft(recipe, show=show), stage=0, step=4)
    changed = parsed(tiny_recipe("causal"), **QUICK | changes)
    # Stopped once more: what is left of the epoch is the same after another resume.
    interrupted(lambda show: sft(changed, show=show, resume=True, accept_changes=True), stage=0, step=6)
    run = sft(changed, resume=True).folder
    trained = events(run)
    epochs = [event["epoch"] for event in trained]
    assert epochs[3] == pytest.approx(0.4) and epochs == sorted(epochs) and epochs[-1] == 2
    first = epochs.index(1.0) + 1
    if "train__batch_size" in changes:
        assert first == 4 + 24 // 8 and len(trained) == first + 40 // 8
        assert seen(run, 1, first) == seen(run, first + 1, len(trained)) == rows
    # The schedule goes on from where it was, to its end.
    rates = [event["learning_rate"] for event in trained]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.15 * rates[0]
    assert abs(rates[4] - rates[3]) < 2 * abs(rates[3] - rates[1])
    assert verify_run(run).agrees
