"""The tower over many images: batches by device, autocast by device, memory that does not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm_tune.config.towers import TransformersTower
from vlm_tune.model.tower_pass import (
    batch_size,
    decoding_threads,
    run_tower,
    stored_dtype,
)
from vlm_tune.model.vision.base import VisionTower


class Blocks(VisionTower):
    """A tower of patches, a norm and a linear layer, as those of transformers begin and end."""

    def __init__(self, most: int = 1000, dtype: torch.dtype = torch.float32) -> None:
        config = TransformersTower(kind="transformers", name="none")
        super().__init__(config, 8, (0.5,) * 3, (0.5,) * 3)
        self.patches = nn.Conv2d(3, 4, 4, 4, dtype=dtype)
        self.norm = nn.LayerNorm(4, dtype=dtype)
        self.linear = nn.Linear(4, 4, dtype=dtype)
        self.most = most
        self.batches: list[int] = []

    def maps(self, pixels: torch.Tensor) -> Any:
        self.batches.append(len(pixels))
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError("no room")
        patches = self.norm(self.patches(pixels).flatten(2).transpose(1, 2))
        patches = patches + self.linear(patches)
        return [patches.transpose(1, 2).unflatten(2, (2, 2))], None


def test_a_batch_that_does_not_fit_is_halved() -> None:
    tower = Blocks(most=2)
    pixels = torch.randint(0, 255, (7, 3, 8, 8), dtype=torch.uint8)
    features = run_tower(tower, pixels, torch.float32)
    assert tower.batches == [7, 4, 2, 2, 3, 2, 1]
    tower.most = 7
    assert torch.allclose(features, run_tower(tower, pixels, torch.float32), atol=1e-6)
    tower.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        run_tower(tower, pixels[:1], torch.float32)


def test_on_cuda_features_are_those_of_a_step_under_its_autocast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There norms run in fp32 under autocast, so that a step's features are wider than the tower.

    A pass without autocast would have rounded every layer.
    """
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        tower = Blocks(dtype=torch.bfloat16)
        pixels = torch.empty(2, 3, 8, 8, dtype=torch.uint8)
        assert run_tower(tower, pixels, torch.float32).dtype == torch.bfloat16
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        features = run_tower(tower, pixels, torch.bfloat16)
    assert features.device.type == "cuda" and features.dtype == torch.float32
    # A linear layer of the connector rounds them to what is stored.
    assert stored_dtype(tower, torch.bfloat16) == torch.bfloat16
    assert stored_dtype(Blocks(), torch.float32) == torch.float32


def test_batches_suit_the_device_and_threads_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [batch_size((3, size, size), cpu) for size in (64, 336)] == [64, 64]
    assert [batch_size((3, size, size), cuda) for size in (224, 336, 4000)] == [256, 113, 8]
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(32)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert decoding_threads() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert decoding_threads() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert decoding_threads() == 1
