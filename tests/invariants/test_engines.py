"""Every engine with two processes computes what one process does.

That holds whatever its ranks hold, and any may go on where another stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from tests.helpers.connector_kinds import with_connector
from tests.helpers.family_recipes import SAVED, over_family, save_families
from tests.helpers.forked_runs import ended, start
from tests.helpers.native_models import save_native, with_native
from tests.helpers.shaped_samples import save_mistral3
from tests.helpers.task_recipes import SOFT, task_sources
from tests.helpers.tiny_models import (
    LORA_TUNE,
    assert_close,
    interrupted,
    one_step,
    parsed,
    rows_of,
    save_llm,
    with_llm,
    with_tower,
    with_tune,
)
from tests.helpers.tiny_recipes import tiny_text, write_color_rows
from tests.helpers.vlm_samples import with_pretrained
from tests.invariants import engine_worker
from vlm_tune.api import sft
from vlm_tune.compat import shards_bytes
from vlm_tune.config.load import dump_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.exporting.merge import merge
from vlm_tune.launching import _reserved_port
from vlm_tune.train.step_trace import read_trace

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    **{f"zero{stage}": {"kind": "deepspeed", "stage": stage} for stage in range(4)},
    "offload": {"kind": "deepspeed", "stage": 3, "offload": ["optimizer", "parameters"]},
    "fsdp": {"kind": "fsdp"},
    "fsdp-offload": {"kind": "fsdp", "offload": True},
}
FULL = """
tune:
  - {match: "*", how: full}
train:"""
BLIND = """
tune:
  - {match: "tower.*", how: frozen}
  - {match: "connector.*", how: frozen}
  - {match: "llm.*", how: lora, r: 4, target_modules: all-linear}
train:"""
"""A rank without images has no gradient for what it skips, and must still gather its weights.
"""
PARTS = """
tune:
  - {match: "tower.*", how: lora, r: 4}
  - {match: "connector.*", how: lora, r: 4}
  - {match: "llm.*", how: lora, r: 4}
train:"""
TASKS = LORA_TUNE.replace("all-linear}", f"all-linear, {SOFT}}}")
MODELS: dict[str, tuple[str, str, str | None, dict[str, Any]]] = {
    "decoder-lora": ("causal", LORA_TUNE, None, {}),
    "decoder-full": ("causal", FULL, None, {"train__cache_features": False}),
    "t5-lora": ("seq2seq", LORA_TUNE, None, {}),
    "t5-full": ("seq2seq", FULL, None, {"train__cache_features": False}),
    "frozen": ("causal", BLIND, None, {"train__cache_features": False}),
    "qformer-text": ("causal", LORA_TUNE, "qformer-text", {"train__cache_features": False}),
    "fusion": ("seq2seq", LORA_TUNE, "fusion-attention", {}),
    "cross": ("causal", LORA_TUNE, "cross_attention", {}),
    "tasks": ("causal", TASKS, None, {"train__gradient_accumulation": 2}),
    "parts": ("causal", PARTS, "qformer-text", {"train__cache_features": False}),
    "native-parts": ("causal", PARTS, None, {}),
    "native-full": ("causal", FULL, None, {}),
    "native-frozen": ("causal", BLIND, None, {}),
    "lfm2_vl": ("causal", LORA_TUNE, None, {}),
    **{name: ("causal", LORA_TUNE, None, {"train__cache_features": False}) for name in SAVED},
}
OVER_NATIVE = {
    **dict.fromkeys(("native-parts", "native-full", "native-frozen"), "qwen3_vl"),
    "lfm2_vl": "lfm2_vl",
}
"""Native models: LoRA on all parts, all weights, LoRA on the LLM alone; and one of convolutions."""
SHARDED = ("zero3", "fsdp")
WITH: dict[str, Sequence[str]] = {
    # Adapters and whole models under each; the other way round under each way to share.
    "decoder-lora": tuple(ENGINES),
    "t5-full": tuple(ENGINES),
    "decoder-full": ("ddp", "zero2", *SHARDED),
    "t5-lora": ("ddp", "zero2", *SHARDED),
    "tasks": ("ddp", "zero2"),
    "parts": ("ddp", "zero2", *SHARDED),
    "native-full": ("offload", "fsdp-offload", *SHARDED),
    "lfm2_vl": ("ddp", *SHARDED),
    # A family of each kind of attention.
    **dict.fromkeys(SAVED, ("ddp", "zero2", *SHARDED)),
}
RUNS = [(model, engine) for model in MODELS for engine in WITH.get(model, SHARDED)]
HALF: dict[str, Sequence[str]] = {
    "decoder-bf16": ("ddp", "zero2", "zero3", "fsdp"),
    "decoder-qlora": ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"),
    "full-bf16": ("ddp", "fsdp"),
    "norms-bf16": ("ddp", "fsdp"),
    "t5-qlora": ("ddp", "zero3", "offload", "fsdp", "fsdp-offload"),
    "shapes-qlora": SHARDED,
    "native-qlora": SHARDED,
}
"""In bf16, in bf16 over a base of 4 bit, in bf16 with all weights in fp32 and a connector that
reads text, in bf16 with a tower of batch norms, which is validated as well, and in fp32 (`EXACT`)
over a T5 of 4 bit of which some layers have no adapter, over a family of 4 bit whose tower keeps an
image's shape, and over a native model of 4 bit."""
EXACT = ("t5-qlora", "shapes-qlora", "native-qlora")
if not shards_bytes():
    HALF |= {
        name: [engine for engine in engines if not engine.startswith("fsdp")]
        for name, engines in HALF.items()
        if name.endswith("qlora")
    }
FEW = LORA_TUNE.replace("all-linear", "[q, v]")
NORMS = "{kind: timm, name: resnet10t, image_size: 32}"
COMBINED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "windows-fsdp": ("frozen", "fsdp", {"train__batch_size": 2, "train__gradient_accumulation": 2}),
    "compiled-fsdp": ("decoder-lora", "fsdp", {"train__compile": True}),
    "compiled-zero2": ("decoder-lora", "zero2", {"train__compile": True}),
    "compiled-zero3": ("decoder-lora", "zero3", {"train__compile": True}),
}
"""Runs of one step: in two micro-batches with few adapters, and with compiled blocks."""
STAGES = """
stages:
  - {name: first, train: {steps: 2}}
  - name: second
    train: {steps: 3, learning_rate: 1.0e-3}
    tune:
      - {match: "tower.*", how: frozen}
      - {match: "connector.*", how: full}
      - {match: "llm.*", how: lora, r: 4, lora_dropout: DROPOUT, target_modules: all-linear}
"""
ONE_STEP: dict[str, Any] = {
    "train__steps": 1,
    "train__log_every": 1,
    "train__max_grad_norm": None,
    "data__validation": [],
    "evaluate__samples": 0,
}


def recipe(folder: Path, name: str, model: str, *, size: int, **changes: Any) -> Recipe:
    """One step over all eight rows, of which only one has an image.

    Where there are two ranks, one has none.
    """
    kind, tune, connector, settings = MODELS[model]
    text = tiny_text(kind, folder / "messages.jsonl", folder / name)
    if connector:
        text = with_connector(text, connector)
    if model in SAVED:
        text = over_family(text, folder / "families", model)
    if model in OVER_NATIVE:
        text = with_native(text, folder / "families" / OVER_NATIVE[model])
    if model == "tasks":
        changes = {"data__train": task_sources(folder / "messages.jsonl"), **changes}
    return parsed(
        with_tune(text, tune), **{**ONE_STEP, "train__batch_size": size, **settings, **changes}
    )


def half(folder: Path, name: str, model: str, **changes: Any) -> Recipe:
    """As `recipe` over a saved model, with LoRA, or all of it."""
    kind = "seq2seq" if model == "t5-qlora" else "causal"
    precision = "fp32" if model in EXACT else "bf16"
    text = tiny_text(kind, folder / "messages.jsonl", folder / name, precision)
    if kind == "seq2seq":
        text = with_tune(text, FEW)
    elif model == "full-bf16":
        text = with_connector(with_tune(text, FULL), "qformer-text")
        changes = {"train__cache_features": False, **changes}
    else:
        text = with_tune(text, LORA_TUNE)
    if model == "norms-bf16":
        rows = {"kind": "file", "path": str(folder / "messages.jsonl")}
        text = with_tower(text, NORMS)
        changes = {"train__cache_features": False, "data__validation": [rows], **changes}
    if model == "shapes-qlora":
        family = folder / "families" / "mistral3"
        text = with_pretrained(text, family, "mistral3", ", llm: {quantize: nf4}")
        return parsed(text, **{**ONE_STEP, "train__cache_features": False, **changes})
    if model == "native-qlora":
        packed_llm = ", llm: {quantize: nf4}"
        text = with_native(with_tune(text, PARTS), folder / "families" / "qwen3_vl", packed_llm)
        return parsed(text, **{**ONE_STEP, **changes})
    packed = {"decoder-qlora": ", quantize: nf4", "t5-qlora": ", quantize: fp4"}
    text = with_llm(text, folder / f"base-{kind}", kind, packed.get(model, ""))
    return parsed(text, **{**ONE_STEP, **changes})


def save_bases(folder: Path) -> None:
    """The language models that `half` trains over."""
    rows = rows_of(recipe(folder, "rows", "decoder-lora", size=4))
    save_llm(folder / "base-causal", "causal", rows, hidden_size=64, intermediate_size=128)
    sizes: dict[str, Any] = {"d_model": 64, "d_kv": 32, "d_ff": 128, "dropout_rate": 0.0}
    save_llm(folder / "base-seq2seq", "seq2seq", rows, **sizes)
    save_mistral3(folder / "families" / "mistral3")


def in_stages(
    folder: Path, name: str, *, size: int = 4, dropout: float = 0.0, **changes: Any
) -> Recipe:
    """Full tuning of a T5 and then LoRA, with a checkpoint each step."""
    text = with_tune(
        tiny_text("seq2seq", folder / "messages.jsonl", folder / name), FULL
    ) + STAGES.replace("DROPOUT", str(dropout))
    saves = {
        "train__checkpoints": {"every": 1, "keep": 9},
        "train__log_every": 1,
        "train__cache_features": False,
    }
    return parsed(
        text, **saves, evaluate__samples=0, evaluate__every=2, train__batch_size=size, **changes
    )


GOES_ON: dict[str, Any] = {
    "train__steps": 8,
    "train__max_grad_norm": 1.0,
    "train__gradient_accumulation": 2,
    "train__checkpoints": {"every": 8, "keep": 9},
}


def native_lineage(folder: Path, name: str, *, size: int = 1, **changes: Any) -> Recipe:
    """A native model with LoRA on all parts, validated and sampled on the way."""
    rows = [{"kind": "file", "path": str(folder / "messages.jsonl")}]
    scored = {"data__validation": rows, "evaluate__every": 2, "evaluate__samples": 2}
    return recipe(folder, name, "native-parts", size=size, **{**GOES_ON, **scored, **changes})


LINEAGES = {"one-two-one": "decoder-lora", "zero2-zero3": "t5-full"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs of two processes, which pytest's own processes train once together."""
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent
    folder = common / "engines"
    with FileLock(common / "engines.lock"):
        if not (folder / "whole").exists():
            folder.mkdir()
            train_all(folder)
            (folder / "whole").touch()
    return folder


def train_all(folder: Path) -> None:
    """All runs of two processes, in two forks: importing the libraries takes longer than they."""
    import deepspeed  # noqa: F401  (here, and not in every fork)

    rows = [json.loads(line) for line in write_color_rows(folder).read_text().splitlines()]
    for row in rows[1:]:
        row.pop("images")
    (folder / "messages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_families(folder / "families")
    save_native(folder / "families" / "lfm2_vl", "lfm2_vl")
    plan: list[dict[str, Any]] = []

    def add(name: str, run_recipe: Recipe, **how: Any) -> None:
        (folder / f"{name}.yaml").write_text(dump_recipe(run_recipe))
        plan.append({"recipe": str(folder / f"{name}.yaml"), **how})

    for model, engine in RUNS:
        name = f"{model}-{engine}"
        add(name, recipe(folder, name, model, size=4, engine=ENGINES[engine]))
    for name, (model, engine, settings) in COMBINED.items():
        changes = {"train__batch_size": 4, **settings, "engine": ENGINES[engine]}
        add(name, recipe(folder, name, model, size=4, **changes))
    # One process alone to step 3, two to step 6; ZeRO-2 to step 3, ZeRO-3 from there.
    goes_on = recipe(folder, "one-two-one", "decoder-lora", size=2, **GOES_ON)
    interrupted(lambda show: sft(goes_on, show=show), stage=0, step=3)
    add("one-two-one", goes_on, resume=True, stop=6)
    for stage, how in ((2, {"stop": 3}), (3, {"resume": True})):
        run_recipe = recipe(
            folder,
            "zero2-zero3",
            "t5-full",
            size=1,
            engine={"kind": "deepspeed", "stage": stage},
            **GOES_ON,
        )
        add(f"zero2-zero3-{stage}", run_recipe, **how)
    # FSDP to step 3, ZeRO-3 to step 6, one process alone from there.
    for engine, how in (("fsdp", {"stop": 3}), ("zero3", {"resume": True, "stop": 6})):
        run_recipe = native_lineage(folder, "native-lineage", engine=ENGINES[engine])
        add(f"native-lineage-{engine}", run_recipe, **how)
    save_bases(folder)
    for model, engines in HALF.items():
        for engine in engines:
            name = f"{model}-{engine}"
            add(name, half(folder, name, model, train__batch_size=4, engine=ENGINES[engine]))
    # Two processes to step 3 over sharded 4-bit weights, one alone from there.
    sharded = "fsdp" if shards_bytes() else "zero3"
    packed = {"train__batch_size": 1, "engine": ENGINES[sharded], **GOES_ON}
    add("packed", half(folder, "packed", "t5-qlora", **packed), stop=3)
    compiled = {"train__batch_size": 4, "engine": ENGINES["fsdp"], "train__compile": True}
    if shards_bytes():
        add("packed-compiled", half(folder, "packed-compiled", "decoder-qlora", **compiled))
    for engine, dropout in (("ddp", 0.1), ("zero3", 0.0), ("fsdp", 0.0)):
        add(
            f"stages-{engine}",
            in_stages(folder, f"stages-{engine}", dropout=dropout, engine=ENGINES[engine]),
            verify=True,
        )
    with _reserved_port() as port:

        def act() -> None:
            # One run after the other: each makes a store of its own.
            del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
            os.environ |= {"MASTER_PORT": str(port), "VLM_TUNE_CACHE": str(folder)}
            engine_worker.main(plan)

        codes = ended(start(act, folder / "said", ranks=2))
    assert codes == [0, 0], "".join((folder / f"said.{rank}").read_text() for rank in range(2))


@pytest.mark.slow
@pytest.mark.parametrize("model", list(MODELS))
def test_two_ranks_take_the_gradient_of_one(model: str, trained: Path, tmp_path: Path) -> None:
    _, gradients = one_step(recipe(trained, f"{model}-alone", model, size=8), tmp_path)
    alone = {name.replace("llm.model.", "llm.", 1): value for name, value in gradients.items()}
    engines = [engine for other, engine in RUNS if other == model]
    assert engines
    if "fsdp" in engines:  # nothing is gathered in another type
        assert noted(trained, f"{model}-fsdp")["gathered"] == ["torch.float32"]
    for engine in engines:
        images = [
            json.loads((trained / f"{model}-{engine}.rank{rank}.json").read_text())["images"][0]
            for rank in range(2)
        ]
        assert sorted(images) == [0, 1]
        assert_close(alone, load_file(trained / f"{model}-{engine}.safetensors"))


def noted(trained: Path, name: str) -> dict[str, Any]:
    """What rank 0 noted of a run."""
    return json.loads((trained / f"{name}.rank0.json").read_text())


@pytest.mark.slow
def test_the_ranks_meet_once_a_step_beside_the_losss_sum(trained: Path) -> None:
    """On the host they exchange counts, digests, costs and the wish to stop by one collective.

    The loss is summed where it is; gradients are exchanged by DDP's own code.
    """
    for rank in range(2):
        run = json.loads((trained / f"one-two-one.rank{rank}.json").read_text())
        # The last of the three steps ends with a checkpoint, as the run is asked to stop.
        assert run["collectives"][:-1] == [["all_reduce", "all_gather"]] * 2
        assert run["collectives"][-1][:2] == ["all_reduce", "all_gather"]


@pytest.mark.slow
def test_micro_batches_and_compiled_blocks_give_the_gradient_of_one(
    trained: Path, tmp_path: Path
) -> None:
    """FSDP exchanges the adapters' gradients once a step, and its blocks are compiled."""
    for model in ("frozen", "decoder-lora"):
        alone_recipe = recipe(trained, f"combined-{model}", model, size=8)
        _, gradients = one_step(alone_recipe, tmp_path / model)
        alone = {name.replace("llm.model.", "llm.", 1): value for name, value in gradients.items()}
        for name in (name for name, (other, *_) in COMBINED.items() if other == model):
            assert_close(alone, load_file(trained / f"{name}.safetensors"))
    assert noted(trained, "windows-fsdp")["summed"] == [
        0,
        len(load_file(trained / "windows-fsdp.safetensors")),
    ]
    for name in COMBINED:
        compiles = name.startswith("compiled") and name != "compiled-zero3"
        assert (noted(trained, name)["graphs"] > 0) == compiles, name
        assert not noted(trained, name)["breaks"], name
    events = (trained / "compiled-zero3" / "log.jsonl").read_text()
    assert "hooks of ZeRO stage 3" in events


@pytest.mark.slow
@pytest.mark.parametrize("model", list(HALF))
def test_in_half_precision_two_ranks_take_nearly_the_gradient_of_one(
    model: str, trained: Path, tmp_path: Path
) -> None:
    _, gradients = one_step(half(trained, "alone", model, train__batch_size=8), tmp_path)
    alone = {name.replace("llm.model.", "llm.", 1): value for name, value in gradients.items()}
    by_engine = {
        engine: load_file(trained / f"{model}-{engine}.safetensors") for engine in HALF[model]
    }
    exact = model in EXACT
    for engine, value in by_engine.items():
        # Products of other shapes, unfused under ZeRO-3 and FSDP, are rounded elsewhere; ZeRO-2 and
        # less do what DDP does.
        assert_close(alone, value, relative=1e-5 if exact else 3e-2)
        if engine not in SHARDED:
            assert_close(by_engine["ddp"], value)
    if "fsdp" in by_engine:
        gathered = "torch.float32" if exact else "torch.bfloat16"
        assert noted(trained, f"{model}-fsdp")["gathered"] == [gathered]
        assert {value.dtype for value in by_engine["fsdp"].values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.skipif(not shards_bytes(), reason="needs torch 2.12")
def test_sharded_4bit_weights_train_in_compiled_blocks(trained: Path) -> None:
    compiled, plain = (
        load_file(trained / f"{name}.safetensors")
        for name in ("packed-compiled", "decoder-qlora-fsdp")
    )
    assert_close(plain, compiled, relative=3e-2)
    run = noted(trained, "packed-compiled")
    assert run["graphs"] > 0 and not run["breaks"]


@pytest.mark.slow
def test_a_run_over_sharded_4bit_weights_goes_on_alone_and_merges(
    trained: Path, tmp_path: Path
) -> None:
    sft(half(trained, "packed-whole", "t5-qlora", train__batch_size=2, **GOES_ON))
    sft(half(trained, "packed", "t5-qlora", train__batch_size=1, **GOES_ON), resume=True)
    expected, resumed = (losses(trained / name) for name in ("packed-whole", "packed"))
    assert len(expected) == 8
    assert resumed == pytest.approx(expected, abs=1e-4)
    report = merge(trained / "packed", tmp_path / "merged", dtype="fp32")
    assert "(the run was fp4)" in report.base
    assert 0 <= report.difference_to_adapter <= 1e-3 < report.difference_to_base


@pytest.mark.slow
def test_a_native_run_over_sharded_weights_goes_on_elsewhere_and_merges(
    trained: Path, tmp_path: Path
) -> None:
    sft(native_lineage(trained, "native-whole", size=2))
    sft(native_lineage(trained, "native-lineage"), resume=True)
    expected, resumed = (losses(trained / name) for name in ("native-whole", "native-lineage"))
    assert len(expected) == 8
    assert resumed == pytest.approx(expected, abs=1e-4)
    scored = (losses(trained / name, "evaluate") for name in ("native-whole", "native-lineage"))
    assert next(scored) == pytest.approx(next(scored), abs=1e-4)
    report = merge(trained / "native-lineage", tmp_path / "merged", dtype="fp32")
    assert 0 <= report.difference_to_adapter <= 1e-3 < report.difference_to_base


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
def test_stages_train_as_one_process_does(engine: str, trained: Path) -> None:
    alone = f"stages-alone-{engine}"
    sft(in_stages(trained, alone, size=8))
    stages = ("1-first", "2-second")
    one, two = (
        [read_trace(trained / run / "stages" / stage) for stage in stages]
        for run in (alone, f"stages-{engine}")
    )
    assert [len(steps) for steps in one] == [2, 3]
    assert [step.samples for steps in one for step in steps] == [
        step.samples for steps in two for step in steps
    ]
    pairs = [
        (a.loss, b.loss)
        for first, second in zip(one, two, strict=True)
        for a, b in zip(first, second, strict=True)
    ]
    assert [b for _, b in pairs] == pytest.approx([a for a, _ in pairs], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", *SHARDED])
def test_two_ranks_verify_their_run(engine: str, trained: Path) -> None:
    report = json.loads((trained / f"stages-{engine}.verified.json").read_text())
    assert report["agrees"]
    assert (report["stage"], report["start"], report["end"], report["checkpoints"]) == (
        "second",
        2,
        3,
        [3],
    )
    assert report["compared"] == ["samples", "loss", "norm"]


def losses(folder: Path, kind: str = "train") -> list[float]:
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == kind]


def noted_ids(trained: Path, name: str) -> dict[str, list[str]]:
    """The ids of each step's samples over both ranks."""
    shares = [
        json.loads((trained / f"{name}.rank{rank}.json").read_text())["ids"] for rank in range(2)
    ]
    return {step: sorted(shares[0][step] + shares[1][step]) for step in shares[0]}


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The ids of each step that this process takes."""
    from vlm_tune.train.trainer import StageLoop

    ids_by_step: dict[str, list[str]] = {}
    whole: Callable[..., float] = StageLoop._step

    def noted(loop: StageLoop, batches: Any, step: int, *rest: Any) -> float:
        ids_by_step[str(step)] = sorted(
            identity for batch in batches if batch.supervised for identity in batch.ids
        )
        return whole(loop, batches, step, *rest)

    monkeypatch.setattr(StageLoop, "_step", noted)
    return ids_by_step


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LINEAGES))
def test_a_run_goes_on_with_other_ranks_and_stages(
    name: str, trained: Path, order: dict[str, list[str]]
) -> None:
    alone = name == "one-two-one"
    whole = recipe(trained, f"{name}-whole", LINEAGES[name], size=2, **GOES_ON)
    sft(whole)
    expected, ids = losses(trained / f"{name}-whole"), dict(order)
    assert len(expected) == 8
    order.clear()
    seen = (
        noted_ids(trained, name)
        if alone
        else noted_ids(trained, f"{name}-2") | noted_ids(trained, f"{name}-3")
    )
    if alone:
        sft(recipe(trained, name, LINEAGES[name], size=2, **GOES_ON), resume=True)
        assert sorted(order) == ["7", "8"]
    assert sorted(seen) == [str(step) for step in range(4 if alone else 1, 7 if alone else 9)]
    assert {step: ids[step] for step in seen} == seen
    assert {step: ids[step] for step in order} == order
    traces = [read_trace(trained / run / "stages" / "1-main") for run in (f"{name}-whole", name)]
    assert [step.samples for step in traces[0]] == [step.samples for step in traces[1]]
    resumed_losses = losses(trained / name)
    assert (
        max(abs(one - other) for one, other in zip(expected, resumed_losses, strict=True)) <= 1e-4
    )


def test_an_engine_named_by_accelerate_is_the_recipes_or_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vlm_tune.config.engine import AutoEngine, DdpEngine, FsdpEngine
    from vlm_tune.errors import RecipeError
    from vlm_tune.train.engines.registry import resolve_engine

    assert resolve_engine(AutoEngine()) == DdpEngine(kind="ddp")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert resolve_engine(AutoEngine()) == FsdpEngine(kind="fsdp", offload=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="the recipe says ddp and the accelerate config fsdp"):
        resolve_engine(DdpEngine(kind="ddp"))
