"""Data sets of five unlike kinds, as users keep their own: for the tests of `init`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.row_samples import write_rows, write_shard
from tests.helpers.tiny_recipes import COLORS


def color_images(each: int, seed: int = 0, side: int = 32) -> Iterator[tuple[str, Image.Image]]:
    """`each` images of every color, no two alike, each with its color's name."""
    rng = np.random.default_rng(seed)
    for _ in range(each):
        for name, color in COLORS.items():
            noise = rng.integers(-20, 20, (side, side, 3))
            pixels = (np.full((side, side, 3), color) + noise).clip(0, 255).astype(np.uint8)
            yield name, Image.fromarray(pixels)


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def class_folders(folder: Path) -> Path:
    """Images in one folder a class."""
    for number, (name, image) in enumerate(color_images(10)):
        (folder / "colors" / name).mkdir(parents=True, exist_ok=True)
        image.save(folder / "colors" / name / f"{number}.png")
    return folder / "colors"


def separate_parts(folder: Path) -> Path:
    """Question rows in a file for each part, two questions an image."""
    for seed, part in enumerate(("train", "val", "test")):
        rows = []
        for number, (name, image) in enumerate(color_images(6 if part == "train" else 2, seed)):
            image.save(folder / f"{part}-{number}.png")
            rows += [
                {"image": f"{part}-{number}.png", "question": question, "answer": answer}
                for question, answer in (("what color?", name), ("a shape?", "no"))
            ]
        write_rows(folder / f"{part}.jsonl", rows)
    return folder / "train.jsonl"


def table_and_images(folder: Path) -> Path:
    """A folder with a table of captions and, below it, wide images that it names alone."""
    (folder / "pictures").mkdir()
    rows: list[dict[str, Any]] = []
    for number, (name, image) in enumerate(color_images(10)):
        image.resize((64, 32)).save(folder / "pictures" / f"{number}.png")
        text = f"a field of {name} pixels, number {number}, with some noise in every place of it"
        rows.append({"image": f"{number}.png", "caption": text})
    write_rows(folder / "captions.csv", rows)
    return folder


def tar_shard(folder: Path) -> Path:
    """A WebDataset shard of images with their class."""
    samples = [
        {"png": encoded(image), "json": json.dumps({"choices": list(COLORS)}).encode(), "cls": b""}
        | {"cls": name.encode()}
        for name, image in color_images(10)
    ]
    return write_shard(folder / "shard.tar", samples)


def saved_data_set(folder: Path) -> Path:
    """A data set that the datasets library saved, with images in its rows and chats about them."""
    import datasets

    rows = [
        {
            "images": [{"bytes": encoded(image), "path": None}],
            "messages": [
                {"role": "user", "content": "<image>what color is it?"},
                {"role": "assistant", "content": name},
            ],
        }
        for name, image in color_images(10)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    return folder / "saved"


KINDS = {
    "class_folders": class_folders,
    "separate_parts": separate_parts,
    "table_and_images": table_and_images,
    "tar_shard": tar_shard,
    "saved_data_set": saved_data_set,
}
"""What writes each kind into a folder and returns the path to give to `init`."""
