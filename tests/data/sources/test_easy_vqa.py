"""easy-VQA: its parts share no image, and what its questions reveal is true."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_tune.config.data import EasyVqaSource
from vlm_tune.data.images.decode import decode_image
from vlm_tune.data.regions import regions_of
from vlm_tune.data.sources import easy_vqa
from vlm_tune.data.sources.easy_vqa import COLORS, SHAPES, answer_type, questions, revealed
from vlm_tune.data.sources.registry import open_source, read_all
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError


def easy(split: str, **options: Any) -> list[Conversation]:
    source = EasyVqaSource(kind="easy_vqa", split=split, **options)  # type: ignore[arg-type]
    return [row for row in read_all([open_source(source, seed=0)]) if isinstance(row, Conversation)]


def test_a_shape_is_where_its_box_says() -> None:
    rows = easy("validation", task="grounding", instructions="grounding")
    assert len(rows) > 150
    for row in rows[:20]:
        (region,) = regions_of(row)
        pixels = np.asarray(decode_image(row.media[0].read()), dtype=int)
        left, top, right, bottom = (int(number) for number in region.coordinates)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        background = np.median(border, axis=0)
        inside = np.abs(pixels[top:bottom, left:right] - background).sum(-1) > 0
        outside = np.abs(pixels - background).sum(-1)
        outside[top:bottom, left:right] = 0
        assert inside.mean() > 0.4 and (outside > 30).sum() == 0
        color, shape = (
            row.question.rstrip("?.").split()[-2:]
            if "image" not in row.question
            else (row.question.split(" the ")[1].split()[:2])
        )
        assert color in COLORS and shape in SHAPES and row.category == shape


def test_train_validation_and_test_share_no_image_and_lose_no_row() -> None:
    splits = {split: easy(split) for split in ("train", "validation", "test")}
    images = {split: {row.media[0] for row in rows} for split, rows in splits.items()}
    assert len(images["validation"]) == 200
    assert not images["train"] & images["validation"] and not images["test"] & (
        images["train"] | images["validation"]
    )
    assert len(splits["train"]) + len(splits["validation"]) == len(
        easy("train", validation_images=0)
    )
    for split, rows in splits.items():
        assert len({row.id for row in rows}) == len(rows)
        assert all(
            row.media[0].source.is_file()  # type: ignore[union-attr]
            for row in rows[:: len(rows) // 20]
        )
        assert [row.row for row in rows] == list(range(1, len(rows) + 1)) and {
            row.source for row in rows
        } == {f"easy_vqa/{split}"}
        assert {row.category for row in rows} == {"yes/no", "color", "shape"}
    with pytest.raises(DataError, match="leaves none"):
        easy("train", validation_images=10_000_000)


def test_categories_choose_rows() -> None:
    rows = easy("validation")
    parts = [easy("validation", categories=[name]) for name in ("color", "shape", "yes/no")]
    assert sorted(row.id for part in parts for row in part) == sorted(row.id for row in rows)
    assert [{row.category for row in part} for part in parts] == [{"color"}, {"shape"}, {"yes/no"}]


def test_answer_types() -> None:
    assert [answer_type(answer) for answer in ("yes", "no", "teal", "circle")] == [
        "yes/no",
        "yes/no",
        "color",
        "shape",
    ]


@pytest.mark.parametrize(
    ("question", "answer", "known"),
    [
        ("what color is the shape?", "red", {"color": "red"}),
        ("what shape is in the image?", "circle", {"shape": "circle"}),
        ("what is the color of the triangle?", "teal", {"color": "teal", "shape": "triangle"}),
        ("what is the blue shape?", "rectangle", {"color": "blue", "shape": "rectangle"}),
        ("is there a red shape?", "yes", {"color": "red"}),
        ("is there a red shape?", "no", {}),
        ("is there not a red shape?", "no", {"color": "red"}),
        ("is there not a red shape?", "yes", {}),
        ("is no circle present?", "no", {"shape": "circle"}),
        ("is no circle present?", "yes", {}),
        ("does the image contain a circle?", "yes", {"shape": "circle"}),
    ],
)
def test_what_a_question_and_its_answer_reveal(
    question: str, answer: str, known: dict[str, str]
) -> None:
    assert revealed([(0, question, answer, 7)]) == ({7: known} if known else {})


def test_what_the_train_split_reveals_agrees_with_all_of_an_images_answers() -> None:
    """Truth of each statement is judged from the words, apart from how `revealed` found them."""
    rows = questions("train", 200)
    attributes = revealed(rows)
    assert len(attributes) > 0.95 * len({image for *_, image in rows})
    assert {known["color"] for known in attributes.values() if "color" in known} == set(COLORS)
    assert {known["shape"] for known in attributes.values() if "shape" in known} == set(SHAPES)
    checked = 0
    for _, question, answer, image in rows:
        words = question.rstrip("?").split()
        for kind, names in (("color", COLORS), ("shape", SHAPES)):
            known = attributes.get(image, {}).get(kind)
            if answer in names:
                assert known == answer
            named = [word for word in words if word in names]
            if answer in ("yes", "no") and named and known:
                denied = "not" in words or "no" in words
                assert (named[0] == known) == ((answer == "yes") != denied), (
                    question,
                    answer,
                    known,
                )
                checked += 1
    assert checked > 1000


def test_captions_say_what_is_revealed_and_only_for_their_split() -> None:
    captions = easy("validation", task="caption", instructions="caption")
    rows = questions("validation", 200)
    known = revealed(rows)
    assert len(captions) == sum(map(len, known.values()))
    for row in captions:
        image = int(row.media[0].source.stem)  # type: ignore[union-attr]
        assert row.messages[-1].text == known[image][row.category]


def test_chunks_are_read_alone_and_the_fingerprint_follows_what_is_read() -> None:
    def opened(seed: int = 0, **options: Any) -> Any:
        return open_source(
            EasyVqaSource(kind="easy_vqa", **{"split": "validation", **options}), seed=seed
        )

    reader = pickle.loads(pickle.dumps(opened(split="test")))
    last = list(reader.chunks())[-1]
    assert list(reader.conversations(last)) == easy("test")[last.first_row - 1 :]
    prints = [
        opened().fingerprint(),
        opened(1).fingerprint(),
        opened(task="caption", instructions="caption").fingerprint(),
    ]
    prints += [
        opened(validation_images=100).fingerprint(),
        opened(split="train").fingerprint(),
        opened(instructions="vqa-zh").fingerprint(),
        opened(categories=["color"]).fingerprint(),
    ]
    assert len(set(prints)) == len(prints) and prints[0] == opened(limit=5).fingerprint()


def test_rows_of_another_installation_are_other_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their images are elsewhere: prepared rows of one are none of the other."""
    config = EasyVqaSource(kind="easy_vqa", split="test")
    here = open_source(config, seed=0).fingerprint()
    (tmp_path / "test").mkdir()
    shutil.copy(easy_vqa.part_folder("test") / "questions.json", tmp_path / "test")
    monkeypatch.setattr(easy_vqa, "_folder", lambda: tmp_path)
    assert open_source(config, seed=0).fingerprint() != here
