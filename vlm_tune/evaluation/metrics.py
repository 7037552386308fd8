"""Scored answers, and exact match of them: overall, by category and by source.

Other metrics, intervals and baselines are added by `assessment`. This module does not import torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

from vlm_tune.data.types import References

Subject = Literal["image", "video", "audio"]
"""What a question is about; a question about a text alone counts as one about an image."""


@dataclass(frozen=True)
class Ranks:
    """Where retrieval ranks what belongs to a row.

    Attributes:
        text: the rank, from 1, of the best of its image's captions among all captions.
        image: the rank of the best of its caption's images among all images.
        text_share: 1 over the number of rows with its image: what it counts among image queries.
        image_share: 1 over the number of rows with its caption.
    """

    text: int
    image: int
    text_share: float
    image_share: float


@dataclass(frozen=True)
class Answer:
    """One scored question.

    Attributes:
        id: the row's.
        image: the name of its first image.
        question: the last question.
        expected: the reference answer, as it is trained on.
        generated: the model's answer.
        correct: whether they match exactly.
        category: the row's.
        source: the name of its source.
        images: what tells its images apart; rows that share one are not independent.
        references: further reference answers, choices, and the row's form.
        loss: summed cross-entropy of the reference answer, where it was computed.
        tokens: the number of tokens that the loss is of; 0 where it was not computed.
        ranks: those of retrieval, where they were computed.
        modality: what it is about: an image, a video or audio.
    """

    id: str
    image: str
    question: str
    expected: str
    generated: str
    correct: bool
    category: str
    source: str = ""
    images: tuple[str, ...] = ()
    references: References = field(default_factory=References)
    loss: float = 0.0
    tokens: int = 0
    ranks: Ranks | None = None
    modality: Subject = "image"

    @property
    def expectations(self) -> tuple[str, ...]:
        """All reference answers, the one that is trained on among them."""
        answers = self.references.answers
        known = self.expected in map(str.strip, answers)
        return answers if known else (self.expected, *answers)


@dataclass
class Scores:
    """The scores of an evaluation.

    `accuracy` is the share of exact matches among `n` questions, `loss` the mean over `tokens`
    reference tokens, or rows for retrieval. `by_category` and `by_source` hold {name: {accuracy,
    n}}, the latter with loss and tokens where they were computed.

    Attributes:
        metrics: {name: {value, low, high, n, images}}: a score (None where it is not finite), its
            95% interval (None under two images), and the rows and independent groups of rows that
            it is of. The groups of `by_category` and `by_source` have their own `metrics`.
        skipped: the reason for each metric that no row can be scored by, or that failed.
        classes: the confusion matrix and the scores of each class, where answers repeat. It and
            what follows are not part of evaluations during training.
        baselines: {name: {metric: {value, low, high, difference, difference_low, difference_high,
            p}}}: what answers without training score, and how far the model is above.
        notes: lines on what was left out, and what it would cost.
        modality: what the rows are about: images, videos or audio.
    """

    accuracy: float
    n: int
    loss: float | None
    tokens: int = 0
    by_category: dict[str, dict[str, Any]] = field(default_factory=dict)
    by_source: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list, repr=False)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    classes: dict[str, Any] | None = field(default=None, repr=False)
    baselines: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    modality: Subject = "image"

    def summary(self) -> dict[str, Any]:
        """The scores as a dictionary, without individual answers and what was not computed.

        It has the modality of videos and audio alone.
        """
        added = ("metrics", "skipped", "classes", "baselines", "notes")
        usual = "modality" if self.modality == "image" else ""
        return {
            key: deepcopy(value)
            for key, value in vars(self).items()
            if key not in ("answers", usual) and (value or key not in added)
        }


Losses = dict[str, tuple[float, int]]
"""Summed cross-entropy and number of tokens, by source."""


def join_scores(shards: Sequence[Scores]) -> Scores:
    """Joins the scores of ranks that each scored rows of its own."""
    answers = [answer for shard in shards for answer in shard.answers]
    losses = sum_losses(
        (name, entry["loss"] * entry["tokens"], int(entry["tokens"]))
        for shard in shards
        for name, entry in shard.by_source.items()
        if "tokens" in entry
    )
    return scores(answers, losses)


def sum_losses(entries: Iterable[tuple[str, float, int]]) -> Losses:
    """The sums by source of entries (source, summed loss, number of tokens)."""
    losses: Losses = {}
    for source, loss, count in entries:
        total, tokens = losses.get(source, (0.0, 0))
        losses[source] = total + loss, tokens + count
    return losses


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
        modality=_subject_of(answers),
    )


def _subject_of(answers: Sequence[Answer]) -> Subject:
    """The kind of media that the questions are about; where that differs, audio or else videos."""
    subjects = {answer.modality for answer in answers}
    if "audio" in subjects:
        return "audio"
    return "video" if "video" in subjects else "image"


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
