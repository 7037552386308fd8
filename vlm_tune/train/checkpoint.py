"""Checkpoints: a model folder plus optimizer, random and data state, written atomically."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from vlm_tune.errors import ModelError, TrainingError
from vlm_tune.evaluation.registry import lower_is_better
from vlm_tune.model.checkpoint import capture_model
from vlm_tune.model.committed_folders import commit_folder, is_whole, remove_folder
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import is_sharded, read_safetensors, write_safetensors
from vlm_tune.quoting import reason_of

SCALER = "scaler.safetensors"
"""File with the state of the fp16 gradient scaler; only checkpoints of fp16 runs have it."""


@dataclass
class Progress:
    """The state of a stage: optimizer steps done, position in the data, best checkpoint so far."""

    stage: int = 0
    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    """Steps of this epoch since its present plan began."""
    rows: int = 0
    """With streaming: rows read before the present plan began."""
    cut: dict[str, Any] = field(default_factory=dict)
    """The settings that the plan depends on; if they change, the rest of the epoch is replanned."""
    origin: tuple[int, float] = (0, 0.0)
    """The step at which the present plan began, and the share of the schedule done by then."""
    seconds: float = 0.0
    best_step: int | None = None
    best_score: float | None = None
    best_by: str = "exact_match"
    """The metric, or `loss`, that the best score is of."""
    history: list[dict[str, Any]] = field(default_factory=list)
    unlogged: tuple[float, int] = (0.0, 0)
    """Summed loss and its count since the last log line."""
    unlogged_metrics: dict[str, list[float]] = field(default_factory=dict)
    """Sums of the objective's figures since then, and their numbers of items."""
    unscored: bool = False
    """Whether an evaluation that was due at this step was cut short."""
    processes: int = 1
    """Number of processes that trained together."""
    ranks: int = 0
    """Number of processes that the batches are planned for: that of the run's start."""
    cached: bool | None = None
    """Whether the tower's features are cached, as decided when the stage began.

    None where the recipe decides it.
    """


def stage_folder(run: Path, stage: int, name: str) -> Path:
    """The folder of a stage in a run."""
    return run / "stages" / f"{stage + 1}-{name}"


def step_folder(stage: Path, step: int) -> Path:
    """The folder of a checkpoint in a stage."""
    return stage / "checkpoints" / f"step-{step:07d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(stage: Path) -> list[Path]:
    """The checkpoint folders of a stage, sorted by step."""
    return sorted((stage / "checkpoints").glob("step-*"), key=step_of)


# --- writing -------------------------------------------------------------------------------------


def capture_checkpoint(
    model: VisionLanguageNetwork,
    optimizer: Mapping[str, torch.Tensor],
    scaler: Mapping[str, torch.Tensor],
    progress: Progress,
    recipe_text: str,
    random_states: Sequence[Mapping[str, torch.Tensor]],
    drawn: Mapping[str, np.ndarray],
) -> Callable[[Path], None]:
    """Captures the training state as it is now and returns a function that writes it to a folder.

    The function may run while training continues: what trains is copied to CPU memory, frozen
    weights are not. With sharded weights every process must call `capture_checkpoint`, and rank 0
    may write.

    Args:
        model: The model in training.
        optimizer: Optimizer tensors as `<parameter>|<key>`.
        scaler: State of the fp16 gradient scaler, empty where there is none.
        progress: The state of the stage.
        recipe_text: The recipe as YAML.
        random_states: One random state per process, by rank.
        drawn: State of the feed that it needs to continue in the middle of an epoch.

    Returns:
        A function that takes the folder to write to.
    """
    copies = _Copies(model)
    write_model = capture_model(model, copies)
    state = copies(optimizer)
    random_state = {
        f"{rank}.{key}": value
        for rank, state_of_rank in enumerate(random_states)
        for key, value in state_of_rank.items()
    }
    progress_json = json.dumps(asdict(progress), indent=1)

    def write(folder: Path) -> None:
        write_model(folder)
        write_safetensors(state, folder / "trainer" / "optimizer.safetensors")
        if scaler:
            write_safetensors(scaler, folder / "trainer" / SCALER)
        write_safetensors(random_state, folder / "trainer" / "random.safetensors")
        write_safetensors(
            {key: torch.from_numpy(_small(value)) for key, value in drawn.items()},
            folder / "trainer" / "epoch.safetensors",
        )
        (folder / "trainer" / "progress.json").write_text(progress_json)
        (folder / "recipe.yaml").write_text(recipe_text)

    return write


def _small(counts: np.ndarray) -> np.ndarray:
    """The counts in one byte each where they fit."""
    return counts.astype(np.uint8) if counts.max(initial=0) < 256 else counts


class _Copies:
    """Copies tensors to the CPU, but not the model's frozen parameters.

    Tensors that share memory share their copy too.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        parameters = [value for value in model.parameters() if not is_sharded(value)]
        trained = {value.data_ptr() for value in parameters if value.requires_grad}
        self._frozen = {value.data_ptr() for value in parameters} - trained
        self._copies: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        """By address and layout: the tensor, so that its address is not reused, and its copy."""

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: self._copy(value.detach()) for name, value in tensors.items()}

    def _copy(self, value: torch.Tensor) -> torch.Tensor:
        if value.data_ptr() in self._frozen:
            return value
        key = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if not value.numel() or key not in self._copies:
            self._copies[key] = value, value.to("cpu", copy=True).contiguous()
        return self._copies[key][1]


class CheckpointWriter:
    """Writes a stage's checkpoints one at a time, in a background thread if `background`.

    If one fails, those before it stay as they were.
    """

    def __init__(self, stage: Path, keep: int, *, background: bool) -> None:
        self.stage = stage
        self.keep = keep
        self.background = background
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, write: Callable[[Path], None], best_step: int | None) -> None:
        """Starts to write the checkpoint of a step, after the one before is complete.

        Raises `TrainingError` as `wait`, if that one could not be written.
        """
        self.wait()
        if self.background:
            self._pending = self._thread.submit(self._write, step, write, best_step)
            return
        written: Future[None] = Future()
        try:
            self._write(step, write, best_step)
        except TrainingError as error:
            written.set_exception(error)  # which all ranks learn of when they meet
        else:
            written.set_result(None)
        self._pending = written

    def failed(self) -> bool:
        """Whether the last checkpoint could not be written."""
        return (
            self._pending is not None
            and self._pending.done()
            and self._pending.exception() is not None
        )

    def settle(self) -> None:
        """Waits until all is written or has failed, as `failed` then says."""
        if self._pending is not None:
            wait([self._pending])

    def wait(self) -> None:
        """Waits until all is written. Raises `TrainingError` if that failed."""
        pending = self._pending
        self._pending = None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the write under way without reporting its error."""
        self._thread.shutdown()

    def _write(self, step: int, write: Callable[[Path], None], best_step: int | None) -> None:
        folder = step_folder(self.stage, step)
        try:
            commit_folder(folder, write)
            rotate(self.stage, self.keep, best_step, step)
        except (OSError, SafetensorError, MemoryError) as error:
            older = [path.name for path in checkpoints(self.stage)]
            remaining = (
                f"kept: {', '.join(older)}; --resume continues from there"
                if older
                else "there is none before it"
            )
            raise TrainingError(
                f"the checkpoint {folder} could not be written ({reason_of(error)}); {remaining}"
            ) from error


# --- contents ------------------------------------------------------------------------------------


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of this process's random number generators: torch's, numpy's and Python's.

    Of GPUs only `device`, the one that the process trains on, is included.
    """
    _, keys, place, gaussian, cached = np.random.get_state(legacy=True)
    version, words, following = random.getstate()
    state = {
        "cpu": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.array([*keys, place, gaussian], dtype=np.int64)),
        "numpy_gaussian": torch.tensor(cached, dtype=torch.float64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gaussian": torch.tensor(
            [] if following is None else [following], dtype=torch.float64
        ),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def load_random(folder: Path, rank: int, device: torch.device) -> None:
    """Restores the random state of rank `rank`, which trains on `device`.

    Does nothing if the checkpoint has none.
    """
    saved = read_safetensors(folder / "trainer" / "random.safetensors")
    states = {
        name.removeprefix(f"{rank}."): value
        for name, value in saved.items()
        if name.startswith(f"{rank}.")
    }
    if not states:
        return
    torch.set_rng_state(states["cpu"])
    *keys, place, gaussian = states["numpy"].tolist()
    np.random.set_state(
        (
            "MT19937",
            np.array(keys, dtype=np.uint32),
            place,
            gaussian,
            states["numpy_gaussian"].item(),
        )
    )
    version, *words = states["python"].tolist()
    random.setstate((version, tuple(words), next(iter(states["python_gaussian"].tolist()), None)))
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def read_drawn(folder: Path) -> dict[str, np.ndarray]:
    """The feed's saved state: how often each unit of the epoch was drawn."""
    return {
        key: value.numpy().astype(np.int64)
        for key, value in read_safetensors(folder / "trainer" / "epoch.safetensors").items()
    }


def read_optimizer(folder: Path, names: list[list[str]]) -> dict[str, torch.Tensor]:
    """The optimizer tensors of a checkpoint, as `<parameter>|<key>`.

    Raises `ModelError` if they belong to parameters that are not in `names`.
    """
    state = read_safetensors(folder / "trainer" / "optimizer.safetensors")
    known = {name for group in names for name in group}
    strangers = sorted({key.rpartition("|")[0] for key in state} - known)
    if strangers:
        raise ModelError(
            f"{folder}: its optimizer state is of other parameters: {', '.join(strangers[:4])}"
        )
    return state


def read_scaler(folder: Path) -> dict[str, torch.Tensor]:
    """The gradient scaler's state in a checkpoint; empty where it has none."""
    path = folder / "trainer" / SCALER
    return read_safetensors(path) if path.is_file() else {}


# --- listing and rotation ------------------------------------------------------------------------


def read_progress(folder: Path) -> Progress:
    """The progress saved in a checkpoint."""
    return Progress(**json.loads((folder / "trainer" / "progress.json").read_text()))


def last_checkpoint(run: Path, stages: list[str]) -> tuple[Path, list[Path]] | None:
    """The newest whole checkpoint of the furthest stage, and the newer ones that are damaged.

    None where no checkpoint is whole.
    """
    damaged: list[Path] = []
    for number in reversed(range(len(stages))):
        for checkpoint in reversed(checkpoints(stage_folder(run, number, stages[number]))):
            if is_whole(checkpoint):
                return checkpoint, damaged
            damaged.append(checkpoint)
    return None


def best_checkpoint(
    stage: Path, progress: Progress
) -> tuple[tuple[Path, float] | None, list[Path]]:
    """The best-scored whole checkpoint with its score, and better-scored ones that are damaged.

    Of equal scores the later step wins, and those by another metric do not compete. The last step
    counts as whole: its weights are still in memory.
    """
    damaged: list[Path] = []
    sign = -1 if lower_is_better(progress.best_by) else 1
    scored = [
        (sign * entry["score"], entry["step"])
        for entry in progress.history
        if math.isfinite(entry["loss"] or 0.0)
        and entry.get("best_by") == progress.best_by
        and entry["score"] is not None
    ]
    for signed, step in sorted(scored, reverse=True):
        folder = step_folder(stage, step)
        if step == progress.step or (folder.is_dir() and is_whole(folder)):
            return (folder, sign * signed), damaged
        if folder.is_dir():
            damaged.append(folder)
    return None, damaged


def rotate(stage: Path, keep: int, best_step: int | None, step: int) -> None:
    """Removes old checkpoints of a stage, up to `step`, but the last `keep` and the best.

    Removes nothing if none of those that stay is whole.
    """
    candidates = [folder for folder in checkpoints(stage) if step_of(folder) <= step]
    retained = candidates[-keep:] + (
        [step_folder(stage, best_step)] if best_step is not None else []
    )
    if not any(is_whole(checkpoint) for checkpoint in reversed(retained)):
        return
    for checkpoint in candidates:
        if checkpoint not in retained:
            remove_folder(checkpoint)
