"""Faults 22 to 27 of the list.

Bombs, odd formats, modes, rotations, limits, and images taken for one another.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from vlm_tune.config.load import parse_recipe
from vlm_tune.data.images.decode import FORMATS, ImageProcessor, decode_image, image_size
from vlm_tune.data.prepare.duplicates import inspect_image, look_alikes
from vlm_tune.data.types import Conversation, Media, Message
from vlm_tune.errors import DataError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.generation.requests import image_media
from vlm_tune.model.build import build
from vlm_tune.model.feature_cache import tower_features


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    """A tiny model with a tower of 32x32 pixels."""
    recipe = parse_recipe("""
name: tiny
output: nowhere
model:
  tower: {kind: open_clip, config: {layers: 1, width: 32, head_width: 32, \
patch_size: 16, image_size: 32}}
  llm:
    kind: causal
    scratch: {model_type: llama, config: {hidden_size: 32, intermediate_size: 32, \
num_hidden_layers: 1, num_attention_heads: 2}}
data: {train: [{kind: easy_vqa, split: train}], template: chatml}
tune: [{match: "*", how: full}]
train: {steps: 1, batch_size: 1, learning_rate: 1.0e-3, precision: fp32}
""")
    rows = [Conversation("a", (Message("user", ("what?",)), Message("assistant", ("red",))))]
    return build(recipe, rows, model_class=VisionLanguageModel).eval()


# --- 22 ----------------------------------------------------------------------------------------


def png_bomb(side: int) -> bytes:
    rows = zlib.compress(bytes(side * (side // 8 + 1)), 9)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", rows)
    )


def gif_bomb() -> bytes:
    """A screen of 8x8 on which the first frame claims 60000x60000."""
    data = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    place = data.index(b"\x2c\x00\x00\x00\x00\x08\x00\x08\x00")
    data[place + 5 : place + 9] = struct.pack("<HH", 60_000, 60_000)
    return bytes(data)


BOMBS = {
    "PNG": png_bomb(30_000),
    "GIF": gif_bomb(),
    "BMP": b"BM"
    + struct.pack("<IHHIIiiHHIIiiII", 1000, 0, 0, 54, 40, 40_000, 40_000, 1, 24, 0, 0, 0, 0, 0, 0)
    + bytes(100),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_fault_22_a_bomb_is_refused_by_decoding_inspection_and_size_before_it_is_inflated(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import ImageFile

    def load(self: Any) -> None:
        raise AssertionError("decoded")

    assert len(BOMBS[kind]) < 200_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for refuse in (lambda media: decode_image(media.read(), media.name), inspect_image, image_size):
        with pytest.raises(DataError, match="pixels"):
            refuse(Media(BOMBS[kind]))


# --- 23 ----------------------------------------------------------------------------------------


def fits() -> bytes:
    cards = [
        "SIMPLE  =                    T",
        "BITPIX  =                    8",
        "NAXIS   =                    2",
    ]
    cards += ["NAXIS1  =                    4", "NAXIS2  =                    4", "END"]
    return "".join(card.ljust(80) for card in cards).ljust(2880).encode() + bytes(2880)


def psd() -> bytes:
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 4, 4, 8, 3)
    return header + struct.pack(">III", 0, 0, 0) + struct.pack(">H", 0) + bytes(48)


ODD = {
    **{
        kind: encoded(Image.new("RGB", (16, 16)), kind)
        for kind in ("EPS", "PPM", "ICO", "ICNS", "TGA", "PCX", "DDS", "SGI", "PDF", "IM")
    },
    "FITS": fits(),
    "PSD": psd(),
    "SVG": (
        b'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"><image '
        b'href="file:///etc/passwd"/></svg>'
    ),
    "HEIC": struct.pack(">I", 24) + b"ftypheic" + bytes(12),
}


@pytest.mark.parametrize("kind", ODD)
def test_fault_23_other_formats_are_refused_whatever_they_are_called(
    kind: str, tmp_path: Path
) -> None:
    if kind in ("EPS", "PPM", "ICO", "FITS", "PSD"):
        with Image.open(io.BytesIO(ODD[kind])) as known:
            assert known.format == kind, "the file is no good example"
    path = tmp_path / "photo.jpg"
    path.write_bytes(ODD[kind])
    for refuse in (ImageProcessor(8), inspect_image, image_size):
        with pytest.raises(DataError, match=r"photo\.jpg: not an image of PNG, JPEG"):
            refuse(Media(path))


# --- 24 ----------------------------------------------------------------------------------------


def palette_with_alpha() -> Image.Image:
    image = Image.new("PA", (2, 1))
    image.putpalette([250, 0, 0, 0, 250, 0])
    image.putpixel((0, 0), (1, 255))
    image.putpixel((1, 0), (1, 0))
    return image


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([250, 0, 0, 0, 250, 0])
    image.putpixel((1, 0), 1)
    return image


def pair(mode: str, left: Any, right: Any) -> Image.Image:
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), left)
    image.putpixel((1, 0), right)
    return image


WHITE = (255, 255, 255)
GOLDEN = {
    "1": (encoded(pair("1", 0, 1)), (0, 0, 0), WHITE),
    "L": (encoded(pair("L", 7, 200)), (7, 7, 7), (200, 200, 200)),
    "L, one value clear": (encoded(pair("L", 7, 200), transparency=7), WHITE, (200, 200, 200)),
    "LA": (encoded(pair("LA", (7, 255), (7, 0))), (7, 7, 7), WHITE),
    "LA half clear": (encoded(pair("LA", (0, 128), (255, 128))), (127, 127, 127), WHITE),
    "P": (encoded(palette()), (250, 0, 0), (0, 250, 0)),
    "P, one colour clear": (encoded(palette(), transparency=0), WHITE, (0, 250, 0)),
    "PA": (encoded(palette_with_alpha(), "TIFF"), (0, 250, 0), WHITE),
    "RGB": (encoded(pair("RGB", (1, 2, 3), (4, 5, 6))), (1, 2, 3), (4, 5, 6)),
    "RGBA": (encoded(pair("RGBA", (1, 2, 3, 255), (1, 2, 3, 0))), (1, 2, 3), WHITE),
    "I;16 PNG": (encoded(pair("I;16", 0x00FF, 0xFF00)), (0, 0, 0), WHITE),
    "I;16 TIFF": (encoded(pair("I;16", 0x1234, 0xFFFF), "TIFF"), (0x12,) * 3, WHITE),
    "I;16B TIFF": (encoded(pair("I;16B", 0x1234, 0xFFFF), "TIFF"), (0x12,) * 3, WHITE),
    "CMYK": (encoded(pair("CMYK", (0, 0, 0, 0), (0, 255, 255, 0)), "TIFF"), WHITE, (255, 0, 0)),
    "YCbCr": (encoded(pair("YCbCr", (255, 128, 128), (0, 128, 128)), "TIFF"), WHITE, (0, 0, 0)),
    "F": (encoded(pair("F", -3.0, 300.0), "TIFF"), (0, 0, 0), WHITE),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_fault_24_every_mode_has_its_conversion(name: str) -> None:
    data, *expected = GOLDEN[name]
    if name == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
        # Pillow takes the values of such a TIFF, three a pixel, for four.
        with pytest.raises(DataError, match="can't be decoded"):
            decode_image(data)
    else:
        with Image.open(io.BytesIO(data)) as stored:
            assert stored.mode == name.split(",")[0].split()[0] or name in (
                "L, one value clear",
            ), "the file is no good example"
        image = decode_image(data)
        assert image.mode == "RGB" and [image.getpixel((0, 0)), image.getpixel((1, 0))] == expected
        assert inspect_image(Media(data)).width == 2


def test_fault_24_an_adobe_cmyk_jpeg_is_not_shown_inverted() -> None:
    red = decode_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.allclose(red.getpixel((8, 8)), (255, 0, 0), atol=4)


# --- 25 ----------------------------------------------------------------------------------------

UNDO = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""What a camera does to a picture so that a viewer that undoes the orientation shows it upright."""


def upright() -> Image.Image:
    corners = np.array([[0, 80], [160, 240], [40, 120]], dtype=np.uint8)
    return Image.fromarray(np.repeat(np.repeat(corners, 16, 0), 16, 1)).convert("RGB")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UNDO)
def test_fault_25_a_rotation_is_applied_once_and_alike_in_training_and_chat(
    kind: str,
    orientation: int,
    tmp_path: Path,
    model: VisionLanguageModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = UNDO[orientation]
    stored = upright() if method is None else upright().transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    path = tmp_path / "photo"
    path.write_bytes(encoded(stored, kind, exif=exif, **options))
    training = model.processor.images(Media(path))
    shown = model.processor.images.pixels(upright())
    assert (training.int() - shown.int()).abs().max() < 6
    info = inspect_image(Media(path))
    assert (info.width, info.height) == image_size(Media(path)) == upright().size
    seen: list[torch.Tensor] = []
    tower = model.tower.forward
    monkeypatch.setattr(
        model.tower, "forward", lambda pixels: (seen.extend(pixels), tower(pixels))[1]
    )
    with Image.open(path) as opened:
        for image in (path, path.read_bytes(), opened):
            model.chat("what?", [image], max_new_tokens=1)
    assert len(seen) == 3 and all(torch.equal(one, training) for one in seen)


def test_fault_25_a_rotation_survives_damage_elsewhere_in_the_exif_data(
    model: VisionLanguageModel,
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    data = encoded(
        upright().transpose(Image.Transpose.ROTATE_90),
        "JPEG",
        exif=exif,
        quality=100,
        subsampling=0,
    )
    # The text becomes that of a tag which holds a number: Pillow can read that and can't write it
    # again.
    damaged = data.replace(bytes.fromhex("010e 0002"), bytes.fromhex("0100 0002"))
    with Image.open(io.BytesIO(damaged)) as opened:
        with pytest.raises(Exception, match="required argument is not an integer"):
            opened.getexif().tobytes()
        assert np.array_equal(np.asarray(decode_image(damaged)), np.asarray(decode_image(data)))
        assert image_size(Media(damaged)) == upright().size
        assert isinstance(model.chat("what?", [opened], max_new_tokens=1), str)


def test_fault_25_a_rotated_pil_image_in_a_mode_that_png_cannot_hold(
    model: VisionLanguageModel,
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(
        upright().transpose(Image.Transpose.ROTATE_90).convert("CMYK"),
        "JPEG",
        exif=exif,
        quality=100,
    )
    with Image.open(io.BytesIO(data)) as opened:
        given = image_media(opened)
    assert torch.equal(model.processor.images(given), model.processor.images(Media(data)))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "F", "I", "I;16"]
)
def test_fault_25_chat_takes_pil_images_of_every_mode(
    mode: str, model: VisionLanguageModel
) -> None:
    assert isinstance(model.chat("what?", [Image.new(mode, (20, 10))], max_new_tokens=1), str)


# --- 26 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "allowed"),
    [
        (1, 1, True),
        (1, 200, True),
        (200, 1, True),
        (1, 201, False),
        (201, 1, False),
        (1, 10_000, False),
        (10_000, 1, False),
    ],
)
@pytest.mark.parametrize("kind", FORMATS)
def test_fault_26_smallest_and_longest_sides(
    kind: str, width: int, height: int, allowed: bool
) -> None:
    media = Media(encoded(Image.new("RGB", (width, height), (9, 99, 199)), kind))
    if allowed:
        assert ImageProcessor(8)(media).shape == (3, 8, 8)
        assert (
            image_size(media)
            == (inspect_image(media).width, inspect_image(media).height)
            == (width, height)
        )
    for refuse in () if allowed else (ImageProcessor(8), image_size, inspect_image):
        with pytest.raises(DataError, match=f"{width}x{height}, sides of over 200 to 1"):
            refuse(media)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_fault_26_of_several_frames_the_first_is_shown(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    colors = [(255, 0, 0), (0, 0, 255), (0, 255, 0)]
    frames = [Image.new("RGB", (8, 8), color) for color in colors]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as opened:
        assert getattr(opened, "n_frames", 1) == 3, "the file is no good example"
    assert decode_image(data).getpixel((4, 4)) == colors[0]
    assert inspect_image(Media(data)).thumbnail[:3] == bytes(colors[0])


# --- 27 ----------------------------------------------------------------------------------------


def alike_in_pixels() -> dict[str, tuple[bytes, bytes]]:
    """Pairs of files that a key on pixels without their shape or palette would take for one."""
    pixels = np.random.default_rng(0).integers(0, 256, 30 * 100, dtype=np.uint8).tobytes()
    oblong = [encoded(Image.frombytes("L", size, pixels)) for size in ((30, 100), (100, 30))]
    indexes = Image.frombytes("P", (16, 16), bytes(range(256)))
    palettes = []
    for shift in (0, 90):
        image = indexes.copy()
        image.putpalette(
            [(value + shift) % 256 for place in range(256) for value in (place, 255 - place, 128)]
        )
        palettes.append(encoded(image))
    clear = [encoded(Image.new("RGBA", (16, 16), (200, 0, 0, alpha))) for alpha in (255, 40)]
    return {
        "shape": (oblong[0], oblong[1]),
        "palette": (palettes[0], palettes[1]),
        "alpha": (clear[0], clear[1]),
    }


@pytest.mark.parametrize("name", ["shape", "palette", "alpha"])
def test_fault_27_images_of_like_pixels_are_two_everywhere(
    name: str, model: VisionLanguageModel
) -> None:
    one, other = (Media(data) for data in alike_in_pixels()[name])
    infos = [inspect_image(one), inspect_image(other)]
    assert infos[0].sha256 != infos[1].sha256
    assert look_alikes(infos).tolist() == [0, 1]
    features = tower_features(model, [one, other])
    for media in (one, other):
        with torch.inference_mode():
            assert torch.allclose(
                features(media), model.tower(model.processor.images(media)[None])[0], atol=1e-5
            )
    assert not torch.allclose(features(one), features(other), atol=1e-3)


def test_fault_27_one_image_under_two_names_is_computed_once(
    model: VisionLanguageModel, tmp_path: Path
) -> None:
    data = encoded(upright())
    (tmp_path / "a.png").write_bytes(data)
    media = [Media(tmp_path / "a.png"), Media(data)]
    counted: list[tuple[int, int]] = []
    features = tower_features(model, media, lambda done, of: counted.append((done, of)))
    assert counted == [(1, 1)] and torch.equal(features(media[0]), features(media[1]))
