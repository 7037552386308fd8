"""Terminal output of `vlm-tune init`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from vlm_tune.quoting import escaped, json_line
from vlm_tune.rendering.terminal import print_line

if TYPE_CHECKING:
    from vlm_tune.recipe_writer.written import Written

NAMED = 3
"""Findings of the check that are printed; `vlm-tune check` prints all kinds."""


def show_written(console: Console, written: Written) -> None:
    """Prints what a recipe was written for, the check's counts, and the next commands."""
    if written.facts is not None:
        facts = written.facts
        print_line(
            console,
            f"data: {facts.rows:,} rows ({' and '.join(facts.forms)}), {facts.media_text}, "
            f"{facts.distinct_answers:,} different answers to {facts.questions:,} questions "
            f"({facts.answers})",
        )
    if written.machine is not None:
        print_line(console, f"machine: {escaped(written.machine)}")
    if written.plan is not None:
        verdict = "fits" if written.fits else "does not fit"
        print_line(console, f"plan: {written.plan.needed / 1e9:.1f} GB, which {verdict}")
    if written.framework is not None:
        print_line(console, f"converted from {written.framework}")
    if written.unmatched:
        console.print(Text("no counterpart:", style="yellow"))
        for each in written.unmatched:
            value = json_line(each.value)
            print_line(console, f"  {escaped(each.key)}: {value}: {escaped(each.reason)}")
    _show_check(console, written)
    console.print(Text(f"written: {escaped(str(written.path))}", style="bold green"))
    print_line(console, "next:")
    for command in written.commands:
        print_line(console, f"  {escaped(command)}")


def _show_check(console: Console, written: Written) -> None:
    report = written.report
    if report is None:
        print_line(console, f"check: not possible here: {escaped(written.unchecked or '')}")
        return
    errors = report.error_counts.total()
    warnings = report.warning_counts.total()
    style = "bold red" if errors else ""
    rows = f" in the first {report.sample:,} rows of each source" if report.sample else ""
    console.print(Text(f"check: {errors:,} errors, {warnings:,} warnings{rows}", style=style))
    for finding in (*report.errors, *report.warnings)[:NAMED]:
        place = finding.source + (f", row {finding.row}" if finding.row else "")
        print_line(console, f"  {escaped(place)}: {escaped(finding.message)}")
