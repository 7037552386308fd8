"""A sweep in words: its trials as lines of a terminal, and its values as text."""

from __future__ import annotations

import json
from collections.abc import Mapping

from vlm_tune.events import TrialEnd, TrialStart
from vlm_tune.quoting import cut
from vlm_tune.rendering.run_log import duration
from vlm_tune.rendering.scores_text import amount, metric_title
from vlm_tune.sweeping.records import BEST, RECORD, REPORT, Sweep
from vlm_tune.sweeping.space import Choices, Dimension, Scalar


def value_text(value: Scalar) -> str:
    """A searched value as text: a float with three digits."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return cut(value) if isinstance(value, str) else json.dumps(value)


def dimension_text(dimension: Dimension) -> str:
    """The values that a search gives to a key, as text."""
    if isinstance(dimension, Choices):
        return ", ".join(map(value_text, dimension.values))
    return dimension.written


def values_text(values: Mapping[str, Scalar]) -> str:
    """Searched values with their keys, as text."""
    return ", ".join(f"{key} {value_text(value)}" for key, value in values.items())


def start_line(event: TrialStart) -> str:
    """The line of a trial that begins or continues."""
    goes_on = " continues" if event.resumed else ""
    return f"trial {event.number} of {event.of}{goes_on}: {values_text(event.values)}"


def end_line(event: TrialEnd) -> str:
    """The line of a trial that has ended, with the best one so far."""
    name = event.metric or ""
    words = [f"trial {event.number} of {event.of} {event.state}"]
    if event.reason:
        words.append(f" ({event.reason})")
    if event.score is not None:
        words.append(f": {metric_title(name)} {amount(name, event.score)} at step {event.step:,}")
    words.append(f", {duration(event.seconds)}")
    if event.best is not None:
        words.append(f"; the best is trial {event.best} with {amount(name, event.best_score)}")
    return "".join(words)


def sweep_lines(sweep: Sweep) -> list[str]:
    """Lines on a finished sweep: its best trial and where everything is."""
    best = sweep.best
    assert best is not None  # a sweep without one ends with an error
    name = sweep.metric or ""
    return [
        f"best: trial {best.number}, {metric_title(name)} {amount(name, best.score)}: "
        f"{values_text(best.values)}",
        f"recipe: {sweep.folder / BEST}",
        f"report: {sweep.folder / REPORT}",
        f"trials: {sweep.folder / RECORD}",
    ]
