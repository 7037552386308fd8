"""The learning rate's course."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.helpers.tiny_models import parsed
from vlm_tune.api import sft
from vlm_tune.config.train import Schedule
from vlm_tune.events import TrainSteps
from vlm_tune.train.schedule import schedule_factor


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 0.99])
def test_it_rises_then_falls_and_never_trains_for_nothing(
    kind: str, total: int, warmup: float
) -> None:
    factors = [
        schedule_factor(Schedule(kind=kind, warmup=warmup), step, total)
        for step in range(1, total + 1)
    ]  # type: ignore[arg-type]
    warm = round(warmup * total)
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:warm] == pytest.approx([step / warm for step in range(1, warm + 1)])
    assert factors[max(warm - 1, 0)] == 1.0
    after = factors[max(warm - 1, 0) :]
    assert after == sorted(after, reverse=True)
    if kind == "constant":
        assert set(after) == {1.0}


def test_values_of_each_kind() -> None:
    def at(kind: str, step: int) -> float:
        return schedule_factor(Schedule(kind=kind, warmup=0.2), step, 10)  # type: ignore[arg-type]

    assert [at(kind, 1) for kind in ("cosine", "linear", "constant")] == [0.5, 0.5, 0.5]
    assert [at(kind, 7) for kind in ("cosine", "linear", "constant")] == pytest.approx(
        [0.5, 0.5, 1.0]
    )
    assert at("cosine", 5) == pytest.approx(0.853553, abs=1e-6)
    assert at("linear", 10) == pytest.approx(0.125)


@pytest.mark.parametrize(("rule", "expected"), [(None, 3e-3), (0.5, 0.5)])
def test_the_logged_rate_is_the_rules(
    rule: float | None, expected: float, tiny_recipe: Callable[..., str]
) -> None:
    text = tiny_recipe("causal").replace(
        'match: "*", how: full', f'match: "*", how: full, learning_rate: {json.dumps(rule)}'
    )
    recipe = parsed(
        text,
        train__schedule={"kind": "linear", "warmup": 0.0},
        train__log_every=1,
        evaluate__samples=0,
        data__validation=[],
    )
    rates: list[float] = []
    sft(
        recipe,
        show=lambda event: (
            rates.append(event.learning_rate) if isinstance(event, TrainSteps) else None
        ),
    )
    assert rates == pytest.approx([expected * factor for factor in (1, 0.75, 0.5, 0.25)])
