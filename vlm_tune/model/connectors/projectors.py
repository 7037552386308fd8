"""Base class of the connectors, and connectors that project single tokens or squares of tokens.

Shapes: M media, N tower tokens, D tower width, N' connected tokens, E LLM width, B rows, L tokens
of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlm_tune.config.connectors import (
    AvgPoolConnector,
    LinearConnector,
    MlpConnector,
    PixelShuffleConnector,
    Projector,
)
from vlm_tune.data.batch import Batch
from vlm_tune.errors import ModelError
from vlm_tune.model.connectors.instruction import Reader
from vlm_tune.model.pooling import grid_means
from vlm_tune.quoting import name_list


class Connector(nn.Module):
    """Base class of the connectors, which map features [M, N, D] to [M, N', E] and join the LLM.

    A connector with `needs_text` is called with the `Text` of each media place, and therefore once
    per place rather than once per image.
    """

    needs_text = False
    fills_slots = True
    """Whether the LLM gets image features only through the slots."""

    newline: nn.Parameter | None
    """A learned token [E] for the ends of the rows of joined tiles, the last token of each media
    item, if the connector has one. Which slots it fills is `vlm_tune/data/media_slots.py`'s."""

    closed = False
    """Whether frozen gates of value 0 stop every gradient: LoRA inside could not train."""

    reader: Reader | None = None
    """Converter of the instruction to the connector's own vocabulary, if it has one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("newline", None)

    def tokens(self, tower_tokens: int) -> int:
        """Number of slots of an image in the LLM's input, for a number of tower tokens.

        Raises `ModelError` if the tower tokens don't fit the connector.
        """
        return tower_tokens

    def attach(self, model: Any) -> None:
        """Adds the connector's modules to the LLM; none for connectors that only fill slots."""

    def join(
        self, embeds: torch.Tensor, connected: torch.Tensor | None, batch: Batch
    ) -> torch.Tensor:
        """The LLM's input [B, L, E]: embeds with connected [M, N', E] in the slots.

        For a batch without media, `connected` is None or a blank image's: the latter is added with
        a factor of zero, so that it takes part in the graph without effect. Raises `ModelError` as
        `splice` does.
        """
        if connected is None:
            return embeds
        if not len(batch.media_index):
            return embeds + 0.0 * connected.sum().to(embeds.dtype)
        return splice(embeds, self.arranged(connected, batch), batch.slots, batch.ids)

    def arranged(self, connected: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The tokens [P, E] of the slots, of connected [M, N', E].

        They are all in order, or those that `batch.slot_tokens` names, of joined tiles and of
        images that keep their shape, or sums of these by `batch.slot_shares`.
        """
        if batch.slot_tokens is None:
            return self.shown(connected).flatten(0, 1)
        places, numbers = batch.slot_tokens
        if batch.slot_shares is None:
            return connected[places, numbers]
        # One term after the other: four times the slots at once would take as much more memory.
        filled = torch.zeros((), dtype=torch.float32, device=connected.device)
        terms = zip(places.unbind(1), numbers.unbind(1), batch.slot_shares.unbind(1), strict=True)
        for place, number, share in terms:
            filled = filled + connected[place, number] * share[:, None]
        return filled.to(connected.dtype)

    def shown(self, connected: torch.Tensor) -> torch.Tensor:
        """The tokens of connected [M, N', E] that show an image: all but the one for rows' ends."""
        return connected if self.newline is None else connected[:, :-1]

    def ended(self, connected: torch.Tensor) -> torch.Tensor:
        """Connected [M, N, E] with the token for rows' ends behind, if the connector has one."""
        if self.newline is None:
            return connected
        ends = self.newline.to(connected.dtype).expand(len(connected), 1, -1)
        return torch.cat([connected, ends], dim=1)


def splice(
    embeds: torch.Tensor, features: torch.Tensor, slots: torch.Tensor, ids: Sequence[str]
) -> torch.Tensor:
    """Puts features [P, E] into the slots of embeds [B, L, E], in row order.

    `slots` int64[P] are their places in the flattened rows. Raises `ModelError` with both counts
    and the sample ids if slots and features differ in number.
    """
    if len(slots) != len(features):
        raise ModelError(
            f"{len(slots)} image slots and {len(features)} image features in {name_list(ids)}"
        )
    length = embeds.shape[1]
    # A view would be another input to a compiled block than those of the blocks after it.
    return embeds.index_put((slots // length, slots % length), features.to(embeds.dtype))


def row_end(newline: bool, llm_width: int) -> nn.Parameter | None:
    """The learned token at the end of a row, as large as transformers' LLaVA-NeXT draws it."""
    return nn.Parameter(torch.randn(llm_width) / math.sqrt(llm_width)) if newline else None


def entry(config: Projector, width: int) -> nn.Module:
    """The LayerNorm on the connector's input, or the identity, as configured."""
    return nn.LayerNorm(width) if config.norm else nn.Identity()


def mlp(width: int, llm_width: int, depth: int, bias: bool = True) -> nn.Sequential:
    """An MLP of `depth` linear layers with GELU between them."""
    layers: list[nn.Module] = [nn.Linear(width, llm_width, bias=bias)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(llm_width, llm_width, bias=bias)]
    return nn.Sequential(*layers)


def square(tower_tokens: int, kind: str) -> int:
    """The side of the square grid of the tower's tokens. Raises `ModelError` if they form none."""
    side = math.isqrt(tower_tokens)
    if side * side != tower_tokens:
        raise ModelError(
            f"a connector of kind {kind} needs a square grid of tokens, "
            f"the tower gives {tower_tokens}: set model.tower.grid, and leave out the class token"
        )
    return side


class Linear(Connector):
    """One linear projection (LLaVA, arXiv:2304.08485)."""

    def __init__(self, config: LinearConnector, width: int, llm_width: int) -> None:
        super().__init__()
        self.norm = entry(config, width)
        self.linear = nn.Linear(width, llm_width)
        self.newline = row_end(config.newline, llm_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[M, N, D] to [M, N, E], or with a token for rows' ends to [M, N + 1, E]."""
        return self.ended(self.linear(self.norm(features)))


class Mlp(Connector):
    """Linear layers with GELU between them (LLaVA-1.5, arXiv:2310.03744)."""

    def __init__(self, config: MlpConnector, width: int, llm_width: int) -> None:
        super().__init__()
        self.norm = entry(config, width)
        self.layers = mlp(width, llm_width, config.depth, config.bias)
        self.newline = row_end(config.newline, llm_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[M, N, D] to [M, N, E], or with a token for rows' ends to [M, N + 1, E]."""
        return self.ended(self.layers(self.norm(features)))


class PixelShuffle(Connector):
    """Pixel shuffle and an MLP (Idefics3, SmolVLM, InternVL).

    Each square of factor x factor tokens becomes one token, concatenated by channel.
    """

    def __init__(self, config: PixelShuffleConnector, width: int, llm_width: int) -> None:
        super().__init__()
        self.factor = config.factor
        joined = width * config.factor**2
        self.norm = entry(config, joined)
        self.layers = mlp(joined, llm_width, config.depth, config.bias)

    def tokens(self, tower_tokens: int) -> int:
        """The tower's tokens divided by factor²."""
        side = square(tower_tokens, "pixel_shuffle")
        if side % self.factor:
            raise ModelError(
                f"a pixel shuffle by {self.factor} does not divide the tower's grid of "
                f"{side} x {side}; set model.tower.grid"
            )
        return (side // self.factor) ** 2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[M, N, D] to [M, N / factor², E]."""
        side = math.isqrt(self.tokens(features.shape[1]))
        squares = features.unflatten(1, (side, self.factor, side, self.factor)).transpose(2, 3)
        return self.layers(self.norm(squares.flatten(3).flatten(1, 2)))


class AvgPool(Connector):
    """The mean of the tokens in each cell of a grid, then an MLP."""

    def __init__(self, config: AvgPoolConnector, width: int, llm_width: int) -> None:
        super().__init__()
        self.grid = config.grid
        self.norm = entry(config, width)
        self.layers = mlp(width, llm_width, config.depth)

    def tokens(self, tower_tokens: int) -> int:
        """grid², for any number of tower tokens that is large enough."""
        if square(tower_tokens, "avg_pool") < self.grid:
            raise ModelError(
                f"model.connector.grid: the tower's {tower_tokens} tokens can't be pooled "
                f"to a larger grid of {self.grid} x {self.grid}"
            )
        return self.grid**2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[M, N, D] to [M, grid², E]."""
        side = math.isqrt(features.shape[1])
        return self.layers(grid_means(self.norm(features), (side, side), self.grid))
