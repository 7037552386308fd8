"""The range that training's tensors lie in.

Where blocks go, what comes back, and that results don't change.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.tensor_range import range_state
from tests.helpers.tiny_models import parsed, with_tune
from vlm_tune.api import sft
from vlm_tune.events import Event, TrainSteps
from vlm_tune.kernels.cpu import native
from vlm_tune.memory_plan import heap
from vlm_tune.memory_plan.heap import Range
from vlm_tune.resources import SMALLEST_BLOCK
from vlm_tune.train import allocator
from vlm_tune.train.allocator import (
    keep_freed_memory,
    open_range,
    return_freed_memory,
    shut_range,
)
from vlm_tune.train.out_of_memory import is_out_of_memory

needs_range = pytest.mark.skipif(native.compiler() is None, reason="wants a C++ compiler")
MB = 1 << 20
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def opened() -> Iterator[None]:
    """The range open, and shut again after a test."""
    gc.collect()
    assert open_range()
    yield
    shut_range()


@pytest.fixture
def no_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no compiler is."""
    compiled = native.library
    monkeypatch.setattr(
        native, "library", lambda name: None if name == "allocator" else compiled(name)
    )
    monkeypatch.setattr(allocator, "_library", None)


def block(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


@needs_range
def test_blocks_are_aligned_side_by_side_and_counted(opened: None) -> None:
    before = range_state()
    sizes = [SMALLEST_BLOCK, SMALLEST_BLOCK + 1, 100_000, 3 * MB + 7, 64 * MB]
    tensors = [block(size) for size in sizes]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
    after = range_state()
    assert after.blocks - before.blocks == len(sizes)
    assert after.live - before.live == sum(-(-size // 64) * 64 for size in sizes)
    small = block(SMALLEST_BLOCK - 1)
    assert range_state() == after and small.data_ptr() % 64 == 0
    del tensors
    assert (range_state().live, range_state().blocks) == (before.live, before.blocks)


@needs_range
def test_a_freed_block_is_the_next_of_its_size_and_neighbours_join(opened: None) -> None:
    first, second, third, last = (block(40 * MB) for _ in range(4))
    places = [first.data_ptr(), second.data_ptr(), third.data_ptr()]
    assert places == [places[0], places[0] + 40 * MB, places[0] + 80 * MB]
    del second
    second = block(40 * MB)
    assert second.data_ptr() == places[1]
    del first, third, second  # the middle one last: it joins both sides
    joined = block(120 * MB)
    assert joined.data_ptr() == places[0] < last.data_ptr()
    del joined
    part = block(10 * MB)
    assert part.data_ptr() == places[0]


@needs_range
def test_pages_stay_while_it_is_open_and_go_back_when_it_is_shut(opened: None) -> None:
    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    small = block(MB).fill_(7)
    tensor = block(256 * MB).fill_(1)
    del tensor
    before, full = faults(), resident()
    tensor = block(256 * MB).fill_(2)
    assert faults() - before < 1000  # of 65,536 pages
    del tensor
    shut_range()
    assert full - resident() > 250 * MB
    assert range_state().highest <= full and int(small.sum()) == 7 * MB


@needs_range
def test_tensors_outlive_the_time_that_it_is_open() -> None:
    """Whatever allocator is torch's at that moment, a block goes back to where it came from.

    oneDNN frees by the pointer alone.
    """
    outside, outside_dnn = block(MB).fill_(1), torch.ones(1024, 1024).to_mkldnn()
    assert open_range()
    before = range_state().live
    inside, inside_dnn = block(MB).fill_(2), torch.ones(1024, 1024).to_mkldnn()
    assert range_state().live - before >= MB + 4 * MB
    assert int(outside.sum()) == MB
    del outside, outside_dnn
    shut_range()
    assert int(inside.sum()) == 2 * MB and float(inside_dnn.to_dense().sum()) == MB
    state = range_state()
    later = block(8 * MB)
    assert range_state() == state
    del inside, inside_dnn, later
    assert range_state().live == before
    assert open_range()
    grown = torch.zeros(SMALLEST_BLOCK)
    grown.untyped_storage().resize_(4 * MB)
    grown.fill_(3)
    shut_range()
    grown.untyped_storage().resize_(8 * MB)
    assert float(grown.sum()) == 3 * SMALLEST_BLOCK


@needs_range
def test_threads_and_forks_share_it(opened: None) -> None:
    before, wrong = range_state(), []

    def work(seed: int) -> None:
        generator, blocks = torch.Generator().manual_seed(seed), []
        for round_ in range(300):
            size = int(torch.randint(SMALLEST_BLOCK, 40 * SMALLEST_BLOCK, (), generator=generator))
            blocks.append((block(size).fill_(seed), seed))
            if len(blocks) > 8:
                tensor, expected = blocks.pop(
                    int(torch.randint(len(blocks), (), generator=generator))
                )
                if not bool((tensor == expected).all()):
                    wrong.append((round_, seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    children = []
    for _ in range(5):  # while other threads are within it
        child = os.fork()
        if child == 0:
            os._exit(0 if block(MB).data_ptr() % 64 == 0 else 1)
        children.append(child)
    for thread in threads:
        thread.join()
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 5
    assert not wrong
    assert (range_state().live, range_state().blocks) == (before.live, before.blocks)


@needs_range
def test_what_no_memory_could_hold_is_refused_by_name(opened: None) -> None:
    with pytest.raises(RuntimeError) as raised:
        block(1 << 50)
    assert is_out_of_memory(raised.value)


@needs_range
def test_the_plan_s_range_puts_every_block_of_real_steps_where_the_allocator_does() -> None:
    """Four steps of a small network of different lengths, as torch's profiler recorded them."""
    command = [sys.executable, "-m", "tests.train.recorded_step"]
    recorded = json.loads(
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    )
    planned, places = Range(), []
    for place, size in recorded["events"]:
        if size > 0 and (taken := planned.taken(size)):
            places.append((place, planned.take(taken)))
        elif size < 0 and planned.taken(-size):
            planned.give(place)
    assert len(places) > 60
    assert [real for real, _ in places] == [simulated for _, simulated in places]
    assert planned.largest == recorded["highest"] > planned.fullest


@needs_range
def test_a_run_trains_in_the_range_and_shuts_it(tiny_recipe: Callable[..., str]) -> None:
    states = []

    def show(event: Event) -> None:
        if isinstance(event, TrainSteps):
            gc.collect()  # of objects that refer to one another, as earlier tests left them
            states.append(range_state())

    gc.collect()
    before = range_state()
    run = sft(
        parsed(
            with_tune(tiny_recipe("causal")),
            train__log_every=1,
            train__batch_size=8,
            evaluate__samples=0,
            data__validation=[],
        ),
        show=show,
    )
    assert len(states) == 4 and all(
        state.highest > max(before.highest, 10 * SMALLEST_BLOCK) for state in states
    )
    # From the second step on the optimizer's states are there: nothing is added to what stays.
    assert len({state.blocks for state in states[1:]}) == 1
    state = range_state()
    assert state.highest <= states[-1].highest
    after = block(MB)
    assert range_state() == state and len(after) == MB
    assert run.result


def test_results_are_the_same_with_and_without_it(
    tiny_recipe: Callable[..., str], request: pytest.FixtureRequest
) -> None:
    def trained(name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        losses = []

        def show(event: Event) -> None:
            if isinstance(event, TrainSteps):
                losses.append(event.loss)

        text = with_tune(tiny_recipe("causal", output=name, precision="bf16"))
        folder = sft(
            parsed(text, train__log_every=1, evaluate__samples=0, data__validation=[]), show=show
        ).folder
        files = sorted((folder / "model").rglob("*.safetensors"))
        return losses, {
            f"{path.name}:{key}": value for path in files for key, value in load_file(path).items()
        }

    with_range = trained("own")
    request.getfixturevalue("no_range")
    assert not open_range()
    losses, tensors = trained("malloc")
    assert losses == with_range[0] and len(losses) == 4
    assert tensors.keys() == with_range[1].keys() and len(tensors) > 4
    assert all(torch.equal(tensor, with_range[1][name]) for name, tensor in tensors.items())


@needs_range
def test_where_addresses_are_limited_it_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_library", None)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 46, before[1]))
    try:
        assert not open_range() and heap.allocator() == "malloc"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert heap.allocator() == "range"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="wants glibc")
def test_without_a_compiler_glibc_keeps_freed_memory(no_range: None) -> None:
    assert not open_range()
    assert keep_freed_memory()
    assert range_state().blocks == 0
    assert return_freed_memory()
