"""A feed of prompts whose last answers are to be sampled, in the order of prepared rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_tune.data.batch import Batch
from vlm_tune.data.batching.collate import collate
from vlm_tune.data.batching.loader import Place, Position, PreparedFeed
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.types import Conversation, Media, NativeInputs, Prompt
from vlm_tune.errors import DataError

if TYPE_CHECKING:
    import torch


class PromptFeed(PreparedFeed):
    """Batches of prompts; `prompts` of a batch are those of its units.

    Where no row is left for a process, its batch has one prompt of another's to read, and none to
    answer.
    """

    def __init__(
        self, prepared: Prepared, *args: Any, processor: Processor, **options: Any
    ) -> None:
        """Takes what `PreparedFeed` takes, and the processor that makes prompts."""
        super().__init__(prepared, *args, **options)
        self.processor = processor
        self.unit_rows = unit_rows(prepared)

    def batch(self, position: Position, place: Place) -> Batch:
        """One micro-batch of this process."""
        rows = self._rows(position, place)
        numbers = [int(unit) for row in rows for unit in row]
        prompts = [[self._prompt(row) for row in self.unit_rows[number]] for number in numbers]
        examples = [prompt.example for unit in prompts for prompt in unit]
        if not examples:
            step, number = place
            shares = self._epoch(position).shares(step, self.ranks)[number]
            row = next(share for share in shares if len(share))
            ((unit, *_), *_) = self._epoch(position).units_of(row[:1])
            examples = [self._prompt(self.unit_rows[unit][0]).example]
        fetched: dict[Media, NativeInputs] = {}

        def fetch(media: Media) -> torch.Tensor | NativeInputs:
            inputs = self.fetch(media)
            if isinstance(inputs, dict):
                fetched[media] = inputs
            return inputs

        batch = collate(examples, self.spec, fetch=fetch, cached=self.cached)
        batch.prompts = prompts
        batch.media_inputs = fetched
        return batch

    def _prompt(self, row: Conversation) -> Prompt:
        return Prompt(row, self.processor.prompt(row))


def unit_rows(prepared: Prepared) -> list[list[Conversation]]:
    """The rows of each unit, whose examples are in the order of the rows.

    Raises `DataError` where a row of an encoder-decoder has several answers and images.
    """
    places = prepared.places(prepared.part)
    rows = dict(zip(places.tolist(), prepared.conversations(places), strict=True))
    of_examples = np.repeat(places, prepared.column("examples")[places]).tolist()
    if prepared.data.group == "none":
        return [[rows[place]] for place in of_examples]
    shown, offsets = prepared.shown
    units: dict[bytes | int, list[Conversation]] = {}
    for place in of_examples:
        images = shown[offsets[place] : offsets[place + 1]]
        units.setdefault(images.tobytes() if len(images) else place, []).append(rows[place])
    if len(units) != len(prepared):
        raise DataError(
            "rows with several answers, of which each is a prompt with other images, can't be "
            "grouped by image; set data.group: none",
            source="data.train",
        )
    return list(units.values())
