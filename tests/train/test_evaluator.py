"""Evaluation in the loop by several processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.tiny_models import built, parsed, rows_of
from vlm_tune.train import evaluator
from vlm_tune.train.objectives import build_objective


def test_a_process_without_rows_adds_nothing_to_the_scores(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows on five processes."""
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe)
    rows = rows_of(recipe)[:3]
    shards: list[Any] = []

    def scores(rank: int, ranks: int) -> Any:
        accelerator = SimpleNamespace(
            process_index=rank, num_processes=ranks, autocast=nullcontext, device=model.device
        )
        engine: Any = SimpleNamespace(accelerator=accelerator, sharded=False, inference=nullcontext)
        watch: Any = SimpleNamespace(at=lambda *_: None)
        return evaluator.Evaluator(
            model,
            engine,
            build_objective(recipe.objective),
            recipe.evaluate,
            rows,
            None,
            report=lambda event: None,
            watch=watch,
            stop=lambda: False,
            any_stops=lambda: False,
        ).evaluation(1, compiled=False)

    monkeypatch.setattr(evaluator, "gather_object", lambda mine: mine)
    alone = scores(0, 1)
    assert alone.n == 3
    monkeypatch.setattr(evaluator, "gather_object", lambda mine: shards.extend(mine) or shards)
    joined = [scores(rank, 5) for rank in range(5)][-1]
    assert len(shards) == 5
    assert (joined.n, joined.tokens) == (alone.n, alone.tokens)
    assert joined.loss == pytest.approx(alone.loss, rel=1e-5)
    assert joined.by_source[""] == pytest.approx(alone.by_source[""], rel=1e-5)
