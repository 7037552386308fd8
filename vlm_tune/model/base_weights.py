"""Fingerprints of a saved model's base weights, those that its own folder does not hold.

A model folder whose LLM or tower still has the weights of its name in the recipe has a
`bases.json`: the location of each, and a digest of every tensor. Another checkpoint of the same
shape in its place is then rejected, with the tensors that differ.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_tune.config.model import Llm, NativeLlm
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.towers import AnyTower
from vlm_tune.errors import ModelError
from vlm_tune.model.base_places import Base, BaseChoice, tower_paths
from vlm_tune.model.families.registry import find_vlm
from vlm_tune.model.hub import read_json
from vlm_tune.model.pretrained.vlm_checkpoints import model_section
from vlm_tune.model.weights import check_folder, check_safetensors
from vlm_tune.paths import is_folder
from vlm_tune.quoting import quoted
from vlm_tune.resources import cache_folder

DIGEST = 32
"""Hexadecimal digits to which a tensor's sha256 is truncated."""
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
"""Most names that a message lists."""


def recipe_choice(recipe: Recipe) -> BaseChoice:
    """The base weights of a resumed run: the LLM at its recipe's path, which may have changed."""
    llm = model_section(recipe).llm
    return BaseChoice({} if llm.name is None else {"llm": llm.name}, resumed=True)


def _file_digests(path: Path) -> dict[str, str]:
    """A safetensors file's digests by tensor name, cached on disk until the file changes."""
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

        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
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


def file_digest(path: Path) -> str:
    """The digest of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST]


def _snapshot(name: str) -> Path | None:
    """The local cache folder with a hub model's files; None if the model is not cached."""
    from huggingface_hub import try_to_load_from_cache

    config_path = try_to_load_from_cache(name, "config.json")
    return Path(config_path).parent if isinstance(config_path, str) else None


def llm_base(llm: Llm) -> Base:
    """The fingerprint of a section's language model, whose files must be on this machine.

    Raises `ModelError` for missing or truncated files.
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
            tensors={llm.gguf_file: file_digest(folder / llm.gguf_file)},
        )
    vlm = None if isinstance(llm, NativeLlm) else find_vlm(name)
    whole = folder_base(folder)
    tensors = {
        key: value for key, value in whole.tensors.items() if vlm is None or not vlm.foreign(key)
    }
    return whole.model_copy(update={"name": name, "revision": revision, "tensors": tensors})


def folder_base(folder: Path) -> Base:
    """The fingerprint of a language model's folder. Raises `ModelError` as `llm_base`."""
    tensors: dict[str, str] = {}
    for file in check_folder(folder):
        tensors |= _file_digests(file)
    config = {
        key: value
        for key, value in read_json(folder / "config.json").items()
        if key not in UNSHAPED
    }
    return Base(name=str(folder), config=config, tensors=tensors)


def tower_base(section: AnyTower, tower: nn.Module) -> Base:
    """The fingerprint of a tower as it was loaded, before training."""

    def digest(value: torch.Tensor) -> str:
        content = hashlib.sha256(str(list(value.shape)).encode())
        content.update(
            value.detach().float().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        )
        return content.hexdigest()[:DIGEST]

    state = tower.state_dict()
    with ThreadPoolExecutor() as pool:
        tensors = dict(zip(state, pool.map(digest, state.values()), strict=True))
    return Base(name=" and ".join(tower_paths(section)) or section.kind, tensors=tensors)


def differences(before: Base, now: Base) -> list[str]:
    """The differences between two fingerprints, in words; empty if they are equal."""
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
    """Raises `ModelError` with the differences if the weights are not those of the saved model.

    Args:
        folder: the model folder, for the message.
        part: llm or tower.
        before: the fingerprint of the weights that the model was trained over.
        now: the fingerprint of the weights that it would be loaded over.
        choice: the user's choice; with `accept_other` nothing is compared.
    """
    changed = [] if choice.accept_other else differences(before, now)
    if changed:
        other = "" if choice.resumed else ", or accept these with --accept-other-base"
        raise ModelError(
            f"{folder}: its {part} was {quoted(before.name)}, and other weights are in "
            f"{quoted(now.name)}: {'; '.join(changed)}. Name the original ones "
            f"{choice.remedy(part)}{other}"
        )
