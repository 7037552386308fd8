"""Training speed side by side with other trainers: python -m benchmarks.throughput --against trl,llamafactory,seq2seq

Each peer is installed in its own environment, tried with all of its settings in short runs, and then measured with its
defaults and its best ones, in turns with ours, so that a busy machine slows all alike. Every run trains on the same
questions, which is checked from what its labels hold.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import material, ours
from benchmarks.peers import BATCHES, PEERS, SCRIPTS, install

WARM = 1
"""Steps at the start of a run that don't count."""


@dataclass
class Run:
    """One measured run: medians over its steps, rates a second; peak memory is the process's largest resident set."""

    name: str
    settings: dict[str, Any]
    questions: float
    questions_per_s: float
    tokens_per_s: float
    supervised_per_s: float
    padding: float
    spread: float
    peak_memory_mb: int
    seconds_total: float
    failed: str = ""


def failed(name: str, settings: dict[str, Any], why: str) -> Run:
    """A run that did not come to its end."""
    return Run(name, settings, *[0.0] * 6, peak_memory_mb=0, seconds_total=0.0, failed=why)


def spread(rates: list[float]) -> float:
    """The range of the middle half over the median."""
    if len(rates) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(rates, n=4)
    return (high - low) / middle


def execute(command: list[str], threads: int, timeout: float) -> tuple[int, str, str, int, float]:
    """A child's exit code, output, errors, peak memory in MB and seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=out, stderr=errors, env=environment)
        status = usage = None
        while usage is None:
            found, code, used = os.wait4(child.pid, os.WNOHANG)
            if found:
                status, usage = os.waitstatus_to_exitcode(code), used
            elif time.perf_counter() - started > timeout:
                child.kill()
                _, _, usage = os.wait4(child.pid, 0)
                status = -9
            else:
                time.sleep(0.05)
        child.returncode = status
        out.seek(0)
        errors.seek(0)
        return int(status or 0), out.read(), errors.read(), usage.ru_maxrss * 1024 // 1_000_000, time.perf_counter() - started


class Bench:
    """The comparison that was asked for."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.material: Path = asked.cache / f"material-{asked.images}-{asked.image_tokens}"
        self.answers = material.write_rows(self.material, asked.images)
        material.write_models(self.material, asked.decoder, asked.image_tokens)
        self.pythons = {name: install(name, asked.peers_folder) for name in asked.against}
        self.rates: list[float] = []

    def peer(self, name: str, settings: dict[str, Any], steps: int) -> Run:
        """A run of a peer."""
        given = {**settings, "material": str(self.material), "steps": steps + WARM, "threads": self.asked.threads}
        command = [str(self.pythons[name]), str(SCRIPTS / PEERS[name].script), json.dumps(given)]
        code, out, errors, memory, seconds = execute(command, self.asked.threads, self.asked.timeout)
        line = next((line for line in reversed(out.splitlines()) if line.startswith('{"steps"')), None)
        if code or line is None:
            return failed(name, settings, (errors.strip().splitlines() or [f"exit code {code}"])[-1])
        found = json.loads(line)
        self.check(name, found["answers"])
        counted = [step for step in found["steps"][WARM:] if step["questions"]]
        if not counted:
            return failed(name, settings, "no step was measured")
        middle = {key: statistics.median(step[key] / step["seconds"] for step in counted) for key in ("questions", "tokens", "supervised")}
        return Run(
            name,
            settings,
            statistics.median(step["questions"] for step in counted),
            middle["questions"],
            middle["tokens"],
            middle["supervised"],
            1 - sum(step["tokens"] for step in counted) / sum(step["padded"] for step in counted),
            spread([step["questions"] / step["seconds"] for step in counted]),
            memory,
            seconds,
        )

    def check(self, name: str, answers: list[str]) -> None:
        """Raises `SystemExit` unless a run trains on exactly the answers that were written."""
        # A loss on whole sequences holds the answers among other text.
        if answers != self.answers and not (len(answers) == len(self.answers) and _within(self.answers, answers)):
            raise SystemExit(
                f"{name} trains on {len(answers)} answers that are not the {len(self.answers)} of the data, e.g. {answers[:3]}"
            )

    def ours(self, kind: str, batch: int, steps: int) -> tuple[Run, ours.Work]:
        """A run of ours, batch in images."""
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "run"
            amount = {"batch": batch, "steps": steps + WARM}
            if self.asked.recipe and kind == "causal":
                text = ours.recipe_from(self.asked.recipe, self.material, self.asked.decoder, output, **amount)
            else:
                text = ours.recipe(kind, self.material, self.asked.decoder, output, **amount)
            (Path(scratch) / "recipe.yaml").write_text(text)
            command = [sys.executable, "-m", "vlm_tune.cli", "sft", f"{scratch}/recipe.yaml"]
            code, _, errors, memory, seconds = execute(command, self.asked.threads, self.asked.timeout)
            settings = {"kind": kind, "batch": batch}
            work = ours.work(text)
            self.check("vlm_tune", work.answers)
            if code:
                return failed("ours", settings, (errors.strip().splitlines() or [f"exit code {code}"])[-1]), work
            lines = ours.logged(output)[WARM:]
        rate = statistics.median(line["questions_per_s"] for line in lines)
        return Run(
            "ours",
            settings,
            batch * len(self.answers) / self.asked.images,
            rate,
            rate * work.tokens,
            rate * work.supervised,
            statistics.fmean(line["padding"] for line in lines),
            spread([line["questions_per_s"] for line in lines]),
            memory,
            seconds,
        ), work

    def tune(self, name: str) -> dict[str, Any]:
        """The peer's fastest settings, found by short runs of all."""
        found: list[Run] = []
        for settings in PEERS[name].settings():
            for batch in BATCHES[settings["rows"]]:
                found.append(self.peer(name, {**settings, "batch": batch}, self.asked.sweep_steps))
                show(found[-1])
        best = max(found, key=lambda run: run.questions_per_s)
        if not best.questions_per_s:
            raise SystemExit(f"no settings of {name} run: {best.failed}")
        return best.settings

    def gemm(self) -> None:
        """Notes the machine's bf16 GEMM rate now, operations a second: the better of a square product and the model's widest."""
        code = (
            "import json, statistics, time, torch\n"
            "def rate(rows, inner, wide):\n"
            "    a, b = torch.randn(rows, inner).bfloat16(), torch.randn(inner, wide).bfloat16()\n"
            "    seconds = []\n"
            "    for _ in range(12):\n"
            "        start = time.perf_counter(); a @ b; seconds.append(time.perf_counter() - start)\n"
            "    return 2 * rows * inner * wide / statistics.median(seconds[2:])\n"
            "print(json.dumps(max(rate(2048, 2048, 2048), rate(1536, 576, 3072))))\n"
        )
        status, out, errors, _, _ = execute([sys.executable, "-c", code], self.asked.threads, 60)
        if status:
            raise SystemExit(errors)
        self.rates.append(json.loads(out))


def _within(answers: list[str], texts: list[str]) -> bool:
    """Whether each answer is in a text of its own."""
    left = list(texts)
    for answer in sorted(answers, key=len, reverse=True):
        place = next((place for place, text in enumerate(left) if answer in text), None)
        if place is None:
            return False
        left.pop(place)
    return True


def show(run: Run) -> None:
    """One line about a run."""
    said = run.failed or (
        f"{run.questions_per_s:8.1f} q/s {run.tokens_per_s:8.0f} tok/s {run.supervised_per_s:7.0f} sup/s {run.padding:6.1%} padding "
        f"{run.spread:6.1%} spread {run.peak_memory_mb:6} MB"
    )
    print(f"{run.name:14} {json.dumps(run.settings):90} {said}", flush=True)


def compare(bench: Bench, name: str) -> dict[str, Any]:
    """Measures one peer against ours in turns."""
    asked, kind = bench.asked, "seq2seq" if name == "seq2seq" else "causal"
    best = bench.tune(name)
    contenders = {f"{name}_tuned": best} | ({f"{name}_default": PEERS[name].defaults} if name == "trl" else {})
    runs: list[Run] = []
    ratios: dict[str, list[float]] = {label: [] for label in contenders}
    mfu: list[float] = []
    for _ in range(asked.rounds):
        for label, settings in contenders.items():
            bench.gemm()
            mine, work = bench.ours(kind, asked.batch, asked.steps)
            theirs = bench.peer(name, settings, asked.steps)
            for run in (mine, theirs):
                show(run)
                if run.failed:
                    raise SystemExit(f"{run.name}: {run.failed}")
            runs += [mine, theirs]
            ratios[label].append(mine.questions_per_s / theirs.questions_per_s)
            mfu.append(mine.questions_per_s * work.operations / bench.rates[-1])
    tuned = [run for run in runs if run.name == name and run.settings == best]
    # Memory is compared at the same questions a step.
    images = max(round(tuned[0].questions * asked.images / len(bench.answers)), 1)
    level, _ = bench.ours(kind, images, 1)
    show(level)
    return {
        "ratios": {label: statistics.median(found) for label, found in ratios.items()},
        "mfu": statistics.median(mfu),
        "peak_memory_ratio": level.peak_memory_mb / max(run.peak_memory_mb for run in tuned),
        "runs": [asdict(run) for run in [*runs, level]],
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=lambda text: text.split(","), default=["trl", "llamafactory", "seq2seq"])
    parser.add_argument("--recipe", type=Path, help="how we train a decoder, instead of LoRA r=16 on every linear layer")
    parser.add_argument("--decoder", type=Path, default=Path("models/smollm2-135m-instruct"), help="folder of the decoder")
    parser.add_argument("--image-tokens", type=int, choices=sorted(material.PATCH), default=49)
    parser.add_argument("--images", type=int, default=256, help="easy-VQA images whose questions are trained on")
    parser.add_argument("--batch", type=int, default=8, help="our images a step")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a run")
    parser.add_argument("--sweep-steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=float, default=1800, help="seconds of one run")
    parser.add_argument("--cache", type=Path, default=Path(".cache/throughput").absolute())
    parser.add_argument("--peers-folder", type=Path, default=Path(".cache/peers").absolute())
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    unknown = [name for name in asked.against if name not in PEERS]
    if unknown:
        parser.error(f"no peer {', '.join(unknown)}; there are {', '.join(PEERS)}")
    asked.decoder, asked.cache, asked.peers_folder = asked.decoder.absolute(), asked.cache.absolute(), asked.peers_folder.absolute()
    return asked


def main() -> None:
    """Measures and prints; with --json also saves."""
    asked = arguments()
    bench = Bench(asked)
    found = {name: compare(bench, name) for name in asked.against}
    first = next(iter(found.values()))
    result = {
        "ratios": {label: ratio for each in found.values() for label, ratio in each["ratios"].items()},
        "mfu": {name: each["mfu"] for name, each in found.items()} if len(found) > 1 else first["mfu"],
        "peak_memory_ratio": first["peak_memory_ratio"],
        "gemm": statistics.median(bench.rates),
        "runs": [run for each in found.values() for run in each["runs"]],
    }
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
