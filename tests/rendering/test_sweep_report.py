"""The report of a sweep and its lines on a terminal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.formula_runs import write_formula_recipe
from tests.helpers.html_page import HOSTILE, Page, assert_harmless
from vlm_tune.config.load import load_recipe
from vlm_tune.events import TrialEnd, TrialStart
from vlm_tune.rendering.sweep_report import write_sweep_report
from vlm_tune.rendering.sweep_text import end_line, start_line, sweep_lines
from vlm_tune.sweeping.records import Sweep, Trial
from vlm_tune.sweeping.space import parse_search

RATE, RANK, SYSTEM = "train.learning_rate", "tune.1.r", "data.system"
RUNNING = Trial(5, "trials/5", {RATE: 2e-4, RANK: 32, SYSTEM: HOSTILE[0]}, "running")
TRIALS = [
    Trial(1, "trials/1", {RATE: 1e-4, RANK: 8, SYSTEM: "$a$"}, "complete", 0.5, 20, 30, 61.0),
    Trial(2, "trials/2", {RATE: 3e-4, RANK: 16, SYSTEM: "$a$"}, "complete", 0.75, 30, 30, 62.0),
    Trial(
        3, "trials/3", {RATE: 9e-4, RANK: 8, SYSTEM: "b"}, "pruned", 0.25, 10, 10, 9.0, HOSTILE[1]
    ),
    Trial(
        4, "trials/4", {RATE: 1e-2, RANK: 8, SYSTEM: "b"}, "failed", seconds=2.0, reason="NaN loss"
    ),
    RUNNING,
]


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    search: dict[str, Any] = {
        RATE: "log:1e-5..1e-1",
        RANK: "8..32:8",
        SYSTEM: ["$a$", "b", *HOSTILE[:1]],
    }
    recipe = load_recipe(write_formula_recipe(tmp_path))
    return Sweep(tmp_path, recipe, parse_search(search), "exact_match", False, TRIALS, 6)


def page_of(sweep: Sweep) -> tuple[Page, str]:
    page = Page(write_sweep_report(sweep).read_text(encoding="utf-8"))
    assert_harmless(page)
    return page, " ".join(page.words.split())


def test_the_table_has_the_trials_by_score_with_their_ends(sweep: Sweep) -> None:
    _, words = page_of(sweep)
    assert "5 of 6 trials, by the highest validation exact match" in words
    rows = [
        "2 (best) 75.00% 0.0003 16 $a$ 30 30 1 min 02 s complete",
        "1 50.00% 0.0001 8 $a$ 20 30 1 min 01 s complete",
        f"3 25.00% 0.0009 8 b 10 10 9.0 s pruned {HOSTILE[1]}",
        "4 - 0.01 8 b 0 2.0 s failed NaN loss",
        f"5 - 0.0002 32 {HOSTILE[0]} 0 0.0 s running",
    ]
    places = [words.index(row) for row in rows]
    assert places == sorted(places)
    assert f"{RATE}: 0.001 -> 0.0003" in words and f"{RATE}: log:1e-05..0.1" in words


def test_scores_are_drawn_over_each_value(sweep: Sweep) -> None:
    page, words = page_of(sweep)
    labels = [svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg]
    assert labels == [f"exact match against {key}" for key in (RATE, RANK, SYSTEM)]
    assert words.count("✖ pruned or failed ● complete ◆ best") == 3
    assert "1e-05" in words
    # In two rows of the table, in the best trial's values, and at the axis.
    assert page.text.count("$a$") == 4


def test_a_sweep_without_a_score_has_a_table_and_no_charts(sweep: Sweep) -> None:
    page, words = page_of(replace(sweep, metric=None, trials=[TRIALS[3], RUNNING]))
    assert not [svg for svg in page.all("svg") if "aria-label" in svg]
    assert "4 - 0.01" in words and "what the best trial changes" not in words


def test_losses_far_apart_are_drawn_on_a_logarithmic_axis(sweep: Sweep) -> None:
    losses = [replace(TRIALS[0], score=0.01), replace(TRIALS[1], score=5.0)]
    lowest = replace(sweep, metric="loss", lower_is_better=True, trials=losses)
    _, words = page_of(lowest)
    assert "by the lowest validation loss" in words and "log scale" in words
    assert lowest.best == losses[0]


def test_trials_are_lines_on_a_terminal(sweep: Sweep) -> None:
    start = TrialStart(3, 6, {RATE: 9.04321e-4, SYSTEM: "a\nb"})
    assert start_line(start) == f"trial 3 of 6: {RATE} 0.000904, {SYSTEM} a\\nb"
    assert start_line(replace(start, resumed=True)).startswith("trial 3 of 6 continues: ")
    end = TrialEnd(
        number=3,
        of=6,
        state="complete",
        seconds=62.0,
        metric="exact_match",
        score=0.5,
        step=20,
        best=2,
        best_score=0.75,
    )
    assert end_line(end) == (
        "trial 3 of 6 complete: exact match 50.00% at step 20, 1 min 02 s; "
        "the best is trial 2 with 75.00%"
    )
    failed = TrialEnd(number=1, of=6, state="failed", seconds=2.0, reason="out of memory")
    assert end_line(failed) == "trial 1 of 6 failed (out of memory), 2.0 s"
    assert sweep_lines(sweep)[0].startswith("best: trial 2, exact match 75.00%: ")
