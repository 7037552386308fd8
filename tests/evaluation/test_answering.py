"""Rows with choices are answered by the likeliest of them, others are generated."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_models import built, parsed, rows_of
from vlm_tune.api import evaluate, sft
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.types import Conversation, Message, References
from vlm_tune.errors import RecipeError
from vlm_tune.evaluation.answer_files import read_answers
from vlm_tune.evaluation.answering import answer_rows, candidate_answers
from vlm_tune.generation.choices import choose
from vlm_tune.model.language.decoding import Decoding


def row(expected: str, choices: tuple[str, ...], chosen: int | None) -> Conversation:
    messages = (Message("user", ("q",)), Message("assistant", (expected,)))
    return Conversation("1", messages, references=References("x", (), choices, chosen))


@pytest.mark.parametrize(
    ("expected", "choices", "chosen", "answers"),
    [
        ("dog", ("cat", "dog"), 1, ["cat", "dog"]),
        ("B", ("cat", "dog", "cow"), 1, ["A", "B", "C"]),
        ("(B)", ("cat", "dog"), 1, ["(A)", "(B)"]),
        ("B. dog", ("cat", "dog"), 1, ["A. cat", "B. dog"]),
        ("The answer is A.", ("cat", "dog"), 0, ["The answer is A.", "The answer is B."]),
        ("The answer is dog.", (" cat", "dog "), 1, ["The answer is cat.", "The answer is dog."]),
        ("A dog", ("A dog", "A cat"), 0, ["A dog", "A cat"]),
        ("A or B: A", ("cat", "dog"), 0, []),
        ("B", ("B", "A"), 0, ["B", "A"]),
        ("red", ("red", "blue", "blue"), 0, ["red", "blue"]),
        ("class 7", tuple(f"class {number}" for number in range(40)), 7, None),
        ("something else", ("cat", "dog"), 1, []),
        ("dog", (), None, []),
    ],
)
def test_the_reference_is_rewritten_for_each_choice(
    expected: str, choices: tuple[str, ...], chosen: int | None, answers: list[str] | None
) -> None:
    wanted = list(choices) if answers is None else answers
    assert candidate_answers(row(expected, choices, chosen)) == wanted


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_likelihood_chooses_as_each_question_by_itself(
    kind: str, tiny_recipe: Callable[..., str]
) -> None:
    recipe = parsed(tiny_recipe(kind))
    model = built(recipe).eval()
    colors = ("red", "green", "blue", "yellow")
    rows = [
        replace(each, references=References("vqa", (), colors, colors.index(answer)))
        if (answer := each.messages[-1].text) in colors
        else each
        for each in rows_of(recipe)
    ]
    fetch = PixelCache(model.processor.images)
    steps: list[tuple[int, int]] = []
    options: dict[str, Any] = {"decoding": Decoding(2), "batch_size": 3, "likelihood": True}
    answers = answer_rows(
        model,
        rows,
        fetch=fetch,
        cached=False,
        progress=lambda done, of: steps.append((done, of)),
        **options,
    )
    for each, text in zip(rows, answers, strict=True):
        if each.references.chosen is not None:
            question = replace(each, messages=each.messages[:-1])
            (alone,) = choose(model, [question], [list(colors)], fetch=fetch)
            assert text == alone.text
    assert steps[-1] == (len(rows), len(rows)) and steps == sorted(steps)


def test_a_run_and_eval_answer_by_likelihood(
    tiny_recipe: Callable[..., str], color_rows: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "choices.jsonl"
    entries = [
        {
            "image": str(color_rows.parent / f"{name}.png"),
            "question": "which?",
            "choices": ["red", "green", "blue"],
            "answer": name,
        }
        for name in ("red", "green", "blue")
    ]
    rows.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    part = [{"kind": "file", "path": str(rows)}]
    changes: dict[str, Any] = {"data__validation": part, "data__test": part, "train__steps": 1}
    recipe = parsed(
        tiny_recipe("causal"),
        **changes,
        evaluate__answering="likelihood",
        evaluate__baselines=["blind"],
        evaluate__samples=1,
    )
    run = sft(recipe)
    answers = read_answers(run.folder)
    letters = {"A", "B", "C"} if answers[0].expected in "ABC" else {"red", "green", "blue"}
    assert {answer.generated for answer in answers} <= letters
    blind = run.result["baselines"]["blind"]["exact_match"]["value"]
    assert 0 < sum((run.result["accuracy"], blind)) < 2
    assert evaluate(run.folder, data=rows, baselines=[]).answers == answers
    free = evaluate(run.folder, data=rows, baselines=[], answering="generate")
    assert [each.generated for each in free.answers] != [each.generated for each in answers]
    with pytest.raises(RecipeError, match="'guess' is not one of generate, likelihood"):
        evaluate(run.folder, data=rows, answering="guess")  # type: ignore[arg-type]
