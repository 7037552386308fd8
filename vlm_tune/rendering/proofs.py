"""What merges, exports and replays print of how they were verified."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm_tune.exporting import ExportReport
    from vlm_tune.exporting.merge import MergeReport
    from vlm_tune.train.replay import ReplayReport
from vlm_tune.rendering.check_text import NAMED


def replay_lines(report: ReplayReport) -> list[str]:
    """What a replay found: what agrees, and where first what does not."""
    differs = {found.what: found for found in report.differences}
    names = {"samples": "sample ids", "loss": "losses", "norm": "gradient norms"}
    lines = [
        f"stage {report.stage}, steps {report.start + 1:,} to {report.end:,} replayed in {report.seconds:.1f} s"
    ]
    for what in report.compared:
        found = differs.get(what)
        said = (
            "equal"
            if found is None
            else f"differ first at step {found.step:,}: the run had {found.run}, the replay {found.replay}"
        )
        lines.append(f"  {names[what]}: {said}")
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
    "llava": "opened by transformers' own classes",
    "adapter": "opened by plain PEFT over its base, text alone",
    "gguf": "read back from the files, computed as llama.cpp is meant to",
}


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def merge_proof(report: MergeReport) -> str:
    """What a merged model was compared with, and how it went: one that fails is not written."""
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
    """What an export was compared with, and how it went: one that fails is not written."""
    if report.difference is None:
        return "not verified"
    rounded = " beyond what q8_0 rounds" if report.dtype == "q8_0" else ""
    said = f"verified on {_rows(report.rows)}, {READERS[report.format]}:\n"
    said += f"  passed  logits within {report.difference:.2g} of the model's ({report.allowed:.2g} is allowed{rounded})"
    if report.same_text is not None:
        same = (
            "the same as the model's"
            if report.same_text
            else "those of the rounded weights, which are not all the model's"
        )
        said += f"\n  passed  greedy answers {same}"
    return said
