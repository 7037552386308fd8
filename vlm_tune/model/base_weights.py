"""The weights that a saved model relies on and does not hold: noted with a fingerprint, found again, and compared.

A model folder whose LLM or tower is that of a name keeps `bases.json`: where each was, and a digest of every tensor.
Another checkpoint of the same shape in its place is then refused with the tensors that differ.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import nn

from vlm_tune.config.base import Config
from vlm_tune.config.model import AnyTower, Llm, ModelSection, PairTower
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import ModelError
from vlm_tune.model.pretrained.hub import is_path, read_json
from vlm_tune.model.pretrained.vlm_checkpoints import find_vlm, model_section
from vlm_tune.model.weights import check_folder, check_safetensors
from vlm_tune.paths import check_path, exists, is_folder, shown_path
from vlm_tune.quoting import quoted
from vlm_tune.resources import cache_folder

NOTES = "bases.json"
DIGEST = 32
"""Hexadecimal digits of a tensor's sha256 that are kept."""
UNSHAPED = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Keys of a config.json that the weights' meaning does not depend on."""
SHOWN = 4


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


def recipe_choice(recipe: Recipe) -> BaseChoice:
    """What a resumed run is loaded over: the LLM where its recipe says that it is, which may be a new place."""
    llm = model_section(recipe).llm
    return BaseChoice({} if llm.name is None else {"llm": llm.name}, resumed=True)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def _file_digests(path: Path) -> dict[str, str]:
    """A digest of each tensor of a safetensors file; remembered in the cache until the file changes."""
    real = path.resolve()
    state = real.stat()
    key = hashlib.sha256(
        f"{real} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}".encode()
    ).hexdigest()
    remembered = cache_folder("fingerprints") / f"{key}.json"
    with suppress(OSError, ValueError):
        known = json.loads(remembered.read_text())
        if isinstance(known, dict):
            return known
    header = check_safetensors(real)
    with real.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        start = 8 + int.from_bytes(mapped[:8], "little")
        view = memoryview(mapped)

        def digest(entry: dict[str, Any]) -> str:
            first, last = entry["data_offsets"]
            content = hashlib.sha256(f"{entry['dtype']} {entry['shape']}".encode())
            with view[start + first : start + last] as part:
                content.update(part)
            return content.hexdigest()[:DIGEST]

        with ThreadPoolExecutor() as pool:  # Python lets go of its lock while it hashes
            names = [name for name in header if name != "__metadata__"]
            digests = dict(
                zip(names, pool.map(digest, [header[name] for name in names]), strict=True)
            )
        view.release()
    with suppress(OSError):  # a cache that can't be written costs time only
        remembered.parent.mkdir(parents=True, exist_ok=True)
        temporary = remembered.with_suffix(f".tmp-{os.getpid()}")
        temporary.write_text(json.dumps(digests))
        temporary.replace(remembered)
    return digests


def _whole_file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST]


def _snapshot(name: str) -> Path | None:
    """The folder that holds a hub model's files on this machine."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def llm_base(llm: Llm) -> Base:
    """The fingerprint of the language model that a section names, whose files must be here.

    Raises `ModelError` for files that are missing or cut.
    """
    name = str(llm.name)
    folder = Path(name) if is_folder(name) else _snapshot(name)
    if folder is None:
        raise ModelError(f"the weights of {quoted(name)} are not on this machine")
    revision = folder.name if folder.parent.name == "snapshots" else None
    if llm.gguf_file:
        return Base(
            name=name,
            revision=revision,
            tensors={llm.gguf_file: _whole_file_digest(folder / llm.gguf_file)},
        )
    vlm = find_vlm(name)
    tensors: dict[str, str] = {}
    for file in check_folder(folder):
        digests = _file_digests(file)
        tensors |= {
            key: value for key, value in digests.items() if vlm is None or not vlm.foreign(key)
        }
    config = {
        key: value
        for key, value in read_json(folder / "config.json").items()
        if key not in UNSHAPED
    }
    return Base(name=name, revision=revision, config=config, tensors=tensors)


def tower_base(section: AnyTower, tower: nn.Module) -> Base:
    """The fingerprint of a tower as it was loaded, before anything is trained."""

    def digest(value: torch.Tensor) -> str:
        content = hashlib.sha256(str(list(value.shape)).encode())
        content.update(
            value.detach().float().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        )
        return content.hexdigest()[:DIGEST]

    state = tower.state_dict()
    with ThreadPoolExecutor() as pool:
        tensors = dict(zip(state, pool.map(digest, state.values()), strict=True))
    return Base(name=" and ".join(_tower_paths(section)) or section.kind, tensors=tensors)


def differences(before: Base, now: Base) -> list[str]:
    """What of the weights and their config differs, in words; empty where all is the same."""
    lines: list[str] = []
    common = before.tensors.keys() & now.tensors.keys()
    for word, names in (
        ("differ", {name for name in common if before.tensors[name] != now.tensors[name]}),
        ("are missing", before.tensors.keys() - common),
        ("are new", now.tensors.keys() - common),
    ):
        if names:
            shown = ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            lines.append(f"{len(names)} of {len(before.tensors)} tensors {word} ({shown})")
    keys = sorted(before.config.keys() | now.config.keys())
    changed = [key for key in keys if before.config.get(key) != now.config.get(key)]
    lines += [
        f"config.json has {key}: {quoted(before.config.get(key))} -> {quoted(now.config.get(key))}"
        for key in changed[:SHOWN]
    ]
    if before.revision and now.revision and before.revision != now.revision and lines:
        lines.append(f"revision {before.revision} -> {now.revision}")
    return lines


def check_same(folder: Path, part: str, before: Base, now: Base, choice: BaseChoice) -> None:
    """Raises `ModelError` with what differs if weights are not those that a folder's model was trained over."""
    changed = [] if choice.accept_other else differences(before, now)
    if changed:
        other = "" if choice.resumed else ", or take these as they are with --accept-other-base"
        raise ModelError(
            f"{folder}: its {part} was {quoted(before.name)}, and other weights are in {quoted(now.name)}: {'; '.join(changed)}. "
            f"Name the right ones {choice.remedy(part)}{other}"
        )


# --- places ----------------------------------------------------------------------------------------------------------


def _tower_fields(tower: AnyTower) -> Iterator[tuple[str, str]]:
    """The keys of a tower that may name a place on disk, the one its weights come from last, and their values."""
    for key in ("name", "pretrained", "weights"):
        value = getattr(tower, key, None)
        if isinstance(value, str):
            yield key, value


def _tower_paths(tower: AnyTower) -> list[str]:
    parts = tower.towers if isinstance(tower, PairTower) else [tower]
    return [value for part in parts for _, value in _tower_fields(part)]


def _on_disk(name: str) -> str:
    """The path in a name; open_clip's local-dir: stands before one."""
    return name.removeprefix("local-dir:")


def places_of(section: ModelSection, parts: Mapping[str, Base], folder: Path) -> dict[str, Place]:
    """Where the paths of a section lead, of those parts that are not in the model folder themselves."""
    names = ([str(section.llm.name)] if "llm" in parts else []) + (
        _tower_paths(section.tower) if "tower" in parts else []
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
