"""Branches of a native model's rows, which are continued after one prefill.

Shapes: B rows, K branches of a row, L tokens, E width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlm_tune.data.batch import Batch
from vlm_tune.model.language.attention import MaskedAttention, whole_rows
from vlm_tune.model.language.causal import CausalBranches

if TYPE_CHECKING:
    from vlm_tune.model.language.native import NativeLLM


class NativeBranches(CausalBranches):
    """Branches of rows that a native model prefills with their images, see `Branches`."""

    def __init__(self, llm: NativeLLM, batch: Batch, leaves: torch.Tensor, new_tokens: int) -> None:
        self.reader = _Reader(llm, batch, leaves)
        embeds = llm.embed(batch.input_ids)
        super().__init__(
            llm, self.reader, MaskedAttention(), embeds, batch, leaves, new_tokens, cache=None
        )

    def select(self, places: torch.Tensor) -> None:
        """Drops branches, see `Branches`."""
        super().select(places)
        self.reader.ahead = self.reader.ahead.gather(1, places)


class _Reader:
    """A native model's body, called as a decoder's: once for whole rows, then for new tokens.

    Attributes:
        ahead: How far the branches' positions are from the numbers of their tokens, int64[B, K]:
            an image's tokens are more than the positions that it takes.
    """

    def __init__(self, llm: NativeLLM, batch: Batch, leaves: torch.Tensor) -> None:
        self.llm = llm
        self.batch = batch
        positions = batch.positions
        if positions is None:
            _, positions = whole_rows(batch.attention_mask)
        self.axes = llm.axes(batch)
        # A leaf is text, at one position on all axes.
        self.ahead = (self.axes[0] - positions).gather(1, leaves)
        self.is_prefilled = False

    def __call__(
        self, *, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, **options: Any
    ) -> Any:
        """The output for rows [B, L, E], and after them for tokens [B, K, E] of the branches."""
        if self.is_prefilled:
            return self.llm.body(
                inputs_embeds=inputs_embeds, position_ids=position_ids + self.ahead, **options
            )
        self.is_prefilled = True
        arguments = self.llm.arguments(self.batch) | {"position_ids": self.axes} | options
        return self.llm.body(**arguments)
