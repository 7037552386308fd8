"""Boxes of training rows follow the augmentation of their images, in every epoch."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.chat_samples import processor
from tests.helpers.row_samples import write_rows
from vlm_tune.config.boxes import Boxes
from vlm_tune.config.data import Augment, DataSection, FileSource
from vlm_tune.config.train import TrainSection
from vlm_tune.data.batch import Batch
from vlm_tune.data.batching.grounded import Follower, GroundedFeed, check_joins, follows
from vlm_tune.data.batching.loader import Position, PreparedFeed
from vlm_tune.data.batching.sampler import Plan, Sizes
from vlm_tune.data.batching.streaming import StreamFeed
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.images.decode import ImageProcessor, PixelCache
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.prepare.run import prepare
from vlm_tune.data.regions import Region, located
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Media, Message
from vlm_tune.errors import DataError

SIDE = 64
# A shift would let what touches the edge go on beyond it.
MOVES: dict[str, Any] = {"crop": 0.6, "flip": 0.5, "zoom_out": 0.7, "transpose": 0.5, "colour": 0.1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def ours() -> Processor:
    """A processor whose boxes are in pixels of a frame of `SIDE`."""
    chat = processor("chatml", "bytes", "causal")
    return replace(chat, images=ImageProcessor(SIDE, "squash"), boxes=Boxes(unit="pixels"))


def rows(folder: Path, count: int = 6) -> Path:
    """Rows about a white rectangle on black, in images of another size than the frame."""
    listed = []
    for number in range(count):
        left, top = 20 + 5 * number, 60 - 7 * number
        box = (left, top, left + 60, top + 50)
        image = Image.new("RGB", (160, 128))
        image.paste((255, 255, 255), box)
        image.save(folder / f"{number}.png")
        listed.append({"image": f"{number}.png", "phrase": "it", "box": list(box)})
    return write_rows(folder / "rows.jsonl", listed)


def section(folder: Path, **options: Any) -> DataSection:
    source = FileSource(kind="file", path=str(rows(folder)))
    return DataSection(train=[source], template="chatml", workers=1, **options)


def prepared_feed(folder: Path, ours: Processor, **augment: Any) -> PreparedFeed:
    data = section(folder, augment=Augment(**augment))
    prepared = prepare(data, data.train, ours, seed=0)
    plan = Plan(prepared, data, Sizes.of(TrainSection(epochs=1, batch_size=2), 1), 0)
    options: dict[str, Any] = {"augment": data.augment}
    fetch = PixelCache(ours.images)
    if not follows(prepared):
        return PreparedFeed(prepared, plan, ours.spec, fetch, **options)
    return GroundedFeed(prepared, plan, ours.spec, fetch, processor=ours, **options)


def answers(batch: Batch, ours: Processor) -> list[str]:
    return [ours.decode([i for i in row if i != IGNORE_INDEX]) for row in batch.labels.tolist()]


def seen(pixels: torch.Tensor) -> tuple[float, ...]:
    """The box of what is bright."""
    down, across = np.nonzero((pixels.float().mean(0) > 100).numpy())
    left, top = float(across.min()), float(down.min())
    return left, top, float(across.max()) + 1, float(down.max()) + 1


def check(batch: Batch, ours: Processor) -> list[tuple[float, ...]]:
    """The boxes of a batch's answers, after a comparison with what its images show."""
    assert batch.pixels is not None
    boxes = []
    for text, place in zip(answers(batch, ours), batch.media_index.tolist(), strict=True):
        (mention,) = located(text, (SIDE, SIDE), ours.boxes)
        assert mention.coordinates == pytest.approx(seen(batch.pixels[place]), abs=1.5)
        boxes.append(mention.coordinates)
    return boxes


def test_prepared_rows_follow_their_images_in_each_epoch(tmp_path: Path, ours: Processor) -> None:
    feed = prepared_feed(tmp_path, ours, **MOVES)
    assert isinstance(feed, GroundedFeed)
    epochs = []
    for epoch in range(6):
        windows = feed.windows(Position(epoch))
        boxes = {
            name: box
            for window in windows
            for batch in window
            for name, box in zip(batch.ids, check(batch, ours), strict=True)
        }
        epochs.append([boxes[name] for name in sorted(boxes)])
        assert len(boxes) == 6
    assert len({tuple(boxes) for boxes in epochs}) == 6
    # As an uninterrupted run would have it.
    again = next(feed.windows(Position(3, 2)))[0]
    whole = [batch for window in feed.windows(Position(3)) for batch in window][2]
    assert torch.equal(again.labels, whole.labels)
    assert again.pixels is not None and whole.pixels is not None
    assert torch.equal(again.pixels, whole.pixels)


def test_without_moves_the_prepared_rows_are_used(tmp_path: Path, ours: Processor) -> None:
    feed = prepared_feed(tmp_path, ours, colour=0.1)
    assert not isinstance(feed, GroundedFeed)
    for window in feed.windows(Position()):
        for batch in window:
            check(batch, ours)


def test_what_no_draw_leaves_in_sight_stays(ours: Processor) -> None:
    row = Conversation(
        "1",
        (
            Message("user", (Media(b""), "Where is the corner?")),
            Message("assistant", (Region((1, 1), (SIDE, SIDE)),)),
        ),
    )
    (example,) = ours.examples(row)
    data = DataSection(train=[FileSource(kind="file", path="rows.jsonl")], template="chatml")
    follower = Follower(Augment(crop=0.02), data, seed=0)
    followed = [follower(row, example, ours, epoch) for epoch in range(40)]
    attempts = [attempt for _, attempt in followed]
    assert None in attempts and len({*attempts}) > 3
    for moved, attempt in followed:
        if attempt is None:
            assert moved is example


def test_streamed_rows_follow_their_images(tmp_path: Path, ours: Processor) -> None:
    data = section(tmp_path, augment=Augment(**MOVES), streaming=True)
    feed = StreamFeed(data, data.train, ours, ours.images, 4, seed=5)
    batches = [batch for window in islice(feed.windows(Position()), 6) for batch in window]
    boxes = {box for batch in batches for box in check(batch, ours)}
    assert len(boxes) > 12


@pytest.mark.parametrize("joins", [{"packing": True}, {"group": "image"}])
def test_joined_rows_with_boxes_are_refused(
    tmp_path: Path, ours: Processor, joins: dict[str, Any]
) -> None:
    data = section(tmp_path, augment=Augment(flip=0.5), **joins)
    prepared = prepare(data, data.train, ours, seed=0)
    assert isinstance(prepared, Prepared) and follows(prepared)
    with pytest.raises(DataError, match="joins rows by the lengths of texts"):
        check_joins(data)
    still = section(tmp_path, augment=Augment(hue=0.1), **joins)
    assert not follows(prepare(still, still.train, ours, seed=0))
