"""Steps of a training by us beside those of others by TRL, in turns and on the same images.

`benchmarks.preferences`, `benchmarks.rewards` and `benchmarks.families` use it. The model has a
real decoder; tower and connector have random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_tune.resources import cache_folder, peak_resident_memory

WARM = 1
"""Steps of each run that don't count."""

Tried = Mapping[str, Mapping[str, tuple[Any, ...]]]
"""The values of each setting that each side tries, by its name."""


@dataclass
class Contender:
    """A process that takes training steps one at a time.

    Attributes:
        name: "ours", or a name of TRL's sides.
        settings: By the keys of what it tries.
        process: It takes a step for each line that it reads.
        log: The file of its errors.
        seconds: Of its steps so far.
        figures: Of its steps so far, by name.
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
        rows: The folder with the rows.
        each: Rows an image.
        number: Rows a step.
    """

    rows: Path
    each: int
    number: int


@dataclass(frozen=True)
class Sides:
    """What two trainings are run by.

    Attributes:
        commands: The command of each side, which takes a request as its last argument.
        tried: The values of their settings.
        rows: The file of each side's rows, without its ending: "multi" joins those of an image.
        unit: What a row is called in figures, in the plural.
        write_model: Writes the model into a folder, with a decoder, and returns its own folder.
        write_rows: Writes the rows about so many images into a folder, `each` rows an image.
    """

    commands: Mapping[str, Sequence[str]]
    tried: Tried
    rows: Mapping[str, str]
    unit: str
    write_model: Callable[[Path, Path], Path]
    write_rows: Callable[..., Any]

    def of(self, each: int) -> list[str]:
        """The sides of a layout of `each` rows an image, ours first.

        With one row an image there is nothing to join.
        """
        return [name for name in self.tried if each > 1 or self.rows[name] != "multi"]


class Comparison:
    """The model, the rows and the options of both sides."""

    def __init__(self, sides: Sides, options: argparse.Namespace, folder: Path) -> None:
        self.sides = sides
        self.options = options
        self.folder = folder
        self.best: dict[str, dict[str, Any]] = {}
        self.model = sides.write_model(options.cache.absolute(), options.decoder)

    def layout(self, each: int, number: int, *, steps: int) -> Layout:
        """Writes the rows of a comparison: at least as many as its steps take."""
        rows = self.folder / f"{each}-{self.sides.unit}-{number}-{steps}"
        self.sides.write_rows(rows, number * steps // each, each=each)
        return Layout(rows, each, number)

    @contextmanager
    def running(
        self, name: str, layout: Layout, settings: Mapping[str, Any], *, steps: int
    ) -> Iterator[Contender]:
        """A contender that waits for its first step, and is ended afterwards."""
        form = self.sides.rows[name]
        # Ours counts images, TRL rows.
        images = name == "ours" or form == "multi"
        request = {
            "model": str(self.model),
            "material": str(layout.rows),
            "rows": form,
            "steps": steps,
            "batch": layout.number // layout.each if images else layout.number,
            "learning_rate": 5e-5,
            "threads": self.options.threads,
            "cpu_time": self.options.cpu_time,
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
                [*self.sides.commands[name], json.dumps(request)],
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

    def first_figures(self, layout: Layout) -> dict[str, dict[str, float]]:
        """The figures of one step of the sides that train on the rows of ours.

        Each takes the first of its settings.
        """
        figures = {}
        for name, tried in self.sides.tried.items():
            if self.sides.rows[name] != self.sides.rows["ours"]:
                continue
            settings = {key: values[0] for key, values in tried.items()}
            with self.running(name, layout, settings, steps=1) as contender:
                contender.step()
                figures[name] = contender.figures[0]
        return figures

    def best_settings(self, name: str, layout: Layout) -> dict[str, Any]:
        """The fastest of a side's settings in short runs of the first layout that it is in.

        They are tried key by key, with the best values of the keys before. Of TRL's rows each has
        its image, so its work is that of every layout.
        """
        if name in self.best:
            return self.best[name]
        tried = self.sides.tried[name]
        best = {key: values[0] for key, values in tried.items()}
        fastest = self._trial(name, layout, best)
        for key, values in tried.items():
            for value in values[1:]:
                settings = {**best, key: value}
                seconds = self._trial(name, layout, settings)
                if seconds < fastest:
                    best = settings
                    fastest = seconds
        self.best[name] = best
        return best

    def _trial(self, name: str, layout: Layout, settings: Mapping[str, Any]) -> float:
        """Seconds of a step in a short run."""
        steps = WARM + self.options.trial_steps
        with self.running(name, layout, settings, steps=steps) as contender:
            for _ in range(steps):
                contender.step()
        print(f"  {name} {settings}: {contender.median():.2f} s a step", flush=True)
        return contender.median()

    def compare(self, each: int) -> dict[str, Any]:
        """The figures of the sides' best settings, whose steps are taken in turns."""
        steps = WARM + self.options.steps
        layout = self.layout(each, self.options.number, steps=steps)
        best = {name: self.best_settings(name, layout) for name in self.sides.of(each)}
        with ExitStack() as stack:
            sides = {
                name: stack.enter_context(self.running(name, layout, settings, steps=steps))
                for name, settings in best.items()
            }
            for _ in range(steps):
                for side in sides.values():
                    side.step()
        ours = sides["ours"]
        ratios = {
            name: [b / a for a, b in zip(ours.seconds[WARM:], side.seconds[WARM:], strict=True)]
            for name, side in sides.items()
            if side is not ours
        }
        figures = {
            f"{self.sides.unit}_an_image": each,
            f"{self.sides.unit}_a_step": layout.number,
            "settings": best,
            "seconds_a_step": {name: side.median() for name, side in sides.items()},
            f"{self.sides.unit}_per_s": {
                name: layout.number / side.median() for name, side in sides.items()
            },
            "times_as_fast": {name: statistics.median(times) for name, times in ratios.items()},
            "times_as_fast_each": ratios,
            "figures": {name: side.figures[WARM:] for name, side in sides.items()},
            "memory_mb": {name: side.memory_mb for name, side in sides.items()},
            "memory": {name: ours.memory_mb / sides[name].memory_mb for name in ratios},
        }
        for name in ratios:
            print(
                f"{each} {self.sides.unit} an image: {figures['times_as_fast'][name]:.2f} times as "
                f"fast as {name}, {figures['memory'][name]:.2f} of its memory",
                flush=True,
            )
        return figures


def options_of(described: str | None, layouts: Sequence[int], number: int) -> argparse.Namespace:
    """The options of the command line.

    Args:
        described: What the command is described by.
        layouts: The numbers of rows an image, the largest first.
        number: The rows of a step.
    """
    parser = argparse.ArgumentParser(
        description=described, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--each", type=int, nargs="+", default=layouts, choices=layouts, help="rows an image")
    add(
        "--number",
        type=int,
        default=number,
        help=f"rows of a step of both sides, a multiple of {max(layouts)}",
    )
    add("--steps", type=int, default=5, help="steps of each side that count")
    add("--trial-steps", type=int, default=2, help="steps of each trial of settings that count")
    add("--decoder", type=Path, default=Path("models/smollm2-135m-instruct"))
    add("--threads", type=int, default=os.cpu_count())
    add("--cpu-time", action="store_true", help="measure the processes' own time, not the clock's")
    add("--cache", type=Path, default=cache_folder("preferences"))
    add("--json", type=Path)
    options = parser.parse_args()
    if options.number < 1 or options.number % max(layouts):
        parser.error(f"--number has to be a multiple of {max(layouts)}")
    options.decoder = options.decoder.absolute()
    return options


def compare_layouts(
    options: argparse.Namespace, sides: Sides, start: Callable[[Comparison], Any]
) -> None:
    """Prints what both sides `start` with, and their ratios; with --json also saves."""
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(sides, options, Path(folder))
        begun = start(comparison)
        print(f"in fp32 both start with {begun}", flush=True)
        layouts = [comparison.compare(each) for each in options.each]
    figures = {"start": begun, "layouts": layouts}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))
