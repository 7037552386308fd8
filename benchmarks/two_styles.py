"""A model tuned on drawings of one style and asked about another, beside answers without training.

Run: python -m benchmarks.two_styles [--things flags] [--recipe FILE] [--seeds 0 1 2] [--json FILE]

About 200 things are drawn twice by packages of the npm registry: country flags as rectangles with
details and as simplified discs, or icons in two colours and filled. Each drawing of the first style
is asked two questions, its name (open: each name belongs to one image) and its group (answers
repeat); the test is the same about the second style. `vlm-tune sft` trains the recipe with each
seed. The nearest neighbour and a linear probe answer from the mean features of the recipe's tower
as it came. The paired test swaps a model's and a baseline's answers image by image, over all seeds.

Needs npm, and pip for a renderer of SVG; `make models` first.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = {
    "flags": ("flag-icons@7.5.0", "circle-flags@2.8.3"),
    "icons": ("@iconify-json/icon-park@1.2.4", "@iconify-json/icon-park-solid@1.2.4"),
}
"""The packages of each kind of things: of the trained style, and of the other."""
RENDERER = "resvg-py==0.5.0"
QUESTIONS = {
    "flags": {"group": "Which continent does this flag belong to?", "name": "Whose flag is this?"},
    "icons": {"group": "Which group does this icon belong to?", "name": "What is this?"},
}
GROUPS = (
    *("Animals", "Foods", "Sports", "Clothes", "Travel", "Health"),
    *("Music", "Makeups", "Baby", "Hardware", "Weather", "Build"),
)
"""The categories of icons, of which each gives `EACH` things at most."""
EACH = 18
THINGS = 200
SIDE = 128
"""Pixels of a side of the images."""


@dataclass(frozen=True)
class Thing:
    """A thing with its drawings: SVG in the style that is trained and in the other."""

    key: str
    name: str
    group: str
    trained: str
    other: str


# --- the data -------------------------------------------------------------------------------------


def fetch(package: str, folder: Path) -> Path:
    """Unpacks a package of the npm registry and returns its folder."""
    name = re.sub(r"\W+", "-", package.rpartition("@")[0]).strip("-")
    target = folder / name
    if not target.exists():
        with tempfile.TemporaryDirectory() as packed:
            subprocess.run(
                ["npm", "pack", "--silent", "--pack-destination", packed, package],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            (archive,) = Path(packed).iterdir()
            target.mkdir(parents=True)
            subprocess.run(["tar", "xzf", str(archive), "-C", str(target)], check=True)
    return target / "package"


def flags(trained: Path, other: Path) -> Iterator[Thing]:
    """Country flags with their continents."""
    for country in json.loads((trained / "country.json").read_text("utf-8")):
        disc = other / "flags" / f"{country['code']}.svg"
        continent = country.get("continent")
        if country.get("iso") and disc.exists() and continent not in (None, "Antarctica"):
            yield Thing(
                country["code"],
                country["name"],
                continent,
                (trained / country["flag_4x3"]).read_text("utf-8"),
                disc.read_text("utf-8"),
            )


def icons(trained: Path, other: Path) -> Iterator[Thing]:
    """Icons with their categories; variants (`-one`, `-two`) are left out."""
    drawings = [json.loads((each / "icons.json").read_text("utf-8")) for each in (trained, other)]
    categories = json.loads((trained / "metadata.json").read_text("utf-8"))["categories"]
    seen: set[str] = set()
    for group in GROUPS:
        names = [
            name
            for name in sorted(categories[group])
            if name in drawings[1]["icons"]
            and name not in seen
            and not re.search(r"-(one|two|three|four|five)$|\d|zodiac", name)
        ][:EACH]
        seen.update(names)
        for name in names:
            yield Thing(
                name, name.replace("-", " "), group, *(_icon(each, name) for each in drawings)
            )


def _icon(drawings: dict[str, Any], name: str) -> str:
    icon = drawings["icons"][name]
    width = icon.get("width", drawings.get("width", 16))
    height = icon.get("height", drawings.get("height", 16))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" color="#222">{icon["body"]}</svg>'
    )


def drawn(svg: str, renderer: Any) -> bytes:
    """The drawing as a PNG file of `SIDE` pixels a side, on white."""
    from PIL import Image

    data = bytes(renderer.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))
    drawing = Image.open(io.BytesIO(data)).convert("RGBA")
    drawing.thumbnail((SIDE, SIDE))
    canvas = Image.new("RGBA", (SIDE, SIDE), "white")
    place = ((SIDE - drawing.width) // 2, (SIDE - drawing.height) // 2)
    canvas.alpha_composite(drawing, place)
    file = io.BytesIO()
    canvas.convert("RGB").save(file, "PNG")
    return file.getvalue()


def write_data(kind: str, folder: Path) -> list[Thing]:
    """Writes images, train.jsonl and test.jsonl, and returns the things.

    A thing that is drawn like an earlier one (flags of territories) is left out.
    """
    packages = [fetch(package, folder / "packages") for package in PACKAGES[kind]]
    things = list({"flags": flags, "icons": icons}[kind](*packages))
    renderer = _renderer(folder / "renderer")
    chosen: list[Thing] = []
    seen: set[bytes] = set()
    for thing in things:
        drawings = {"trained": thing.trained, "other": thing.other}
        images = {style: drawn(svg, renderer) for style, svg in drawings.items()}
        if len(chosen) < THINGS and seen.isdisjoint(images.values()):
            chosen.append(thing)
            seen.update(images.values())
            for style, image in images.items():
                file = folder / style / f"{thing.key}.png"
                if not file.exists():
                    file.parent.mkdir(exist_ok=True)
                    file.write_bytes(image)
    for part, style in (("train", "trained"), ("test", "other")):
        lines = [
            json.dumps(
                {
                    "id": f"{thing.key}-{task}",
                    "image": f"{style}/{thing.key}.png",
                    "question": question,
                    "answer": getattr(thing, task),
                    "category": task,
                }
            )
            for thing in chosen
            for task, question in QUESTIONS[kind].items()
        ]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return chosen


def _renderer(folder: Path) -> Any:
    """The renderer of SVG, installed into a folder of its own."""
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), RENDERER]
        subprocess.run(pip, check=True)
    sys.path.append(str(folder))
    return importlib.import_module("resvg_py")


# --- the sides ------------------------------------------------------------------------------------


def tune(recipe: Path, run: Path, seed: int) -> dict[str, float]:
    """Trains and scores the recipe; returns its seconds, on the clock and of the CPU.

    A run that `--folder` holds from before is not trained again.
    """
    costs = run.with_suffix(".json")
    if costs.exists():
        return json.loads(costs.read_text("utf-8"))
    command = [sys.executable, "-m", "vlm_tune.cli", "sft", str(recipe), "--overwrite"]
    for part in ("train", "test"):
        command += ["--set", f"data.{part}.0.path={run.parent / part}.jsonl"]
    command += ["--set", f"seed={seed}", "--set", f"output={run}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    cost = {"seconds": time.perf_counter() - started, "cpu_seconds": cpu}
    costs.write_text(json.dumps(cost), encoding="utf-8")
    return cost


def right_answers(run: Path, things: Sequence[Thing], task: str) -> np.ndarray:
    """Which things a run names, or groups, rightly."""
    lines = map(json.loads, (run / "answers.jsonl").read_text("utf-8").splitlines())
    # An id is that of the row in the file, between the source's name and the row's number.
    right = {line["id"].split(":")[1]: line["correct"] for line in lines}
    return np.array([right[f"{thing.key}-{task}"] for thing in things], dtype=float)


def baselines(recipe: Path, things: Sequence[Thing], folder: Path) -> dict[str, dict[str, Any]]:
    """Which things each baseline answers rightly, by task, from the recipe's tower as it came."""
    import torch

    from vlm_tune.config.load import load_recipe
    from vlm_tune.data.images.decode import ImageProcessor
    from vlm_tune.data.types import Media
    from vlm_tune.evaluation.baselines import Known, nearest, probe
    from vlm_tune.model.pretrained.vlm_checkpoints import model_section
    from vlm_tune.model.vision.registry import build_tower

    config = model_section(load_recipe(recipe)).tower
    tower = build_tower(config, None).eval()
    images = ImageProcessor(tower.image_size, config.resize, tower.mean)
    features = {}
    for style in ("trained", "other"):
        media = [Media(folder / style / f"{thing.key}.png") for thing in things]
        with torch.no_grad():
            means = [tower(images(each)[None])[0].mean(0) for each in media]
        features[style] = torch.stack(means).numpy()
    right: dict[str, dict[str, Any]] = {}
    for task in ("group", "name"):
        known = [Known(task, getattr(thing, task)) for thing in things]
        for name, answered in (("nearest", nearest), ("probe", probe)):
            answers = answered(known, features["trained"], known, features["other"])
            right.setdefault(task, {})[name] = np.array(
                [given == each.answer for given, each in zip(answers, known, strict=True)],
                dtype=float,
            )
    return right


# --- the comparison -------------------------------------------------------------------------------


def compared(ours: Sequence[np.ndarray], theirs: np.ndarray) -> dict[str, Any]:
    """The accuracy over all seeds less a baseline's, with its interval and the paired test.

    Args:
        ours: which things each seed's model answers rightly.
        theirs: which the baseline does.
    """
    from vlm_tune.evaluation.intervals import difference

    seeds = len(ours)
    counts = np.full(len(theirs), float(seeds))
    gap = difference(
        np.stack([np.sum(ours, axis=0), counts], axis=1),
        np.stack([seeds * theirs, counts], axis=1),
        lambda sums: sums[..., 0] / sums[..., 1],
    )
    return {
        "accuracy": float(theirs.mean()),
        "difference": gap.value,
        "low": gap.low,
        "high": gap.high,
        "p": gap.p,
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs all seeds and compares them with the baselines, task by task."""
    folder.mkdir(parents=True, exist_ok=True)
    things = write_data(options.things, folder)
    right = baselines(options.recipe, things, folder)
    runs = [folder / f"run-{seed}" for seed in options.seeds]
    costs = [tune(options.recipe, run, seed) for run, seed in zip(runs, options.seeds, strict=True)]
    report: dict[str, Any] = {"things": len(things), "runs": costs, "tasks": {}}
    for task in ("group", "name"):
        ours = [right_answers(run, things, task) for run in runs]
        report["tasks"][task] = {
            "tuned": [float(each.mean()) for each in ours],
            "baselines": {name: compared(ours, each) for name, each in right[task].items()},
        }
    return report


def show(report: dict[str, Any]) -> None:
    """Prints the comparison."""
    for number, cost in enumerate(report["runs"]):
        print(f"seed {number}: {cost['seconds']:.0f} s, {cost['cpu_seconds']:.0f} s of CPU")
    for task, scores in report["tasks"].items():
        seeds = ", ".join(f"{share:.1%}" for share in scores["tuned"])
        print(
            f"{task} of {report['things']} things: tuned {np.mean(scores['tuned']):.1%} ({seeds})"
        )
        for name, entry in scores["baselines"].items():
            print(
                f"  {name} {entry['accuracy']:.1%}, difference {entry['difference']:+.1%} "
                f"({entry['low']:+.1%} to {entry['high']:+.1%}), p {entry['p']:.4f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--things", choices=list(PACKAGES), default="flags")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/small-data.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="where data and runs stay")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        report = measure(options, (options.folder or Path(temporary)).absolute())
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
