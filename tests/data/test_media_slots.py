"""The tokens that fill the slots of joined tiles: those of transformers' LLaVA-NeXT."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_tune.data.images.split import LlavaNextFrames
from vlm_tune.data.media_slots import owners, slot_tokens, slots_of
from vlm_tune.data.types import Media

SIDE = 32
PATCHES = 4
TOKENS = PATCHES * PATCHES
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
PINPOINTS = [[rows * SIDE, columns * SIDE] for columns, rows in GRIDS]


def frames_of(size: tuple[int, int], name: bytes = b"image") -> tuple[Media, ...]:
    segments = LlavaNextFrames(GRIDS).segments(Media(name), size, SIDE)
    return tuple(s.payload for s in segments if isinstance(s.payload, Media))


def theirs(sizes: list[tuple[int, int]]) -> list[int]:
    """The numbers of the tokens in the order of transformers, with -1 for its newline."""
    from transformers import LlavaNextModel

    vision = SimpleNamespace(image_size=SIDE, patch_size=SIDE // PATCHES)
    model: Any = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=PINPOINTS)
    )
    features, first = [], 0
    for size in sizes:
        count = len(frames_of(size))
        numbers = (torch.arange(count)[:, None] + first) * (TOKENS + 1) + torch.arange(TOKENS)
        features.append(numbers[..., None].float())
        first += count
    packed, _ = LlavaNextModel.pack_image_features(
        model,
        features,
        [[height, width] for width, height in sizes],
        "default",
        image_newline=torch.tensor([-1.0]),
    )
    return torch.cat(packed)[:, 0].long().tolist()


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=3))
@settings(max_examples=80, deadline=None)
def test_slots_are_filled_as_by_transformers(sizes: list[tuple[int, int]]) -> None:
    media = [
        frame for number, size in enumerate(sizes) for frame in frames_of(size, b"%d" % number)
    ]
    tokens = slot_tokens(media, TOKENS)
    assert tokens is not None
    places, numbers = tokens.tolist()
    # The last token of a frame is the learned one.
    assert [
        -1 if number == TOKENS else place * (TOKENS + 1) + number
        for place, number in zip(places, numbers, strict=True)
    ] == theirs(sizes)
    frames = owners(media, TOKENS)
    assert len(frames) == len(places) == sum(slots_of(frame, TOKENS) for frame in media)
    filling = [media[place] for place in places]
    assert [media[frame].source for frame in frames] == [frame.source for frame in filling]


def test_frames_without_joined_tiles_fill_their_slots_in_order() -> None:
    media = [Media(b"one"), Media(b"two")]
    assert slot_tokens(media, 3) is None and slot_tokens([], 3) is None
    assert owners(media, 3).tolist() == [0, 0, 0, 1, 1, 1]
