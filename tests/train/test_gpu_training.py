"""Training on a GPU, as far as a machine without one shows: devices, fp16, determinism, figures."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.cuda import nccl

import vlm_tune
from tests.helpers.forked_runs import ended, start
from tests.helpers.tiny_models import (
    LORA_TUNE,
    assert_same_bits,
    built,
    interrupted,
    parsed,
    stage_loop,
    tensors_of,
    with_llm,
    with_tune,
)
from vlm_tune import system
from vlm_tune.api import sft
from vlm_tune.config.engine import AutoEngine, FsdpEngine
from vlm_tune.errors import RecipeError, TrainingError
from vlm_tune.events import Acceleration, Event, Note, StageEvent
from vlm_tune.memory_plan import machine
from vlm_tune.train import accelerator as accelerators
from vlm_tune.train import environment as environments
from vlm_tune.train import gpu_memory, stage
from vlm_tune.train.accelerator import BACKENDS, accelerator_of
from vlm_tune.train.checkpoint import load_random, random_state, step_folder
from vlm_tune.train.deterministic import WORKSPACE, determinism, nondeterministic
from vlm_tune.train.engines import registry
from vlm_tune.train.engines.base import Engine
from vlm_tune.train.engines.fsdp import Fsdp
from vlm_tune.train.nonfinite import NonFinitePolicy

CUDA = torch.device("cuda", 1)
LORA = ", r: 4, lora_alpha: 8, target_modules: all-linear"


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the first precision of a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


class Scaling(Accelerator):
    """On a CPU, with the gradient scaler that accelerate has on a GPU in fp16."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)


def scaling_engine() -> tuple[Engine, nn.Linear]:
    """An engine with a gradient scaler, and the layer that it trains."""
    engine = Engine(Scaling(cpu=True, mixed_precision="fp16"))
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    engine.model, engine.optimizer = engine.accelerator.prepare(layer, optimizer)
    engine.rates, engine.max_grad_norm = [1e-3], 1.0
    return engine, layer


# --- the optimizer's state ------------------------------------------------------------------------


def test_optimizer_state_is_loaded_to_where_torch_itself_loads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By device: a fused step over fake tensors does not complain of a `step` on the CPU."""
    engine = Engine(Accelerator(cpu=True))
    with FakeTensorMode():
        parameter = nn.Parameter(torch.empty(3, 2, device="cuda"))
        state = {"step": torch.ones(()), "exp_avg": torch.ones(3, 2)}
        reference = torch.optim.AdamW([parameter], fused=True)
        reference.load_state_dict({**reference.state_dict(), "state": {0: dict(state)}})
        engine.optimizer = torch.optim.AdamW([parameter], fused=True)
        monkeypatch.setattr(engine, "_named", lambda: iter([("weight", parameter)]))
        engine.load_optimizer_state({f"weight|{key}": value for key, value in state.items()})
        loaded = engine.optimizer.state[parameter]
        assert loaded.keys() == state.keys()
        for key, value in loaded.items():
            expected = reference.state[parameter][key]
            assert (value.device, value.dtype) == (expected.device, expected.dtype)
            assert value.device.type == "cuda"


def sharded_state(refusal: Path, offload: bool) -> None:
    """Writes the devices of a fake parameter of FSDP and of its loaded state."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    engine = Fsdp(Accelerator(cpu=True), FsdpEngine(kind="fsdp", offload=offload))
    mesh = init_device_mesh("cuda", (2,))
    with FakeTensorMode():
        full = torch.ones(4, 3)
        shard: Any = distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None)
        parameter: Any = nn.Parameter(shard.to("cpu") if offload else shard)
        moment: Any = engine._share(parameter, "exp_avg", full)
        step = engine._share(parameter, "step", torch.ones(()))
        places = [parameter.to_local(), moment.to_local(), step]
    refusal.write_text(" ".join(each.device.type for each in places))


@pytest.mark.parametrize(("offload", "devices"), [(False, "cuda cuda cuda"), (True, "cpu cpu cpu")])
def test_sharded_state_is_loaded_to_where_its_parameter_is(
    offload: bool, devices: str, tmp_path: Path
) -> None:
    """Offloaded parameters are on the CPU, while their mesh is the GPUs'."""
    act = partial(sharded_state, tmp_path / "devices", offload)
    assert ended(start(act, tmp_path / "refusal")) == [0], (tmp_path / "refusal.0").read_text()
    assert (tmp_path / "devices").read_text() == devices


# --- fp16 -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_fp16_run_has_the_scale_of_the_uninterrupted(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerators, "Accelerator", Scaling)
    monkeypatch.setattr(accelerators, "check_precisions", lambda recipe: None)

    def recipe(output: str) -> Any:
        saves = {"train__checkpoints": {"every": 1, "keep": 9}, "train__log_every": 1}
        changes = {"train__steps": 5, "evaluate__samples": 0, "data__validation": []}
        text = tiny_recipe("causal", output=output, precision="fp16")
        return parsed(text, **saves, **changes)

    whole = sft(recipe("whole")).folder / "stages" / "1-main"
    parts = tmp_path / "parts" / "stages" / "1-main"
    interrupted(partial(sft, recipe("parts")), stage=0, step=3)
    sft(recipe("parts"), resume=True)
    scales = [
        tensors_of(step_folder(whole, step))["trainer/scaler.safetensors|scale"].item()
        for step in range(1, 6)
    ]
    assert scales == [16, 32, 32, 64, 64]
    assert_same_bits(step_folder(whole, 5), step_folder(parts, 5))
    report = vlm_tune.verify_run(tmp_path / "whole")
    assert (report.agrees, report.start, report.end) == (True, 4, 5)


def test_a_skipped_step_lowers_the_scale_and_the_next_is_taken() -> None:
    engine, layer = scaling_engine()
    before = layer.weight.detach().clone()
    engine.backward(layer(torch.ones(1, 2)).sum() * float("inf"))
    norm = engine.clip(1.0)
    assert norm is not None
    assert not norm.isfinite()
    engine.skip()
    assert engine.scaler_state()["scale"] == 8
    assert torch.equal(layer.weight, before)
    engine.backward(layer(torch.ones(1, 2)).sum())
    engine.clip(1.0)
    engine.step()
    assert not torch.equal(layer.weight, before)


def test_a_gradient_that_no_scale_makes_finite_ends_the_run(tmp_path: Path) -> None:
    """The scaler lowers its scale for it step by step; below 1 that can't be the cause."""
    engine, layer = scaling_engine()
    notes: list[StageEvent] = []
    policy = NonFinitePolicy(engine.accelerator, notes.append, most=2, skips=True)
    taken = []
    with pytest.raises(
        TrainingError, match=r"norm is nan at step 7; .* the 2th such step"
    ) as raised:
        for step in range(1, 20):
            engine.backward(layer(torch.ones(1, 2)).sum() * float("nan"))
            norm = engine.clip(1.0)
            assert norm is not None
            taken.append(policy.allows(step, 1.0, norm.item(), ["row"], tmp_path, last=False))
            (engine.step if taken[-1] else engine.skip)()
    assert raised.value.by_recipe
    # 16, 8, 4, 2 and 1, then a half.
    assert taken == [True] * 5 + [False]
    assert [note.step for note in notes if isinstance(note, Note)] == [6]


def test_fp16_is_refused_with_an_engine_of_accelerates_that_does_not_scale(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="fp16 needs loss scaling, which engine fsdp does not do"):
        registry.engine_of(parsed(tiny_recipe("causal", precision="fp16")))
    assert registry.engine_of(parsed(tiny_recipe("causal", precision="fp16"))).kind == "ddp"


def test_a_recipe_is_held_against_the_engine_of_accelerates(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a recipe that names the engine is when it is read, and with each of its stages."""
    text = with_tune(tiny_recipe("causal"), LORA_TUNE)
    packed = with_llm(text, Path("llm"), "causal", ", quantize: int8")
    recipe = parsed(packed)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match=r"model\.llm\.quantize: fsdp shards weights"):
        registry.engine_of(recipe)
    assert registry.engine_of(recipe).kind == "ddp"


def test_packed_weights_are_refused_where_fsdp_can_not_shard_them(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = with_tune(tiny_recipe("causal"), LORA_TUNE)
    packed = with_llm(text, Path("llm"), "causal", ", quantize: nf4")
    recipe = parsed(packed + "engine: {kind: fsdp}\n")
    monkeypatch.setattr(registry, "shards_bytes", lambda: False)
    with pytest.raises(RecipeError, match="engine: FSDP2 shards packed weights"):
        registry.engine_of(recipe)


@pytest.mark.parametrize("how", ["no GPU", "accelerate's --cpu"])
def test_fp16_is_refused_on_a_cpu_before_anything_is_written(
    how: str, tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate would train without scaler and autocast; also in a later stage."""
    why = "torch sees no GPU here"
    if how != "no GPU":
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        why = "ACCELERATE_USE_CPU hides the GPU"
    later = tiny_recipe("causal") + "stages: [{name: a}, {name: b, train: {precision: fp16}}]\n"
    for text in (tiny_recipe("causal", precision="fp16"), later):
        with pytest.raises(
            RecipeError, match=rf"train\.precision: fp16 is for GPUs.* and {why}; use"
        ):
            sft(parsed(text))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("tune", "reports"),
    [(LORA_TUNE, True), (LORA_TUNE.replace("how: lora", "how: frozen").replace(LORA, ""), False)],
)
def test_only_a_stage_that_trains_the_llm_reports_how_it_does(
    tune: str, reports: bool, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    text = with_tune(tiny_recipe("causal", precision="bf16"), tune)
    recipe = parsed(text, train__steps=1)
    events: list[StageEvent] = []
    stage_loop(built(recipe), recipe, tmp_path, report=events.append).run()
    assert any(isinstance(event, Acceleration) for event in events) == reports


def test_a_gpu_that_emulates_bf16_is_named(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the log of a run, and by `plan`."""
    has_units = [False]
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_units[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    recipe = parsed(tiny_recipe("causal", precision="bf16"))
    (note,) = accelerators.precision_notes(recipe, CUDA)
    assert note.startswith("Tesla T4 has no bf16 units and emulates bf16")
    assert machine._lacks("bf16", CUDA) == [note]
    assert machine._lacks("fp16", CUDA) == []
    assert accelerators.precision_notes(recipe, torch.device("cpu")) == []
    has_units[0] = True
    assert accelerators.precision_notes(recipe, CUDA) == []


# --- determinism and memory -----------------------------------------------------------------------


def switches() -> tuple[Any, ...]:
    from torch._inductor import config

    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        os.environ.get(WORKSPACE),
        cudnn.deterministic,
        cudnn.benchmark,
        config.deterministic,
    )


@pytest.mark.slow
def test_a_deterministic_run_is_so_from_its_model_to_its_end(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stages, with GPU memory of which one takes more."""
    figures = iter(
        [
            {"gpu_memory_mb": 3100, "gpu_reserved_mb": 3400},
            {"gpu_memory_mb": 2000, "gpu_reserved_mb": 2100},
        ]
    )
    measured: list[str] = []
    monkeypatch.setattr(stage, "reset_gpu_peak", lambda device: measured.append("reset"))
    monkeypatch.setattr(
        stage, "largest_gpu_peak", lambda accelerator: measured.append("read") or next(figures)
    )
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = switches()
    seen: dict[str, set[tuple[Any, ...]]] = {}

    def show(event: Event) -> None:
        seen.setdefault(event.kind, set()).add(switches())

    text = tiny_recipe("causal") + "\nstages: [{name: one}, {name: two}]\n"
    saves = {"train__checkpoints": {"every": 1, "keep": 9}, "train__log_every": 1}
    run = sft(
        parsed(text, train__steps=2, train__deterministic=True, evaluate__samples=0, **saves),
        show=show,
    )
    on = (True, ":4096:8", True, False, True)
    assert seen.keys() >= {"environment", "tuning", "train", "evaluate", "memory"}
    assert set.union(*seen.values()) == {on}
    assert switches() == before
    seen.clear()
    assert vlm_tune.verify_run(run.folder, show=show).agrees
    assert set.union(*seen.values()) == {on}
    assert switches() == before

    events = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert [e["deterministic"] for e in events if e["event"] == "environment"] == [True]
    memory = [(e["name"], e["gpu_memory_mb"]) for e in events if e["event"] == "memory"]
    assert memory == [("one", 3100), ("two", 2000)]
    assert measured == ["reset", "read"] * 2
    assert run.result["peak_gpu_memory_mb"] == 3100
    assert run.result["peak_gpu_reserved_mb"] == 3400
    assert "3,100 MB" in (run.folder / "report.html").read_text()


def test_determinism_is_restored_after_a_failure_and_a_users_workspace_stays(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    recipe = parsed(tiny_recipe("causal"), train__deterministic=True)
    with pytest.raises(KeyError), determinism(recipe):
        assert os.environ[WORKSPACE] == ":16:8"
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with determinism(recipe):
        assert os.environ[WORKSPACE] == ":4096:8"
    assert os.environ[WORKSPACE] == ":0:0"
    with determinism(parsed(tiny_recipe("causal"))):
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_form_is_named(
    tiny_recipe: Callable[..., str],
) -> None:
    """By torch's own message, of an operation that has none on a CPU either."""
    recipe = parsed(tiny_recipe("causal"), train__deterministic=True)
    with determinism(recipe), pytest.raises(RuntimeError) as error:
        torch.ones(3).put_(torch.tensor([0]), torch.ones(1))
    assert "put_ has no deterministic form on this device" in str(nondeterministic(error.value))
    assert nondeterministic(RuntimeError("another")) is None


def test_peaks_are_the_devices_and_the_largest_of_the_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices: list[torch.device] = []
    for name, figure in (("max_memory_allocated", 5e9), ("max_memory_reserved", 6e9)):
        monkeypatch.setattr(
            torch.cuda, name, lambda device, figure=figure: devices.append(device) or int(figure)
        )
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", devices.append)
    gpu_memory.reset_gpu_peak(CUDA)
    assert gpu_memory.gpu_peak(CUDA) == {"gpu_memory_mb": 5000, "gpu_reserved_mb": 6000}
    assert devices == [CUDA] * 3
    gpu_memory.reset_gpu_peak(torch.device("cpu"))
    assert gpu_memory.gpu_peak(torch.device("cpu")) == {}

    monkeypatch.setattr(
        gpu_memory, "gpu_peak", lambda device: {"gpu_memory_mb": 3, "gpu_reserved_mb": 5}
    )
    ranks: Any = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda mine: torch.cat([mine, mine + 4])
    )
    assert gpu_memory.largest_gpu_peak(ranks) == {"gpu_memory_mb": 7, "gpu_reserved_mb": 9}


# --- devices, groups, environment -----------------------------------------------------------------


def test_the_random_state_is_that_of_the_runs_own_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restored: list[tuple[int, torch.device]] = []
    monkeypatch.setattr(
        torch.cuda, "get_rng_state", lambda device: torch.tensor([7 + device.index])
    )
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: restored.append((int(state), device))
    )
    from vlm_tune.model.weights import write_safetensors

    state = {f"0.{key}": value for key, value in random_state(CUDA).items()}
    write_safetensors(state, tmp_path / "trainer" / "random.safetensors")
    load_random(tmp_path, 0, CUDA)
    load_random(tmp_path, 0, torch.device("cpu"))
    assert restored == [(8, CUDA)]
    assert "cuda" not in random_state(torch.device("cpu"))


@pytest.mark.parametrize("launched", [True, False])
def test_processes_on_gpus_exchange_cpu_tensors_over_gloo(
    launched: bool, tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers: list[Any] = []

    def accelerator(**settings: Any) -> Any:
        handlers.extend(settings["kwargs_handlers"])
        return SimpleNamespace(num_processes=1)

    monkeypatch.setattr(accelerators, "Accelerator", accelerator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    accelerator_of(parsed(tiny_recipe("causal"), train__timeout=77.0))
    passed_on = handlers[0].to_kwargs()
    assert passed_on.pop("timeout").total_seconds() == 77
    assert passed_on == ({"backend": "cuda:nccl,cpu:gloo"} if launched else {})


def test_a_single_process_of_fsdp_on_a_gpu_has_both_backends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backends: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **settings: backends.append(backend)
    )
    for kind in ("cuda", "cpu"):
        accelerator: Any = SimpleNamespace(device=torch.device(kind))
        registry.build_engine(FsdpEngine(kind="fsdp"), accelerator)
        registry.build_engine(AutoEngine(), accelerator)
    assert backends == [BACKENDS, "gloo"]


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19", "535.104.05"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build",
            "580.82.07",
        ),
        (None, None),
    ],
)
def test_the_environment_names_the_gpu_and_what_drives_it(
    text: str | None, driver: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(
            name=f"H100 {device.index}", major=9, minor=0, total_memory=85_000_000_000
        ),
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: text is not None)
    monkeypatch.setattr(nccl, "version", lambda: (2, 27, 7))
    if text is not None:
        (tmp_path / "version").write_text(f"{text}\nGCC version: gcc 13.2.0\n")
    monkeypatch.setattr(system, "DRIVER", tmp_path / "version")
    accelerator: Any = SimpleNamespace(device=CUDA, num_processes=2)
    values = environments.environment(accelerator, AutoEngine())
    expected = {
        "device": "H100 1",
        "capability": "9.0",
        "memory_gb": 85.0,
        "gpus": 8,
        "driver": driver,
        "cuda": "13.0",
        "cudnn": 91300,
        "nccl": text and "2.27.7",
        "deterministic": False,
    }
    assert {key: values[key] for key in expected} == expected
    assert "kernels" not in values
