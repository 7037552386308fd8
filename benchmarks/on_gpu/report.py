"""What a phase hands back: checks, rows of figures, notes. Imports the standard library alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PASS, FAIL, NOT_RUN = "PASS", "FAIL", "NOT RUN"
DATASHEET = 989e12
"""Dense bf16 operations a second of an H100 SXM (and an H200) by its data sheet."""


def write_json(path: Path, content: Any) -> None:
    """Replaces a file by a rename, so that a reader never sees half of it."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(content, indent=1))
    beside.replace(path)


@dataclass
class Report:
    """The report of a phase, written to `file` after each entry.

    Attributes:
        file: Where it is written.
        folder: Where the phase may write; models of other phases lie there.
        tiny: Whether the shapes are tiny, for a CPU.
        options: The phase's own settings.
        known: The reports of the phases before, by name.
    """

    file: Path
    folder: Path
    tiny: bool
    options: dict[str, Any] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, str]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def check(self, name: str, passed: bool, detail: str) -> None:
        """Adds a check's outcome."""
        self._checked(name, PASS if passed else FAIL, detail)

    def below(self, name: str, measured: float, limit: float) -> None:
        """Adds a check that a difference is below a limit; NaN is not."""
        self.check(name, measured < limit, f"{measured:.2e}, below {limit:.0e}")

    def not_run(self, name: str, reason: str) -> None:
        """Adds a check that is not run here, and why."""
        self._checked(name, NOT_RUN, reason)

    def _checked(self, name: str, state: str, detail: str) -> None:
        self.checks.append({"name": name, "state": state, "detail": detail})
        print(f"{state} {name}: {detail}", flush=True)
        self.save()

    def row(self, name: str, **figures: Any) -> None:
        """Adds a measured run, replacing one of the same name."""
        self.rows = [row for row in self.rows if row["name"] != name]
        self.rows.append({"name": name, **figures})
        print(json.dumps(self.rows[-1]), flush=True)
        self.save()

    def figure(self, name: str, value: Any) -> None:
        """Adds a single figure."""
        self.figures[name] = value
        print(f"{name}: {json.dumps(value)}", flush=True)
        self.save()

    def note(self, text: str) -> None:
        """Adds a remark for the reader of the figures."""
        self.notes.append(text)
        print(text, flush=True)
        self.save()

    def save(self) -> None:
        """Writes the report."""
        names = ("checks", "rows", "figures", "notes")
        write_json(self.file, {name: getattr(self, name) for name in names})


# --- all phases together -------------------------------------------------------------------------

Phases = Mapping[str, Mapping[str, Any]]
"""Reports by the names of their phases, each with a `state`."""

COLUMNS: Sequence[tuple[str, str, Callable[[dict[str, Any]], Any]]] = (
    ("batch", "6", lambda row: row.get("batch")),
    ("qa/s", "8.1f", lambda row: row.get("questions_per_s")),
    ("tok/s", "8.0f", lambda row: row.get("tokens_per_s")),
    ("sup/s", "7.0f", lambda row: row.get("supervised_per_s")),
    ("ms", "8.1f", lambda row: row.get("ms")),
    ("MFU", "6.1%", lambda row: row.get("mfu")),
    ("of 989", "6.1%", lambda row: row.get("mfu_datasheet")),
    ("GB", "6.1f", lambda row: row.get("peak_gb")),
    ("-w GB", "6.1f", lambda row: row.get("above_weights_gb")),
    ("pad", "6.1%", lambda row: row.get("padding")),
    ("first s", "7.1f", lambda row: row.get("first_step_s")),
)


def width(form: str) -> int:
    """The width of a column, from its format."""
    return int(form.split(".")[0].rstrip("%"))


def measured_rows(phases: Phases) -> Iterator[dict[str, Any]]:
    """Yields all rows, with their MFU on the best GEMM rate that any phase measured."""
    rate = gemm_rate(phases)
    for phase in phases.values():
        for row in phase.get("rows", ()):
            operations = row.get("operations_per_s")
            if operations is not None:
                row = {**row, "mfu_datasheet": operations / DATASHEET}
                row |= {"mfu": operations / rate} if rate else {}
            yield row


def gemm_rate(phases: Phases) -> float | None:
    """The best GEMM rate in operations a second: a disturbed one would flatter."""
    rates = [phase.get("figures", {}).get("gemm_per_s") for phase in phases.values()]
    return max((rate for rate in rates if rate), default=None)


RATIOS = (
    ("7B, branches over TRL's defaults", "7b branches", "7b trl rows", 8.0),
    ("7B, branches over TRL's turns", "7b branches", "7b trl turns", 1.5),
    ("7B, branches over TRL's rows, tuned", "7b branches", "7b trl rows tuned", 1.5),
    ("7B, a row a question over TRL's rows, tuned", "7b rows", "7b trl rows tuned", None),
    ("1B, branches over TRL's turns", "1b branches", "1b trl turns", 2.0),
    ("1B, branches over TRL's rows, tuned", "1b branches", "1b trl rows tuned", 2.0),
    ("1B, DPO over TRL's, ten pairs an image", "1b dpo", "1b trl dpo", 5.0),
    ("1B, GRPO over TRL's, groups of 8", "1b grpo", "1b trl grpo", 4.0),
    ("Flan-T5-XL over Seq2SeqTrainer", "t5-xl rows", "t5-xl seq2seq", 2.0),
    ("evaluation over static-cache generate", "answers", "answers transformers", 4.0),
)
"""Ratios of questions a second: name, ours, the peer, and the least that is wanted."""


def bars(phases: Phases) -> dict[str, dict[str, Any]]:
    """What was measured beside what is wanted, by name; only of phases that were reached."""
    rows = {row["name"]: row for row in measured_rows(phases)}
    wanted: dict[str, dict[str, Any]] = {}

    def add(name: str, value: float | None, least: float | None, *, most: bool = False) -> None:
        if value is not None:
            met = None if least is None else (value <= least if most else value >= least)
            wanted[name] = {"measured": value, "wanted": least, "most": most, "met": met}

    for name, ours, peer, least in RATIOS:
        if ours in rows and peer in rows:
            add(name, rows[ours]["questions_per_s"] / rows[peer]["questions_per_s"], least)
    branches = rows.get("7b branches", {})
    add("7B, MFU on the measured GEMM rate", branches.get("mfu"), 0.5)
    nf4 = rows.get("7b nf4")
    if nf4 and branches and nf4["batch"] == branches["batch"]:
        add("7B, NF4 step over bf16 step", nf4["ms"] / branches["ms"], 1.15, most=True)
    level = memory_ratio(branches, rows.get("7b trl turns", {}))
    add("7B, memory above weights at TRL's questions a step", level, 0.6, most=True)
    return wanted


def memory_ratio(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> float | None:
    """Peak memory above the weights, ours over a peer's, at the peer's best number of images.

    From the trials of ours, which are not compiled and so take no less than the measured run.
    """
    if not ours or not peer:
        return None
    trial = ours.get("trials", {}).get(str(peer["batch"]))
    theirs = peer.get("above_weights_gb")
    return trial["above_weights_gb"] / theirs if trial and theirs else None


def table(phases: Phases, *, with_bars: bool = True) -> Iterator[str]:
    """Yields the lines of the summary: phases, checks, rows and, unless left out, bars."""
    for name, phase in phases.items():
        reason = f": {phase['reason']}" if phase.get("reason") else ""
        seconds = f" ({phase['seconds']:.0f} s)" if "seconds" in phase else ""
        yield f"{phase['state']:8} {name}{seconds}{reason}"
        for check in phase.get("checks", ()):
            yield f"  {check['state']:8} {check['name']}: {check['detail']}"
        for text in phase.get("notes", ()):
            yield f"  {text}"
    rows = list(measured_rows(phases))
    if rows:
        heads = " ".join(f"{head:>{width(form)}}" for head, form, _ in COLUMNS)
        yield f"\n{'':22} {heads}"
    for row in rows:
        cells = (
            f"{'':>{width(form)}}" if read(row) is None else f"{read(row):>{form}}"
            for _, form, read in COLUMNS
        )
        yield f"{row['name']:22} {' '.join(cells)}"
    for name, bar in bars(phases).items() if with_bars else ():
        limit = "" if bar["wanted"] is None else f", at {'most' if bar['most'] else 'least'} "
        limit += "" if bar["wanted"] is None else f"{bar['wanted']:g}"
        met = {None: "", True: ": met", False: ": NOT met"}[bar["met"]]
        yield f"{name}: {bar['measured']:.2f}{limit}{met}"
