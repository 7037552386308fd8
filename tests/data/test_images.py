"""Images: each mode and rotation as documented, anything else a `DataError`, and bombs refused from their header."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_tune.config import Augment
from vlm_tune.data.images import FORMATS, ImageProcessor, PixelCache, augment_pixels, decode_image
from vlm_tune.data.types import Media
from vlm_tune.errors import DataError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def corner(image: Image.Image) -> tuple[int, ...]:
    value = image.getpixel((0, 0))
    assert isinstance(value, tuple)
    return value


MODES = {
    "1": (Image.new("1", (4, 4), 1), (255, 255, 255)),
    "L": (Image.new("L", (4, 4), 77), (77, 77, 77)),
    "P": (Image.new("RGB", (4, 4), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE), (10, 200, 30)),
    "LA clear": (Image.new("LA", (4, 4), (0, 0)), (255, 255, 255)),
    "RGBA opaque": (Image.new("RGBA", (4, 4), (1, 2, 3, 255)), (1, 2, 3)),
    "RGBA half": (Image.new("RGBA", (4, 4), (0, 0, 0, 128)), (127, 127, 127)),
    "I;16": (Image.fromarray(np.full((4, 4), 0x80FF, dtype=np.uint16)), (128, 128, 128)),
}


@pytest.mark.parametrize("name", MODES)
def test_png_modes(name: str) -> None:
    image, color = MODES[name]
    found = decode_image(encoded(image))
    assert found.mode == "RGB" and corner(found) == color


def test_other_formats_modes() -> None:
    cmyk = decode_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert cmyk.mode == "RGB" and np.allclose(corner(cmyk), (255, 0, 0), atol=4)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    assert corner(decode_image(encoded(palette, "PNG", transparency=0))) == (255, 255, 255)
    assert corner(decode_image(encoded(Image.new("I;16", (4, 4), 0x4000), "TIFF"))) == (64, 64, 64)
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    assert corner(decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))) == (255, 0, 0)
    with contextlib.suppress(DataError):  # refused is right as well; a raw error is not
        assert decode_image(encoded(Image.new("LAB", (4, 4)), "TIFF")).mode == "RGB"


def test_exif_rotation_is_applied_once_in_all_eight_orientations() -> None:
    upright = Image.fromarray(np.repeat(np.repeat(np.array([[0, 80], [160, 240], [40, 120]], dtype=np.uint8), 8, 0), 8, 1)).convert("RGB")
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
        found = decode_image(encoded(stored, "JPEG", exif=exif, quality=100, subsampling=0))
        assert found.size == upright.size, orientation
        assert np.abs(np.asarray(found, dtype=int) - np.asarray(upright, dtype=int)).max() < 12, orientation


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_at_every_tenth_is_refused_or_whole(kind: str) -> None:
    data = encoded(picture(), kind)
    whole = np.asarray(decode_image(data))
    for tenth in range(10):
        try:
            found = decode_image(data[: len(data) * tenth // 10], "cut.img")
        except DataError as error:
            assert "cut.img" in str(error)
        else:
            assert np.array_equal(np.asarray(found), whole), f"{kind} cut at {tenth}0% was shown as an image"


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.sampled_from(FORMATS), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=12))
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_an_image_or_a_data_error(kind: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(encoded(picture(12, 9), kind))
    for place, value in changes:
        # Headers are where damage does most: half the changes go to the first 64 bytes.
        data[int(place * 2 * min(64, len(data))) if place < 0.5 else int(place * len(data))] = value
    with contextlib.suppress(DataError):
        assert decode_image(bytes(data)).mode == "RGB"


@pytest.mark.parametrize("data", [b"", b"<html><body>404</body></html>", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"photo\.jpg"):
        decode_image(data, "photo.jpg")


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "TGA", "PCX", "DDS", "SGI", "PDF", "ICNS", "IM"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(DataError, match="not an image of PNG"):
        decode_image(encoded(Image.new("RGB", (16, 16)), kind), "odd")


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (10_001, 10_000), (1, 10_000), (10_000, 1), (2**31 - 1, 2**31 - 1)])
def test_sizes_past_the_limits_are_refused_from_the_header(width: int, height: int) -> None:
    with pytest.raises(DataError, match="bomb"):
        decode_image(png_header(width, height), "bomb")


def test_a_bomb_takes_no_memory() -> None:
    code = f"""
import resource
from vlm_tune.data.images import decode_image
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


# --- preprocessing ---------------------------------------------------------------------------------------------------


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


def test_augmentation_is_a_function_of_its_key() -> None:
    pixels = ImageProcessor(32).pixels(picture(32, 32))
    augment = Augment(flip=0.5, transpose=0.5, shift=0.25)
    changed = [augment_pixels(pixels, augment, (0, 1, sample)) for sample in range(20)]
    assert all(torch.equal(one, augment_pixels(pixels, augment, (0, 1, sample))) for sample, one in enumerate(changed))
    assert len({tuple(one.flatten().tolist()) for one in changed}) > 15
    assert all(one.shape == pixels.shape for one in changed)
    assert torch.equal(augment_pixels(pixels, Augment(), (0, 0, 0)), pixels)
    assert torch.equal(augment_pixels(pixels, Augment(flip=1.0), (0, 0, 0)), pixels.flip(-1))
    assert torch.equal(augment_pixels(pixels, Augment(transpose=1.0), (0, 0, 0)), pixels.transpose(-1, -2))


def test_the_pixel_cache_stops_at_its_size_and_gives_the_same_pixels() -> None:
    processor = ImageProcessor(8)
    media = [Media(encoded(picture(w, 9))) for w in (8, 9, 10)]
    cache = PixelCache(processor, max_bytes=2 * 3 * 8 * 8)
    for _ in range(2):
        assert all(torch.equal(cache(item), processor(item)) for item in media)
    assert len(cache._kept) == 2 and cache(media[0]) is cache(media[0])
