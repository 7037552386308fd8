"""Whole runs as users start them: a resume to the bit, QLoRA by the command line, the demo."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.report import Report

ACCURACY = 0.99
"""Of the demo's test questions, at least."""


def resume(report: Report) -> None:
    """Six steps against three, a resume and three more: all tensors must be equal to the bit."""
    import torch
    from safetensors.torch import load_file

    from benchmarks.on_gpu.checks import recipe_text, write_small
    from vlm_tune.api import sft
    from vlm_tune.config.load import parse_recipe
    from vlm_tune.config.train import TrainSection

    small = write_small(report.folder, "causal", tiny=report.tiny)
    deterministic = "deterministic" in TrainSection.model_fields
    if not deterministic:
        report.note("this version has no train.deterministic: the runs are as deterministic as is")
    run = report.folder / "resumed"
    shutil.rmtree(run, ignore_errors=True)
    train = ", checkpoints: {every: 3, keep: 9}" + ", deterministic: true" * deterministic
    recipe = parse_recipe(recipe_text("causal", small.home, run, train))

    def tensors() -> dict[str, torch.Tensor]:
        (last,) = run.glob("stages/*/checkpoints/step-*6")
        return {
            f"{file.relative_to(last)}|{name}": tensor
            for file in sorted(last.rglob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }

    sft(recipe)
    whole = tensors()
    (last,) = run.glob("stages/*/checkpoints/step-*6")
    shutil.rmtree(last)
    shutil.rmtree(run / "model")
    for name in ("result.json", "report.html"):
        (run / name).unlink()
    for file in run.glob("stages/*/done.json"):
        file.unlink()
    sft(recipe, resume=True)
    resumed = tensors()
    report.check("names of the tensors", whole.keys() == resumed.keys(), f"{len(whole)}")
    unequal = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    report.check(
        "6 steps = 3 + resume + 3, to the bit",
        not unequal,
        f"{len(unequal)} tensors differ{': ' * bool(unequal)}{', '.join(unequal[:3])}",
    )


def qlora(report: Report) -> None:
    """QLoRA in NF4 by the command line: train, merge, score what was merged."""
    from benchmarks.on_gpu.checks import recipe_text, write_small

    small = write_small(report.folder, "causal", tiny=report.tiny)
    run, merged = report.folder / "qlora", report.folder / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    recipe = report.folder / "qlora.yaml"
    text = recipe_text("causal", small.home, run, quantize="nf4")
    # The run's own rows are its test part, for the scoring.
    source = f"[{{kind: file, path: {small.home / 'single.jsonl'}}}]"
    recipe.write_text(text.replace("tune:", f"  test: {source}\ntune:", 1))
    command(report, "sft", str(recipe), "--overwrite")
    command(report, "merge", str(run), "--output", str(merged))
    command(report, "eval", str(merged), "--recipe", str(recipe))


def demo(report: Report) -> None:
    """The demo's recipe on real data; whole on a GPU, two steps a stage under --tiny."""
    run = report.folder / "demo"
    recipe = Path("recipes/demo.yaml")
    if report.tiny:
        report.note("under --tiny the demo takes two steps a stage on 40 rows: no accuracy")
        text = re.sub(r"(split: \w+)", r"\1, limit: 40", recipe.read_text())
        text = text.replace("  max_length: 64", "  max_length: 64\n  workers: 1")
        recipe = report.folder / "demo.yaml"
        recipe.write_text(re.sub(r"epochs: \d+", "steps: 2", text))
    command(report, "sft", str(recipe), "--overwrite", "--set", f"output={run}")
    if not (run / "result.json").is_file():
        return
    finished = json.loads((run / "result.json").read_text())
    accuracy = finished["accuracy"]
    report.figure("demo", {"accuracy": accuracy, "seconds": finished["seconds_total"]})
    if report.tiny:
        report.not_run("the demo's accuracy", "the demo is cut short under --tiny")
    else:
        report.check("the demo's accuracy", accuracy >= ACCURACY, f"{accuracy:.4f}")


def command(report: Report, *arguments: str) -> None:
    """Checks that a command of `vlm-tune` ends with 0; its output is the phase's."""
    # A fork, which has imported what the command imports, of a process that has not used CUDA.
    process = multiprocessing.get_context("fork").Process(target=_command, args=(arguments,))
    process.start()
    process.join()
    name = " ".join(("vlm-tune", arguments[0]))
    report.check(name, process.exitcode == 0, f"exit code {process.exitcode}")


def _command(arguments: tuple[Any, ...]) -> None:
    from vlm_tune.cli import main

    sys.argv = ["vlm-tune", *arguments]
    main()
