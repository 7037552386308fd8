"""Boxes and points of rows: where the marks say, in pixels of the original, or an error."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.audio_samples import tone, wav
from vlm_tune.config.data import FileSource
from vlm_tune.data.regions import Region, regions_of
from vlm_tune.data.sources.registry import open_source, read_all
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError


def images(folder: Path) -> None:
    for name, size in (("a.png", (80, 40)), ("b.png", (10, 20))):
        stream = io.BytesIO()
        Image.new("RGB", size).save(stream, "PNG")
        (folder / name).write_bytes(stream.getvalue())


def read(folder: Path, row: dict[str, Any], **options: Any) -> Conversation | DataError:
    images(folder)
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (one,) = read_all([open_source(FileSource(kind="file", path=str(path), **options), seed=0)])
    return one


def usable(folder: Path, row: dict[str, Any], **options: Any) -> Conversation:
    one = read(folder, row, **options)
    assert isinstance(one, Conversation), one
    return one


def turns(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": ["a.png"], **fields}


def test_objects_as_ms_swift_has_them(tmp_path: Path) -> None:
    row = turns(
        "<image>Find <ref-object>, is it <bbox>?",
        "<bbox> and <ref-object>",
        objects={"ref": ["a dog", "a cat"], "bbox": [[1, 2, 3, 4], [5.5, 6, 80, 40]]},
    )
    read_row = usable(tmp_path, row)
    question, answer = read_row.messages
    assert question.parts[1:] == ("Find a dog, is it ", "[1, 2, 3, 4]", "?")
    assert answer.parts == ("[5.5, 6, 80, 40]", " and a cat")
    assert [(each.coordinates, each.size) for each in regions_of(read_row)] == [
        ((1, 2, 3, 4), (80, 40)),
        ((5.5, 6, 80, 40), (80, 40)),
    ]


@pytest.mark.parametrize(
    ("fields", "options", "coordinates"),
    [
        ({"objects": {"bbox": [[0.25, 0.5, 0.5, 1]], "bbox_type": "norm1"}}, {}, (20, 20, 40, 40)),
        ({"objects": {"bbox": [[1, 2, 3, 5]], "bbox_type": "real"}}, {}, (1, 2, 3, 5)),
        ({"objects": {"bbox": [[7, 9]], "ref": []}}, {}, (7, 9)),
        ({"box": [1, 2, 3, 5]}, {}, (1, 2, 3, 5)),
        ({"boxes": [[1, 2, 3, 5]]}, {"box_format": "xywh"}, (1, 2, 4, 7)),
        ({"bbox": "[1, 2, 3, 5]"}, {}, (1, 2, 3, 5)),
        ({"bboxes": [[250, 500, 500, 1000]]}, {"box_unit": "norm1000"}, (20, 20, 40, 40)),
        ({"boxes": [[0, 0, 80.6, 40]]}, {}, (0, 0, 80, 40)),
    ],
)
def test_fields_formats_and_units(
    tmp_path: Path, fields: dict[str, Any], options: dict[str, Any], coordinates: tuple[float, ...]
) -> None:
    row = usable(tmp_path, turns("Where?", "<bbox>", **fields), **options)
    (region,) = regions_of(row)
    assert region.coordinates == pytest.approx(coordinates) and region.size == (80, 40)


def test_a_region_is_of_the_image_that_image_id_names(tmp_path: Path) -> None:
    objects = {"bbox": [[0, 0, 0.5, 0.5], [0, 0, 1, 1]], "image_id": [1, 0], "bbox_type": "norm1"}
    row = turns("<image><image>Where?", "<bbox><bbox>", objects=objects)
    regions = regions_of(usable(tmp_path, row | {"images": ["a.png", "b.png"]}))
    assert [(each, each.size) for each in regions] == [
        ("[0, 0, 5, 10]", (10, 20)),
        ("[0, 0, 80, 40]", (80, 40)),
    ]


def test_points_and_marks_that_are_text(tmp_path: Path) -> None:
    row = usable(tmp_path, turns(r"Is \<bbox> <point>?", "At <point>", points=[[1, 2], [3, 4]]))
    assert row.messages[0].parts[1:] == ("Is <bbox> ", "[1, 2]", "?")
    assert row.messages[1].parts == ("At ", "[3, 4]")
    plain = usable(tmp_path, turns("Is <bbox> a mark?", "no", points=5, box="large"))
    assert plain.question == "Is <bbox> a mark?"


def test_grounding_rows_are_detected_and_put_into_words(tmp_path: Path) -> None:
    row = {"image": "a.png", "phrase": "the <bbox> dog", "boxes": [[1, 2, 3, 4], [5, 6, 7, 8]]}
    read_row = usable(tmp_path, row | {"category": "animals"})
    assert read_row.references.form == "grounding" and read_row.category == "animals"
    assert "the <bbox> dog" in read_row.question
    assert read_row.messages[-1].text == "[1, 2, 3, 4], [5, 6, 7, 8]"
    point = usable(tmp_path, {"image": "a.png", "phrase": "it", "point": [8, 9]})
    assert point.messages[-1].parts == (Region((8, 9), (80, 40)),)


@pytest.mark.parametrize("words", ["There: ", "Here: "])
def test_rejected_answers_have_boxes_too(tmp_path: Path, words: str) -> None:
    row = {
        "question": "Where?",
        "chosen": "Here: <bbox>",
        "rejected": f"{words}<bbox>",
        "image": "a.png",
        "boxes": [[1, 2, 3, 4], [0, 0, 9, 9]],
    }
    read_row = usable(tmp_path, row)
    assert read_row.rejected is not None
    assert read_row.messages[-1].text == "Here: [1, 2, 3, 4]"
    assert read_row.rejected.text == f"{words}[0, 0, 9, 9]"


def test_a_rejected_box_that_is_the_chosen_one_is_an_error(tmp_path: Path) -> None:
    row = {"question": "Where?", "chosen": "<bbox>", "rejected": "<bbox>", "image": "a.png"}
    fault = read(tmp_path, row | {"boxes": [[1, 2, 3, 4], [1, 2, 3, 4]]})
    assert isinstance(fault, DataError) and fault.kind == "equal_answers"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"box": [1, 2, 3]}, "a box must be [x1, y1, x2, y2], got [1, 2, 3]"),
        ({"box": [1, 2, "3", 4]}, "a box must be [x1, y1, x2, y2]"),
        ({"box": [1, 2, float("nan"), 4]}, "a box must be [x1, y1, x2, y2]"),
        ({"box": [1, 2, 10**400, 4]}, "a box must be [x1, y1, x2, y2]"),
        ({"box": [3, 2, 1, 4]}, "is empty, or its corners are swapped"),
        ({"box": [1, 2, 1, 4]}, "is empty, or its corners are swapped"),
        ({"box": [1, 2, 90, 4]}, "of an image of 80x40 is outside of it"),
        ({"box": [-9, 2, 9, 4]}, "is outside of it"),
        ({"box": [80.2, 2, 80.9, 4]}, "is outside of it"),
        ({"boxes": [[1, 2, 3, 4], [1, 2, 3, 4]]}, "2 boxes and 1 <bbox> mark in the texts"),
        ({"points": [[1, 2]]}, "0 boxes and 1 <bbox> mark"),
        ({"objects": {"ref": ["a"]}}, "0 boxes and 1 <bbox> mark"),
        ({"box": [1, 2, 3, 4], "bbox": [1, 2, 3, 4]}, "both `box` and `bbox`"),
        ({"objects": [1]}, "`objects` must be an object of `ref` and `bbox`"),
        ({"objects": {"bbox": 5}}, "`objects.bbox` must be a list"),
        ({"objects": {"bbox": [[1, 2, 3, 4]], "bbox_type": "cm"}}, "is not one of real, norm1"),
        ({"objects": {"bbox": [[1, 2, 3, 4]], "image_id": [2]}}, "not one of the row's 1 images"),
        ({"objects": {"bbox": [[1, 2, 3, 4]], "image_id": []}, "box": [1, 2, 3, 4]}, "boxes in"),
        ({"objects": {"bbox": [[1, 2, 3, 4]], "image_id": [0, 0]}}, "1 bbox and 2 image_id"),
        (
            {"objects": {"bbox": [[1, 2, 3, 4]], "ref": [4]}},
            "`objects.ref` must be a list of texts",
        ),
        ({"bbox": "[1, 2"}, "`bbox` is not JSON"),
    ],
)
def test_faults_name_the_row(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    fault = read(tmp_path, turns("Where?", "<bbox>", **fields))
    assert isinstance(fault, DataError) and message in fault.message, fault
    assert fault.row == 1 and fault.source.endswith("rows.jsonl")
    assert isinstance(read(tmp_path, turns("Hi?", "yes", **fields), ignore=[*fields]), Conversation)


def test_a_box_without_an_image_is_an_error(tmp_path: Path) -> None:
    fault = read(tmp_path, turns("Where?", "<bbox>", box=[1, 2, 3, 4]) | {"images": []})
    assert isinstance(fault, DataError) and "a box or point and no image" in fault.message


@pytest.mark.parametrize(
    ("box", "read_as"),
    [
        ("1, 2, 3, 4", "got '1, 2, 3, 4'"),
        ({"x": 1, "y": 2, "width": 3, "height": 4}, "got a mapping with x, y, width, height"),
        (None, ""),
        ([], ""),
    ],
)
def test_a_mark_beside_a_field_that_holds_no_box_is_no_text(
    tmp_path: Path, box: Any, read_as: str
) -> None:
    """The model would learn to answer `<bbox>`."""
    error = read(tmp_path, turns("<image>Where?", "<bbox>", box=box))
    assert isinstance(error, DataError) and error.kind == "box"
    assert "0 boxes and 1 <bbox> mark in the texts" in error.message and read_as in error.message
    assert usable(tmp_path, turns("<image>Where?", "here", box=box)).messages[-1].text == "here"
    ignored = usable(tmp_path, turns("<image>Where?", "<bbox>", box=box), ignore=["box"])
    assert ignored.messages[-1].text == "<bbox>"


def test_a_phrase_whose_box_is_no_list_says_so(tmp_path: Path) -> None:
    images(tmp_path)
    rows = [{"image": "a.png", "phrase": "it", "box": box} for box in ([1, 2, 3, 4], "1 2 3 4")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, error = read_all([open_source(FileSource(kind="file", path=str(path)), seed=0)])
    assert isinstance(error, DataError) and error.kind == "box"
    assert error.message == "`box` must be [x1, y1, x2, y2] or a list of them, got '1 2 3 4'"


def test_a_box_of_a_clip_is_a_box_without_an_image(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(tone()))
    row = turns("Where?", "<bbox>", box=[1, 2, 3, 4]) | {"images": [], "audio": "a.wav"}
    error = read(tmp_path, row)
    assert isinstance(error, DataError) and error.message == "a box or point and no image"
