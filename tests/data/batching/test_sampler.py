"""Batches of an epoch.

Every unit once over all ranks, shares that hold, little padding, all a function of the seed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from vlm_tune.config.data import DataSection, FileSource, Mixture
from vlm_tune.data.batching.mixture import epoch_counts
from vlm_tune.data.batching.sampler import Epoch, Plan, Sizes, even_shares

PREPARED: Any = type("Stub", (), {})
"""Stands for prepared rows, of which a plan reads nothing but lengths and sources."""


def source(**options: Any) -> FileSource:
    return FileSource(kind="file", path="x", **options)


def plan(
    lengths: list[int],
    sizes: Sizes,
    *,
    sources: list[FileSource] | None = None,
    of: list[int] | None = None,
    **options: Any,
) -> Plan:
    """A plan over units of these lengths, `of` which source each is."""
    sources = sources or [source()]
    prepared = PREPARED()
    prepared.unit_costs = lambda image_cost: np.array(lengths, dtype=np.float64)
    prepared.unit_lengths = np.column_stack([lengths, lengths]).astype(np.int64).reshape(-1, 2)
    prepared.unit_sources = np.array(of or [0] * len(lengths))
    prepared.sources = sources
    return Plan(
        prepared, DataSection(train=list(sources), template="chatml", **options), sizes, seed=3
    )


def flat(epoch: Epoch, rank: int = 0, ranks: int = 1) -> list[list[int]]:
    """The units of each micro-batch of a rank."""
    return [
        [unit for row in epoch.rows(*place, rank, ranks) for unit in row]
        for place in epoch.places(ranks)
    ]


def steps_of(epoch: Epoch) -> list[list[int]]:
    """The units of each step."""
    return [
        epoch.drawn(step + 1)[epoch.units_before(step) :].tolist() for step in range(len(epoch))
    ]


lengths_of = st.lists(st.integers(1, 90), min_size=1, max_size=80)


@given(
    lengths_of,
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 3),
    st.booleans(),
)
@example([1, 1, 1, 1, 1, 1, 3], 3, 1, 3, 0, False)  # the costly row alone beside three and three
@settings(max_examples=150, deadline=None)
def test_every_unit_comes_once_over_all_ranks(
    lengths: list[int], size: int, accumulation: int, ranks: int, epoch: int, packing: bool
) -> None:
    assume(len(lengths) >= ranks)
    sizes = Sizes(size, ranks=ranks, accumulation=accumulation)
    epoch_plan = plan(lengths, sizes, packing=packing, row_length=64).epoch(epoch)
    shares = [flat(epoch_plan, rank, ranks) for rank in range(ranks)]
    assert Counter(unit for share in shares for batch in share for unit in batch) == Counter(
        range(len(lengths))
    )
    rows = [
        [len(epoch_plan.rows(*place, rank, ranks)) for rank in range(ranks)]
        for place in epoch_plan.places(ranks)
    ]
    assert all(max(numbers) <= size and max(numbers) - min(numbers) <= 1 for numbers in rows)
    assert all(len(step) == size * accumulation * ranks for step in epoch_plan.steps[:-1])
    # Every split of a step takes the same rows, in the same order of steps.
    whole = steps_of(
        plan(lengths, Sizes(size * accumulation * ranks), packing=packing, row_length=64).epoch(
            epoch
        )
    )
    assert steps_of(epoch_plan) == whole
    for other in range(1, 4):
        taken = [
            sorted(
                unit
                for number in range(len(epoch_plan.shares(step, other)))
                for rank in range(other)
                for row in epoch_plan.rows(step, number, rank, other)
                for unit in row
            )
            for step in range(len(epoch_plan))
        ]
        assert taken == [sorted(step) for step in whole]


@given(lengths_of, st.integers(1, 60), st.integers(1, 3), st.integers(1, 3), st.booleans())
@settings(max_examples=150, deadline=None)
def test_token_batches_hold_their_budget(
    lengths: list[int], tokens: int, accumulation: int, ranks: int, packing: bool
) -> None:
    assume(len(lengths) >= ranks)
    sizes = Sizes(1, tokens, ranks, accumulation=accumulation)
    epoch_plan = plan(lengths, sizes, packing=packing, row_length=64).epoch(0)
    whole = plan(
        lengths, Sizes(1, tokens * accumulation * ranks), packing=packing, row_length=64
    ).epoch(0)
    assert steps_of(epoch_plan) == steps_of(whole)
    drawn = [
        unit for rank in range(ranks) for batch in flat(epoch_plan, rank, ranks) for unit in batch
    ]
    assert Counter(drawn) == Counter(range(len(lengths)))
    for place in epoch_plan.places(ranks):
        for rank in range(ranks):
            rows = [
                sum(lengths[unit] for unit in row) for row in epoch_plan.rows(*place, rank, ranks)
            ]
            assert not rows or len(rows) == 1 or len(rows) * max(rows) <= tokens


@given(lengths_of, st.integers(1, 6), st.integers(1, 9), st.integers(0, 5), st.booleans())
@settings(max_examples=150, deadline=None)
def test_another_plan_goes_on_with_what_is_left(
    lengths: list[int], size: int, other: int, steps: int, packing: bool
) -> None:
    first = plan(lengths, Sizes(size), packing=packing, row_length=64).epoch(1)
    steps = min(steps, len(first))
    drawn = np.bincount(first.drawn(steps), minlength=len(lengths))
    rest = plan(lengths, Sizes(other)).epoch(1, drawn)
    assert Counter(first.drawn(steps).tolist()) + Counter(
        rest.drawn(len(rest)).tolist()
    ) == Counter(range(len(lengths)))
    assert rest.units_before(len(rest)) == len(lengths) - first.units_before(steps)


def test_units_that_come_several_times_an_epoch_are_left_out_as_often_as_they_came() -> None:
    def plan_of_size(size: int) -> Plan:
        return plan([1] * 4, Sizes(size), sources=[source(count=10)])

    first = plan_of_size(3).epoch(0)
    rest = plan_of_size(2).epoch(0, np.bincount(first.drawn(2), minlength=4))
    assert Counter(first.drawn(2).tolist()) + Counter(rest.drawn(len(rest)).tolist()) == Counter(
        first.drawn(len(first)).tolist()
    )


@given(lengths_of, st.integers(1, 90))
@settings(max_examples=150, deadline=None)
def test_packed_rows_are_full_and_never_too_long(lengths: list[int], limit: int) -> None:
    epoch_plan = plan(lengths, Sizes(1), packing=True, row_length=limit).epoch(0)
    rows = [epoch_plan.rows(number, 0, 0, 1)[0] for number in range(len(epoch_plan))]
    totals = [sum(lengths[unit] for unit in row) for row in rows]
    assert all(total <= limit or len(row) == 1 for total, row in zip(totals, rows, strict=True))
    # No two rows could have been one.
    short = sorted(total for total in totals if total <= limit)
    assert len(short) < 2 or short[0] + short[1] > limit


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = list(range(1, 51))
    one, other = plan(lengths, Sizes(4)), plan(lengths, Sizes(4))
    assert [flat(one.epoch(epoch), 0) for epoch in (1, 0)] == [
        flat(other.epoch(epoch), 0) for epoch in (1, 0)
    ]
    assert flat(one.epoch(0), 0) != flat(one.epoch(1), 0)


def test_rows_of_like_length_stand_together_and_batches_come_mixed() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 400, 4000).tolist()
    epoch_plan = plan(lengths, Sizes(8)).epoch(0)
    batches = [[lengths[unit] for unit in batch] for batch in flat(epoch_plan, 0)]
    padding = 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)
    assert padding < 0.05
    means = np.array([np.mean(batch) for batch in batches])
    assert abs(float(np.corrcoef(means[:-1], means[1:])[0, 1])) < 0.15


# --- mixtures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "sources", "size", "expected"),
    [
        ([5, 7], [source(), source()], None, [5, 7]),
        ([5, 70], [source(), source(count=10)], None, [5, 10]),
        ([100, 100], [source(weight=3.0), source(weight=1.0)], None, [100, 33]),
        ([100, 100], [source(weight=3.0), source(weight=1.0)], 10, [8, 2]),
        ([100, 100, 4], [source(weight=2.0), source(weight=1.0), source()], 9, [6, 3, 4]),
        ([100, 0], [source(weight=1.0), source(weight=1.0)], None, [100, 0]),
        ([3, 0], [source(), source(count=5)], None, [3, 0]),
    ],
)
def test_shares_of_an_epoch(
    units: list[int], sources: list[FileSource], size: int | None, expected: list[int]
) -> None:
    data = DataSection(train=list(sources), template="chatml", epoch_size=size)
    assert epoch_counts(units, sources, data) == expected


@pytest.mark.parametrize(
    ("units", "sources", "temperature", "size", "expected"),
    [
        ([100, 300], [source(), source()], 1.0, None, [100, 300]),
        ([100, 400], [source(), source()], 2.0, None, [100, 200]),
        ([100, 400], [source(), source()], 2.0, 30, [10, 20]),
        ([100, 400], [source(), source()], 1e6, None, [100, 100]),
        ([100, 400, 7], [source(), source(), source(count=5)], 2.0, None, [100, 200, 5]),
        ([9, 0], [source(), source()], 2.0, None, [9, 0]),
    ],
)
def test_shares_by_size(
    units: list[int],
    sources: list[FileSource],
    temperature: float,
    size: int | None,
    expected: list[int],
) -> None:
    data = DataSection(
        train=list(sources),
        template="chatml",
        epoch_size=size,
        mixture=Mixture(temperature=temperature),
    )
    assert epoch_counts(units, sources, data) == expected


KINDS_OF = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 2)), min_size=1, max_size=60)


@given(KINDS_OF, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_micro_batch_has_rows_of_one_loss_weight(
    units: list[tuple[int, int]], size: int, accumulation: int, ranks: int, tokens: bool
) -> None:
    assume(len(units) >= ranks)
    lengths = [length for length, _ in units]
    of = [number for _, number in units]
    weights = [1.0, 2.0, 1.0]
    sizes = Sizes(size, 50 if tokens else None, ranks, accumulation=accumulation)
    sources = [source(loss_weight=weight) for weight in weights]
    mixed = plan(lengths, sizes, sources=sources, of=of)
    apart = mixed.epoch(0)
    assert steps_of(apart) == steps_of(plan(lengths, sizes, of=of, sources=[source()] * 3).epoch(0))
    drawn: Counter[int] = Counter()
    for place in apart.places(ranks):
        batches = [
            [unit for row in apart.rows(*place, rank, ranks) for unit in row]
            for rank in range(ranks)
        ]
        expected = mixed.kinds[apart.kind(*place, ranks)].loss_weight
        assert {weights[of[unit]] for batch in batches for unit in batch} == {expected}
        drawn += Counter(unit for batch in batches for unit in batch)
    assert drawn == Counter(range(len(units)))
    packed = plan(lengths, sizes, sources=sources, of=of, packing=True, row_length=64).epoch(0)
    for place in packed.places(1):
        for row in packed.rows(*place, 0, 1):
            assert len({weights[of[unit]] for unit in row}) == 1


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=80, deadline=None)
def test_no_unit_comes_again_before_all_of_its_source_came(
    first: int, second: int, one: int, other: int
) -> None:
    mixed_plan = plan(
        [1] * (first + second),
        Sizes(4),
        sources=[source(count=one), source(count=other)],
        of=[0] * first + [1] * second,
    )
    drawn: Counter[int] = Counter()
    for epoch in range(5):
        counts = Counter(unit for batch in flat(mixed_plan.epoch(epoch), 0) for unit in batch)
        assert (
            sum(counts[unit] for unit in range(first)) == one
            and sum(counts.values()) == one + other
        )
        drawn += counts
        for units in (range(first), range(first, first + second)):
            seen = [drawn[unit] for unit in units]
            assert max(seen) - min(seen) <= 1


def test_ratios_hold_within_an_epoch_too() -> None:
    mixed_plan = plan(
        [1] * 4000,
        Sizes(8),
        sources=[source(weight=3.0), source(weight=1.0)],
        of=[0] * 2000 + [1] * 2000,
        epoch_size=2000,
    )
    batches = flat(mixed_plan.epoch(0), 0)
    first = [unit < 2000 for batch in batches[: len(batches) // 2] for unit in batch]
    assert abs(np.mean(first) - 0.75) < 0.05


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_shares_are_even(costs: list[int], ranks: int) -> None:
    """No share has more rows than its part, or costs more than sorted rows dealt in turn.

    A difference of the dearest row is allowed.
    """
    rows, values = np.arange(len(costs)), np.array(costs, dtype=np.float64)
    shares = even_shares(rows, values, ranks)
    assert sorted(row for share in shares for row in share.tolist()) == list(range(len(costs)))
    numbers = [len(share) for share in shares]
    assert max(numbers) <= -(-len(costs) // ranks)
    spent = [values[share].sum() for share in shares]
    dealt = [values[np.argsort(values)][rank::ranks].sum() for rank in range(ranks)]
    assert max(spent) <= max(dealt) + values.max()


def test_dear_rows_are_spread_over_the_ranks() -> None:
    costs = np.array([100.0] * 4 + [1.0] * 12)
    assert [float(costs[share].sum()) for share in even_shares(np.arange(16), costs, 4)] == [
        103.0
    ] * 4
