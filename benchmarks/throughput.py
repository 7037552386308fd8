"""Training speed side by side with other trainers.

Run: python -m benchmarks.throughput --against trl,llamafactory,seq2seq

Each peer is installed in its own environment and tried with all of its settings in short runs. The
best ones are then measured alternately with ours, so that a busy machine slows all alike. Every run
trains on the same questions, which is checked from its labels. Details: docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import material
from benchmarks.peers import DEFAULTS, PEERS, versions
from benchmarks.runs import HEADER, Bench, Length, Run, gemm_rates, line
from vlm_tune.resources import cache_folder

OUR_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "causal": [
        {"batch": 16},
        {"batch": 8},
        {"batch": 24},
        {"batch": 4, "row_length": 512},
        {"batch": 8, "row_length": 384},
    ],
    "seq2seq": [{"batch": 4}, {"batch": 2}, {"batch": 8}],
}
"""Settings that ours is tried with: images per step, or packed rows per step.

An encoder-decoder repeats the image with every question, which takes memory.
"""

OUR_PRECISIONS = ("bf16", "fp32")

HOPELESS = 4.0
"""A run of a sweep is stopped after this many times the seconds of the fastest run so far."""

OURS = {"causal": "ours", "seq2seq": "ours_seq2seq"}

START = 20.0
"""Seconds before a run's first step on two cores: imports, loading, preparing."""

OUR_RATES = {"causal": 40.0, "seq2seq": 10.0}
"""Question-answer pairs per second, from which a comparison's time is estimated beforehand."""


class Comparison:
    """A comparison in progress: all measurements so far, and the JSON saved after every round."""

    def __init__(
        self, options: argparse.Namespace, bench: Bench, known: dict[str, list[dict[str, Any]]]
    ) -> None:
        self.options = options
        self.bench = bench
        self.kinds = [
            kind for kind in OURS if any(PEERS[name].kind == kind for name in options.against)
        ]
        self.settings: dict[str, list[dict[str, Any]]] = {
            name: ranked[: options.finalists]
            for name, ranked in known.items()
            if name in self.names
        }
        self.sweep: list[Run] = []
        self.runs: list[Run] = []
        self.levels: dict[str, tuple[Run, float]] = {}
        self.epochs: list[Run] = []
        self.rates: list[dict[str, float]] = []

    @property
    def names(self) -> list[str]:
        """The names to sweep: the peers, and ours for each kind of model unless `--sweep-only`."""
        mine = [] if self.options.sweep_only else [OURS[kind] for kind in self.kinds]
        return [*mine, *self.options.against]

    def kind(self, name: str) -> str:
        """The kind of model that a name trains: causal or seq2seq."""
        return (
            PEERS[name].kind
            if name in PEERS
            else next(kind for kind, label in OURS.items() if label == name)
        )

    def measure(
        self,
        name: str,
        settings: dict[str, Any],
        length: Length | None,
        runs: list[Run],
        timeout: float | None = None,
    ) -> Run:
        """Measures one run, prints it and adds it to `runs`.

        It is stopped after `timeout` seconds; without `length` it is an epoch.
        """
        if length is None:
            run = self.bench.epoch(name, self.kind(name), settings)
        elif name in PEERS:
            run = self.bench.peer(name, settings, length, timeout)
        else:
            run = self.bench.ours(self.kind(name), settings, length, timeout)
        self.compare_with_gemm(run)
        print(line(run), flush=True)
        runs.append(run)
        return run

    def compare_with_gemm(self, *runs: Run) -> None:
        """Sets the MFU of runs, by the best GEMM rate: a disturbed one would flatter."""
        if self.rates and not self.options.cpu_time:  # GEMM rates are by wall-clock time
            for run in runs:
                run.mfu = run.operations_per_s / self.gemm

    @property
    def gemm(self) -> float | None:
        """The machine's GEMM rate: the best over precisions and measurements."""
        return max((max(rates.values()) for rates in self.rates), default=None)

    @property
    def fp32_first(self) -> bool:
        """Whether fp32 products are faster than bf16 here, as on CPUs without bf16 instructions."""
        return bool(self.rates) and self.rates[0]["fp32"] > self.rates[0]["bf16"]

    @property
    def no_bf16(self) -> bool:
        """Whether bf16 products reach less than a tenth of fp32's rate here.

        No setting makes up for that.
        """
        return bool(self.rates) and self.rates[0]["bf16"] < self.rates[0]["fp32"] / 10

    def note_gemm(self) -> None:
        """Measures the current GEMM rates and updates the MFU of all runs."""
        self.rates.append(gemm_rates(self.options.threads))
        self.compare_with_gemm(*self.sweep, *self.runs)
        rates = ", ".join(f"{name} {rate / 1e12:.3f}" for name, rate in self.rates[-1].items())
        print(f"GEMM in TFLOP/s, {self.options.threads} threads: {rates}", flush=True)

    # --- the sweep -------------------------------------------------------------------------------

    def tune(self, name: str) -> None:
        """Finds the fastest settings, key by key, with the best values of the keys before.

        A run that has taken `HOPELESS` times as long as the fastest one before it is stopped.
        """
        length = Length(1, self.options.sweep_steps, 15.0)
        runs = []

        def try_settings(settings: dict[str, Any]) -> dict[str, Any]:
            fastest = min((run.seconds_total for run in runs if not run.failed), default=None)
            timeout = HOPELESS * fastest if fastest else None
            runs.append(self.measure(name, settings, length, self.sweep, timeout))
            return max(runs, key=speed).settings

        if name in PEERS:
            best = try_settings(PEERS[name].start(fp32=self.fp32_first))
            for key in (*PEERS[name].sweep, "batch"):
                if key == "precision" and self.no_bf16:
                    continue
                for settings in list(PEERS[name].changes(best, key)):
                    best = try_settings(settings)
        else:
            first, *others = OUR_SETTINGS[self.kind(name)][: 1 if self.options.quick else None]
            best = first
            for precision in self.our_precisions():
                best = try_settings({**first, **precision})
            for settings in others:
                try_settings({**best, **settings})
        ranked = [run.settings for run in sorted(runs, key=speed, reverse=True) if speed(run)]
        if not ranked:
            raise SystemExit(f"no settings of {name} run: {runs[0].failed}")
        self.settings[name] = ranked[: self.options.finalists if name in PEERS else 1]

    def our_precisions(self) -> list[dict[str, Any]]:
        """The precisions to try, the machine's faster one first; a recipe's own is not changed."""
        if self.options.recipe:
            return [{}]
        names = sorted(OUR_PRECISIONS, reverse=self.fp32_first)
        return [{"precision": name} for name in names[: 1 if self.options.quick else None]]

    # --- the runs in turns -----------------------------------------------------------------------

    def contenders(self, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The runs of a round for one kind of model, ours first."""
        mine = self.settings[OURS[kind]][0]
        yield OURS[kind], mine
        if self.options.nf4 and kind == "causal":
            yield OURS[kind], {**mine, "quantize": "nf4"}
        for name in self.options.against:
            if PEERS[name].kind == kind:
                yield from ((name, settings) for settings in self.settings[name])
                if name == "trl" and not self.options.no_defaults:
                    yield name, DEFAULTS

    def round(self) -> None:
        """Measures every contender once."""
        length = Length(self.options.warm, self.options.steps, self.options.seconds)
        for kind in self.kinds:
            self.note_gemm()
            for name, settings in self.contenders(kind):
                run = self.measure(name, settings, length, self.runs)
                if run.failed:
                    raise SystemExit(f"{run.name}: {run.failed}")

    def median(self, name: str, settings: dict[str, Any], key: str = "questions_per_s") -> float:
        """The median of a figure over the rounds."""
        return statistics.median(
            getattr(run, key) for run in self.runs if run.name == name and run.settings == settings
        )

    def best(self, name: str) -> dict[str, Any]:
        """The fastest of the settings that were measured in rounds."""
        return max(self.settings[name], key=lambda settings: self.median(name, settings))

    def level_memory(self) -> None:
        """Measures our peak memory with as many questions per step as each peer's best settings."""
        for name in self.options.against:
            best = self.best(name)
            theirs = max(
                run.peak_memory_mb for run in self.runs if run.name == name and run.settings == best
            )
            images = max(round(self.median(name, best, "questions") / self.bench.a_image), 1)
            mine = OURS[PEERS[name].kind]
            settings = {
                key: value for key, value in self.settings[mine][0].items() if key == "precision"
            } | {"batch": images}
            same = [run for run in self.runs if run.name == mine and run.settings == settings]
            run = same[0] if same else self.measure(mine, settings, Length(1, 1, 0.0), [])
            if not run.failed:
                self.levels[name] = run, run.peak_memory_mb / theirs

    def whole_epochs(self) -> None:
        """Measures one epoch, from process start to end, of ours and each peer's best settings."""
        for kind in self.kinds:
            self.measure(OURS[kind], self.settings[OURS[kind]][0], None, self.epochs)
            for name in self.options.against:
                if PEERS[name].kind == kind:
                    self.measure(name, self.best(name), None, self.epochs)

    # --- what is saved ---------------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        """The content of the `--json` file."""
        options = self.options
        ratios = {}
        mfu = {}
        for kind in self.kinds if self.runs else []:
            mine = self.settings[OURS[kind]][0]
            rate = self.median(OURS[kind], mine)
            mfu[kind] = self.median(OURS[kind], mine, "mfu")
            for name in options.against:
                if PEERS[name].kind == kind:
                    ratios[f"{name}_tuned"] = rate / self.median(name, self.best(name))
                    if name == "trl" and not options.no_defaults:
                        ratios["trl_default"] = rate / self.median(name, DEFAULTS)
            if options.nf4 and kind == "causal":
                ratios["nf4_step"] = rate / self.median(OURS[kind], {**mine, "quantize": "nf4"})
        memory = {name: ratio for name, (_, ratio) in self.levels.items()}
        return {
            "ratios": ratios,
            "mfu": next(iter(mfu.values()), None),
            "mfu_by_kind": mfu,
            "peak_memory_ratio": next(iter(memory.values()), None),
            "peak_memory_by_peer": memory,
            "epoch_seconds": {run.name: run.seconds_total for run in self.epochs if not run.failed},
            "gemm": self.gemm,
            "gemm_by_precision": self.rates,
            "threads": options.threads,
            "image_tokens": options.image_tokens,
            "questions": len(self.bench.answers),
            "versions": {name: versions(python) for name, python in self.bench.pythons.items()},
            "settings": self.settings,
            "sweep": [asdict(run) for run in self.sweep],
            "runs": [
                asdict(run) for run in [*self.runs, *(run for run, _ in self.levels.values())]
            ],
            "epochs": [asdict(run) for run in self.epochs],
        }

    def save(self) -> None:
        """Writes the `--json` file, if there is one."""
        if self.options.json:
            self.options.json.write_text(json.dumps(self.result(), indent=1))

    def table(self) -> None:
        """Prints the medians of the rounds, peak memory and epochs."""
        print(
            f"\nmedians of {self.options.rounds} rounds, {self.options.image_tokens} image "
            f"tokens\n{HEADER}"
        )
        fields = (
            "questions_per_s",
            "tokens_per_s",
            "supervised_per_s",
            "mfu",
            "padding",
            "stall",
            "spread",
            "seconds_total",
        )
        for kind in self.kinds:
            for name, settings in self.contenders(kind):
                medians = Run(
                    name, settings, **{key: self.median(name, settings, key) for key in fields}
                )
                medians.peak_memory_mb = max(
                    run.peak_memory_mb
                    for run in self.runs
                    if run.name == name and run.settings == settings
                )
                print(line(medians))
        for name, (run, ratio) in self.levels.items():
            print(
                f"peak memory at the questions a step of {name}'s best: {run.peak_memory_mb} MB, "
                f"{ratio:.2f} of its"
            )
        for run in self.epochs:
            before = f", {run.preparing_s:.0f} s of them for features" if run.preparing_s else ""
            print(
                f"one epoch of {len(self.bench.answers)} questions, all included: {run.name} "
                f"{run.seconds_total:.0f} s{before}"
            )

    # --- how long --------------------------------------------------------------------------------

    def seconds_of(self, name: str, settings: dict[str, Any], length: Length) -> float:
        """A rough estimate of a run's seconds."""
        if name in PEERS:
            rate = PEERS[name].rates[settings["rows"]]
            images = settings["batch"] or 8
        else:
            rate = OUR_RATES[self.kind(name)]
            images = settings["batch"]
        step = images * (1.0 if settings.get("rows") == "single" else self.bench.a_image) / rate
        measured = length.steps * step
        if name in PEERS:
            measured = min(measured, max(2 * step, length.seconds + step))
        return START + length.warm * step + measured

    def expected(self) -> tuple[float, float]:
        """Expected seconds of the remaining sweep, and of the rounds."""
        short = Length(1, self.options.sweep_steps, 15.0)
        sweep = 0.0
        for name in self.names:
            if name in self.settings:
                continue
            if name in PEERS:
                peer = PEERS[name]
                start = PEERS[name].start()
                tried = [
                    start,
                    *(settings for key in peer.sweep for settings in peer.changes(start, key)),
                ]
                tried += peer.changes(tried[-1], "batch")
            else:
                tried = OUR_SETTINGS[self.kind(name)]
            sweep += sum(self.seconds_of(name, settings, short) for settings in tried)
        length = Length(self.options.warm, self.options.steps, self.options.seconds)
        turn = 0.0
        for name in self.names:
            first = PEERS[name].start() if name in PEERS else OUR_SETTINGS[self.kind(name)][0]
            finalists = self.settings.get(name) or [first] * (
                self.options.finalists if name in PEERS else 1
            )
            turn += sum(self.seconds_of(name, settings, length) for settings in finalists)
            turn += (
                self.seconds_of(name, DEFAULTS, length)
                if name == "trl" and not self.options.no_defaults
                else 0.0
            )
        turn += (
            self.seconds_of("ours", OUR_SETTINGS["causal"][0], length) if self.options.nf4 else 0.0
        )
        return sweep, self.options.rounds * turn + START * len(self.options.against)


def speed(run: Run) -> float:
    """The rate by which settings are ranked."""
    return run.questions_per_s


def arguments() -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = parser.add_argument
    add(
        "--against",
        type=lambda text: text.split(","),
        default=list(PEERS),
        help=f"peers, of {', '.join(PEERS)}",
    )
    add(
        "--recipe",
        type=Path,
        help="how we train a decoder, instead of LoRA r=16 on every linear layer in bf16",
    )
    add(
        "--decoder",
        type=Path,
        default=Path("models/smollm2-135m-instruct"),
        help="folder of the decoder (`make models`)",
    )
    add("--image-tokens", type=int, choices=sorted(material.PATCH), default=49)
    add("--images", type=int, default=96, help="easy-VQA images whose questions are trained on")
    add(
        "--settings",
        type=Path,
        nargs="+",
        default=[],
        help="JSON of earlier runs: the best settings are taken from there, the rest is swept",
    )
    add(
        "--finalists",
        type=int,
        default=2,
        help="settings of each peer that are measured in turns; the better one counts",
    )
    add("--rounds", type=int, default=3)
    add("--warm", type=int, default=2, help="steps at the start of a run that don't count")
    add("--steps", type=int, default=6, help="measured steps of a run")
    add(
        "--seconds",
        type=float,
        default=20.0,
        help="a peer's run ends after two measured steps when its steps take this long",
    )
    add("--sweep-steps", type=int, default=1, help="measured steps of a run in the sweep")
    add(
        "--sweep-only",
        action="store_true",
        help="find and save the peers' best settings, nothing else",
    )
    add(
        "--cpu-time",
        action="store_true",
        help="with --sweep-only: rank by the process's own time, on a machine that does other work",
    )
    add(
        "--no-epoch",
        action="store_true",
        help="leave out the epoch from start to end of ours and of each peer's best settings",
    )
    add(
        "--no-defaults",
        action="store_true",
        help="leave out TRL's defaults (bf16, which a CPU without instructions for it is slow at)",
    )
    add(
        "--nf4",
        action="store_true",
        help="also ours with the decoder in nf4 (ratio nf4_step: its step over the bf16 one)",
    )
    add(
        "--quick",
        action="store_true",
        help="two measured steps, one round, one batch of ours: a trial of the bench itself",
    )
    add("--threads", type=int, default=os.cpu_count())
    add("--timeout", type=float, default=1800, help="seconds of one run")
    add(
        "--cache",
        type=Path,
        default=cache_folder("throughput"),
        help="data and models of the comparison",
    )
    add(
        "--peers-folder", type=Path, default=cache_folder("peers"), help="environments of the peers"
    )
    add("--json", type=Path)
    options = parser.parse_args()
    unknown = [name for name in options.against if name not in PEERS]
    if unknown:
        parser.error(f"no peer {', '.join(unknown)}; expected one of {', '.join(PEERS)}")
    if not (options.decoder / "config.json").is_file():
        parser.error(
            f"no decoder in {options.decoder}: `make models` writes one, or name a folder with "
            "--decoder"
        )
    if options.cpu_time and not options.sweep_only:
        parser.error("--cpu-time is for --sweep-only: what is compared is the clock's time")
    if options.quick:
        options.warm = 0
        options.steps = 2
        options.seconds = 0.0
        options.rounds = 1
        options.sweep_steps = 1
    return options


def main() -> None:
    """Runs the comparison and prints it; with --json also saves it."""
    options = arguments()
    known: dict[str, list[dict[str, Any]]] = {}
    for path in options.settings:
        earlier = json.loads(path.read_text())
        known |= earlier["settings"]
        if earlier["image_tokens"] != options.image_tokens:
            print(f"the settings of {path} were found with {earlier['image_tokens']} image tokens")
    bench = Bench(
        folder=options.cache.absolute(),
        peers_folder=options.peers_folder.absolute(),
        decoder=options.decoder.absolute(),
        against=options.against,
        recipe=options.recipe,
        image_tokens=options.image_tokens,
        images=options.images,
        threads=options.threads,
        timeout=options.timeout,
        cpu_time=options.cpu_time,
    )
    comparison = Comparison(options, bench, known)
    sweep, rounds = comparison.expected()
    print(
        (
            f"{len(bench.answers)} questions about {options.images} images; expected on two cores: "
            f"{sweep / 60:.0f} min for the sweep"
        ),
        end="",
    )
    print(
        "" if options.sweep_only else f", {rounds / 60:.0f} min for {options.rounds} rounds",
        flush=True,
    )
    print(HEADER, flush=True)
    comparison.note_gemm()
    for name in comparison.names:
        if name not in comparison.settings:
            comparison.tune(name)
            comparison.save()
    if options.sweep_only:
        return
    for _ in range(options.rounds):
        comparison.round()
        comparison.save()
    comparison.level_memory()
    comparison.save()
    if not options.no_epoch:
        comparison.whole_epochs()
        comparison.save()
    comparison.table()
    shown = ("ratios", "mfu", "peak_memory_ratio", "epoch_seconds", "gemm")
    result = comparison.result()
    print(json.dumps({key: result[key] for key in shown}, indent=1))


if __name__ == "__main__":
    main()
