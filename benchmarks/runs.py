"""Measured runs of ours and of peers, each in its own process; and the machine's GEMM rate."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import material, ours
from benchmarks.peers import PEERS, SCRIPTS, install
from vlm_tune.resources import peak_resident_memory

GEMMS = ((2048, 2048, 2048), (1536, 576, 3072))
"""Products that are measured, of which the faster counts: a square one, and SmolLM2's widest."""

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
"""torch's dtypes of the precisions whose GEMM rates are measured."""


@dataclass(frozen=True)
class Length:
    """The length of a run: `warm` steps that don't count, and `steps` that do.

    After `seconds` a peer starts no further step once it has two that count.
    """

    warm: int
    steps: int
    seconds: float


@dataclass
class Run:
    """One measured run: medians over its steps, rates per second.

    Peak memory is the process's largest resident set.
    """

    name: str
    settings: dict[str, Any]
    questions: float = 0.0
    questions_per_s: float = 0.0
    tokens_per_s: float = 0.0
    supervised_per_s: float = 0.0
    operations_per_s: float = 0.0
    mfu: float = 0.0
    padding: float = 0.0
    stall: float = 0.0
    spread: float = 0.0
    peak_memory_mb: int = 0
    steps: int = 0
    seconds_total: float = 0.0
    preparing_s: float = 0.0
    failed: str = ""


def spread(rates: Sequence[float]) -> float:
    """The interquartile range divided by the median."""
    if len(rates) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(rates, n=4, method="inclusive")
    return (high - low) / middle


KILLED = -9
"""Exit code of a process killed by the time limit, or by the system when memory ran out."""


@dataclass(frozen=True)
class Ended:
    """A finished child process: exit code, output, errors, peak memory in MB, seconds."""

    code: int
    out: str
    errors: str
    memory_mb: int
    seconds: float

    @property
    def why(self) -> str:
        """Why it ended: the time limit, the last line of its errors, or its exit code."""
        if self.code == KILLED:
            return f"killed after {self.seconds:.0f} s"
        lines = [line for line in self.errors.strip().splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.code}"


def execute(command: Sequence[str], threads: int, timeout: float, **variables: str) -> Ended:
    """Runs a command with so many threads and additional environment variables.

    After `timeout` seconds it is killed.
    """
    environment = (
        os.environ
        | {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        | variables
    )
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=out, stderr=errors, env=environment)
        memory = 0
        while child.poll() is None:
            # The peak that `wait4` gives begins with this process's own, as children start with it.
            with contextlib.suppress(ProcessLookupError):
                memory = peak_resident_memory(child.pid)
            if time.perf_counter() - started > timeout:
                child.kill()
            time.sleep(0.05)
        ended = time.perf_counter() - started
        out.seek(0)
        errors.seek(0)
        return Ended(
            child.returncode,
            out.read(),
            errors.read(),
            memory // 1_000_000,
            ended,
        )


def gemm_rates(threads: int) -> dict[str, float]:
    """The machine's current GEMM rates by precision, in operations per second (best of `GEMMS`)."""
    import torch

    torch.set_num_threads(threads)
    return {
        name: max(_gemm_rate(getattr(torch, dtype), *shape) for shape in GEMMS)
        for name, dtype in DTYPES.items()
    }


def _gemm_rate(dtype: Any, rows: int, inner: int, wide: int) -> float:
    """The median rate of 24 products, of which the first four don't count.

    Measuring stops after 5 seconds.
    """
    import torch

    a = torch.randn(rows, inner).to(dtype)
    b = torch.randn(inner, wide).to(dtype)
    product = torch.empty(rows, wide, dtype=dtype)
    seconds = []
    while len(seconds) < 24 and sum(seconds) < 5:
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        seconds.append(time.perf_counter() - start)
    return 2 * rows * inner * wide / statistics.median(seconds[4:] or seconds[-1:])


@dataclass
class Bench:
    """Data, models, environments and settings that all runs of a comparison share."""

    folder: Path
    peers_folder: Path
    decoder: Path
    against: Sequence[str]
    recipe: Path | None = None
    image_tokens: int = 49
    images: int = 96
    threads: int = 2
    timeout: float = 1800
    cpu_time: bool = False
    checked: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.material = self.folder / f"material-{self.images}-{self.image_tokens}"
        self.answers = material.write_rows(self.material, self.images)
        material.write_models(self.material, self.decoder, self.image_tokens)
        self.pythons = {name: install(name, self.peers_folder) for name in self.against}
        self._works: dict[str, ours.Work] = {}

    @cached_property
    def a_image(self) -> float:
        """Mean number of questions per image."""
        return len(self.answers) / self.images

    def peer(
        self, name: str, settings: dict[str, Any], length: Length, timeout: float | None = None
    ) -> Run:
        """A run of a peer, stopped after `timeout` seconds (by default the bench's)."""
        unchecked = (name, settings["rows"]) not in self.checked
        request = {
            **settings,
            "material": str(self.material),
            "warm": length.warm,
            "steps": length.warm + length.steps,
            "seconds": length.seconds,
            "threads": self.threads,
            "cpu_time": self.cpu_time,
            "check": unchecked,
        }
        command = [str(self.pythons[name]), str(SCRIPTS / PEERS[name].script), json.dumps(request)]
        ended = execute(command, self.threads, timeout or self.timeout)
        line = next(
            (line for line in reversed(ended.out.splitlines()) if line.startswith('{"steps"')), None
        )
        if ended.code or line is None:
            return Run(name, settings, seconds_total=ended.seconds, failed=ended.why)
        report = json.loads(line)
        if unchecked:
            self.check(name, report["answers"])
            self.checked.add((name, settings["rows"]))
        counted = [step for step in report["steps"][length.warm :] if step["questions"]]
        if not counted:
            return Run(name, settings, seconds_total=ended.seconds, failed="no step was measured")
        formula = self.work(PEERS[name].kind).formula
        for step in counted:
            step["operations"] = formula.operations(
                ours.Amount(**{key: step[key] for key in ours.Amount.__dataclass_fields__})
            )

        def rate(key: str) -> float:
            return statistics.median(step[key] / step["seconds"] for step in counted)

        return Run(
            name,
            settings,
            questions=statistics.median(step["questions"] for step in counted),
            questions_per_s=rate("questions"),
            tokens_per_s=rate("tokens"),
            supervised_per_s=rate("supervised"),
            operations_per_s=rate("operations"),
            padding=1
            - sum(step["tokens"] for step in counted) / sum(step["padded"] for step in counted),
            stall=sum(step["waited"] for step in counted)
            / sum(step["seconds"] for step in counted),
            spread=spread([step["questions"] / step["seconds"] for step in counted]),
            peak_memory_mb=ended.memory_mb,
            steps=len(counted),
            seconds_total=ended.seconds,
        )

    def check(self, name: str, answers: list[str]) -> None:
        """Raises `SystemExit` unless a run trains on exactly the answers of the data."""
        # With a loss on whole sequences, the answers are parts of longer texts.
        if answers != self.answers and not (
            len(answers) == len(self.answers) and within(self.answers, answers)
        ):
            raise SystemExit(
                f"{name} trains on {len(answers)} answers that are not the {len(self.answers)} of "
                f"the data, e.g. {answers[:3]}"
            )

    def work(self, kind: str) -> ours.Work:
        """The useful work of a question in our layout; also checks the answers that we train on."""
        if kind not in self._works:
            self._works[kind] = ours.work(self._recipe(kind, {"batch": 1}, Path("unused"), 1))
            self.check("vlm_tune", self._works[kind].answers)
        return self._works[kind]

    def epoch(self, name: str, kind: str, settings: dict[str, Any]) -> Run:
        """A run of one epoch, by a peer or by ours.

        Ours finds no features and no compiled code of earlier runs.
        """
        if name not in PEERS:
            return self.ours(kind, settings, None)
        rows = self.images if settings["rows"] == "multi" else len(self.answers)
        return self.peer(name, settings, Length(0, math.ceil(rows / settings["batch"]), math.inf))

    def _recipe(self, kind: str, settings: dict[str, Any], output: Path, steps: int | None) -> str:
        amount: dict[str, Any] = {**settings, "steps": steps}
        if self.recipe and kind == "causal":
            return ours.recipe_from(self.recipe, self.material, self.decoder, output, **amount)
        return ours.recipe(kind, self.material, self.decoder, output, **amount)

    def ours(
        self,
        kind: str,
        settings: dict[str, Any],
        length: Length | None,
        timeout: float | None = None,
    ) -> Run:
        """A run of ours.

        Settings are batch (images, or rows of row_length tokens), row_length, precision and
        quantize. Without `length` it is an epoch with an empty cache folder.
        """
        work = self.work(kind)
        name = "ours" if kind == "causal" else f"ours_{kind}"
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "run"
            warm = length.warm if length else 0
            steps = warm + length.steps if length else None
            (Path(scratch) / "recipe.yaml").write_text(self._recipe(kind, settings, output, steps))
            command = [sys.executable, "-m", "vlm_tune.cli", "sft", f"{scratch}/recipe.yaml"]
            cache = {} if length else {"VLM_TUNE_CACHE": f"{scratch}/cache"}
            ended = execute(command, self.threads, timeout or self.timeout, **cache)
            if ended.code:
                return Run(name, settings, seconds_total=ended.seconds, failed=ended.why)
            lines = ours.logged(output)[warm:]
            preparing = ours.preparing(output)
        rates = [line["questions_per_s"] for line in lines]
        rate = statistics.median(rates)
        return Run(
            name,
            settings,
            questions=settings["batch"]
            * (
                settings["row_length"] / work.mean.tokens
                if "row_length" in settings
                else self.a_image
            ),
            questions_per_s=rate,
            tokens_per_s=rate * work.mean.tokens,
            supervised_per_s=rate * work.mean.supervised,
            operations_per_s=rate * work.operations,
            padding=statistics.fmean(line["padding"] for line in lines),
            stall=statistics.fmean(line["stall"] for line in lines),
            spread=spread(rates),
            peak_memory_mb=ended.memory_mb,
            steps=len(lines),
            seconds_total=ended.seconds,
            preparing_s=preparing,
        )


def within(answers: list[str], texts: list[str]) -> bool:
    """Whether each answer is part of a different text."""
    left = list(texts)
    for answer in sorted(answers, key=len, reverse=True):
        place = next((place for place, text in enumerate(left) if answer in text), None)
        if place is None:
            return False
        left.pop(place)
    return True


HEADER = (
    f"{'':14} {'settings':86} {'qa/s':>7} {'tok/s':>7} {'sup/s':>6} {'MFU':>6} {'pad':>6} "
    f"{'stall':>6} {'spread':>6} {'MB':>6} {'s':>5}"
)


def line(run: Run) -> str:
    """One row of the table."""
    settings = " ".join(
        f"{key}={value}" for key, value in run.settings.items() if value is not None
    )
    if run.failed:
        return f"{run.name:14} {settings:86} failed: {run.failed}"
    return (
        f"{run.name:14} {settings:86} {run.questions_per_s:7.2f} {run.tokens_per_s:7.0f} "
        f"{run.supervised_per_s:6.0f} {run.mfu:6.1%} {run.padding:6.1%} {run.stall:6.2%} "
        f"{run.spread:6.1%} {run.peak_memory_mb:6} {run.seconds_total:5.0f}"
    )
