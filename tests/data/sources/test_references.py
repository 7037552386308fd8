"""Rows bring along what scores need besides the answer that is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.row_samples import file_source, good, read, write_rows
from vlm_tune.config.data import EasyVqaSource, FolderSource
from vlm_tune.data.sources.registry import open_source, read_all
from vlm_tune.data.types import Conversation, References

QUESTION = {"image": "a.png", "question": "what is it?"}
TEN = ["red", "red", "dark red", "crimson"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (32, 24), (200, 40, 40)).save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize(
    ("row", "options", "answer", "references"),
    [
        ({**QUESTION, "answer": "red"}, {}, "red", References("vqa")),
        ({**QUESTION, "answers": TEN}, {}, "red", References("vqa", tuple(TEN))),
        (
            {**QUESTION, "answers": [{"answer": text, "answer_id": 1} for text in TEN]},
            {},
            "red",
            References("vqa", tuple(TEN)),
        ),
        (
            {**QUESTION, "answer": "crimson", "answers": [*TEN, None, ""]},
            {},
            "crimson",
            References("vqa", tuple(TEN)),
        ),
        (
            {**QUESTION, "answer": "2", "answers": [2.5, 2]},
            {},
            "2",
            References("vqa", ("2.5", "2")),
        ),
        ({**QUESTION, "answer": "red", "answers": "not a list"}, {}, "red", References("vqa")),
        (
            {**QUESTION, "choices": ["cat", "dog"], "answer": 1},
            {"form": "multiple_choice"},
            "B",
            References("multiple_choice", choices=("cat", "dog"), chosen=1),
        ),
        (
            {"image": "a.png", "caption": ["a cat", "one cat", ""]},
            {},
            "a cat",
            References("caption", ("a cat", "one cat")),
        ),
        ({"image": "a.png", "caption": "a cat"}, {}, "a cat", References("caption")),
        (
            {"image": "a.png", "label": "dog", "choices": ["cat", "dog"]},
            {},
            "dog",
            References("classify", choices=("cat", "dog"), chosen=1),
        ),
        (
            {"image": "a.png", "answer": "a cat", "candidates": ["a cat", "a dog"]},
            {},
            "a cat",
            References("retrieval", choices=("a cat", "a dog"), chosen=0),
        ),
        ({"image": "a.png", "text": "EXIT"}, {}, "EXIT", References("ocr")),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            {},
            "a",
            References("messages"),
        ),
    ],
)
def test_a_row_has_its_references(
    folder: Path, row: dict[str, Any], options: dict[str, Any], answer: str, references: References
) -> None:
    (conversation,) = good(read(file_source(write_rows(folder / "rows.jsonl", [row]), **options)))
    assert conversation.messages[-1].text == answer
    assert conversation.references == references


def test_shuffled_choices_are_those_that_are_shown(folder: Path) -> None:
    rows = [{**QUESTION, "choices": ["cat", "dog", "owl"], "answer": "dog"}] * 8
    source = file_source(
        write_rows(folder / "rows.jsonl", rows), form="multiple_choice", shuffle_choices=True
    )
    conversations = good(read(source))
    for conversation in conversations:
        references = conversation.references
        assert references.chosen is not None and references.choices[references.chosen] == "dog"
        letter = conversation.messages[-1].text
        assert f"{letter}. dog" in conversation.messages[0].text
    assert len({conversation.references.choices for conversation in conversations}) > 1


def test_other_sources_say_their_form(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 24)).save(tmp_path / name / "a.png")
    folders = FolderSource(kind="folder", path=str(tmp_path))
    rows = [
        row for row in read_all([open_source(folders, seed=0)]) if isinstance(row, Conversation)
    ]
    assert [row.references.chosen for row in rows] == [0, 1]
    assert rows[0].references == References("classify", choices=("cat", "dog"), chosen=0)
    easy = EasyVqaSource(kind="easy_vqa", split="validation", validation_images=1)
    first = next(iter(read_all([open_source(easy, seed=0)])))
    assert isinstance(first, Conversation) and first.references == References("vqa")
