"""The locations of a saved model's base weights, those that its own folder does not hold.

They are written with the model. When the model or its base weights have been moved, they are
searched for again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from vlm_tune.config.base import Config
from vlm_tune.config.model import AnySection
from vlm_tune.config.towers import AnyTower, PairTower
from vlm_tune.errors import ModelError
from vlm_tune.model.hub import is_path, read_json
from vlm_tune.paths import check_path, exists, shown_path
from vlm_tune.quoting import quoted

NOTES = "bases.json"
Section = TypeVar("Section", bound=AnySection)
"""The class of the parts of a model."""


class Place(Config):
    """The location of a recipe's path when the model was saved.

    `relative` is relative to the model folder.
    """

    absolute: str
    relative: str


class Base(Config):
    """The fingerprint of a part's weights: a digest of each tensor by name, and its config.json."""

    name: str
    revision: str | None = None
    config: dict[str, Any] = Field(default={})
    tensors: dict[str, str]


class BaseNotes(Config):
    """The content of `bases.json`.

    `parts` has the base weights by part (llm, tower), `places` the locations by the recipe's path.
    """

    parts: dict[str, Base] = Field(default={})
    places: dict[str, Place] = Field(default={})


@dataclass(frozen=True)
class BaseChoice:
    """The base weights that a saved model is loaded over.

    `places` are new locations by part (llm, tower, tower.0, tower.1). With `accept_other`, weights
    that differ from the recorded ones are accepted. `resumed` is true for a resumed run, whose
    recipe names the locations.
    """

    places: Mapping[str, str]
    accept_other: bool = False
    resumed: bool = False

    def remedy(self, part: str) -> str:
        """The option that names another location of a part's weights, for messages."""
        if self.resumed:
            key = "model.llm.name" if part == "llm" else "model.tower"
            return f"with --resume --accept-changes and --set {key}=..."
        return f"with --base {'' if part == 'llm' else f'{part}='}PATH (base=... in Python)"


AS_SAVED = BaseChoice({})
BaseArgument = str | Path | Mapping[str, str | Path] | None


def base_choice(base: BaseArgument, accept_other: bool = False) -> BaseChoice:
    """The choice of base weights that a user's argument describes.

    Args:
        base: the LLM's new location, or new locations by part.
        accept_other: whether weights that differ from the recorded ones are accepted.

    Raises:
        ModelError: a part is unknown, or a location does not exist.
    """
    new_places = {} if base is None else dict(base) if isinstance(base, Mapping) else {"llm": base}
    unknown = [part for part in new_places if part not in ("llm", "tower", "tower.0", "tower.1")]
    if unknown:
        raise ModelError(
            f"base: no part {quoted(unknown[0])} has weights of its own; "
            "there are llm, tower, and of a pair tower.0, tower.1"
        )
    for part, place in new_places.items():
        check_path("base" if part == "llm" else f"base {part}", place)
        if is_path(str(place)) and not exists(place):
            raise ModelError(f"base: no such file or folder: {shown_path(place)} (for the {part})")
    return BaseChoice({part: str(place) for part, place in new_places.items()}, accept_other)


def _tower_fields(tower: AnyTower) -> Iterator[tuple[str, str]]:
    """Yields the keys of a tower that may name a location on disk, with their values.

    The last one is the one that its weights come from.
    """
    for key in ("name", "pretrained", "weights"):
        value = getattr(tower, key, None)
        if isinstance(value, str):
            yield key, value


def tower_paths(tower: AnyTower) -> list[str]:
    """The names and paths in a tower's section, both towers' for a pair."""
    parts = tower.towers if isinstance(tower, PairTower) else [tower]
    return [value for part in parts for _, value in _tower_fields(part)]


def _on_disk(name: str) -> str:
    """The path in a name, without open_clip's prefix `local-dir:`."""
    return name.removeprefix("local-dir:")


def places_of(section: AnySection, parts: Mapping[str, Base], folder: Path) -> dict[str, Place]:
    """The locations of a section's paths, for parts whose weights are not in the model folder.

    Paths that do not exist are left out.

    Args:
        section: the recipe's section `model`.
        parts: the parts (llm, tower) whose weights are not in the model folder.
        folder: the model folder.
    """
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
    """The record of base weights in a model folder, empty if it has none.

    Raises `ModelError` for a file that was changed.
    """
    if not (folder / NOTES).is_file():
        return BaseNotes()
    try:
        return BaseNotes.model_validate(read_json(folder / NOTES))
    except ValidationError:
        raise ModelError(f"{folder}: {NOTES} is not what was written") from None


def moved(folder: Path, section: Section, choice: BaseChoice) -> Section:
    """A saved model's section with the current locations of its base weights.

    A path is tried at its old absolute location, then relative to the model folder as before, then
    relative to the working directory.

    Raises:
        ModelError: it exists at none of them; the message has the old location and what to do.
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
        towers = [
            _with_weights(part, choice.places[key])
            if (key := f"tower.{number}") in choice.places
            else part
            for number, part in enumerate(tower.towers)
        ]
        tower = tower.model_copy(update={"towers": [_replaced(part, replaced) for part in towers]})
    else:
        tower = _replaced(tower, replaced)
    return section.model_copy(update={"llm": _replaced(llm, replaced), "tower": tower})


def _with_weights(tower: Any, place: str) -> Any:
    """The tower's section with another location of its weights."""
    fields = dict(_tower_fields(tower))
    if not fields:
        raise ModelError("base: the tower has no name, its weights are in the model's folder")
    key = list(fields)[-1]
    return tower.model_copy(
        update={key: f"local-dir:{place}" if fields[key].startswith("local-dir:") else place}
    )


def _replaced(part: Any, places: Mapping[str, str]) -> Any:
    """The section of a part with its paths replaced by the new ones in `places`."""
    changes = {}
    for key in ("name", "pretrained", "weights"):
        value = getattr(part, key, None)
        if isinstance(value, str) and _on_disk(value) in places:
            changes[key] = value.replace(_on_disk(value), places[_on_disk(value)])
    return part.model_copy(update=changes) if changes else part


def _found(folder: Path, section: AnySection, path: str, place: Place, choice: BaseChoice) -> str:
    """The current path for a recorded one; raises `ModelError` if it exists nowhere."""
    is_llm = path == section.llm.name
    replaced_by_user = choice.places.keys() & (
        {"llm"} if is_llm else {"tower", "tower.0", "tower.1"}
    )
    if replaced_by_user:
        return path  # the caller puts the user's location in its place
    candidates = [Path(place.absolute), folder / place.relative, Path(path)]
    existing = next((candidate for candidate in candidates if candidate.exists()), None)
    if existing is None:
        raise ModelError(
            f"{folder}: it needs the weights of {quoted(path)}, which are no longer in "
            f"{place.absolute}. Restore them, or name their new location "
            f"{choice.remedy('llm' if is_llm else 'tower')}"
        )
    if Path(path).exists() and existing.samefile(path):
        return path
    return os.path.normpath(existing)
