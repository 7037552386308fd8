"""Growth of a training step's cost with its sizes.

Run: python -m benchmarks.scaling [--axes image_tokens,batch] [--json FILE]

One size is changed at a time: image tokens, questions per image, length of the text before a
question, images per step, vocabulary, model size. A point is the median seconds of some steps of
`sft` on easy-VQA, with LoRA r=16 on every linear layer of a random decoder in bf16. The exponent is
the slope of a line through the logarithms. It is printed beside that of the useful work (the
formula of benchmarks/ours.py), so that the difference shows the overhead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import material, ours

PATCH = 16
WARM = 2
QUESTIONS = 8
"""Most questions per image; images with fewer are not used."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a step.

    `context` is the number of words before each image's questions; `width` and `layers` are the
    decoder's.
    """

    image_tokens: int = 49
    questions: int = 8
    context: int = 0
    batch: int = 8
    vocabulary: int = 16000
    width: int = 384
    layers: int = 6


AXES: dict[str, tuple[Shape, ...]] = {
    "image_tokens": tuple(Shape(image_tokens=side * side) for side in (4, 7, 10, 14, 20)),
    "questions_an_image": tuple(Shape(questions=count) for count in (1, 2, 4, 8)),
    "sequence_length": tuple(
        Shape(context=words, questions=2) for words in (32, 128, 256, 512, 1024)
    ),
    "batch": tuple(Shape(batch=images) for images in (2, 4, 8, 16)),
    "vocabulary": tuple(Shape(vocabulary=size) for size in (4000, 16000, 64000, 128000)),
    "model_size": tuple(
        Shape(width=width, layers=layers)
        for width, layers in ((256, 4), (384, 6), (512, 8), (640, 10))
    ),
}


@dataclass(frozen=True)
class Point:
    """A measured shape: value on the axis, seconds and useful operations of a step, and spread."""

    axis: str
    x: float
    seconds: float
    operations: float
    spread: float
    shape: Shape


def write_rows(source: Path, path: Path, shape: Shape, images: int) -> None:
    """Writes rows about `images` images with exactly `shape.questions` questions each.

    The context before them consists of other images' questions.
    """
    rows = [json.loads(line) for line in (source / "multi.jsonl").read_text().splitlines()]
    rows = [row for row in rows if len(row["messages"]) >= 2 * QUESTIONS]
    words = " ".join(message["content"] for row in rows for message in row["messages"][::2]).split()
    output_rows = []
    for place, row in enumerate(rows[:images]):
        context = " ".join(words[place : place + shape.context])
        for start in range(0, 2 * shape.questions, 2):
            question, answer = row["messages"][start : start + 2]
            turn = {"role": "user", "content": f"{context} {question['content']}".strip()}
            output_rows.append(
                {
                    "messages": [turn, answer],
                    "images": [str(source / name) for name in row["images"]],
                }
            )
    if len(rows) < images:
        raise SystemExit(f"{len(rows)} images have {QUESTIONS} questions, {images} are needed")
    path.write_text("".join(json.dumps(row) + "\n" for row in output_rows))


def recipe(shape: Shape, rows: Path, output: Path, steps: int) -> str:
    """The recipe of a point."""
    heads = shape.width // 64
    decoder = {
        "hidden_size": shape.width,
        "intermediate_size": 8 * shape.width // 3,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": shape.vocabulary,
    }
    tower = {
        "layers": 2,
        "width": 128,
        "head_width": 64,
        "patch_size": PATCH,
        "image_size": PATCH * round(shape.image_tokens**0.5),
    }
    return json.dumps(
        {
            "name": "scaling",
            "output": str(output),
            "seed": 0,
            "model": {
                "tower": {"kind": "open_clip", "config": tower},
                "llm": {
                    "kind": "causal",
                    "scratch": {"model_type": "llama", "vocab_size": 2000, "config": decoder},
                },
            },
            "data": {
                "template": "chatml",
                "group": "image",
                "max_length": 8192,
                "train": [{"kind": "file", "path": str(rows), "image_root": "/"}],
            },
            "tune": [
                {"match": "tower.*", "how": "frozen"},
                {"match": "connector.*", "how": "full"},
                {"match": "llm.*", "how": "lora", "r": 16, "target_modules": "all-linear"},
            ],
            "train": {
                "steps": WARM + steps,
                "batch_size": shape.batch,
                "precision": "bf16",
                "log_every": 1,
                "checkpoints": {"every": 1000000},
            },
            "evaluate": {"samples": 0},
        }
    )


def measure(axis: str, shape: Shape, source: Path, steps: int) -> Point:
    """Measures a point by training its steps."""
    from vlm_tune.api import sft
    from vlm_tune.config.load import parse_recipe
    from vlm_tune.events import Event, TrainSteps

    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        write_rows(source, rows, shape, 2 * max(shape.batch, 8))
        text = recipe(shape, rows, Path(scratch) / "run", steps)
        work = ours.work(text)
        events: list[Event] = []
        sft(parse_recipe(text), show=events.append)
    questions = shape.batch * shape.questions
    seconds = [
        questions / event.questions_per_s for event in events if isinstance(event, TrainSteps)
    ][WARM:]
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    each = work.mean.tokens * shape.questions
    x = {
        "image_tokens": shape.image_tokens,
        "questions_an_image": shape.questions,
        "sequence_length": each,
        "batch": shape.batch,
        "vocabulary": shape.vocabulary,
        "model_size": shape.layers * shape.width**2 * 12,
    }[axis]
    return Point(axis, x, middle, work.operations * questions, (high - low) / middle, shape)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of a line fitted through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def shown(points: Sequence[Point]) -> dict[str, float]:
    """Prints an axis' table, and returns its exponents."""
    x = [point.x for point in points]
    exponents = {
        "time": exponent(x, [p.seconds for p in points]),
        "work": exponent(x, [p.operations for p in points]),
    }
    ends = {
        "time_at_the_end": exponent(x[-2:], [p.seconds for p in points[-2:]]),
        "work_at_the_end": exponent(x[-2:], [p.operations for p in points[-2:]]),
    }
    print(f"\n{points[0].axis:24} {'ms a step':>10} {'spread':>7} {'GFLOP':>9} {'TFLOP/s':>8}")
    for point in points:
        rate = point.operations / point.seconds / 1e12
        print(
            f"{point.x:24,.0f} {point.seconds * 1e3:10.1f} {point.spread:7.1%} "
            f"{point.operations / 1e9:9.1f} {rate:8.3f}"
        )
    print(
        f"time ~ x^{exponents['time']:.2f} (last two points {ends['time_at_the_end']:.2f}), ",
        end="",
    )
    print(f"useful work ~ x^{exponents['work']:.2f} ({ends['work_at_the_end']:.2f})", flush=True)
    return exponents | ends


def main() -> None:
    """Prints a table for each axis; with --json also saves the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--axes", type=lambda text: text.split(","), default=list(AXES), help=", ".join(AXES)
    )
    parser.add_argument("--steps", type=int, default=6, help="measured steps of a point")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the two smallest points of each axis, a narrow model: a trial of the bench",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    unknown = [axis for axis in options.axes if axis not in AXES]
    if unknown:
        parser.error(f"no axis {', '.join(unknown)}; expected one of {', '.join(AXES)}")
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        material.write_rows(Path(folder), 120)
        for axis in options.axes:
            shapes = AXES[axis]
            if options.quick:
                narrow = [64, 128] if axis == "model_size" else [64, 64]
                shapes = tuple(
                    replace(shape, width=width, layers=2)
                    for shape, width in zip(shapes, narrow, strict=False)
                )
            points = [measure(axis, shape, Path(folder), options.steps) for shape in shapes]
            result[axis] = {
                "exponents": shown(points),
                "points": [asdict(point) for point in points],
            }
            if options.json:
                options.json.write_text(
                    json.dumps({"threads": options.threads, "axes": result}, indent=1)
                )


if __name__ == "__main__":
    main()
