"""Image-text matching by two ranks is that of one process with their rows together."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.contrastive_samples import matching_recipe
from tests.helpers.forked_runs import ended, start
from tests.helpers.tiny_models import largest, tensors_of
from vlm_tune.api import sft
from vlm_tune.train import matching


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_two_ranks_train_as_one(
    kind: str, tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row with its own image: other images are drawn on each rank by itself."""
    monkeypatch.setattr(matching, "SHOWN_ANOTHER", 0.0)

    def recipe(output: str, size: int) -> Any:
        return matching_recipe(
            tiny_recipe,
            tmp_path,
            kind,
            output=output,
            objective={"negatives": "random"},
            train__steps=4,
            train__log_every=1,
            train__batch_size=size,
            data__validation=[],
            data__test=[],
        )

    def logged(output: str) -> list[dict[str, Any]]:
        lines = (tmp_path / output / "log.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == "train"]

    sft(recipe("one", 4))
    pids = start(partial(sft, recipe("two", 2)), tmp_path / "ranks.txt", ranks=2)
    assert ended(pids) == [0, 0], (tmp_path / "ranks.txt.0").read_text()
    assert len(logged("one")) == len(logged("two")) == 4
    for alone, together in zip(logged("one"), logged("two"), strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    first, second = (tensors_of(tmp_path / output / "model") for output in ("one", "two"))
    assert first.keys() == second.keys()
    assert max(largest(value, second[name]) for name, value in first.items()) <= 3e-4
