"""Gated cross-attention inside the LLM: the text attends to the image, which takes one slot.

Shapes: B rows, L tokens of a row, S tokens of a layer's input, M media places, J images of a row,
N' connected tokens, E LLM width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from vlm_tune.config.connectors import CrossAttentionConnector
from vlm_tune.data.batch import Batch
from vlm_tune.errors import ModelError
from vlm_tune.model.connectors.instruction import places
from vlm_tune.model.connectors.layers import Attention, feed_forward, matched
from vlm_tune.model.connectors.projectors import Connector, splice
from vlm_tune.model.per_thread import PerThread


@dataclass
class Seen:
    """The media to which a batch's text attends.

    `media` is [B, J * N', E]; `mask` is bool[B, L, J * N'], true where a token sees a media token.
    """

    media: torch.Tensor
    mask: torch.Tensor

    def for_states(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Media and mask for hidden states [rows, length, E] of this batch.

        In generation, new tokens see the media that the last token of the prompt sees, and beams
        repeat each row in place. Raises `ModelError` for states of another batch.
        """
        beams, rest = divmod(rows, len(self.media))
        if rest:
            raise ModelError(
                f"{rows} rows reach the cross-attention blocks, the batch has {len(self.media)}; "
                "the LLM's input comes from `embed`"
            )
        mask = (
            self.mask if length == self.mask.shape[1] else self.mask[:, -1:].expand(-1, length, -1)
        )
        if beams == 1:
            return self.media, mask
        return self.media.repeat_interleave(beams, 0), mask.repeat_interleave(beams, 0)


class GatedBlock(nn.Module):
    """Cross-attention and a feed-forward layer, each with a gate tanh(a) initialised to zero."""

    def __init__(self, width: int, heads: int, head_width: int | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.feed_norm = nn.LayerNorm(width)
        self.attention = Attention(width, width, heads, head_width=head_width)
        self.feed = feed_forward(width, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_gate = nn.Parameter(torch.zeros(1))

    def forward(self, states: torch.Tensor, seen: Seen | None) -> torch.Tensor:
        """New states [B, S, E]; a token that sees no media passes only through the feed-forward."""
        dtype = states.dtype
        states = matched(states, self)
        if seen is not None:
            attended = self.attention(self.norm(states), *seen.for_states(*states.shape[:2]))
            states = states + (self.attention_gate.tanh() * attended).to(states.dtype)
        fed = (self.feed_gate.tanh() * self.feed(self.feed_norm(states))).to(states.dtype)
        return (states + fed).to(dtype)


class CrossAttention(Connector):
    """Gated cross-attention blocks before every n-th layer of the LLM (Flamingo, arXiv:2204.14198).

    An image takes one slot, filled with a learned marker; the blocks attend to the tokens of the
    connector `base`. By configuration, a token sees all images before it, or the last one with the
    images directly beside that (such as tiles and frames). The blocks belong to the connector and
    are called by hooks on the LLM's layers: those of a decoder, or of an encoder-decoder's encoder.
    """

    fills_slots = False

    def __init__(self, config: CrossAttentionConnector, base: Connector, llm_width: int) -> None:
        super().__init__()
        # Not `config`: PEFT reads an attribute of that name as transformers' config.
        self.section = config
        self.base = base
        self.width = llm_width
        self.marker = nn.Parameter(0.02 * torch.randn(llm_width))
        self.blocks = nn.ModuleList()
        self.seen = PerThread()
        # Backward passes on a GPU have threads of their own, which recompute checkpointed layers.
        self._latest: Seen | None = None

    def tokens(self, tower_tokens: int) -> int:
        """1, the slot of the marker."""
        self.base.tokens(tower_tokens)
        return 1

    @property
    def closed(self) -> bool:
        return not any(
            gate.requires_grad or gate.is_meta or bool(gate.any())
            for name, gate in self.blocks.named_parameters()
            if name.endswith("_gate")
        )

    def attach(self, model: Any) -> None:
        """Creates the blocks and hooks them before the LLM's layers.

        Raises `ModelError` for an LLM with too few layers.
        """
        layers = text_layers(model)
        every = self.section.every
        if every > len(layers):
            raise ModelError(
                f"model.connector.every is {every}, and the LLM has {len(layers)} layers"
            )
        for place, layer in enumerate(layers[every - 1 :: every]):
            self.blocks.append(GatedBlock(self.width, self.section.heads, self.section.head_width))
            layer.register_forward_pre_hook(partial(self._before_layer, place), with_kwargs=True)

    def _before_layer(
        self, place: int, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[Any, Any]:
        # A compiler can't trace a thread's value.
        by_thread = not torch.compiler.is_compiling() and self.seen.is_set
        seen = self.seen.value if by_thread else self._latest
        if args:
            return (self.blocks[place](args[0], seen), *args[1:]), named
        return args, {**named, "hidden_states": self.blocks[place](named["hidden_states"], seen)}

    def _show(self, seen: Seen | None) -> None:
        """Sets the media to which this thread's next texts attend."""
        self.seen.value = self._latest = seen
        self.seen.is_set = True

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[M, N, D] to [M, 1 + N', E]: the marker, and the tokens for the blocks."""
        media = self.base(features)
        return torch.cat([self.marker.to(media.dtype).expand(len(media), 1, -1), media], dim=1)

    def join(
        self, embeds: torch.Tensor, connected: torch.Tensor | None, batch: Batch
    ) -> torch.Tensor:
        """The LLM's input: embeds [B, L, E] with markers in the slots.

        The media stay set until the next batch, because activation checkpointing reads them again.
        """
        if connected is None:
            self._show(None)
            return embeds
        media = connected[:, 1:]
        rows = len(embeds)
        if not len(batch.media_index):
            blind = torch.zeros(
                *embeds.shape[:2], media.shape[1], dtype=torch.bool, device=embeds.device
            )
            self._show(Seen(media.expand(rows, -1, -1), blind))
            return embeds + 0.0 * connected.sum().to(embeds.dtype)
        row, column = places(batch, 1)
        number = batch.image_mask.cumsum(1)[row, column] - 1
        most = batch.most_slots
        row_media = media.new_zeros(rows, most, *media.shape[1:]).index_put((row, number), media)
        mask = self._visible(batch, row, column, number, most)
        self._show(Seen(row_media.flatten(1, 2), mask.repeat_interleave(media.shape[1], dim=2)))
        return splice(embeds, connected[:, 0], batch.slots, batch.ids)

    def _visible(
        self, batch: Batch, row: torch.Tensor, column: torch.Tensor, number: torch.Tensor, most: int
    ) -> torch.Tensor:
        """bool[B, L, J], true where a token sees an image of its row.

        Images are at (row, column), and `number` is an image's index in its row.
        """
        slots = batch.image_mask
        mask = slots.cumsum(1)[..., None] > torch.arange(most, device=slots.device)
        keys = [batch.packed]
        if self.section.images == "last":
            begins = slots.clone()
            begins[:, 1:] &= ~slots[:, :-1]
            keys.append(begins.cumsum(1))  # the number of the last run of images
        for key in keys:
            if key is not None:  # tokens see images with an equal key
                image_key = key.new_full((len(slots), most), -1).index_put(
                    (row, number), key[row, column]
                )
                mask = mask & (key[..., None] == image_key[:, None])
        return mask


def text_layers(model: Any) -> nn.ModuleList:
    """The layers of a decoder of transformers, or of an encoder-decoder's encoder.

    Raises `ModelError` if they are not found.
    """
    root = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    count = model.config.get_text_config().num_hidden_layers
    stacks = (
        module
        for module in root.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    )
    stack = next(stacks, None)
    if stack is None:
        raise ModelError(
            f"the layers of {type(model).__name__} were not found, so none can look at images"
        )
    return stack
