"""From a recipe's data section to groups of examples, in an order that is a function of (seed, epoch, position)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vlm_tune.config import DataSection, Source
from vlm_tune.data.processor import Processor
from vlm_tune.data.sources.registry import read_sources
from vlm_tune.data.sources.rows import BadRows
from vlm_tune.data.tokens import branch_layout
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example, Media
from vlm_tune.errors import DataError

BUCKET = 16
"""Batches whose groups are sorted by length together: less padding, and still a mixture in every batch."""

Group = list[Example]
"""The examples that make one unit of a batch: a row, or all rows of an image."""


def read_conversations(data: DataSection, sources: Sequence[Source], seed: int) -> tuple[list[Conversation], list[DataError]]:
    """The conversations of the sources and the bad rows that were skipped."""
    bad = BadRows(skip=data.on_bad_row == "skip", cap=data.max_bad_rows)
    return read_sources(sources, seed=seed, bad=bad), bad.found


@dataclass
class Prepared:
    """Tokenised training data: groups in reading order, and what was left out and why."""

    groups: list[Group]
    dropped: list[str] = field(default_factory=list)

    @property
    def media(self) -> list[Media]:
        """Every distinct media item, in order of first use."""
        return list(dict.fromkeys(media for group in self.groups for example in group for media in example.media))

    @property
    def questions(self) -> int:
        """Question-answer pairs of one epoch."""
        return sum(example.questions for group in self.groups for example in group)

    def order(self, seed: int, epoch: int, batch: int = 1) -> np.ndarray:
        """The epoch's order of groups, int64[len(groups)]: shuffled, with groups of like length in the same `batch`.

        Lengths are sorted within stretches of BUCKET batches only, so that batches stay mixed; the incomplete batch
        is the last.
        """
        random = np.random.default_rng((seed, epoch))
        shuffled = random.permutation(len(self.groups))
        if batch == 1:
            return shuffled
        lengths = np.array([max(len(example.input_ids) for example in group) for group in self.groups])
        whole = len(shuffled) // batch * batch
        rows = []
        for start in range(0, whole, batch * BUCKET):
            stretch = shuffled[start : min(start + batch * BUCKET, whole)]
            rows.append(stretch[np.argsort(lengths[stretch], kind="stable")].reshape(-1, batch))
        batches = np.concatenate(rows) if rows else np.empty((0, batch), dtype=np.int64)
        return np.concatenate([random.permutation(batches).reshape(-1), shuffled[whole:]])


def prepare(conversations: Sequence[Conversation], data: DataSection, processor: Processor) -> Prepared:
    """Tokenises and groups. Raises `DataError` if nothing is left, or as `overlong: fail` and `on_bad_row` tell."""
    bad = BadRows(skip=data.on_bad_row == "skip", cap=data.max_bad_rows)
    prepared = Prepared([])
    groups: dict[tuple[Media, ...] | int, Group] = {}
    for conversation in conversations:
        try:
            examples = processor.examples(conversation)
        except DataError as error:
            bad.keep(error)
            prepared.dropped.append(f"{conversation.id}: {error.message}")
            continue
        for example in examples:
            longest = max(len(example.input_ids), len(example.labels))
            if longest > processor.spec.max_length:
                message = f"{longest} tokens, more than data.max_length {processor.spec.max_length}"
                if data.overlong == "fail":
                    raise DataError(f"{message} (overlong: drop leaves such rows out)", row=conversation.id)
                prepared.dropped.append(f"{conversation.id}: {message}")
                continue
            key = example.media if data.group == "image" and example.media else len(groups)
            groups.setdefault(key, []).append(example)
    if not groups:
        raise DataError(
            f"no row is left to train on: {len(prepared.dropped)} of {len(conversations)} were dropped"
            + (f", the first: {prepared.dropped[0]}" if prepared.dropped else ""),
            source="data.train",
        )
    branched = processor.spec.layout == "causal"
    prepared.groups = [branch_layout(group) if branched else group for group in groups.values()]
    return prepared


def micro_batches(prepared: Prepared, *, seed: int, epoch: int, batch_size: int, ranks: int = 1, rank: int = 0) -> Iterator[list[Group]]:
    """This rank's micro-batches of one epoch, `batch_size` units each; every unit comes exactly once over all ranks.

    Every rank has as many batches: the last ones share what is left, and a rank left without takes a unit whose
    labels are all ignored.
    """
    whole = batch_size * ranks
    order = prepared.order(seed, epoch, whole)
    for first in range(0, len(order), whole):
        places = order[first : first + whole][rank::ranks]
        if len(places):
            yield [prepared.groups[place] for place in places]
        else:
            unit = prepared.groups[order[first]]
            yield [[replace(example, labels=np.full_like(example.labels, IGNORE_INDEX)) for example in unit]]
