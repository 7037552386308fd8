"""Commands on a trained model: merge, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vlm_tune.cli.options import (
    AcceptBaseOption,
    BaseOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    TaskOption,
    bases_by_part,
    check_choice,
    check_dtype,
    print_json,
    print_text,
    quiet_libraries,
    use_device,
)

if TYPE_CHECKING:
    from vlm_tune.exporting import ExportReport


def merge(
    model: Annotated[Path, typer.Argument(metavar="RUN", help="a run or a checkpoint")],
    output: Annotated[Path, typer.Option(help="the folder to write")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bf16, fp16 or fp32; by default bf16, or a finer type where bf16 is too coarse"
        ),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="largest change of logits by rounding; 0.02 by default")
    ] = None,
    task: TaskOption = None,
    base: BaseOption = None,
    accept_other_base: AcceptBaseOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge LoRA weights into the 16-bit base, verify, and write a self-contained folder."""
    from dataclasses import asdict

    check_dtype(dtype)
    use_device(device)
    quiet_libraries()
    from vlm_tune.exporting.merge import merge as run
    from vlm_tune.rendering.terminal import Display

    with Display(Console(stderr=True)):
        report = run(
            model,
            output,
            dtype=dtype,
            tolerance=tolerance,
            task=task,
            base=bases_by_part(base),
            accept_other_base=accept_other_base,
        )
    if as_json:
        print_json(asdict(report))
    else:
        from vlm_tune.rendering.proofs import merge_proof

        print_text(
            f"merged LoRA on {', '.join(report.parts)} into {report.base}\n{merge_proof(report)}\n"
            f"model: {output}"
        )


def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Option(help="the folder to write")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="transformers (merged model), adapter (PEFT folder) or gguf (merged, for "
            "llama.cpp)",
        ),
    ] = "transformers",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bf16, fp16 or fp32 (gguf: also q8_0); by default the merge's or the model's own"
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="maximum size of a weights file, for the format transformers")
    ] = "5GB",
    verify: Annotated[
        bool, typer.Option(help="open the export and compare its outputs with MODEL's")
    ] = True,
    task: TaskOption = None,
    base: BaseOption = None,
    accept_other_base: AcceptBaseOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL in another library's layout, and verify it with that library."""
    from dataclasses import asdict

    check_choice("--format", format_, ("transformers", "adapter", "gguf"))
    if dtype is not None:
        check_choice(
            "--dtype", dtype, ("bf16", "fp16", "fp32", *(("q8_0",) if format_ == "gguf" else ()))
        )
    use_device(device)
    quiet_libraries()
    from vlm_tune.exporting import export as run
    from vlm_tune.rendering.terminal import Display

    with Display(Console(stderr=True)):
        report = run(
            model,
            output,
            format=format_,
            dtype=dtype,
            max_shard_size=max_shard_size,
            verify=verify,
            task=task,
            base=bases_by_part(base),
            accept_other_base=accept_other_base,
        )
    if as_json:
        print_json(asdict(report))
    else:
        _print_export(report, output)


def _print_export(report: ExportReport, output: Path) -> None:
    from vlm_tune.rendering.proofs import export_proof

    print_text(
        f"{report.format} of {report.parameters:,} parameters in {report.dtype}\n"
        f"{export_proof(report)}"
    )
    for note in report.notes:
        print_text(f"note: {note}")
    print_text(f"model: {output}")
