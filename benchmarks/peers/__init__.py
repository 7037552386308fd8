"""The peers: trainers that ours is compared with, their packages, scripts and settings to sweep.

The scripts run in the peer's own environment, import nothing of vlm_tune, and print one JSON line
(see probe.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """A trainer: its pip packages, its script, the settings to sweep, and its rate on two cores.

    Attributes:
        kind: Of the language model, "causal" or "seq2seq".
        script: File name of its training script in this folder.
        packages: Requirements that pip installs.
        sweep: Values of each setting, the quickest to try first; fp32 is the last precision.
        batches: Rows a step, by row form; other settings are tried with the first number.
        rates: Question-answer pairs a second, by row form; the time of a comparison is estimated
            from them.
    """

    kind: str
    script: str
    packages: tuple[str, ...]
    sweep: dict[str, tuple[Any, ...]]
    batches: dict[str, tuple[int, ...]]
    rates: dict[str, float]

    def start(self, *, fp32: bool = False) -> dict[str, Any]:
        """The settings that a sweep begins with: the first value of each.

        Args:
            fp32: Take the last precision, which is fp32, in place of the first.
        """
        first = {
            key: values[-1 if fp32 and key == "precision" else 0]
            for key, values in self.sweep.items()
        }
        return {**first, "batch": self.batches[first["rows"]][0]}

    def changes(self, settings: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
        """Yields the settings with each other value of one key.

        Another row form comes with its own first batch.
        """
        for value in self.batches[settings["rows"]] if key == "batch" else self.sweep[key]:
            if value != settings[key]:
                batch = {"batch": self.batches[value][0]} if key == "rows" else {}
                yield {**settings, key: value, **batch}


DEFAULTS = {"rows": "single", "batch": None, "precision": None, "checkpointing": None}
"""The peer's own defaults: rows of one question, and None for all else."""

BATCHES = {"single": (8, 16, 32), "multi": (4, 2, 8)}
"""Rows a step by row form: one question a row, or all questions of an image."""

PRECISIONS = ("bf16", "bf16_weights", "bf16_both", "fp32")
"""Autocast over fp32 weights; bf16 weights without autocast; bf16 weights with it; fp32."""

TORCH = ("torch==2.14.1", "torchvision==0.29.1", "pillow")

PEERS = {
    "trl": Peer(
        kind="causal",
        script="train_trl.py",
        packages=("trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", *TORCH),
        sweep={
            "precision": PRECISIONS,
            "checkpointing": (False, True),
            "rows": ("single", "multi"),
        },
        batches=BATCHES,
        rates={"single": 2.6, "multi": 6.0},
    ),
    "llamafactory": Peer(
        kind="causal",
        script="train_llamafactory.py",
        packages=("llamafactory==0.9.5", *TORCH),
        # It loads weights in bf16 wherever it computes in bf16, and refuses its `pure_bf16` on a
        # CPU.
        sweep={
            "precision": ("bf16", None),
            "checkpointing": (False, True),
            "rows": ("single", "multi"),
        },
        batches=BATCHES,
        rates={"single": 2.4, "multi": 7.0},
    ),
    "seq2seq": Peer(
        kind="seq2seq",
        script="train_seq2seq.py",
        packages=("transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.2", *TORCH),
        sweep={"precision": PRECISIONS, "checkpointing": (False, True), "rows": ("single",)},
        batches={"single": (16, 8, 32)},
        rates={"single": 3.0},
    ),
}


def install(name: str, folder: Path) -> Path:
    """Returns the Python of the peer's own environment.

    The environment is created where it does not exist or has other packages.
    """
    home = folder / name
    packages = PEERS[name].packages
    python = home / "bin" / "python"
    stamp = home / ".installed"
    if not stamp.is_file() or stamp.read_text() != "\n".join(packages):
        print(f"installing {name} into {home}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run(
            [
                str(python),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                *packages,
            ],
            check=True,
        )
        stamp.write_text("\n".join(packages))
    return python


def versions(python: Path) -> dict[str, str]:
    """Versions of the packages in an environment that matter for speed."""
    names = [
        "trl",
        "llamafactory",
        "transformers",
        "accelerate",
        "peft",
        "torch",
        "torchvision",
        "tokenizers",
        "datasets",
        "numpy",
    ]
    code = (
        "import importlib.metadata as m, json, sys\n"
        "known = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({name: known[name] for name in sys.argv[1:] if name in known}))"
    )
    printed = subprocess.run(
        [str(python), "-c", code, *names], check=True, capture_output=True, text=True
    )
    return json.loads(printed.stdout)
