"""The result of `init`: where the recipe is, what it is about, and what became of each key."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlm_tune.config.objectives import COMMANDS
from vlm_tune.config.recipe import Recipe
from vlm_tune.data_check.findings import CheckReport
from vlm_tune.errors import EXIT_DONE
from vlm_tune.memory_plan.results import Plan
from vlm_tune.recipe_writer.look import Facts


@dataclass(frozen=True)
class Unmatched:
    """A key of another framework's configuration that the recipe has no counterpart of, and why."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Written:
    """A recipe that was written, and what is known about it.

    Attributes:
        path: The recipe's file.
        recipe: The recipe.
        machine: The machine it is for, in words; None for a converted configuration.
        facts: What the train rows are like; None where they were not read.
        plan: What the run needs; None for a converted configuration.
        fits: Whether it fits into the machine's memory.
        report: What the check of the data says; None where it was not possible.
        unchecked: The reason why the data was not checked.
        framework: The framework that a converted configuration is of.
        unmatched: Its keys without a counterpart.
    """

    path: Path
    recipe: Recipe
    machine: str | None = None
    facts: Facts | None = None
    plan: Plan | None = None
    fits: bool | None = None
    report: CheckReport | None = None
    unchecked: str | None = None
    framework: str | None = None
    unmatched: list[Unmatched] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """The exit code: that of the check of the data."""
        return EXIT_DONE if self.report is None else self.report.exit_code

    @property
    def commands(self) -> list[str]:
        """The commands that come next."""
        return [
            f"vlm-tune check {self.path}",
            f"vlm-tune plan {self.path}",
            f"vlm-tune {COMMANDS[self.recipe.last_stage.objective.kind]} {self.path}",
            f"vlm-tune eval {self.recipe.output}",
        ]

    def summary(self) -> dict[str, Any]:
        """The outcome as a dict for JSON."""
        report = self.report
        return {
            "path": str(self.path),
            "machine": self.machine,
            "data": None if self.facts is None else asdict(self.facts),
            "needed": None if self.plan is None else self.plan.needed,
            "fits": self.fits,
            "errors": None if report is None else report.error_counts.total(),
            "warnings": None if report is None else report.warning_counts.total(),
            "unchecked": self.unchecked,
            "framework": self.framework,
            "unmatched": [asdict(each) for each in self.unmatched],
            "commands": self.commands,
        }
