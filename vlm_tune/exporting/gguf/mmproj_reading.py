"""llama.cpp's computation with the tensors of an mmproj file.

Shapes: N tokens of a tower, D its width, H heads, W width of a head.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.functional import (
    conv2d,
    gelu,
    layer_norm,
    linear,
    rms_norm,
    scaled_dot_product_attention,
    silu,
)

from vlm_tune.exporting.gguf.projectors import PROJECTORS
from vlm_tune.exporting.gguf.writer import read_fields, read_tensors

BY_NAME = {projector.name: projector for projector in PROJECTORS.values()}


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
        self.projector = BY_NAME[self.fields["clip.projector_type"]]

    @torch.inference_mode()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """An image's tokens [T, E] of its pixels uint8[3, H, W]."""
        return self.projector.features(self, pixels)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The tower's states [N, D] of an image's pixels uint8[3, H, W], without a class token."""
        mean, std = (
            torch.tensor(self.vision[f"image_{kind}"])[:, None, None] for kind in ("mean", "std")
        )
        patches = conv2d(
            (pixels / 255 - mean) / std,
            self.tensors["v.patch_embd.weight"],
            self.tensors.get("v.patch_embd.bias"),
            stride=self.vision["patch_size"],
        )
        hidden = patches.flatten(1).T
        first = self.tensors.get("v.class_embd")
        if first is not None:
            hidden = torch.cat([first.view(1, -1), hidden])
        hidden = self.norm("v.pre_ln", hidden + self.tensors["v.position_embd.weight"])
        (last,) = self.vision.get("feature_layer", [self.vision["block_count"]])
        for number in range(last):
            hidden = self._block(f"v.blk.{number}", hidden)
        return self.norm("v.post_ln", hidden)[int(first is not None) :]

    def _block(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        heads = self.vision["attention.head_count"]
        normed = self.norm(f"{name}.ln1", hidden)
        q, k, v = (
            self.linear(f"{name}.attn_{one}", normed).unflatten(-1, (heads, -1)).transpose(0, 1)
            for one in "qkv"
        )
        hidden = hidden + self.linear(
            f"{name}.attn_out", scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        )
        inner = self.linear(f"{name}.ffn_up", self.norm(f"{name}.ln2", hidden))
        return hidden + self.linear(f"{name}.ffn_down", self._activation(inner))

    def _activation(self, inner: torch.Tensor) -> torch.Tensor:
        if self.fields["clip.use_gelu"]:
            return gelu(inner, approximate="none" if self.exact == "gelu" else "tanh")
        return silu(inner) if self.fields["clip.use_silu"] else inner * torch.sigmoid(1.702 * inner)

    def mlp(self, first: str, second: str, hidden: torch.Tensor) -> torch.Tensor:
        """Two linear layers of the file with GELU between them, as connectors have it."""
        inner = gelu(self.linear(first, hidden), approximate="none" if self.exact else "tanh")
        return self.linear(second, inner)

    def norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """A LayerNorm of the file; the identity where there is none."""
        weight = self.tensors.get(f"{name}.weight")
        if weight is None:
            return hidden
        return layer_norm(hidden, weight.shape, weight, self.tensors[f"{name}.bias"], self.eps)

    def rms_norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """An RMSNorm of the file."""
        weight = self.tensors[f"{name}.weight"]
        return rms_norm(hidden, weight.shape, weight, self.eps)

    @property
    def eps(self) -> float:
        """The number that all norms add before they divide."""
        return self.vision["attention.layer_norm_epsilon"]

    def linear(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """A linear layer of the file, with or without a bias."""
        return linear(hidden, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))
