"""Where weights are loaded and models are built, as if there were a GPU: which device is asked for.

Nothing is moved: what a call would have moved is noted.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.helpers.pretended_gpu import CUDA, pretended
from tests.helpers.tiny_models import (
    LORA_TUNE,
    built,
    parsed,
    rows_of,
    save_llm,
    with_llm,
    with_tune,
)
from vlm_tune.api import sft, verify_run
from vlm_tune.config.engine import DdpEngine, DeepSpeedEngine, FsdpEngine
from vlm_tune.config.tune import TuneRule
from vlm_tune.errors import ModelError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.build import build
from vlm_tune.model.checkpoint import load_model
from vlm_tune.model.tuning import apply_rules
from vlm_tune.train import run, stage
from vlm_tune.train.checkpoint import step_folder
from vlm_tune.train.stage import Context

Text = Callable[..., str]
META = torch.device("meta")


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lets torch say that there is a GPU, and notes which devices models are loaded on or moved to.

    A move of a whole model is ("moved", device), a load of a language model ("loaded", name).
    """
    from transformers import AutoModelForCausalLM

    noted: list[Any] = []
    to, load = nn.Module.to, AutoModelForCausalLM.from_pretrained

    def moved(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if not (args and isinstance(args[0], torch.device)):
            return to(self, *args, **kwargs)
        noted.append(("moved", args[0]))
        return self

    def loaded(name: Any, *, device_map: Any = None, **options: Any) -> Any:
        noted.append(("loaded", None if device_map is None else device_map[""]))
        return load(name, device_map=None, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nn.Module, "to", moved)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    return noted


@pytest.fixture
def named(tiny_recipe: Text, tmp_path: Path) -> str:
    """Text of a recipe that trains LoRA on a saved Llama."""
    text = tiny_recipe("causal")
    folder = save_llm(tmp_path / "base", "causal", rows_of(parsed(text)))
    return with_tune(with_llm(text, folder, "causal"), LORA_TUNE)


def test_a_model_is_loaded_where_it_is_to_be(named: str, moves: list[Any], tmp_path: Path) -> None:
    cuda = torch.device("cuda")
    recipe = parsed(named)
    model = build(recipe, [], device=CUDA, model_class=VisionLanguageModel)
    assert moves == [("loaded", "cuda:0"), ("moved", CUDA)]
    model.save_pretrained(tmp_path / "saved")
    for device, expected in ((None, cuda), (CUDA, CUDA)):
        moves.clear()
        load_model(tmp_path / "saved", device=device)
        assert moves == [("loaded", str(expected)), ("moved", expected)]
    moves.clear()
    VisionLanguageModel.from_pretrained(tmp_path / "saved", device="cpu")
    # The tower and the LLM are placed before the model is assembled over them.
    assert moves == [("loaded", None), *[("moved", torch.device("cpu"))] * 3]


def test_a_device_that_is_not_there_is_refused() -> None:
    for device in ("cuda:99", "tpu", 3):
        with pytest.raises(ModelError, match=r"device: there is no .*; expected one of cpu"):
            VisionLanguageModel.from_pretrained("x", device=device)  # type: ignore[arg-type]


def test_packed_weights_are_loaded_where_the_run_is_and_not_where_a_gpu_is(
    named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes would take a GPU that the run does not use."""
    from transformers import AutoModelForCausalLM

    def loaded(name: Any, **options: Any) -> Any:
        assert options["device_map"] == {"": "cpu"}
        raise OSError("seen")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    text = named.replace("base}", "base, quantize: nf4}")
    assert "nf4" in text
    with pytest.raises(ModelError, match="seen"):
        built(parsed(text))


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (DdpEngine(kind="ddp"), META),
        (DeepSpeedEngine(kind="deepspeed", stage=2), META),
        (DeepSpeedEngine(kind="deepspeed", stage=3), torch.device("cpu")),
        (FsdpEngine(kind="fsdp"), torch.device("cpu")),
    ],
)
def test_engines_that_shard_place_the_weights_themselves(section: Any, expected: Any) -> None:
    unused: Any = None
    accelerator: Any = SimpleNamespace(device=META, is_main_process=True)
    context = Context(unused, unused, accelerator, unused, unused, "", unused, section)
    assert context.device == expected


class _Built(Exception):
    """Ends a run where its model would be built."""


def test_runs_resumes_and_replays_build_on_their_device(
    tiny_recipe: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parsed(tiny_recipe("causal"), evaluate__samples=0, train__checkpoints={"every": 2})
    folder = sft(recipe, test=False).folder

    def refuse(*args: Any, device: Any, **kwargs: Any) -> Any:
        raise _Built(device)

    monkeypatch.setattr(run, "build", refuse)
    monkeypatch.setattr(stage, "restore_model", refuse)
    monkeypatch.setattr(Accelerator, "device", property(lambda self: META))
    for act in (
        lambda: verify_run(folder),
        lambda: sft(recipe, resume=True, test=False),
        lambda: sft(recipe, overwrite=True, test=False),
    ):
        with pytest.raises(_Built, match="meta"):
            act()


def test_only_one_model_is_in_memory_at_a_stages_end(
    tiny_recipe: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the loop is gone, with the optimizer's state and what was compiled."""
    gone: list[bool] = []
    alive: list[Any] = []
    build_model, loop, restore = run.build, stage.StageLoop, stage.restore_model

    def noted(make: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            thing = make(*args, **kwargs)
            alive.append(weakref.ref(thing))
            return thing

        return wrapped

    def restored(*args: Any, **kwargs: Any) -> Any:
        gone.extend(each() is None for each in alive)
        return restore(*args, **kwargs)

    monkeypatch.setattr(run, "build", noted(build_model))
    monkeypatch.setattr(stage, "StageLoop", noted(loop))
    monkeypatch.setattr(stage, "restore_model", restored)
    monkeypatch.setattr(stage, "_best", lambda context, folder, progress: step_folder(folder, 2))
    recipe = parsed(
        with_tune(tiny_recipe("causal"), LORA_TUNE),
        evaluate__samples=0,
        train__checkpoints={"every": 2, "keep": 5},
    )
    gc.collect()
    sft(recipe, test=False)
    assert gone == [True, True]


# --- PiSSA -------------------------------------------------------------------------------------


def pissa(**options: Any) -> list[TuneRule]:
    lora = {"how": "lora", "r": 4, "init": "pissa", "target_modules": ["q_proj"], **options}
    return [TuneRule(match="llm.*", **lora), TuneRule(match="*", how="frozen")]


def test_singular_vectors_are_computed_on_the_device(
    tiny_recipe: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(parsed(tiny_recipe("causal")))
    devices: list[torch.device] = []
    svd = torch.linalg.svd

    def noted(weight: torch.Tensor, **options: Any) -> Any:
        devices.append(weight.device)
        return svd(weight, **options)

    monkeypatch.setattr(torch.linalg, "svd", noted)
    rates: Any = {"learning_rate": 1e-3, "precision": torch.float32}
    with pretended(nn.Module(), CUDA):
        apply_rules(model, pissa(), **rates, device=CUDA)
    assert devices == [CUDA, CUDA]
    assert model.device.type == "cpu"


def test_a_randomised_pissa_comes_near_the_exact_one(tiny_recipe: Text) -> None:
    model = built(parsed(tiny_recipe("causal")))
    apply_rules(model, pissa(pissa_niter=64), learning_rate=1e-3, precision=torch.float32)
    layer: Any = model.llm.model.get_submodule("model.layers.0.self_attn.q_proj")
    product, initial = (
        layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight
        for name in ("default", "initial")
    )
    assert torch.equal(product, -initial) and float(product.abs().max())
    weight = layer.get_base_layer().weight
    left, values, right = torch.linalg.svd(weight)
    exact = left[:, :4] * values[:4] @ right[:4]
    # No product of rank 4 leaves less than the exact one. A fifth value may be near the fourth.
    assert 0.9999 <= float((weight - product).norm() / (weight - exact).norm()) <= 1.01
    assert not torch.equal(product, exact)
