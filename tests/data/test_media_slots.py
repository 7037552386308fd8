"""The tokens that fill the slots of joined tiles: those of transformers' LLaVAs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_tune.data.images.split import LlavaNextFrames, LlavaOnevisionFrames
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
    filling = slot_tokens(media, TOKENS)
    assert filling is not None and filling.shares is None
    places, numbers = filling.tokens.tolist()
    # The last token of a frame is the learned one.
    assert [
        -1 if number == TOKENS else place * (TOKENS + 1) + number
        for place, number in zip(places, numbers, strict=True)
    ] == theirs(sizes)
    frames = owners(media, TOKENS)
    assert len(frames) == len(places) == sum(slots_of(frame, TOKENS) for frame in media)
    named = [media[place] for place in places]
    assert [media[frame].source for frame in frames] == [frame.source for frame in named]


def test_frames_without_joined_tiles_fill_their_slots_in_order() -> None:
    media = [Media(b"one"), Media(b"two")]
    assert slot_tokens(media, 3) is None and slot_tokens([], 3) is None
    assert owners(media, 3).tolist() == [0, 0, 0, 1, 1, 1]


def onevision(name: str) -> Any:
    """What the named function of transformers' LLaVA-OneVision reads of its object."""
    vision = SimpleNamespace(image_size=SIDE, patch_size=SIDE // PATCHES)
    return SimpleNamespace(
        config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=PINPOINTS),
        image_processor=SimpleNamespace(image_grid_pinpoints=PINPOINTS),
        num_image_tokens=TOKENS,
        vision_aspect_ratio=name,
    )


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=3),
    st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_llava_onevisions_pictures_are_shrunk_as_by_transformers(
    sizes: list[tuple[int, int]], most: int
) -> None:
    """Each image is the only one of its row."""
    from transformers import LlavaOnevisionModel, LlavaOnevisionProcessor

    split = LlavaOnevisionFrames(GRIDS, max_tiles=most)
    model = onevision(f"anyres_max_{most}")
    model._get_unpadded_features = lambda *args: LlavaOnevisionProcessor._get_unpadded_features(
        model, *args
    )
    newline = torch.randn(2)
    media: list[Media] = []
    features: list[torch.Tensor] = []
    for number, size in enumerate(sizes):
        segments = split.segments(Media(b"%d" % number), size, SIDE)
        frames = [s.payload for s in segments if isinstance(s.payload, Media)]
        slots = sum(slots_of(frame, TOKENS) for frame in frames)
        width, height = size
        wanted = LlavaOnevisionProcessor._get_number_of_features(model, height, width, SIDE, SIDE)
        assert slots == wanted
        media += frames
        features.append(torch.randn(len(frames), TOKENS, 2))
    packed, _ = LlavaOnevisionModel.pack_image_features(
        model,
        features,
        [[height, width] for width, height in sizes],
        image_newline=newline,
        vision_aspect_ratio=model.vision_aspect_ratio,
    )
    filling = slot_tokens(media, TOKENS)
    assert filling is not None
    every = torch.cat(features)
    ended = torch.cat([every, newline.expand(len(every), 1, -1)], dim=1)
    sums = filling.as_sums()
    filled = ended[sums.tokens[0], sums.tokens[1]] * torch.from_numpy(sums.shares)[..., None]
    assert float((filled.sum(1) - torch.cat(packed)).abs().max()) <= 1e-6
    assert len(owners(media, TOKENS)) == filling.tokens.shape[1]


def test_each_of_several_images_is_one_frame_that_a_learned_token_ends() -> None:
    split = LlavaOnevisionFrames(GRIDS)
    (first,) = split.segments(Media(b"one"), (200, 64), SIDE, 2)
    (second,) = split.segments(Media(b"two"), (9, 9), SIDE, 2)
    media = [each.payload for each in (first, second) if isinstance(each.payload, Media)]
    assert [slots_of(frame, 3) for frame in media] == [4, 4]
    assert owners(media, 3).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    filling = slot_tokens(media, 3)
    assert filling is not None and filling.shares is None
    assert filling.tokens.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 3, 0, 1, 2, 3]]
    # Beside a frame that the learned token does not end.
    other = slot_tokens([Media(b"three"), *media], 3)
    assert other is not None
    assert other.tokens.tolist() == [
        [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2],
        [0, 1, 2, *([0, 1, 2, 3] * 2)],
    ]
