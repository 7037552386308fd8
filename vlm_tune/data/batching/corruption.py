"""Span corruption, T5's pretraining task: spans of a text are replaced by sentinels and predicted.

As in arXiv:1910.10683, 3.1.4, with the random spans of T5's `random_spans_noise_mask`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlm_tune.config.objectives import AnyObjective, SpanCorruption
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.prepare.dataset import Group
from vlm_tune.data.types import Example
from vlm_tune.errors import DataError

SENTINELS = 100
"""The most sentinel tokens that are used, as T5 has them: <extra_id_0> to <extra_id_99>."""


@dataclass(frozen=True)
class Corruption:
    """Masks spans of an encoder-decoder's answers; the spans depend on (seed, epoch, sample id).

    Attributes:
        rate: the share of tokens that is masked.
        mean_span: the mean number of tokens of a masked span.
        sentinels: the ids that stand for spans, in order.
        end: the id that ends the decoder's targets.
        seed: the recipe's seed.
    """

    rate: float
    mean_span: float
    sentinels: tuple[int, ...]
    end: int
    seed: int

    def of_unit(self, unit: Group, epoch: int) -> Group:
        """The examples of a unit with spans masked as in an epoch."""
        return [self.of_example(example, epoch) for example in unit]

    def of_example(self, example: Example, epoch: int) -> Example:
        """The example whose encoder reads the prompt and then the answer with sentinels for spans.

        The labels are each span after its sentinel, and the end. One without supervised tokens,
        which only fills up a batch, stays as it is.
        """
        if not example.supervised:
            return example
        text = example.labels[:-1] if example.labels[-1:] == self.end else example.labels
        random = np.random.default_rng((self.seed, epoch, zlib.crc32(example.id.encode())))
        masked = random_spans(
            len(text), self.rate, self.mean_span, most=len(self.sentinels), random=random
        )
        starts = masked & ~np.concatenate([[False], masked[:-1]])
        # The sentinel of the span that a token is in, or that came before it.
        sentinels = np.array(self.sentinels)[np.maximum(np.cumsum(starts) - 1, 0)]
        shown = np.where(starts, sentinels, text)[~masked | starts]
        pairs = np.stack([sentinels, text], 1)
        targets = pairs[np.stack([starts, masked], 1)]
        return replace(
            example,
            input_ids=np.concatenate([example.input_ids, shown]).astype(np.int32),
            labels=np.concatenate([targets, [self.end]]).astype(np.int32),
            image_mask=np.concatenate([example.image_mask, np.zeros(len(shown), dtype=bool)]),
        )


def random_spans(
    length: int, rate: float, mean_span: float, *, most: int, random: np.random.Generator
) -> np.ndarray:
    """Which of `length` tokens are masked, bool[length]: spans of random lengths at random places.

    Spans and what is between them alternate, and a span is last. Of a single token all is masked.

    Args:
        length: at least 1.
        rate: the share that is masked, rounded to whole tokens, at least one.
        mean_span: the mean length of a span.
        most: the most spans.
        random: draws the lengths.
    """
    if length == 1:
        return np.ones(1, dtype=bool)
    masked = min(max(round(length * rate), 1), length - 1)
    spans = min(max(round(masked / mean_span), 1), masked, length - masked, most)
    lengths = np.stack(
        [_segments(length - masked, spans, random), _segments(masked, spans, random)], 1
    )
    return np.repeat(np.tile([False, True], spans), lengths.flatten())


def _segments(total: int, number: int, random: np.random.Generator) -> np.ndarray:
    """Lengths of at least 1 that add to `total`, int64[number], each division equally likely."""
    cuts = np.sort(random.choice(total - 1, number - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def corruption_of(objective: AnyObjective, processor: Processor, seed: int) -> Corruption | None:
    """The corruption of an objective's rows; None for one that masks nothing.

    Raises:
        DataError: the tokenizer has no sentinel tokens.
    """
    if not isinstance(objective, SpanCorruption):
        return None
    vocabulary: dict[str, Any] = processor.tokenizer.get_vocab()
    sentinels: list[int] = []
    for number in range(SENTINELS):
        if f"<extra_id_{number}>" not in vocabulary:
            break
        sentinels.append(vocabulary[f"<extra_id_{number}>"])
    if not sentinels:
        raise DataError(
            "span_corruption needs T5's sentinel tokens (<extra_id_0>, ...), which the model's "
            "tokenizer lacks; add some with model.llm.added_special_tokens",
            source="objective",
        )
    return Corruption(
        objective.rate, objective.mean_span, tuple(sentinels), processor.spec.eos_id, seed
    )
