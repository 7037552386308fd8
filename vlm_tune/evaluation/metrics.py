"""Scores of answers: exact match of normalised texts, overall, by category and by source.

This module does not import torch.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One scored question."""

    id: str
    image: str
    question: str
    expected: str
    generated: str
    correct: bool
    category: str
    source: str = ""


@dataclass
class Scores:
    """The scores of an evaluation.

    `accuracy` is the share of exact matches among `n` questions, `loss` the mean over `tokens`
    reference tokens. `by_category` and `by_source` hold {name: {accuracy, n}}, the latter with loss
    and tokens where they were computed.
    """

    accuracy: float
    n: int
    loss: float | None
    tokens: int = 0
    by_category: dict[str, dict[str, float]] = field(default_factory=dict)
    by_source: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list, repr=False)

    def summary(self) -> dict[str, Any]:
        """The scores as a dictionary, without the individual answers."""
        return {key: value for key, value in asdict(self).items() if key != "answers"}


Losses = dict[str, tuple[float, int]]
"""Summed cross-entropy and number of tokens, by source."""


def normalise(text: str) -> str:
    """The text in the form that exact match compares.

    It is NFKC, case-folded, with runs of white space as one space, and without a final full stop
    (unless it is nothing else).
    """
    joined = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return joined.removesuffix(".") or joined


def join_scores(shards: Sequence[Scores]) -> Scores:
    """Joins the scores of ranks that each scored rows of its own."""
    answers = [answer for shard in shards for answer in shard.answers]
    losses: Losses = {}
    for name, entry in (
        (name, entry)
        for shard in shards
        for name, entry in shard.by_source.items()
        if "tokens" in entry
    ):
        total, tokens = losses.get(name, (0.0, 0))
        losses[name] = total + entry["loss"] * entry["tokens"], tokens + int(entry["tokens"])
    return scores(answers, losses)


def scores(answers: list[Answer], losses: Losses) -> Scores:
    """Scores of all answers, with each source's summed loss and number of tokens."""
    by_source = _accuracies(answers, lambda answer: answer.source)
    for name, (total, tokens) in losses.items():
        if tokens:
            by_source[name] |= {"loss": total / tokens, "tokens": tokens}
    tokens = sum(count for _, count in losses.values())
    return Scores(
        accuracy=sum(answer.correct for answer in answers) / len(answers),
        n=len(answers),
        loss=sum(total for total, _ in losses.values()) / tokens if tokens else None,
        tokens=tokens,
        by_category={
            name: entry
            for name, entry in _accuracies(answers, lambda answer: answer.category).items()
            if name
        },
        by_source=by_source,
        answers=answers,
    )


def _accuracies(
    answers: Sequence[Answer], group: Callable[[Answer], str]
) -> dict[str, dict[str, float]]:
    """{name: {accuracy, n}} of groups of answers, sorted by name."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        groups[group(answer)].append(answer.correct)
    return {
        name: {"accuracy": sum(hits) / len(hits), "n": len(hits)}
        for name, hits in sorted(groups.items())
    }
