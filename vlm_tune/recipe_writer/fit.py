"""Finds the best model and the largest batch that `plan` says fit into the machine's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlm_tune.data_check.findings import CheckReport
from vlm_tune.events import Note, Report
from vlm_tune.memory_plan.plan import plan
from vlm_tune.memory_plan.results import Plan
from vlm_tune.recipe_writer.choose import batches, planned_tokens, set_training
from vlm_tune.recipe_writer.draft import Draft
from vlm_tune.recipe_writer.look import Facts
from vlm_tune.recipe_writer.machine import Machine
from vlm_tune.recipe_writer.models import ModelChoice


@dataclass(frozen=True)
class Drafted:
    """The draft for a model, with the check's report, or with the reason why there is none."""

    draft: Draft
    report: CheckReport | None
    unchecked: str | None


@dataclass(frozen=True)
class Fit:
    """The draft of a model with its batch, and what `plan` and the check say about it."""

    choice: ModelChoice
    draft: Draft
    plan: Plan
    fits: bool
    report: CheckReport | None
    unchecked: str | None


def fit(
    choices: list[ModelChoice],
    facts: Facts,
    machine: Machine,
    drafted_for: Callable[[ModelChoice], Drafted],
    show: Report | None = None,
) -> Fit:
    """Plans each choice, its largest batch first, until one fits.

    Args:
        choices: the models to try, the best first.
        facts: what the data is like.
        machine: the machine's memory.
        drafted_for: writes and checks the draft for a choice, so that `plan` knows its lengths.
        show: called with a note about each plan.

    Returns:
        The first that fits; where none does, the last choice with the smallest batch.
    """
    last: Fit | None = None
    for choice in choices:
        drafted = drafted_for(choice)
        smaller: str | None = None
        for batch in batches(facts, choice):
            draft = drafted.draft.copy()
            set_training(draft, facts, machine, choice, batch)
            planned = plan(draft.recipe("recipe"), tokens=planned_tokens(facts, choice))
            fits = planned.needed <= machine.memory
            if show:
                show(Note(f"{choice.name}, batches of {batch}: {_memory(planned, machine)}"))
            reason = f"{_memory(planned, machine)}, says `vlm-tune plan`"
            reason += f"; {smaller}" if smaller else ""
            draft.set("train.batch_size", batch, reason)
            draft.set("train.cache_features", "auto", f"here: {planned.stages[-1].why_cached}")
            last = Fit(choice, draft, planned, fits, drafted.report, drafted.unchecked)
            if fits:
                return last
            smaller = f"batches of {batch} take {planned.needed / 1e9:.1f} GB"
    assert last is not None
    return last


def _memory(planned: Plan, machine: Machine) -> str:
    return f"{planned.needed / 1e9:.1f} GB of {machine.memory / 1e9:.1f} GB"
