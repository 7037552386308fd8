"""Batches on their way to a GPU: a step ahead, from pinned memory, by as many workers as fit."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.helpers.counted_device import CUDA, counted_device
from vlm_tune.data.batch import Batch
from vlm_tune.data.batching.collate import collate
from vlm_tune.data.types import Example, InputSpec, Media
from vlm_tune.errors import DataError
from vlm_tune.train.prefetch import on_device
from vlm_tune.train.stage_data import loader_workers

CPU = torch.device("cpu")
SPEC = InputSpec(1, "causal", 99, 0, 1)


def batch(name: str) -> Batch:
    """Two rows with a slot and an image each; the first has two supervised tokens."""
    examples = [
        Example(
            f"{name}{row}",
            np.arange(3, dtype=np.int32),
            np.array([-100, 5 - 105 * row, 7], dtype=np.int32),
            np.array([True, False, False]),
            (Media(name.encode()),),
        )
        for row in range(2)
    ]
    return collate(examples, SPEC, fetch=lambda media: torch.zeros(3, 2, 2, dtype=torch.uint8))


def windows(read: list[str], last: Exception | None = None) -> Iterator[list[Batch]]:
    for name in "ab":
        read.append(name)
        yield [batch(name)]
    if last is not None:
        raise last


def test_a_gpu_gets_the_next_step_before_a_step_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[str] = []
    first = next(on_device(windows(read), CPU))
    assert read == ["a"] and first[0].input_ids.device == CPU
    read.clear()
    with counted_device(monkeypatch) as device:
        steps = on_device(windows(read), CUDA)
        (first,) = next(steps)
        assert read == ["a", "b"] and first.input_ids.device == CUDA
        assert [each.ids for (each,) in steps] == [["b0", "b1"]]
    assert not device.waits


def test_an_error_is_raised_when_its_step_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    with counted_device(monkeypatch):
        steps = on_device(windows([], DataError("row 3")), CUDA)
        assert [next(steps)[0].ids[0] for _ in "ab"] == ["a0", "b0"]
        with pytest.raises(DataError, match="row 3"):
            next(steps)


def test_the_host_knows_a_moved_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it asks of a batch is not read from the device; workers pass all of it on."""
    original = pickle.loads(pickle.dumps(batch("a")))
    figures = ("supervised", "tokens", "branched", "longest", "most_slots")
    expected = [getattr(original, name) for name in figures]
    assert expected == [3, 6, False, 3, 1]
    assert original.slots.tolist() == [0, 3] and original.supervised_at.tolist() == [1, 2, 5]
    assert original.targets.tolist() == [5, 7, 7]
    with counted_device(monkeypatch) as device:
        moved = original.pin_memory().to(CUDA)
        assert [getattr(moved, name) for name in figures] == expected
        assert moved.on_host.pixels is None and moved.on_host.labels.device == CPU
    assert not device.waits


def test_loader_workers_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = [SimpleNamespace(total=64 << 30)]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(16))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shared[-1])

    def count(setting: int | str, device: torch.device = CUDA, *, cached: bool = False) -> int:
        return loader_workers(setting, device, cached=cached)

    assert count("auto", CPU) == 0 and count(3, CPU) == 3 and count(0) == 0
    assert count("auto") == 8 and count("auto", cached=True) == 2
    for ranks, workers in ((4, 3), (16, 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert count("auto") == workers
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    shared.append(SimpleNamespace(total=64 << 20))  # as docker gives a container
    assert count("auto") == 0 and count(3) == 3
