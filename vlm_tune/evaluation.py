"""Scores a model: loss of the reference answers, and generated answers against them by exact match."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from vlm_tune.data.collate import Fetch, collate
from vlm_tune.data.images import PixelCache
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError
from vlm_tune.model.compiling import reading
from vlm_tune.model.llm import Decoding
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


@dataclass
class Scores:
    """What an evaluation found; `accuracy` is the share of exact matches, `by_category` the same by category."""

    accuracy: float
    n: int
    loss: float | None
    tokens: int = 0
    by_category: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list, repr=False)

    def summary(self) -> dict[str, Any]:
        """The scores without the single answers."""
        return {key: value for key, value in asdict(self).items() if key != "answers"}


def normalise(text: str) -> str:
    """Text as exact match compares it: NFKC, case folded, white space joined, a final full stop removed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".")


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
    total, count = _loss(model, conversations, batch_size, features, fetch) if loss else (0.0, 0)
    model.train(was)
    return _scores(_answers(conversations, generated), total / count if count else None, count)


def join_scores(shards: Sequence[Scores]) -> Scores:
    """The scores of all ranks' shares as one; a question that two ranks had counts once."""
    answers = list({answer.id: answer for shard in shards for answer in shard.answers}.values())
    tokens = sum(shard.tokens for shard in shards)
    loss = sum((shard.loss or 0.0) * shard.tokens for shard in shards) / tokens if tokens else None
    return _scores(answers, loss, tokens)


def _scores(answers: list[Answer], loss: float | None, tokens: int) -> Scores:
    groups: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        groups[answer.category].append(answer.correct)
    by_category = {name: {"accuracy": sum(hits) / len(hits), "n": len(hits)} for name, hits in sorted(groups.items()) if name}
    return Scores(sum(answer.correct for answer in answers) / len(answers), len(answers), loss, tokens, by_category, answers)


def _answers(conversations: Sequence[Conversation], generated: Sequence[str]) -> list[Answer]:
    answers = []
    for conversation, text in zip(conversations, generated, strict=True):
        expected = conversation.messages[-1].text.strip()
        correct = normalise(text) == normalise(expected)
        question = next((m.text for m in reversed(conversation.messages) if m.role == "user"), "")
        image = conversation.media[0].name if conversation.media else ""
        answers.append(Answer(conversation.id, image, question, expected, text, correct, conversation.category))
    return answers


@torch.inference_mode()
def _loss(
    model: VisionLanguageModel, conversations: Sequence[Conversation], batch_size: int, features: Fetch | None, fetch: Fetch
) -> tuple[float, int]:
    """Summed cross-entropy of the reference answers, and their number of tokens."""
    examples = [example for conversation in conversations for example in model.processor.examples(conversation)]
    examples.sort(key=lambda example: len(example.input_ids))
    total, count = 0.0, 0
    for start in range(0, len(examples), batch_size):
        chosen = examples[start : start + batch_size]
        found: Any = model(collate(chosen, model.processor.spec, fetch=fetch, cached=features is not None).to(model.device))
        total, count = total + float(found.sum), count + found.count
    return total, count
