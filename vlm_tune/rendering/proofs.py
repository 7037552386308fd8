"""Terminal output of the verification of merges, exports and replays."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm_tune.exporting import ExportReport
    from vlm_tune.exporting.merge import MergeReport
    from vlm_tune.train.replay import ReplayReport
from vlm_tune.rendering.check_text import NAMED


def replay_lines(report: ReplayReport) -> list[str]:
    """Lines about a replay: the quantities that agree, and where others differ first."""
    differences = {difference.what: difference for difference in report.differences}
    names = {"samples": "sample ids", "loss": "losses", "norm": "gradient norms"}
    lines = [
        f"stage {report.stage}, steps {report.start + 1:,} to {report.end:,} "
        f"replayed in {report.seconds:.1f} s"
    ]
    for what in report.compared:
        difference = differences.get(what)
        outcome = (
            "equal"
            if difference is None
            else f"differ first at step {difference.step:,}: the run had {difference.run}, "
            f"the replay {difference.replay}"
        )
        lines.append(f"  {names[what]}: {outcome}")
    for step in report.checkpoints:
        tensors = report.tensors[step]
        first = ", ".join(tensors[:NAMED]) + (
            f" and {len(tensors) - NAMED} more" if len(tensors) > NAMED else ""
        )
        lines.append(
            f"  checkpoint of step {step:,}: "
            + (f"{len(tensors)} tensors differ: {first}" if tensors else "equal, bit for bit")
        )
    if not report.checkpoints:
        lines.append("  no kept checkpoint lies among these steps: weights are not compared")
    for name, (then, now) in report.environment.items():
        lines.append(
            f"  {name} was {then} and is {now}" + ("" if report.agrees else ", which may be why")
        )
    return [*lines, "the run agrees" if report.agrees else "the run differs"]


READERS = {
    "transformers": "opened by transformers' own classes",
    "adapter": "opened by plain PEFT over its base",
    "gguf": "read back from the files, computed as llama.cpp is meant to",
}


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def merge_proof(report: MergeReport) -> str:
    """Text about a merge's verification: each comparison and its outcome.

    A merged model that fails is not written.
    """
    from vlm_tune.exporting.merge import merge_lines

    lines = merge_lines(report)
    checks = ["passed", "passed", "passed" if report.same_text else "ALLOWED"]
    marks = [*checks, *["note  "] * (len(lines) - len(checks))]
    return "\n".join(
        [
            f"verified on {_rows(report.rows)}, computed in fp32:",
            *(f"  {mark}  {line}" for mark, line in zip(marks, lines, strict=True)),
        ]
    )


def export_proof(report: ExportReport) -> str:
    """Text about an export's verification: each comparison and its outcome.

    An export that fails is not written.
    """
    if report.difference is None:
        return "not verified"
    rounded = " beyond what q8_0 rounds" if report.dtype == "q8_0" else ""
    text = f"verified on {_rows(report.rows)}, {READERS[report.format]}:\n"
    text += (
        f"  passed  logits within {report.difference:.2g} of the model's "
        f"({report.allowed:.2g} is allowed{rounded})"
    )
    if report.same_text is not None:
        same = (
            "the same as the model's"
            if report.same_text
            else "those of the rounded weights, which are not all the model's"
        )
        text += f"\n  passed  greedy answers {same}"
    return text
