"""Inspection finds cut files.

Look-alikes are re-encoded, resized and brightened copies, and nothing else.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance

from vlm_tune.data.images.decode import decode_image
from vlm_tune.data.prepare.duplicates import BRIGHTNESS, CELL, inspect_image, look_alikes, similar
from vlm_tune.data.types import Media
from vlm_tune.errors import DataError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photo() -> Image.Image:
    """Matplotlib's sample photo: 512x600, 24 bit."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None and spec.origin is not None
    return decode_image(
        (Path(spec.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg").read_bytes()
    )


def drawn(shape: str, color: str, place: tuple[int, int] = (20, 20)) -> Image.Image:
    """A shape on white, as easy-VQA's."""
    image = Image.new("RGB", (64, 64), "white")
    box = (*place, place[0] + 20, place[1] + 20)
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "square":
        draw.rectangle(box, fill=color)
    else:
        draw.polygon(
            [(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], fill=color
        )
    return image


def test_an_inspected_image_is_known_by_its_bytes_and_its_size_as_shown() -> None:
    image = photo().resize((400, 300))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, "JPEG", exif=exif)
    info = inspect_image(Media(data))
    assert info.sha256 == hashlib.sha256(data).digest()[:16]
    assert (info.width, info.height, info.format) == (300, 400, "JPEG")
    assert 0 <= info.dhash < 2**64 and len(info.thumbnail) == 192
    upright = inspect_image(Media(encoded(decode_image(data))))
    assert list(look_alikes([info, upright])) == [0, 0]
    assert (upright.width, upright.height, upright.format) == (300, 400, "PNG")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 100}])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_file_is_refused_though_a_jpeg_is_decoded_coarsely(
    tmp_path: Path, kind: str, options: dict[str, object]
) -> None:
    data = encoded(photo(), kind, **(options if kind == "JPEG" else {}))
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    assert (inspect_image(Media(path)).width, inspect_image(Media(path)).height) == photo().size
    for tenth in range(10):
        path.write_bytes(data[: len(data) * tenth // 10])
        with pytest.raises(DataError, match=r"photo\.jpg"):
            inspect_image(Media(path))
    path.write_bytes(data[:-200])
    with pytest.raises(DataError, match=r"photo\.jpg"):
        inspect_image(Media(path))
    path.unlink()
    with pytest.raises(DataError, match=r"photo\.jpg: can't be read"):
        inspect_image(Media(path))


def test_another_encoding_size_or_exposure_looks_alike() -> None:
    image = photo()
    smaller = image.resize(
        (round(image.width * 0.9), round(image.height * 0.9)), Image.Resampling.BICUBIC
    )
    copies = [
        encoded(image),
        encoded(image, "JPEG", quality=80),
        encoded(image, "WEBP", quality=80),
        encoded(smaller),
        encoded(smaller, "JPEG", quality=80),
        encoded(ImageEnhance.Brightness(image).enhance(1.05)),
        encoded(ImageEnhance.Brightness(image).enhance(0.95)),
    ]
    groups = look_alikes([inspect_image(Media(copy)) for copy in copies])
    assert groups.tolist() == [0] * len(copies)
    others = [
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        image.rotate(90, expand=True),
        image.crop((0, 0, 256, 300)),
    ]
    groups = look_alikes([inspect_image(Media(encoded(one))) for one in (image, *others)])
    assert groups.tolist() == [0, 1, 2, 3]


def test_plain_images_and_shapes_differ_by_colour_and_by_shape() -> None:
    colors = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow", "white")
    plain = [inspect_image(Media(encoded(Image.new("RGB", (64, 64), color)))) for color in colors]
    assert len({info.dhash for info in plain}) == 1, "their hashes alone say nothing"
    assert look_alikes(plain).tolist() == list(range(len(colors)))
    shapes = [
        drawn(shape, color) for shape in ("circle", "square", "triangle") for color in colors[:-1]
    ]
    copies = [encoded(image) for image in shapes] + [
        encoded(image, "JPEG", quality=80) for image in shapes
    ]
    groups = look_alikes([inspect_image(Media(copy)) for copy in copies])
    assert groups.tolist() == [*range(len(shapes)), *range(len(shapes))]


@pytest.mark.slow
def test_of_easy_vqas_images_none_is_taken_for_another_colour_or_shape() -> None:

    spec = importlib.util.find_spec("easy_vqa")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "data" / "train"
    known: dict[int, dict[bool, str]] = {}
    for _, answer, image in json.loads((folder / "questions.json").read_text()):
        if answer not in ("yes", "no"):
            known.setdefault(image, {})[answer in ("circle", "rectangle", "triangle")] = answer
    infos = [inspect_image(Media(folder / "images" / f"{image}.png")) for image in range(4000)]
    joined = [
        (image, int(first)) for image, first in enumerate(look_alikes(infos)) if image != first
    ]
    assert len(joined) < 20
    for pair in joined:
        one, other = (known.get(image, {}) for image in pair)
        assert all(one[kind] == other[kind] for kind in one.keys() & other.keys())


def by_hand(hashes: np.ndarray, thumbnails: np.ndarray, distance: int) -> list[int]:
    first: list[int] = []
    for place in range(len(hashes)):
        original = place
        for earlier in range(place):
            if (
                first[earlier] != earlier
                or bin(int(hashes[earlier]) ^ int(hashes[place])).count("1") > distance
            ):
                continue
            apart = thumbnails[earlier].astype(float) - thumbnails[place]
            if (
                np.abs(apart.mean(0)).max() <= BRIGHTNESS
                and np.abs(apart - apart.mean(0)).max() <= CELL
            ):
                original = earlier
                break
        first.append(original)
    return first


@given(st.integers(0, 2**32), st.integers(0, 6), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_bands_find_what_comparing_all_with_all_finds(seed: int, distance: int, count: int) -> None:
    random = np.random.default_rng(seed)
    # Few origins, each with some bits turned: distances on both sides of the limit, wherever the
    # bits lie.
    origins = random.integers(0, 2**64, 4, dtype=np.uint64)
    hashes = origins[random.integers(0, 4, count)]
    for place in range(count):
        for bit in random.choice(64, random.integers(0, distance + 3), replace=False):
            hashes[place] ^= np.uint64(1) << np.uint64(bit)
    thumbnails = (
        np.repeat(random.integers(0, 40, (count, 1, 1)), 64 * 3, 1)
        .reshape(count, 64, 3)
        .astype(np.uint8)
    )
    assert similar(hashes, thumbnails, distance).tolist() == by_hand(hashes, thumbnails, distance)


def test_groups_do_not_creep() -> None:
    """Each of four looks like the next one, but the third unlike the first."""
    thumbnails = np.stack([np.full((64, 3), 10 * step, dtype=np.uint8) for step in range(4)])
    assert similar(np.zeros(4, dtype=np.uint64), thumbnails).tolist() == [0, 0, 2, 2]
