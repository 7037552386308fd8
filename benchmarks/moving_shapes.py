"""Builds the clips of `recipes/moving-shapes.yaml`: shapes that move and follow one another.

Run: python -m benchmarks.moving_shapes [--folder moving-shapes]

A clip is a folder of four frames. One to three different shapes, each of a color of its own, follow
one another, while they move in one direction and grow or shrink. Where and how large they begin is
drawn, so that one frame alone says little of either. `train.jsonl` and so on have questions about
the clips in the VQA form; `match-train.jsonl` and so on captions of clips, for matching;
`frames-train.jsonl` and `frames-validation.jsonl` captions of single frames, for a tower to begin
with. The same arguments give the same clips and rows.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

COLORS = {
    "black": (20, 20, 20),
    "blue": (30, 60, 200),
    "brown": (120, 70, 30),
    "gray": (120, 120, 120),
    "green": (40, 150, 50),
    "red": (210, 40, 40),
    "teal": (0, 150, 160),
    "yellow": (225, 205, 40),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CORNERS = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)),
}
"""Corners of a shape whose radius is 1, around its middle."""
PARTS = {"train": 3000, "validation": 200, "test": 600}
"""Clips by part."""
CAPTIONED = {"train": 1000, "validation": 200}
"""The first clips of a part, whose frames have captions."""
FRAMES = 4
SIDE = 64
FINER = 4
"""Frames are drawn this many times as large, and then made smaller, for smooth edges."""
PACES = (5.0, 7.0)
"""Pixels that a shape moves from one frame to the next."""
RADII = (5.0, 7.0)
"""Pixels of a shape's radius where it is smallest."""
GROWTHS = (1.5, 2.0)
"""Pixels by which the radius changes from one frame to the next."""


class Thing(NamedTuple):
    """A shape of a color."""

    color: str
    shape: str


class Frame(NamedTuple):
    """What a frame shows: the thing, the pixels of its middle, and its radius."""

    thing: Thing
    x: float
    y: float
    radius: float


class Clip(NamedTuple):
    """A clip and what is true of it.

    Attributes:
        things: The things in the order in which they come.
        direction: The direction in which they move.
        grows: Whether they grow.
        frames: The frames.
    """

    things: list[Thing]
    direction: str
    grows: bool
    frames: list[Frame]


def drawn_clip(draw: random.Random) -> Clip:
    """A clip with random things, direction, growth and place."""
    count = draw.randint(1, len(SHAPES))
    shapes = draw.sample(SHAPES, count)
    things = [Thing(*pair) for pair in zip(draw.sample(sorted(COLORS), count), shapes, strict=True)]
    starts = sorted(draw.sample(range(1, FRAMES), count - 1))
    direction = draw.choice(sorted(DIRECTIONS))
    grows = draw.random() < 0.5
    pace = draw.uniform(*PACES)
    growth = draw.uniform(*GROWTHS)
    radii = [draw.uniform(*RADII)]
    radii += [radii[0] + growth * number for number in range(1, FRAMES)]
    if not grows:
        radii.reverse()
    paths = [_path(step, pace, max(radii), draw) for step in DIRECTIONS[direction]]
    frames = []
    for number in range(FRAMES):
        thing = things[sum(start <= number for start in starts)]
        frames.append(Frame(thing, paths[0][number], paths[1][number], radii[number]))
    return Clip(things, direction, grows, frames)


def _path(step: int, pace: float, radius: float, draw: random.Random) -> list[float]:
    """The places along one side in all frames, at which a shape of this radius is seen whole."""
    length = pace * (FRAMES - 1) * abs(step)
    first = draw.uniform(radius, SIDE - radius - length)
    if step < 0:
        first += length
    return [first + step * pace * number for number in range(FRAMES)]


def picture(frame: Frame, background: tuple[int, int, int]) -> Image.Image:
    """The image of a frame."""
    image = Image.new("RGB", (SIDE * FINER, SIDE * FINER), background)
    pen = ImageDraw.Draw(image)
    x, y, radius = (FINER * length for length in (frame.x, frame.y, frame.radius))
    fill = COLORS[frame.thing.color]
    if frame.thing.shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        corners = CORNERS[frame.thing.shape]
        pen.polygon([(x + radius * across, y + radius * down) for across, down in corners], fill)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def questions(clip: Clip, draw: random.Random) -> list[tuple[str, str, str]]:
    """Questions about a clip, each with its answer and category."""
    shapes = [thing.shape for thing in clip.things]
    place = draw.randrange(len(shapes))
    following = shapes[place + 1] if place + 1 < len(shapes) else "nothing"
    return [
        ("which shape comes first?", shapes[0], "first shape"),
        ("which color comes last?", clip.things[-1].color, "last color"),
        (f"what comes after the {shapes[place]}?", following, "what comes after"),
        ("how many different shapes appear?", str(len(shapes)), "how many"),
        ("in which direction do they move?", clip.direction, "direction"),
        ("do they grow or shrink?", "grow" if clip.grows else "shrink", "grow or shrink"),
    ]


def clip_captions(clip: Clip) -> list[tuple[str, str]]:
    """Captions that need all frames, each with its category."""
    order = ", then ".join(f"a {thing.shape}" for thing in clip.things)
    change = f"moving {clip.direction} and {'growing' if clip.grows else 'shrinking'}"
    return [(order, "order"), (change, "change")]


def frame_captions(frame: Frame) -> list[tuple[str, str]]:
    """What one frame shows, each caption with its category."""
    return [
        (f"a {frame.thing.color} shape", "color"),
        (f"a {frame.thing.shape}", "shape"),
        (("a small shape", "a medium shape", "a large shape")[_third(frame.radius, 5, 13)], "size"),
        (("at the left", "in the center", "at the right")[_third(frame.x, 12, 52)], "across"),
        (("at the top", "in the middle", "at the bottom")[_third(frame.y, 12, 52)], "down"),
    ]


def _third(length: float, low: float, high: float) -> int:
    """In which third of the range a length is: 0, 1 or 2."""
    return min(max(int(3 * (length - low) / (high - low)), 0), 2)


def build(folder: Path, parts: dict[str, int], seed: int = 0) -> None:
    """Writes the clips as folders of frames, and the rows about them."""
    for part, count in parts.items():
        draw = random.Random(f"{seed} {part}")
        question_rows: list[dict[str, Any]] = []
        caption_rows: list[dict[str, Any]] = []
        frame_rows: list[dict[str, Any]] = []
        for number in range(count):
            clip = drawn_clip(draw)
            place = f"{part}/{number:05}"
            (folder / place).mkdir(parents=True, exist_ok=True)
            red, green, blue = (draw.randint(225, 255) for _ in range(3))
            for index, frame in enumerate(clip.frames):
                picture(frame, (red, green, blue)).save(folder / place / f"{index}.png")
                if number < CAPTIONED.get(part, 0):
                    frame_rows += [
                        {"image": f"{place}/{index}.png", "caption": caption, "category": category}
                        for caption, category in frame_captions(frame)
                    ]
            question_rows += [
                {"video": place, "question": question, "answer": answer, "category": category}
                for question, answer, category in questions(clip, draw)
            ]
            caption_rows += [
                {"video": place, "caption": caption, "category": category}
                for caption, category in clip_captions(clip)
            ]
        _write(folder / f"{part}.jsonl", question_rows)
        _write(folder / f"match-{part}.jsonl", caption_rows)
        if frame_rows:
            _write(folder / f"frames-{part}.jsonl", frame_rows)
        print(f"{part}: {count:,} clips, {len(question_rows):,} questions")


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Builds the data set in a folder."""
    parser = argparse.ArgumentParser(description="Builds clips of moving shapes.")
    parser.add_argument("--folder", type=Path, default=Path("moving-shapes"))
    for part, clips in PARTS.items():
        parser.add_argument(f"--{part}", type=int, default=clips, help=f"clips (default: {clips})")
    options = parser.parse_args()
    build(options.folder, {part: getattr(options, part) for part in PARTS})


if __name__ == "__main__":
    main()
