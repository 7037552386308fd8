"""The report of a check: rows that are bad or odd, and figures of every part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vlm_tune.config.recipe import Recipe
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.prepare.part_rows import PartRows
from vlm_tune.data_check.padding import Waste
from vlm_tune.errors import EXIT_DATA, EXIT_DONE

LISTED = 1000
"""Rows of a part that are listed for each kind of finding; all are counted."""


@dataclass(frozen=True)
class Finding:
    """A fault of one row (row 0: of the whole source); `kind` is one of `row_errors.KINDS`."""

    source: str
    row: int
    kind: str
    message: str
    stage: str
    part: str


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of equal width.

    Bin k counts the values from `start + k * width` up to the next bin. `least`, `middle` and
    `most` are the minimum, median and maximum of the values.
    """

    start: int
    width: int
    counts: list[int]
    least: int
    middle: int
    most: int


@dataclass(frozen=True)
class SourceReport:
    """Counts for one source of a part.

    They are its rows by outcome, its usable images, frames of videos, clips of audio and tokens,
    and its odd rows by kind.
    """

    source: str
    form: str
    rows: int
    usable: int
    bad: int
    left_out: int
    images: int
    tokens: int
    supervised: int
    kinds: dict[str, int]
    frames: int = 0
    clips: int = 0


@dataclass(frozen=True)
class PartReport:
    """Figures of one part of a stage.

    `questions` is None for rows that are held out of train, for which no examples are built.
    """

    stage: str
    part: str
    sources: list[SourceReport]
    questions: int | None
    lengths: Histogram | None
    image_sides: Histogram | None
    padding: list[Waste]
    ms_per_row: float | None
    """Milliseconds to read and prepare a row; None where it was prepared before."""
    steps: int | None = None
    """Optimizer steps of the stage in one process; None for parts other than train."""
    mixture: dict[str, int] | None = None
    """Units (rows, or images with theirs) that an epoch draws of each source, by its task.

    None where it draws all of them once, and for parts other than train.
    """
    features: str | None = None
    """Whether a run here caches the tower's features, and why.

    None where that is not known: for parts other than train, where rows were left unread, or where
    a config is not on this machine.
    """


@dataclass(frozen=True)
class Part:
    """The rows of one part as they were read, and how the stage uses them."""

    stage: str
    name: str
    recipe: Recipe
    rows: PartRows
    """The usable rows of the part."""
    all_places: np.ndarray
    """All rows of the part; those that can't be used or are left out belong to train."""
    processor: Processor
    ms_per_row: float | None

    @property
    def prepared(self) -> Prepared:
        """The prepared data set that holds the part's rows."""
        return self.rows.prepared


@dataclass
class CheckReport:
    """The report of a check that read `sample` rows of each source, or all where it is None."""

    name: str
    sample: int | None
    parts: list[PartReport] = field(default_factory=list)
    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    error_counts: Counter[str] = field(default_factory=Counter)
    warning_counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    read: list[Part] = field(default_factory=list, repr=False)

    @property
    def exit_code(self) -> int:
        """The exit code: `EXIT_DATA` if there are errors, else `EXIT_DONE`."""
        return EXIT_DATA if self.errors else EXIT_DONE

    def add(self, part: Part, kind: str, rows: Sequence[tuple[int, str]], *, error: bool) -> None:
        """Counts a finding for rows (place, message) of a part, and lists the first `LISTED`."""
        if not rows:
            return
        (self.error_counts if error else self.warning_counts)[kind] += len(rows)
        shown = sorted(rows)[:LISTED]
        places = np.array([place for place, _ in shown], dtype=np.int64)
        names = zip(
            part.prepared.values("source", places), part.prepared.values("row", places), strict=True
        )
        findings = [
            Finding(source, row, kind, message, part.stage, part.name)
            for (source, row), (_, message) in zip(names, shown, strict=True)
        ]
        (self.errors if error else self.warnings).extend(findings)

    def add_whole(
        self,
        stage: str,
        part: str,
        kind: str,
        message: str,
        source: str = "",
        *,
        error: bool = True,
    ) -> None:
        """Counts and lists a finding about a source or part as a whole."""
        (self.error_counts if error else self.warning_counts)[kind] += 1
        (self.errors if error else self.warnings).append(
            Finding(source or f"data.{part}", 0, kind, message, stage, part)
        )

    def summary(self) -> dict[str, Any]:
        """Returns the report as one JSON object."""
        counts = {
            "errors": dict(sorted(self.error_counts.items())),
            "warnings": dict(sorted(self.warning_counts.items())),
        }
        return {
            "name": self.name,
            "sample": self.sample,
            "errors": [asdict(finding) for finding in self.errors],
            "warnings": [asdict(finding) for finding in self.warnings],
            "counts": counts | {"parts": [asdict(part) for part in self.parts]},
            "seconds": round(self.seconds, 2),
        }


def histogram(values: np.ndarray, most: int = 12) -> Histogram | None:
    """Counts values in at most `most` bins; returns None for no values.

    The bins' width is 1, 2 or 5 times a power of ten.
    """
    if not len(values):
        return None
    low = int(values.min())
    high = int(values.max())
    widths = (step * 10**power for power in range(20) for step in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < most)
    bins = np.bincount(values // width - low // width)
    return Histogram(low // width * width, width, bins.tolist(), low, int(np.median(values)), high)
