"""How rows are answered to be scored: by generation, or by the likelihood of their choices."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from vlm_tune.data.batching.collate import Fetch
from vlm_tune.data.sources.fields import LETTERS
from vlm_tune.data.types import Conversation
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.choices import choose
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.task_adapters import each_task
from vlm_tune.model.vlm import VisionLanguageNetwork


def answer_rows(
    model: VisionLanguageNetwork,
    rows: Sequence[Conversation],
    *,
    decoding: Decoding,
    batch_size: int,
    likelihood: bool,
    fetch: Fetch,
    cached: bool,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The model's answers to the last question of every row; boxes in pixels of the original.

    Args:
        model: the model, in eval mode.
        rows: conversations that end in the reference answer.
        decoding: how answers are generated.
        batch_size: rows per batch.
        likelihood: answer rows that have choices by the likeliest of them; others are generated.
        fetch: returns the pixels of a media item, or if `cached` the tower's features.
        cached: whether `fetch` returns features.
        progress: called with the number of answered rows and their total.

    Raises:
        DataError: a prompt, or a question with one of its choices, is too long; or the model has
            adapters of tasks, and a row is of none of them.
    """
    answers = [""] * len(rows)
    done = 0
    for places in each_task(model, [row.source_name for row in rows]):
        before = done

        def of_all(count: int, _: int, before: int = before) -> None:
            if progress:
                progress(before + count, len(rows))

        texts = _answers_of_task(
            model,
            [rows[place] for place in places],
            decoding=decoding,
            batch_size=batch_size,
            likelihood=likelihood,
            fetch=fetch,
            cached=cached,
            progress=of_all if progress else None,
        )
        for place, text in zip(places, texts, strict=True):
            answers[place] = model.processor.grounding.read_back(rows[place], text)
        done += len(places)
    return answers


def _answers_of_task(
    model: VisionLanguageNetwork,
    rows: Sequence[Conversation],
    *,
    decoding: Decoding,
    batch_size: int,
    likelihood: bool,
    fetch: Fetch,
    cached: bool,
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    """The answers to rows for which the right adapters are active; arguments as `answer_rows`."""
    answers = [""] * len(rows)
    candidates = [candidate_answers(row) if likelihood else [] for row in rows]
    limited = [place for place, texts in enumerate(candidates) if texts]
    done = 0
    for start in range(0, len(limited), batch_size):
        places = limited[start : start + batch_size]
        chosen = choose(
            model,
            [replace(rows[place], messages=rows[place].messages[:-1]) for place in places],
            [candidates[place] for place in places],
            fetch=fetch,
            cached=cached,
            batch_size=batch_size,
        )
        for place, answer in zip(places, chosen, strict=True):
            answers[place] = answer.text
        done += len(places)
        if progress:
            progress(done, len(rows))
    free = [place for place, texts in enumerate(candidates) if not texts]
    if free:
        texts = answer_prompts(
            model,
            model.processor.prompts([rows[place] for place in free]),
            decoding,
            fetch=fetch,
            cached=cached,
            batch_size=batch_size,
            progress=(lambda count, _: progress(done + count, len(rows))) if progress else None,
        )
        for place, text in zip(free, texts, strict=True):
            answers[place] = text
    return answers


def candidate_answers(row: Conversation) -> list[str]:
    """The reference answer of a row as it would be for each of the row's choices, in their order.

    The right choice's text and letter are replaced by those of the others, so a recipe's own
    `answer` prompt is followed. Empty where the row has no choices, and where its answer holds
    neither the text nor, as a word by itself and once, the letter.
    """
    references = row.references
    expected = row.messages[-1].text.strip()
    if references.chosen is None:
        return []
    right = references.choices[references.chosen].strip()
    before, text, after = expected.partition(right)  # `text` is empty where it is not there
    parts = [before, after] if text else [expected]
    lettered = len(references.choices) <= len(LETTERS)
    # Where there are more choices than letters nothing matches.
    letter = re.compile(rf"\b{LETTERS[references.chosen]}\b" if lettered else r"(?!)")
    marked = sum(len(letter.findall(part)) for part in parts) == 1
    if not text and not marked:
        return []
    answers = []
    for place, choice in enumerate(references.choices):
        pieces = [letter.sub(LETTERS[place], part) for part in parts] if marked else parts
        answers.append(choice.strip().join(pieces) if text else pieces[0])
    return list(dict.fromkeys(answers))
