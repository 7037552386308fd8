"""Draws by a name: the numbers of the runs so far, spread evenly."""

from __future__ import annotations

from vlm_tune.data.chat.draws import draw


def test_a_draw_is_decided_by_its_seed_and_name() -> None:
    assert draw(0, "choices:row 1") == 8672474564913361591
    assert len({draw(seed, name) for seed in (0, 1) for name in ("a", "b", "\udc80")}) == 6


def test_draws_spread_evenly() -> None:
    counts = [0] * 4
    for number in range(4000):
        counts[draw(7, f"row {number}") % 4] += 1
    assert all(900 < count < 1100 for count in counts)
