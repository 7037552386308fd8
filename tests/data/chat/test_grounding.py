"""Boxes and points go to a model's convention and back, within a pixel, through every transform."""

from __future__ import annotations

import pickle
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from tests.helpers.chat_samples import processor
from tests.helpers.native_models import native_processor
from vlm_tune.config.boxes import Boxes
from vlm_tune.config.data import Augment, RandAugment
from vlm_tune.data.chat.grounding import Grounding
from vlm_tune.data.images.augment import draw_augmentation
from vlm_tune.data.images.decode import ImageProcessor
from vlm_tune.data.images.moves import Crop, ZoomOut
from vlm_tune.data.images.native import NativeImages
from vlm_tune.data.images.split import Idefics3Frames
from vlm_tune.data.regions import Region, located, regions_of, write_region
from vlm_tune.data.types import Conversation, Media, Message
from vlm_tune.errors import DataError

CONVENTIONS = [
    Boxes(unit="pixels"),
    Boxes(unit="pixels", style="parentheses"),
    Boxes(unit="norm1000"),
    Boxes(unit="norm1000", style="parentheses"),
    Boxes(unit="norm1"),
    Boxes(unit="norm1", decimals=2),
    Boxes(unit="loc"),
]
NAMES = [f"{each.unit}-{each.style}-{each.decimals}" for each in CONVENTIONS]
FRAMES = {
    "squash": ImageProcessor(224, "squash"),
    "pad": ImageProcessor(224, "pad"),
    "crop": ImageProcessor(224, "crop"),
    "tiles": ImageProcessor(224, "squash", tiles=((2, 1), (1, 2), (2, 2))),
    "split": ImageProcessor(224, split=Idefics3Frames(448)),
}


def tolerance(boxes: Boxes, *, thin: bool = False) -> float:
    """A pixel of the frame; half of a step where the convention's own steps are larger.

    A box that is thinner than a step is one step wide.
    """
    steps = 1.0 if thin else 0.5
    return max(1.0, steps * 10**-boxes.decimals * 224) if boxes.unit == "norm1" else 1.0


@given(st.data())
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("boxes", CONVENTIONS, ids=NAMES)
def test_a_region_comes_back_within_a_pixel(frame: str, boxes: Boxes, data: st.DataObject) -> None:
    size = (data.draw(st.integers(8, 2000)), data.draw(st.integers(8, 2000)))
    grounding = Grounding(boxes, FRAMES[frame])
    count = data.draw(st.sampled_from([2, 4]))
    share = st.floats(0, 1)
    numbers = [data.draw(share) * size[place % 2] for place in range(count)]
    if count == 4:
        numbers = [
            min(numbers[0], numbers[2]),
            min(numbers[1], numbers[3]),
            max(numbers[0], numbers[2]),
            max(numbers[1], numbers[3]),
        ]
        if numbers[2] - numbers[0] < 1 or numbers[3] - numbers[1] < 1:
            return
    region = Region(numbers, size)
    if grounding.visible(region) < 1:
        return
    row = Conversation("1", (Message("user", ("Where?",)), Message("assistant", (region,))))
    text = grounding.written(row).messages[-1].text
    (back,) = grounding.read(f"It is at {text}.", size)
    # A pixel of the frame, in pixels of the original.
    wide, high = (
        b - a
        for a, b in zip(
            grounding.images.places(*size).inverse().point(0, 0),
            grounding.images.places(*size).inverse().point(1, 1),
            strict=True,
        )
    )
    for place, (one, other) in enumerate(zip(back.coordinates, region.coordinates, strict=True)):
        pixel = high if place % 2 else wide
        extent = region.coordinates[place % 2 - 2] - region.coordinates[place % 2]
        thin = count == 4 and extent / pixel < 224 * 10**-boxes.decimals
        assert abs(one - other) <= tolerance(boxes, thin=thin) * pixel + 1e-6
    assert grounding.read_back(row, f"It is at {text}.") == f"It is at {back}."


@given(st.data())
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("boxes", CONVENTIONS, ids=NAMES)
def test_no_box_is_written_empty_however_thin_it_is(boxes: Boxes, data: st.DataObject) -> None:
    """A model that learned an empty one by heart would score nothing."""
    frame = (data.draw(st.integers(2, 600)), data.draw(st.integers(2, 600)))
    low = [data.draw(st.floats(0, side)) for side in frame]
    high = [
        min(number + data.draw(st.floats(0, 2)), side)
        for number, side in zip(low, frame, strict=True)
    ]
    (back,) = located(write_region([*low, *high], frame, boxes), frame, boxes)
    left, top, right, bottom = back.coordinates
    assert left < right and top < bottom


MOVING = Augment(
    crop=0.5,
    zoom_out=0.5,
    flip=0.5,
    transpose=0.5,
    shift=0.2,
    rotation=30,
    rand_augment=RandAugment(ops=2, magnitude=15),
)


@given(st.data())
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("boxes", CONVENTIONS, ids=NAMES)
def test_a_point_comes_back_through_an_augmentation(boxes: Boxes, data: st.DataObject) -> None:
    grounding = Grounding(boxes, FRAMES["pad"])
    size = (data.draw(st.integers(8, 600)), data.draw(st.integers(8, 600)))
    point = Region([data.draw(st.floats(0, side)) for side in size], size)
    draw = draw_augmentation(MOVING, (0, 0, data.draw(st.integers(0, 10_000))), 224, 224)
    moved = draw.places(224, 224)
    if not grounding.visible(point, moved):
        return
    row = Conversation("1", (Message("user", ("Where?",)), Message("assistant", (point,))))
    text = grounding.written(row, moved).messages[-1].text
    (mention,) = located(text, (224, 224), boxes)
    x, y = grounding.images.places(*size).point(*point.coordinates)
    for each in moved:
        x, y = each.point(x, y)
    assert mention.coordinates == pytest.approx((x, y), abs=tolerance(boxes))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_box_is_turned_with_the_image_and_clipped(flip: float) -> None:
    grounding = Grounding(Boxes(unit="pixels"), ImageProcessor(100, "squash"))
    draw = draw_augmentation(Augment(flip=flip), (0, 0, 0), 100, 100)
    row = Conversation("1", (Message("assistant", (Region((10, 20, 30, 60), (200, 100)),)),))
    written = grounding.written(row, draw.places(100, 100)).messages[-1].text
    assert written == ("[85, 20, 95, 60]" if flip else "[5, 20, 15, 60]")


def test_what_a_crop_cut_off_stays_gone_where_a_zoom_shows_more() -> None:
    grounding = Grounding(Boxes(unit="pixels"), ImageProcessor(100, "squash"))
    crop, zoom = Crop(0, 50, 100, 50), ZoomOut(0, 50, 100, 50)
    box = Region((40, 10, 80, 20), (100, 100))
    moved = [crop.places(100, 100), zoom.places(100, 100)]
    row = Conversation("1", (Message("assistant", (box,)),))
    assert grounding.written(row, moved).messages[-1].text == "[50, 10, 80, 20]"
    assert grounding.visible(box, moved) == pytest.approx(0.75)


def test_conventions_as_the_families_write_them() -> None:
    box, point = (32.0, 16.0, 64.0, 48.0), (32.0, 16.0)
    written = [
        (write_region(box, (64, 64), boxes), write_region(point, (64, 64), boxes))
        for boxes in CONVENTIONS
    ]
    assert written == [
        ("[32, 16, 64, 48]", "[32, 16]"),
        ("(32,16),(64,48)", "(32,16)"),
        ("[500, 250, 1000, 750]", "[500, 250]"),
        ("(500,250),(1000,750)", "(500,250)"),
        ("[0.500, 0.250, 1.000, 0.750]", "[0.500, 0.250]"),
        ("[0.50, 0.25, 1.00, 0.75]", "[0.50, 0.25]"),
        ("<loc0256><loc0512><loc0768><loc1023>", "<loc0256><loc0512>"),
    ]


def row_of(*answer: str | Media, question: tuple[str | Media, ...] = ("Where?",)) -> Conversation:
    return Conversation("1", (Message("user", question), Message("assistant", answer)))


def test_a_processor_writes_regions_of_questions_answers_and_rejected_ones() -> None:
    ours = replace(processor("chatml", "bpe", "causal"), images=ImageProcessor(64, "squash"))
    box = Region((1, 2, 3, 4), (8, 8))
    row = row_of("at ", box, question=("What is in ", box, "?"))
    plain = row_of("at [125, 250, 375, 500]", question=("What is in [125, 250, 375, 500]?",))
    (one,), (other,) = ours.examples(row), ours.examples(plain)
    assert one.input_ids.tolist() == other.input_ids.tolist()
    assert one.labels.tolist() == other.labels.tolist()
    judged = replace(row, rejected=Message("assistant", (Region((0, 0, 8, 8), (8, 8)),)))
    plain = replace(plain, rejected=Message("assistant", ("[0, 0, 1000, 1000]",)))
    assert ours.examples(judged)[0].input_ids.tolist() == ours.examples(plain)[0].input_ids.tolist()
    assert regions_of(judged) == ["[1, 2, 3, 4]", "[1, 2, 3, 4]", "[0, 0, 8, 8]"]


def test_what_is_cut_off_is_an_error_and_part_of_it_is_clipped() -> None:
    grounding = Grounding(Boxes(unit="pixels"), ImageProcessor(50, "crop"))
    with pytest.raises(
        DataError, match=r"outside of what the model sees.*pad or squash shows all of it"
    ):
        grounding.written(row_of(Region((0, 10, 20, 30), (200, 100))))
    with pytest.raises(DataError, match=r"the point \[10, 10\]"):
        grounding.written(row_of(Region((10, 10), (200, 100))))
    shown = grounding.written(row_of(Region((30, 0, 70, 100), (200, 100))))
    assert shown.messages[-1].text == "[0, 0, 10, 50]"


def test_a_tokenizer_without_locations_is_refused() -> None:
    ours = replace(processor("chatml", "bpe", "causal"), boxes=Boxes(unit="loc"))
    with pytest.raises(DataError, match="no <loc0000>"):
        ours.examples(row_of(Region((1, 2, 3, 4), (8, 8))))
    assert ours.examples(row_of("nowhere"))


def test_answers_are_read_back_by_the_size_of_each_image() -> None:
    grounding = Grounding(Boxes(unit="norm1000"), ImageProcessor(64, "squash"))
    row = row_of(Region((0, 0, 1, 1), (100, 200)), " ", Region((0, 0, 1, 1), (10, 20)))
    assert (
        grounding.read_back(row, "[0, 0, 500, 500] (900,900),(1000,1000)")
        == "[0, 0, 50, 100] [9, 18, 10, 20]"
    )
    assert grounding.read_back(row_of("yes"), "[0, 0, 500, 500]") == "[0, 0, 500, 500]"
    # Corners in any order, and beyond the image.
    assert grounding.read("[500, 500, -20, 1400]", (10, 10)) == ["[0, 5, 5, 10]"]


def test_regions_are_copied_with_what_they_know() -> None:
    box = Region((1.25, 2, 3, 4), (8, 8))
    for copy in (deepcopy(box), pickle.loads(pickle.dumps(box))):
        assert (copy, copy.coordinates, copy.size) == (box, box.coordinates, box.size)
    assert box == "[1.2, 2, 3, 4]"


def test_a_native_model_reads_pixels_of_the_image_as_its_processor_resizes_it() -> None:
    text = "<|vision_start|><|image_pad|><|vision_end|>"
    theirs: Any = native_processor("qwen2_5_vl")
    images = NativeImages(0, processor=theirs, text=text)
    width, height = 300, 130
    sides = theirs.image_processor
    rows, columns = smart_resize(
        height,
        width,
        factor=sides.patch_size * sides.merge_size,
        min_pixels=sides.size["shortest_edge"],
        max_pixels=sides.size["longest_edge"],
    )
    assert images.frame(width, height) == (columns, rows) != (width, height)
    grounding = Grounding(Boxes(unit="pixels"), images)
    region = Region((30.0, 13.0, 150.0, 65.0), (width, height))
    turns = (Message("user", ("where?",)), Message("assistant", (region,)))
    answer = grounding.written(Conversation(messages=turns, id="row")).messages[1].parts[0]
    expected = [round(columns / 10), round(rows / 10), round(columns / 2), round(rows / 2)]
    assert answer == str(expected)
    (back,) = grounding.read(str(answer), (width, height))
    assert back.coordinates == pytest.approx(region.coordinates, abs=2)
