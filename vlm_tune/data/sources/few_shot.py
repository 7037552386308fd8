"""Few-shot examples before a question, drawn from a source's first usable rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice

from vlm_tune.data.chat.draws import draw
from vlm_tune.data.types import Conversation, Message
from vlm_tune.errors import DataError

POOL_ROWS = 256
"""Rows of a source from which examples are drawn: the same in every worker, few enough to hold."""


class Shots:
    """Puts `count` few-shot examples before each question, as earlier turns that carry no loss.

    The draw depends on (seed, row id). Examples come from the rows at `places` (from 0) of the
    source, or from its first `POOL_ROWS` rows where `places` is None.
    """

    def __init__(self, count: int, seed: int, places: Sequence[int] | None = None) -> None:
        self.count = count
        self.seed = seed
        self._places = range(POOL_ROWS) if places is None else places
        self._pool: list[Conversation] | None = None

    def fill(self, rows: Iterable[Conversation | DataError]) -> None:
        """Fills the pool from the source's rows, once; rows that can't be read are skipped."""
        if not self.count or self._pool is not None:
            return
        first = islice(rows, max(self._places, default=-1) + 1)
        wanted = set(self._places)
        self._pool = [
            row
            for place, row in enumerate(first)
            if place in wanted and isinstance(row, Conversation)
        ]

    def before(self, row: Conversation) -> Conversation | DataError:
        """The row with its examples in front.

        Returns a `DataError` if too few rows of the pool have other images than the row's.
        """
        if not self.count:
            return row
        pool = self._pool or []
        row_media = set(row.media)
        chosen = set[int]()
        turns: list[Message] = []
        for number in range(self.count):
            start = draw(self.seed, f"shot {number}:{row.id}")
            for step in range(len(pool)):
                place = (start + step) % len(pool)
                example = pool[place]
                if (
                    place not in chosen
                    and example.id != row.id
                    and row_media.isdisjoint(example.media)
                ):
                    chosen.add(place)
                    turns += _first_answer(example)
                    break
            else:
                message = (
                    f"shots: {self.count} needs as many rows with other images, "
                    f"of the first {POOL_ROWS} of the part that can "
                    f"be used; there are {len(chosen)}"
                )
                return DataError(message, source=row.source, row=row.row, kind="shots")
        system = [message for message in row.messages if message.role == "system"]
        rest = [message for message in row.messages if message.role != "system"]
        return replace(row, messages=(*system, *turns, *rest), shots=len(turns))


def _first_answer(example: Conversation) -> list[Message]:
    """The example's first question and its answer, as context."""
    question, answer = [message for message in example.messages if message.role != "system"][:2]
    return [question, replace(answer, trained=False)]
