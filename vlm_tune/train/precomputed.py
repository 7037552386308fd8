"""Computes the reference model's log-probabilities of all answers before training, and stores them.

Other runs on the same rows from the same weights read them from a cache; a resumed stage reads them
from its own folder.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from vlm_tune.config.recipe import Recipe
from vlm_tune.data.batching.collate import Fetch, collate
from vlm_tune.data.batching.loader import PreparedFeed
from vlm_tune.data.batching.references import StoredReferences
from vlm_tune.data.packing import with_mismatched
from vlm_tune.data.prepare.dataset import Group
from vlm_tune.data.types import Conversation
from vlm_tune.errors import TrainingError
from vlm_tune.events import Note, StageReport
from vlm_tune.model.language.base import AnswerLogprobs
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.quoting import reason_of
from vlm_tune.resources import cache_folder, cache_room, check_cache

NAME = "reference.npz"
"""File of a stage's folder with the stored log-probabilities."""


def validation_units(
    model: VisionLanguageNetwork, rows: Sequence[Conversation], *, mismatches: bool
) -> list[Group]:
    """The examples of each validation row, with `mismatches` beside an answer of the row before."""
    units = [model.processor.examples(row) for row in rows]
    if not mismatches:
        return units
    layout = model.processor.spec.layout
    return [with_mismatched(unit, units[place - 1], layout) for place, unit in enumerate(units)]


@dataclass(frozen=True)
class References:
    """The stored log-probabilities of a stage's training units and validation rows.

    `rows` is a hash of these, by whose places they are stored.
    """

    train: StoredReferences
    validation: StoredReferences
    rows: str

    def write(self, path: Path) -> None:
        """Writes the file under a temporary name first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        arrays = {
            f"{part}_{name}": getattr(getattr(self, part), name)
            for part in ("train", "validation")
            for name in ("logprobs", "starts")
        }
        with temporary.open("wb") as file:
            np.savez(file, rows=np.array(self.rows), **arrays)
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> References:
        """Reads a written file. Raises `OSError`, `ValueError` or `KeyError`."""
        try:
            with np.load(path) as arrays:
                return cls(
                    *(
                        StoredReferences(arrays[f"{part}_logprobs"], arrays[f"{part}_starts"])
                        for part in ("train", "validation")
                    ),
                    rows=str(arrays["rows"]),
                )
        except zipfile.BadZipFile as error:
            raise ValueError(str(error)) from None


def references(
    model: VisionLanguageNetwork,
    recipe: Recipe,
    feed: PreparedFeed,
    validation: Sequence[Group],
    fetch: Fetch,
    accelerator: Accelerator,
    stage: Path,
    report: StageReport,
    *,
    validation_cached: bool,
    resumed: bool,
) -> References:
    """The log-probabilities of a stage's answers under the model before its training.

    Args:
        model: The model; before training unless `resumed`.
        recipe: The stage's recipe.
        feed: The training rows.
        validation: The examples of each validation row.
        fetch: Returns pixels, or features, of the validation images.
        accelerator: Joins the processes, each of which computes a share.
        stage: The stage's folder.
        report: Called with a note on where they are from.
        validation_cached: Whether `fetch` returns features.
        resumed: Whether the stage continues from a checkpoint.

    Raises:
        TrainingError: The file of a resumed stage is lost, damaged or of other rows.
    """
    path = stage / NAME
    rows = _rows_key(feed, validation)
    if resumed:
        return _own(path, rows)
    cached = cache_folder("references") / f"{_key(model, recipe, rows)}.npz"
    stored: References | None = None
    if accelerator.is_main_process:
        check_cache(cached.parent)
        with contextlib.suppress(OSError, ValueError, KeyError):
            stored = References.read(cached)
    # Rank 0 decides for all: the disks of nodes differ.
    stored = broadcast_object_list([stored])[0]
    where = "those of an earlier run" if stored else "stored"
    if stored is None:
        units = [feed.unit(number) for number in range(len(feed.prepared))]
        compute = partial(_computed, model, recipe, accelerator)
        stored = References(
            compute(units, feed.fetch, cached=feed.cached),
            compute(validation, fetch, cached=validation_cached),
            rows,
        )
        if accelerator.is_main_process:
            with cache_room(cached.parent):
                stored.write(cached)
    if accelerator.is_main_process:
        stored.write(path)
    report(Note(f"the reference model's log-probabilities of all answers are {where}"))
    return stored


def _own(path: Path, rows: str) -> References:
    """Reads a resumed stage's file.

    Raises `TrainingError` if it is lost or damaged, or not of the rows with this hash.
    """
    try:
        stored = References.read(path)
        if stored.rows == rows:
            return stored
        fault = "it is of other rows than data and evaluate.limit give now"
    except (OSError, ValueError, KeyError) as error:
        fault = reason_of(error)
    raise TrainingError(
        f"{path}: {fault}. It holds the log-probabilities of the answers under the model before "
        "this stage (objective.reference: precomputed): start the run again with --overwrite"
    )


@torch.no_grad()
def _computed(
    model: VisionLanguageNetwork,
    recipe: Recipe,
    accelerator: Accelerator,
    units: Sequence[Group],
    fetch: Fetch,
    *,
    cached: bool,
) -> StoredReferences:
    """The log-probabilities of units' answers; each process computes a share of the units."""
    sizes = [sum(example.answer_numbers for example in unit) for unit in units]
    starts = np.cumsum([0, *sizes])
    logprobs = np.zeros(starts[-1], dtype=np.float32)
    # Units of similar length, so that there is little padding.
    order = sorted(range(len(units)), key=lambda place: len(units[place][0].input_ids))
    mine = order[accelerator.process_index :: accelerator.num_processes]
    size = recipe.train.batch_size
    with model.evaluating(), accelerator.autocast():
        for start in range(0, len(mine), size):
            places = mine[start : start + size]
            examples = [example for place in places for example in units[place]]
            batch = collate(examples, model.processor.spec, fetch=fetch, cached=cached)
            answers = model(batch.to(accelerator.device), by_answer=True)
            assert isinstance(answers, AnswerLogprobs)
            ends = np.cumsum([sizes[place] for place in places])[:-1]
            for place, values in zip(
                places, np.split(answers.sums.float().cpu().numpy(), ends), strict=True
            ):
                logprobs[starts[place] : starts[place + 1]] = values
    # Each process has zeros for the others' units.
    whole = np.stack(gather_object([logprobs])).sum(axis=0)
    return StoredReferences(whole, starts)


def _rows_key(feed: PreparedFeed, validation: Sequence[Group]) -> str:
    """A hash of the training and validation rows, in their order."""
    state = xxhash.xxh3_128(repr((feed.prepared.folder.name, feed.mismatches)).encode())
    for unit in validation:
        for example in unit:
            state.update(example.id.encode())
            for array in (example.input_ids, example.labels):
                state.update(array.tobytes())
            for item in example.media:
                state.update(item.name.encode())
    return state.hexdigest()


def _key(model: VisionLanguageNetwork, recipe: Recipe, rows: str) -> str:
    """A hash of all that the log-probabilities depend on: the rows, and every weight."""
    described = (rows, recipe.train.precision, model.config.model_dump_json())
    state = xxhash.xxh3_128(repr(described).encode())
    for name, tensor in model.state_dict().items():
        state.update(name.encode())
        if isinstance(tensor, torch.Tensor):
            whole = tensor.detach().cpu().contiguous().flatten()
            state.update(memoryview(whole.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return state.hexdigest()
