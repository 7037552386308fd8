"""Weights moved out of memory, or left mapped: the same values, read when they are wanted."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from vlm_tune.memory_plan.plan import resident
from vlm_tune.model.weights import (
    own_memory,
    page_out,
    read_safetensors,
    release_mapped,
    write_safetensors,
)
from vlm_tune.train.allocator import return_freed_memory, trim_heap

MB = 1 << 20


def frozen(dtype: torch.dtype = torch.float32, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 3, bias=False)
    )
    return module.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_paged_out_have_the_same_values(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    module = frozen(dtype)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    names = [id(parameter) for parameter in module.parameters()]
    assert page_out(module, tmp_path) >= sum(
        value.numel() * value.element_size() for value in before.values()
    )
    assert [id(parameter) for parameter in module.parameters()] == names
    for name, value in module.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, before[name]), name
    assert not list(tmp_path.iterdir())  # the file has no name


def resident_bytes(tensor: torch.Tensor) -> int:
    """Bytes in memory of the mapping that a tensor lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= tensor.data_ptr() < int(match[2], 16)
        elif inside and line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("the tensor lies in no mapping")


def test_paged_out_weights_take_no_memory_till_they_are_read(tmp_path: Path) -> None:
    return_freed_memory()  # tests before this one may have let malloc keep what is freed
    module = nn.Linear(4096, 4096, bias=False).requires_grad_(False)  # 64 MB
    total = module.weight.double().sum()
    before = resident()
    page_out(module, tmp_path)
    trim_heap()  # also of a block that malloc took from what it had
    assert resident() < before - 50 * MB
    assert resident_bytes(module.weight) < MB
    assert module.weight.double().sum() == total
    assert resident_bytes(module.weight) >= 64 * MB


def test_trained_weights_stay_and_others_can_be_written_copied_and_trained(tmp_path: Path) -> None:
    module = frozen()
    module[2].weight.requires_grad_()
    places = [parameter.data_ptr() for parameter in module.parameters()]
    page_out(module, tmp_path)
    moved = [
        parameter.data_ptr() != place
        for parameter, place in zip(module.parameters(), places, strict=True)
    ]
    assert moved == [True] * 4 + [False]
    twin = copy.deepcopy(module)
    with torch.no_grad():
        module[0].weight.zero_()
    assert twin[0].weight.abs().sum() > 0
    twin.requires_grad_()
    weight = twin[0].weight.clone()
    twin(torch.ones(2, 16)).sum().backward()
    with torch.no_grad():
        twin[0].weight -= 0.1 * twin[0].weight.grad
    assert not torch.equal(twin[0].weight, weight)
    assert module[0].weight.abs().sum() == 0


def test_a_module_that_trains_whole_and_an_empty_one_have_nothing_to_page_out(
    tmp_path: Path,
) -> None:
    assert page_out(frozen().requires_grad_(True), tmp_path) == 0
    assert page_out(nn.Identity(), tmp_path) == 0


def test_where_the_file_can_not_be_written_nothing_changes(tmp_path: Path) -> None:
    module = frozen()
    places = [parameter.data_ptr() for parameter in module.parameters()]
    with pytest.raises(OSError, match="No such file"):
        page_out(module, tmp_path / "missing")
    assert [parameter.data_ptr() for parameter in module.parameters()] == places


def mapped(folder: Path) -> nn.Module:
    """Two layers of 4 MB, mapped from a safetensors file."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(2)))
    write_safetensors(module.state_dict(), folder / "weights.safetensors")
    tensors = read_safetensors(folder / "weights.safetensors")
    module.load_state_dict(tensors, assign=True)
    return module


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small modules are released too."""
    monkeypatch.setattr("vlm_tune.model.weights.RELEASED", MB)


@pytest.mark.usefixtures("small")
def test_mapped_weights_that_were_read_are_released_and_read_again(tmp_path: Path) -> None:
    module = mapped(tmp_path)
    total = sum(parameter.double().sum() for parameter in module.parameters())
    assert resident_bytes(module[0].weight) >= 4 * MB
    release_mapped(module)
    assert resident_bytes(module[0].weight) == 0
    assert sum(parameter.double().sum() for parameter in module.parameters()) == total


@pytest.mark.usefixtures("small")
def test_a_mapping_that_was_written_is_not_released(tmp_path: Path) -> None:
    module = mapped(tmp_path)
    with torch.no_grad():
        module[0].weight[5, 7] = 3.0
    release_mapped(module)
    assert module[0].weight[5, 7] == 3.0


@pytest.mark.usefixtures("small")
def test_weights_in_other_memory_and_other_modules_mappings_stay(tmp_path: Path) -> None:
    module = mapped(tmp_path)
    other = frozen(width=1024)
    assert module[0].weight.double().sum() != 0
    before = resident_bytes(module[0].weight)
    values = [parameter.clone() for parameter in other.parameters()]
    release_mapped(other)
    assert resident_bytes(module[0].weight) == before
    assert all(map(torch.equal, other.parameters(), values))


@pytest.mark.usefixtures("small")
def test_copied_weights_leave_their_file(tmp_path: Path) -> None:
    module = mapped(tmp_path)
    file = str(tmp_path / "weights.safetensors")
    values = [parameter.clone() for parameter in module.parameters()]
    assert file in Path("/proc/self/maps").read_text()
    own_memory(module)
    assert file not in Path("/proc/self/maps").read_text()
    assert all(map(torch.equal, module.parameters(), values))
