"""Training speed of this checkout beside another commit of it, in turns.

Run: python -m benchmarks.commits COMMIT recipes/demo.yaml recipes/easyvqa-smollm2-lora.yaml

Each stage of a recipe runs for some steps. A pair is a run of either commit, one after the other,
and which one is first alternates, so that a busy machine slows both alike. Its ratio is that of the
medians of the two runs' steps, the warm ones. The interval is the median's, by order statistics.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

WARM = 3
"""Steps of each stage that don't count."""

UNREAD = ("validation", "test", "split")
"""Parts of a recipe's data that a run of a few steps does without."""


def main() -> None:
    """Prints the ratios of all stages, and their medians and intervals."""
    options = arguments()
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder, _worktree(root, options.commit, folder) as other:
        for path in options.recipes:
            recipe = shortened(path, Path(folder) / path.name, options.steps)
            pairs = []
            for number in range(options.pairs):
                order = [root, other] if number % 2 == 0 else [other, root]
                rates = {place: run_rates(place, recipe, Path(folder) / "run") for place in order}
                pairs.append({name: rates[root][name] / rates[other][name] for name in rates[root]})
                ratios = ", ".join(f"{name} {ratio:.3f}" for name, ratio in pairs[-1].items())
                print(f"{path.stem}, pair {number + 1}: {ratios}", flush=True)
            for name in pairs[0]:
                ratios = [pair[name] for pair in pairs]
                low, high = interval(ratios)
                middle = statistics.median(ratios)
                print(f"{path.stem}, {name}: {middle:.3f} times as fast [{low:.3f}, {high:.3f}]")


def arguments() -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commit", help="the commit to compare with")
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=13, help="steps of a stage")
    return parser.parse_args()


@contextlib.contextmanager
def _worktree(root: Path, commit: str, folder: str) -> Iterator[Path]:
    """A checkout of the commit in a folder, which is removed afterwards."""
    place = Path(folder) / "other"
    git = ["git", "-C", str(root), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(place), commit], check=True)
    try:
        yield place
    finally:
        subprocess.run([*git, "remove", "--force", str(place)], check=True)


def shortened(path: Path, target: Path, steps: int) -> Path:
    """Writes a recipe whose stages are a few steps long, and neither validate nor save.

    It is changed as YAML, as the other commit may have other code for recipes.
    """
    from ruamel.yaml import YAML

    yaml = YAML()
    recipe: Any = yaml.load(path.read_text(encoding="utf-8"))
    for part in [recipe, *recipe.get("stages", ())]:
        for name in UNREAD:
            part.get("data", {}).pop(name, None)
        part.get("train", {}).pop("epochs", None)
    recipe["train"] |= {"steps": steps, "log_every": 1, "checkpoints": {"every": 1_000_000}}
    recipe["evaluate"] = {"samples": 0}
    with target.open("w", encoding="utf-8") as file:
        yaml.dump(recipe, file)
    return target


def run_rates(place: Path, recipe: Path, output: Path) -> dict[str, float]:
    """The median tokens per second of each stage's warm steps, in a run of a checkout's code.

    Its working directory is this checkout, so that a recipe's relative paths lead to one place. Its
    cache is its own: the other commit may store rows and features in another way.
    """
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "vlm_tune.cli", "sft", str(recipe)]
    done = subprocess.run(
        [*command, "--set", f"output={output}"],
        cwd=Path(__file__).parents[1],
        env=os.environ
        | {
            "PYTHONPATH": str(place),
            "PYTHONSAFEPATH": "1",
            "VLM_TUNE_CACHE": str(output.with_name(f"cache-{place.name}")),
        },
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{place}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    lines = (output / "log.jsonl").read_text(encoding="utf-8").splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "train"]
    names = list(dict.fromkeys(event["name"] for event in events))
    return {
        name: statistics.median(
            event["tokens_per_s"]
            for event in events
            if event["name"] == name and event["step"] > WARM
        )
        for name in names
    }


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """The narrowest order statistics between which the median lies in at least 95% of samples.

    Of fewer than six ratios, the least and the largest.
    """
    ordered = sorted(ratios)
    count = len(ordered)
    tail = 0.0
    rank = 0
    while rank < count // 2:
        tail += math.comb(count, rank) / 2**count
        if 2 * tail > 0.05:
            break
        rank += 1
    rank = max(rank - 1, 0)
    return ordered[rank], ordered[-1 - rank]


if __name__ == "__main__":
    main()
