"""Small local copies of public benchmarks, in their published layouts, with synthetic images."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

COLORS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 200)}


def picture(color: str, size: int = 32) -> bytes:
    """A PNG of one color."""
    stream = io.BytesIO()
    Image.new("RGB", (size, size), COLORS[color]).save(stream, "PNG")
    return stream.getvalue()


def write_image(path: Path, color: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), COLORS[color]).save(path)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def pope(folder: Path) -> Path:
    """Two splits of four questions about three images."""
    for color in COLORS:
        write_image(folder / "val2014" / f"COCO_val2014_{color}.jpg", color)
    for split, labels in (("random", "yyny"), ("adversarial", "nyny")):
        lines = [
            {
                "question_id": number,
                "image": f"COCO_val2014_{tuple(COLORS)[number % 3]}.jpg",
                "text": f"Is there a thing {number} in the image?",
                "label": {"y": "yes", "n": "no"}[label],
            }
            for number, label in enumerate(labels, 1)
        ]
        path = folder / f"coco_pope_{split}.json"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


MMBENCH_ROWS = (
    ("7", "Which color?", "nan", ("red", "green", "blue", ""), "B", "color", "attribute", "green"),
    ("9", "Is it red?", "Look.", ("yes", "no", "", ""), "A", "exists", "relation", "red"),
)


def mmbench(path: Path, *, copies: bool = False) -> Path:
    """Two questions, of three and of two choices; with `copies` the file has their rotations."""
    columns = ("index", "question", "hint", *"ABCD", "answer", "category", "l2-category", "image")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(columns)
        for index, question, hint, choices, answer, category, ability, color in MMBENCH_ROWS:
            image = base64.b64encode(picture(color)).decode()
            end = (category, ability, image)
            table.writerow((index, question, hint, *choices, answer, *end))
            given = [choice for choice in choices if choice]
            for turn in range(1, len(given) if copies else 0):
                rotated = given[turn:] + given[:turn] + [""] * (4 - len(given))
                letter = "ABCD"[("ABCD".index(answer) - turn) % len(given)]
                end = (category, ability, index)  # the image stands once
                copy = str(int(index) + turn * 1_000_000)
                table.writerow((copy, question, hint, *rotated, letter, *end))
    return path


SCIENCEQA_PROBLEMS: dict[str, dict[str, Any]] = {
    "3": {
        "question": "Which is hot?",
        "choices": ["ice", "fire"],
        "answer": 1,
        "hint": "Think of a stove.",
        "image": "image.png",
        "grade": "grade2",
        "subject": "natural science",
    },
    "5": {
        "question": "Which is a verb?",
        "choices": ["run", "blue", "cat"],
        "answer": 0,
        "hint": "",
        "image": None,
        "grade": "grade8",
        "subject": "language science",
    },
    "8": {
        "question": "Which is a map?",
        "choices": ["x", "y"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "grade": "grade7",
        "subject": "social science",
    },
    "9": {"question": "not in the test part", "choices": ["x", "y"], "answer": 0},
}


def scienceqa(folder: Path) -> Path:
    write_json(folder / "problems.json", SCIENCEQA_PROBLEMS)
    write_json(folder / "pid_splits.json", {"train": ["9"], "test": ["3", "5", "8"]})
    write_image(folder / "images" / "test" / "3" / "image.png", "red")
    write_image(folder / "images" / "test" / "8" / "image.png", "blue")
    return folder


def scienceqa_parquet(folder: Path) -> Path:
    """The same as the Hub's copy has it."""
    import pyarrow
    import pyarrow.parquet

    colors = {"3": "red", "8": "blue"}
    entries = [
        SCIENCEQA_PROBLEMS[number]
        | {"image": {"bytes": picture(colors[number]), "path": "x"} if number in colors else None}
        for number in ("3", "5", "8")
    ]
    folder.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(entries)
    pyarrow.parquet.write_table(table, folder / "test-00000-of-00001.parquet")
    return folder


def textvqa(folder: Path) -> Path:
    answers = [["stop"] * 6 + ["Stop sign"] * 3 + ["a stop"], ["12"] * 2 + ["twelve"] * 8]
    entries = [
        {
            "question_id": 30 + number,
            "image_id": color,
            "question": f"what is written {number}?",
            "answers": answers[number],
        }
        for number, color in enumerate(("red", "blue"))
    ]
    write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": entries})
    for color in ("red", "blue"):
        write_image(folder / "train_images" / f"{color}.jpg", color)
    return folder


def chartqa(folder: Path) -> Path:
    halves = {
        "human": [("red", "How many?", "100"), ("blue", "Which?", "Yes")],
        "augmented": [("red", "What share?", "0.25")],
    }
    for half, questions in halves.items():
        entries = [
            {"imgname": f"{name}.png", "query": query, "label": label}
            for name, query, label in questions
        ]
        write_json(folder / "test" / f"test_{half}.json", entries)
    for color in ("red", "blue"):
        write_image(folder / "test" / "png" / f"{color}.png", color)
    return folder


COPIES: dict[str, Callable[[Path], Path]] = {
    "pope": pope,
    "mmbench": lambda folder: mmbench(folder / "MMBench_DEV_EN.tsv"),
    "scienceqa": scienceqa,
    "textvqa": textvqa,
    "chartqa": chartqa,
}
"""What writes a copy of each benchmark into a new folder."""
