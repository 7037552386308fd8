"""The easy-VQA data set, read from the files of the `easy-vqa` package."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from vlm_tune.config.data import EasyVqaSource
from vlm_tune.data.chat.draws import draw
from vlm_tune.data.chat.instructions import load_instructions
from vlm_tune.data.images.decode import decode_image
from vlm_tune.data.sources.base import CHUNK_ROWS, Chunk, digest, files_digest
from vlm_tune.data.sources.region_fields import BOX, BoxOptions, with_regions
from vlm_tune.data.types import Conversation, Media, Message, References
from vlm_tune.errors import DataError

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
KINDS = {"yes/no": ("yes", "no"), "color": COLORS, "shape": SHAPES}
"""The answers by category."""
LEAST_CONTRAST = 30
"""Levels of the three channels together by which a shape differs from the background."""
YES, NO = MATCHES = ("yes", "no")
"""The answers to whether a caption matches, the right one first."""


def _folder() -> Path:
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise DataError("needs the package easy-vqa: pip install easy-vqa", source="easy_vqa")
    return Path(spec.origin).parent / "data"


def part_folder(split: str) -> Path:
    """The folder of the package's part from which a split is taken."""
    return _folder() / ("test" if split == "test" else "train")


def questions(split: str, validation_images: int) -> list[tuple[int, str, str, int]]:
    """The split's (row, question, answer, image) in file order."""
    folder = part_folder(split)
    rows = [
        (row, *fields)
        for row, fields in enumerate(json.loads((folder / "questions.json").read_text()))
    ]
    if split == "test":
        return rows
    images = sorted({image for _, _, _, image in rows})
    if validation_images >= len(images):
        raise DataError(
            f"validation_images leaves none of the {len(images)} images to train on",
            source="easy_vqa",
        )
    held_out = set(images[len(images) - validation_images :])
    return [row for row in rows if (row[3] in held_out) == (split == "validation")]


def answer_type(answer: str) -> str:
    """The answer's category: yes/no, color or shape."""
    return "yes/no" if answer in ("yes", "no") else "color" if answer in COLORS else "shape"


class EasyVqa:
    """A source with a conversation for each question, each caption of an image, or each shape.

    Captions are derived from the image's questions and answers; see `revealed`.
    """

    def __init__(self, config: EasyVqaSource, *, seed: int) -> None:
        """Raises `DataError` if the package is missing or all images are held out."""
        self.name = f"easy_vqa/{config.split}"
        self.form = config.task
        self._config = config
        self._seed = seed
        # Preferences are about the same questions, in the same words.
        self._task = "vqa" if config.task == "preference" else config.task
        self._instructions = load_instructions(config.instructions, self._task)

    def fingerprint(self) -> str:
        """A hash of the package's file, the seed, and the options.

        The options are those that select rows, the instruction set, and the folder of the images.
        """
        folder = part_folder(self._config.split)
        files = files_digest([folder / "questions.json"])
        options = (self._config.split, self._config.validation_images, self._config.task)
        if self._config.categories is not None:
            options = (*options, *sorted(self._config.categories))
        return digest(
            files, str(folder), *options, self._instructions.model_dump_json(), self._seed
        )

    def chunks(self) -> Iterator[Chunk]:
        """Ranges of questions or captions."""
        total = len(self._rows())
        for number, start in enumerate(range(0, total, CHUNK_ROWS)):
            yield Chunk(number, start + 1, min(CHUNK_ROWS, total - start))

    def conversations(self, chunk: Chunk) -> Iterator[Conversation | DataError]:
        """The chunk's rows in order."""
        start = chunk.first_row - 1
        for row, (row_id, image, values, category) in enumerate(
            self._rows()[start : start + chunk.rows], chunk.first_row
        ):
            messages = self._instructions.messages(row_id, (Media(image),), values, seed=self._seed)
            if self.form == "grounding":
                messages = with_regions(messages, {"box": shape_box(image)}, BoxOptions())
            yield Conversation(
                row_id,
                tuple(messages),
                category,
                self.name,
                row,
                references=References("match", choices=MATCHES, chosen=0)
                if self.form == "match"
                else References(self._task),
                rejected=self._rejected(row_id, values),
            )

    def _rejected(self, row_id: str, values: dict[str, str]) -> Message | None:
        """The answer that is not right, of preferences and matches.

        For preferences another one of its category, drawn by (seed, row id).
        """
        if self.form == "match":
            return self._instructions.turns((), self._instructions.answer.format(answer=NO))[-1]
        if self.form != "preference":
            return None
        answer = values["answer"]
        others = [other for other in KINDS[answer_type(answer)] if other != answer]
        chosen = others[draw(self._seed, f"rejected {row_id}") % len(others)]
        _, turn = self._instructions.turns((), self._instructions.answer.format(answer=chosen))[-2:]
        return turn

    def _rows(self) -> list[tuple[str, Path, dict[str, str], str]]:
        rows = _rows(self._config.split, self._config.validation_images, self._task)
        categories = self._config.categories
        return rows if categories is None else [row for row in rows if row[-1] in categories]


@lru_cache(maxsize=4)
def _rows(
    split: str, validation_images: int, task: str
) -> list[tuple[str, Path, dict[str, str], str]]:
    """(id, image file, the task's fields, category) of each row, read once per process."""
    images = part_folder(split) / "images"
    rows = questions(split, validation_images)
    if task == "vqa":
        return [
            (
                f"easy_vqa/{split}:{row}",
                images / f"{image}.png",
                {"question": question, "answer": answer},
                answer_type(answer),
            )
            for row, question, answer, image in rows
        ]
    if task == "grounding":
        return [
            (
                f"easy_vqa/{split}/grounding:{image}",
                images / f"{image}.png",
                {"phrase": f"the {known['color']} {known['shape']}", "region": BOX},
                known["shape"],
            )
            for image, known in revealed(rows).items()
            if len(known) == len(("color", "shape"))
        ]
    return [
        (
            f"easy_vqa/{split}/caption:{image}:{kind}",
            images / f"{image}.png",
            {"caption": caption} | ({"answer": YES} if task == "match" else {}),
            kind,
        )
        for image, captions in revealed(rows).items()
        for kind, caption in captions.items()
    ]


def shape_box(image: Path) -> tuple[int, int, int, int]:
    """The box of an image's one shape, from its pixels: what differs from the border's colour."""
    pixels = np.asarray(decode_image(image.read_bytes(), image.name), dtype=np.int64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    differs = np.abs(pixels - np.median(border, axis=0)).sum(-1) > LEAST_CONTRAST
    down, across = np.nonzero(differs)
    if not len(down):
        raise DataError("shows no shape", source=str(image))
    left, top = int(across.min()), int(down.min())
    return left, top, int(across.max()) + 1, int(down.max()) + 1


def revealed(rows: list[tuple[int, str, str, int]]) -> dict[int, dict[str, str]]:
    """The color and shape that each image's questions and answers state.

    For each image: {"color": "red", ...}. Images of which neither is known are left out.
    """
    captions: dict[int, dict[str, str]] = {}
    for _, question, answer, image in rows:
        known = captions.setdefault(image, {})
        words = re.findall(r"[a-z]+", question)
        denies = "not" in words or "no" in words
        # "is there a red shape" + yes, "is there no red shape" + no, and "what shape is the red
        # one" all state red.
        states = answer not in ("yes", "no") or (answer == "no") == denies
        for kind, names in (("color", COLORS), ("shape", SHAPES)):
            matches = [word for word in [*words, answer] if word in names] if states else []
            if matches:
                known[kind] = matches[-1]
    return {image: known for image, known in sorted(captions.items()) if known}
