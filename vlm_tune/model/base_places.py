"""The places of the weights that a saved model relies on and does not hold: noted, and found again when they moved."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from vlm_tune.config.base import Config
from vlm_tune.config.model import AnyTower, ModelSection, PairTower
from vlm_tune.errors import ModelError
from vlm_tune.model.hub import is_path, read_json
from vlm_tune.paths import check_path, exists, shown_path
from vlm_tune.quoting import quoted

NOTES = "bases.json"


class Place(Config):
    """Where a path in a recipe led when the model was saved; `relative` starts at the model folder."""

    absolute: str
    relative: str


class Base(Config):
    """One part's weights: a digest of each tensor by name, and what its config.json says."""

    name: str
    revision: str | None = None
    config: dict[str, Any] = Field(default={})
    tensors: dict[str, str]


class BaseNotes(Config):
    """What `bases.json` holds: by part (llm, tower) its weights, and by the recipe's path where it led."""

    parts: dict[str, Base] = Field(default={})
    places: dict[str, Place] = Field(default={})


@dataclass(frozen=True)
class BaseChoice:
    """Which weights a saved model is loaded over.

    `places` are new places by part (llm, tower, tower.0, tower.1); with `accept_other` weights that differ are taken.
    `resumed` says that a run goes on, whose recipe names the places.
    """

    places: Mapping[str, str]
    accept_other: bool = False
    resumed: bool = False

    def remedy(self, part: str) -> str:
        """How a user names another place of a part's weights."""
        if self.resumed:
            key = "model.llm.name" if part == "llm" else "model.tower"
            return f"with --resume --accept-changes and --set {key}=..."
        return f"with --base {'' if part == 'llm' else f'{part}='}PATH (base=... in Python)"


AS_SAVED = BaseChoice({})
BaseArgument = str | Path | Mapping[str, str | Path] | None


def base_choice(base: BaseArgument, accept_other: bool = False) -> BaseChoice:
    """A choice from what a user gives: the LLM's new place, or new places by part. Raises `ModelError` for unknown parts."""
    given = {} if base is None else dict(base) if isinstance(base, Mapping) else {"llm": base}
    unknown = [part for part in given if part not in ("llm", "tower", "tower.0", "tower.1")]
    if unknown:
        raise ModelError(
            f"base: no part {quoted(unknown[0])} has weights of its own; there are llm, tower, and of a pair tower.0, tower.1"
        )
    for part, place in given.items():
        check_path("base" if part == "llm" else f"base {part}", place)
        if is_path(str(place)) and not exists(place):
            raise ModelError(f"base: no such file or folder: {shown_path(place)} (for the {part})")
    return BaseChoice({part: str(place) for part, place in given.items()}, accept_other)


def _tower_fields(tower: AnyTower) -> Iterator[tuple[str, str]]:
    """The keys of a tower that may name a place on disk, the one its weights come from last, and their values."""
    for key in ("name", "pretrained", "weights"):
        value = getattr(tower, key, None)
        if isinstance(value, str):
            yield key, value


def tower_paths(tower: AnyTower) -> list[str]:
    parts = tower.towers if isinstance(tower, PairTower) else [tower]
    return [value for part in parts for _, value in _tower_fields(part)]


def _on_disk(name: str) -> str:
    """The path in a name; open_clip's local-dir: stands before one."""
    return name.removeprefix("local-dir:")


def places_of(section: ModelSection, parts: Mapping[str, Base], folder: Path) -> dict[str, Place]:
    """Where the paths of a section lead, of those parts that are not in the model folder themselves."""
    names = ([str(section.llm.name)] if "llm" in parts else []) + (
        tower_paths(section.tower) if "tower" in parts else []
    )
    paths = [_on_disk(name) for name in names if Path(_on_disk(name)).exists()]
    return {
        path: Place(
            absolute=str(Path(path).absolute()),
            relative=os.path.relpath(Path(path).absolute(), folder.absolute()),
        )
        for path in paths
    }


def read_notes(folder: Path) -> BaseNotes:
    """What a model folder notes of its bases. Raises `ModelError` for a file that was changed."""
    if not (folder / NOTES).is_file():
        return BaseNotes()
    try:
        return BaseNotes.model_validate(read_json(folder / NOTES))
    except ValidationError:
        raise ModelError(f"{folder}: {NOTES} is not what was written") from None


def moved(folder: Path, section: ModelSection, choice: BaseChoice) -> ModelSection:
    """A saved model's section with the places where its bases are now.

    A path is looked for where it was, then as far from the model folder as it was, then from the working folder.

    Raises:
        ModelError: it is in none of them, with the old place and what to do.
    """
    replaced = {}
    for path, place in read_notes(folder).places.items():
        replaced[path] = _found(folder, section, path, place, choice)
    llm = section.llm
    tower = section.tower
    if "llm" in choice.places and llm.name is not None:
        replaced[llm.name] = choice.places["llm"]
    if "tower" in choice.places:
        if isinstance(tower, PairTower):
            raise ModelError("base: the tower is a pair; name tower.0=PATH or tower.1=PATH")
        tower = _with_weights(tower, choice.places["tower"])
    if isinstance(tower, PairTower):
        towers = [_with_weights(part, choice.places[key]) if (key := f"tower.{number}") in choice.places else part
                  for number, part in enumerate(tower.towers)]  # fmt: skip
        tower = tower.model_copy(update={"towers": [_replaced(part, replaced) for part in towers]})
    else:
        tower = _replaced(tower, replaced)
    return section.model_copy(update={"llm": _replaced(llm, replaced), "tower": tower})


def _with_weights(tower: Any, place: str) -> Any:
    """A tower whose weights come from another place."""
    fields = dict(_tower_fields(tower))
    if not fields:
        raise ModelError("base: the tower has no name, its weights are in the model's folder")
    key = list(fields)[-1]
    return tower.model_copy(
        update={key: f"local-dir:{place}" if fields[key].startswith("local-dir:") else place}
    )


def _replaced(part: Any, places: Mapping[str, str]) -> Any:
    changes = {}
    for key in ("name", "pretrained", "weights"):
        value = getattr(part, key, None)
        if isinstance(value, str) and _on_disk(value) in places:
            changes[key] = value.replace(_on_disk(value), places[_on_disk(value)])
    return part.model_copy(update=changes) if changes else part


def _found(folder: Path, section: ModelSection, path: str, place: Place, choice: BaseChoice) -> str:
    """Where a noted path leads now."""
    is_llm = path == section.llm.name
    given = choice.places.keys() & ({"llm"} if is_llm else {"tower", "tower.0", "tower.1"})
    if given:
        return path  # what was given is put in its place by the caller
    candidates = [Path(place.absolute), folder / place.relative, Path(path)]
    existing = next((candidate for candidate in candidates if candidate.exists()), None)
    if existing is None:
        raise ModelError(
            f"{folder}: it needs the weights of {quoted(path)}, and they are gone from {place.absolute}. Put them back, or name their new "
            f"place {choice.remedy('llm' if is_llm else 'tower')}"
        )
    if Path(path).exists() and existing.samefile(path):
        return path
    return os.path.normpath(existing)
