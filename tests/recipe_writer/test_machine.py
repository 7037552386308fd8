"""The machine that a recipe is written for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vlm_tune.recipe_writer import machine
from vlm_tune.recipe_writer.machine import this_machine


def test_a_cpu_has_the_precision_that_it_multiplies_fastest_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    here = this_machine()
    assert not here.gpu and not here.hub and here.memory > 0 and here.cores > 0
    assert "can't be reached" in here.description
    rates = {"bf16": 1.0, "fp32": 4.0}
    monkeypatch.setattr(
        machine, "measure", lambda precision, dtype: SimpleNamespace(rate=rates[precision])
    )
    assert here.precision == ("fp32", "this CPU multiplies matrices 4.0 times as fast as in bf16")


@pytest.mark.parametrize(("capability", "precision"), [("7.5", "fp16"), ("9.0", "bf16")])
def test_a_gpu_leaves_room_for_holes(
    capability: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        get_device_properties=lambda number: SimpleNamespace(total_memory=100_000_000_000),
    )
    monkeypatch.setattr(machine, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(machine, "gpu", lambda number: {"name": "H", "capability": capability})
    here = this_machine()
    assert here.gpu and here.memory == 92_000_000_000 and here.precision[0] == precision
