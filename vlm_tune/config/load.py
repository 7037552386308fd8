"""Reads, checks and writes recipes; reports every fault at once, with place and nearest names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from pydantic import TypeAdapter

from vlm_tune.config.data import DataSection
from vlm_tune.config.objective_rules import later_adapter_fault
from vlm_tune.config.objectives import COMMANDS
from vlm_tune.config.recipe import Recipe, merge_parts, stage_changes
from vlm_tune.config.rules import LENGTHS, contradictions
from vlm_tune.config.schema_errors import flow_value, problem_order, schema_faults, schema_problems
from vlm_tune.config.train import EvaluateSection, TrainSection
from vlm_tune.config.yaml_source import (
    Located,
    Path,
    apply_override,
    dotted_name,
    read_yaml,
    read_yaml_text,
    value_at,
)
from vlm_tune.errors import Problem, RecipeError
from vlm_tune.quoting import quoted


def load_recipe(
    path: str | FilePath,
    overrides: Sequence[str] | dict[str, Any] = (),
    *,
    note: Callable[[str], None] | None = None,
) -> Recipe:
    """Reads a recipe, applies overrides and checks it.

    An override of train.steps replaces the recipe's train.epochs, and the other way round, also in
    its stages.

    Args:
        path: a YAML file.
        overrides: `"a.b=c"` strings, or a mapping of dotted names to values.
        note: called with a message about what an override replaced besides the value it names.

    Raises:
        RecipeError: lists every problem with its `file:line:column`, or with its override.
    """
    if not isinstance(path, str | FilePath):
        raise RecipeError(
            [Problem("recipe", f"expected the path of a recipe file, got {quoted(path)}")]
        )
    located = read_yaml(path)
    changed = [apply_override(located, override) for override in _override_texts(overrides)]
    for line in _replace_lengths(located.value, changed):
        if note:
            note(line)
    return check_recipe(located)


def changed_recipe(recipe: Recipe, values: Mapping[str, Any], *, option: str = "--set") -> Recipe:
    """Returns the recipe with other values, by dotted name, checked as by `load_recipe`.

    Raises `RecipeError`, whose problems with these values name `option`.
    """
    located = recipe.located()
    texts = _override_texts(dict(values))
    changed = [apply_override(located, text, option) for text in texts]
    _replace_lengths(located.value, changed)
    return check_recipe(located)


def _override_texts(overrides: Sequence[str] | dict[str, Any]) -> list[str]:
    """Returns overrides as `a.b=c` texts. Raises `RecipeError` for anything else."""
    if isinstance(overrides, dict):
        return [f"{name}={flow_value(str(name), value)}" for name, value in overrides.items()]
    if isinstance(overrides, str) or not isinstance(overrides, Sequence):
        message = (
            f"expected a list of 'key.key=value' texts, or a mapping of dotted names to values, "
            f"got {quoted(overrides)}"
        )
        raise RecipeError([Problem("overrides", message)])
    for override in overrides:
        if not isinstance(override, str):
            raise RecipeError(
                [
                    Problem(
                        "overrides", f"expected a text as 'train.epochs=2', got {quoted(override)}"
                    )
                ]
            )
    return list(overrides)


def _replace_lengths(raw: Any, changed: Sequence[Path]) -> list[str]:
    """Removes epochs that an override of steps replaces, and steps that one of epochs replaces.

    Returns a message about each replacement.
    """
    notes = []
    for path in changed:
        if path[-2:-1] != ("train",) or path[-1] not in LENGTHS or _at(raw, path) is None:
            continue
        other = "epochs" if path[-1] == "steps" else "steps"
        replaced = []
        stages = raw.get("stages") if isinstance(raw.get("stages"), list) else []
        places: list[Path] = [("train",)] if len(path) == 2 else [path[:-1]]
        if len(path) == 2:
            places += [("stages", number, "train") for number, _ in enumerate(stages)]
        for place in places:
            section = _at(raw, place)
            if (
                isinstance(section, dict)
                and section.get(other) is not None
                and (*place, other) not in changed
            ):
                replaced.append(f"{dotted_name((*place, other))}: {section.pop(other)}")
                if section.get(path[-1], ...) is None:
                    # A stage's null means "not the common one", which is the one now set.
                    del section[path[-1]]
        if (
            len(path) == 4
            and (common := _at(raw, ("train", other))) is not None
            and (*path[:-1], other) not in changed
        ):
            _at(raw, path[:-1])[other] = None
            replaced.append(f"train.{other}: {common} for this stage")
        if replaced:
            notes.append(f"{dotted_name(path)}: {_at(raw, path)} replaces {' and '.join(replaced)}")
    return notes


def _at(raw: Any, path: Path) -> Any:
    """Returns the value at a path; None where there is none."""
    for key in path:
        if isinstance(raw, dict):
            raw = raw.get(key)
        elif isinstance(raw, list) and isinstance(key, int) and key < len(raw):
            raw = raw[key]
        else:
            return None
    return raw


def as_recipe(
    recipe: str | FilePath | Recipe, overrides: Sequence[str] | dict[str, Any] = ()
) -> Recipe:
    """Returns a loaded recipe, or loads it from a file with overrides.

    Raises `RecipeError` as `load_recipe`, and for overrides of a loaded recipe, which takes none.
    """
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides)
    if overrides:
        raise RecipeError(
            [Problem("overrides", "a recipe that is loaded takes none; give them to load_recipe")]
        )
    return recipe


def parse_recipe(text: str, name: str = "recipe") -> Recipe:
    """Checks a recipe given as YAML text, as `load_recipe`; `name` stands for the file."""
    return check_recipe(read_yaml_text(text, name))


def dump_recipe(recipe: Recipe) -> str:
    """Returns the resolved recipe as YAML, with every default written out.

    `load_recipe` reads it back to an equal recipe.
    """
    import io

    from ruamel.yaml import YAML

    stream = io.StringIO()
    yaml = YAML(typ="rt", pure=True)
    yaml.width = 120
    data = recipe.model_dump()
    data["stages"] = recipe.model_dump(exclude_unset=True).get("stages", [])
    yaml.dump(quoted_breaks(data), stream)
    return stream.getvalue()


def quoted_breaks(value: Any) -> Any:
    """Marks texts with unusual line breaks for double quotes in YAML, throughout a value.

    In other styles YAML folds such breaks into blanks.
    """
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    if isinstance(value, str):
        return (
            DoubleQuotedScalarString(value) if set(value) & {"\x85", "\u2028", "\u2029"} else value
        )
    if isinstance(value, dict):
        return {quoted_breaks(key): quoted_breaks(child) for key, child in value.items()}
    return [quoted_breaks(child) for child in value] if isinstance(value, list) else value


def check_recipe(located: Located) -> Recipe:
    """Returns a typed recipe from located values; a `RecipeError` has all problems at once."""
    problems = schema_problems(located, Recipe, located.value, ())
    raw_stages = located.value.get("stages")
    stages = raw_stages if isinstance(raw_stages, list) else []
    whole: list[tuple[Path, Any]] = []
    if not stages:
        whole.append(((), located.value))
    for index, stage in enumerate(stages):
        if isinstance(stage, dict):
            prefix: Path = ("stages", index)
            merged = merge_parts(
                {k: v for k, v in located.value.items() if k != "stages"}, stage_changes(stage)
            )
            whole.append((prefix, merged))
            for section, schema in (
                ("data", DataSection),
                ("train", TrainSection),
                ("evaluate", EvaluateSection),
            ):
                if isinstance(stage.get(section), dict) and isinstance(merged.get(section), dict):
                    common = schema_faults(schema, located.value.get(section))
                    problems += schema_problems(
                        located, schema, merged[section], (*prefix, section), common
                    )
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in stages]
    for index, name in enumerate(names):
        if isinstance(name, str) and name in names[:index]:
            problems.append(
                Problem(
                    located.where(("stages", index, "name")),
                    f"a stage before it is called {quoted(name)} too",
                )
            )
    for index, stage in enumerate(stages[:-1]):
        if value_at(stage, "data", "test"):
            message = (
                "only the last stage's test part is scored, by the finished model; move it there"
            )
            problems.append(Problem(located.where(("stages", index, "data", "test")), message))
    common_faults = contradictions(located.value)
    for number, (prefix, merged) in enumerate(whole):
        earlier = [stage for _, stage in whole[:number]]
        for path, message in (*contradictions(merged), *later_adapter_fault(earlier, merged)):
            staged = (*prefix, *path)
            inherited = staged not in located.values and (path, message) in common_faults
            problems.append(Problem(located.where(path if inherited else staged), message))
    unique = list(dict.fromkeys(problems))
    if unique:
        raise RecipeError(sorted(unique, key=lambda problem: problem_order(problem.where)))
    return Recipe.model_validate(located.value).read_from(located)


def check_command(recipe: Recipe, command: str) -> None:
    """Raises `RecipeError` where another command trains the objective of the recipe's last stage.

    Earlier stages may have other objectives.
    """
    kind = recipe.last_stage.objective.kind
    place: Path = ("objective",)
    if recipe.stages and "objective" in recipe.stages[-1].model_fields_set:
        place = ("stages", len(recipe.stages) - 1, "objective")
    if COMMANDS[kind] != command:
        message = (
            f"objective.kind: {kind} is trained by `vlm-tune {COMMANDS[kind]}`, "
            f"not by `vlm-tune {command}`"
        )
        raise RecipeError([Problem(recipe.where(place), message)])


def recipe_schema() -> dict[str, Any]:
    """Returns the recipe's JSON Schema, for editors that complete and check YAML."""
    schema = TypeAdapter(Recipe).json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "vlm_tune recipe"
    return schema
