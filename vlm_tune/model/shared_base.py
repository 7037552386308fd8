"""Models of several runs over one base: its weights are in memory once, the rest is each run's own.

A further model has modules of its own, whose frozen parameters are views of the same memory. So a
forward pass reads nothing that another model writes, and threads may ask several models at once.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from vlm_tune.compat import without_harmless_warnings
from vlm_tune.config.towers import AnyTower, PairTower
from vlm_tune.errors import ModelError
from vlm_tune.model.base_places import AS_SAVED, BaseChoice
from vlm_tune.model.base_weights import differences, file_digest, folder_base
from vlm_tune.model.build import TOWER
from vlm_tune.model.checkpoint import default_device, find_single, ready
from vlm_tune.model.restoring import (
    BaseWeights,
    SavedModel,
    assemble_saved,
    checked_tower,
    load_base,
    located,
    read_saved,
)
from vlm_tune.model.vlm import Network
from vlm_tune.model.weights import cast_parameters
from vlm_tune.precision import DTYPES
from vlm_tune.quoting import quoted

log = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)

CUTS = ("resize", "tiles", "split", "windows")
"""Settings of towers that say how images and clips are cut."""
OUTSIDE = {"name", "pretrained", "weights", *CUTS}
"""Settings of a tower that its module does not depend on: where its weights lie, and `CUTS`."""
BY_ITSELF = "load it by itself, with VisionLanguageModel.from_pretrained"


@dataclass(frozen=True)
class SharedBase:
    """The base weights of a loaded model, for further models over them.

    Attributes:
        saved: The model folder that they were loaded for.
        weights: Modules as they were loaded, whose parameters are views of the model's own.
        dtype: The dtype of the weights.
        device: Where they are.
    """

    saved: SavedModel
    weights: BaseWeights
    dtype: torch.dtype
    device: torch.device


def load_shared(
    path: Path,
    *,
    dtype: torch.dtype | None,
    base: BaseChoice,
    device: torch.device | None,
    model_class: type[Network],
) -> tuple[Network, SharedBase]:
    """Loads a saved model as `checkpoint.load_model`, and returns its base beside it."""
    place = device or default_device()
    with without_harmless_warnings():
        saved = located(read_saved(find_single(path)), base)
        precision = dtype or DTYPES[saved.config.precision]
        weights = load_base(saved, dtype=precision, base=base, device=place)
        # In their last dtype and place: a later change would give the model memory of its own.
        cast_parameters(weights.tower, precision)
        weights.tower.to(place)
        weights.language.to(place)
        shared = SharedBase(saved, _over_same_memory(weights), precision, place)
        model = assemble_saved(saved, weights, model_class=model_class).to(place)
    return ready(model, precision), shared


def load_over(shared: SharedBase, path: Path, model_class: type[Network]) -> Network:
    """Loads a saved model over the base weights of another one, which are not read again.

    Its LLM's base weights have to be the same. Its tower's are shared if they are the same, and
    else loaded for it.

    Args:
        shared: the base of the other model.
        path: a model folder, a run, or a checkpoint.
        model_class: the class of the model that is returned.

    Returns:
        The model, in eval mode, in the other one's dtype and on its device.

    Raises:
        ModelError: the LLM's base weights are others, the message has the differences; or as
            `checkpoint.load_model`.
    """
    with without_harmless_warnings():
        saved = read_saved(find_single(path))
        _check_llm(shared, saved)
        reason = _tower_reason(shared, saved)
        if reason is None:
            saved = _at_loaded_places(shared, saved, tower=True)
            tower = shared.weights.tower
        else:
            log.info("%s has a tower of its own: %s", saved.folder, reason)
            llm = saved.config.llm.name
            # The LLM's own place may be gone.
            saved = located(saved, BaseChoice({"llm": llm} if llm else {}))
            saved = _at_loaded_places(shared, saved, tower=False)
            tower, _ = checked_tower(saved, AS_SAVED)
        weights = _over_same_memory(BaseWeights(tower, shared.weights.language, {}))
        model = assemble_saved(saved, weights, model_class=model_class).to(shared.device)
    return ready(model, shared.dtype)


def _over_same_memory(weights: BaseWeights) -> BaseWeights:
    """Modules of their own over the memory of the given ones."""
    return replace(
        weights, tower=_shared_copy(weights.tower), language=_shared_copy(weights.language)
    )


def _shared_copy(module: Module) -> Module:
    """A copy of a module whose parameters and buffers are the same memory.

    The parameters are objects of their own: another value, dtype or device of one leaves the
    module's as it is.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
    memo |= {id(each): _shared_parameter(each) for each in module.parameters()}
    memo |= {id(state): state for state in _shared_states(module)}
    return copy.deepcopy(module, memo)


def _shared_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter over the same memory, which may be packed in 4 or 8 bits."""
    packed: Any = parameter
    kind: Any = type(parameter)
    if kind is nn.Parameter:
        return nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    if hasattr(packed, "CB"):
        return kind(
            packed.data,
            requires_grad=packed.requires_grad,
            has_fp16_weights=packed.has_fp16_weights,
            CB=packed.CB,
            SCB=packed.SCB,
        )
    return copy.copy(packed)


def _shared_states(module: nn.Module) -> list[Any]:
    """The scales of a module's 4-bit layers, which are beside its parameters."""
    layers: Iterator[Any] = module.modules()
    states = [getattr(layer, "quant_state", None) for layer in layers]
    states += [getattr(parameter, "quant_state", None) for parameter in module.parameters()]
    return [state for state in states if state is not None]


def _check_llm(shared: SharedBase, saved: SavedModel) -> None:
    """Raises `ModelError` unless a saved model's LLM has the base weights that are loaded."""
    packing = [each.config.llm.quantize or "not quantised" for each in (saved, shared.saved)]
    if packing[0] != packing[1]:
        raise ModelError(
            f"{saved.folder} can't share the base of {shared.saved.folder}: "
            f"its llm is {packing[0]}, the loaded one {packing[1]}; {BY_ITSELF}"
        )
    loaded = shared.weights.bases.get("llm") or folder_base(shared.saved.folder / "llm")
    before = saved.notes.parts.get("llm") or folder_base(saved.folder / "llm")
    changed = differences(before, loaded)
    if changed:
        raise ModelError(
            f"{saved.folder} can't share the base of {shared.saved.folder}: "
            f"its llm is {quoted(before.name)}, the loaded one {quoted(loaded.name)}: "
            f"{'; '.join(changed)}; {BY_ITSELF}"
        )


def _tower_reason(shared: SharedBase, saved: SavedModel) -> str | None:
    """The reason why a saved model's tower is not the one that is loaded; None if it is."""
    config = saved.config
    loaded = shared.saved.config
    before = _settings(config.model.tower)
    now = _settings(loaded.model.tower)
    keys = [key for key in before if before[key] != now.get(key)]
    if keys:
        return f"{', '.join(keys)} differs from the loaded one's"
    if config.tower_rebuild != loaded.tower_rebuild:
        return "it has another architecture than the loaded one"
    if "tower" in saved.notes.parts and "tower" in shared.weights.bases:
        changed = differences(saved.notes.parts["tower"], shared.weights.bases["tower"])
        return "; ".join(changed) or None
    files = [each.folder / TOWER for each in (saved, shared.saved)]
    if all(file.is_file() for file in files) and file_digest(files[0]) == file_digest(files[1]):
        return None
    return "its weights are in the model folder"


def _settings(tower: AnyTower) -> dict[str, Any]:
    """The settings that a tower's module depends on, beside its architecture and weights."""
    settings = {
        name: getattr(tower, name) for name in type(tower).model_fields if name not in OUTSIDE
    }
    if isinstance(tower, PairTower):
        settings["towers"] = [_settings(part) for part in tower.towers]
    return settings


def _at_loaded_places(shared: SharedBase, saved: SavedModel, *, tower: bool) -> SavedModel:
    """A saved model whose config names the base weights that are loaded.

    With `tower` these are the tower's too. Its recorded places may be gone.
    """
    section = saved.config.model
    loaded = shared.saved.config.model
    llm = section.llm.model_copy(update={"attention": loaded.llm.attention})
    if llm.name is not None and loaded.llm.name is not None:
        names = {"name": loaded.llm.name, "gguf_file": loaded.llm.gguf_file}
        llm = llm.model_copy(update=names)
    changes: dict[str, Any] = {"llm": llm}
    if tower:
        cuts = {name: getattr(section.tower, name) for name in CUTS if hasattr(section.tower, name)}
        changes["tower"] = loaded.tower.model_copy(update=cuts)
    config = saved.config.model_copy(update={"model": section.model_copy(update=changes)})
    return replace(saved, config=config)
