"""A step of DPO beside one of TRL's DPOTrainer, on the same pairs of answers.

Run: python -m benchmarks.preferences [--json FILE]

The model has a ViT-B/16 tower (196 tokens an image) and SmolLM2-135M; tower and connector have
random weights. First both sides compute the loss of the same pairs from the same weights in fp32,
and the bench ends if they differ. Then the settings of `TRIED` are tried in short runs, and the
best ones take steps in turns, with ten pairs an image and with one. Steps begin with reading the
rows, and both sides run the tower in each step. The reference is the model without its adapter.

With images, TRL disables batches without padding and refuses to compute the reference's
log-probabilities beforehand. Its gradient checkpointing is off, since it only computes more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import material
from benchmarks.peers import SCRIPTS
from vlm_tune.resources import cache_folder, peak_resident_memory

LAYOUTS = (10, 1)
"""Pairs an image."""

COMMANDS = {
    "ours": [sys.executable, "-m", "benchmarks.preferences_ours"],
    "trl": [sys.executable, str(SCRIPTS / "train_dpo.py")],
}

TRIED: dict[str, dict[str, tuple[Any, ...]]] = {
    "ours": {"precision": ("fp32", "bf16")},
    "trl": {
        "precision": ("fp32", "bf16", "bf16_weights"),
        "attention": ("sdpa", "eager"),
    },
}
"""Values of each setting. TRL's bf16 is autocast over fp32 weights; or its weights are bf16."""

FIGURES = ("loss", "logps/chosen", "logps/rejected")
TOLERANCE = 1e-3
"""Relative difference of the figures of the two sides at the start, in fp32."""

WARM = 1
"""Steps of each run that don't count."""


@dataclass
class Contender:
    """A process that takes training steps one at a time.

    Attributes:
        name: "ours" or "trl".
        settings: By the keys of `TRIED`.
        process: It takes a step for each line that it reads.
        log: The file of its errors.
        seconds: Of its steps so far.
        figures: Of its steps so far: `FIGURES` by name.
        memory_mb: Its largest resident set after its last step.
    """

    name: str
    settings: Mapping[str, Any]
    process: subprocess.Popen[str] = field(repr=False)
    log: Path
    seconds: list[float] = field(default_factory=list)
    figures: list[dict[str, float]] = field(default_factory=list)
    memory_mb: int = 0

    def step(self) -> None:
        """Has it take a step.

        Raises:
            SystemExit: the process ended before the step did.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            line = next(line for line in self.process.stdout if line.startswith('{"seconds"'))
        except (BrokenPipeError, StopIteration):
            code = self.process.wait()
            errors = "\n".join(self.log.read_text(encoding="utf-8").splitlines()[-5:])
            message = f"{self.name} with {self.settings} ended with exit code {code}:\n{errors}"
            raise SystemExit(message) from None
        figures = json.loads(line)
        self.seconds.append(figures.pop("seconds"))
        self.figures.append(figures)
        self.memory_mb = peak_resident_memory(self.process.pid) // 1_000_000

    def median(self) -> float:
        """Seconds of a step, of those after the warm ones."""
        return statistics.median(self.seconds[WARM:])


@dataclass(frozen=True)
class Layout:
    """The rows of a comparison, and how many of them are a step.

    Attributes:
        rows: The folder with preferences.jsonl.
        each: Pairs an image.
        pairs: Pairs a step.
    """

    rows: Path
    each: int
    pairs: int


class Preferences:
    """The model, the rows and the options of both sides."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.model = material.write_llava(options.cache.absolute(), options.decoder, 196)

    def layout(self, each: int, pairs: int, *, steps: int) -> Layout:
        """Writes the rows of a comparison: at least as many as its steps take."""
        rows = self.folder / f"{each}-pairs-{pairs}-{steps}"
        material.write_preferences(rows, pairs * steps // each, each)
        return Layout(rows, each, pairs)

    @contextmanager
    def running(
        self, name: str, layout: Layout, settings: Mapping[str, Any], *, steps: int
    ) -> Iterator[Contender]:
        """A contender that waits for its first step, and is ended afterwards."""
        request = {
            "model": str(self.model),
            "material": str(layout.rows),
            "rows": "preferences",
            "steps": steps,
            # Ours counts images, TRL rows.
            "batch": layout.pairs // layout.each if name == "ours" else layout.pairs,
            "learning_rate": 5e-5,
            "threads": self.options.threads,
            **settings,
        }
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.options.threads),
            "VLM_TUNE_CACHE": str(self.folder / "cache"),
            "HF_DATASETS_CACHE": str(self.folder / "datasets"),
            "HF_HUB_OFFLINE": "1",
        }
        log = self.folder / f"{name}.log"
        with log.open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [*COMMANDS[name], json.dumps(request)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
            )
        try:
            yield Contender(name, settings, process, log)
        finally:
            process.kill()
            process.wait()

    def check_figures(self) -> dict[str, dict[str, float]]:
        """The figures of one step of both sides in fp32, on the same pairs.

        Raises:
            SystemExit: they differ by more than `TOLERANCE`.
        """
        layout = self.layout(2, 4, steps=1)
        figures = {}
        for name, tried in TRIED.items():
            settings = {key: values[0] for key, values in tried.items()}
            with self.running(name, layout, settings, steps=1) as contender:
                contender.step()
                figures[name] = contender.figures[0]
        for figure in FIGURES:
            ours, theirs = figures["ours"][figure], figures["trl"][figure]
            if abs(ours - theirs) > TOLERANCE * abs(theirs):
                raise SystemExit(f"the sides differ in {figure} at the start: {figures}")
        return figures

    def best_settings(self, name: str, layout: Layout) -> dict[str, Any]:
        """The fastest of a side's settings in short runs."""
        seconds: dict[tuple[Any, ...], float] = {}
        steps = WARM + self.options.trial_steps
        for values in product(*TRIED[name].values()):
            settings = dict(zip(TRIED[name], values, strict=True))
            with self.running(name, layout, settings, steps=steps) as contender:
                for _ in range(steps):
                    contender.step()
            seconds[values] = contender.median()
            print(f"  {name} {settings}: {seconds[values]:.2f} s a step", flush=True)
        return dict(zip(TRIED[name], min(seconds, key=seconds.__getitem__), strict=True))

    def compare(self, each: int) -> dict[str, Any]:
        """The figures of both sides' best settings, whose steps are taken in turns."""
        steps = WARM + self.options.steps
        layout = self.layout(each, self.options.pairs, steps=steps)
        best = {name: self.best_settings(name, layout) for name in TRIED}
        with (
            self.running("ours", layout, best["ours"], steps=steps) as ours,
            self.running("trl", layout, best["trl"], steps=steps) as trl,
        ):
            for _ in range(steps):
                ours.step()
                trl.step()
        ratios = [b / a for a, b in zip(ours.seconds[WARM:], trl.seconds[WARM:], strict=True)]
        figures = {
            "pairs_an_image": each,
            "pairs_a_step": layout.pairs,
            "settings": best,
            "seconds_a_step": {"ours": ours.median(), "trl": trl.median()},
            "times_as_fast": statistics.median(ratios),
            "times_as_fast_each": ratios,
            "memory_mb": {"ours": ours.memory_mb, "trl": trl.memory_mb},
            "memory": ours.memory_mb / trl.memory_mb,
        }
        print(
            f"{each} pairs an image: {figures['times_as_fast']:.2f} times as fast, "
            f"{figures['memory']:.2f} of the memory",
            flush=True,
        )
        return figures


def main() -> None:
    """Prints the ratios; with --json also saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--each", type=int, nargs="+", default=LAYOUTS, choices=LAYOUTS, help="pairs an image")
    add("--pairs", type=int, default=10, help="pairs of a step of both sides, a multiple of ten")
    add("--steps", type=int, default=5, help="steps of each side that count")
    add("--trial-steps", type=int, default=2, help="steps of each trial of settings that count")
    add("--decoder", type=Path, default=Path("models/smollm2-135m-instruct"))
    add("--threads", type=int, default=os.cpu_count())
    add("--cache", type=Path, default=cache_folder("preferences"))
    add("--json", type=Path)
    options = parser.parse_args()
    if options.pairs < 1 or options.pairs % max(LAYOUTS):
        parser.error("--pairs has to be a multiple of ten")
    options.decoder = options.decoder.absolute()
    with tempfile.TemporaryDirectory() as folder:
        bench = Preferences(options, Path(folder))
        start = bench.check_figures()
        print(f"in fp32 both start with {start['ours']}", flush=True)
        figures = {"start": start, "layouts": [bench.compare(each) for each in options.each]}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
