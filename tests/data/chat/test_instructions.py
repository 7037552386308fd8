"""Prompt sets: every task has them in two languages, and they fill in whatever a row holds.

The phrasing is drawn stably.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from vlm_tune.data.chat.instructions import FIELDS, load_instructions
from vlm_tune.data.types import Media
from vlm_tune.errors import DataError
from vlm_tune.resources import resource_names

SETS = resource_names("data_templates/instructions")
VALUES = {
    "vqa": {"question": "Q{x}%s?", "answer": "A"},
    "multiple_choice": {
        "question": "Q{x}?",
        "choices": "A. {x}\nB. y",
        "letter": "A",
        "answer": "{x}",
    },
    "caption": {"caption": "C{y}"},
    "match": {"caption": "C{y}", "answer": "A"},
    "classify": {"choices": "x, {y}", "label": "{y}"},
    "retrieval": {"candidates": "- {x}\n- y", "answer": "{x}"},
    "ocr": {"text": "T{0}"},
    "translate": {
        "text": "{T}",
        "source_language": "S{s}",
        "target_language": "L{}",
        "translation": "{U}",
    },
    "grounding": {"phrase": "P{0}", "region": "<bbox>"},
}
TOLD = {
    "match": ["caption"],
    "vqa": ["question"],
    "multiple_choice": ["question", "choices"],
    "classify": ["choices"],
    "retrieval": ["candidates"],
    "translate": ["text", "source_language", "target_language"],
    "grounding": ["phrase"],
}
ANSWERS = {
    "vqa": "answer",
    "caption": "caption",
    "match": "answer",
    "classify": "label",
    "retrieval": "answer",
    "ocr": "text",
    "translate": "translation",
    "grounding": "region",
}
ANSWERS |= {"multiple_choice": "letter"}


def test_every_task_has_an_english_and_a_chinese_prompt_set_of_several_phrasings() -> None:
    """But for `match`, whose objective tells captions apart by their prompts."""
    assert set(FIELDS) == set(VALUES)
    for task in FIELDS:
        least = 1 if task == "match" else 3
        sets = [load_instructions(name, task) for name in SETS if name.split("-")[0] == task]
        assert {prompt_set.language for prompt_set in sets} == {"en", "zh"}
        assert all(
            any(
                prompt_set.language == language and len(prompt_set.prompts) >= least
                for prompt_set in sets
            )
            for language in ("en", "zh")
        )
        for prompt_set in sets:
            chinese = [
                any("\u4e00" <= c <= "\u9fff" for c in prompt)
                for prompt in prompt_set.prompts
                if prompt != "{question}"
            ]
            assert all(is_chinese == (prompt_set.language == "zh") for is_chinese in chinese)
            assert len(set(prompt_set.prompts)) == len(prompt_set.prompts)
    assert {name.split("-")[0] for name in SETS} == set(FIELDS)


@pytest.mark.parametrize("name", SETS)
def test_a_prompt_set_fills_in_its_fields_whatever_they_hold(name: str) -> None:
    task = name.split("-")[0]
    prompt_set, media, values = load_instructions(name, task), Media(b"i"), VALUES[task]
    for number in range(20):
        question, answer = prompt_set.messages(f"r{number}", ("0.0s: ", media), values, seed=0)[-2:]
        assert (
            question.parts[:2] == ("0.0s: ", media)
            and answer.text == values["answer" if name.endswith("-text") else ANSWERS[task]]
        )
        assert all(values[field] in question.text for field in TOLD.get(task, []))


@pytest.mark.parametrize("name", ["translate", "translate-zh"])
@pytest.mark.parametrize(
    "given", [(), ("text",), ("source_language",), ("text", "source_language")]
)
def test_a_translation_is_asked_for_with_all_that_the_row_tells(
    name: str, given: tuple[str, ...]
) -> None:
    prompt_set = load_instructions(name, "translate")
    values = {
        field: VALUES["translate"][field] for field in ("target_language", "translation", *given)
    }
    prompts = {prompt_set.messages(str(number), (), values, seed=0)[0].text for number in range(40)}
    assert len(prompts) == 2
    for text in prompts:
        assert [
            field for field in ("text", "source_language") if VALUES["translate"][field] in text
        ] == list(given)


def test_a_set_without_a_phrasing_for_a_row_says_which_field_the_row_lacks(tmp_path: Path) -> None:
    path = tmp_path / "set.yaml"
    path.write_text(
        "task: translate\nlanguage: en\nprompts: ['{target_language}: {text}']\nanswer: "
        "'{translation}'\n"
    )
    prompt_set = load_instructions(str(path), "translate")
    with pytest.raises(
        DataError, match="every prompt of the instruction set uses source_language, text"
    ):
        prompt_set.messages("r", (), {"target_language": "de", "translation": "x"}, seed=0)


def test_the_phrasing_is_a_function_of_seed_and_row_and_varies_with_both() -> None:
    prompt_set = load_instructions("vqa-varied", "vqa")

    def phrasings(seed: int) -> list[str]:
        return [
            prompt_set.messages(f"row {n}", (), VALUES["vqa"], seed=seed)[0].text
            for n in range(200)
        ]

    assert phrasings(0) == phrasings(0) != phrasings(1)
    counts = [phrasings(0).count(text) for text in set(phrasings(0))]
    assert len(counts) == len(prompt_set.prompts) and min(counts) > 20
    # Stable over versions: a changed draw changes every run.
    assert phrasings(0)[0] == "Q{x}%s?\nAnswer with a single word or a short phrase."


SHIPPED = {
    "caption": "cddef4375da9",
    "caption-zh": "789f6dde93d5",
    "classify": "de4f8bd20dc5",
    "classify-zh": "28537283b560",
    "vqa": "50c789974eb7",
    "vqa-varied": "8195da5c661f",
    "vqa-zh": "67e5b042fe53",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_sets_that_models_were_trained_with_stay_as_they_are(name: str) -> None:
    shipped = load_instructions(name, name.split("-")[0])
    assert (
        hashlib.sha256(json.dumps([shipped.prompts, shipped.answer]).encode()).hexdigest()[:12]
        == SHIPPED[name]
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{picture}", r"uses \['picture'\]"),
        ("{question", "brace"),
        ("{question.__class__}", "uses"),
        ("{}", "uses"),
        ("{0}", "uses"),
    ],
)
def test_prompt_sets_with_wrong_fields_are_refused(
    tmp_path: Path, prompt: str, message: str
) -> None:
    path = tmp_path / "set.yaml"
    path.write_text(
        f"task: vqa\nlanguage: en\nprompts: [{json.dumps(prompt)}]\nanswer: '{{answer}}'\n"
    )
    with pytest.raises(DataError, match=message):
        load_instructions(str(path), "vqa")


def test_a_prompt_set_for_another_task_is_refused() -> None:
    with pytest.raises(
        DataError, match="an instruction set for caption, the source gives vqa rows"
    ):
        load_instructions("caption", "vqa")
    with pytest.raises(DataError, match=r"no instruction set 'nope'; expected one of .*vqa"):
        load_instructions("nope", "vqa")
