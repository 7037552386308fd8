"""Answers limited to a set of choices, by the probability that the model gives to each of them.

What a question's choices share, its image and its text, is read once: a decoder has the choices as
branches of the question, an encoder-decoder has them as separate answers to one encoded question.

Shapes: S supervised positions, E width.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vlm_tune.data.batching.collate import Fetch, collate
from vlm_tune.data.packing import Tree, answers_layout, trees
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example, Message
from vlm_tune.errors import ArgumentError
from vlm_tune.generation.answers import Answer, up_to_stop
from vlm_tune.generation.requests import check_text
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.quoting import quoted

ROW = 1024
"""Most tokens of a row that joins choices, of one or several questions about one image.

Of an encoder-decoder these are the choices' tokens.
"""

BATCH = 1 << 14
"""Most tokens of a batch, inputs and labels, its padding included."""

CHUNK_BYTES = 1 << 25
"""Most bytes of the fp32 logits that exist at a time."""


def choices_of_each(choices: Any, requests: int) -> list[list[str]]:
    """The choices of each request, from a list of texts for all or from a list of such lists.

    Raises:
        ArgumentError: They have another form, a list has less than two different texts, or there
            are more or fewer lists than requests.
    """
    listed = isinstance(choices, Sequence) and not isinstance(choices, str | bytes)
    if not listed or not choices:
        raise ArgumentError(f"choices must be a list of strings, got {quoted(choices)}")
    lists: Any = [choices] * requests if isinstance(choices[0], str) else choices
    if len(lists) != requests:
        raise ArgumentError(f"{len(lists)} lists of choices for {requests} requests")
    for texts in lists:
        if (
            not isinstance(texts, Sequence)
            or isinstance(texts, str)
            or not all(isinstance(text, str) and text.strip() for text in texts)
        ):
            raise ArgumentError(f"choices must be a list of non-empty strings, got {quoted(texts)}")
        for text in texts:
            check_text("a choice", text)
        if len(texts) < 2 or len(set(texts)) < len(texts):
            raise ArgumentError(
                f"choices must be a list of two or more different strings, got {quoted(texts)}"
            )
    return [list(texts) for texts in lists]


def check_not_generated(settings: Iterable[str]) -> None:
    """Raises `ArgumentError` if settings of generation, by name, are given beside choices."""
    for name in settings:
        raise ArgumentError(f"{name} has no effect on choices: they are not generated")


def choose(
    model: VisionLanguageNetwork,
    questions: Sequence[Conversation],
    choices: Sequence[Sequence[str]],
    *,
    fetch: Fetch,
    cached: bool = False,
    batch_size: int = 32,
) -> list[Answer]:
    """Answers questions by the likeliest of their choices.

    A choice's probability is that of its tokens and of the answer's end, as training has them,
    divided by the sum over the question's choices.

    Args:
        model: the model, in eval mode.
        questions: conversations that end in the user's turn.
        choices: the texts to choose from, for each question.
        fetch: returns the pixels of a media item, or if `cached` the tower's features.
        cached: whether `fetch` returns features.
        batch_size: the most questions in a batch.

    Raises:
        DataError: a question with a choice is too long.
    """
    examples = [
        answered(model, question, texts) for question, texts in zip(questions, choices, strict=True)
    ]
    logprobs = _logprobs_by_question(model, examples, fetch, cached, batch_size)
    return [_likeliest(model, *each) for each in zip(choices, examples, logprobs, strict=True)]


def choice_steps(
    model: VisionLanguageNetwork,
    texts: Sequence[str],
    examples: Sequence[Example],
    *,
    fetch: Fetch,
    cached: bool,
    tokens: int,
) -> Generator[None, None, Answer]:
    """As `choose` for one question, a step at a time: yields between them, returns the answer.

    Args:
        model: the model, in eval mode.
        texts: the choices.
        examples: the question with each of them, from `answered`.
        fetch: returns the pixels of a media item, or if `cached` the tower's features.
        cached: whether `fetch` returns features.
        tokens: the most tokens of a step, unless one choice has more.
    """
    collated = {"fetch": fetch, "cached": cached}
    rows = choice_rows(model, examples, [len(texts)], tokens)
    batches = _batches(rows, [len(texts)], 1, tokens)
    logprobs = yield from _logprob_steps(model, examples, batches, collated)
    return _likeliest(model, texts, examples, logprobs)


def choice_logprobs(
    model: VisionLanguageNetwork,
    questions: Sequence[Conversation],
    choices: Sequence[Sequence[str]],
    *,
    fetch: Fetch,
    cached: bool = False,
    batch_size: int = 32,
) -> list[list[list[float]]]:
    """The log-probabilities of the tokens of each question's choices, the answer's end included.

    The arguments are those of `choose`; raises as that.
    """
    examples = [
        answered(model, question, texts) for question, texts in zip(questions, choices, strict=True)
    ]
    return _logprobs_by_question(model, examples, fetch, cached, batch_size)


def _logprobs_by_question(
    model: VisionLanguageNetwork,
    examples: Sequence[Sequence[Example]],
    fetch: Fetch,
    cached: bool,
    batch_size: int,
) -> list[list[list[float]]]:
    """The log-probabilities of the supervised tokens of each question's examples."""
    together = [example for of_question in examples for example in of_question]
    counts = [len(of_question) for of_question in examples]
    collated = {"fetch": fetch, "cached": cached}
    batches = _batches(choice_rows(model, together, counts, ROW), counts, batch_size, BATCH)
    logprobs = _last(_logprob_steps(model, together, batches, collated))
    ends = list(itertools.accumulate(counts))
    return [logprobs[end - count : end] for count, end in zip(counts, ends, strict=True)]


def answered(
    model: VisionLanguageNetwork, question: Conversation, texts: Sequence[str]
) -> list[Example]:
    """The question with each text as its answer, and only that answer supervised."""
    earlier = tuple(replace(message, trained=False) for message in question.messages)
    conversations = [
        replace(question, messages=(*earlier, Message("assistant", (text,)))) for text in texts
    ]
    examples = [model.processor.examples(each)[-1] for each in conversations]
    model.processor.check_lengths(examples)
    return examples


def _likeliest(
    model: VisionLanguageNetwork,
    texts: Sequence[str],
    examples: Sequence[Example],
    logprobs: Sequence[Sequence[float]],
) -> Answer:
    totals = np.array([sum(of_tokens) for of_tokens in logprobs])
    shares = np.exp(totals - totals.max())
    shares /= shares.sum()
    best = int(shares.argmax())
    labels = examples[best].labels
    ids = labels[labels != IGNORE_INDEX].tolist()
    return Answer(
        texts[best],
        "stop",
        tuple(up_to_stop(ids, model.processor.stop_ids)),
        tuple(logprobs[best]),
        probabilities=dict(zip(texts, shares.tolist(), strict=True)),
    )


def _last(steps: Generator[None, None, list[list[float]]]) -> list[list[float]]:
    """The return value of a generator, after all of its steps."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _logprob_steps(
    model: VisionLanguageNetwork,
    examples: Sequence[Example],
    batches: Iterable[list[Tree]],
    collated: dict[str, Any],
) -> Generator[None, None, list[list[float]]]:
    """Returns the log-probabilities of each example's supervised tokens; yields after each batch.

    Args:
        model: the model.
        examples: questions with one choice each.
        batches: the rows that join them.
        collated: further arguments of `collate`.
    """
    logprobs: list[list[float]] = [[] for _ in examples]
    for batch in batches:
        of_batch = _batch_logprobs(model, [each.row for each in batch], collated)
        for member in (member for each in batch for member in each.members):
            count = examples[member].supervised
            logprobs[member] = of_batch[:count]
            of_batch = of_batch[count:]
        yield
    return logprobs


def _batches(
    rows: Sequence[Tree], counts: Sequence[int], most: int, most_tokens: int
) -> Iterator[list[Tree]]:
    """Yields batches of consecutive rows, of up to `most` questions and `most_tokens` tokens.

    A row may have more by itself.
    """
    question_of = _question_of(counts)
    batch: list[Tree] = []
    questions: set[int] = set()
    longest = 0
    for tree in rows:
        of_row = {question_of[member] for member in tree.members}
        length = max(longest, len(tree.row.input_ids) + len(tree.row.labels))
        tokens = length * (len(batch) + 1)
        if batch and (len(questions | of_row) > most or tokens > most_tokens):
            yield batch
            batch = []
            questions = set()
            length = len(tree.row.input_ids) + len(tree.row.labels)
        batch.append(tree)
        questions |= of_row
        longest = length
    if batch:
        yield batch


def _question_of(counts: Sequence[int]) -> list[int]:
    """The number of each example's question, where questions have `counts` examples."""
    return [question for question, count in enumerate(counts) for _ in range(count)]


def choice_rows(
    model: VisionLanguageNetwork, examples: Sequence[Example], counts: Sequence[int], most: int
) -> list[Tree]:
    """Joins examples to rows of up to `most` tokens, in which what they share stands once.

    They are sorted by length. A tree's leaves are of no use here.
    """
    llm = model.llm
    causal = llm.layout == "causal"
    # A connector that reads a decoder's text reads an image once a question, and takes no branches.
    shares = (
        llm.unjoined is None
        and model.connector.fills_slots
        and not (model.connector.needs_text if causal else llm.virtual)
    )
    groups: dict[Any, list[int]] = {}
    for place, (example, question) in enumerate(zip(examples, _question_of(counts), strict=True)):
        key = example.media if causal and example.media and llm.shares_beginnings else question
        groups.setdefault(key if shares else (place,), []).append(place)
    rows: list[Tree] = []
    for group in groups.values():
        members = [examples[place] for place in group]
        rows += [
            replace(tree, members=tuple(group[member] for member in tree.members))
            for tree in (trees(members, most) if causal else _answers_to_one(members, most))
        ]
    return sorted(rows, key=lambda tree: len(tree.row.input_ids))


def _answers_to_one(examples: Sequence[Example], most: int) -> list[Tree]:
    """An encoder-decoder's examples of one question as rows with answers of `most` tokens."""
    groups: list[list[int]] = []
    length = 0
    for place, example in enumerate(examples):
        length += len(example.labels)
        if not groups or length > most:
            groups.append([])
            length = len(example.labels)
        groups[-1].append(place)
    return [
        Tree(answers_layout([examples[place] for place in group]), tuple(group), ())
        for group in groups
    ]


@torch.inference_mode()
def _batch_logprobs(
    model: VisionLanguageNetwork, rows: Sequence[Example], collated: dict[str, Any]
) -> list[float]:
    """The log-probabilities of the rows' supervised tokens, in order."""
    batch = collate(rows, model.processor.spec, **collated).to(model.device)
    hidden, targets = model.llm.supervised(model.embed(batch), batch)
    return token_logprobs(model.llm, hidden, targets).tolist()


def token_logprobs(llm: LanguageModel, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The log-probabilities fp32[S] of `targets` int64[S] after hidden states [S, E]."""
    chunk = max(CHUNK_BYTES // (4 * llm.vocabulary), 1)
    parts = [
        llm.logits(states).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        for states, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(parts)
