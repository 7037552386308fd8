"""What one GPU does in a few minutes, without network: first whether it is right, then how fast.

Run: python -m benchmarks.gpu --pass 1 --out FOLDER, then --pass 2 (docs/gpu.md says what they do).
With --tiny every phase runs on a CPU in tiny shapes.

Each phase is a process of its own with a time limit. FOLDER/gpu-1.json (gpu-2.json) is replaced
after each, FOLDER/gpu-1.log holds what they print. The exit code is 1 if a check or a phase failed.
A phase that the time does not reach prints NOT RUN.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.report import FAIL, NOT_RUN, Report, bars, measured_rows, table, write_json

SECONDS = {1: 200.0, 2: 360.0}
"""What a pass may take."""

PATIENCE = 20
"""A CPU that does other work too gets so many times the seconds, under --tiny."""

SHORTEST = 8.0
"""Seconds below which a phase is not begun."""

TAIL = 20_000
"""Characters of a phase's output that the log takes."""

PRELOADED = (
    "torch._dynamo",
    "torchvision.transforms.v2",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llama.modeling_llama",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
    "accelerate",
    "datasets",
)
"""Imported once; the phases are forks of that process.

None of these initialises CUDA, which a fork could not use then. PEFT does: it imports bitsandbytes.
"""

PRELOADED_TINY = (
    *PRELOADED,
    *(f"benchmarks.on_gpu.{name}" for name in ("checks", "runs", "training", "peers", "answers")),
    "trl.trainer.sft_trainer",
)
"""Imported once where no phase uses CUDA: what the phases need else."""


@dataclass(frozen=True)
class Phase:
    """A phase: the function that runs it as `module:function`, its time limit and its settings."""

    name: str
    target: str
    seconds: float
    options: dict[str, Any] = field(default_factory=dict)


def _training(name: str, seconds: float, **options: Any) -> Phase:
    return Phase(name, "training:ours", seconds, options)


def _trl(name: str, seconds: float, **options: Any) -> Phase:
    return Phase(name, "peers:trl", seconds, options)


PHASES: dict[int, tuple[Phase, ...]] = {
    1: (
        Phase("environment", "environment:environment", 60),
        Phase("decoder", "checks:checks", 70, {"kind": "causal"}),
        Phase("encoder-decoder", "checks:checks", 50, {"kind": "seq2seq"}),
        Phase("resume", "runs:resume", 45),
        Phase("qlora", "runs:qlora", 60),
        Phase("demo", "runs:demo", 90),
        _training("1b-branches", 60, shape="1b", form="branches"),
        _trl("1b-trl-turns", 60, shape="1b", form="turns", tuned=True),
    ),
    2: (
        _training("7b-branches", 120, shape="7b", form="branches", profile=True),
        _trl("7b-trl-rows", 60, shape="7b", form="rows", tuned=False),
        _trl("7b-trl-turns", 70, shape="7b", form="turns", tuned=True),
        _training("7b-nf4", 75, shape="7b", form="branches", quantize="nf4"),
        _training("1b-branches", 45, shape="1b", form="branches"),
        _trl("1b-trl-turns", 45, shape="1b", form="turns", tuned=True),
        _training("t5-xl-rows", 60, shape="t5-xl", form="rows"),
        Phase("t5-xl-seq2seq", "peers:seq2seq", 60, {"shape": "t5-xl"}),
        Phase("answers", "answers:ours", 60, {"shape": "7b"}),
        Phase("answers-transformers", "answers:transformers", 90, {"shape": "7b"}),
        _trl("7b-trl-rows-tuned", 60, shape="7b", form="rows", tuned=True),
        _training("7b-packed", 60, shape="7b", form="packed"),
        _training("7b-rows", 60, shape="7b", form="rows"),
        _trl("7b-peft-compiled", 90, shape="7b", form="rows", tuned=True, compiled=True),
        *(
            Phase(name, f"objectives:{side}", 60, {"shape": "1b", "kind": kind})
            for kind in ("dpo", "grpo")
            for name, side in ((f"1b-{kind}", "ours"), (f"1b-trl-{kind}", "trl"))
        ),
    ),
}
"""The phases of each pass, in the order in which they are run."""


# --- a phase's own process -----------------------------------------------------------------------


def child(target: str, request: dict[str, Any]) -> None:
    """Runs a phase, with its output in `request["log"]`; never returns.

    A fork of a process that had initialised CUDA can't use it: then Python is started anew.
    """
    if not request.get("alone"):
        os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
    code = 1
    try:
        os.environ |= request["environment"]
        if not request["tiny"] and _after_cuda():
            again = json.dumps([target, {**request, "alone": True}])
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", "--child", again])
        module, _, function = target.partition(":")
        report = Report(
            Path(request["file"]),
            Path(request["folder"]),
            request["tiny"],
            request["options"],
            request["known"],
        )
        run: Callable[[Report], None] = getattr(
            importlib.import_module(f"benchmarks.on_gpu.{module}"), function
        )
        run(report)
        report.save()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads of libraries may wait for each other at the end


def _after_cuda() -> bool:
    """Whether this is a fork of a process that had initialised CUDA."""
    import torch

    return torch.cuda._is_in_bad_fork()


# --- the phases in turn --------------------------------------------------------------------------


@dataclass
class Passing:
    """A pass in progress.

    Attributes:
        file: The JSON file of all phases.
        log: The file that takes the end of each phase's output.
        folder: Where the phases write.
        tiny: Whether the shapes are tiny.
        seconds: What the pass may take.
        context: How processes are started.
    """

    file: Path
    log: Path
    folder: Path
    tiny: bool
    seconds: float
    context: Any
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.seconds - (time.monotonic() - self.started)

    def run(self, phase: Phase) -> None:
        """Runs a phase if there is time, and saves what it reports."""
        if self.left < SHORTEST:
            self.phases[phase.name] = {"state": NOT_RUN, "reason": "no time was left"}
        else:
            self.phases[phase.name] = self._measured(phase)
        state = self.phases[phase.name]
        print(f"{state['state']:8} {phase.name} {state.get('reason', '')}", flush=True)
        self.save()

    def _measured(self, phase: Phase) -> dict[str, Any]:
        file, log = (self.folder / f"{phase.name}.{suffix}" for suffix in ("json", "log"))
        for path in (file, log):
            path.unlink(missing_ok=True)
        request = {
            "file": str(file),
            "log": str(log),
            "folder": str(self.folder),
            "tiny": self.tiny,
            "options": phase.options,
            "known": self.phases,
            "environment": environment(self.folder, tiny=self.tiny),
        }
        began = time.monotonic()
        limit = min(phase.seconds * (PATIENCE if self.tiny else 1), self.left)
        process = self.context.Process(target=child, args=(phase.target, request))
        process.start()
        process.join(limit)
        stopped = process.exitcode is None
        _end(process)
        reported = json.loads(file.read_text()) if file.is_file() else {}
        text = log.read_text(errors="replace") if log.is_file() else ""
        with self.log.open("a") as whole:
            whole.write(f"\n=== {phase.name}\n{text[-TAIL:]}")
        outcome = self._outcome(phase, reported, process.exitcode, stopped, text)
        return {**outcome, "seconds": time.monotonic() - began, **reported}

    def _outcome(
        self, phase: Phase, reported: dict[str, Any], code: int, stopped: bool, text: str
    ) -> dict[str, str]:
        failed = [one["name"] for one in reported.get("checks", ()) if one["state"] == FAIL]
        if stopped and self.left <= 0:
            return {"state": NOT_RUN, "reason": "the pass's time ended within it"}
        if stopped:
            return {"state": FAIL, "reason": f"took more than its {phase.seconds:.0f} s"}
        if code:
            lines = [line for line in text.splitlines() if line.strip()]
            return {"state": FAIL, "reason": lines[-1][:300] if lines else f"exit code {code}"}
        if failed:
            return {"state": FAIL, "reason": f"failed: {', '.join(failed)}"}
        return {"state": "DONE"}

    def save(self) -> None:
        """Writes the JSON file."""
        content = {
            "tiny": self.tiny,
            "seconds": time.monotonic() - self.started,
            "bars": {} if self.tiny else bars(self.phases),
            "rows": list(measured_rows(self.phases)),
            "phases": self.phases,
        }
        write_json(self.file, content)

    @property
    def failed(self) -> bool:
        """Whether a phase or a check failed."""
        return any(phase["state"] == FAIL for phase in self.phases.values())


def _end(process: Any) -> None:
    """Ends a phase's process and all that it started."""
    for end in (lambda: os.killpg(process.pid, signal.SIGKILL), process.kill):
        try:
            end()
        except (ProcessLookupError, PermissionError):
            continue
    process.join()


def run_pass(
    number: int,
    out: Path,
    folder: Path,
    *,
    tiny: bool = False,
    only: Sequence[str] = (),
    seconds: float | None = None,
    context: Any = None,
) -> Passing:
    """Runs the phases of a pass and returns it.

    Args:
        number: Of the pass, 1 or 2.
        out: The folder of the JSON and the log.
        folder: Where models and runs are written; what is there of an earlier pass is used.
        tiny: Take tiny shapes, on a CPU.
        only: Names of phases; all if empty.
        seconds: What the pass may take.
        context: How processes are started, as of multiprocessing.
    """
    phases = [phase for phase in PHASES[number] if not only or phase.name in only]
    if not phases:
        names = ", ".join(phase.name for phase in PHASES[number])
        raise SystemExit(f"pass {number} has the phases {names}")
    out.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    log = out / f"gpu-{number}.log"
    log.unlink(missing_ok=True)
    limit = SECONDS[number] * (PATIENCE if tiny else 1) if seconds is None else seconds
    passing = Passing(
        out / f"gpu-{number}.json", log, folder, tiny, limit, context or _preloaded(folder, tiny)
    )
    for phase in phases:
        passing.run(phase)
    return passing


def environment(folder: Path, *, tiny: bool) -> dict[str, str]:
    """Variables that all processes of a pass have."""
    variables = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "VLM_TUNE_CACHE": str(folder / "cache"),
        # `torch.cuda.is_available` asks the driver's library and leaves CUDA uninitialised.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }
    # Kernels for a CPU would be compiled first, for minutes.
    return variables | (
        {"CUDA_VISIBLE_DEVICES": "", "VLM_TUNE_KERNELS": "reference"} if tiny else {}
    )


def _preloaded(folder: Path, tiny: bool) -> Any:
    """Starts processes as forks of one that has imported the libraries."""
    os.environ |= environment(folder, tiny=tiny)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED_TINY if tiny else PRELOADED))
    return context


def main() -> None:
    """Runs a pass and prints its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pass", dest="number", type=int, choices=list(PHASES), default=1)
    add("--tiny", action="store_true", help="tiny shapes, on a CPU")
    add("--out", type=Path, default=Path("gpu"), help="folder of the JSON and the log")
    add("--folder", type=Path, help="folder of models and runs; by default in /dev/shm")
    add("--only", nargs="+", default=[], metavar="PHASE", help="run these phases alone")
    add("--seconds", type=float, help="what the pass may take; 200 and 360 by default")
    add("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*json.loads(options.child))
    memory = Path("/dev/shm")
    base = memory if memory.is_dir() and not options.tiny else Path(tempfile.gettempdir())
    folder = options.folder or base / f"vlm_tune-gpu-{os.getuid()}{'-tiny' * options.tiny}"
    passing = run_pass(
        options.number,
        options.out,
        folder.absolute(),
        tiny=options.tiny,
        only=options.only,
        seconds=options.seconds,
    )
    for line in table(passing.phases, with_bars=not options.tiny):
        print(line)
    free = shutil.disk_usage(folder).free / 1e9
    print(f"models are left in {folder} for the next pass ({free:.0f} GB are free there)")
    sys.exit(passing.failed)


if __name__ == "__main__":
    main()
