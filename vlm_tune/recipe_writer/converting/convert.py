"""Turns the configuration of another framework into a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_tune.config.load import load_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.data_check.check import check
from vlm_tune.data_check.findings import CheckReport
from vlm_tune.errors import ModelError, Problem, RecipeError
from vlm_tune.events import Report
from vlm_tune.paths import shown_path, write_whole, writing
from vlm_tune.quoting import json_line, name_list, reason_of
from vlm_tune.recipe_writer.converting import llama_factory, llava, ms_swift, trl
from vlm_tune.recipe_writer.converting.arguments import Arguments
from vlm_tune.recipe_writer.converting.conversion import Conversion
from vlm_tune.recipe_writer.converting.objectives import settle
from vlm_tune.recipe_writer.converting.reading import read_configuration
from vlm_tune.recipe_writer.converting.sources import here
from vlm_tune.recipe_writer.written import Unmatched, Written


@dataclass(frozen=True)
class Framework:
    """A framework: its name, keys that others do not have, and its converter."""

    name: str
    markers: set[str]
    convert: Callable[[Conversion], None]


FRAMEWORKS = (
    Framework("LLaMA-Factory", llama_factory.MARKERS, llama_factory.convert),
    Framework("ms-swift", ms_swift.MARKERS, ms_swift.convert),
    Framework("TRL", trl.MARKERS, trl.convert),
    Framework("LLaVA", llava.MARKERS, llava.convert),
)


def framework_of(place: str, values: dict[str, Any]) -> Framework:
    """The framework whose keys a configuration has.

    Raises:
        RecipeError: it has those of none, of two alike, or it is a recipe.
    """
    names = ", ".join(each.name for each in FRAMEWORKS)
    if {"model", "data", "train"} <= values.keys():
        raise RecipeError([Problem(place, "is a recipe already: `vlm-tune check` takes it")])
    if {"model_class", "train_dataset"} <= values.keys():
        message = (
            "is of LLaMA-Factory's v1 trainer (model_class, train_dataset), which is not read: "
            "write it in the keys of `llamafactory-cli train` (model_name_or_path, dataset, stage)"
        )
        raise RecipeError([Problem(place, message)])
    if "base_model" in values and {"adapter", "micro_batch_size", "sequence_len"} & values.keys():
        message = (
            f"is of axolotl, which is not read ({names} are): `vlm-tune init PATH --model MODEL` "
            "writes a recipe for your data"
        )
        raise RecipeError([Problem(place, message)])
    counts = {each.name: len(each.markers & values.keys()) for each in FRAMEWORKS}
    first, second, *_ = sorted(FRAMEWORKS, key=lambda each: -counts[each.name])
    if not counts[first.name]:
        message = (
            f"is of none of the frameworks that are read ({names}): it has the keys "
            f"{name_list(values)}"
        )
        raise RecipeError([Problem(place, message)])
    if counts[first.name] == counts[second.name]:
        message = (
            f"may be a configuration of {first.name} or {second.name}: it has keys of both; leave "
            "out those that are not meant"
        )
        raise RecipeError([Problem(place, message)])
    return first


def convert(
    path: Path, output: Path, *, model: str | None, tower: str | None, show: Report | None
) -> Written:
    """Writes the recipe of a configuration, and checks its data where that is on this machine.

    Args:
        path: the configuration.
        output: the recipe to write.
        model: the model to take in place of the configuration's.
        tower: the tower of that model.
        show: called with every event.

    Raises:
        RecipeError: the configuration can't be read, or a value in it is of another kind.
        ModelError: the config of `model` can't be read.
    """
    place = shown_path(path)
    values = read_configuration(path)
    framework = framework_of(place, values)
    conversion = Conversion(
        framework.name, path.parent, Arguments(place, values), model=model, tower=tower
    )
    framework.convert(conversion)
    settle(conversion)
    unmatched = sorted(conversion.arguments.unmatched, key=lambda each: each.key)
    try:
        conversion.draft.recipe(shown_path(output))
    except RecipeError as error:  # its places are in a file that is not written
        problems = [
            Problem(place, f"gives no valid recipe: {problem.message}")
            for problem in error.problems
        ]
        raise RecipeError(problems) from None
    with writing(output, "the recipe"):
        output.parent.mkdir(parents=True, exist_ok=True)
        text = conversion.draft.text(_title(place, framework, unmatched))
        write_whole(output, text)
    recipe = load_recipe(output)
    report, unchecked = _checked(recipe, conversion, show)
    return Written(
        output,
        recipe,
        report=report,
        unchecked=unchecked,
        framework=framework.name,
        unmatched=unmatched,
    )


def _title(place: str, framework: Framework, unmatched: list[Unmatched]) -> str:
    lines = [f"Converted by `vlm-tune init --from {place}` from {framework.name}'s configuration."]
    if unmatched:
        lines.append("These of its keys have no counterpart:")
        lines += [f"  {each.key}: {json_line(each.value)}: {each.reason}" for each in unmatched]
    lines.append("docs/recipe.md explains every key.")
    return "\n".join(lines)


def _checked(
    recipe: Recipe, conversion: Conversion, show: Report | None
) -> tuple[CheckReport | None, str | None]:
    """The check's report, or the reason why there is none."""
    sources = [
        source
        for part in ("train", "validation")
        for source in conversion.draft.values.get(f"data.{part}", [])
    ]
    if not here(sources):
        return None, "its data is not on this machine"
    try:
        return check(recipe, show=show), None
    # A reward function of the configuration's may be on another machine.
    except (ModelError, RecipeError) as error:
        return None, reason_of(error)
