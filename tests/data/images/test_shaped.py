"""Images that keep their shape: sizes, the order of patches, slots and the ends of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    get_image_size_for_max_num_patches,
)

from vlm_tune.data.images.patches import patch_places, patches_of, stacked, token_counts
from vlm_tune.data.images.shaped import LongestEdge, MostPatches, ShapedImages
from vlm_tune.data.media_slots import owners, slot_mask, slot_tokens, slots_of
from vlm_tune.data.types import Media, PatchGrid, Segment

SIDES = st.integers(1, 300)


@given(SIDES, SIDES, st.sampled_from([32, 48, 128]), st.sampled_from([4, 8, 16]))
@settings(max_examples=60, deadline=None)
def test_the_longest_edge_is_transformers(width: int, height: int, size: int, unit: int) -> None:
    if max(width, height) > size * min(width, height):
        return  # transformers gives a side of nothing
    rows, columns = LongestEdge(size, unit).grid(width, height)
    pixels = np.zeros((height, width, 3))
    theirs = get_resize_output_image_size(pixels, size, unit, "channels_last")
    assert (rows * unit, columns * unit) == theirs


def test_a_side_that_shrinks_to_nothing_is_one_square() -> None:
    assert LongestEdge(32, 8).grid(3000, 20) == (1, 4)


@given(SIDES, SIDES, st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_the_most_patches_are_transformers(width: int, height: int, count: int) -> None:
    rows, columns = MostPatches(count, 16).grid(width, height)
    theirs = get_image_size_for_max_num_patches(height, width, 16, count)
    assert (rows * 16, columns * 16) == theirs
    assert rows * columns <= count


@pytest.mark.parametrize("grid", [PatchGrid(4, 6, 2), PatchGrid(3, 5), PatchGrid(2, 2, 2)])
def test_patches_of_a_square_stand_together(grid: PatchGrid) -> None:
    """Each patch holds its row and column, and they are those of its place."""
    side = 3
    rows = torch.arange(grid.rows).repeat_interleave(side)[:, None]
    columns = torch.arange(grid.columns).repeat_interleave(side)[None]
    size = (grid.rows * side, grid.columns * side)
    pixels = torch.stack([rows.expand(size), columns.expand(size), rows * 0 + columns * 0])
    patches = patches_of(pixels, grid).unflatten(1, (3, side * side))
    places = patch_places([Media(b"", grid=grid)])
    assert places is not None
    assert torch.equal(patches[:, :2], places[0][..., None].expand(-1, -1, side * side))
    squares = places[0].view(-1, grid.merge**2, 2) // grid.merge
    assert bool((squares == squares[:, :1]).all())
    order = squares[:, 0, 0] * grid.columns + squares[:, 0, 1]
    assert order.tolist() == sorted(order.tolist())


def test_a_batch_is_padded_behind_each_image() -> None:
    media = [Media(b"a", grid=PatchGrid(1, 2)), Media(b"b", grid=PatchGrid(2, 3))]
    pixels = [torch.full((3, 4, 8), 7), torch.full((3, 8, 12), 9)]
    joined = stacked(pixels, media)
    assert joined.shape == (2, 6, 48)
    assert joined[0].amax(1).tolist() == [7, 7, 0, 0, 0, 0]
    # What comes out of a batch goes into another one.
    assert torch.equal(stacked([joined[0]], media[:1]), joined[:1, :2])
    places = patch_places(media)
    assert places is not None
    assert places[0].tolist() == [[0, 0], [0, 1]] + [[-1, -1]] * 4
    counts = token_counts(media)
    assert counts is not None
    assert counts.tolist() == [2, 6]


def test_images_of_one_shape_are_stacked() -> None:
    media = [Media(b"a"), Media(b"b")]
    assert stacked([torch.zeros(3, 4, 4)] * 2, media).shape == (2, 3, 4, 4)
    assert patch_places(media) is None
    assert token_counts(media) is None


def test_slots_are_filled_by_each_images_first_tokens() -> None:
    media = [Media(b"a", grid=PatchGrid(2, 4, 2)), Media(b"b", grid=PatchGrid(4, 4, 2))]
    assert [slots_of(item, 9) for item in media] == [2, 4]
    assert owners(media, 9).tolist() == [0, 0, 1, 1, 1, 1]
    filling = slot_tokens(media, 9)
    assert filling is not None and filling.shares is None
    assert filling.tokens.tolist() == [[0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 2, 3]]


def test_an_images_segment_has_ends_of_rows() -> None:
    images = ShapedImages(48, sizing=LongestEdge(48, 8), patch=4, merge=2, row_ends=True)
    (segment,) = images.segments(_image(20, 12))
    assert segment.row_ends == ("[IMG_BREAK]", "[IMG_END]") == images.markers
    assert isinstance(segment.payload, Media)
    assert segment.payload.grid == PatchGrid(4, 6, 2)
    assert slot_mask(segment, 8) == [True, True, True, False] * 2
    assert slot_mask(Segment("text", "words"), 2) == [False, False]
    assert images(segment.payload).shape == (3, 16, 24)
    assert images.frame(20, 12) == (24, 16)


def _image(width: int, height: int) -> Media:
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return Media(buffer.getvalue())
