"""LoRA adapters of a part (LoRA, rsLoRA, DoRA, PiSSA): attached, saved under PEFT's names, merged.

PiSSA (arXiv:2404.02948) trains the principal part of a weight: W x + s B A x - s B0 A0 x, where B0
and A0 are the initial values of B and A. These are a second, frozen adapter (`initial`, B0
negated). So the base weight stays that of its name, in every precision, and on disk the two
adapters are one plain LoRA of double rank.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from vlm_tune.compat import set_lora_layer
from vlm_tune.errors import ModelError
from vlm_tune.model.quantized_stub import PackedLinear
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import check_tensors, whole_state
from vlm_tune.quoting import reason_of

PREFIX = "base_model.model."
TRAINED = "default"
INITIAL = "initial"
PISSA = "pissa"
SETTINGS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights")


def parts(model: VisionLanguageNetwork) -> dict[str, nn.Module]:
    """The model's modules by part; names of parameters in `llm` are transformers'.

    A native model has all of its weights in `llm`; `rule_name` tells its parts apart.
    """
    if model.llm.native:
        return {"llm": model.llm.model}
    return {"tower": model.tower, "connector": model.connector, "llm": model.llm.model}


def rule_name(model: VisionLanguageNetwork, part: str, name: str) -> str:
    """The name by which tune rules know a parameter of one of `parts`."""
    plain = clean(name)
    return f"{model.llm.part_of(plain) if part == 'llm' else part}.{plain}"


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return "lora_" in name


def is_trained_adapter(name: str) -> bool:
    """Whether a parameter's name is that of a trained adapter, which PiSSA's `initial` is not."""
    return is_adapter(name) and f".{INITIAL}." not in name


def adapter_name(name: str) -> str:
    """The name of the adapter that a parameter of an adapter belongs to."""
    segments = iter(name.split("."))
    return next(next(segments) for segment in segments if segment.startswith("lora_"))


def clean(name: str) -> str:
    """A parameter's name without the `base_layer` that PEFT inserts."""
    return name.replace(".base_layer.", ".")


def same_adapter(module: nn.Module, one: Any, other: Any) -> bool:
    """Whether two LoRA configs describe the same adapter of a module.

    PEFT shortens a long list of target modules, so the layers that the names stand for count.
    """
    return all(getattr(one, key) == getattr(other, key) for key in SETTINGS) and (
        _targets(module, one) == _targets(module, other)
    )


def _targets(module: nn.Module, config: Any) -> set[str]:
    """The layers that the target modules of a LoRA config stand for, by PEFT's rule."""
    names = {clean(f"{name}.").removesuffix(".") for name, _ in module.named_modules()}
    return {
        name
        for name in names
        if not is_adapter(name)
        and any(name == target or name.endswith(f".{target}") for target in config.target_modules)
    }


def is_pissa(config: Any) -> bool:
    """Whether a LoRA config is one of PiSSA, with the exact or a randomised SVD."""
    return str(config.init_lora_weights).startswith(PISSA)


def attach_adapter(model: VisionLanguageNetwork, part: str, config: Any) -> None:
    """Attaches LoRA layers to a part in place, in fp32; its outputs stay the same.

    Those of PiSSA get their values afterwards: from a file, or by `start_from_singular_vectors`.

    Args:
        model: the model; its `adapters` get the tuner.
        part: tower, connector or llm.
        config: PEFT's LoRA config.
    """
    from peft.tuners.lora import LoraModel

    from vlm_tune.model.acceleration.lora_layers import LoraLinear

    if not model.config.llm.quantize or part != "llm":
        set_lora_layer(config, nn.Linear, LoraLinear)
    elif model.config.llm.quantize != "int8":
        # int8 layers quantise their inputs as well, so they stay PEFT's.
        from bitsandbytes.nn.modules import Linear4bit

        for kind in (Linear4bit, PackedLinear):
            set_lora_layer(config, kind, LoraLinear)
    module = parts(model)[part]
    init = config.init_lora_weights
    pissa = is_pissa(config)
    if pissa:
        # PEFT's own PiSSA would write the residual into the base weight.
        config.init_lora_weights = True
    frozen = deepcopy(config)
    frozen.lora_dropout = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = LoraModel(
            module, {TRAINED: config, INITIAL: frozen} if pissa else {TRAINED: config}, TRAINED
        )
        if pissa:
            tuner.inject_adapter(module, INITIAL)
            tuner.set_adapter([TRAINED, INITIAL])
            config.init_lora_weights = init
    model.adapters[part] = tuner
    for name, parameter in module.named_parameters():
        if is_adapter(name):
            # PEFT gives them the base's dtype, and values loaded into half precision would no
            # longer be the saved ones.
            parameter.data = parameter.data.float()


@contextmanager
def adapters_off(model: VisionLanguageNetwork) -> Iterator[None]:
    """Context in which the model computes without its adapters.

    Their scales are 0: so every layer stays on the path, and by the kernels, of its training, and
    equal weights give equal bits. It does not hold for DoRA, which scales the base weight too.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    scales = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update(dict.fromkeys(layer.scaling, 0.0))
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling.update(scale)


@torch.no_grad()
def start_from_singular_vectors(
    module: nn.Module, config: Any, device: torch.device | None = None
) -> None:
    """Gives the PiSSA layers of a part their first values, by SVDs of the weights.

    A and B of a layer are from the r largest singular values of its weight, divided by the scale,
    and the frozen initial adapter subtracts them.

    Args:
        module: the part.
        config: PEFT's LoRA config, which says whether the SVDs are exact or randomised.
        device: where the SVDs run; if None, where the weights are.

    Raises:
        ModelError: the rank exceeds a side of a weight.
    """
    iterations = int(config.init_lora_weights.partition("_niter_")[2] or 0)
    for layer in module.modules():
        if hasattr(layer, "lora_A"):
            _start_layer(layer, iterations, device)


def _start_layer(layer: Any, iterations: int, device: torch.device | None) -> None:
    """Starts one layer, by an exact SVD if `iterations` is 0."""
    weight = layer.get_base_layer().weight
    weight = weight if device is None or weight.is_meta else weight.to(device)
    weight = (weight.T if layer.fan_in_fan_out else weight).float()
    rank = layer.r[TRAINED]
    scale = layer.scaling[TRAINED]
    if min(weight.shape) < rank:
        raise ModelError(
            f"tune: PiSSA of rank {rank} in a layer of {list(weight.shape)}: "
            "the rank can't be larger than either side"
        )
    if iterations:
        left, values, transposed = torch.svd_lowrank(weight, rank, niter=iterations)
        right = transposed.T
    else:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    for name, sign in ((TRAINED, 1.0), (INITIAL, -1.0)):
        layer.lora_A[name].weight.copy_(root[:, None] * right[:rank])
        layer.lora_B[name].weight.copy_(sign * left[:, :rank] * root)


def merge_adapter(model: VisionLanguageNetwork, part: str) -> None:
    """Merges a part's adapter into its base weights and removes the adapter.

    Raises `ModelError` for quantised base weights, which can't represent the sum, and for sums that
    are not finite.
    """
    if part == "llm" and model.config.llm.quantize:
        raise ModelError(
            "an adapter can't be merged into quantised weights; "
            "load the 16-bit base and merge into that"
        )
    if part == "llm":
        _untie(model.llm.model)
    try:
        model.adapters.pop(part).merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"merging the {part}'s adapter: {reason_of(error)}") from None
    if part != "connector":  # always saved
        model.changed.add(part)


def _untie(language: Any) -> None:
    """Unties the head's weight from the embedding's if one of the two has an adapter."""
    head = language.get_output_embeddings()
    embedding = language.get_input_embeddings()
    if not (hasattr(head, "base_layer") or hasattr(embedding, "base_layer")):
        return
    head_layer = getattr(head, "base_layer", head)
    embedding_layer = getattr(embedding, "base_layer", embedding)
    if head_layer.weight is embedding_layer.weight:
        head_layer.weight = nn.Parameter(
            embedding_layer.weight.detach().clone(), requires_grad=False
        )
        language.config.tie_word_embeddings = False


# --- on disk --------------------------------------------------------------------------------------


def plain_config(config: Any) -> Any:
    """The config with which plain PEFT loads `adapter_state`.

    For PiSSA this is LoRA of double rank and the same scale.
    """
    plain = deepcopy(config)
    plain.inference_mode = True
    if is_pissa(config):
        scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        plain.r = 2 * config.r
        plain.lora_alpha = scale * 2 * config.r
        plain.use_rslora = False
        plain.init_lora_weights = True
    return plain


def adapter_tensors(
    module: nn.Module, adapters: Collection[str] = (TRAINED,)
) -> dict[str, list[torch.Tensor]]:
    """The tensors of an adapter by the keys that PEFT writes.

    A key has one tensor, or for PiSSA two that are concatenated along the rank. `adapters` are the
    names of the adapters whose tensors are one adapter on disk; a layer has one of them.
    """
    state = whole_state(module, is_adapter)
    tensors = {}
    for name, value in state.items():
        if adapter_name(name) in adapters:
            initial = name.replace(f".{TRAINED}.", f".{INITIAL}.")
            # An embedding's names end with TRAINED. They have no initial tensor: PiSSA is for
            # linear layers only.
            tensors[_key(name)] = (
                [value, state[initial]] if initial != name and initial in state else [value]
            )
    return tensors


def _key(name: str) -> str:
    """The key under which PEFT writes an adapter's parameter."""
    segments = name.split(".")
    place = next(place for place, part in enumerate(segments) if part.startswith("lora_"))
    name = ".".join([*segments[: place + 1], *segments[place + 2 :]])
    return PREFIX + (name.removesuffix(".weight") if "lora_magnitude_vector" in name else name)


def rank_axis(key: str) -> int:
    """The axis of an adapter's tensor that has the rank as its size."""
    return 0 if "lora_A" in key else 1


def adapter_state(
    module: nn.Module, adapters: Collection[str] = (TRAINED,)
) -> dict[str, torch.Tensor]:
    """An adapter's state dict under the keys that PEFT writes; `adapters` as `adapter_tensors`."""
    return {
        key: torch.cat(pieces, rank_axis(key)) if len(pieces) > 1 else pieces[0]
        for key, pieces in adapter_tensors(module, adapters).items()
    }


def load_adapter_state(
    module: nn.Module,
    tensors: dict[str, torch.Tensor],
    fault: str,
    adapters: Collection[str] = (TRAINED,),
) -> None:
    """Loads tensors into a part's adapter; `adapters` as `adapter_tensors`.

    Raises `ModelError`, which begins with `fault`, for missing, unexpected and misshapen tensors.
    """
    wanted = adapter_tensors(module, adapters)
    shapes = {key: list(targets[0].shape) for key, targets in wanted.items()}
    for key, targets in wanted.items():
        if len(targets) > 1:
            axis = rank_axis(key)
            shapes[key][axis] = sum(each.shape[axis] for each in targets)
    check_tensors(tensors, shapes, fault)
    for key, targets in wanted.items():
        pieces = tensors[key].chunk(2, rank_axis(key)) if len(targets) > 1 else [tensors[key]]
        for target, piece in zip(targets, pieces, strict=True):
            target.copy_(piece)
