"""llama.cpp's mmproj file: how a tower and a connector are written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm_tune.errors import ModelError
from vlm_tune.exporting.gguf.projectors import projector_of
from vlm_tune.exporting.gguf.writer import write_gguf
from vlm_tune.exporting.hf_layout import vision_of
from vlm_tune.model.vlm import VisionLanguageNetwork

if TYPE_CHECKING:
    from gguf import GGUFWriter

GELUS = ("gelu", "gelu_pytorch_tanh", "gelu_new")
ACTIVATIONS = (*GELUS, "quick_gelu", "silu")


def write_mmproj(path: Path, model: VisionLanguageNetwork, language_dtype: str) -> None:
    """Writes the tower and the connector in the model's precision.

    `language_dtype` is the precision of the language model's file.

    Raises `ModelError` for an activation, a norm or a width that llama.cpp does not support.
    """
    tower, _ = vision_of(model)
    projector = projector_of(model.config)
    vision, state = projector.vision(tower)
    if vision.hidden_act not in ACTIVATIONS:
        raise ModelError(
            f"llama.cpp has no {vision.hidden_act} for a tower, only {', '.join(ACTIVATIONS)}"
        )
    if vision.hidden_size == vision.intermediate_size:
        raise ModelError(
            "llama.cpp would swap the two layers of the tower's MLPs, which are equally wide"
        )
    norm: Any = getattr(model.connector, "norm", None)
    eps = vision.layer_norm_eps if projector.norm_eps is None else projector.norm_eps
    if getattr(norm, "eps", eps) != eps:
        raise ModelError(
            f"the connector's norm adds {norm.eps}, and llama.cpp's {eps} for a tower whose norms "
            f"add {vision.layer_norm_eps}"
        )

    def describe(writer: GGUFWriter) -> None:
        writer.add_type("mmproj")
        writer.add_name("tower and connector of a vision-language model")
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_projector_type(projector.name)
        writer.add_vision_projection_dim(model.llm.width)
        writer.add_vision_image_size(vision.image_size)
        writer.add_vision_patch_size(vision.patch_size)
        writer.add_vision_embedding_length(vision.hidden_size)
        writer.add_vision_feed_forward_length(vision.intermediate_size)
        writer.add_vision_block_count(vision.num_hidden_layers)
        writer.add_vision_head_count(vision.num_attention_heads)
        writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
        writer.add_vision_image_mean(list(tower.mean))
        writer.add_vision_image_std(list(tower.std))
        writer.add_vision_use_gelu(vision.hidden_act in GELUS)
        writer.add_vision_use_silu(vision.hidden_act == "silu")
        projector.describe(writer, vision, model)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield from _tower_tensors(vision.num_hidden_layers, state)
        yield from projector.connector(model, language_dtype).items()

    write_gguf(path, "clip", describe, tensors(), model.config.precision)


def _tower_tensors(
    blocks: int, state: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, blocks)
    for key, tensor in state.items():
        if key.endswith("position_ids"):
            continue
        stored_name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if stored_name is None:
            raise ModelError(f"mmproj has no place for the tower's {key}")
        yield stored_name, tensor
