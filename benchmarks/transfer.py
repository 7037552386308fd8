"""What of a model is tuned, compared: the same base, data and steps, each way at its best rate.

Run: python -m benchmarks.transfer [--epochs 1] [--only full lora] [--folder FOLDER]

The demo's small model, its tower aligned, learns easy-VQA for 45 steps. From there each way of
tuning goes on with the same questions. Its learning rate is the best of three on the validation
part; the table of docs/methods.md has the exact match on the test part with its 95% interval by
image, the trained numbers, and the seconds of that run. A run that has ended in `--folder` is taken
as it is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.finished import finished_run
from vlm_tune.config.load import load_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.resources import resource_folder

BASE_STEPS = 45
RATES = (5e-4, 2e-3, 8e-3)
"""Learning rates that each way is tried with."""
CONNECTOR = {"match": "connector.*", "how": "full"}
LORA = {"match": "llm.*", "how": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
WAYS: dict[str, list[dict[str, Any]]] = {
    "connector": [CONNECTOR, {"match": "llm.*", "how": "frozen"}],
    "last_layers": [CONNECTOR, {"match": "llm.*", "how": "last_layers", "layers": 1}],
    "layer_decay": [CONNECTOR, {"match": "llm.*", "how": "full", "layer_decay": 0.5}],
    "full": [CONNECTOR, {"match": "llm.*", "how": "full"}],
    "norms": [CONNECTOR, {"match": "llm.*", "how": "norms"}],
    "lora": [CONNECTOR, LORA],
    "dora": [CONNECTOR, {**LORA, "variant": "dora"}],
    "lora, connector frozen": [{"match": "connector.*", "how": "frozen"}, LORA],
    "prompt": [CONNECTOR, {"match": "llm.*", "how": "prompt", "tokens": 20}],
    "prefix": [CONNECTOR, {"match": "llm.*", "how": "prefix", "tokens": 20}],
}
"""The rules of each way, after those of the tower, which is frozen."""


class Trial(NamedTuple):
    """A way's run at one rate: its folder, and its score on the validation part."""

    rate: float
    validation: float
    run: Path


def base_recipe(output: Path) -> Recipe:
    """The demo's first two stages, of which the second is short."""
    demo = load_recipe(resource_folder("recipes") / "demo.yaml")
    align, base = (stage.model_dump(exclude_unset=True) for stage in demo.stages[:2])
    short = {"epochs": None, "steps": BASE_STEPS, "schedule": {"kind": "constant", "warmup": 0.05}}
    changes = {
        "output": str(output),
        "stages": [align, base | {"train": short}],
        "evaluate.baselines": [],
    }
    return load_recipe(resource_folder("recipes") / "demo.yaml", changes)


def way_recipe(base: Path, way: str, rate: float, output: Path, epochs: float) -> Recipe:
    """A way of tuning the base further."""
    changes: dict[str, Any] = {
        "output": str(output),
        "stages": [],
        "model": {"pretrained": str(base)},
        "tune": [{"match": "tower.*", "how": "frozen"}, *WAYS[way]],
        "train.epochs": epochs,
        "train.learning_rate": rate,
        "evaluate.baselines": [],
        "evaluate.samples": 0,
    }
    return load_recipe(resource_folder("recipes") / "demo.yaml", changes)


def tried(base: Path, way: str, rate: float, folder: Path, epochs: float) -> Trial:
    """Trains one way at one rate, and scores it on the validation part."""
    from vlm_tune import evaluate

    output = folder / f"{way.replace(', ', '-').replace(' ', '-')}-{rate:g}"
    run = finished_run(way_recipe(base, way, rate, output, epochs))
    return Trial(rate, evaluate(run, split="validation").accuracy, run)


def result_of(run: Path) -> dict[str, Any]:
    """The result of a finished run."""
    return json.loads((run / "result.json").read_text())


def trained_numbers(run: Path) -> int:
    """How many numbers the last stage of a run trained."""
    rows = json.loads((run / "tuning.json").read_text())[-1]["rows"]
    return sum(row["trained"] for row in rows)


def line(way: str, trials: list[Trial]) -> str:
    """A way's row of the table, of its best trial."""
    best = max(trials, key=lambda trial: trial.validation)
    result = result_of(best.run)
    score = result["metrics"]["exact_match"]
    return (
        f"| `{way}` | {score['value']:.2%} ({score['low']:.2%} to {score['high']:.2%}) | "
        f"{trained_numbers(best.run):,} | {best.rate:g} | {result['seconds']:.0f} |"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--folder", type=Path, help="where runs are written")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="transfer-"))
    base = finished_run(base_recipe(folder / "base"))
    score = result_of(base)["metrics"]["exact_match"]
    print(f"the base: {score['value']:.2%} ({score['low']:.2%} to {score['high']:.2%})")
    print("| tuned | exact match | trained numbers | learning rate | seconds |")
    print("|---|---|---|---|---|")
    for way in options.only:
        trials = [tried(base / "model", way, rate, folder, options.epochs) for rate in RATES]
        print(line(way, trials), flush=True)


if __name__ == "__main__":
    main()
