"""Attention of a decoder over joined rows, in training and in generation, by masks.

Shapes: B rows, K branches of a row, L tokens, S tokens of the input (virtual tokens not counted),
C columns of a KV cache, E width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn.functional import pad

from vlm_tune.compat import cache_name
from vlm_tune.model.language.kv_cache import (
    enlarge_cache,
    static_cache,
    steps_of_room,
    takes_static_cache,
)
from vlm_tune.model.language.masks import Blocks, layer_masks, tree_mask


class Prefill(Protocol):
    """Rows after their prefill, and the decode steps of the branches that continue them.

    Attributes:
        hidden: The rows' hidden states [B, L, E].
    """

    hidden: torch.Tensor

    def step(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """A decode step: hidden states [B, K, E] of new tokens [B, K, E] at positions [B, K]."""
        ...

    def select(self, places: torch.Tensor) -> None:
        """Drops all branches but those at `places` int64[B, K']."""
        ...


def whole_rows(row_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`visible_until` and positions [B, L] of rows of one sample each, for joined rows' masks.

    `row_mask` bool[B, L] is False for padding, on the right.
    """
    length = row_mask.shape[1]
    positions = torch.arange(length, device=row_mask.device).expand_as(row_mask)
    return torch.where(row_mask, length, 0), positions


class MaskedAttention:
    """Attention by the functions of transformers, with masks and its KV cache."""

    def by_intervals(self, model: Any) -> bool:
        """Whether rows need no mask on the model's device, but only where tokens stop being seen.

        `model` is the transformers model.
        """
        return False

    def mask(
        self,
        model: Any,
        row_mask: torch.Tensor,
        visible_until: torch.Tensor | None,
        positions: torch.Tensor | None,
        dtype: torch.dtype,
        length: int,
        *,
        joinable: bool,
        blocks: Blocks | None = None,
    ) -> Any:
        """The attention mask that the model's body takes for rows.

        Args:
            model: The transformers model.
            row_mask: bool[B, L], False for padding.
            visible_until: int[B, L] of joined rows, see `tree_mask`; None for rows of one sample.
            positions: Positions [B, L] in the samples of joined rows.
            dtype: The type of the embeddings.
            length: S, the number of last tokens that are queries.
            joinable: Whether the model takes masks of joined rows.
            blocks: The tokens that see each other both ways; None where none do.
        """
        if visible_until is None or positions is None:
            if blocks is None and (row_mask.device.type != "cuda" or not joinable):
                return row_mask.long()
            # transformers looks whether a mask of rows has padding, for which the host would wait.
            visible_until, positions = whole_rows(row_mask)
        tree = tree_mask(visible_until)[:, :, -length:]
        queries = positions[:, -length:]
        last = None if blocks is None else blocks.last(length)
        return layer_masks(model.config, tree, queries, positions, dtype, last)

    def prefill(
        self,
        model: Any,
        body: Any,
        embeds: torch.Tensor,
        visible_until: torch.Tensor,
        positions: torch.Tensor,
        visible: torch.Tensor,
        steps: int,
        blocks: Blocks | None = None,
    ) -> Prefill:
        """Prefills joined rows.

        Args:
            model: The transformers model.
            body: The model without its head.
            embeds: The rows [B, L, E].
            visible_until: int[B, L], see `tree_mask`.
            positions: Positions [B, L] in the samples.
            visible: bool[B, K, L], the tokens of its row that each branch sees.
            steps: The most decode steps that follow.
            blocks: As in `mask`.
        """
        if takes_static_cache(model, embeds.device):
            return StaticPrefill(
                model, body, embeds, visible_until, positions, visible, steps, blocks
            )
        return MaskedPrefill(model, body, embeds, visible_until, positions, visible, blocks)


class MaskedPrefill:
    """A prefill by masks, with a KV cache of transformers that grows.

    Attributes:
        cache: The KV cache, which begins with `cache` where that is given. `embeds` are then the
            rows' last tokens, and the other arguments are those of the whole rows.
    """

    def __init__(
        self,
        model: Any,
        body: Any,
        embeds: torch.Tensor,
        visible_until: torch.Tensor,
        positions: torch.Tensor,
        visible: torch.Tensor,
        blocks: Blocks | None = None,
        cache: Any = None,
    ) -> None:
        from transformers import DynamicCache

        self.config = model.config
        self.body = body
        # Without a config it keeps all tokens: which ones a window leaves out differs by branch.
        self.cache = DynamicCache() if cache is None else cache
        self.visible = visible
        self.cached_positions = positions
        length = embeds.shape[1]
        tree = tree_mask(visible_until)[:, :, -length:]
        queries = positions[:, -length:]
        last = None if blocks is None else blocks.last(length)
        mask = layer_masks(self.config, tree, queries, positions, embeds.dtype, last)
        self.hidden = _run(self.body, self.cache, embeds, mask, queries)

    def step(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """A decode step, see `Prefill`."""
        rows, branches = positions.shape
        new_tokens = torch.eye(branches, dtype=torch.bool, device=embeds.device)
        self.visible = torch.cat([self.visible, new_tokens.expand(rows, -1, -1)], -1)
        self.cached_positions = torch.cat([self.cached_positions, positions], -1)
        mask = layer_masks(
            self.config, self.visible[:, None], positions, self.cached_positions, embeds.dtype
        )
        return _run(self.body, self.cache, embeds, mask, positions)

    def select(self, places: torch.Tensor) -> None:
        """Drops all branches but those at `places` int64[B, K'].

        Their tokens stay in the cache, where no other branch sees them.
        """
        rows = torch.arange(len(places), device=places.device)[:, None]
        self.visible = self.visible[rows, places]


class StaticPrefill:
    """A prefill by masks, with a KV cache of transformers that has room for many decode steps.

    Until the cache is full and moves to a larger one, and between two calls of `select`, decode
    steps read and write tensors of the same shapes, and which columns of the cache are filled is a
    tensor too: the host takes no part in a step.
    """

    def __init__(
        self,
        model: Any,
        body: Any,
        embeds: torch.Tensor,
        visible_until: torch.Tensor,
        positions: torch.Tensor,
        visible: torch.Tensor,
        steps: int,
        blocks: Blocks | None = None,
    ) -> None:
        _, branches, length = visible.shape
        self.steps_taken = 0
        self.steps_left = steps
        room = branches * steps_of_room(0, steps)
        device = embeds.device
        self.config = model.config
        self.body = body
        self.cache = static_cache(self.config, length + room, device)
        # [B, C]
        self.cached_positions = pad(positions, (0, room))
        self.columns = torch.arange(length + room, device=device)
        self.filled = length
        self._open(visible)
        mask = layer_masks(
            self.config,
            pad(tree_mask(visible_until), (0, room), value=False),
            positions,
            self.cached_positions,
            embeds.dtype,
            None if blocks is None else blocks.padded(after=room),
        )
        self.hidden = _run(self.body, self.cache, embeds, mask, positions)

    def _open(self, visible: torch.Tensor) -> None:
        """Sets what K branches see: `visible` bool[B, K, filled], and of later columns their own.

        Each decode step fills K of these columns.
        """
        branches = visible.shape[1]
        later = len(self.columns) - self.filled
        step = torch.eye(branches, dtype=torch.bool, device=visible.device)
        new_tokens = step.repeat(1, -(-later // branches))[:, :later]
        # [B, K, C]
        self.visible = torch.cat([visible, new_tokens.expand(len(visible), -1, -1)], -1)
        self.next_columns = self.columns[self.filled : self.filled + branches].clone()

    def step(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """A decode step, see `Prefill`."""
        branches = positions.shape[1]
        if self.filled + branches > len(self.columns):
            self._enlarge(branches)
        self.cached_positions.index_copy_(1, self.next_columns, positions)
        visible = self.visible & (self.columns <= self.next_columns[-1])
        mask = layer_masks(
            self.config, visible[:, None], positions, self.cached_positions, embeds.dtype
        )
        self.next_columns += branches
        self.filled += branches
        self.steps_taken += 1
        self.steps_left -= 1
        return _run(self.body, self.cache, embeds, mask, positions)

    def _enlarge(self, branches: int) -> None:
        """Moves the cache to one with room for as many steps again."""
        length = self.filled + branches * steps_of_room(self.steps_taken, self.steps_left)
        enlarge_cache(self.cache, length)
        self.cached_positions = pad(self.cached_positions, (0, length - len(self.columns)))
        self.columns = torch.arange(length, device=self.columns.device)
        self._open(self.visible[..., : self.filled])

    def select(self, places: torch.Tensor) -> None:
        """Drops all branches but those at `places` int64[B, K']."""
        rows = torch.arange(len(places), device=places.device)[:, None]
        self._open(self.visible[rows, places, : self.filled])


def _run(
    body: Any, cache: Any, embeds: torch.Tensor, mask: Any, positions: torch.Tensor
) -> torch.Tensor:
    """Hidden states [B, S, E] of tokens that follow those in the cache."""
    return body(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        **{cache_name(): cache},
    ).last_hidden_state
