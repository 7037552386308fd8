"""On a GPU the host waits once a step, and never within a micro-batch.

The steps are those of the real loop, on a device that counts what a GPU would be waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from packaging.version import Version

from tests.helpers.connector_kinds import KINDS, with_connector
from tests.helpers.contrastive_samples import write_captions
from tests.helpers.counted_device import CUDA, CountedDevice, counted_device, to_counted_device
from tests.helpers.device_recipes import COMPOSED, recipe_of
from tests.helpers.preference_samples import LORA, preference_text
from tests.helpers.task_recipes import LAYERED, SOFT, task_sources, with_sharing
from tests.helpers.tiny_models import LORA_TUNE, built, parsed, stage_loop, with_tune
from vlm_tune.config.native import JOINED_TYPES
from vlm_tune.train import trainer
from vlm_tune.train.step_trace import read_trace
from vlm_tune.train.task_tie import TaskTie
from vlm_tune.train.trainer import StageLoop

Recipes = Callable[..., str]
STEPS = 2
TRAIN = {"train__steps": STEPS, "train__batch_size": 2, "train__gradient_accumulation": 2}
PACKED = {"data__packing": True, "data__row_length": 128}
BRANCHES = {"data__group": "image"}
OLD_MASKS = Version(transformers.__version__) < Version("5.21")
"""Whether a mask that transformers makes for T5 holds a number that it copies from the host."""


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernels for CPUs, and no checkpoints: they are written from the CPU."""
    monkeypatch.setenv("VLM_TUNE_KERNELS", "reference")
    monkeypatch.setattr(StageLoop, "_save", lambda loop, step: None)


def run_counted(
    text: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, cached: bool = False, **keys: Any
) -> CountedDevice:
    """Trains a recipe's steps on the counted device, into `folder`."""
    recipe = parsed(text, **(TRAIN | keys))
    model = built(recipe)
    loop = stage_loop(model, recipe, folder, cached=cached)
    inner: Any = loop.engine.optimizer
    with monkeypatch.context() as patch, counted_device(patch) as device:
        to_counted_device(model, inner.optimizer)
        if loop.tie is not None:
            loop.tie = TaskTie(model, 0.5)  # of the parameters there
        patch.setattr(Accelerator, "device", CUDA)
        loop.run()
    assert loop.progress.step == STEPS
    return device


def unexpected_waits(device: CountedDevice) -> list[str]:
    """The waits of a run but the one a step in which its figures are read."""
    waits = [line for line in device.waits if not (OLD_MASKS and "masking_utils.py" in line)]
    read = [line for line in waits if "step_figures.py" in line]
    return [line for line in waits if line not in read] + read[STEPS:]


def assert_one_wait_a_step(device: CountedDevice) -> None:
    assert unexpected_waits(device) == []


@pytest.mark.parametrize(
    ("llm", "cached", "keys"),
    [
        pytest.param("causal", False, {}, id="decoder-rows"),
        pytest.param("causal", True, BRANCHES, id="decoder-branches-cached"),
        pytest.param("causal", False, BRANCHES | PACKED, id="decoder-packed"),
        pytest.param("seq2seq", True, {}, id="t5-rows-cached"),
        pytest.param("seq2seq", False, BRANCHES, id="t5-branches"),
        pytest.param("seq2seq", True, PACKED, id="t5-packed-cached"),
    ],
)
def test_a_step_waits_once_and_is_the_step_of_a_cpu(
    llm: str,
    cached: bool,
    keys: dict[str, Any],
    tiny_recipe: Recipes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = with_tune(tiny_recipe(llm), LORA_TUNE) if cached else tiny_recipe(llm)
    device = run_counted(text, tmp_path / "gpu", monkeypatch, cached=cached, **keys)
    assert_one_wait_a_step(device)
    recipe = parsed(text, **TRAIN, **keys)
    stage_loop(built(recipe), recipe, tmp_path / "cpu", cached=cached).run()
    for one, other in zip(read_trace(tmp_path / "gpu"), read_trace(tmp_path / "cpu"), strict=True):
        assert (one.step, one.samples) == (other.step, other.samples)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.norm == pytest.approx(other.norm, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "llm"),
    [*((kind, "causal") for kind in KINDS), ("qformer-text", "seq2seq")],
)
def test_no_connector_waits(
    kind: str, llm: str, tiny_recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = with_connector(tiny_recipe(llm), kind)
    assert_one_wait_a_step(run_counted(text, tmp_path / "gpu", monkeypatch))


@pytest.mark.parametrize("name", COMPOSED)
def test_no_family_waits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_one_wait_a_step(run_counted(recipe_of(name, tmp_path), tmp_path / "gpu", monkeypatch))


@pytest.mark.parametrize("name", [*JOINED_TYPES, "lfm2_vl"])
def test_of_a_native_model_transformers_own_code_alone_waits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a Qwen-VL's none is that of a layer of its tower, nor for positions or a mask."""
    keys: dict[str, Any] = BRANCHES if name == "qwen3_vl" else {}
    device = run_counted(recipe_of(name, tmp_path), tmp_path / "gpu", monkeypatch, **keys)
    waits = unexpected_waits(device)
    theirs = ["modeling_", "import_utils", "accelerator.py"]
    theirs += [] if name in JOINED_TYPES else ["masking_utils"]
    assert waits and all(line.partition(" at ")[2].startswith(tuple(theirs)) for line in waits)
    if name in ("qwen2_vl", "qwen2_5_vl"):
        assert len(waits) == 3 * STEPS * TRAIN["train__gradient_accumulation"]


@pytest.mark.parametrize("loss", ["captions", "clip"])
def test_the_contrastive_objective_waits_once_a_step(
    loss: str, tiny_recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"objective": {"kind": "contrastive", "loss": loss}, **BRANCHES}
    assert_one_wait_a_step(
        run_counted(tiny_recipe("causal"), tmp_path / "gpu", monkeypatch, **keys)
    )


@pytest.mark.parametrize("negatives", ["hard", "random"])
def test_matching_waits_once_a_step(
    negatives: str, tiny_recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"kind": "file", "path": str(write_captions(tmp_path, "rows", 0)), "form": "match"}
    keys: dict[str, Any] = {
        "objective": {"kind": "matching", "negatives": negatives},
        "data__train": [rows],
    }
    assert_one_wait_a_step(
        run_counted(tiny_recipe("causal"), tmp_path / "gpu", monkeypatch, **keys)
    )


@pytest.mark.parametrize(
    ("objective", "llm"),
    [
        ("{kind: dpo}", "causal"),
        ("{kind: dpo, reference: copy, loss_type: [sigmoid, sft]}", "causal"),
        ("{kind: simpo}", "causal"),
        ("{kind: orpo}", "seq2seq"),
        ("{kind: kto}", "causal"),
        ("{kind: kto, loss_type: apo_zero_unpaired}", "seq2seq"),
    ],
)
def test_objectives_of_preferences_wait_once_a_step(
    objective: str, llm: str, tiny_recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = preference_text(tiny_recipe, llm, objective, judged="kto" in objective)
    device = run_counted(text, tmp_path / "gpu", monkeypatch)
    # The values of the start are copied there for the first step.
    copied = [line for line in device.waits if "references.py" in line]
    assert len(set(copied)) == len(copied) // 28 == ("copy" in objective)
    device.waits = [line for line in device.waits if line not in copied]
    assert_one_wait_a_step(device)


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "span-corruption": ("seq2seq", {"objective": {"kind": "span_corruption"}}),
    "mixture": (
        "causal",
        {
            "objective": [{"kind": "language_modeling"}, {"kind": "contrastive", "weight": 0.5}],
            **BRANCHES,
        },
    ),
    "image-noise": (
        "causal",
        {
            "objective": {"kind": "language_modeling", "image_noise": 0.5},
            "train__batch_size": 4,
            "train__gradient_accumulation": 1,
        },
    ),
    "augmentation": ("causal", {"data__augment": {"crop": 0.8, "colour": 0.2, "noise": 0.1}}),
    "checkpointing": ("causal", {"train__gradient_checkpointing": True}),
    "joined-prefix": ("causal", BRANCHES),
}
PREFIX = """
tune:
  - {match: "llm.*", how: prefix, tokens: 3}
  - {match: "*", how: frozen}
train:"""


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_makes_a_step_wait_twice(
    name: str, tiny_recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, keys = SETTINGS[name]
    text = tiny_recipe(llm)
    text = with_tune(text, PREFIX) if name == "joined-prefix" else text
    assert_one_wait_a_step(run_counted(text, tmp_path / "gpu", monkeypatch, **keys))


@pytest.mark.parametrize(("sharing", "llm"), [(SOFT, "causal"), (LAYERED, "seq2seq")])
def test_adapters_of_tasks_wait_once_a_step(
    sharing: str,
    llm: str,
    color_rows: Path,
    tiny_recipe: Recipes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys: dict[str, Any] = {"data__train": task_sources(color_rows), "data__validation": []}
    text = with_sharing(tiny_recipe(llm), sharing)
    assert_one_wait_a_step(run_counted(text, tmp_path / "gpu", monkeypatch, **keys))


def test_sampled_completions_are_trained_on_where_the_model_is(
    tiny_recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling looks at its tokens; the steps are those of a CPU, and wait once."""
    keys: dict[str, Any] = {
        "objective": {
            "kind": "grpo",
            "num_generations": 4,
            "max_completion_length": 4,
            "beta": 0.1,
            "reward_funcs": ["tests.helpers.policy_samples:low_share"],
        },
    }
    text = with_tune(tiny_recipe("causal"), LORA)
    device = run_counted(text, tmp_path / "gpu", monkeypatch, **keys)
    waits = unexpected_waits(device)
    sampling = ("answering.py", "continuing.py", "picking.py")
    assert [line for line in waits if not any(file in line for file in sampling)] == []
    recipe = parsed(text, **TRAIN, **keys)
    stage_loop(built(recipe), recipe, tmp_path / "cpu").run()
    for one, other in zip(read_trace(tmp_path / "gpu"), read_trace(tmp_path / "cpu"), strict=True):
        assert (one.step, one.samples) == (other.step, other.samples)
        assert one.loss == pytest.approx(other.loss, rel=1e-4, abs=1e-7)


def test_a_gradient_is_clipped_without_looking_at_its_norm(
    tiny_recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same optimizer step as on a CPU, which looks."""
    keys: dict[str, Any] = {"train__max_grad_norm": 0.05}
    text = tiny_recipe("causal")
    device = run_counted(text, tmp_path / "gpu", monkeypatch, **keys)
    assert_one_wait_a_step(device)
    recipe = parsed(text, **TRAIN, **keys)
    stage_loop(built(recipe), recipe, tmp_path / "cpu").run()
    losses = [float(step.loss) for step in read_trace(tmp_path / "gpu")]
    expected = [float(step.loss) for step in read_trace(tmp_path / "cpu")]
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_step_that_is_not_finite_is_left_out(
    tiny_recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one value that is read decides, before the optimizer's step."""
    read = trainer.read_figures
    monkeypatch.setattr(
        trainer,
        "read_figures",
        lambda figures, norm: (
            ([math.nan], 1.0) if not (tmp_path / "seen").exists() else read(figures, norm)
        ),
    )
    taken: list[int] = []
    step = trainer.Engine.step

    def counted_step(engine: trainer.Engine) -> None:
        taken.append(1)
        step(engine)

    def skipped(engine: trainer.Engine) -> None:
        (tmp_path / "seen").touch()
        engine.optimizer.zero_grad()

    monkeypatch.setattr(trainer.Engine, "step", counted_step)
    monkeypatch.setattr(trainer.Engine, "skip", skipped)
    run_counted(tiny_recipe("causal"), tmp_path / "gpu", monkeypatch)
    assert len(taken) == STEPS - 1
    assert next(step.loss for step in read_trace(tmp_path / "gpu")) == "nan"


WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a number is read": lambda x: x.sum().item(),
    "a condition is read": lambda x: bool((x > 0).any()),
    "a list is read": lambda x: x.tolist(),
    "a copy to the CPU": lambda x: x.cpu(),
    "an index by a mask": lambda x: x[x > 0],
    "places of a mask": lambda x: (x > 0).nonzero(),
    "an index on the CPU": lambda x: x[torch.tensor([0, 1])],
    "numbers of Python": lambda x: torch.tensor([1, 2], device=x.device),
    "a copy from pageable memory": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "a blocking copy": lambda x: torch.ones(2).pin_memory().to(x.device),
    "repeats of unknown number": lambda x: x.repeat_interleave(x.abs().long()),
    "the gradient of a scatter by a mask": lambda x: _scattered(x).sum().backward(),
    "distinct values": lambda x: x.unique(),
}
NO_WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a copy from pinned memory": lambda x: (
        torch.ones(2).pin_memory().to(x.device, non_blocking=True)
    ),
    "an index by places": lambda x: x[torch.arange(2, device=x.device)],
    "a mask that is filled": lambda x: x.detach().clone().masked_fill_(x > 0, 1.0),
    "another type": lambda x: x.to(x.device, torch.float64),
    "a known repeat": lambda x: x.repeat_interleave(2),
    "a factory": lambda x: torch.zeros(3, device=x.device) + x,
}


def _scattered(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x).masked_scatter(x > 0, x * 2)


@pytest.mark.parametrize("what", [*WAITS, *NO_WAITS])
def test_the_counter_counts(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted_device(monkeypatch) as device:
        x = torch.tensor([1.0, -2.0, 3.0]).pin_memory().to(CUDA, non_blocking=True)
        x.requires_grad_()
        (WAITS | NO_WAITS)[what](x)
    assert bool(device.waits) == (what in WAITS), device.waits


@pytest.mark.gpu
@pytest.mark.parametrize("llm", ["causal", "seq2seq"])
@pytest.mark.parametrize("keys", [{}, BRANCHES, PACKED], ids=["rows", "branches", "packed"])
def test_a_real_gpu_is_not_waited_for(
    llm: str,
    keys: dict[str, Any],
    tiny_recipe: Recipes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch itself raises at each synchronisation but the one that reads the step's outcome."""
    recipe = parsed(tiny_recipe(llm, precision="bf16"), **TRAIN, **keys)
    step = StageLoop._step
    read = trainer.read_figures

    def watched(loop: StageLoop, *args: Any) -> float:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(loop, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def allowed(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        outcome = read(*args)
        torch.cuda.set_sync_debug_mode("error")
        return outcome

    monkeypatch.setattr(StageLoop, "_step", watched)
    monkeypatch.setattr(trainer, "read_figures", allowed)
    loop = stage_loop(built(recipe), recipe, tmp_path / "gpu")
    assert loop.accelerator.device.type == "cuda"
    assert loop.run().step == STEPS
