"""Vision towers of variable resolution that keep the aspect ratio: Pixtral's and NaFlex ones.

Shapes: U images, N patches of the one with most, P pixels of a patch's side, D tower width, H
heads, W width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from vlm_tune.config.towers import TransformersTower
from vlm_tune.data.images.shaped import LongestEdge, MostPatches, Sizing
from vlm_tune.errors import ModelError
from vlm_tune.model.vision.base import VisionTower
from vlm_tune.model.vision.transformers_tower import check_patches, drop_unused

BLANK = 12
"""Rows and columns of patches of a blank image: any square of up to 4 x 4 divides them."""
UNFIT = {"grid": None, "tiles": [], "split": None, "class_token": False, "resize": "crop"}
"""Options of towers of one shape that say nothing here, with their defaults."""


class ShapedVision(VisionTower):
    """Base class of towers that keep an image's aspect ratio; a subclass implements `states`.

    The tower takes patches and their places, as `vlm_tune/data/images/patches.py` has them.
    """

    keeps_shape = True
    patch: int
    most_patches: int
    width: int

    def __init__(
        self, config: TransformersTower, source: dict[str, Any], image_size: int, patch: int
    ) -> None:
        odd = [name for name, default in UNFIT.items() if getattr(config, name) != default]
        if odd:
            raise ModelError(
                f"model.tower.{odd[0]}: the tower takes images of any shape, and {odd[0]} is for "
                "towers that take them in one"
            )
        super().__init__(config, image_size, source["mean"], source["std"])
        self.rebuild = source
        self.patch = patch

    def _sized(self, most_patches: int, width: int) -> None:
        """Notes the patches of the largest image, and the width of the features."""
        self.most_patches = most_patches
        self.width = width
        self.input_shape = (most_patches, 3 * self.patch**2)

    def sizing(self, merge: int) -> Sizing:
        """The size that an image gets, where squares of merge x merge patches take a slot."""
        raise NotImplementedError

    def states(
        self, patches: torch.Tensor, places: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Features [U, N, D] of normalised patches [U, N, 3, P²].

        `mask` bool[U, 1, 1, N] is true where there is a patch; None where all are.
        """
        raise NotImplementedError

    def forward(self, pixels: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """Features [U, N, D] of uint8 patches [U, N, 3 P²] at `places` int64[U, N, 2].

        Without places they are those of square images, row by row.
        """
        if places is None:
            numbers = torch.arange(pixels.shape[1], device=pixels.device)
            side = round(pixels.shape[1] ** 0.5)
            places = torch.stack([numbers // side, numbers % side], dim=1).expand(
                len(pixels), -1, -1
            )
            mask = None
        else:
            mask = (places[..., 0] >= 0)[:, None, None]
        dtype = next(self.parameters()).dtype
        patches = pixels.unflatten(2, (3, -1)).float()
        patches = patches * self.scale.view(3, 1) - self.offset.view(3, 1)
        return self.states(patches.to(dtype), places.clamp(min=0), mask)

    def blank(self, device: torch.device) -> torch.Tensor:
        """A small square image of zeros."""
        shape = (1, BLANK**2, self.input_shape[1])
        return torch.zeros(shape, dtype=self.input_dtype, device=device)

    def measure(self) -> tuple[int, int]:
        """(patches of the largest image, width)."""
        return self.most_patches, self.width


class PaddedAttention(nn.Module):
    """Pixtral's attention over images side by side in a batch, with its projections.

    transformers' own takes all images as one row, whose mask grows with the square of its length.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.head_dim = attention.head_dim
        self.q_proj = attention.q_proj
        self.k_proj = attention.k_proj
        self.v_proj = attention.v_proj
        self.o_proj = attention.o_proj

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, None]:
        """[U, N, D] to [U, N, D], as transformers' layers call it.

        `attention_mask` is that of `ShapedVision.states`, and the cosines and sines are [U, N, W].
        """
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cosines, sines = (part[:, None] for part in position_embeddings)
        attended = scaled_dot_product_attention(
            rotated(query, cosines, sines), rotated(key, cosines, sines), value, attention_mask
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2)), None


def rotated(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """States [U, H, N, W], whose halves are pairs, turned by angles [U, 1, N, W]."""
    first, second = states.chunk(2, dim=-1)
    return states * cosines + torch.cat([-second, first], dim=-1) * sines


def used_blocks(blocks: nn.ModuleList, layer: int | list[int]) -> nn.ModuleList:
    """The blocks that `model.tower.layer` needs.

    Raises `ModelError` for one there is not, and for several.
    """
    if isinstance(layer, list):
        raise ModelError(
            f"model.tower.layer: {layer} are several layers, and a tower that keeps an image's "
            "shape gives those of one"
        )
    if -layer > len(blocks):
        raise ModelError(
            f"model.tower.layer: the tower has {len(blocks)} blocks, there is no layer {layer}"
        )
    return blocks[: len(blocks) + layer + 1]


class PixtralVision(ShapedVision):
    """Pixtral's tower, with rotary positions of two dimensions; features are a layer's states."""

    def __init__(self, config: TransformersTower, source: dict[str, Any], model: Any) -> None:
        vision = model.config
        size = config.image_size or vision.image_size
        patch = vision.patch_size
        super().__init__(config, source, size, patch)
        if config.final_norm:
            raise ModelError(
                "model.tower.final_norm: a Pixtral's tower has no norm after its last block"
            )
        if config.max_num_patches is not None:
            raise ModelError(
                "model.tower.max_num_patches: a Pixtral's images are bounded by image_size, their "
                "longest edge"
            )
        check_patches(size, patch)
        model.transformer.layers = used_blocks(model.transformer.layers, config.layer)
        for layer in model.transformer.layers:
            layer.attention = PaddedAttention(layer.attention)
        self.model = model
        self._sized((size // patch) ** 2, vision.hidden_size)

    def sizing(self, merge: int) -> Sizing:
        return LongestEdge(self.image_size, self.patch * merge)

    def states(
        self, patches: torch.Tensor, places: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        weight = self.model.patch_conv.weight
        hidden = self.model.ln_pre(nn.functional.linear(patches.flatten(2), weight.flatten(1)))
        turns = self.model.patch_positional_embedding(hidden, places.flatten(0, 1))
        cosines, sines = (part.view(*places.shape[:2], -1) for part in turns)
        return self.model.transformer(
            inputs_embeds=hidden, attention_mask=mask, position_embeddings=(cosines, sines)
        ).last_hidden_state


class NaFlexVision(ShapedVision):
    """SigLIP 2's NaFlex tower, whose positions are resized to each image's shape."""

    def __init__(self, config: TransformersTower, source: dict[str, Any], model: Any) -> None:
        vision = model.config
        most = config.max_num_patches or vision.num_patches
        super().__init__(config, source, vision.patch_size * math.isqrt(most), vision.patch_size)
        if config.image_size is not None or config.row_ends:
            odd = "image_size" if config.image_size is not None else "row_ends"
            raise ModelError(
                f"model.tower.{odd}: a NaFlex tower has none; its images are bounded by "
                "max_num_patches"
            )
        model.encoder.layers = used_blocks(model.encoder.layers, config.layer)
        self.norm = model.post_layernorm if config.final_norm else nn.Identity()
        model.post_layernorm = nn.Identity()
        drop_unused(model)
        self.model = model
        self._sized(most, vision.hidden_size)

    def sizing(self, merge: int) -> Sizing:
        return MostPatches(self.most_patches // merge**2, self.patch * merge)

    def states(
        self, patches: torch.Tensor, places: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        embeddings = self.model.embeddings
        # transformers' patches have the colours of a pixel together.
        hidden = embeddings.patch_embedding(patches.transpose(2, 3).flatten(2))
        hidden = hidden + resized_positions(embeddings.position_embedding.weight, places)
        return self.norm(
            self.model.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
        )


def resized_positions(table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Position embeddings [U, N, D] of patches at `places` int64[U, N, 2].

    The square table [S², D] is resized to each image's shape, bilinear with antialiasing, as
    torch's `interpolate` resizes a single one.
    """
    side = math.isqrt(len(table))
    scale = side / (places.amax(1, keepdim=True) + 1).float()
    reach = scale.clamp(min=1)[..., None]
    centres = ((places.float() + 0.5) * scale - 0.5)[..., None]
    source = torch.arange(side, device=table.device, dtype=torch.float32)
    weights = (1 - (source - centres).abs() / reach).clamp(min=0)
    weights = weights / weights.sum(-1, keepdim=True)
    rows, columns = weights.unbind(2)
    grid = (rows[..., :, None] * columns[..., None, :]).flatten(2)
    return (grid @ table.float()).to(table.dtype)


SHAPED: dict[str, type[PixtralVision | NaFlexVision]] = {
    "pixtral": PixtralVision,
    "siglip2_vision_model": NaFlexVision,
}
"""Towers that keep an image's shape, by transformers' model type."""
