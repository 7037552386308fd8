"""What the terminal shows of a run: one live line where it can be redrawn, plain lines where it can't."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_tune.quoting import escaped

if TYPE_CHECKING:
    from vlm_tune.data_check.findings import CheckReport, Finding, Histogram, PartReport
    from vlm_tune.exporting import ExportReport
    from vlm_tune.exporting.merge import MergeReport
    from vlm_tune.memory_plan.communication import Communication
    from vlm_tune.memory_plan.plan import Plan, StagePlan
    from vlm_tune.train.replay import ReplayReport

NAMED = 5
"""Findings of a kind that are printed; the JSON and the page hold more."""
EVERY = 30.0
"""Seconds after which something is printed of work that goes on, where the output is no terminal."""
LOOK = 1.0
"""Seconds between two looks at whether that is so."""
BLOCKS = " ▁▂▃▄▅▆▇█"


def duration(seconds: float) -> str:
    """Seconds as 0:42 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Display(logging.Handler):
    """Shows a run's events on a console, and what the package logs (`logging.getLogger("vlm_tune")`).

    A terminal has one live line. Elsewhere (a pipe, a log file) a phase of work is a line when it begins, and where
    nothing was printed for `EVERY` seconds a thread prints how far it is. `close` ends both.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic, beats: bool = True) -> None:
        """`clock` gives seconds; without `beats` no thread is started and `beat` is called by hand."""
        super().__init__(logging.INFO)
        self.console, self.clock = console, clock
        self._status: Any = None
        self._phase = ""
        self._state = ""
        self._began = self._printed = clock()
        self._stopping = threading.Event()
        if beats and not console.is_terminal:
            threading.Thread(target=self._beats, name="display", daemon=True).start()

    def __enter__(self) -> Display:
        """Listens to the package's log, too."""
        package = logging.getLogger("vlm_tune")
        package.addHandler(self)
        package.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("vlm_tune").removeHandler(self)
        self.close()

    def emit(self, record: logging.LogRecord) -> None:
        """A record of the package's log: a warning is a note, the rest says what begins."""
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            self._line(text, "yellow")
        else:
            self._live(text, text)

    def __call__(self, event: dict[str, Any]) -> None:
        """Shows one event."""
        getattr(self, f"_{event['event']}", self._other)(event)

    def close(self) -> None:
        """Removes the live line and ends the thread."""
        self._stopping.set()
        self._clear()
        super().close()

    def _clear(self) -> None:
        self._phase = self._state = ""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _beats(self) -> None:
        while not self._stopping.wait(LOOK):
            self.beat()

    def beat(self) -> None:
        """Prints the state of the work that goes on, where nothing was printed for `EVERY` seconds."""
        now, state = self.clock(), self._state
        if state and now - self._printed >= EVERY:
            self._line(f"{state} ({duration(now - self._began)} so far)")

    def _live(self, phase: str, text: str) -> None:
        """Shows `text` as the state of a phase of work."""
        if not self.console.is_terminal:
            begins = phase != self._phase
            self._phase, self._state = phase, text
            if begins:
                self._began = self.clock()
                self._line(text)
            return
        if self._status is None:
            self._status = self.console.status(Text(text))
            self._status.start()
        self._status.update(Text(text))

    def _line(self, text: str, style: str = "") -> None:
        self._printed = self.clock()
        _print(self.console, text, style)

    def _environment(self, event: dict[str, Any]) -> None:
        if "kernels" in event:
            self._line(f"bf16 on the CPU by {event['kernels_reason']}")

    def _stage(self, event: dict[str, Any]) -> None:
        start = f", from step {event['from_step']}" if event["from_step"] else ""
        rows = (
            "rows read as they come"
            if event.get("streaming")
            else f"{event['questions']:,} question-answer pairs, {event['images']:,} images"
        )
        self._line(f"stage {event['stage'] + 1} {event['name']}: {rows}, {event['steps']:,} steps{start}", "bold")

    def _model(self, event: dict[str, Any]) -> None:
        self._line(f"{event['folder']}: {event['about']}")

    def _preparing(self, event: dict[str, Any]) -> None:
        text = f"preparing {event['name']} {event['part']}: {event['rows']:,} rows"
        self._live(f"preparing {event['name']} {event['part']}", text)

    def _tuning(self, event: dict[str, Any]) -> None:
        self._clear()
        self.console.print(tuning_table(event["name"], event["rows"]))

    def _features(self, event: dict[str, Any]) -> None:
        self._live("features", f"computing tower features: {event['done']:,} of {event['of']:,} images")

    def _scoring(self, event: dict[str, Any]) -> None:
        self._live("scoring", f"answering {event['done']:,} of {event['of']:,} questions")

    def _train(self, event: dict[str, Any]) -> None:
        # A stream has no epochs.
        epoch = f"  epoch {event['epoch']:.2f}" if "epoch" in event else ""
        text = (
            f"step {event['step']:,}/{event['of']:,}{epoch}  loss {event['loss']:.4f}  "
            f"lr {event['learning_rate']:.2e}  {event['questions_per_s']:,.0f} qa/s  {event['tokens_per_s']:,.0f} tok/s  "
            f"padding {event['padding']:.1%}  {duration(event['left'])} left"
        )
        if self.console.is_terminal:
            self._live("training", text)
            return
        self._phase, self._state = "training", f"training, past step {event['step']:,} of {event['of']:,}"
        self._began = self.clock()
        self._line(text)

    def _evaluate(self, event: dict[str, Any]) -> None:
        if not self.console.is_terminal:
            self._began = self.clock()
            self._phase, self._state = "training", f"training, past step {event['step']:,}"
        by_source = event.get("by_source", {})
        sources = [f"{name} {entry['accuracy']:.2%} of {entry['n']:,}" for name, entry in by_source.items()]
        listed = f" ({', '.join(sources)})" if len(sources) > 1 else ""
        score = f"validation accuracy {event['accuracy']:.2%} of {event['n']:,}{listed}, loss {event['loss']:.4f}"
        self._line(f"  step {event['step']:,}: {score}", "green")

    def _test(self, event: dict[str, Any]) -> None:
        self._clear()
        self.console.print(score_table(event["accuracy"], event["n"], event["by_category"], event["by_source"]))

    def _note(self, event: dict[str, Any]) -> None:
        self._line(event["text"], "yellow")

    def _other(self, event: dict[str, Any]) -> None:
        pass


def _print(console: Console, text: str, style: str = "") -> None:
    """Prints lines as they are: wrapped by the terminal alone, and without the control characters that rows and names may hold."""
    console.print(Text("\n".join(map(escaped, text.split("\n"))), style=style), soft_wrap=True)


def tuning_table(stage: str, rows: list[dict[str, Any]]) -> Table:
    """What trains, how and at which rate."""
    table = Table(title=f"tuning: {stage}", title_justify="left")
    for name, justify in (
        ("match", "left"),
        ("how", "left"),
        ("learning rate", "right"),
        ("trained", "right"),
        ("of", "right"),
        ("", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        rate = f"{row['learning_rate']:.1e}" if row["learning_rate"] else "-"
        table.add_row(Text(row["match"]), row["how"], rate, f"{row['trained']:,}", f"{row['total']:,}", row["detail"])
    trained, total = sum(row["trained"] for row in rows), sum(row["total"] for row in rows)
    table.add_section()
    table.add_row("all", "", "", f"{trained:,}", f"{total:,}", f"{trained / max(total, 1):.2%} trained")
    return table


Groups = dict[str, dict[str, float]]
"""{name: {accuracy, n}} of groups of answers."""


def score_table(accuracy: float, n: int, by_category: Groups, by_source: Groups) -> Table:
    """Exact match over all rows, by category, and by source where there are several."""
    table = Table(title="exact match", title_justify="left")
    table.add_column("by")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_column("n", justify="right")
    for kind, groups in (("category", by_category), ("source", by_source if len(by_source) > 1 else {})):
        for name, entry in groups.items():
            table.add_row(kind, Text(escaped(name)), f"{entry['accuracy']:.2%}", f"{entry['n']:,.0f}")
        table.add_section()
    table.add_row("all", "", f"{accuracy:.2%}", f"{n:,}")
    return table


def replay_lines(report: ReplayReport) -> list[str]:
    """What a replay found: what agrees, and where first what does not."""
    differs = {found.what: found for found in report.differences}
    names = {"samples": "sample ids", "loss": "losses", "norm": "gradient norms"}
    lines = [f"stage {report.stage}, steps {report.start + 1:,} to {report.end:,} replayed in {report.seconds:.1f} s"]
    for what in report.compared:
        found = differs.get(what)
        said = "equal" if found is None else f"differ first at step {found.step:,}: the run had {found.run}, the replay {found.replay}"
        lines.append(f"  {names[what]}: {said}")
    for step in report.checkpoints:
        tensors = report.tensors[step]
        first = ", ".join(tensors[:NAMED]) + (f" and {len(tensors) - NAMED} more" if len(tensors) > NAMED else "")
        lines.append(f"  checkpoint of step {step:,}: " + (f"{len(tensors)} tensors differ: {first}" if tensors else "equal, bit for bit"))
    if not report.checkpoints:
        lines.append("  no kept checkpoint lies among these steps: weights are not compared")
    for name, (then, now) in report.environment.items():
        lines.append(f"  {name} was {then} and is {now}" + ("" if report.agrees else ", which may be why"))
    return [*lines, "the run agrees" if report.agrees else "the run differs"]


# --- check -----------------------------------------------------------------------------------------------------------


def show_check(console: Console, report: CheckReport) -> None:
    """Prints what a check found: rows by source and figures of each part, warnings, errors."""
    if report.sample:
        console.print(Text(f"a sample: the first {report.sample:,} rows of each source", style="yellow"))
    for part in report.parts:
        _show_part(console, part)
    _show_findings(console, "warnings", "yellow", report.warnings, report.warning_counts)
    _show_findings(console, "errors", "red", report.errors, report.error_counts)
    errors, warnings = report.error_counts.total(), report.warning_counts.total()
    verdict = Text(f"{errors:,} errors, {warnings:,} warnings, {report.seconds:.1f} s", style="bold red" if errors else "bold green")
    console.print(verdict)


def _show_part(console: Console, part: PartReport) -> None:
    """The rows of each source by what became of them, and the part's figures."""
    pairs = f": {part.questions:,} question-answer pairs" if part.questions is not None else ""
    console.print(Text(f"\n{part.stage} {part.part}{pairs}", style="bold"))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("  source", overflow="fold")
    table.add_column("form")
    for name in ("rows", "bad", "left out", "images", "tokens", "trained"):
        table.add_column(name, justify="right")
    for source in part.sources:
        bad = Text(f"{source.bad:,}", style="red" if source.bad else "")
        figures = (source.left_out, source.images, source.tokens, source.supervised)
        table.add_row(Text(f"  {escaped(source.source)}"), source.form, f"{source.rows:,}", bad, *(f"{figure:,}" for figure in figures))
    console.print(table)
    lines = [("tokens a row", _bars(part.lengths))] if part.lengths else []
    lines += [("longer side", _bars(part.image_sides, " px"))] if part.image_sides else []
    for waste in part.padding:
        lines.append((waste.name, f"{waste.padding:.1%} padding, {waste.tokens_per_question:,.1f} padded tokens a question"))
    if part.steps is not None:
        lines.append(("steps", f"{part.steps:,} (vlm-tune plan: how long they take, and how much memory)"))
    if part.ms_per_row is not None:
        lines.append(("time", f"{part.ms_per_row:.2f} ms a row"))
    for name, text in lines:
        _print(console, f"  {name:17}{text}")


def _bars(values: Histogram, unit: str = "") -> str:
    """A histogram in one line: the lowest value, a bar for each bin, the highest."""
    most = max(values.counts)
    bars = "".join(BLOCKS[-(-8 * count // most)] for count in values.counts)
    return f"{values.least:,} [{bars}] {values.most:,}{unit}, half up to {values.middle:,}"


def _show_findings(console: Console, title: str, style: str, findings: list[Finding], counts: dict[str, int]) -> None:
    """The counts of each kind with its meaning, and its first rows."""
    from vlm_tune.data_check.row_errors import KINDS

    for kind, count in sorted(counts.items()):
        shown = [finding for finding in findings if finding.kind == kind][:NAMED]
        console.print(Text.assemble((f"\n{title[:-1]} {kind}", f"bold {style}"), f" {count:,}x: {KINDS[kind]}"))
        for finding in shown:
            where = f"{finding.source}, row {finding.row}" if finding.row else finding.source
            _print(console, f"  {finding.stage} {finding.part}: {where}: {finding.message}")
        if count > len(shown):
            console.print(Text(f"  and {count - len(shown):,} more", style="dim"))


def show_exports(console: Console, exports: dict[str, str | None] | str) -> None:
    """Prints which formats the trained model can be exported in, and why not in the others; or why that is not known."""
    if isinstance(exports, str):
        _print(console, f"exports: not known ({exports})")
        return
    for name, why_not in exports.items():
        _print(console, f"export --format {name}: {'possible' if why_not is None else f'not possible: {why_not}'}")


# --- plan ------------------------------------------------------------------------------------------------------------

CAUSES = {
    "frozen": "frozen weights",
    "trained": "trained weights (fp32)",
    "adapters": "LoRA weights (fp32)",
    "optimizer": "optimizer (AdamW)",
    "gradients": "gradients",
    "activations": "activations",
    "logits": "logits",
    "exchange": "exchange between processes",
    "holes": "holes between tensors",
    "kernels": "compiled kernels (oneDNN)",
    "base": "process, libraries",
}


def gigabytes(size: float) -> str:
    """Bytes as 0.35 GB."""
    return f"{size / 1e9:,.2f} GB"


def show_plan(console: Console, plan: Plan) -> None:
    """Prints what a recipe needs: parameters and memory of each stage, FLOPs, and what to change if it does not fit."""
    where = f"{plan.processes} processes" if plan.processes > 1 else "1 process"
    where += f" on {plan.nodes} nodes" if plan.nodes > 1 else ""
    where += f", ZeRO-{plan.zero}" if plan.processes > 1 or plan.zero else ""
    where += {"none": "", "optimizer": ", optimizer offloaded", "all": ", optimizer and weights offloaded"}[plan.offload]
    quantized = f", LLM in {plan.quantize}" if plan.quantize else ""
    console.print(Text(f"{plan.name}: {plan.precision}{quantized}, on {plan.device}, {where}", style="bold"))
    for stage in plan.stages:
        _show_stage(console, stage)
        _show_time(console, plan, stage)
    if plan.allocator == "malloc":
        # Measured with glibc 2.36, as docs/plan.md says.
        why = "no C++ compiler, or addresses are limited (ulimit -v)"
        console.print(Text(f"{why}: tensors lie where malloc puts them, and a run may take a third more", style="yellow"))
    if plan.machine is not None and plan.machine.lacks:
        _print(console, f"\n{plan.machine.device}: {'; '.join(plan.machine.lacks)}", "yellow")
    verdict = f"needs {gigabytes(plan.needed)} on each device"
    if plan.gpu_memory is not None:
        fits = plan.fits
        verdict += f", {'fits' if fits else 'does not fit'} in {gigabytes(plan.gpu_memory)}"
        console.print(Text(f"\n{verdict}", style="bold green" if fits else "bold red"))
    else:
        console.print(Text(f"\n{verdict}", style="bold"))
    for advice in plan.advice:
        mark = "fits" if plan.gpu_memory is not None and advice.needed <= plan.gpu_memory else "does not fit"
        sets = "".join(f" --set {change}" for change in advice.changes)
        console.print(Text(f"  {gigabytes(advice.needed):>10}  {mark:12}  {advice.text}{':' if sets else ''}{sets}"))
    console.print(Text(f"planned in {plan.seconds:.1f} s", style="dim"))


def _show_stage(console: Console, stage: StagePlan) -> None:
    console.print(Text(f"\n{stage.name}", style="bold"))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("  part", "parameters", "trained", "of it LoRA", "share", "weights"):
        table.add_column(name, justify="left" if name == "  part" else "right")
    for part in stage.parts:
        share = f"{part.trained / max(part.total, 1):.2%}"
        table.add_row(f"  {part.part}", f"{part.total:,}", f"{part.trained:,}", f"{part.adapters:,}", share, gigabytes(part.bytes))
    total, trained = sum(part.total for part in stage.parts), sum(part.trained for part in stage.parts)
    adapters, held = sum(part.adapters for part in stage.parts), sum(part.bytes for part in stage.parts)
    table.add_row("  all", f"{total:,}", f"{trained:,}", f"{adapters:,}", f"{trained / max(total, 1):.2%}", gigabytes(held), style="bold")
    console.print(table)
    memory = Table(box=None, pad_edge=False, header_style="dim")
    memory.add_column("  memory at the peak")
    memory.add_column("", justify="right")
    for name, text in CAUSES.items():
        if size := getattr(stage.memory, name):
            memory.add_row(f"  {text}", gigabytes(size))
    memory.add_row("  all", gigabytes(stage.memory.total), style="bold")
    if stage.loading > stage.memory.total:
        memory.add_row("  while the model is made", gigabytes(stage.loading), style="bold")
    console.print(memory)
    peak = stage.peak
    labels = f", {peak.labels:,} label tokens" if peak.labels != peak.length else ""
    cache = f"{gigabytes(stage.feature_cache)} on disk" if stage.feature_cache else "on disk, size unknown" if stage.cached else "none"
    for name, text in (
        ("batch", f"{peak.rows:,} rows x {peak.length:,} tokens{labels}"),
        ("known from", stage.source),
        ("step", f"{stage.flops / 1e12:,.3g} TFLOP a device, {stage.mean.tokens:,.0f} tokens a micro-batch"),
        ("feature cache", cache),
    ):
        console.print(Text(f"  {name:15}{text}"))
    if stage.host:
        console.print(Text(f"  {'offloaded':15}{gigabytes(stage.host)} of the machine's memory for each process"))
    if stage.communication:
        _show_communication(console, stage.communication)


def _show_time(console: Console, plan: Plan, stage: StagePlan) -> None:
    """The steps of a stage, and how long they are expected to take on this machine."""
    if stage.steps is None:
        _print(console, f"  {'steps':15}not known: they are counted of the data's rows")
        return
    line = f"  {'steps':15}{stage.steps:,}"
    if (expected := plan.time(stage)) is not None and plan.machine is not None:
        rate = f"{plan.machine.rate / 1e9:,.3g} GFLOP/s of {plan.machine.precision} products, measured just now"
        line += f", expected to take {duration(expected[0])} to {duration(expected[1])} here (an estimate from {rate}; without evaluation)"
    _print(console, line)


def _show_communication(console: Console, found: Communication) -> None:
    """What a step sends, by what it is, how long that takes, and the efficiency to expect."""
    from vlm_tune.memory_plan.communication import GOOD

    sent, link = found.traffic, "a node's link" if found.nodes > 1 else "a device's link"
    names = {"gradients": "gradients", "updated": "updated weights", "forward": "weights forward", "backward": "weights backward"}
    kinds = ", ".join(f"{text} {gigabytes(size)}" for name, text in names.items() if (size := getattr(sent, name)))
    console.print(Text(f"  {'sends':15}{gigabytes(sent.total)} a step from each process: {kinds}"))
    console.print(Text(f"  {'link':15}{found.seconds:,.3g} s a step at {found.bandwidth * 8 / 1e9:,g} Gbit/s of {link}"))
    if found.computing is None or found.least is None or found.most is None:
        said = f"{GOOD:.0%} and more where a step computes for {found.good:,.3g} s or longer (--tflops gives a figure)"
    else:
        said = f"{found.least:.0%} with nothing overlapped, up to {found.most:.0%}; a step computes for {found.computing:,.3g} s"
    console.print(Text(f"  {'efficiency':15}{said}"))


# --- merged and exported ---------------------------------------------------------------------------------------------

READERS = {
    "llava": "opened by transformers' own classes",
    "adapter": "opened by plain PEFT over its base, text alone",
    "gguf": "read back from the files, computed as llama.cpp is meant to",
}


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def merge_proof(report: MergeReport) -> str:
    """What a merged model was compared with, and how it went: one that fails is not written."""
    from vlm_tune.exporting.merge import merge_lines

    lines = merge_lines(report)
    checks = ["passed", "passed", "passed" if report.same_text else "ALLOWED"]
    marks = [*checks, *["note  "] * (len(lines) - len(checks))]
    return "\n".join(
        [f"verified on {_rows(report.rows)}, computed in fp32:", *(f"  {mark}  {line}" for mark, line in zip(marks, lines, strict=True))]
    )


def export_proof(report: ExportReport) -> str:
    """What an export was compared with, and how it went: one that fails is not written."""
    if report.difference is None:
        return "not verified"
    rounded = " beyond what q8_0 rounds" if report.dtype == "q8_0" else ""
    said = f"verified on {_rows(report.rows)}, {READERS[report.format]}:\n"
    said += f"  passed  logits within {report.difference:.2g} of the model's ({report.allowed:.2g} is allowed{rounded})"
    if report.same_text is not None:
        same = "the same as the model's" if report.same_text else "those of the rounded weights, which are not all the model's"
        said += f"\n  passed  greedy answers {same}"
    return said
