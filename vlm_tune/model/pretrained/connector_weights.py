"""Pretrained connector weights: a projector's file, or the connector of a vision-language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_tune.config.connectors import AnyConnector, CrossAttentionConnector, FusionConnector
from vlm_tune.errors import ModelError
from vlm_tune.model.connectors.projectors import Linear, Mlp
from vlm_tune.model.connectors.qformer import QFormer
from vlm_tune.model.families.base import part_tensors
from vlm_tune.model.families.blip import QFORMER_LAYER, QFORMER_TOKENIZER
from vlm_tune.model.families.registry import family_names, find_vlm
from vlm_tune.model.hub import CONNECTOR_ADAPTER
from vlm_tune.model.weights import load_into, read_safetensors, safetensors_shapes
from vlm_tune.paths import is_file
from vlm_tune.quoting import quoted, reason_of

Tensors = dict[str, torch.Tensor]
QFORMER_STEM = {
    "qformer.layernorm": "norm",
    "qformer.embeddings.layernorm": "norm",
    "qformer.embeddings.word_embeddings": "words",
    "qformer.embeddings.position_embeddings": "positions",
    "language_projection": "project",
}
"""The names of the modules around the layers in transformers, and here."""


def start_connector(connector: nn.Module, config: AnyConnector) -> None:
    """Loads the weights that the recipe names into a connector, if it names any.

    Raises `ModelError` for weights of another kind of connector, missing, unexpected and misshapen
    tensors, and pickled weights.
    """
    if isinstance(config, FusionConnector | CrossAttentionConnector):
        start_connector(connector.base, config.base)  # type: ignore[arg-type]
    elif config.weights is not None:
        load_into(
            connector, _renamed(connector, _read(config.weights), config.weights), config.weights
        )


def check_connector_file(connector: nn.Module | None, config: AnyConnector) -> None:
    """Checks the connector weights that a recipe names by a file, by the file's header.

    The names of models are not looked up.

    Args:
        connector: The connector on the meta device; None where the language model that it fits is
            unknown, and only the file is checked.
        config: The connector's section of the recipe.

    Raises:
        ModelError: As `start_connector` raises it for a file.
    """
    if isinstance(config, FusionConnector | CrossAttentionConnector):
        check_connector_file(getattr(connector, "base", None), config.base)
    elif config.weights is not None and _is_weights_file(config.weights):
        shapes = _by_header(_safetensors(config.weights))
        if connector is not None:
            load_into(connector, _renamed(connector, shapes, config.weights), config.weights)


def _is_weights_file(weights: str) -> bool:
    """Whether the name of weights is that of a file, and not of a model."""
    path = Path(weights)
    return is_file(path) or path.suffix in (".safetensors", ".bin", ".pt", ".pth")


def _safetensors(weights: str) -> Path:
    """The path of a weights file.

    Raises `ModelError` if it is of another format, or a model's connector whose adapter it lacks.
    """
    path = Path(weights)
    if path.suffix != ".safetensors":
        raise ModelError(f"{path}: pickled weights are not loaded, convert them to safetensors")
    if (path.parent / CONNECTOR_ADAPTER).is_dir():
        raise ModelError(
            f"{path}: the connector without its LoRA adapter, which is in {CONNECTOR_ADAPTER}: "
            "merge that model (vlm-tune merge) and name the merged folder's file"
        )
    return path


def _by_header(path: Path) -> Tensors:
    """A file's tensors on the meta device, under names without their common prefix."""
    shapes = safetensors_shapes(path)
    return {_short_name(key): torch.empty(shape, device="meta") for key, shape in shapes.items()}


def _short_name(key: str) -> str:
    """A tensor's name without the prefix that LLaVA's projectors have."""
    return key.rpartition("mm_projector.")[2]


def _read(weights: str) -> Tensors:
    """Loads a connector's tensors, under the names in their file without its common prefix.

    `weights` is a safetensors file, or the name of a vision-language model.
    """
    if _is_weights_file(weights):
        tensors = read_safetensors(_safetensors(weights))
        return {_short_name(key): tensor for key, tensor in tensors.items()}
    vlm = find_vlm(weights)
    if vlm is None:
        raise ModelError(
            f"model.connector.weights: {quoted(weights)} is neither a safetensors file "
            f"nor a vision-language model of a known kind ({family_names()})"
        )
    return part_tensors(vlm, "connector")


def _renamed(connector: nn.Module, tensors: Tensors, name: str) -> Tensors:
    """Renames tensors from another library's names to the connector's own.

    Args:
        connector: the connector that they are for.
        tensors: the tensors by their names in the file.
        name: the file or model, for messages.

    Raises:
        ModelError: the tensors are those of another kind of connector.
    """
    if tensors.keys() <= connector.state_dict().keys():
        return tensors
    other = next(
        (
            kind
            for key, kind in (("query_tokens", QFormer), ("linear_1.weight", None))
            if key in tensors
        ),
        Mlp,
    )
    if (other is QFormer) != isinstance(connector, QFormer):
        saved_kind, expected_kind = (
            ("a Q-Former", "a projector") if other is QFormer else ("a projector", "a Q-Former")
        )
        raise ModelError(
            f"{name} holds {saved_kind}, and model.connector.kind is "
            f"{type(connector).__name__.lower()}: expected {expected_kind}"
        )
    if isinstance(connector, QFormer):
        return _qformer(connector, tensors)
    if other is None and isinstance(connector, Linear):
        return _product(tensors)
    if other is None:
        names = {"linear_1.": "layers.0.", "linear_2.": "layers.2."}
        return {names.get(key[:9], key[:9]) + key[9:]: value for key, value in tensors.items()}
    return {
        f"{'linear' if isinstance(connector, Linear) else 'layers'}.{key}": value
        for key, value in tensors.items()
    }


def _product(tensors: Tensors) -> Tensors:
    """The product of two linear layers with no activation between them, as one layer.

    A linear connector is exported to LLaVA's layout with the identity as the second layer.
    """
    first = tensors["linear_1.weight"].double()
    second = tensors["linear_2.weight"].double()
    bias = second @ tensors["linear_1.bias"].double() + tensors["linear_2.bias"].double()
    return {"linear.weight": (second @ first).float(), "linear.bias": bias.float()}


def _qformer(connector: QFormer, tensors: Tensors) -> Tensors:
    """Renames tensors of transformers' BLIP-2 or InstructBLIP connector to those of `QFormer`."""
    left = dict(tensors)
    named: Tensors = {}
    queries = left.pop("query_tokens", None)
    if queries is not None:
        named["queries"] = queries[0]
    for theirs, ours in QFORMER_STEM.items():
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in left:
                named[f"{ours}.{kind}"] = left.pop(f"{theirs}.{kind}")
    for place, layer in enumerate(connector.layers):
        for key in layer.state_dict():
            stem, _, kind = key.rpartition(".")
            theirs = f"qformer.encoder.layer.{place}.{QFORMER_LAYER[stem]}.{kind}"
            if theirs in left:
                named[f"layers.{place}.{key}"] = left.pop(theirs)
    # The last layer's output for the text is unused, so the connector has no weights for it.
    last = f"qformer.encoder.layer.{len(connector.layers) - 1}."
    unread = (f"{last}intermediate.", f"{last}output.") if connector.needs_text else ()
    return named | {
        key: value for key, value in left.items() if not (unread and key.startswith(unread))
    }


def load_words(config: AnyConnector, folder: Path | None = None) -> Any:
    """Loads a connector's own tokenizer for instructions, from a saved folder or by its name.

    Returns None if it uses the LLM's tokenizer. Raises `ModelError` if it can't be
    loaded.
    """
    from transformers import AutoTokenizer

    name = getattr(config, "tokenizer", None)
    if name is None:
        return None
    inside = folder is None and find_vlm(name) is not None
    try:
        return AutoTokenizer.from_pretrained(
            str(folder or name),
            trust_remote_code=False,
            **({"subfolder": QFORMER_TOKENIZER} if inside else {}),
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.connector.tokenizer: no tokenizer in {quoted(str(folder or name))}: "
            f"{reason_of(error)}"
        ) from None
