"""Terminal output of a run: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import singledispatchmethod
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_tune.events import (
    Acceleration,
    Environment,
    Evaluation,
    Event,
    Features,
    FinalScores,
    LoadedModel,
    Note,
    PeakMemory,
    Preparing,
    Scoring,
    StageStart,
    TrainSteps,
    TrialEnd,
    TrialStart,
    Tuning,
    ValidationLoss,
)
from vlm_tune.quoting import escaped
from vlm_tune.rendering.media_text import media_text
from vlm_tune.rendering.scores_text import (
    ACCURACIES,
    MARGINS,
    REWARD,
    amount,
    metric_title,
    score_notes,
    score_tables,
    shown_figures,
)
from vlm_tune.rendering.sweep_text import end_line, start_line

EVERY = 30.0
"""Seconds without output after which progress is printed, if the output is not a terminal."""
LOOK = 1.0
"""Seconds between two checks of that."""


def duration(seconds: float) -> str:
    """Formats seconds as 0:42 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Display(logging.Handler):
    """Shows a run's events and the package's log (`logging.getLogger("vlm_tune")`) on a console.

    A terminal has one live line. Elsewhere (a pipe, a log file) each phase of work prints a line
    when it begins, and a thread prints its progress where nothing was printed for `EVERY` seconds.
    `close` ends the live line and the thread.
    """

    def __init__(
        self, console: Console, *, clock: Callable[[], float] = time.monotonic, beats: bool = True
    ) -> None:
        """Starts the thread if the console is not a terminal.

        Args:
            console: where to print.
            clock: returns the time in seconds.
            beats: without it no thread is started, and the caller calls `beat`.
        """
        super().__init__(logging.INFO)
        self.console = console
        self.clock = clock
        self._status: Any = None
        self._phase = ""
        self._state = ""
        self._began = self._printed = clock()
        self._stopping = threading.Event()
        if beats and not console.is_terminal:
            threading.Thread(target=self._beats, name="display", daemon=True).start()

    def __enter__(self) -> Display:
        """Starts handling the package's log."""
        package = logging.getLogger("vlm_tune")
        package.addHandler(self)
        package.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("vlm_tune").removeHandler(self)
        self.close()

    def emit(self, record: logging.LogRecord) -> None:
        """Shows a log record: a warning as a note, any other as the phase that begins."""
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            self._line(text, "yellow")
        else:
            self._live(text, text)

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        self._show(event)

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
        """Prints the state of the current phase if nothing was printed for `EVERY` seconds."""
        now = self.clock()
        state = self._state
        if state and now - self._printed >= EVERY:
            self._line(f"{state} ({duration(now - self._began)} so far)")

    def _live(self, phase: str, text: str) -> None:
        """Shows `text` as the state of a phase of work."""
        if not self.console.is_terminal:
            begins = phase != self._phase
            self._phase = phase
            self._state = text
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
        print_line(self.console, text, style)

    @singledispatchmethod
    def _show(self, event: Event) -> None:
        """Shows an event by its type."""
        raise TypeError(f"no way to show {event}")

    @_show.register
    def _environment(self, event: Environment) -> None:
        values = event.values
        if "kernels" in values:
            self._line(f"bf16 on the CPU by {event.kernels_reason}")
            return
        versions = [
            f"{label} {values[key]}"
            for key, label in (
                ("capability", "compute capability"),
                ("driver", "driver"),
                ("cuda", "CUDA"),
                ("cudnn", "cuDNN"),
                ("nccl", "NCCL"),
            )
            if values[key] is not None
        ]
        memory = f"{values['memory_gb']:,.1f} GB"
        self._line(f"{values['device']}: {', '.join([memory, *versions])}")

    @_show.register
    def _stage(self, event: StageStart) -> None:
        start = f", from step {event.from_step}" if event.from_step else ""
        rows = (
            "rows read as they come"
            if event.streaming
            else f"{event.questions:,} question-answer pairs, {media_text(event.line())}"
        )
        title = f"stage {event.stage + 1} {event.name}"
        self._line(f"{title}: {rows}, {event.steps:,} steps{start}", "bold")

    @_show.register
    def _model(self, event: LoadedModel) -> None:
        self._line(f"{event.folder}: {event.about}")

    @_show.register
    def _preparing(self, event: Preparing) -> None:
        phase = f"preparing {event.name} {event.part}"
        self._live(phase, f"{phase}: {event.rows:,} rows")

    @_show.register
    def _tuning(self, event: Tuning) -> None:
        self._clear()
        self.console.print(tuning_table(event.name, event.rows))

    @_show.register
    def _features(self, event: Features) -> None:
        self._live("features", f"computing tower features: {event.done:,} of {event.of:,} inputs")

    @_show.register
    def _scoring(self, event: Scoring) -> None:
        self._live("scoring", f"answering {event.done:,} of {event.of:,} questions")

    @_show.register
    def _validation_loss(self, event: ValidationLoss) -> None:
        text = f"computing the loss of {event.done:,} of {event.of:,} validation rows"
        self._live("validation loss", text)

    @_show.register
    def _train(self, event: TrainSteps) -> None:
        # A stream has no epochs.
        epoch = "" if event.epoch is None else f"  epoch {event.epoch:.2f}"
        peak = event.gpu_memory_mb
        memory = "" if peak is None else f"peak {peak / 1000:,.1f} GB  "
        text = (
            f"step {event.step:,}/{event.of:,}{epoch}  loss {event.loss:.4f}  {_rewards(event)}"
            f"lr {event.learning_rate:.2e}  {event.questions_per_s:,.0f} qa/s  "
            f"{event.tokens_per_s:,.0f} tok/s  padding {event.padding:.1%}  {memory}"
            f"{duration(event.left)} left"
        )
        if self.console.is_terminal:
            self._live("training", text)
            return
        self._phase = "training"
        self._state = f"training, past step {event.step:,} of {event.of:,}"
        self._began = self.clock()
        self._line(text)

    @_show.register
    def _memory(self, event: PeakMemory) -> None:
        self._line(
            f"peak GPU memory of stage {event.stage + 1} {event.name}: "
            f"{event.gpu_memory_mb / 1000:,.1f} GB, {event.gpu_reserved_mb / 1000:,.1f} GB reserved"
        )

    @_show.register
    def _evaluate(self, event: Evaluation) -> None:
        if not self.console.is_terminal:
            self._began = self.clock()
            self._phase = "training"
            self._state = f"training, past step {event.step:,}"
        self._line(f"  step {event.step:,}: validation {_validation(event)}", "green")
        for name, reason in (event.skipped or {}).items():
            self._line(f"  {name} is not computed: {reason}", "yellow")

    @_show.register
    def _test(self, event: FinalScores) -> None:
        self._clear()
        print_scores(self.console, event.line())

    @_show.register
    def _trial(self, event: TrialStart) -> None:
        self._line(start_line(event), "bold")

    @_show.register
    def _trial_end(self, event: TrialEnd) -> None:
        self._clear()
        self._line(end_line(event), "green" if event.state == "complete" else "yellow")

    @_show.register
    def _note(self, event: Note) -> None:
        self._line(event.text, "yellow")

    @_show.register
    def _acceleration(self, event: Acceleration) -> None:
        self._line(f"parts that train by kernels: {event.text}")


def _validation(event: Evaluation) -> str:
    """The scores of a validation, the one that chooses the best checkpoint first.

    Those of an objective that answers nothing and has no other figures are the loss alone.
    """
    figures = shown_figures(event.figures)
    loss = "" if event.loss is None else f"loss {event.loss:.4f}"
    if not figures:
        return f"{loss} of {event.n:,}"
    main = event.best_by if event.best_by in figures else next(iter(figures))
    sources = [
        f"{name} {amount(main, _of_source(entry, main))} of {entry['n']:,}"
        for name, entry in (event.by_source or {}).items()
    ]
    listed = f" ({', '.join(sources)})" if len(sources) > 1 else ""
    others = [
        f"{metric_title(name)} {amount(name, figure)}"
        for name, figure in figures.items()
        if name != main
    ]
    score = f"{metric_title(main)} {amount(main, figures[main])} of {event.n:,}{listed}"
    return ", ".join([score, *others, *([loss] if loss else [])])


def _of_source(entry: Mapping[str, Any], metric: str) -> float | None:
    """A source's score by a metric; None where no row of it is scored by that."""
    if metric == "exact_match":
        return entry["accuracy"]
    return entry["metrics"].get(metric, {}).get("value")


def _rewards(event: TrainSteps) -> str:
    """The figures of rewards that a line has room for, and two spaces; else empty."""
    metrics = event.metrics or {}
    if REWARD in metrics:
        return f"reward {metrics[REWARD]:.3g}  "
    shown = {"accuracies": ACCURACIES, "margins": MARGINS}
    figures = [f"{word} {metrics[name]:.3g}" for word, name in shown.items() if name in metrics]
    return f"rewards: {', '.join(figures)}  " if figures else ""


def print_line(console: Console, text: str, style: str = "") -> None:
    """Prints lines without wrapping them, which the terminal does.

    Control characters, which rows and names may hold, are escaped.
    """
    console.print(Text("\n".join(map(escaped, text.split("\n"))), style=style), soft_wrap=True)


def print_scores(console: Console, summary: Mapping[str, Any]) -> None:
    """Prints the tables of a summary of `Scores`, and the notes on what they lack."""
    for table in score_tables(summary):
        console.print(table)
    for note in score_notes(summary):
        print_line(console, note, "yellow")


def tuning_table(stage: str, rows: list[dict[str, Any]]) -> Table:
    """A table of trained parameters: which train, how, and at which learning rate."""
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
        table.add_row(
            Text(row["match"]),
            row["how"],
            rate,
            f"{row['trained']:,}",
            f"{row['total']:,}",
            row["detail"],
        )
    trained = sum(row["trained"] for row in rows)
    total = sum(row["total"] for row in rows)
    table.add_section()
    table.add_row(
        "all", "", "", f"{trained:,}", f"{total:,}", f"{trained / max(total, 1):.2%} trained"
    )
    return table
