"""Evaluation in the loop by several processes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import built, parsed, rows_of
from vlm_tune.api import sft
from vlm_tune.events import Evaluation, Event
from vlm_tune.train import evaluator
from vlm_tune.train.objective_registry import build_objective


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
            build_objective(recipe.objective, None, lambda figures: figures, torch.device("cpu")),
            recipe.evaluate,
            rows,
            None,
            report=lambda event: None,
            watch=watch,
            stop=lambda: False,
            any_stops=lambda: False,
            seed=0,
        ).evaluation(1, compiled=False)

    monkeypatch.setattr(evaluator, "gather_object", lambda mine: mine)
    alone = scores(0, 1)
    assert alone.n == 3
    monkeypatch.setattr(evaluator, "gather_object", lambda mine: shards.extend(mine) or shards)
    joined = [scores(rank, 5) for rank in range(5)][-1]
    assert len(shards) == 5
    assert (joined.n, joined.tokens) == (alone.n, alone.tokens)
    assert joined.loss == pytest.approx(alone.loss, rel=1e-5)
    ours, other = joined.by_source[""], alone.by_source[""]
    assert ours.pop("metrics") == other.pop("metrics")
    assert ours == pytest.approx(other, rel=1e-5)


def test_a_run_validates_by_the_recipes_metrics_and_the_best_goes_by_the_chosen(
    tiny_recipe: Callable[..., str],
) -> None:
    evaluate: dict[str, Any] = {
        "evaluate__metrics": ["exact_match", "perplexity"],
        "evaluate__best": "perplexity",
        "evaluate__every": 1,
        "evaluate__samples": 0,
    }
    changes = evaluate | {"train__steps": 2}
    events: list[Event] = []
    run = sft(parsed(tiny_recipe("causal"), **changes), show=events.append)
    evaluations = [event for event in events if isinstance(event, Evaluation)]
    for event in evaluations:
        assert event.metrics is not None and event.loss is not None
        entry = event.metrics["perplexity"]
        assert entry["value"] == pytest.approx(math.exp(event.loss), rel=1e-5)
        assert (entry["n"], entry["images"]) == (8, 4)
        assert event.score == entry["value"]
    done = json.loads((run.folder / "stages" / "1-main" / "done.json").read_text())
    lowest = min(evaluations, key=lambda event: event.loss or math.inf)
    assert (done["best_step"], done["best_by"]) == (lowest.step, "perplexity")
    assert "perplexity of the reference" in (run.folder / "report.html").read_text().lower()
