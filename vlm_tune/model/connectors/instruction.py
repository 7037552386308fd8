"""The instruction text that a text-conditioned connector reads with an image.

Shapes: B rows, L tokens of a row, M media places, T instruction tokens, E LLM width.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from vlm_tune.data.batch import Batch
from vlm_tune.data.types import IGNORE_INDEX
from vlm_tune.errors import ModelError
from vlm_tune.quoting import name_list
from vlm_tune.transfer import to_device


@dataclass
class Text:
    """The instruction of each media place.

    It has the LLM's input embeddings `embeds` [M, T, E], and on the CPU the token `ids` int64[M, T]
    and their mask `real` bool[M, T]; `mask` is that on the embeddings' device. Tokens are
    left-aligned, in order; each place has at least one (a padding token if there is no text).
    """

    embeds: torch.Tensor
    real: torch.Tensor
    ids: torch.Tensor

    @cached_property
    def mask(self) -> torch.Tensor:
        """bool[M, T], true where a token is real, on the embeddings' device."""
        return to_device(self.real, self.embeds.device)

    def last(self, most: int) -> Text:
        """The last `most` tokens of each instruction."""
        if self.real.shape[1] <= most:
            return self
        columns = (self.real.sum(1, keepdim=True) - most).clamp(min=0) + torch.arange(most)
        places = to_device(columns, self.embeds.device)[..., None]
        embeds = self.embeds.gather(1, places.expand(-1, -1, self.embeds.shape[2]))
        return Text(embeds, self.real.gather(1, columns), self.ids.gather(1, columns))


_tokenizing = threading.Lock()


class Reader:
    """Converts instructions to ids of a connector's own tokenizer, with start and end tokens."""

    def __init__(self, llm_tokenizer: Any, tokenizer: Any, most: int) -> None:
        self.tokenizer = tokenizer
        self._llm = llm_tokenizer
        self._most = most
        # No more: a server's questions are all different, and may be long.
        self._read = lru_cache(2048)(self._ids)

    def _ids(self, ids: tuple[int, ...]) -> list[int]:
        text = self._llm.decode(list(ids), skip_special_tokens=True)
        # Truncation is a state of a fast tokenizer, which another thread may use at once.
        with _tokenizing:
            return self.tokenizer(text, truncation=True, max_length=self._most).input_ids

    def __call__(self, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
        """ids int64[M, T'] and mask bool[M, T'] of the instructions, left-aligned."""
        rows = [
            self._read(tuple(ids[real].tolist()))
            for ids, real in zip(text.ids, text.real, strict=True)
        ]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), max(int(lengths.max()), 1), dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return to_device(ids, text.embeds.device), to_device(mask, text.embeds.device)


def places(batch: Batch, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column, int64[M] each, of the first of the `tokens` slots of each media place.

    Raises `ModelError` with both counts and the sample ids if the batch has another number of
    slots.
    """
    slots = batch.slots
    media = len(batch.media_index)
    if len(slots) != media * tokens:
        raise ModelError(
            f"{len(slots)} image slots and {media * tokens} image features "
            f"in {name_list(batch.ids)}"
        )
    starts = slots[::tokens]
    width = batch.input_ids.shape[1]
    return starts // width, starts % width


def instructions(
    batch: Batch,
    embeds: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    *,
    answers_inside: bool,
) -> Text:
    """The instruction of each media place: text of the place's sample, chosen on the host.

    Where the answers are inside the rows (a decoder's), it is the text up to the position that
    predicts the sample's first trained token: it is then the same in training and in generation,
    and no answer token leaks into it. Otherwise it is the sample's whole text.

    Args:
        batch: the batch on the host; its rows may be packed.
        embeds: the rows' input embeddings [B, L, E], on their device.
        rows: row of each media place, int64[M], on the host.
        columns: column of each media place's first slot, int64[M], on the host.
        answers_inside: whether the rows hold the answers.

    Raises:
        ModelError: the batch has branched rows, whose questions share one image.
    """
    if batch.branched:
        raise ModelError(
            "data.group: a text-conditioned connector reads an image once per question: set "
            "data.group: none"
        )
    mask = batch.attention_mask[rows] & ~batch.image_mask[rows]
    samples = batch.packed
    if samples is not None:
        mask &= samples[rows] == samples[rows, columns][:, None]
    if answers_inside:
        same_sample = (
            batch.attention_mask[rows]
            if samples is None
            else samples[rows] == samples[rows, columns][:, None]
        )
        labelled = ((batch.labels[rows] != IGNORE_INDEX) & same_sample).long()
        # The position that predicts the answer's first token is the question's last token.
        mask &= labelled.cumsum(1) == labelled
    length = max(int(mask.sum(1).max()), 1)
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :length]
    text_mask = mask.gather(1, order)
    text_mask[:, 0] = True
    where = to_device(rows[:, None], embeds.device), to_device(order, embeds.device)
    return Text(embeds[where], text_mask, batch.input_ids[rows[:, None], order])
