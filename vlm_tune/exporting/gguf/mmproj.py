"""llama.cpp's mmproj file: what it can hold, how it is written, and what its tensors compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import conv2d, gelu, layer_norm, linear, scaled_dot_product_attention, silu

from vlm_tune.errors import ModelError
from vlm_tune.exporting.gguf.idefics3_projector import IDEFICS3
from vlm_tune.exporting.gguf.mlp_projector import MLP
from vlm_tune.exporting.gguf.projector import Projector, cuts_as
from vlm_tune.exporting.gguf.writer import read_fields, read_tensors, write_gguf
from vlm_tune.exporting.hf_layout import vision_of
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork

if TYPE_CHECKING:
    from gguf import GGUFWriter

GELUS = ("gelu", "gelu_pytorch_tanh", "gelu_new")
ACTIVATIONS = (*GELUS, "quick_gelu", "silu")
PROJECTORS = {projector.name: projector for projector in (MLP, IDEFICS3)}


REFUSED = {
    "internvl": "llama.cpp puts an InternVL's class token behind the patches, where its positions "
    "count it first, and so sees images otherwise than in training",
    "llava_next": "llama.cpp joins the tiles of a LLaVA-NeXT without its tokens for rows' ends",
    "gemma3": "the images of a Gemma 3 are not written as GGUF",
}
"""Why models that cut images in other ways can't be written, by `model.tower.split.kind`.

As of the llama.cpp in llama-cpp-python 0.3.36 (`tools/mtmd/models`).
"""


def mmproj_reasons(config: VisionLanguageConfig) -> list[str]:
    """The reasons why llama.cpp can't hold a tower or a connector, from configs alone."""
    refused = next((reason for kind, reason in REFUSED.items() if cuts_as(config, kind)), None)
    return projector_of(config).reasons(config) if refused is None else [refused]


def projector_of(config: VisionLanguageConfig) -> Projector:
    """The projector that a model may fit in, by how it cuts images."""
    return IDEFICS3 if cuts_as(config, "idefics3") else MLP


def write_mmproj(path: Path, model: VisionLanguageNetwork, dtype: str) -> None:
    """Writes the tower and the connector.

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
    norm: Any = model.connector.norm
    if getattr(norm, "eps", vision.layer_norm_eps) != vision.layer_norm_eps:
        raise ModelError(
            f"mmproj has one epsilon for all norms, the connector's is {norm.eps}, the tower's "
            f"{vision.layer_norm_eps}"
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

    tensors = _tensors(vision.num_hidden_layers, state, model.connector, projector.names)
    write_gguf(path, "clip", describe, tensors, dtype)


def _tensors(
    blocks: int,
    state: dict[str, torch.Tensor],
    connector: torch.nn.Module,
    connector_names: dict[str, str],
) -> Iterator[tuple[str, torch.Tensor]]:
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, blocks)
    for key, tensor in state.items():
        if key.endswith("position_ids"):
            continue
        stored_name = names.get_name(
            f"vision_tower.vision_model.{key}", try_suffixes=(".weight", ".bias")
        )
        if stored_name is None:
            raise ModelError(f"mmproj has no place for the tower's {key}")
        yield stored_name, tensor
    for key, tensor in connector.state_dict().items():
        owner, _, kind = key.rpartition(".")
        yield f"{connector_names[owner]}.{kind}", tensor


# --- reading --------------------------------------------------------------------------------------


class Mmproj:
    """llama.cpp's computation with an mmproj file, in fp32 from the file's tensors and metadata.

    llama.cpp's GELU is the tanh form throughout (arXiv:1606.08415). With `exact`, the name of the
    tower's activation, it is what the model was trained with: in the connector the exact form, in
    the tower the form of that activation.
    """

    def __init__(self, path: Path, exact: str | None = None) -> None:
        self.fields = read_fields(path)
        self.tensors = read_tensors(path)
        self.exact = exact
        self.vision = {
            key.removeprefix("clip.vision."): value
            for key, value in self.fields.items()
            if key.startswith("clip.vision.")
        }
        self.projector = PROJECTORS[self.fields["clip.projector_type"]]

    @torch.inference_mode()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Connected features [M, N, E] of uint8 pixels [M, 3, S, S]."""
        mean, std = (
            torch.tensor(self.vision[f"image_{kind}"])[:, None, None] for kind in ("mean", "std")
        )
        kernel = self.tensors["v.patch_embd.weight"]
        patches = conv2d(
            (pixels / 255 - mean) / std,
            kernel,
            self.tensors.get("v.patch_embd.bias"),
            stride=self.vision["patch_size"],
        )
        hidden = patches.flatten(2).transpose(1, 2)
        first = self.tensors.get("v.class_embd")
        if first is not None:
            hidden = torch.cat([first.expand(len(hidden), 1, -1), hidden], dim=1)
        hidden = self._norm("v.pre_ln", hidden + self.tensors["v.position_embd.weight"])
        (last,) = self.vision.get("feature_layer", [self.vision["block_count"]])
        for number in range(last):
            hidden = self._block(f"v.blk.{number}", hidden)
        hidden = self._norm("v.post_ln", hidden)[:, int(first is not None) :]
        return self.projector.connected(self, hidden)

    def _block(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        heads = self.vision["attention.head_count"]
        normed = self._norm(f"{name}.ln1", hidden)
        q, k, v = (
            self.linear(f"{name}.attn_{one}", normed).unflatten(-1, (heads, -1)).transpose(1, 2)
            for one in "qkv"
        )
        hidden = hidden + self.linear(
            f"{name}.attn_out", scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        inner = self.linear(f"{name}.ffn_up", self._norm(f"{name}.ln2", hidden))
        return hidden + self.linear(f"{name}.ffn_down", self._activation(inner))

    def _activation(self, inner: torch.Tensor) -> torch.Tensor:
        if self.fields["clip.use_gelu"]:
            return gelu(inner, approximate="none" if self.exact == "gelu" else "tanh")
        return silu(inner) if self.fields["clip.use_silu"] else inner * torch.sigmoid(1.702 * inner)

    def _norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        weight = self.tensors.get(f"{name}.weight")
        if weight is None:
            return hidden
        return layer_norm(
            hidden,
            weight.shape,
            weight,
            self.tensors[f"{name}.bias"],
            self.vision["attention.layer_norm_epsilon"],
        )

    def linear(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """A linear layer of the file, with or without a bias."""
        return linear(hidden, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))
