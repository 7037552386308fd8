"""The words that a text-conditioned connector reads with an image.

Shapes: B rows, L tokens of a row, M media places, T instruction tokens, E LLM width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from vlm_tune.data.types import IGNORE_INDEX, Batch
from vlm_tune.errors import ModelError


@dataclass
class Text:
    """The instruction of each media place: embeds [M, T, E] and ids int64[M, T] as the LLM has them, mask bool[M, T].

    Tokens stand at the left, in their order; each place has at least one (a padding token, where there is no word).
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    ids: torch.Tensor

    def last(self, most: int) -> Text:
        """The last `most` tokens of each instruction."""
        if self.mask.shape[1] <= most:
            return self
        skipped = (self.mask.sum(1, keepdim=True) - most).clamp(min=0)
        kept = skipped + torch.arange(most, device=skipped.device)
        embeds = self.embeds.gather(1, kept[..., None].expand(-1, -1, self.embeds.shape[2]))
        return Text(embeds, self.mask.gather(1, kept), self.ids.gather(1, kept))


class Reader:
    """Gives instructions in the ids of a connector's own `tokenizer`, with that one's start and end tokens."""

    def __init__(self, llm_tokenizer: Any, tokenizer: Any, most: int) -> None:
        self.tokenizer = tokenizer
        self._llm = llm_tokenizer
        self._most = most
        self._read = lru_cache(100_000)(self._ids)

    def _ids(self, ids: tuple[int, ...]) -> list[int]:
        text = self._llm.decode(list(ids), skip_special_tokens=True)
        return self.tokenizer(text, truncation=True, max_length=self._most).input_ids

    def __call__(self, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
        """ids int64[M, T'] and mask bool[M, T'] of each instruction, at the left."""
        rows = [
            self._read(tuple(ids[mask].tolist()))
            for ids, mask in zip(text.ids.cpu(), text.mask.cpu(), strict=True)
        ]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), max(int(lengths.max()), 1), dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return ids.to(text.ids.device), mask.to(text.ids.device)


def places(batch: Batch, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column int64[M] where the slots of each media place begin, at `tokens` slots each.

    Raises `ModelError` with both counts and the sample ids if the batch's slots are not that many.
    """
    slots = batch.image_mask.nonzero()
    media = len(batch.media_index)
    if len(slots) != media * tokens:
        raise ModelError(
            f"{len(slots)} image slots and {media * tokens} image features in {', '.join(batch.ids)}"
        )
    starts = slots[::tokens]
    return starts[:, 0], starts[:, 1]


def instructions(
    batch: Batch,
    embeds: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    *,
    answers_inside: bool,
) -> Text:
    """The text of the samples in which places stand, given the rows' embeds [B, L, E].

    Where the answers are inside the rows (a decoder's), it is the text up to the position that predicts its first trained token: the
    same in training and in generation, and nothing that follows from it may be seen before. Else it is all text.
    Raises `ModelError` for branched rows, whose questions share one image.
    """
    if batch.branched:
        raise ModelError(
            "data.group: a text-conditioned connector reads an image once a question: set data.group: none"
        )
    mask = batch.attention_mask[rows] & ~batch.image_mask[rows]
    samples = batch.packed
    if samples is not None:
        mask &= samples[rows] == samples[rows, columns][:, None]
    if answers_inside:
        own = (
            batch.attention_mask[rows]
            if samples is None
            else samples[rows] == samples[rows, columns][:, None]
        )
        labelled = ((batch.labels[rows] != IGNORE_INDEX) & own).long()
        # The position that predicts the answer's first token is the question's last.
        mask &= labelled.cumsum(1) == labelled
    length = max(int(mask.sum(1).max()), 1)
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :length]
    kept = mask.gather(1, order)
    kept[:, 0] = True
    return Text(embeds[rows[:, None], order], kept, batch.input_ids[rows[:, None], order])
