"""Checks that the rows of a part are of a form that the stage's objective trains on."""

from __future__ import annotations

from vlm_tune.config.objectives import COMMANDS, JUDGED_FORMS, AnyObjective, OneObjective, parts_of
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.prepare.job import PartName
from vlm_tune.data.sources.preferences import PREFERENCE_FORMS
from vlm_tune.errors import DataError
from vlm_tune.quoting import name_list


def check_forms(objective: AnyObjective, prepared: Prepared, part: PartName) -> None:
    """Raises `DataError` for a source whose rows the objective can't train on or be scored by."""
    for source, reader in zip(prepared.sources, prepared.readers, strict=True):
        fault = form_fault(objective, reader.form, part, source.objective)
        if fault is not None:
            raise DataError(fault, source=reader.name, kind="form")


def form_fault(
    objective: AnyObjective, form: str, part: PartName, trained: str | None = None
) -> str | None:
    """The reason why the objective can't train on rows of a form, or be scored; else None.

    Of a mixture, rows train the one that is `trained`, or all; they are scored as the first one's.
    """
    parts = [each for each in parts_of(objective) if trained in (None, each.kind)]
    read = parts if part == "train" else parts_of(objective)[:1]
    return next((fault for each in read if (fault := _fault_of(each, form, part))), None)


def _fault_of(objective: OneObjective, form: str, part: PartName) -> str | None:
    """`form_fault` of one objective."""
    if part == "test" and objective.kind == "span_corruption":
        return (
            "span_corruption has a loss and no answers to score; leave test out, or add a stage "
            "that answers"
        )
    if part == "test" or (part == "validation" and objective.selects_by == "answers"):
        if form != "unpaired_preference":
            return None
        return (
            "rows of unpaired_preference have no right answer to score generated ones by; take "
            "rows of another form"
        )
    expected = JUDGED_FORMS.get(objective.kind)
    if expected is not None and form not in expected:
        page = "contrastive" if objective.kind == "matching" else "preferences"
        return (
            f"objective.kind: {objective.kind} trains on rows of the form "
            f"{name_list(expected)}, and these are {form} rows; docs/{page}.md shows them"
        )
    if expected is None and form == "match":
        return (
            "match rows have two answers, and negatives that the objective makes: set "
            "objective.kind: matching"
        )
    if expected is None and form in PREFERENCE_FORMS:
        kinds = [kind for kind, forms in JUDGED_FORMS.items() if form in forms]
        return (
            f"{form} rows have answers that are not to be learned: set objective.kind to one of "
            f"{name_list(kinds)} (`vlm-tune {COMMANDS[kinds[0]]}`), or take only the good answers "
            "with form: prompt_completion"
        )
    return None
