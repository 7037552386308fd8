"""Scoring of a model: its generated answers, and the loss of the reference answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from vlm_tune.config.objectives import AnyObjective, Contrastive, Matching, parts_of
from vlm_tune.config.train import EvaluateSection
from vlm_tune.data.batch import Batch
from vlm_tune.data.batching.collate import Fetch, collate
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.regions import region_size
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Media, References, distinct_media
from vlm_tune.errors import DataError
from vlm_tune.evaluation.answering import answer_rows
from vlm_tune.evaluation.metrics import Answer, Losses, Scores, Subject, scores, sum_losses
from vlm_tune.evaluation.registry import RETRIEVAL
from vlm_tune.evaluation.retrieval import losses_by_source, retrieve, with_ranks
from vlm_tune.evaluation.texts import normalise
from vlm_tune.model.acceleration.compiling import reading
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.task_adapters import each_task
from vlm_tune.model.vlm import VisionLanguageNetwork, in_eval_mode


@in_eval_mode
def score(
    model: VisionLanguageNetwork,
    conversations: Sequence[Conversation],
    *,
    decoding: Decoding,
    batch_size: int = 64,
    answering: Literal["generate", "likelihood", "retrieve"] = "generate",
    ranks: bool = False,
    temperature: float | None = None,
    features: Fetch | None = None,
    loss: bool = True,
    perplexity: bool = False,
    compile: bool | str = False,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Answers the last question of every conversation and compares the answer with the reference.

    Args:
        model: the model; its training mode is restored at the end.
        conversations: the rows to score; each ends in the reference answer.
        decoding: how answers are generated.
        batch_size: rows per batch.
        answering: generate answers; likelihood: choose the likeliest of a row's choices, where it
            has some; retrieve: take the caption that is nearest to the image.
        ranks: also rank captions and images, for the metrics of retrieval.
        temperature: that of the contrastive loss, which is the loss with `retrieve`; None: learned.
        features: cached features of a frozen tower; pixels are decoded where None.
        loss: also compute the loss of the reference answers, by source.
        perplexity: also compute it for each answer by itself, for the metric of that name.
        compile: as `train.compile` in a recipe: whether the blocks are compiled for the prefill.
        progress: called with the number of answered rows and their total.

    Raises:
        DataError: there are no conversations, a prompt is too long, or a row can't be retrieved.
    """
    if not conversations:
        raise DataError("no rows to evaluate")
    conversations = _referred(model, conversations)
    source: dict[str, Any] = {
        "fetch": features or PixelCache(model.processor.images),
        "cached": features is not None,
        "batch_size": batch_size,
    }
    if answering == "retrieve":
        answers = row_answers(conversations, [""] * len(conversations))
        retrieved = retrieve(
            model, conversations, answers, temperature=temperature, progress=progress, **source
        )
        answers = with_ranks(answers, retrieved, answering=True)
        return scores(answers, losses_by_source(answers, retrieved) if loss else {})
    likelihood = answering == "likelihood"
    options: dict[str, Any] = {"decoding": decoding, "likelihood": likelihood, **source}
    with reading(model.llm, compile, len(conversations)):
        texts = answer_rows(model, conversations, progress=progress, **options)
    answers = row_answers(conversations, texts)
    if ranks:
        retrieved = retrieve(model, conversations, answers, temperature=temperature, **source)
        answers = with_ranks(answers, retrieved, answering=False)
    return _with_losses(model, conversations, answers, loss, perplexity, **source)


def _referred(
    model: VisionLanguageNetwork, conversations: Sequence[Conversation]
) -> list[Conversation]:
    """The rows with their references: of a pair the chosen answer, with its reasoning apart.

    A model that answers without reasoning, of which some sources have it, is compared without.
    """
    rows = [replace(row, rejected=None, desirable=None) for row in conversations]
    template = model.processor.template
    other = template.switched
    if template.reasoning is not None or other is None or other.reasoning is None:
        return list(map(template.parted, rows))
    return [
        replace(row, messages=tuple(replace(turn, reasoning="") for turn in row.messages))
        for row in map(other.parted, rows)
    ]


def _with_losses(
    model: VisionLanguageNetwork,
    conversations: Sequence[Conversation],
    answers: list[Answer],
    loss: bool,
    perplexity: bool,
    *,
    fetch: Fetch,
    cached: bool,
    batch_size: int,
) -> Scores:
    """The scores of answers, with the losses that are wanted: by source, or of each answer."""
    if perplexity:
        row_losses = _row_losses(model, conversations, batch_size, fetch, cached)
        answers = [
            replace(answer, loss=total, tokens=tokens)
            for answer, (total, tokens) in zip(answers, row_losses, strict=True)
        ]
        entries = ((answer.source, answer.loss, answer.tokens) for answer in answers)
        return scores(answers, sum_losses(entries) if loss else {})
    losses: Losses = {}
    for places in each_task(model, [row.source_name for row in conversations]) if loss else ():
        of_task = [conversations[place] for place in places]
        for name in dict.fromkeys(row.source_name for row in of_task):
            rows = [row for row in of_task if row.source_name == name]
            losses[name] = _loss(model, rows, batch_size, fetch, cached)
    return scores(answers, losses)


def score_options(settings: EvaluateSection, objective: AnyObjective | None) -> dict[str, Any]:
    """The arguments of `score` that evaluation settings and a training objective ask for.

    Of a mixture it is the first one that asks. With `ranks` all rows have to be scored together.
    """
    first = None if objective is None else parts_of(objective)[0]
    contrastive = isinstance(first, Contrastive)
    temperature = None
    if isinstance(first, Contrastive) and not first.learns_scale:
        temperature = first.temperature
    answering = "retrieve" if contrastive else settings.answering
    if isinstance(first, Matching):
        answering = "likelihood"
    names = settings.metrics or ()
    return {
        "decoding": Decoding(settings.max_new_tokens, settings.num_beams),
        "batch_size": settings.batch_size,
        "answering": answering,
        "ranks": contrastive or any(metric.name in names for metric in RETRIEVAL),
        "temperature": temperature,
        "perplexity": "perplexity" in names and not contrastive,
    }


def row_answers(conversations: Sequence[Conversation], generated: Sequence[str]) -> list[Answer]:
    """The answers to rows beside what metrics compare them with."""
    answers = []
    # Bytes that come with a row are hashed once, and not for each question about them.
    plain = [conversation.without_shots() for conversation in conversations]
    names = {item: _identity(item) for item in distinct_media(plain)}
    for conversation, text in zip(conversations, generated, strict=True):
        expected = conversation.messages[-1].text.strip()
        media = conversation.without_shots().media
        answers.append(
            Answer(
                id=conversation.id,
                image=media[0].name if media else "",
                question=conversation.question,
                expected=expected,
                generated=text,
                correct=normalise(text) == normalise(expected),
                category=conversation.category,
                source=conversation.source_name,
                images=tuple(dict.fromkeys(names[item] for item in media)),
                references=_scored(conversation),
                modality=_subject(media),
            )
        )
    return answers


def _scored(row: Conversation) -> References:
    """The references that metrics use: a folder's thousand classes are not part of every answer."""
    references = replace(row.references, size=region_size(row.messages[-1]))
    if references.form != "classify":
        return references
    return replace(references, choices=(), chosen=None)


def _subject(media: Sequence[Media]) -> Subject:
    """The kind of media that a question with these media is about."""
    if not media:
        return "image"
    return "video" if media[0].of_video else media[0].modality


def _identity(media: Media) -> str:
    """A name unique to an image: its path, or a digest of bytes that came with the row."""
    if isinstance(media.source, bytes):
        return f"sha256:{hashlib.sha256(media.source).hexdigest()[:32]}"
    return media.name


def _batches(
    model: VisionLanguageNetwork,
    conversations: Sequence[Conversation],
    batch_size: int,
    fetch: Fetch,
    cached: bool,
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of whole rows, by length, with the number of each example's conversation."""
    examples = [
        (number, example)
        for number, conversation in enumerate(conversations)
        for example in model.processor.examples(conversation)
    ]
    examples.sort(key=lambda pair: len(pair[1].input_ids))
    for start in range(0, len(examples), batch_size):
        chosen = examples[start : start + batch_size]
        batch = collate(
            [example for _, example in chosen],
            model.processor.spec,
            fetch=fetch,
            cached=cached,
        )
        yield [number for number, _ in chosen], batch.to(model.device)


@torch.inference_mode()
def _loss(
    model: VisionLanguageNetwork,
    conversations: Sequence[Conversation],
    batch_size: int,
    fetch: Fetch,
    cached: bool,
) -> tuple[float, int]:
    """Summed cross-entropy of the reference answers, and their number of tokens."""
    total = 0.0
    count = 0
    for _, batch in _batches(model, conversations, batch_size, fetch, cached):
        outcome: Any = model(batch)
        total = total + float(outcome.sum)
        count = count + outcome.count
    return total, count


@torch.inference_mode()
def _row_losses(
    model: VisionLanguageNetwork,
    conversations: Sequence[Conversation],
    batch_size: int,
    fetch: Fetch,
    cached: bool,
) -> list[tuple[float, int]]:
    """Summed cross-entropy of each row's reference answers, and their number of tokens."""
    losses = [(0.0, 0)] * len(conversations)
    for places in each_task(model, [row.source_name for row in conversations]):
        of_task = [conversations[place] for place in places]
        for numbers, batch in _batches(model, of_task, batch_size, fetch, cached):
            hidden, targets = model.llm.supervised(model.embed(batch), batch)
            counts = (batch.on_host.labels != IGNORE_INDEX).sum(1).tolist()
            rows = zip(numbers, hidden.split(counts), targets.split(counts), strict=True)
            for number, row_hidden, row_targets in rows:
                total, tokens = losses[places[number]]
                row_loss = float(model.llm.loss(model.llm, row_hidden, row_targets))
                losses[places[number]] = total + row_loss, tokens + len(row_targets)
    return losses
