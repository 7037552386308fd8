"""Images: each mode and rotation as documented, anything else a `DataError`.

Bombs are refused from their header.
"""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_tune.data.images.decode import (
    FORMATS,
    ImageProcessor,
    PixelCache,
    decode_image,
    image_size,
)
from vlm_tune.data.images.split import best_grid
from vlm_tune.data.types import Media, Slice, Tile
from vlm_tune.errors import DataError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def corner(image: Image.Image) -> tuple[int, ...]:
    value = image.getpixel((0, 0))
    assert isinstance(value, tuple)
    return value


MODES = {
    "1": (Image.new("1", (4, 4), 1), (255, 255, 255)),
    "L": (Image.new("L", (4, 4), 77), (77, 77, 77)),
    "P": (
        Image.new("RGB", (4, 4), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE),
        (10, 200, 30),
    ),
    "LA clear": (Image.new("LA", (4, 4), (0, 0)), (255, 255, 255)),
    "RGBA opaque": (Image.new("RGBA", (4, 4), (1, 2, 3, 255)), (1, 2, 3)),
    "RGBA half": (Image.new("RGBA", (4, 4), (0, 0, 0, 128)), (127, 127, 127)),
    "I;16": (Image.fromarray(np.full((4, 4), 0x80FF, dtype=np.uint16)), (128, 128, 128)),
}


@pytest.mark.parametrize("name", MODES)
def test_png_modes(name: str) -> None:
    image, color = MODES[name]
    decoded = decode_image(encoded(image))
    assert decoded.mode == "RGB" and corner(decoded) == color


def test_other_formats_modes() -> None:
    cmyk = decode_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert cmyk.mode == "RGB" and np.allclose(corner(cmyk), (255, 0, 0), atol=4)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    assert corner(decode_image(encoded(palette, "PNG", transparency=0))) == (255, 255, 255)
    assert corner(decode_image(encoded(Image.new("I;16", (4, 4), 0x4000), "TIFF"))) == (64, 64, 64)
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    assert corner(
        decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    ) == (255, 0, 0)
    with contextlib.suppress(DataError):  # refused is right as well; a raw error is not
        assert decode_image(encoded(Image.new("LAB", (4, 4)), "TIFF")).mode == "RGB"


def test_exif_rotation_is_applied_once_in_all_eight_orientations() -> None:
    upright = Image.fromarray(
        np.repeat(np.repeat(np.array([[0, 80], [160, 240], [40, 120]], dtype=np.uint8), 8, 0), 8, 1)
    ).convert("RGB")
    # What a camera stores so that a viewer that undoes the orientation shows `upright`.
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for orientation, method in undo.items():
        stored = upright if method is None else upright.transpose(method)
        exif = Image.Exif()
        exif[0x0112] = orientation
        decoded = decode_image(encoded(stored, "JPEG", exif=exif, quality=100, subsampling=0))
        assert decoded.size == upright.size, orientation
        assert np.abs(np.asarray(decoded, dtype=int) - np.asarray(upright, dtype=int)).max() < 12, (
            orientation
        )


@pytest.mark.parametrize("orientation", [2, 6, 8])
def test_the_rotation_of_a_png_may_stand_behind_its_pixels(orientation: int) -> None:
    """Its size, on which boxes and tiles depend, is that of the turned image there too."""
    picture = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    usual = encoded(picture, "PNG", exif=exif)
    start = usual.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(usual[start : start + 4], "big")
    last = usual.index(b"IEND") - 4
    late = usual[:start] + usual[end:last] + usual[start:end] + usual[last:]
    for data in (usual, late):
        decoded = decode_image(data)
        assert decoded.size == image_size(Media(data)) == ((4, 6) if orientation > 4 else (6, 4))
        assert np.array_equal(decoded, decode_image(usual))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_at_every_tenth_is_refused_or_whole(kind: str) -> None:
    data = encoded(picture(), kind)
    whole = np.asarray(decode_image(data))
    for tenth in range(10):
        try:
            decoded = decode_image(data[: len(data) * tenth // 10], "cut.img")
        except DataError as error:
            assert "cut.img" in str(error)
        else:
            assert np.array_equal(np.asarray(decoded), whole), (
                f"{kind} cut at {tenth}0% was shown as an image"
            )


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=12),
)
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_an_image_or_a_data_error(
    kind: str, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(encoded(picture(12, 9), kind))
    for place, value in changes:
        # Headers are where damage does most: half the changes go to the first 64 bytes.
        data[int(place * 2 * min(64, len(data))) if place < 0.5 else int(place * len(data))] = value
    with contextlib.suppress(DataError):
        assert decode_image(bytes(data)).mode == "RGB"


@pytest.mark.parametrize(
    "data", [b"", b"<html><body>404</body></html>", b"\x89PNG\r\n\x1a\n", b"GIF89a"]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"photo\.jpg"):
        decode_image(data, "photo.jpg")


@pytest.mark.parametrize(
    "kind", ["EPS", "PPM", "ICO", "TGA", "PCX", "DDS", "SGI", "PDF", "ICNS", "IM"]
)
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(DataError, match="not an image of PNG"):
        decode_image(encoded(Image.new("RGB", (16, 16)), kind), "odd")


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("width", "height"),
    [(30_000, 30_000), (10_001, 10_000), (1, 10_000), (10_000, 1), (2**31 - 1, 2**31 - 1)],
)
def test_sizes_past_the_limits_are_refused_from_the_header(width: int, height: int) -> None:
    with pytest.raises(DataError, match="bomb"):
        decode_image(png_header(width, height), "bomb")


def test_a_bomb_takes_no_memory() -> None:
    code = f"""
import resource
from vlm_tune.data.images.decode import decode_image
from vlm_tune.errors import DataError
data = {png_header(30_000, 30_000)!r}
import PIL.Image, PIL.PngImagePlugin, PIL.ImageOps
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode_image(data)
except DataError:
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50_000, f"{{grown}} KB"
else:
    raise AssertionError("decoded")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- preprocessing -----------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", [(40, 20), (20, 40), (32, 32), (7, 5), (1, 1), (199, 1)])
def test_every_shape_becomes_the_towers_square(resize: str, size: tuple[int, int]) -> None:
    pixels = ImageProcessor(16, resize)(Media(encoded(picture(*size))))  # type: ignore[arg-type]
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8


def test_crop_takes_the_middle_and_pad_keeps_all_on_the_mean() -> None:
    stripes = np.zeros((10, 30, 3), dtype=np.uint8)
    stripes[:, :10, 0] = stripes[:, 10:20, 1] = stripes[:, 20:, 2] = 255
    image = Image.fromarray(stripes)
    crop = ImageProcessor(10, "crop").pixels(image)
    assert crop[:, 5, 5].tolist() == [0, 255, 0] and crop[1].float().mean() > 240
    pad = ImageProcessor(30, "pad", (1.0, 0.0, 0.0)).pixels(image)
    assert pad[:, 0, 0].tolist() == [255, 0, 0] and pad[:, 29, 29].tolist() == [255, 0, 0]
    assert pad[:, 15, 15].tolist() == [0, 255, 0] and pad[:, 15, 25].tolist() == [0, 0, 255]
    squash = ImageProcessor(30, "squash").pixels(image)
    assert squash[:, 5, 5].tolist() == [255, 0, 0] and squash[:, 25, 25].tolist() == [0, 0, 255]


def test_the_pixel_cache_stops_at_its_size_and_gives_the_same_pixels() -> None:
    processor = ImageProcessor(8)
    media = [Media(encoded(picture(w, 9))) for w in (8, 9, 10)]
    cache = PixelCache(processor, max_bytes=2 * 3 * 8 * 8)
    for _ in range(2):
        assert all(torch.equal(cache(item), processor(item)) for item in media)
    assert len(cache._kept) == 2 and cache(media[0]) is cache(media[0])


# --- tiles -------------------------------------------------------------------------------------

NEXT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""LLaVA-NeXT's grids, (columns, rows)."""


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((640, 480), (2, 2)),
        ((1000, 300), (3, 1)),
        ((300, 1000), (1, 3)),
        ((650, 320), (2, 1)),
        ((320, 650), (1, 2)),
        ((200, 200), (1, 2)),
        ((4000, 3000), (2, 2)),
    ],
)
def test_the_best_grid_of_known_sizes(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert best_grid(*size, NEXT, 336) == grid


grids_of = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=9, unique=True
)


@given(st.integers(1, 5000), st.integers(1, 5000), grids_of, st.sampled_from([16, 224, 336]))
@settings(max_examples=300, deadline=None)
def test_the_best_grid_is_transformers_choice(
    width: int, height: int, grids: list[tuple[int, int]], size: int
) -> None:
    from transformers.image_processing_utils import select_best_resolution

    high, wide = select_best_resolution(
        (height, width), [(rows * size, columns * size) for columns, rows in grids]
    )
    assert best_grid(width, height, grids, size) == (wide // size, high // size)


def test_an_image_and_its_tiles_show_all_of_it_in_reading_order() -> None:
    data = encoded(picture(60, 40))
    processor = ImageProcessor(16, mean=(1.0, 0.0, 0.0), tiles=((2, 2), (3, 2), (1, 1)))
    whole, *tiles = processor.expand(Media(data))
    assert whole == Media(data)
    assert [item.tile for item in tiles] == [
        Tile(column, row, 3, 2) for row in range(2) for column in range(3)
    ]
    assert torch.equal(processor(whole), ImageProcessor(16).pixels(picture(60, 40)))
    rows = [
        torch.cat([processor(item) for item in tiles[start : start + 3]], dim=2) for start in (0, 3)
    ]
    canvas = torch.cat(rows, dim=1)
    fitted = np.asarray(picture(60, 40).resize((48, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(canvas.permute(1, 2, 0).numpy(), fitted)
    # A tile stays what it is, and an image with room for one tile is seen once.
    assert processor.expand(tiles[0]) == (tiles[0],)
    assert ImageProcessor(16).expand(whole) == (whole,)
    assert processor.expand(Media(encoded(picture(12, 12)))) == (Media(encoded(picture(12, 12))),)


def test_what_an_image_leaves_of_its_grid_is_the_mean_colour() -> None:
    data = encoded(Image.new("RGB", (64, 16), (0, 0, 255)))
    processor = ImageProcessor(16, mean=(1.0, 0.0, 0.0), tiles=((2, 2),))
    _, *tiles = processor.expand(Media(data))
    for item in tiles:
        pixels = processor(item).permute(1, 2, 0)
        inner, outer = (
            (pixels[12:], pixels[:12])
            if item.tile and item.tile.row == 0
            else (pixels[:4], pixels[4:])
        )
        assert (inner == torch.tensor([0, 0, 255])).all() and (
            outer == torch.tensor([255, 0, 0])
        ).all()


@pytest.mark.parametrize("size", [(199, 1), (1, 199), (1, 1), (2000, 10)])
def test_extreme_shapes_have_tiles_of_the_towers_size(size: tuple[int, int]) -> None:
    processor = ImageProcessor(8, tiles=((4, 1), (1, 4), (2, 2)))
    assert all(
        processor(item).shape == (3, 8, 8)
        for item in processor.expand(Media(encoded(picture(*size))))
    )


def test_an_image_and_its_tiles_are_decoded_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vlm_tune.data.images import decode

    path, decoded = tmp_path / "a.png", []

    def counted(data: bytes, name: str) -> Image.Image:
        decoded.append(name)
        return decode_image(data, name)

    monkeypatch.setattr(decode, "decode_image", counted)
    processor = ImageProcessor(8, tiles=((2, 2),))
    path.write_bytes(encoded(picture()))
    items = processor.expand(Media(path))
    assert len(items) == 5
    before = [processor(item) for item in items]
    assert len(decoded) == 1
    # A file that changed is another image.
    path.write_bytes(encoded(picture().transpose(Image.Transpose.ROTATE_180)))
    assert not any(
        torch.equal(processor(item), old) for item, old in zip(items, before, strict=True)
    )
    assert len(decoded) == 2


@pytest.mark.parametrize("kind", FORMATS)
def test_the_size_is_the_shown_one_and_nothing_is_decoded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(picture(40, 30), kind, **({} if kind in ("BMP", "GIF") else {"exif": exif}))
        path = tmp_path / f"{orientation}"
        path.write_bytes(b"before" + data + b"after")
        shown[orientation] = decode_image(data).size, data, Slice(path, 6, len(data))
    from PIL import ImageFile

    def load(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for size, data, part in shown.values():
        assert image_size(Media(data)) == image_size(Media(part)) == size
    assert {size for size, _, _ in shown.values()} == (
        {(40, 30)} if kind in ("BMP", "GIF") else {(40, 30), (30, 40)}
    )


def test_a_size_that_cannot_be_read_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: can't be"):
        image_size(Media(tmp_path / "gone.png"))
    with pytest.raises(DataError, match=r"gone\.png: can't be read"):
        ImageProcessor(8)(Media(tmp_path / "gone.png"))
    with pytest.raises(DataError, match="not an image"):
        image_size(Media(b"<html>"))
    with pytest.raises(DataError, match="pixels"):
        image_size(Media(png_header(30_000, 30_000)))
