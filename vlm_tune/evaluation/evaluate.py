"""Scores a model: loss of the reference answers, and generated answers against them by exact match."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from vlm_tune.data.batching.collate import Fetch, collate
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError
from vlm_tune.model.acceleration.compiling import reading
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.vlm import VisionLanguageModel


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
    """What an evaluation found; `accuracy` is the share of exact matches, `loss` the mean over `tokens` reference tokens.

    `by_category` and `by_source` hold {name: {accuracy, n}}, the latter with loss and tokens where they were computed.
    """

    accuracy: float
    n: int
    loss: float | None
    tokens: int = 0
    by_category: dict[str, dict[str, float]] = field(default_factory=dict)
    by_source: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list, repr=False)

    def summary(self) -> dict[str, Any]:
        """The scores without the single answers."""
        return {key: value for key, value in asdict(self).items() if key != "answers"}


Losses = dict[str, tuple[float, int]]
"""Summed cross-entropy and number of tokens, by source."""


def normalise(text: str) -> str:
    """Text as exact match compares it: NFKC, case folded, white space joined, a full stop removed that ends more than itself."""
    joined = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return joined.removesuffix(".") or joined


def score(
    model: VisionLanguageModel,
    conversations: Sequence[Conversation],
    *,
    decoding: Decoding,
    batch_size: int = 64,
    features: Fetch | None = None,
    loss: bool = True,
    compile: bool | str = False,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Generates the last answer of every conversation and compares; `features` are a frozen tower's, computed before.

    `compile` is as `train.compile` in a recipe: whether the blocks that read the questions are compiled.

    Raises `DataError` for no conversations, and for prompts that are too long.
    """
    if not conversations:
        raise DataError("no rows to evaluate")
    was = model.training
    model.eval()
    processor = model.processor
    prompts = processor.prompts(conversations)
    fetch = features or PixelCache(processor.images)
    cached = features is not None
    with reading(model.llm, compile, len(prompts)):
        generated = model.answers(prompts, decoding, fetch=fetch, cached=cached, batch_size=batch_size, progress=progress)
    losses: Losses = {}
    for name in dict.fromkeys(row.source_name for row in conversations) if loss else ():
        rows = [row for row in conversations if row.source_name == name]
        losses[name] = _loss(model, rows, batch_size, features, fetch)
    model.train(was)
    return _scores(_answers(conversations, generated), losses)


def join_scores(shards: Sequence[Scores]) -> Scores:
    """The scores of all ranks' shares as one; a question that two ranks had counts once."""
    answers = list({(answer.source, answer.id): answer for shard in shards for answer in shard.answers}.values())
    losses: Losses = {}
    for name, entry in ((name, entry) for shard in shards for name, entry in shard.by_source.items() if "tokens" in entry):
        total, tokens = losses.get(name, (0.0, 0))
        losses[name] = total + entry["loss"] * entry["tokens"], tokens + int(entry["tokens"])
    return _scores(answers, losses)


def _scores(answers: list[Answer], losses: Losses) -> Scores:
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
        by_category={name: entry for name, entry in _accuracies(answers, lambda answer: answer.category).items() if name},
        by_source=by_source,
        answers=answers,
    )


def _accuracies(answers: Sequence[Answer], group: Callable[[Answer], str]) -> dict[str, dict[str, float]]:
    """{name: {accuracy, n}} of groups of answers, by name."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        groups[group(answer)].append(answer.correct)
    return {name: {"accuracy": sum(hits) / len(hits), "n": len(hits)} for name, hits in sorted(groups.items())}


def _answers(conversations: Sequence[Conversation], generated: Sequence[str]) -> list[Answer]:
    answers = []
    for conversation, text in zip(conversations, generated, strict=True):
        expected = conversation.messages[-1].text.strip()
        correct = normalise(text) == normalise(expected)
        question = next((m.text for m in reversed(conversation.messages) if m.role == "user"), "")
        image = conversation.media[0].name if conversation.media else ""
        answers.append(Answer(conversation.id, image, question, expected, text, correct, conversation.category, conversation.source_name))
    return answers


@torch.inference_mode()
def _loss(
    model: VisionLanguageModel, conversations: Sequence[Conversation], batch_size: int, features: Fetch | None, fetch: Fetch
) -> tuple[float, int]:
    """Summed cross-entropy of the reference answers, and their number of tokens."""
    examples = [example for conversation in conversations for example in model.processor.examples(conversation)]
    examples.sort(key=lambda example: len(example.input_ids))
    total = 0.0
    count = 0
    for start in range(0, len(examples), batch_size):
        chosen = examples[start : start + batch_size]
        found: Any = model(collate(chosen, model.processor.spec, fetch=fetch, cached=features is not None).to(model.device))
        total = total + float(found.sum)
        count = count + found.count
    return total, count
