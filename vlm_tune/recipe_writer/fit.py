"""Finds the best model and the largest batch that `plan` says fit into the machine's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlm_tune.events import Note, Report
from vlm_tune.memory_plan.plan import plan
from vlm_tune.memory_plan.results import Plan
from vlm_tune.recipe_writer.choose import batches
from vlm_tune.recipe_writer.draft import Draft
from vlm_tune.recipe_writer.look import Facts
from vlm_tune.recipe_writer.machine import Machine
from vlm_tune.recipe_writer.models import ModelChoice


@dataclass(frozen=True)
class Fit:
    """The draft of a model with its batch, and what `plan` says about it."""

    choice: ModelChoice
    draft: Draft
    plan: Plan
    fits: bool


def fit(
    choices: list[ModelChoice],
    facts: Facts,
    machine: Machine,
    draft_of: Callable[[ModelChoice, int], Draft],
    show: Report | None = None,
) -> Fit:
    """Plans each choice, its largest batch first, until one fits.

    Args:
        choices: the models to try, the best first.
        facts: what the data is like.
        machine: the machine's memory.
        draft_of: writes the draft for a choice and a batch.
        show: called with a note about each plan.

    Returns:
        The first that fits; where none does, the last choice with the smallest batch.
    """
    last: Fit | None = None
    for choice in choices:
        smaller: str | None = None
        for batch in batches(facts, choice):
            draft = draft_of(choice, batch)
            planned = plan(draft.recipe("recipe"))
            fits = planned.needed <= machine.memory
            if show:
                show(Note(f"{choice.name}, batches of {batch}: {_memory(planned, machine)}"))
            reason = f"{_memory(planned, machine)}, says `vlm-tune plan`"
            reason += f"; {smaller}" if smaller else ""
            draft.set("train.batch_size", batch, reason)
            draft.set("train.cache_features", "auto", f"here: {planned.stages[-1].why_cached}")
            last = Fit(choice, draft, planned, fits)
            if fits:
                return last
            smaller = f"batches of {batch} take {planned.needed / 1e9:.1f} GB"
    assert last is not None
    return last


def _memory(planned: Plan, machine: Machine) -> str:
    return f"{planned.needed / 1e9:.1f} GB of {machine.memory / 1e9:.1f} GB"
