"""`vlm-tune init`: writes a recipe for data and this machine, or from another configuration."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_tune.config.load import load_recipe
from vlm_tune.data_check.check import check
from vlm_tune.errors import ModelError, Problem, RecipeError
from vlm_tune.events import Report
from vlm_tune.paths import check_path, check_writable, shown_path, write_whole, writing
from vlm_tune.quoting import reason_of
from vlm_tune.recipe_writer.audio_models import audio_candidates
from vlm_tune.recipe_writer.choose import (
    batches,
    hold_out_less,
    set_data,
    set_evaluation,
    set_training,
    shape_tower,
)
from vlm_tune.recipe_writer.converting.convert import convert
from vlm_tune.recipe_writer.draft import Draft
from vlm_tune.recipe_writer.find_data import PART_WORDS, Sources, find_data
from vlm_tune.recipe_writer.fit import Drafted, Fit, fit
from vlm_tune.recipe_writer.look import ROWS, Facts, look
from vlm_tune.recipe_writer.machine import Machine, this_machine
from vlm_tune.recipe_writer.models import ModelChoice, candidates
from vlm_tune.recipe_writer.small_data import aligned_first
from vlm_tune.recipe_writer.written import Written


def init(
    paths: str | Path | Sequence[str | Path] = (),
    *,
    configuration: str | Path | None = None,
    output: str | Path = "recipe.yaml",
    model: str | None = None,
    tower: str | None = None,
    force: bool = False,
    show: Report | None = None,
) -> Written:
    """Writes a recipe for data and this machine, or from another framework's configuration.

    Args:
        paths: files of rows, tar shards, a data set saved to disk, or a folder of them or of class
            folders.
        configuration: in place of `paths`, a configuration of LLaMA-Factory, ms-swift, TRL or
            LLaVA.
        output: the recipe to write.
        model: a folder or hub name of an LLM or of a whole vision-language model; chosen for the
            machine by default.
        tower: a folder or hub name of a vision tower, or an open_clip one as NAME:TAG; of a
            Whisper model for rows with audio.
        force: replace an existing file at `output`.
        show: called with every event.

    Returns:
        Where the recipe is, what it is about, and what the check of the data says.

    Raises:
        RecipeError: an argument can't be used, the output is there already, or the configuration
            can't be read.
        DataError: the data can't be read, or holds no images and no audio.
        ModelError: the config of `model` can't be read.
    """
    named = _checked_paths(paths)
    _check_arguments(named, configuration, output, model, tower, force)
    if configuration is not None:
        return convert(Path(configuration), Path(output), model=model, tower=tower, show=show)
    return _for_data(named, Path(output), model, tower, show)


def _for_data(
    named: list[str], target: Path, model: str | None, tower: str | None, show: Report | None
) -> Written:
    """Writes a recipe for data and this machine."""
    sources = find_data(named)
    facts = look(sources["train"])
    machine = this_machine()
    name = _name_of(named[0])

    def drafted_for(choice: ModelChoice) -> Drafted:
        return _checked(_draft(name, sources, facts, machine, choice), facts, show)

    models = audio_candidates if facts.seconds else candidates
    choices = [aligned_first(each, facts) for each in models(machine, facts, model, tower)]
    chosen = fit(choices, facts, machine, drafted_for, show)
    with writing(target, "the recipe"):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, chosen.draft.text(_title(named, machine, chosen)))
    return Written(
        target,
        load_recipe(target),
        machine.description,
        facts,
        chosen.plan,
        chosen.fits,
        chosen.report,
        chosen.unchecked,
    )


def _checked_paths(paths: str | Path | Sequence[str | Path]) -> list[str]:
    listed = [paths] if isinstance(paths, str | Path) else paths
    if not isinstance(listed, Sequence):
        check_path("paths", listed)
    for path in listed:
        check_path("paths", path)
    return [str(path) for path in listed]


def _check_arguments(
    paths: list[str],
    configuration: Any,
    output: Any,
    model: Any,
    tower: Any,
    force: Any,
) -> None:
    """Raises `RecipeError` for arguments that can't be used."""
    if bool(paths) == (configuration is not None):
        message = "give the paths of data, or another framework's configuration with --from"
        raise RecipeError([Problem("PATH", message)])
    for option, name in (("--from", configuration), ("--model", model), ("--tower", tower)):
        if name is not None:
            check_path(option, name)
    check_path("--output", output)
    if force is not True and os.path.lexists(output):
        message = "already exists and was not changed (--force replaces it)"
        raise RecipeError([Problem(shown_path(output), message)])
    check_writable(output, "the recipe")


def _name_of(path: str) -> str:
    """The run's name: that of the file or folder, as far as a run's name can be that."""
    place = Path(path).absolute()
    stem = place.name.split(".")[0]
    if stem.lower() in PART_WORDS:
        stem = place.parent.name
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or "run"


def _draft(
    name: str,
    sources: Sources,
    facts: Facts,
    machine: Machine,
    choice: ModelChoice,
) -> Draft:
    """The recipe's draft for a model, with its largest batch."""
    draft = choice.draft.copy()
    draft.set("name", name)
    draft.set("output", f"runs/{name}")
    draft.set("seed", 0)
    if not choice.splits and not facts.seconds:
        shape_tower(draft, facts, choice.size)
    set_data(draft, facts, sources, choice)
    set_training(draft, facts, machine, choice, batches(facts, choice)[0])
    set_evaluation(draft, facts, choice)
    return draft


def _checked(draft: Draft, facts: Facts, show: Report | None) -> Drafted:
    """The draft with the check's report, or with the reason why there is none.

    Where the images can't be divided as the draft says, the draft holds out less.
    """
    sample = ROWS if facts.rows > ROWS else None
    try:
        report = check(draft.recipe("recipe"), sample=sample, show=show)
        while report.error_counts["split"] and hold_out_less(draft):
            report = check(draft.recipe("recipe"), sample=sample, show=show)
    except ModelError as error:
        return Drafted(draft, None, reason_of(error))
    return Drafted(draft, report, None)


def _title(paths: list[str], machine: Machine, chosen: Fit) -> str:
    """The comment at the head of the recipe."""
    lines = [f"Written by `vlm-tune init {' '.join(paths)}` for: {machine.description}."]
    if not chosen.fits:
        lines.append(
            f"It does not fit: {chosen.plan.needed / 1e9:.1f} GB are needed. Take a smaller model "
            "(--model), or a machine with more memory."
        )
    seconds = chosen.plan.time(chosen.plan.stages[-1])
    if seconds is not None:
        least, most = (max(math.ceil(each / 60), 1) for each in seconds)
        lines.append(f"Training is expected to take {least} to {most} minutes here.")
    lines.append("Change what you like: docs/recipe.md explains every key.")
    return "\n".join(lines)
