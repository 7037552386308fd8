"""Checkpoints: a model folder plus the state of optimizer, random numbers and data position, committed as one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlm_tune.errors import ModelError
from vlm_tune.model.store import commit_folder, is_whole
from vlm_tune.model.weights import read_safetensors, write_safetensors


@dataclass
class Progress:
    """Where a stage is: optimizer steps done, and by what the best checkpoint was chosen."""

    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_score: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    ranks: int = 0
    """Processes that the batches are planned for: those that the run began with."""
    unlogged: tuple[float, int] = (0.0, 0)
    """Summed loss and its count since the last log line."""


def stage_folder(run: Path, stage: int, name: str) -> Path:
    """A stage's folder in a run."""
    return run / "stages" / f"{stage + 1}-{name}"


def step_folder(stage: Path, step: int) -> Path:
    """A checkpoint's folder in a stage."""
    return stage / "checkpoints" / f"step-{step:07d}"


def checkpoints(stage: Path) -> list[Path]:
    """A stage's checkpoint folders, by step."""
    return sorted((stage / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name.removeprefix("step-")))


def save_checkpoint(
    folder: Path, write: Callable[[Path], None], optimizer: dict[str, torch.Tensor], progress: Progress, recipe_text: str
) -> None:
    """Writes what `capture_model` gave, optimizer, random state, progress and recipe to `folder`, whole or not at all."""

    def everything(target: Path) -> None:
        write(target)
        write_safetensors(optimizer, target / "trainer" / "optimizer.safetensors")
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        write_safetensors(random, target / "trainer" / "random.safetensors")
        (target / "trainer" / "progress.json").write_text(json.dumps(asdict(progress), indent=1))
        (target / "recipe.yaml").write_text(recipe_text)

    commit_folder(folder, everything)


def read_optimizer(folder: Path, names: list[list[str]]) -> dict[str, torch.Tensor]:
    """A checkpoint's optimizer tensors as `<parameter>|<key>`. Raises `ModelError` if they are another model's."""
    state = read_safetensors(folder / "trainer" / "optimizer.safetensors")
    known = {name for group in names for name in group}
    strangers = sorted({key.rpartition("|")[0] for key in state} - known)
    if strangers:
        raise ModelError(f"{folder}: its optimizer state is of other parameters: {', '.join(strangers[:4])}")
    return state


def load_random(folder: Path) -> None:
    """Puts a checkpoint's random state back."""
    random = read_safetensors(folder / "trainer" / "random.safetensors")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])


def read_progress(folder: Path) -> Progress:
    """The progress saved in a checkpoint."""
    return Progress(**json.loads((folder / "trainer" / "progress.json").read_text()))


def last_checkpoint(run: Path, stages: list[str]) -> tuple[Path, list[Path]] | None:
    """The newest whole checkpoint of the furthest stage, and newer ones that are damaged; None where there is none."""
    damaged: list[Path] = []
    for number in reversed(range(len(stages))):
        for checkpoint in reversed(checkpoints(stage_folder(run, number, stages[number]))):
            if is_whole(checkpoint):
                return checkpoint, damaged
            damaged.append(checkpoint)
    return None


def rotate(stage: Path, keep: int, best_step: int | None) -> None:
    """Removes the stage's oldest checkpoints but the last `keep` and the best; never the last whole one."""
    found = checkpoints(stage)
    kept = set(found[-keep:]) | ({step_folder(stage, best_step)} if best_step is not None else set())
    if not any(is_whole(checkpoint) for checkpoint in kept):
        return
    for checkpoint in found:
        if checkpoint not in kept:
            shutil.rmtree(checkpoint)
