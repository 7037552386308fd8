"""llama.cpp's computation with the tensors of an mmproj file.

Shapes: N tokens of a tower, D its width, H heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
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

    def encode(
        self,
        pixels: torch.Tensor,
        *,
        rms: bool = False,
        class_last: bool = False,
        turned: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The tower's states [N, D] of an image's pixels uint8[3, H, W], without a class token.

        Args:
            pixels: the image.
            rms: whether the norms are RMSNorms.
            class_last: whether the class token stands behind the patches.
            turned: turns queries and keys [H, N, W] by their positions.
        """
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
        count = len(hidden)
        first = 0
        if "v.class_embd" in self.tensors:
            token = self.tensors["v.class_embd"].view(1, -1)
            hidden = torch.cat([hidden, token] if class_last else [token, hidden])
            first = int(not class_last)
        if "v.position_embd.weight" in self.tensors:
            hidden = hidden + self.tensors["v.position_embd.weight"]
        norm = self.rms_norm if rms else self.norm
        hidden = norm("v.pre_ln", hidden)
        (last,) = self.vision.get("feature_layer", [self.vision["block_count"]])
        for number in range(last):
            name = f"v.blk.{number}"
            attended = self._attention(name, norm(f"{name}.ln1", hidden), turned)
            hidden = hidden + self._scaled(f"{name}.ls1", attended)
            inner = self._ffn(name, norm(f"{name}.ln2", hidden))
            hidden = hidden + self._scaled(f"{name}.ls2", inner)
        return norm("v.post_ln", hidden)[first : first + count]

    def _attention(
        self,
        name: str,
        hidden: torch.Tensor,
        turned: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        heads = self.vision["attention.head_count"]
        q, k, v = (
            self.linear(f"{name}.attn_{one}", hidden).unflatten(-1, (heads, -1)).transpose(0, 1)
            for one in "qkv"
        )
        if turned is not None:
            q = turned(q)
            k = turned(k)
        attended = scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        return self.linear(f"{name}.attn_out", attended)

    def _ffn(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        inner = self.linear(f"{name}.ffn_up", hidden)
        if f"{name}.ffn_gate.weight" in self.tensors:
            inner = inner * self._activation(self.linear(f"{name}.ffn_gate", hidden))
        else:
            inner = self._activation(inner)
        return self.linear(f"{name}.ffn_down", inner)

    def _scaled(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        scale = self.tensors.get(f"{name}.weight")
        return hidden if scale is None else hidden * scale

    def _activation(self, inner: torch.Tensor) -> torch.Tensor:
        if self.fields["clip.use_gelu"]:
            return gelu(inner, approximate="none" if self.exact == "gelu" else "tanh")
        return silu(inner) if self.fields["clip.use_silu"] else inner * torch.sigmoid(1.702 * inner)

    def mlp(self, first: str, second: str, hidden: torch.Tensor) -> torch.Tensor:
        """Two linear layers of the file with GELU between them, as connectors have it."""
        inner = gelu(self.linear(first, hidden), approximate="none" if self.exact else "tanh")
        return self.linear(second, inner)

    def norm(self, name: str, hidden: torch.Tensor, eps: float | None = None) -> torch.Tensor:
        """A LayerNorm of the file, which adds its own `eps`; the identity where there is none."""
        weight = self.tensors.get(f"{name}.weight")
        if weight is None:
            return hidden
        bias = self.tensors[f"{name}.bias"]
        return layer_norm(hidden, weight.shape, weight, bias, self.eps if eps is None else eps)

    def rms_norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """An RMSNorm of the file; the identity where there is none."""
        weight = self.tensors.get(f"{name}.weight")
        return hidden if weight is None else rms_norm(hidden, weight.shape, weight, self.eps)

    @property
    def eps(self) -> float:
        """The number that the norms add before they divide."""
        return self.vision["attention.layer_norm_epsilon"]

    def shuffled(self, hidden: torch.Tensor) -> torch.Tensor:
        """States [N, D] of a square joined to [N / f², f² D], as `build_patch_merge_permute` does.

        It joins f tokens of a row, then f rows.
        """
        factor = self.vision["projector.scale_factor"]
        side = self.vision["image_size"] // self.vision["patch_size"]
        width = hidden.shape[-1]
        joined = hidden.reshape(side, side // factor, factor * width)
        by_column = joined.transpose(0, 1)
        squares = by_column.reshape(side // factor, side // factor, factor * factor * width)
        return squares.transpose(0, 1).flatten(0, 1)

    def linear(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """A linear layer of the file, with or without a bias."""
        return linear(hidden, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))
