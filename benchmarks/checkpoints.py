"""What checkpoints cost a run, and how long a resumed run takes to its first step, by a recipe's real model and data.

Overhead: the seconds that the training thread spends on a save, and the processor seconds that the writing thread takes
away from it at most, against the seconds of `--every` steps. Start: from the process's start to the end of its first step,
cold and resumed, with the prepared rows and the tower's features cached in both.
Run: python -m benchmarks.checkpoints [RECIPE] [--every 50] [--saves 3] [--set key=value ...]
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
from pathlib import Path
from typing import Any

from vlm_tune.recipe import load_recipe


def overhead(recipe: str, overrides: list[str], folder: Path, *, every: int, saves: int) -> dict[str, float]:
    """Seconds of a step and of a save, and the share that a save every so many steps takes."""
    from vlm_tune.api import sft
    from vlm_tune.train.checkpoint import CheckpointWriter
    from vlm_tune.train.loop import StageLoop

    blocked: list[float] = []
    writing: list[float] = []
    wall: list[float] = []
    steps: list[float] = []

    def timed(real: Any, times: list[float], clock: Any, also: list[float] | None = None) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            before, began = clock(), time.perf_counter()
            result = real(*arguments, **named)
            times.append(clock() - before)
            if also is not None:
                also.append(time.perf_counter() - began)
            return result

        return run

    StageLoop._save = timed(StageLoop._save, blocked, time.perf_counter)  # type: ignore[method-assign]
    StageLoop._step = timed(StageLoop._step, steps, time.perf_counter)  # type: ignore[method-assign]
    CheckpointWriter._write = timed(CheckpointWriter._write, writing, time.thread_time, wall)  # type: ignore[method-assign]
    apart = 4
    sizes = {"train.steps": apart * saves, "train.checkpoints.every": apart, "train.checkpoints.keep": 2}
    loaded = load_recipe(recipe, [*overrides, *short(folder / "overhead"), *(f"{key}={value}" for key, value in sizes.items())])
    sft(loaded)
    step = statistics.median(steps)
    cost = statistics.median(blocked) + statistics.median(writing)
    kept = next((folder / "overhead").glob("stages/*/checkpoints/step-*"))
    return {
        "step_s": round(step, 3),
        "save_blocks_s": round(statistics.median(blocked), 3),
        "writer_cpu_s": round(statistics.median(writing), 3),
        "writer_wall_s": round(statistics.median(wall), 3),
        "checkpoint_mb": round(sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()) / 1e6, 1),
        "overhead": round(cost / (every * step), 5),
    }


def short(output: Path) -> list[str]:
    """Overrides for a run of steps alone."""
    alone = ["train.epochs=null", "train.log_every=1", "data.validation=[]", "data.test=[]", "evaluate.samples=0"]
    return [f"output={output}", *alone]


def first_step(recipe: str, overrides: list[str], output: Path, *options: str) -> float:
    """Seconds from the start of a process to the end of its first step; it is then stopped, with a checkpoint."""
    settings = [*overrides, *short(output), "train.steps=100000"]
    command = [sys.executable, "-m", "vlm_tune.cli", "sft", recipe, *options, *(part for s in settings for part in ("--set", s))]
    log, known = output / "log.jsonl", 0
    if "--resume" in options:
        known = log.read_text().count('"event": "train"')
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (log.is_file() and child.poll() is None and log.stat().st_mtime_ns and log.read_text().count('"event": "train"') > known):
        if child.poll() is not None:
            raise RuntimeError(child.communicate()[1][-2000:])
        time.sleep(0.02)
    seconds = time.monotonic() - started
    child.send_signal(signal.SIGTERM)
    said = child.communicate()[1]
    if child.returncode != 130:
        raise RuntimeError(said[-2000:])
    return round(seconds, 2)


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/easyvqa-smollm2-lora.yaml")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--set", action="append", default=[])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, Any] = {"every": asked.every}
        found |= overhead(asked.recipe, asked.set, folder, every=asked.every, saves=asked.saves)
        print(json.dumps(found), flush=True)
        found["cold_s"] = first_step(asked.recipe, asked.set, folder / "start")
        found["resumed_s"] = first_step(asked.recipe, asked.set, folder / "start", "--resume")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
