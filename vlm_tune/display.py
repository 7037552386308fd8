"""What the terminal shows of a run: one live line where it can be redrawn, plain lines where it can't."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def duration(seconds: float) -> str:
    """Seconds as 0:42 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Display:
    """Shows a run's events on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._status: Any = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Shows one event."""
        getattr(self, f"_{event['event']}", self._other)(event)

    def close(self) -> None:
        """Removes the live line."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _live(self, text: str) -> None:
        if not self.console.is_terminal:
            return
        if self._status is None:
            self._status = self.console.status(text)
            self._status.start()
        self._status.update(text)

    def _line(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)

    def _stage(self, event: dict[str, Any]) -> None:
        start = f", from step {event['from_step']}" if event["from_step"] else ""
        self._line(
            f"stage {event['stage'] + 1} {event['name']}: {event['questions']:,} question-answer pairs, "
            f"{event['images']:,} images, {event['steps']:,} steps{start}",
            "bold",
        )

    def _tuning(self, event: dict[str, Any]) -> None:
        self.close()
        self.console.print(tuning_table(event["name"], event["rows"]))

    def _features(self, event: dict[str, Any]) -> None:
        self._live(f"tower features {event['done']:,} of {event['of']:,} images")

    def _scoring(self, event: dict[str, Any]) -> None:
        self._live(f"answering {event['done']:,} of {event['of']:,} questions")

    def _train(self, event: dict[str, Any]) -> None:
        text = (
            f"step {event['step']:,}/{event['of']:,}  loss {event['loss']:.4f}  lr {event['learning_rate']:.2e}  "
            f"{event['questions_per_s']:,.0f} qa/s  {event['tokens_per_s']:,.0f} tok/s  "
            f"padding {event['padding']:.0%}  {duration(event['left'])} left"
        )
        if self.console.is_terminal:
            self._live(text)
        else:
            self._line(text)

    def _evaluate(self, event: dict[str, Any]) -> None:
        self._line(
            f"  step {event['step']:,}: validation accuracy {event['accuracy']:.2%} of {event['n']:,}, loss {event['loss']:.4f}", "green"
        )

    def _test(self, event: dict[str, Any]) -> None:
        self.close()
        self.console.print(score_table(event["accuracy"], event["n"], event["by_category"]))

    def _note(self, event: dict[str, Any]) -> None:
        self._line(event["text"], "yellow")

    def _other(self, event: dict[str, Any]) -> None:
        pass


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


def score_table(accuracy: float, n: int, by_category: dict[str, dict[str, float]]) -> Table:
    """Exact match over all rows and by category."""
    table = Table(title="exact match", title_justify="left")
    table.add_column("answers")
    table.add_column("accuracy", justify="right")
    table.add_column("n", justify="right")
    for name, entry in by_category.items():
        table.add_row(Text(name), f"{entry['accuracy']:.2%}", f"{entry['n']:,.0f}")
    table.add_section()
    table.add_row("all", f"{accuracy:.2%}", f"{n:,}")
    return table
