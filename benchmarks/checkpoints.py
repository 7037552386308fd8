"""Cost of checkpoints, and time of a resumed run to its first step, with a recipe's model and data.

Overhead: one run whose every step takes the same rows. `--apart` steps that begin with a save
alternate with as many without. The additional time of the former is the cost of a save, which
includes writing it beside the training. The median over the saves is divided by the seconds of
`--every` steps. A save that is still being written when the steps without one begin would spoil
them, so `writer_s` must be less than `apart_s`. Start: from the process's start to the end of its
first step, cold and resumed in turns, with prepared rows and the tower's features cached in both.

Run: python -m benchmarks.checkpoints [RECIPE] [--every 50] [--apart 3] [--saves 3] [--starts 3]
     [--set key=value ...]
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlm_tune.config.load import load_recipe


def overhead(
    recipe: str, overrides: list[str], folder: Path, *, every: int, apart: int, saves: int
) -> dict[str, Any]:
    """Seconds of a step and of a save, and the overhead of a save every `every` steps."""
    from vlm_tune.api import sft
    from vlm_tune.train.checkpoint import CheckpointWriter
    from vlm_tune.train.trainer import StageLoop

    began: list[float] = []
    written: list[float] = []
    windows = StageLoop._windows
    step = StageLoop._step
    write = CheckpointWriter._write

    def same(loop: StageLoop) -> Iterator[tuple[list[Any], float]]:
        batches, waited = next(windows(loop))
        return ((batches, waited) for _ in range(loop.total))

    def timed_step(*arguments: Any) -> float:
        began.append(time.perf_counter())
        return step(*arguments)

    def timed_write(*arguments: Any) -> None:
        start = time.perf_counter()
        write(*arguments)
        written.append(time.perf_counter() - start)

    StageLoop._windows, StageLoop._step, CheckpointWriter._write = (  # type: ignore[method-assign]
        same,
        timed_step,
        timed_write,
    )
    # The first saves come after the first steps, which are slower than others.
    sizes = {
        "train.steps": 2 * apart * (saves + 1) + 1,
        "train.checkpoints.every": 2 * apart,
        "train.checkpoints.keep": 2,
    }
    settings = [*short(folder / "overhead"), *(f"{key}={value}" for key, value in sizes.items())]
    # Forced, because so few steps would not be compiled; a real run's are.
    sft(load_recipe(recipe, ["train.compile=true", *overrides, *settings]))
    seconds = [after - before for before, after in pairwise(began)]
    # Windows of steps: one from the step that ends with a save, and one as many steps later.
    firsts = range(2 * apart - 1, len(seconds) - 2 * apart + 1, 2 * apart)
    pairs = [
        (sum(seconds[first : first + apart]), sum(seconds[first + apart : first + 2 * apart]))
        for first in firsts
    ]
    plain = statistics.median(other for _, other in pairs) / apart
    costs = [saved - other for saved, other in pairs]
    checkpoint = next((folder / "overhead").glob("stages/*/checkpoints/step-*"))
    return {
        "step_s": round(plain, 3),
        "steps_s": [round(second, 3) for second in seconds],
        "apart_s": round(plain * apart, 3),
        "writer_s": round(max(written[:-1]), 3),
        "save_costs_s": [round(cost, 3) for cost in costs],
        "checkpoint_mb": round(
            sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) / 1e6, 1
        ),
        "overhead": round(statistics.median(costs) / (every * plain), 5),
    }


def short(output: Path) -> list[str]:
    """Overrides for a run that only trains, without validation, test and samples."""
    alone = [
        "train.epochs=null",
        "train.log_every=1",
        "data.validation=[]",
        "data.test=[]",
        "evaluate.samples=0",
    ]
    return [f"output={output}", *alone]


def first_step(recipe: str, overrides: list[str], output: Path, *options: str) -> float:
    """Seconds from the start of a process to the end of its first step.

    The process is then stopped, which saves a checkpoint.
    """
    settings = [*overrides, *short(output), "train.steps=100000"]
    command = [
        sys.executable,
        "-m",
        "vlm_tune.cli",
        "sft",
        recipe,
        *options,
        *(part for s in settings for part in ("--set", s)),
    ]
    log = output / "log.jsonl"
    known = 0
    if "--resume" in options:
        known = log.read_text().count('"event": "train"')
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (
        log.is_file()
        and child.poll() is None
        and log.stat().st_mtime_ns
        and log.read_text().count('"event": "train"') > known
    ):
        if child.poll() is not None:
            raise RuntimeError(child.communicate()[1][-2000:])
        time.sleep(0.02)
    seconds = time.monotonic() - started
    child.send_signal(signal.SIGTERM)
    errors = child.communicate()[1]
    if child.returncode != 130:
        raise RuntimeError(errors[-2000:])
    return round(seconds, 2)


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="recipes/easyvqa-smollm2-lora.yaml")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--apart", type=int, default=3)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures: dict[str, Any] = {"every": options.every}
        figures |= overhead(
            options.recipe,
            options.set,
            folder,
            every=options.every,
            apart=options.apart,
            saves=options.saves,
        )
        print(json.dumps(figures), file=sys.stderr, flush=True)
        figures |= {"cold_s": [], "resumed_s": []}
        for number in range(options.starts):
            output = folder / f"start-{number}"
            figures["cold_s"].append(first_step(options.recipe, options.set, output))
            figures["resumed_s"].append(first_step(options.recipe, options.set, output, "--resume"))
        figures["resume_takes_longer_s"] = round(
            statistics.median(figures["resumed_s"]) - statistics.median(figures["cold_s"]), 2
        )
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
