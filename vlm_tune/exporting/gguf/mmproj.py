"""llama.cpp's mmproj file: what it can hold, how it is written, and what its tensors compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import conv2d, gelu, layer_norm, linear, scaled_dot_product_attention, silu

from vlm_tune.config.connectors import MlpConnector
from vlm_tune.errors import ModelError
from vlm_tune.exporting.gguf.writer import read_fields, read_tensors, write_gguf
from vlm_tune.exporting.hf_layout import vision_of
from vlm_tune.exporting.llava_layout import tower_reasons, vision_weights
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.quoting import applying

if TYPE_CHECKING:
    from gguf import GGUFWriter

PAD = (122, 116, 104)
"""The colour with which llama.cpp pads an image to a square: CLIP's mean."""
GELUS = ("gelu", "gelu_pytorch_tanh", "gelu_new")
ACTIVATIONS = (*GELUS, "quick_gelu", "silu")
CONNECTOR = {"layers.0": "mm.0", "layers.2": "mm.2", "norm": "v.post_ln"}
"""mmproj names of the connector's layers. A LayerNorm before the MLP is stored as the norm that
mmproj has after the tower's last block."""


def mmproj_reasons(config: VisionLanguageConfig) -> list[str]:
    """The reasons why llama.cpp can't hold a tower or a connector, from configs alone."""
    tower = config.model.tower
    connector = config.model.connector
    mlp = isinstance(connector, MlpConnector)
    depth = connector.depth if isinstance(connector, MlpConnector) else 2
    return tower_reasons(config) + applying(
        (
            getattr(tower, "class_token", False),
            "its connector gets the class token (model.tower.class_token)",
        ),
        (not mlp, f"its connector is of kind {connector.kind}"),
        (depth != 2, f"its connector has {depth} layers"),
    )


def mmproj_notes(model: VisionLanguageNetwork) -> list[str]:
    """Where llama.cpp's handling of images deviates from how the model was trained."""
    tower, images = vision_of(model)
    pads = images.resize == "pad"
    return applying(
        (
            vision_weights(tower)[0].model_type == "clip_vision_model",
            "llama.cpp versions with its issue 25814 (since pull request 13321, until 25844) put "
            "a CLIP tower's class token in the wrong place, and see images wrongly; SigLIP towers "
            "have none",
        ),
        (
            not pads,
            "llama.cpp pads images to squares, this model was trained with resize: "
            f"{images.resize}; give it square images",
        ),
        (
            pads and tuple(int(255 * value) for value in images.mean) != PAD,
            f"llama.cpp pads images with the colour {PAD}, this model was trained with its "
            "tower's own; give it square images",
        ),
    )


def write_mmproj(path: Path, model: VisionLanguageNetwork, dtype: str) -> None:
    """Writes the tower and the connector.

    Raises `ModelError` for an activation, a norm or a width that llama.cpp does not support.
    """
    tower, _ = vision_of(model)
    vision, state = vision_weights(tower)
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
        writer.add_clip_projector_type("mlp")
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
        # Without this field llama.cpp leaves out the last block.
        writer.add_array("clip.vision.feature_layer", [vision.num_hidden_layers])

    write_gguf(
        path, "clip", describe, _tensors(vision.num_hidden_layers, state, model.connector), dtype
    )


def _tensors(
    blocks: int, state: dict[str, torch.Tensor], connector: torch.nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, blocks)
    for key, tensor in state.items():
        if key.startswith("post_layernorm") or key.endswith("position_ids"):
            continue  # features are taken before the tower's last norm
        stored_name = names.get_name(
            f"vision_tower.vision_model.{key}", try_suffixes=(".weight", ".bias")
        )
        if stored_name is None:
            raise ModelError(f"mmproj has no place for the tower's {key}")
        yield stored_name, tensor
    for key, tensor in connector.state_dict().items():
        owner, _, kind = key.rpartition(".")
        yield f"{CONNECTOR[owner]}.{kind}", tensor


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
        (last,) = self.vision["feature_layer"]
        for number in range(last):
            hidden = self._block(f"v.blk.{number}", hidden)
        hidden = self._norm("v.post_ln", hidden)[:, int(first is not None) :]
        inner = gelu(self._linear("mm.0", hidden), approximate="none" if self.exact else "tanh")
        return self._linear("mm.2", inner)

    def _block(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        heads = self.vision["attention.head_count"]
        normed = self._norm(f"{name}.ln1", hidden)
        q, k, v = (
            self._linear(f"{name}.attn_{one}", normed).unflatten(-1, (heads, -1)).transpose(1, 2)
            for one in "qkv"
        )
        hidden = hidden + self._linear(
            f"{name}.attn_out", scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        inner = self._linear(f"{name}.ffn_up", self._norm(f"{name}.ln2", hidden))
        return hidden + self._linear(f"{name}.ffn_down", self._activation(inner))

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

    def _linear(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))
