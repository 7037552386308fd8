"""Reads model folders: what they record, their base weights, and what was trained over these.

`vlm_tune.model.checkpoint` describes the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from vlm_tune.errors import ModelError
from vlm_tune.kernels.cpu.native import kernel_status
from vlm_tune.model.base_places import (
    AS_SAVED,
    Base,
    BaseChoice,
    BaseNotes,
    moved,
    read_notes,
)
from vlm_tune.model.base_weights import check_same, llm_base, tower_base
from vlm_tune.model.build import CONNECTOR, TOWER, WORDS, assemble, restore_tower
from vlm_tune.model.committed_folders import verify_folder
from vlm_tune.model.hub import CONNECTOR_ADAPTER, read_json
from vlm_tune.model.language.virtual_tokens import read_prompt
from vlm_tune.model.lora import PISSA, attach_adapter, load_adapter_state, parts
from vlm_tune.model.media_tower import MediaTower
from vlm_tune.model.pretrained.connector_weights import load_words
from vlm_tune.model.pretrained.language_model import bare_llm, load_llm
from vlm_tune.model.pretrained.tokenizer import load_tokenizer
from vlm_tune.model.similarity import SIMILARITY, read_similarity
from vlm_tune.model.task_adapters import attach_task_adapters, load_task_state
from vlm_tune.model.task_sharing import TaskSharing
from vlm_tune.model.vlm import Network, VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.model.weights import CPU, load_into, read_safetensors
from vlm_tune.precision import DTYPES
from vlm_tune.quoting import reason_of

ADAPTERS = {"llm": "adapter", "tower": "tower_adapter", "connector": CONNECTOR_ADAPTER}
"""The folders of adapters in a model folder, by part."""
TASKS = "tasks"
SHARING = "sharing.json"
"""The folder of a model's tasks, and the file in it that says how they share the adapter."""
PROMPT = "prompt"
BESIDE = "llm.safetensors"
SCALE = f"{SIMILARITY}.safetensors"


def read_config(folder: Path, base: BaseChoice = AS_SAVED) -> VisionLanguageConfig:
    """The config of a model folder, with the current locations of its base weights.

    Raises `ModelError` if it is not a vlm_tune model folder, or base weights are gone.
    """
    config = recorded_config(folder)
    return config.model_copy(update={"model": moved(folder, config.model, base)})


def recorded_config(folder: Path) -> VisionLanguageConfig:
    """The config of a model folder as it was written.

    Raises `ModelError` if it is not a vlm_tune model folder.
    """
    try:
        return VisionLanguageConfig.model_validate(read_json(folder / "config.json"))
    except ValidationError as error:
        raise ModelError(
            f"{folder}: config.json is not a vlm_tune model's ({reason_of(error)})"
        ) from None


@dataclass(frozen=True)
class SavedModel:
    """A model folder: the record of its model, without weights.

    Attributes:
        folder: The folder, whose files are those of its manifest.
        config: The model's config.
        notes: The record of its base weights.
        inside: The parts (tower, llm) whose own weights are in the folder.
    """

    folder: Path
    config: VisionLanguageConfig
    notes: BaseNotes
    inside: set[str]


@dataclass(frozen=True)
class BaseWeights:
    """A saved model's tower and language model of transformers, as loaded, without its adapters.

    Attributes:
        tower: The vision tower.
        language: The transformers model.
        bases: Fingerprints of the weights that are not from the model folder, by part.
    """

    tower: MediaTower
    language: Any
    bases: Mapping[str, Base]


def read_saved(folder: Path) -> SavedModel:
    """Reads and checks a model folder, without its weights; its config is as it was written.

    Raises `ModelError` if the folder is not complete, or is not a vlm_tune model's.
    """
    verify_folder(folder)
    inside = ({"tower"} if (folder / TOWER).is_file() else set[str]()) | (
        {"llm"} if (folder / "llm").is_dir() else set()
    )
    return SavedModel(folder, recorded_config(folder), read_notes(folder), inside)


def located(saved: SavedModel, base: BaseChoice, *, quantize: bool = True) -> SavedModel:
    """A saved model with the current locations of its base weights in its config.

    Without `quantize` its LLM is not quantised. Raises `ModelError` if base weights are gone.
    """
    section = moved(saved.folder, saved.config.model, base)
    if not quantize:
        llm = section.llm.model_copy(update={"quantize": None})
        section = section.model_copy(update={"llm": llm})
    return replace(saved, config=saved.config.model_copy(update={"model": section}))


def load_base(
    saved: SavedModel,
    *,
    dtype: torch.dtype | None = None,
    bare: bool = False,
    base: BaseChoice = AS_SAVED,
    device: torch.device = CPU,
    quantize: bool = True,
) -> BaseWeights:
    """Loads the weights that a saved model's adapters belong to; arguments as `restore_model`."""
    config = saved.config
    local = Path(str(config.llm.name)).is_dir()
    bases: dict[str, Base] = {}
    if local:  # before the weights are loaded, which takes longer
        bases |= _check_llm(saved, base)
    tower, tower_bases = checked_tower(saved, base)
    precision = dtype or DTYPES[config.precision]
    llm_folder = saved.folder / "llm" if "llm" in saved.inside else None
    if bare:
        language = bare_llm(config.llm, precision, folder=llm_folder)
    else:
        language = load_llm(
            config.llm, dtype=precision, device=device, folder=llm_folder, quantize=quantize
        )
        if not local:  # the hub's files are downloaded only now
            bases |= _check_llm(saved, base)
    return BaseWeights(tower, language, bases | tower_bases)


def assemble_saved(
    saved: SavedModel,
    weights: BaseWeights,
    *,
    adapters: bool = True,
    bare: bool = False,
    model_class: type[Network] = VisionLanguageNetwork,  # pyright: ignore[reportArgumentType]
) -> Network:
    """Assembles a saved model over base weights, which it changes; arguments as `restore_model`."""
    kernel_status()
    folder = saved.folder
    model = assemble(
        saved.config,
        weights.tower,
        load_tokenizer(saved.config.llm, folder),
        weights.language,
        load_words(saved.config.model.connector, folder / WORDS),
        changed=saved.inside,
        folder=folder,
        model_class=model_class,
    )
    model.changed = set(saved.inside)
    model.bases = saved.notes.parts
    load_into(model.connector, read_safetensors(folder / CONNECTOR), folder / CONNECTOR)
    if (folder / SCALE).is_file():
        model.similarity = read_similarity(folder / SCALE)
    if adapters:
        _read_tuned(model, folder, bare=bare)
    return model


def _check_llm(saved: SavedModel, base: BaseChoice) -> dict[str, Base]:
    """The fingerprint of the LLM's base weights, under "llm"; empty if the folder records none.

    Raises `ModelError` if they are not those that the model was saved with.
    """
    if "llm" not in saved.notes.parts:
        return {}
    now = llm_base(saved.config.llm)
    check_same(saved.folder, "llm", saved.notes.parts["llm"], now, base)
    return {"llm": now}


def checked_tower(saved: SavedModel, base: BaseChoice) -> tuple[MediaTower, dict[str, Base]]:
    """The tower, with the folder's weights or its name's, and its fingerprint as `_check_llm`."""
    config = saved.config
    weights = saved.folder / TOWER
    tower = restore_tower(
        config.model.tower, config.tower_rebuild, weights if weights.is_file() else None
    )
    if "tower" not in saved.notes.parts:
        return tower, {}
    now = tower_base(config.model.tower, tower)
    check_same(saved.folder, "tower", saved.notes.parts["tower"], now, base)
    return tower, {"tower": now}


def _read_tuned(model: VisionLanguageNetwork, folder: Path, *, bare: bool) -> None:
    """Loads adapters, virtual tokens and individually trained weights, as far as there are any.

    A `bare` LLM gets no individually trained weights.
    """
    if (folder / BESIDE).is_file() and not bare:
        _read_beside(model, folder / BESIDE)
    for part, name in ADAPTERS.items():
        if (folder / name).is_dir():
            read_adapter(model, part, folder / name)
    sharing = read_sharing(folder)
    if sharing is not None:
        _read_tasks(model, folder / TASKS, sharing)
    if (folder / PROMPT).is_dir():
        model.llm.prompt = read_prompt(folder / PROMPT)


def _read_beside(model: VisionLanguageNetwork, path: Path) -> None:
    """Loads the LLM's individually trained weights over those of its base, exactly as saved."""
    tensors = read_safetensors(path)
    parameters = dict(model.llm.model.named_parameters(remove_duplicate=False))
    for name, value in tensors.items():
        if name not in parameters or parameters[name].shape != value.shape:
            expected = (
                list(parameters[name].shape) if name in parameters else "nothing of that name"
            )
            raise ModelError(
                f"{path} does not fit the model: {name} is {list(value.shape)}, "
                f"and the LLM has {expected}"
            )
        parameters[name].data = value
    model.beside = set(tensors)


def read_sharing(folder: Path) -> TaskSharing | None:
    """How the tasks of a model folder share the LLM's adapter; None where all have the same."""
    path = folder / TASKS / SHARING
    if not path.is_file():
        return None
    written = read_json(path)
    return TaskSharing(tuple(written["tasks"]), written["shared_layers"])


def _read_tasks(model: VisionLanguageNetwork, folder: Path, sharing: TaskSharing) -> None:
    """Loads the adapters of all tasks, which are in the model folders of a folder."""
    places = {task: folder / task / ADAPTERS["llm"] for task in sharing.tasks}
    attach_task_adapters(model, _adapter_config(places[sharing.tasks[0]]), sharing)
    for task, place in places.items():
        tensors = read_safetensors(place / "adapter_model.safetensors")
        load_task_state(model, task, tensors, f"{place}: the adapter does not fit the llm")


def _adapter_config(folder: Path) -> Any:
    """PEFT's LoRA config in a folder. Raises `ModelError` if it has none."""
    from peft import LoraConfig

    try:
        return LoraConfig.from_pretrained(
            str(folder / PISSA if (folder / PISSA).is_dir() else folder)
        )
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder}: no LoRA adapter ({reason_of(error)})") from None


def read_adapter(model: VisionLanguageNetwork, part: str, folder: Path) -> None:
    """Loads a PEFT folder's adapter into a part.

    Raises `ModelError` if one of its tensors matches no LoRA layer, or a LoRA layer gets no tensor.
    """
    config = _adapter_config(folder)
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    try:
        attach_adapter(model, part, config)
    except ValueError as error:
        raise ModelError(
            f"{folder}: the adapter fits no layer of the {part}: {reason_of(error)}"
        ) from None
    fault = f"{folder}: the adapter does not fit the {part}"
    load_adapter_state(parts(model)[part], tensors, fault)
