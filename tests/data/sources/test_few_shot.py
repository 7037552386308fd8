"""Worked examples before a question.

The same wherever a row is read, never with its own image, never trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.row_samples import file_source, good, read, write_rows
from vlm_tune.data.sources import few_shot, json_csv
from vlm_tune.data.sources.registry import open_source
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Twelve images and four questions about each."""
    rows = []
    for number in range(12):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        rows += [
            {
                "image": f"{number}.png",
                "question": f"what is {number}.{n}?",
                "answer": f"it is {number}.{n}",
            }
            for n in range(4)
        ]
    return write_rows(tmp_path / "rows.jsonl", rows)


@pytest.mark.parametrize("count", [1, 3, 16])
def test_examples_have_other_images_and_carry_no_loss(path: Path, count: int) -> None:
    plain = good(read(file_source(path)))
    for row, bare in zip(good(read(file_source(path, shots=count))), plain, strict=True):
        assert (
            row.messages[-2:] == bare.messages
            and row.id == bare.id
            and len(row.messages) == 2 * count + 2
        )
        assert [message.trained for message in row.messages if message.role == "assistant"] == [
            False
        ] * count + [True]
        assert bare.media[0] not in row.media[:-1] and len(row.media) == count + 1
        questions = [message.parts[-1] for message in row.messages if message.role == "user"]
        assert len(set(questions)) == count + 1
        # Each example is a question of the source with its own image and answer.
        known = {other.messages[0].parts: other.messages[1].text for other in plain}
        for question, answer in zip(row.messages[:-2:2], row.messages[1:-2:2], strict=True):
            assert known[question.parts] == answer.text


def test_examples_are_drawn_by_seed_and_row_and_vary(path: Path) -> None:
    one, same, other = (good(read(file_source(path, shots=2), seed=seed)) for seed in (0, 0, 1))
    assert one == same != other
    first = [row.messages[0].parts for row in one]
    assert len(set(first)) > 12
    assert one[0].messages[0].text == "what is 1.0?", (
        "stable over versions: a changed draw changes every run"
    )


def test_examples_do_not_depend_on_which_chunk_a_worker_reads(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = good(read(file_source(path, shots=2)))
    monkeypatch.setattr(json_csv, "CHUNK_ROWS", 5)
    for chunk in open_source(file_source(path), seed=0).chunks():
        rows = good(list(open_source(file_source(path, shots=2), seed=0).conversations(chunk)))
        assert rows == whole[chunk.first_row - 1 : chunk.first_row - 1 + len(rows)]


def test_the_pool_is_the_first_rows_that_can_be_used(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_shot, "POOL_ROWS", 9)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["{", *lines]))
    rows = [row for row in read(file_source(path, shots=1)) if isinstance(row, Conversation)]
    used = {row.media[0].name.rsplit("/", 1)[1] for row in rows}
    assert used == {"0.png", "1.png"} and len(rows) == 48


def test_too_few_other_images_is_an_error_of_the_row(path: Path) -> None:
    path.write_text(
        "\n".join(path.read_text().splitlines()[:6])
    )  # four questions about one image, two about another
    rows = read(file_source(path, shots=3))
    assert [isinstance(row, DataError) for row in rows] == [True] * 4 + [False] * 2
    assert (
        "shots: 3 needs as many rows with other images" in str(rows[0])
        and "there are 2" in str(rows[0])
        and "row 1" in str(rows[0])
    )


def test_examples_of_conversations_are_their_first_answers_after_the_rows_system_text(
    path: Path,
) -> None:
    def row(number: int) -> dict[str, Any]:
        turns = [
            {"from": "human", "value": f"<image>q{number}"},
            {"from": "gpt", "value": f"a{number}"},
        ]
        return {
            "image": f"{number}.png",
            "conversations": [{"from": "system", "value": f"s{number}"}, *turns, *later],
        }

    later = [{"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]
    path.write_text("\n".join(json.dumps(row(number)) for number in range(2)))
    first, second = good(read(file_source(path, shots=1)))
    assert [message.text for message in first.messages] == [
        "s0",
        "q1",
        "a1",
        "q0",
        "a0",
        "sure?",
        "yes",
    ]
    assert [message.trained for message in second.messages if message.role == "assistant"] == [
        False,
        True,
        True,
    ]
