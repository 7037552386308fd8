"""A check's report as an HTML page: its findings, figures of every part, and the odd rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from html import escape
from itertools import chain, zip_longest
from pathlib import Path

from vlm_tune.data.types import Conversation
from vlm_tune.data_check.findings import CheckReport, Finding, Histogram, Part, PartReport
from vlm_tune.data_check.row_errors import KINDS
from vlm_tune.data_check.rules import read_rows
from vlm_tune.errors import DataError
from vlm_tune.rendering.page import LONG, percent, picture, section, table, write_html

LOOKED_AT = 60
"""Maximum number of odd rows that are shown."""
CHARACTERS = 400
"""Maximum number of characters that are shown of each turn of an odd row."""


def write_page(report: CheckReport, path: Path) -> None:
    """Writes one self-contained file, with the rows' texts escaped and images as thumbnails."""
    body = [
        _header(report),
        *(_findings(title, findings, counts) for title, findings, counts in _levels(report)),
        *(_part(part) for part in report.parts),
        _odd_rows(report),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_html(path, f"{report.name}: check", body)


def _levels(report: CheckReport) -> list[tuple[str, list[Finding], dict[str, int]]]:
    return [
        ("Errors", report.errors, report.error_counts),
        ("Warnings", report.warnings, report.warning_counts),
    ]


def _header(report: CheckReport) -> str:
    scope = (
        f"a sample: the first {report.sample:,} rows of each source"
        if report.sample
        else "all rows that the run reads"
    )
    rows = sum(source.rows for part in report.parts for source in part.sources)
    figures = [
        ("Errors", report.error_counts.total()),
        ("Warnings", report.warning_counts.total()),
        ("Rows", rows),
    ]
    cards = "".join(
        f'<div class="card"><dt>{name}</dt><dd><b>{value:,}</b></dd></div>'
        for name, value in figures
    )
    return (
        f'<header><h1>{escape(report.name)}</h1><p class="soft">{scope}</p>'
        f'<dl class="figures">{cards}</dl></header>'
    )


def _findings(title: str, findings: Sequence[Finding], counts: dict[str, int]) -> str:
    """A section of findings: the kinds with their counts, and findings about whole sources."""
    lines = [
        f'<tr><td>{kind}</td><td class="number">{count:,}</td><td>{escape(KINDS[kind])}</td></tr>'
        for kind, count in sorted(counts.items())
    ]
    whole = [
        f"<li>{escape(f'{_place(finding)}: {finding.message}')}</li>"
        for finding in findings
        if not finding.row
    ]
    listed = f'<div class="card"><ul>{"".join(whole)}</ul></div>' if whole else ""
    columns = [("", "kind"), ("number", "found"), ("", "meaning")]
    return section(title, table(columns, ["<tbody>", *lines, "</tbody>"]) + listed) if lines else ""


def _place(finding: Finding) -> str:
    where = f"{finding.source}, row {finding.row}" if finding.row else finding.source
    return f"{finding.stage} {finding.part}: {where}"


def _part(part: PartReport) -> str:
    """A section about a part: rows by source, histograms, and padding."""
    columns = [
        ("", "source"),
        ("", "form"),
        *(
            ("number", name)
            for name in ("rows", "bad", "left out", "images", "tokens", "trained tokens")
        ),
    ]
    lines = []
    for source in part.sources:
        figures = (
            source.rows,
            source.bad,
            source.left_out,
            source.images,
            source.tokens,
            source.supervised,
        )
        numbers = "".join(f'<td class="number">{figure:,}</td>' for figure in figures)
        lines.append(
            f"<tr><td>{escape(source.source)}</td><td>{escape(source.form)}</td>{numbers}</tr>"
        )
    charts = _histogram("Tokens a row", part.lengths) + _histogram(
        "Longer side of images, in pixels", part.image_sides
    )
    facts = [f"{part.questions:,} question-answer pairs"] if part.questions is not None else []
    facts += [f"{part.steps:,} steps"] if part.steps is not None else []
    facts += [f"{part.ms_per_row:.2f} ms a row"] if part.ms_per_row is not None else []
    body = (
        table(columns, ["<tbody>", *lines, "</tbody>"])
        + (f'<div class="charts">{charts}</div>' if charts else "")
        + _padding(part)
    )
    return section(f"{part.stage}: {part.part}", body, ", ".join(facts))


def _histogram(title: str, values: Histogram | None) -> str:
    if values is None:
        return ""
    most = max(values.counts)
    lines = []
    for place, count in enumerate(values.counts):
        low = values.start + place * values.width
        name = f"{low:,}" if values.width == 1 else f"{low:,} to {low + values.width - 1:,}"
        lines.append(_bar_line(name, f"{count:,}", count / most))
    caption = (
        f"<figcaption><b>{title}</b>{values.least:,} to {values.most:,}, "
        f"half up to {values.middle:,}</figcaption>"
    )
    return f'<figure class="card">{caption}<table><tbody>{"".join(lines)}</tbody></table></figure>'


def _padding(part: PartReport) -> str:
    if not part.padding:
        return ""
    lines = [
        f'<tr><td>{waste.name}</td><td class="number">{waste.tokens_per_question:,.1f}</td>'
        + f'<td class="number">{percent(waste.padding)}</td>{_bar(waste.padding)}</tr>'
        for waste in part.padding
    ]
    columns = [
        ("", "batches"),
        ("number", "padded tokens a question"),
        ("number", "padding"),
        ("", ""),
    ]
    return table(columns, ["<tbody>", *lines, "</tbody>"])


def _bar(share: float) -> str:
    return f'<td class="bar"><span><i style="width:{100 * share:.1f}%"></i></span></td>'


def _bar_line(name: str, value: str, share: float) -> str:
    return f'<tr><td>{name}</td><td class="number">{value}</td>{_bar(share)}</tr>'


# --- odd rows -------------------------------------------------------------------------------------


def _odd_rows(report: CheckReport) -> str:
    """A section of odd rows, of every kind in turn, read again with their images."""
    chosen = _chosen([finding for finding in (*report.errors, *report.warnings) if finding.row])
    parts = {(part.stage, part.name): part for part in report.read}
    wanted: dict[tuple[str, str], set[tuple[str, int]]] = defaultdict(set)
    for finding in chosen:
        wanted[finding.stage, finding.part].add((finding.source, finding.row))
    read = {key: _read(parts[key], names) for key, names in wanted.items()}
    cards = [
        _card(finding, read[finding.stage, finding.part].get((finding.source, finding.row)))
        for finding in chosen
    ]
    total = len(
        {
            (finding.stage, finding.part, finding.source, finding.row)
            for finding in (*report.errors, *report.warnings)
        }
    )
    note = f"{len(cards):,} of {total:,}" if total > len(cards) else ""
    return (
        section("A look at the odd rows", f'<div class="samples">{"".join(cards)}</div>', note)
        if cards
        else ""
    )


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


def _card(finding: Finding, row: Conversation | DataError | None) -> str:
    """A finding's card: its message, and the row's image and turns, or its raw content."""
    turns: list[tuple[str, str]] = []
    image = None
    if isinstance(row, Conversation):
        turns = [(message.role, message.text) for message in row.messages]
        image = row.media[0] if row.media else None
    elif row is not None and isinstance(row.content, dict | list):
        turns = [("row", repr(row.content))]
    words = "".join(
        f"<dt>{escape(role)}</dt><dd>{escape(_short(text))}</dd>" for role, text in turns
    )
    size = "sample long" if any(len(text) > LONG for _, text in turns) else "sample"
    heading = (
        f'<p class="soft">{escape(_place(finding))}</p>'
        f"<p><b>{escape(finding.kind)}</b> {escape(finding.message)}</p>"
    )
    return f'<article class="{size}">{picture(image)}<div>{heading}<dl>{words}</dl></div></article>'


def _short(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} … ({len(text):,} characters)"
