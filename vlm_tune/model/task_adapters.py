"""Adapters of several tasks in one language model, of which one task's compute at a time.

They are PEFT's adapters of a layer by name: a layer that all tasks share has the adapter `default`,
another has one for each task. On disk each task's are a whole PEFT adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from vlm_tune.errors import DataError, ModelError
from vlm_tune.model.layer_index import block_names
from vlm_tune.model.lora import (
    TRAINED,
    adapter_name,
    adapter_state,
    attach_adapter,
    is_adapter,
    load_adapter_state,
)
from vlm_tune.model.task_sharing import TaskSharing
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.quoting import name_list, quoted


@torch.no_grad()
def attach_task_adapters(model: VisionLanguageNetwork, config: Any, sharing: TaskSharing) -> None:
    """Attaches adapters of tasks to the language model, all with the same first values.

    Args:
        model: the model; its outputs stay the same.
        config: PEFT's LoRA config of each task's adapter.
        sharing: the tasks, and the layers that they share.

    Raises:
        ModelError: the tasks would share all of the adapted layers.
    """
    attach_adapter(model, "llm", config)
    module = model.llm.model
    tuner = model.adapters["llm"]
    separate = _separate_layers(module, sharing.shared_layers)
    if not separate:
        raise ModelError(
            f"tune: shared_layers {sharing.shared_layers} covers all layers that the LoRA rule "
            "adapts, and leaves the tasks none of their own"
        )
    separate_config = deepcopy(config)
    separate_config.target_modules = set(separate)
    for task in sharing.tasks:
        tuner.peft_config[task] = deepcopy(separate_config)
        tuner.inject_adapter(module, task)
    for layer in separate.values():
        values = dict(layer.named_parameters())
        for name, value in values.items():
            if is_adapter(name) and adapter_name(name) in sharing.tasks:
                first = values[_of_adapter(name, TRAINED)]
                value.data = first.detach().clone()
        _switch(layer, sharing.tasks[0])
        layer.delete_adapter(TRAINED)
    model.sharing = sharing


def _separate_layers(module: nn.Module, shared_layers: int) -> dict[str, Any]:
    """The LoRA layers of a language model that each task has adapters of its own for, by name.

    Those are the ones above the first `shared_layers` blocks; an embedding is below all.
    """
    shared = tuple(f"{name}." for name in block_names(module)[:shared_layers])
    layers: dict[str, Any] = {
        name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")
    }
    return {
        name: layer
        for name, layer in layers.items()
        if not shared
        or not (name.startswith(shared) or isinstance(layer.get_base_layer(), nn.Embedding))
    }


def _of_adapter(name: str, adapter: str) -> str:
    """The name of the same parameter of another adapter."""
    segments = name.split(".")
    place = next(place for place, part in enumerate(segments) if part.startswith("lora_"))
    segments[place + 1] = adapter
    return ".".join(segments)


def activate(model: VisionLanguageNetwork, task: str) -> None:
    """Makes the model compute with the adapters of one task; what trains stays as it is."""
    for layer in model.llm.model.modules():
        if hasattr(layer, "lora_A"):
            _switch(layer, task if task in layer.r else TRAINED)


def _switch(layer: Any, adapter: str) -> None:
    """Makes a LoRA layer compute with one of its adapters.

    PEFT freezes the others, whose gradients DDP and ZeRO wait for.
    """
    if layer.active_adapters == [adapter]:
        return
    trained = [
        value
        for name, value in layer.named_parameters()
        if is_adapter(name) and value.requires_grad
    ]
    layer.set_adapter([adapter], inference_mode=True)
    for value in trained:
        value.requires_grad_(True)


def each_task(model: VisionLanguageNetwork, tasks: Sequence[str]) -> Iterator[list[int]]:
    """Activates one task's adapters after the other, and yields the places of its rows.

    A model without adapters of tasks yields all places at once.

    Args:
        model: the model.
        tasks: the task of each row.

    Raises:
        DataError: a row is of no task of the model.
    """
    if model.sharing is None:
        yield list(range(len(tasks)))
        return
    present = list(dict.fromkeys(tasks))
    unknown = [task for task in present if task not in model.sharing.tasks]
    if unknown:
        raise DataError(
            f"the rows are of {quoted(unknown[0])}, which is not one of the model's tasks: "
            f"{name_list(model.sharing.tasks)}; give their source such a task_name, or take the "
            "folder of one task's model",
            source=unknown[0],
        )
    for task in present:
        activate(model, task)
        yield [place for place, name in enumerate(tasks) if name == task]


def task_parameters(model: VisionLanguageNetwork) -> list[list[nn.Parameter]]:
    """The tasks' own adapter parameters: each list has those that correspond, one for each task."""
    assert model.sharing is not None
    parameters = dict(model.llm.model.named_parameters())
    first = model.sharing.tasks[0]
    return [
        [parameters[_of_adapter(name, task)] for task in model.sharing.tasks]
        for name in parameters
        if is_adapter(name) and adapter_name(name) == first
    ]


def task_state(model: VisionLanguageNetwork, task: str) -> dict[str, torch.Tensor]:
    """The state dict of one task's whole adapter, shared layers included, under PEFT's keys."""
    return adapter_state(model.llm.model, (TRAINED, task))


def load_task_state(
    model: VisionLanguageNetwork, task: str, tensors: dict[str, torch.Tensor], fault: str
) -> None:
    """Loads a state of `task_state`. Raises `ModelError` as `load_adapter_state`."""
    load_adapter_state(model.llm.model, tensors, fault, (TRAINED, task))
