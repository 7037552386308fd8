"""Connectors that start from weights: a projector's file, or the connector of an existing vision-language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_tune.config.model import AnyConnector, CrossAttentionConnector, FusionConnector
from vlm_tune.errors import ModelError
from vlm_tune.model.connectors.projectors import Linear, Mlp
from vlm_tune.model.connectors.qformer import QFormer
from vlm_tune.model.pretrained.vlm_checkpoints import QFORMER_TOKENIZER, find_vlm, part_tensors
from vlm_tune.model.weights import load_into, read_safetensors
from vlm_tune.paths import is_file
from vlm_tune.quoting import quoted, reason_of

Tensors = dict[str, torch.Tensor]
QFORMER_LAYER = {
    "attention.query": "attention.attention.query",
    "attention.key": "attention.attention.key",
    "attention.value": "attention.attention.value",
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "cross.query": "crossattention.attention.query",
    "cross.key": "crossattention.attention.key",
    "cross.value": "crossattention.attention.value",
    "cross.out": "crossattention.output.dense",
    "cross_norm": "crossattention.output.LayerNorm",
    "feed.0": "intermediate_query.dense",
    "feed.2": "output_query.dense",
    "feed_norm": "output_query.LayerNorm",
    "text_feed.0": "intermediate.dense",
    "text_feed.2": "output.dense",
    "text_norm": "output.LayerNorm",
}
"""Our names of a Q-Former layer's modules, and transformers'."""
QFORMER_STEM = {
    "qformer.layernorm": "norm",
    "qformer.embeddings.layernorm": "norm",
    "qformer.embeddings.word_embeddings": "words",
    "qformer.embeddings.position_embeddings": "positions",
    "language_projection": "project",
}
"""transformers' names of what is around the layers, and ours."""


def start_connector(connector: nn.Module, config: AnyConnector) -> None:
    """Loads the weights that the recipe names into a connector, all of them and nothing else; none are named for most.

    Raises `ModelError` for weights of another kind of connector, missing, unexpected and misshapen tensors, and pickles.
    """
    if isinstance(config, FusionConnector | CrossAttentionConnector):
        start_connector(connector.base, config.base)  # type: ignore[arg-type]
    elif config.weights is not None:
        load_into(
            connector, _renamed(connector, _read(config.weights), config.weights), config.weights
        )


def _read(weights: str) -> Tensors:
    """A connector's tensors as their file names them, without what stands before all of them."""
    path = Path(weights)
    if is_file(path) or path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        if path.suffix != ".safetensors":
            raise ModelError(f"{path}: pickled weights are not loaded, convert them to safetensors")
        return {
            key.rpartition("mm_projector.")[2]: value
            for key, value in read_safetensors(path).items()
        }
    vlm = find_vlm(weights)
    if vlm is None:
        raise ModelError(
            f"model.connector.weights: {quoted(weights)} is neither a safetensors file nor a vision-language model of a known kind "
            "(LLaVA-1.5, BLIP-2, InstructBLIP)"
        )
    return part_tensors(vlm, "connector")


def _renamed(connector: nn.Module, found: Tensors, name: str) -> Tensors:
    """Tensors under the connector's own names, where their names are a kind's of another library."""
    if found.keys() == connector.state_dict().keys():
        return found
    other = next(
        (
            kind
            for key, kind in (("query_tokens", QFormer), ("linear_1.weight", None))
            if key in found
        ),
        Mlp,
    )
    if (other is QFormer) != isinstance(connector, QFormer):
        held, wanted = (
            ("a Q-Former", "a projector") if other is QFormer else ("a projector", "a Q-Former")
        )
        raise ModelError(
            f"{name} holds {held}, and model.connector.kind is {type(connector).__name__.lower()}: expected {wanted}"
        )
    if isinstance(connector, QFormer):
        return _qformer(connector, found)
    if other is None and isinstance(connector, Linear):
        return _product(found)
    if other is None:
        names = {"linear_1.": "layers.0.", "linear_2.": "layers.2."}
        return {names.get(key[:9], key[:9]) + key[9:]: value for key, value in found.items()}
    return {
        f"{'linear' if isinstance(connector, Linear) else 'layers'}.{key}": value
        for key, value in found.items()
    }


def _product(found: Tensors) -> Tensors:
    """Two linear layers with nothing between them as one; a linear connector is exported as LLaVA with the identity second."""
    first = found["linear_1.weight"].double()
    second = found["linear_2.weight"].double()
    bias = second @ found["linear_1.bias"].double() + found["linear_2.bias"].double()
    return {"linear.weight": (second @ first).float(), "linear.bias": bias.float()}


def _qformer(connector: QFormer, found: Tensors) -> Tensors:
    """transformers' BLIP-2 or InstructBLIP connector under our names."""
    left = dict(found)
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
    # What the last layer makes of the text is read by nobody: ours has no weights for it.
    last = f"qformer.encoder.layer.{len(connector.layers) - 1}."
    unread = (f"{last}intermediate.", f"{last}output.") if connector.needs_text else ()
    return named | {
        key: value for key, value in left.items() if not (unread and key.startswith(unread))
    }


def load_words(config: AnyConnector, folder: Path | None = None) -> Any:
    """The tokenizer that a connector reads instructions by, from a saved folder or its name; None if that is the LLM's.

    Raises `ModelError` if it can't be loaded.
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
            f"model.connector.tokenizer: no tokenizer in {quoted(str(folder or name))}: {reason_of(error)}"
        ) from None
