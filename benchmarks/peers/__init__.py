"""What our training is compared with: each peer's packages, script and settings to try.

The scripts run in the peer's own environment, import nothing of vlm_tune, and print one JSON line (see probe.py).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """A trainer: what pip installs, the script that runs it, its settings out of the box, and the values to sweep."""

    script: str
    packages: tuple[str, ...]
    defaults: dict[str, Any]
    sweep: dict[str, tuple[Any, ...]]

    def settings(self) -> Iterator[dict[str, Any]]:
        """Every combination of the swept values."""
        for values in product(*self.sweep.values()):
            yield dict(zip(self.sweep, values, strict=True))


BATCHES = {"single": (8, 32), "multi": (4, 8, 16)}
"""Rows a step that are tried: rows of one question, and rows of all questions of an image."""

PRECISIONS = ("bf16", "bf16_weights")
"""Autocast over fp32 weights, and weights that are loaded in bf16."""

PEERS = {
    "trl": Peer(
        script="train_trl.py",
        packages=("trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "torch==2.14.1", "torchvision==0.29.1", "pillow"),
        defaults={"rows": "single", "batch": None, "precision": None, "checkpointing": None},
        sweep={"rows": ("single", "multi"), "precision": PRECISIONS, "checkpointing": (False, True)},
    ),
    "llamafactory": Peer(
        script="train_llamafactory.py",
        packages=("llamafactory==0.9.5", "pillow"),
        defaults={"rows": "single", "batch": None, "precision": None, "checkpointing": None},
        sweep={"rows": ("single", "multi"), "precision": PRECISIONS, "checkpointing": (False, True)},
    ),
    "seq2seq": Peer(
        script="train_seq2seq.py",
        packages=("transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.2", "torch==2.14.1", "torchvision==0.29.1", "pillow"),
        defaults={"rows": "single", "batch": None, "precision": None, "checkpointing": None},
        sweep={"rows": ("single",), "precision": PRECISIONS, "checkpointing": (False, True)},
    ),
}


def install(name: str, folder: Path) -> Path:
    """The Python of the peer's own environment, made where it is not there yet."""
    home, packages = folder / name, PEERS[name].packages
    python, stamp = home / "bin" / "python", home / ".installed"
    if not stamp.is_file() or stamp.read_text() != "\n".join(packages):
        print(f"installing {name} into {home}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages], check=True)
        stamp.write_text("\n".join(packages))
    return python
