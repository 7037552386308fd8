"""The easy-VQA data set, read from the files of the `easy-vqa` package."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

from vlm_tune.config import EasyVqaSource
from vlm_tune.data.instructions import load_instructions
from vlm_tune.data.sources.rows import BadRows
from vlm_tune.data.types import Conversation, Media
from vlm_tune.errors import DataError

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")


def _folder() -> Path:
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise DataError("needs the package easy-vqa: pip install easy-vqa", source="easy_vqa")
    return Path(spec.origin).parent / "data"


def _questions(config: EasyVqaSource) -> tuple[Path, list[tuple[int, str, str, int]]]:
    """The split's folder and its (row, question, answer, image) in file order."""
    folder = _folder() / ("test" if config.split == "test" else "train")
    rows = [(row, *fields) for row, fields in enumerate(json.loads((folder / "questions.json").read_text()))]
    if config.split == "test":
        return folder, rows
    images = sorted({image for _, _, _, image in rows})
    if config.validation_images >= len(images):
        raise DataError(f"validation_images leaves none of the {len(images)} images to train on", source="easy_vqa")
    held_out = set(images[len(images) - config.validation_images :])
    return folder, [row for row in rows if (row[3] in held_out) == (config.split == "validation")]


def answer_type(answer: str) -> str:
    """yes/no, color or shape."""
    return "yes/no" if answer in ("yes", "no") else "color" if answer in COLORS else "shape"


def read_easy_vqa(config: EasyVqaSource, seed: int, bad: BadRows) -> Iterator[Conversation]:
    """A conversation for each question, or for each caption that an image's questions and answers reveal."""
    instructions = load_instructions(config.instructions, config.task)
    folder, rows = _questions(config)
    if config.task == "vqa":
        for row, question, answer, image in rows:
            media = Media(folder / "images" / f"{image}.png")
            values = {"question": question, "answer": answer}
            yield instructions.conversation(f"easy_vqa/{config.split}:{row}", media, values, seed=seed, category=answer_type(answer))
        return
    for image, captions in revealed(rows).items():
        media = Media(folder / "images" / f"{image}.png")
        for kind, caption in captions.items():
            row_id = f"easy_vqa/{config.split}/caption:{image}:{kind}"
            yield instructions.conversation(row_id, media, {"caption": caption}, seed=seed, category=kind)


def revealed(rows: list[tuple[int, str, str, int]]) -> dict[int, dict[str, str]]:
    """For each image, the color and the shape that its questions and answers state: {"color": "red", ...}."""
    found: dict[int, dict[str, str]] = {}
    for _, question, answer, image in rows:
        known = found.setdefault(image, {})
        words = re.findall(r"[a-z]+", question)
        denies = "not" in words or "no" in words
        # "is there a red shape" + yes, "is there no red shape" + no, and "what shape is the red one" all state red.
        states = answer not in ("yes", "no") or (answer == "no") == denies
        for kind, names in (("color", COLORS), ("shape", SHAPES)):
            said = [word for word in [*words, answer] if word in names] if states else []
            if said:
                known[kind] = said[-1]
    return {image: known for image, known in sorted(found.items()) if known}
