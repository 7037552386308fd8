"""Terminal output of `vlm-tune check`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_tune.quoting import escaped

if TYPE_CHECKING:
    from vlm_tune.data_check.findings import CheckReport, Finding, Histogram, PartReport
from vlm_tune.rendering.media_text import NOUNS, counts_shown
from vlm_tune.rendering.terminal import print_line

NAMED = 5
"""Maximum number of findings printed per kind; the JSON and the page have more."""
BLOCKS = " ▁▂▃▄▅▆▇█"


def show_check(console: Console, report: CheckReport) -> None:
    """Prints a check's report: rows by source and figures of each part, warnings, errors."""
    if report.sample:
        console.print(
            Text(f"a sample: the first {report.sample:,} rows of each source", style="yellow")
        )
    for part in report.parts:
        _show_part(console, part)
    _show_findings(console, "warnings", "yellow", report.warnings, report.warning_counts)
    _show_findings(console, "errors", "red", report.errors, report.error_counts)
    errors = report.error_counts.total()
    warnings = report.warning_counts.total()
    verdict = Text(
        f"{errors:,} errors, {warnings:,} warnings, {report.seconds:.1f} s",
        style="bold red" if errors else "bold green",
    )
    console.print(verdict)


def _show_part(console: Console, part: PartReport) -> None:
    """Prints the counts of rows of each source by outcome, and the part's figures."""
    pairs = f": {part.questions:,} question-answer pairs" if part.questions is not None else ""
    console.print(Text(f"\n{part.stage} {part.part}{pairs}", style="bold"))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("  source", overflow="fold")
    table.add_column("form")
    media = counts_shown([asdict(source) for source in part.sources])
    titles = [f"{NOUNS[name]}s" for name in media]
    for name in ("rows", "bad", "left out", *titles, "tokens", "trained"):
        table.add_column(name, justify="right")
    for source in part.sources:
        bad = Text(f"{source.bad:,}", style="red" if source.bad else "")
        counts = (getattr(source, name) for name in media)
        figures = (source.left_out, *counts, source.tokens, source.supervised)
        table.add_row(
            Text(f"  {escaped(source.source)}"),
            source.form,
            f"{source.rows:,}",
            bad,
            *(f"{figure:,}" for figure in figures),
        )
    console.print(table)
    lines = [("tokens a row", _bars(part.lengths))] if part.lengths else []
    lines += [("longer side", _bars(part.image_sides, " px"))] if part.image_sides else []
    for waste in part.padding:
        lines.append(
            (
                waste.name,
                f"{waste.padding:.1%} padding, "
                f"{waste.tokens_per_question:,.1f} padded tokens a question",
            )
        )
    if part.mixture is not None:
        shares = (f"{count:,} of {escaped(task)}" for task, count in part.mixture.items())
        lines.append(("an epoch draws", ", ".join(shares)))
    if part.steps is not None:
        lines.append(
            ("steps", f"{part.steps:,} (vlm-tune plan: how long they take, and how much memory)")
        )
    if part.features is not None:
        lines.append(("tower's features", part.features))
    if part.ms_per_row is not None:
        lines.append(("time", f"{part.ms_per_row:.2f} ms a row"))
    for name, text in lines:
        print_line(console, f"  {name:17}{text}")


def _bars(values: Histogram, unit: str = "") -> str:
    """A histogram in one line: the lowest value, a bar for each bin, the highest, the median."""
    most = max(values.counts)
    bars = "".join(BLOCKS[-(-8 * count // most)] for count in values.counts)
    return f"{values.least:,} [{bars}] {values.most:,}{unit}, median {values.middle:,}"


def _show_findings(
    console: Console, title: str, style: str, findings: list[Finding], counts: dict[str, int]
) -> None:
    """Prints the count and the meaning of each kind of finding, and its first rows."""
    from vlm_tune.data_check.row_errors import KINDS

    for kind, count in sorted(counts.items()):
        shown = [finding for finding in findings if finding.kind == kind][:NAMED]
        console.print(
            Text.assemble(
                (f"\n{title[:-1]} {kind}", f"bold {style}"), f" {count:,}x: {KINDS[kind]}"
            )
        )
        for finding in shown:
            where = f"{finding.source}, row {finding.row}" if finding.row else finding.source
            print_line(console, f"  {finding.stage} {finding.part}: {where}: {finding.message}")
        if count > len(shown):
            console.print(Text(f"  and {count - len(shown):,} more", style="dim"))


def show_exports(console: Console, exports: dict[str, str | None] | str) -> None:
    """Prints to which formats the trained model can be exported, and why not to the others.

    `exports` is the reason by format (None if possible), or the reason why that is not known.
    """
    if isinstance(exports, str):
        print_line(console, f"exports: not known ({exports})")
        return
    for name, why_not in exports.items():
        print_line(
            console,
            f"export --format {name}: "
            f"{'possible' if why_not is None else f'not possible: {why_not}'}",
        )
