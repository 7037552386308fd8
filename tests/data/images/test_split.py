"""Frames of images and the markers around them: those of transformers' own processors."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.vlm_samples import CHAT_TEMPLATES, marked_tokenizer
from vlm_tune.config.load import parse_recipe
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.chat.template import load_template
from vlm_tune.data.images.decode import ImageProcessor
from vlm_tune.data.images.split import (
    Idefics3Frames,
    InternVLFrames,
    LlavaNextFrames,
    LlavaOnevisionFrames,
)
from vlm_tune.data.types import Conversation, InputSpec, Media, Message
from vlm_tune.errors import DataError, RecipeError

SIDE = 16
SLOTS = 4


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def media(image: Image.Image) -> Media:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return Media(stream.getvalue())


def theirs(image: Image.Image, longest_edge: int, side: int = SIDE) -> Any:
    """The frames of transformers' Idefics3, and their rows and columns."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    processor: Any = Idefics3ImageProcessorPil(
        size={"longest_edge": longest_edge}, max_image_size={"longest_edge": side}
    )
    return processor([[image]], return_tensors="pt", return_row_col_info=True)


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([16, 20, 31, 48, 64]))
@settings(max_examples=60, deadline=None)
def test_the_frames_are_those_of_transformers(width: int, height: int, longest_edge: int) -> None:
    image = photo(width, height)
    frames = theirs(image, longest_edge)
    images = ImageProcessor(SIDE, split=Idefics3Frames(longest_edge))
    expanded = images.expand(media(image))
    pixels = torch.stack([images(frame) for frame in expanded]).float() / 255
    assert pixels.shape == frames["pixel_values"][0].shape
    assert float(((pixels - 0.5) / 0.5 - frames["pixel_values"][0]).abs().max()) <= 1e-6
    # The last is the whole image; the others say where they are.
    assert expanded[-1].tile is None and len(expanded) <= images.most_frames
    grid = (frames["cols"][0][0], frames["rows"][0][0])
    assert all(tile.tile and (tile.tile.columns, tile.tile.rows) == grid for tile in expanded[:-1])


@given(st.integers(1, 120), st.integers(1, 120), st.sampled_from([1, 2, 5, 6, 12]))
@settings(max_examples=60, deadline=None)
def test_internvls_frames_are_those_of_transformers(width: int, height: int, most: int) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    image = photo(width, height)
    images = ImageProcessor(SIDE, split=InternVLFrames(most))
    expanded = images.expand(media(image))
    pixels = torch.stack([images(frame) for frame in expanded]).float() / 255
    processor: Any = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        max_patches=most,
        crop_to_patches=True,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    theirs = processor([image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == theirs.shape
    assert float(((pixels - 0.5) / 0.5 - theirs).abs().max()) <= 1e-6
    assert expanded[-1].tile is None and len(expanded) <= images.most_frames
    tiles = [frame.tile for frame in expanded[:-1]]
    assert all(tile and tile.columns * tile.rows == len(tiles) for tile in tiles)


@given(st.integers(1, 120), st.integers(1, 120))
@settings(max_examples=60, deadline=None)
def test_llava_nexts_frames_are_those_of_transformers(width: int, height: int) -> None:
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    image = photo(width, height)
    grids = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    images = ImageProcessor(SIDE, split=LlavaNextFrames(grids))
    expanded = images.expand(media(image))
    pixels = torch.stack([images(frame) for frame in expanded]).float() / 255
    processor: Any = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[[rows * SIDE, columns * SIDE] for columns, rows in grids],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    theirs = processor([image], return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == theirs.shape
    assert float(((pixels - 0.5) / 0.5 - theirs).abs().max()) <= 1e-6
    assert expanded[0].tile is None and len(expanded) <= images.most_frames
    assert all(frame.tile and frame.tile.size == (width, height) for frame in expanded[1:])


@given(st.integers(1, 120), st.integers(1, 120))
@settings(max_examples=40, deadline=None)
def test_llava_onevisions_frames_are_those_of_transformers(width: int, height: int) -> None:
    """Of a row's only image and of one among two."""
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    mean = (0.5, 0.4, 0.3)
    grids = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    images = ImageProcessor(SIDE, "pad", mean, split=LlavaOnevisionFrames(grids, max_tiles=2))
    processor: Any = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[[rows * SIDE, columns * SIDE] for columns, rows in grids],
        image_mean=mean,
        image_std=[0.5] * 3,
    )
    row = [photo(width, height), photo(20, 30)]
    for shown in (row[:1], row):
        for place, image in enumerate(shown):
            expanded = images.expand(media(image), len(shown))
            pixels = torch.stack([images(frame) for frame in expanded]).float() / 255
            theirs = processor([shown], return_tensors="pt")["pixel_values"][place]
            assert pixels.shape == theirs.shape
            ours = (pixels - torch.tensor(mean)[:, None, None]) / 0.5
            assert float((ours - theirs).abs().max()) <= 1e-6
            assert len(expanded) <= images.most_frames
            assert all(images.expand(frame) == (frame,) for frame in expanded[1:])


def test_an_images_frames_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    frames = Idefics3Frames.frames

    def counted(split: Idefics3Frames, image: Image.Image, side: int) -> Any:
        calls.append(image.size)
        return frames(split, image, side)

    monkeypatch.setattr(Idefics3Frames, "frames", counted)
    images = ImageProcessor(SIDE, split=Idefics3Frames(32))
    for frame in images.expand(media(photo(40, 30))):
        images(frame)
    assert calls == [(40, 30)]


def processor(*, named: bool, longest_edge: int = 32) -> Processor:
    """A processor whose tokenizer has tokens for rows and columns, or not."""
    tokens = marked_tokenizer("smolvlm", rows_and_columns=named)
    spec = InputSpec(SLOTS, "causal", 4096, tokens.pad_token_id, tokens.eos_token_id)
    images = ImageProcessor(SIDE, split=Idefics3Frames(longest_edge))
    return Processor(tokens, load_template("smolvlm"), spec, images)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "parts",
    [
        (media(photo(40, 30)), "What is it?"),
        ("Look at", media(photo(20, 70)), " and ", media(photo(9, 9, 1)), "\nWhich is red?"),
        ("Only words.",),
    ],
)
def test_ids_are_those_of_transformers_processor(named: bool, parts: tuple[Any, ...]) -> None:
    """Tokens for rows and columns are SmolVLM's; without them Idefics3's tokenizer has text."""
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    ours = processor(named=named)
    images: Any = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": SIDE}
    )
    tokens = marked_tokenizer("smolvlm", rows_and_columns=named)
    other: Any = Idefics3Processor(
        images, tokens, image_seq_len=SLOTS, chat_template=CHAT_TEMPLATES["smolvlm"]
    )
    answer = "A red circle."
    row = Conversation("row", (Message("user", parts), Message("assistant", (answer,))))
    turns = [
        {"role": "user", "content": [written(part) for part in parts]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    for prompt in (False, True):
        expected = other.apply_chat_template(
            turns[:1] if prompt else turns,
            add_generation_prompt=prompt,
            tokenize=True,
            return_dict=True,
        )["input_ids"][0]
        example = ours.prompt(row) if prompt else ours.examples(row)[0]
        slots = torch.from_numpy(example.image_mask)
        ids = torch.from_numpy(example.input_ids).masked_fill(slots, other.image_token_id).tolist()
        if not prompt:
            ids.append(int(example.labels[-1]))
            assert tokens.decode(example.labels[example.labels >= 0]) == (
                f" {answer}<end_of_utterance>"
            )
        assert ids == expected[: len(ids)]
        assert len(expected) - len(ids) == (0 if prompt else len(tokens.encode("\n")))


def written(part: str | Media) -> dict[str, Any]:
    """A part of a turn as transformers' processors take it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "image": Image.open(io.BytesIO(part.read()))}


def test_markers_that_a_text_spells_are_text() -> None:
    ours = processor(named=True)
    text = "<fake_token_around_image><row_1_col_1><image><global-img>"
    row = Conversation("row", (Message("user", (text,)), Message("assistant", ("no",))))
    (example,) = ours.examples(row)
    controls = [ours.encoder.is_control(token) for token in example.input_ids.tolist()]
    assert sum(controls) == 2 and controls[0]  # the start and the question's end
    assert text in ours.tokenizer.decode(example.input_ids)


def test_a_tokenizer_without_the_marker_around_images_is_refused() -> None:
    tokens = marked_tokenizer("smolvlm", rows_and_columns=True)
    ours = processor(named=True)
    plain = Processor(tokens, ours.template, ours.spec, ImageProcessor(SIDE))
    assert plain.fingerprint() != ours.fingerprint()
    assert processor(named=True, longest_edge=48).fingerprint() != ours.fingerprint()
    bare = marked_tokenizer("smolvlm", rows_and_columns=False, around=False)
    with pytest.raises(DataError, match=r"no '<fake_token_around_image>'.*added_special_tokens"):
        Processor(bare, ours.template, ours.spec, ours.images)


RECIPE = """
name: tiny
output: nowhere
model:
  tower:
    kind: open_clip
    config: {layers: 2, width: 64, head_width: 32, patch_size: 16, image_size: 32}
    split: {kind: idefics3, longest_edge: 64}
  llm: {kind: causal, name: nowhere}
data: {train: [{kind: easy_vqa, split: train}], template: chatml}
tune: [{match: "*", how: full}]
train: {steps: 1, batch_size: 1, learning_rate: 1.0e-3}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    split:", "    tiles: [[1, 2]]\n    split:", "at most one of"),
        ("chatml}", "chatml, augment: {flip: 0.5}}", "with model.tower.split images take"),
        ("  llm:", "  connector: {kind: cross_attention}\n  llm:", "set images: all"),
        ("tune:", "objective: {kind: contrastive}\ntune:", "so no tiles"),
        ("longest_edge: 64", "longest_edge: 5000", "less than or equal to 4096"),
        ("idefics3,", "other,", "idefics3"),
        ("idefics3, longest_edge: 64", "llava_next, grids: [[1, 2]]", "end with a learned token"),
        ("idefics3, longest_edge: 64", "llava_onevision, grids: [[1, 1]]", "with a learned token"),
        ("  llm:", "  connector: {kind: mlp, newline: true}\n  llm:", "give both, or neither"),
        (
            "  llm:",
            "  connector: {kind: fusion, how: gate, base: {kind: mlp, newline: true}}\n  llm:",
            "joins no tiles",
        ),
        (
            "idefics3, longest_edge: 64}",
            "llava_next, grids: [[1, 2]]}\n    class_token: true\n  connector: "
            "{kind: mlp, newline: true}",
            "leave the class token out",
        ),
    ],
)
def test_settings_that_contradict_a_split(old: str, new: str, message: str) -> None:
    parse_recipe(RECIPE)
    assert old in RECIPE
    with pytest.raises(RecipeError, match=message):
        parse_recipe(RECIPE.replace(old, new))
