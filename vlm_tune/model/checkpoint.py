"""Self-contained model folders: what is in them, saved and loaded.

config.json            VisionLanguageConfig
connector.safetensors  the connector's weights, without its LoRA adapter
bases.json             fingerprints and locations of the base weights, which are not in the folder
tower.safetensors      the tower's weights, if they are not those of its name
llm/                   the LLM in transformers' layout, if its weights are not those of its name
llm.safetensors        the LLM's individually trained weights, if the rest is unchanged (trained
                       beside 4-bit layers, or rows of new tokens)
adapter/               the LLM's LoRA adapter in PEFT's layout
tower_adapter/         the tower's LoRA adapter in PEFT's layout
connector_adapter/     the connector's
prompt/                the LLM's soft prompt or prefix in PEFT's layout
tasks/                 instead of adapter/, where tasks have adapters of their own: sharing.json,
                       and of each task a model folder as this one, by its name
similarity.safetensors the learned scale of a contrastive loss
tokenizer.json, ...    the tokenizer, chat_template.jinja; a native model's own processor
connector_tokenizer/   the connector's own tokenizer, if it has one
manifest.json          sizes and sha256 of all the other files
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_tune.compat import without_harmless_warnings
from vlm_tune.errors import ModelError
from vlm_tune.model.base_places import (
    AS_SAVED,
    NOTES,
    BaseChoice,
    BaseNotes,
    places_of,
)
from vlm_tune.model.build import CONNECTOR, TOWER, WORDS
from vlm_tune.model.committed_folders import commit_folder, is_whole, write_manifest
from vlm_tune.model.language.virtual_tokens import write_prompt
from vlm_tune.model.lora import (
    PISSA,
    adapter_state,
    clean,
    is_adapter,
    is_pissa,
    parts,
    plain_config,
)
from vlm_tune.model.pretrained.tokenizer import pin_tokenizer
from vlm_tune.model.restoring import (
    ADAPTERS,
    BESIDE,
    PROMPT,
    SCALE,
    SHARING,
    TASKS,
    assemble_saved,
    load_base,
    located,
    read_saved,
    read_sharing,
)
from vlm_tune.model.task_adapters import task_state
from vlm_tune.model.task_sharing import TaskSharing
from vlm_tune.model.vlm import Network, VisionLanguageNetwork
from vlm_tune.model.weights import (
    CPU,
    cast_parameters,
    whole_state,
    write_safetensors,
)
from vlm_tune.paths import is_file, is_folder, shown_path
from vlm_tune.precision import DTYPES
from vlm_tune.quoting import quoted

# --- saving ---------------------------------------------------------------------------------------


def save_model(
    model: VisionLanguageNetwork, target: Path, extra: Callable[[Path], None] | None = None
) -> None:
    """Writes a model folder; `extra` may add files before it is committed."""

    def write(folder: Path) -> None:
        write_model(model, folder)
        if extra:
            extra(folder)

    commit_folder(target, write)


def write_model(model: VisionLanguageNetwork, folder: Path) -> None:
    """Writes the files of a model folder, without the manifest."""
    capture_model(model)(folder)


Tensors = Mapping[str, torch.Tensor]
Adapter = tuple[Any, Tensors]
"""PEFT's config of an adapter and its tensors."""


def capture_model(
    model: VisionLanguageNetwork, copied: Callable[[Tensors], Tensors] = lambda tensors: tensors
) -> Callable[[Path], None]:
    """Captures the model's state, to be written at once or later.

    If weights are sharded, every rank must call this; only rank 0's function may write.

    Args:
        model: the model.
        copied: copies tensors that must not change until they are written; the default copies
            nothing.

    Returns:
        A function that writes the captured state to a folder.
    """
    language: Any = model.llm.model
    connector = copied(_base_state(model.connector))
    tower = copied(_base_state(model.tower)) if "tower" in model.changed else None
    llm = copied(_base_state(language)) if "llm" in model.changed else None
    adapters, of_tasks = _adapters(model, copied)
    prompt = model.llm.prompt
    virtual = copied(whole_state(prompt)).get("values") if prompt is not None else None
    beside = copied(_base_state(language, model.beside)) if model.beside and llm is None else None
    similarity = model.similarity
    scale = None if similarity is None else copied(whole_state(similarity))
    bases = {part: base for part, base in model.bases.items() if part not in model.changed}
    sharing = model.sharing

    def write_notes(folder: Path) -> None:
        notes = BaseNotes(parts=bases, places=places_of(model.config.model, bases, folder))
        (folder / NOTES).write_text(notes.model_dump_json(indent=1))

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(model.config.model_dump_json(indent=2))
        write_notes(folder)
        write_safetensors(connector, folder / CONNECTOR)
        if tower is not None:
            write_safetensors(tower, folder / TOWER)
        if llm is not None:
            language.save_pretrained(folder / "llm", state_dict=llm)
            # With the tokenizer the folder is a complete model for transformers, and for a later
            # recipe.
            model.processor.tokenizer.save_pretrained(folder / "llm")
            pin_tokenizer(folder / "llm")
            model.processor.images.save(folder / "llm")
        if beside is not None:
            write_safetensors(beside, folder / BESIDE)
        for part, (config, tensors) in adapters.items():
            write_adapter(config, tensors, folder / ADAPTERS[part])
        if prompt is not None and virtual is not None:
            write_prompt(prompt.config, virtual, folder / PROMPT)
        if scale is not None:
            write_safetensors(scale, folder / SCALE)
        _write_texts(model, folder)
        if sharing is not None:
            _write_tasks(folder, sharing, of_tasks, write_notes)

    return write


def _write_texts(model: VisionLanguageNetwork, folder: Path) -> None:
    """Writes the tokenizer, the chat template, and the connector's own tokenizer."""
    model.processor.tokenizer.save_pretrained(folder)
    pin_tokenizer(folder)
    model.processor.images.save(folder)
    if model.connector.reader is not None:
        model.connector.reader.tokenizer.save_pretrained(folder / WORDS)
        pin_tokenizer(folder / WORDS)
    # A native model's processor has its chat format already, with images and videos.
    if model.processor.template.jinja and not model.llm.native:
        (folder / "chat_template.jinja").write_text(model.processor.template.jinja)


def _write_tasks(
    folder: Path,
    sharing: TaskSharing,
    adapters: Mapping[str, Adapter],
    write_notes: Callable[[Path], None],
) -> None:
    """Writes a model folder of each task into one that has all other files of them."""
    for task, (config, tensors) in adapters.items():
        of_task = _shared_files(folder, folder / TASKS / task)
        write_notes(of_task)
        write_adapter(config, tensors, of_task / ADAPTERS["llm"])
        write_manifest(of_task)
    (folder / TASKS / SHARING).write_text(json.dumps(asdict(sharing), indent=1))


def _shared_files(folder: Path, target: Path) -> Path:
    """Gives a new folder all files of a model folder but those of tasks and of its notes.

    They are hard links where the file system has them. Returns the new folder.
    """

    def link(source: str, copy: str) -> None:
        try:
            os.link(source, copy)
        except OSError:
            shutil.copyfile(source, copy)

    left_out = shutil.ignore_patterns(TASKS, NOTES)
    shutil.copytree(folder, target, ignore=left_out, copy_function=link)
    return target


def _base_state(module: nn.Module, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """A module's state dict without adapters, restricted to `names` if they are not None."""

    def wanted(name: str) -> bool:
        return not is_adapter(name) and (names is None or clean(name) in names)

    # Merged projections' weights are not contiguous: they are views into one matrix.
    return {clean(name): value.contiguous() for name, value in whole_state(module, wanted).items()}


def _adapters(
    model: VisionLanguageNetwork, copied: Callable[[Tensors], Tensors]
) -> tuple[dict[str, Adapter], dict[str, Adapter]]:
    """The adapters of parts, and those of tasks, which the LLM has in place of its one."""
    configs = {
        part: deepcopy(tuner.peft_config["default"]) for part, tuner in model.adapters.items()
    }
    if model.sharing is None:
        of_tasks: dict[str, Adapter] = {}
    else:
        config = configs.pop("llm")
        of_tasks = {task: (config, copied(task_state(model, task))) for task in model.sharing.tasks}
    of_parts = {
        part: (config, copied(adapter_state(parts(model)[part])))
        for part, config in configs.items()
    }
    return of_parts, of_tasks


def write_adapter(config: Any, tensors: Tensors, folder: Path) -> None:
    """Writes a standard PEFT folder: adapter_config.json and adapter_model.safetensors.

    For PiSSA the subfolder pissa/ has the config with which training continues.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain_config(config).save_pretrained(folder)
    if is_pissa(config):
        config.save_pretrained(folder / PISSA)
    write_safetensors(tensors, folder / "adapter_model.safetensors")


# --- loading --------------------------------------------------------------------------------------


def find_model(path: Path) -> Path:
    """The model folder that a path stands for.

    That is the path itself, a run's finished model, or else the run's newest complete checkpoint.
    Raises `ModelError` if there is none.
    """
    if is_file(path / "config.json"):
        return path
    if not is_folder(path):
        raise ModelError(f"no such folder: {shown_path(path)}")
    if is_file(path / "model" / "config.json"):
        return path / "model"
    checkpoints = sorted(
        path.glob("stages/*/checkpoints/step-*"),
        key=lambda folder: folder.stat().st_mtime,
        reverse=True,
    )
    for folder in checkpoints:
        if is_whole(folder):
            return folder
    raise ModelError(
        f"{shown_path(path)} holds no model: neither config.json, nor model/, nor a complete "
        "checkpoint"
    )


def find_single(path: Path, task: str | None = None) -> Path:
    """The folder of one model that a path stands for, by `find_model`.

    Args:
        path: a model folder, a run, or a checkpoint.
        task: the task whose model it is, where tasks have adapters of their own.

    Raises:
        ModelError: there is no model; tasks have adapters of their own and none is named, or none
            of that name.
    """
    folder = find_model(path)
    folders = task_folders(folder)
    if not folders and task is None:
        return folder
    if not folders:
        raise ModelError(f"{folder} has one adapter for all tasks: leave out the task")
    if task is None:
        raise ModelError(
            f"{folder} has an adapter for each task ({', '.join(folders)}): name one, as "
            f"{next(iter(folders.values()))} or by --task where a command has it"
        )
    if task not in folders:
        raise ModelError(f"{folder} has no task {quoted(task)}; it has {', '.join(folders)}")
    return folders[task]


def task_folders(path: Path) -> dict[str, Path]:
    """The model folder of each task, by name; empty where all tasks have one adapter.

    Raises `ModelError` as `find_model`.
    """
    folder = find_model(path)
    sharing = read_sharing(folder)
    return {task: folder / TASKS / task for task in (sharing.tasks if sharing else ())}


def load_model(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    quantize: bool = True,
    adapters: bool = True,
    base: BaseChoice = AS_SAVED,
    device: torch.device | None = None,
    model_class: type[Network] = VisionLanguageNetwork,  # pyright: ignore[reportArgumentType]
) -> Network:
    """Loads a saved model in eval mode, with all parameters frozen.

    Args:
        path: a model folder, a run, or a checkpoint.
        dtype: the weights' dtype; the precision in the model's config if None.
        quantize: False loads the base of a 4- or 8-bit run in `dtype`.
        adapters: False leaves out adapters, virtual tokens and individually trained weights.
        base: the base weights to load over.
        device: where the model goes; if None, the GPU if there is one.
        model_class: the class of the model that is returned.

    Raises:
        ModelError: the folder is not complete, weights do not fit, or base weights are gone or were
            replaced.
    """
    with without_harmless_warnings():
        model = restore_model(
            find_model(path),
            dtype=dtype,
            quantize=quantize,
            adapters=adapters,
            base=base,
            device=device or default_device(),
            model_class=model_class,
        )
    return ready(model, dtype or DTYPES[model.config.precision])


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ready(model: Network, dtype: torch.dtype) -> Network:
    """Puts a restored model in eval mode, frozen, with all its weights in `dtype`."""
    for module in (model.tower, model.connector):
        cast_parameters(module, dtype)
    for name in model.beside:
        parameter = model.llm.model.get_parameter(name)
        parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False).eval()


def restore_model(
    folder: Path,
    *,
    dtype: torch.dtype | None,
    quantize: bool = True,
    adapters: bool = True,
    bare: bool = False,
    base: BaseChoice = AS_SAVED,
    device: torch.device = CPU,
    model_class: type[Network] = VisionLanguageNetwork,  # pyright: ignore[reportArgumentType]
) -> Network:
    """Loads a saved model to continue training: the LLM in `dtype`, all the rest exactly as saved.

    Args:
        folder: the model folder.
        dtype: the LLM's dtype; the precision in the model's config if None.
        quantize: False loads the base of a 4- or 8-bit run in `dtype`.
        adapters: False leaves out adapters, virtual tokens and individually trained weights.
        bare: leaves the LLM on the meta device and the rest on the CPU, as in `build`.
        base: the base weights to load over.
        device: where the model goes, as in `build`.
        model_class: the class of the model that is returned.

    Raises:
        ModelError: as `load_model`.
    """
    saved = located(read_saved(folder), base, quantize=quantize)
    weights = load_base(saved, dtype=dtype, bare=bare, base=base, device=device, quantize=quantize)
    model = assemble_saved(saved, weights, adapters=adapters, bare=bare, model_class=model_class)
    return model if bare else model.to(device)
