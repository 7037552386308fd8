"""Builds the videos of `recipes/moving-shapes-video.yaml`: a coloured shape moves one way.

    pip install 'vlm_tune[video]'
    python -m benchmarks.moving_shapes

Where the middle frame shows a shape does not depend on its way, so that frame alone tells nothing
of it; the best guess by the first frame alone is right in 49% of videos. Rows of the VQA form ask
which way, what, and in which colour; captions beside them are for matching videos and texts. The
same arguments give the same videos.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import av
from PIL import Image, ImageDraw

SIDE = 32
FRAMES = 8
RATE = 8
"""Pixels of a side, frames of a video, and frames a second."""
STEP = 1
"""Pixels from frame to frame."""
SIZE = 8
MIDDLE = FRAMES // 2
"""The frame that is alone where a video is read as one frame."""
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 40),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PARTS = {"train": 2000, "validation": 150, "test": 500}
"""Videos by part."""


def frame(shape: str, colour: str, left: int, top: int) -> Image.Image:
    """A frame with a shape whose box begins at (left, top)."""
    image = Image.new("RGB", (SIDE, SIDE), (16, 16, 16))
    draw = ImageDraw.Draw(image)
    right = left + SIZE - 1
    bottom = top + SIZE - 1
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), COLOURS[colour])
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), COLOURS[colour])
    else:
        draw.polygon([(left, bottom), (right, bottom), (left + SIZE // 2, top)], COLOURS[colour])
    return image


def write_video(path: Path, shape: str, colour: str, direction: str, draw: random.Random) -> None:
    """Writes a video (MPEG-4) of a shape that moves, from a random place."""
    right, down = DIRECTIONS[direction]
    margin = STEP * MIDDLE
    left = draw.randint(margin, SIDE - SIZE - margin)
    top = draw.randint(margin, SIDE - SIZE - margin)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=RATE)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 2_000_000
        for number in range(FRAMES):
            moved = STEP * (number - MIDDLE)
            image = frame(shape, colour, left + right * moved, top + down * moved)
            file.mux(stream.encode(av.VideoFrame.from_image(image)))
        file.mux(stream.encode(None))


def build(folder: Path, parts: dict[str, int], seed: int = 0) -> None:
    """Writes the videos, and `train.jsonl`, `train-captions.jsonl` and so on beside them."""
    for part, videos in parts.items():
        draw = random.Random(f"{seed} {part}")
        (folder / part).mkdir(parents=True, exist_ok=True)
        rows = []
        captions = []
        for number in range(videos):
            shape = draw.choice(SHAPES)
            colour = draw.choice(sorted(COLOURS))
            direction = draw.choice(sorted(DIRECTIONS))
            video = f"{part}/{number:05}.mp4"
            write_video(folder / video, shape, colour, direction, draw)
            rows += [
                {"question": question, "answer": answer, "video": video, "category": category}
                for category, question, answer in (
                    ("direction", "which way does it move?", direction),
                    ("shape", "what is it?", shape),
                    ("colour", "which colour is it?", colour),
                )
            ]
            captions.append({"caption": f"a {colour} {shape} moves {direction}", "video": video})
        for name, written in ((part, rows), (f"{part}-captions", captions)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in written))
        print(f"{part}: {videos:,} videos, {len(rows):,} questions")


def main() -> None:
    """Builds the data set in a folder."""
    parser = argparse.ArgumentParser(description="Builds the moving shapes.")
    parser.add_argument("--folder", type=Path, default=Path("moving-shapes"))
    for part, videos in PARTS.items():
        parser.add_argument(f"--{part}", type=int, default=videos, help=f"videos ({videos})")
    options = parser.parse_args()
    build(options.folder, {part: getattr(options, part) for part in PARTS})


if __name__ == "__main__":
    main()
