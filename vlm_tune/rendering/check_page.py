"""A check's report as an HTML page: its findings, figures of every part, and the odd rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from vlm_tune.data.types import Conversation
from vlm_tune.data_check.findings import CheckReport, Finding, Part, PartReport
from vlm_tune.data_check.row_errors import KINDS
from vlm_tune.data_check.rules import read_rows
from vlm_tune.errors import DataError
from vlm_tune.rendering.media_text import NOUNS, counts_shown
from vlm_tune.rendering.page import is_long, thumbnail, write_html

LOOKED_AT = 60
"""Maximum number of odd rows that are shown."""
CHARACTERS = 400
"""Maximum number of characters that are shown of each turn of an odd row."""


def write_page(report: CheckReport, path: Path) -> None:
    """Writes one self-contained file, with the rows' texts escaped and images as thumbnails."""
    scope = (
        f"a sample: the first {report.sample:,} rows of each source"
        if report.sample
        else "all rows that the run reads"
    )
    levels = [
        ("Errors", report.error_counts, report.errors),
        ("Warnings", report.warning_counts, report.warnings),
    ]
    rows = sum(source.rows for part in report.parts for source in part.sources)
    figures = [*((title, counts.total()) for title, counts, _ in levels), ("Rows", rows)]
    page = {
        "name": report.name,
        "note": scope,
        "figures": [(label, f"{count:,}", "") for label, count in figures],
        "levels": [
            (title, counts, [f"{_place(each)}: {each.message}" for each in listed if not each.row])
            for title, counts, listed in levels
        ],
        "meanings": KINDS,
        "parts": [(part, _facts(part), _media_columns(part)) for part in report.parts],
        **_odd_rows([*report.errors, *report.warnings], report.read),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_html(path, "check.html", page)


def _place(finding: Finding) -> str:
    where = f"{finding.source}, row {finding.row}" if finding.row else finding.source
    return f"{finding.stage} {finding.part}: {where}"


def _media_columns(part: PartReport) -> dict[str, str]:
    """The titles of the columns of media, by the count that each shows."""
    shown = counts_shown([asdict(source) for source in part.sources])
    return {name: f"{NOUNS[name]}s" for name in shown}


def _facts(part: PartReport) -> str:
    facts = [f"{part.questions:,} question-answer pairs"] if part.questions is not None else []
    if part.mixture is not None:
        shares = (f"{count:,} of {task}" for task, count in part.mixture.items())
        facts.append(f"an epoch draws {' and '.join(shares)}")
    facts += [f"{part.steps:,} steps"] if part.steps is not None else []
    facts += [f"{part.ms_per_row:.2f} ms a row"] if part.ms_per_row is not None else []
    return ", ".join(facts)


# --- odd rows -------------------------------------------------------------------------------------


def _odd_rows(findings: Sequence[Finding], read: Sequence[Part]) -> dict[str, Any]:
    """Odd rows of every kind in turn, read again with their images, and their share of all."""
    chosen = _chosen([finding for finding in findings if finding.row])
    parts = {(part.stage, part.name): part for part in read}
    wanted: dict[tuple[str, str], set[tuple[str, int]]] = defaultdict(set)
    for finding in chosen:
        wanted[finding.stage, finding.part].add((finding.source, finding.row))
    rows = {key: _read(parts[key], names) for key, names in wanted.items()}
    odd_rows = [
        _odd_row(finding, rows[finding.stage, finding.part].get((finding.source, finding.row)))
        for finding in chosen
    ]
    total = len({(each.stage, each.part, each.source, each.row) for each in findings})
    shown_rows = f"{len(odd_rows):,} of {total:,}" if total > len(odd_rows) else ""
    return {"odd_rows": odd_rows, "shown_rows": shown_rows}


def _chosen(findings: Sequence[Finding]) -> list[Finding]:
    """Up to `LOOKED_AT` findings, taken from every kind in turn and sorted by kind."""
    kinds: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        kinds[finding.kind].append(finding)
    turns = [finding for finding in chain.from_iterable(zip_longest(*kinds.values())) if finding][
        :LOOKED_AT
    ]
    order = list(kinds)
    return sorted(turns, key=lambda finding: order.index(finding.kind))


def _read(
    part: Part, names: set[tuple[str, int]]
) -> dict[tuple[str, int], Conversation | DataError]:
    try:
        return read_rows(part, names)
    except DataError:  # a file has changed since the check read it
        return {}


def _odd_row(finding: Finding, row: Conversation | DataError | None) -> dict[str, Any]:
    """A finding with its row's image and turns as (role, text), or with the row's raw content."""
    turns: list[tuple[str, str]] = []
    image = None
    if isinstance(row, Conversation):
        turns = [(message.role, message.words) for message in row.messages]
        image = row.media[0] if row.media else None
    elif row is not None and isinstance(row.content, dict | list):
        turns = [("row", repr(row.content))]
    return {
        "finding": finding,
        "place": _place(finding),
        "thumbnail": thumbnail(image),
        "turns": [(role, _short(text)) for role, text in turns],
        "long": is_long(text for _, text in turns),
    }


def _short(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} … ({len(text):,} characters)"
