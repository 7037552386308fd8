"""Terminal output of `vlm-tune plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from vlm_tune.memory_plan.results import Plan, StagePlan
from vlm_tune.rendering.terminal import duration, print_line

CAUSES = {
    "frozen": "frozen weights",
    "trained": "trained weights (fp32)",
    "adapters": "LoRA weights (fp32)",
    "optimizer": "optimizer (AdamW)",
    "gradients": "gradients",
    "activations": "activations",
    "logits": "logits",
    "exchange": "exchange between processes",
    "collectives": "NCCL's buffers",
    "holes": "holes between tensors",
    "workspaces": "cuBLAS workspaces",
    "kernels": "compiled kernels (oneDNN)",
    "base": "process, libraries",
}


def gigabytes(size: float) -> str:
    """Formats bytes as 0.35 GB."""
    return f"{size / 1e9:,.2f} GB"


def show_plan(console: Console, plan: Plan) -> None:
    """Prints a recipe's plan: parameters, memory and FLOPs of each stage, and the verdict.

    If the recipe does not fit, changes that reduce its memory follow.
    """
    where = f"{plan.processes} processes" if plan.processes > 1 else "1 process"
    where += f", ZeRO-{plan.zero}" if plan.processes > 1 or plan.zero else ""
    where += {
        "none": "",
        "optimizer": ", optimizer offloaded",
        "all": ", optimizer and weights offloaded",
    }[plan.offload]
    quantized = f", LLM in {plan.quantize}" if plan.quantize else ""
    console.print(
        Text(f"{plan.name}: {plan.precision}{quantized}, on {plan.device}, {where}", style="bold")
    )
    for stage in plan.stages:
        _show_stage(console, stage)
        _show_time(console, plan, stage)
    if plan.allocator == "malloc":
        # Measured with glibc 2.36, as docs/plan.md says.
        why = "no C++ compiler, or addresses are limited (ulimit -v)"
        console.print(
            Text(
                f"{why}: tensors lie where malloc puts them, and a run may take a third more",
                style="yellow",
            )
        )
    if plan.machine is not None and plan.machine.lacks:
        print_line(console, f"\n{plan.machine.device}: {'; '.join(plan.machine.lacks)}", "yellow")
    verdict = f"needs {gigabytes(plan.needed)} on each device"
    if plan.gpu_memory is not None:
        fits = plan.fits
        verdict += f", {'fits' if fits else 'does not fit'} in {gigabytes(plan.gpu_memory)}"
        console.print(Text(f"\n{verdict}", style="bold green" if fits else "bold red"))
    else:
        console.print(Text(f"\n{verdict}", style="bold"))
    for advice in plan.advice:
        mark = (
            "fits"
            if plan.gpu_memory is not None and advice.needed <= plan.gpu_memory
            else "does not fit"
        )
        sets = "".join(f" --set {change}" for change in advice.changes)
        console.print(
            Text(
                f"  {gigabytes(advice.needed):>10}  {mark:12}  "
                f"{advice.text}{':' if sets else ''}{sets}"
            )
        )
    console.print(Text(f"planned in {plan.seconds:.1f} s", style="dim"))


def _show_stage(console: Console, stage: StagePlan) -> None:
    console.print(Text(f"\n{stage.name}", style="bold"))
    console.print(_parameters(stage))
    console.print(_memory(stage))
    _show_step(console, stage)


def _parameters(stage: StagePlan) -> Table:
    """The parameters and weights of a stage by part, and their sums."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("  part", "parameters", "trained", "of it LoRA", "share", "weights"):
        table.add_column(name, justify="left" if name == "  part" else "right")
    for part in stage.parts:
        share = f"{part.trained / max(part.total, 1):.2%}"
        table.add_row(
            f"  {part.part}",
            f"{part.total:,}",
            f"{part.trained:,}",
            f"{part.adapters:,}",
            share,
            gigabytes(part.bytes),
        )
    total = sum(part.total for part in stage.parts)
    trained = sum(part.trained for part in stage.parts)
    adapters = sum(part.adapters for part in stage.parts)
    weights = sum(part.bytes for part in stage.parts)
    table.add_row(
        "  all",
        f"{total:,}",
        f"{trained:,}",
        f"{adapters:,}",
        f"{trained / max(total, 1):.2%}",
        gigabytes(weights),
        style="bold",
    )
    return table


def _memory(stage: StagePlan) -> Table:
    """The memory of a stage by cause."""
    memory = Table(box=None, pad_edge=False, header_style="dim")
    memory.add_column("  memory at the peak")
    memory.add_column("", justify="right")
    for name, text in CAUSES.items():
        if size := getattr(stage.memory, name):
            memory.add_row(f"  {text}", gigabytes(size))
    memory.add_row("  all", gigabytes(stage.memory.total), style="bold")
    if stage.loading > stage.memory.total:
        memory.add_row("  before the first step", gigabytes(stage.loading), style="bold")
    return memory


def _show_step(console: Console, stage: StagePlan) -> None:
    """Prints the largest batch of a stage, its FLOPs, its feature cache and what it offloads."""
    peak = stage.peak
    labels = f", {peak.labels:,} label tokens" if peak.labels != peak.length else ""
    cache = (
        f"{gigabytes(stage.feature_cache)} on disk"
        if stage.feature_cache
        else "on disk, size unknown"
        if stage.cached
        else "none"
    )
    for name, text in (
        ("batch", f"{peak.rows:,} rows x {peak.length:,} tokens{labels}"),
        ("known from", stage.source),
        (
            "step",
            f"{stage.flops / 1e12:,.3g} TFLOP a device, "
            f"{stage.mean.tokens:,.0f} tokens a micro-batch",
        ),
        ("feature cache", f"{cache} ({stage.why_cached})"),
    ):
        console.print(Text(f"  {name:15}{text}"))
    if stage.host:
        console.print(
            Text(
                f"  {'offloaded':15}{gigabytes(stage.host)} "
                "of the machine's memory for each process"
            )
        )


def _show_time(console: Console, plan: Plan, stage: StagePlan) -> None:
    """Prints the steps of a stage, and the time that they are expected to take on this machine."""
    if stage.steps is None:
        print_line(console, f"  {'steps':15}not known: they are counted of the data's rows")
        return
    line = f"  {'steps':15}{stage.steps:,}"
    if (expected := plan.time(stage)) is not None and plan.machine is not None:
        rate = (
            f"{plan.machine.rate / 1e9:,.3g} GFLOP/s of {plan.machine.precision} products, "
            "measured just now"
        )
        line += (
            f", expected to take {duration(expected[0])} to {duration(expected[1])} here "
            f"(an estimate from {rate}; without evaluation)"
        )
    print_line(console, line)
