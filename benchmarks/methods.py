"""Ways to join image and text, each trained alike on easy-VQA and scored on its test part.

Run: python -m benchmarks.methods [--epochs 2] [--only mlp resampler] [--folder FOLDER]

A frozen EfficientNet-Lite0 (`make models`), a connector and a small T5 from random weights learn
all training questions for the same number of epochs; only the connector differs. Prints the exact
match on the test questions with its 95% interval by image, the connector's parameters, the tokens
an image takes, and the seconds of training, as the table of docs/methods.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from vlm_tune.config.load import load_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.resources import resource_folder

TOWER: dict[str, Any] = {
    "kind": "timm",
    "name": "efficientnet_lite0",
    "pretrained": "models/efficientnet_lite0.safetensors",
    "stages": [2, 3],
    "image_size": 112,
    "grid": 4,
}
ATTENDING = {"depth": 2, "heads": 4, "norm": True}

CONNECTORS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "norm": True},
    "mlp": {"kind": "mlp", "depth": 2, "norm": True},
    "avg_pool": {"kind": "avg_pool", "grid": 2, "depth": 2, "norm": True},
    "pixel_shuffle": {"kind": "pixel_shuffle", "factor": 2, "depth": 2, "norm": True},
    "resampler": {"kind": "resampler", "latents": 8, **ATTENDING},
    "qformer": {"kind": "qformer", "queries": 8, "width": 64, "every": 1, **ATTENDING},
    "qformer-text": {
        "kind": "qformer",
        "queries": 8,
        "width": 64,
        "every": 1,
        "text": True,
        **ATTENDING,
    },
    **{
        f"fusion-{how}": {
            "kind": "fusion",
            "how": how,
            "heads": 4,
            "base": {"kind": "mlp", "depth": 2, "norm": True},
        }
        for how in ("concat", "attention", "gate", "product", "bilinear")
    },
    "cross_attention": {
        "kind": "cross_attention",
        "every": 1,
        "heads": 4,
        "base": {"kind": "mlp", "depth": 2, "norm": True},
    },
}
"""The connectors of the comparison by their names in the table."""


def method_recipe(connector: dict[str, Any], output: Path, epochs: float) -> Recipe:
    """The demo's language model and data, with one stage and this connector."""
    changes: dict[str, Any] = {
        "output": str(output),
        "stages": [],
        "model.tower": TOWER,
        "model.connector": connector,
        "train.epochs": epochs,
        "evaluate.baselines": [],
        "evaluate.samples": 0,
    }
    return load_recipe(resource_folder("recipes") / "demo.yaml", changes)


def line(name: str, connector: dict[str, Any], output: Path, epochs: float) -> str:
    """Trains and scores one connector; returns its row of the table."""
    from vlm_tune import sft

    run = sft(method_recipe(connector, output, epochs))
    score = run.result["metrics"]["exact_match"]
    tokens = run.model.processor.spec.tokens_per_image if run.model.connector.fills_slots else 0
    weights = sum(each.numel() for each in run.model.connector.parameters())
    return (
        f"| `{name}` | {score['value']:.2%} ({score['low']:.2%} to {score['high']:.2%}) | "
        f"{weights:,} | {tokens} | {run.result['seconds']:.0f} |"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--only", nargs="+", choices=list(CONNECTORS), default=list(CONNECTORS))
    parser.add_argument("--folder", type=Path, help="where runs are written")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="methods-"))
    print("| connector | exact match | parameters | tokens an image | seconds |")
    print("|---|---|---|---|---|")
    for name in options.only:
        print(line(name, CONNECTORS[name], folder / name, options.epochs), flush=True)


if __name__ == "__main__":
    main()
