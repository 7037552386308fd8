"""Plans against models that are really built, closed forms, and what autograd really keeps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from tests.helpers.connector_kinds import with_connector
from tests.helpers.tiny_models import (
    LORA_TUNE,
    built,
    cli,
    parsed,
    rows_of,
    save_llm,
    with_llm,
    with_tower,
    with_tune,
)
from vlm_tune.config.connectors import QFormerConnector
from vlm_tune.data.types import IGNORE_INDEX
from vlm_tune.errors import ModelError, RecipeError
from vlm_tune.kernels.cpu import native
from vlm_tune.memory_plan import machine, traced_stage, tracer
from vlm_tune.memory_plan.advice import changes
from vlm_tune.memory_plan.batch_stats import longest_batch, work_of
from vlm_tune.memory_plan.cuda import (
    COLLECTIVES,
    CONTEXT,
    SUMMED,
    WIDENED,
    cuda_autocast,
    recomputed,
    workspaces,
)
from vlm_tune.memory_plan.heap import ASIDE, Caching, Glibc, Range, holes
from vlm_tune.memory_plan.plan import plan
from vlm_tune.memory_plan.setting import Setting, parse_size
from vlm_tune.memory_plan.stage_plan import _memory
from vlm_tune.memory_plan.step import traced
from vlm_tune.memory_plan.tracer import Trace
from vlm_tune.memory_plan.zero import Held, zero_memory
from vlm_tune.model.build import bare_model
from vlm_tune.model.language.masks import tree_mask
from vlm_tune.model.tuning import apply_rules
from vlm_tune.precision import DTYPES
from vlm_tune.rendering.plan_text import show_plan
from vlm_tune.resources import KERNEL_BYTES, KERNELS

CONFIGS = Path(__file__).parent.parent / "fixtures" / "configs"
DEEP = (
    "{model_type: llama, vocab_size: 400, config: {hidden_size: 64, intermediate_size: 128, "
    "num_hidden_layers: 9, num_attention_heads: 4}}"
)

TinyRecipe = Callable[..., str]


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("lora", [True, False])
def test_parameters_and_bytes_are_those_of_the_model_that_is_built(
    tiny_recipe: TinyRecipe, kind: str, lora: bool
) -> None:
    text = tiny_recipe(kind, precision="bf16")
    recipe = parsed(with_tune(text) if lora else text)
    (stage,) = plan(recipe).stages
    model = built(recipe)
    tuned = apply_rules(
        model, recipe.tune, learning_rate=recipe.train.learning_rate, precision=DTYPES["bf16"]
    )
    assert stage.tuning == tuned.table
    for part, module in zip(
        stage.parts, (model.tower, model.connector, model.llm.model), strict=True
    ):
        parameters = list(module.parameters())
        size = sum(t.nbytes for t in (*parameters, *module.buffers()))
        assert (part.total, part.bytes) == (sum(p.numel() for p in parameters), size)
        assert part.trained == sum(p.numel() for p in parameters if p.requires_grad)
    # The tower's features are cached, so that no step reads it: a CPU has it in memory before the
    # first step alone.
    weights, tower = sum(part.bytes for part in stage.parts), stage.parts[0].bytes
    assert stage.cached and tower > 0
    assert stage.memory.frozen + stage.memory.trained + stage.memory.adapters == weights - tower
    assert stage.loading >= weights + stage.memory.base
    for elsewhere in (plan(recipe, gpu_memory="24GB"), plan(recipe, processes=2)):
        memory = elsewhere.stages[0].memory
        assert memory.frozen + memory.trained + memory.adapters == weights
    assert (stage.memory.adapters > 0) == lora
    assert stage.memory.optimizer == 8 * sum(part.trained for part in stage.parts)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_what_the_trace_holds_is_what_autograd_saves(tiny_recipe: TinyRecipe, kind: str) -> None:
    """After the forward pass the traced live bytes are what the real step saved, or little more."""
    recipe = parsed(with_tune(tiny_recipe(kind)), train__cache_features=False)
    (stage,) = plan(recipe).stages
    model = built(recipe)
    apply_rules(model, recipe.tune, learning_rate=1e-3, precision=torch.float32)
    spec = model.processor.spec
    batch = longest_batch(recipe, spec, 64)
    batch.pixels = torch.zeros(len(batch.media_index), 3, 32, 32, dtype=torch.uint8)
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch).sum  # noqa: B018
    (traced,) = plan(recipe, tokens=64).stages
    planned = traced.memory.activations + traced.memory.logits
    assert sum(saved.values()) <= planned and traced.memory.activations <= 1.1 * sum(saved.values())
    # Logits and their gradient, in fp32: they are not saved, but exist in the loss.
    vocabulary = model.llm.model.get_input_embeddings().num_embeddings
    assert traced.memory.logits <= 2 * batch.labels.numel() * vocabulary * 4
    assert stage.peak.length < 64


def test_layers_that_are_alike_are_traced_as_all_of_them_would_be(
    tiny_recipe: TinyRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_recipe("causal", precision="bf16")
    text = "\n".join(
        f"  llm: {{kind: causal, scratch: {DEEP}}}" if line.startswith("  llm:") else line
        for line in base.splitlines()
    )
    for recipe in (
        parsed(text + "\n"),
        parsed(with_tune(text + "\n")),
        parsed(
            with_tune(text + "\n"),
            train__gradient_checkpointing=True,
            train__gradient_accumulation=2,
        ),
    ):
        few = plan(recipe, tokens=96).stages[0]
        with monkeypatch.context() as patch:
            patch.setattr(tracer, "DEEP", 1000)
            whole = plan(recipe, tokens=96).stages[0]
        assert few.flops == pytest.approx(whole.flops, rel=1e-6)
        one, other = asdict(few.memory), asdict(whole.memory)
        assert sum(one.values()) - one["base"] == pytest.approx(
            sum(other.values()) - other["base"], rel=0.02
        )


def test_what_autocast_keeps_of_weights_it_cast_lives_through_both_passes(
    tiny_recipe: TinyRecipe,
) -> None:
    """With checkpointing nothing else holds them.

    All that a full tuning casts is there in bf16 at the end of the backward pass.
    """
    wide = DEEP.replace(
        "hidden_size: 64, intermediate_size: 128", "hidden_size: 256, intermediate_size: 512"
    )
    lines = tiny_recipe("causal", precision="bf16").splitlines()
    text = "\n".join(
        f"  llm: {{kind: causal, scratch: {wide}}}" if line.startswith("  llm:") else line
        for line in lines
    )
    (stage,) = plan(
        parsed(text + "\n", train__gradient_checkpointing=True), tokens=60, gpu_memory="1TB"
    ).stages
    cast = (
        stage.parts[2].trained - 2 * 400 * 256
    )  # embeddings are looked up as they are, and the head's rows are few
    assert 2 * cast < stage.memory.activations < 3 * cast


def test_a_connector_that_is_deep_beside_few_layers_is_not_taken_for_theirs(
    tiny_recipe: TinyRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With three checkpointed layers most of the backward pass is the Q-Former's.

    With all layers checkpointed it is the LLM's.
    """
    text = tiny_recipe("seq2seq", precision="bf16")
    text = text.replace("num_layers: 2, num_decoder_layers: 1", "num_layers: 12")
    text = with_connector(text, "qformer-text").replace("depth: 3", "depth: 12")
    recipe = parsed(with_tune(text), train__gradient_checkpointing=True)
    assert (
        isinstance(recipe.model.connector, QFormerConnector) and recipe.model.connector.depth == 12
    )
    few = plan(recipe, tokens=96, gpu_memory="1TB").stages[0].memory
    with monkeypatch.context() as patch:
        patch.setattr(tracer, "DEEP", 1000)
        whole = plan(recipe, tokens=96, gpu_memory="1TB").stages[0].memory
    assert few.activations == pytest.approx(whole.activations, rel=0.05)
    assert few.total - few.base == pytest.approx(whole.total - whole.base, rel=0.02)


def test_a_stage_is_traced_once_for_any_number_of_processes(
    tiny_recipe: TinyRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        batches.append(args[2].input_ids.shape)
        return traced(*args, **kwargs)

    monkeypatch.setattr(traced_stage, "traced", counted)
    recipe = parsed(tiny_recipe("causal", precision="bf16"))
    plan(recipe, gpu_memory=1, tokens=100)
    stages = [zero for _, _, _, zero in changes(recipe, 1, 0)]
    assert stages.count(0) >= 3 and 3 in stages
    assert len(batches) == 1 + stages.count(0)


@pytest.mark.parametrize(
    ("zero", "offload", "frozen", "trained", "gradients", "optimizer", "host"),
    [
        (0, "none", 1, 1, 1, 8, 0),
        (1, "none", 1, 1, 1, 12 / 4, 0),
        (2, "none", 1, 1, 1 / 4, 12 / 4, 0),
        (3, "none", 1 / 4, 1 / 4, 1 / 4, 12 / 4, 0),
        (1, "optimizer", 1, 1, 1, 0, 16 / 4),
        (2, "optimizer", 1, 1, 1 / 4, 0, 16 / 4),
        (3, "all", 0, 0, 1 / 4, 0, 16 / 4),
    ],
)
def test_zero_divides_what_its_definition_says(
    zero: int,
    offload: str,
    frozen: float,
    trained: float,
    gradients: float,
    optimizer: float,
    host: float,
) -> None:
    """Shares of 8,000 B frozen, 2,000 trained, 400 LoRA for 600 numbers on 4 processes.

    Optimizer and host in B a number.
    """
    memory = zero_memory(
        Held(8_000, 2_000, 400, 500),
        600,
        stage=zero,
        processes=4,
        offload_optimizer=offload != "none",
        offload_parameters=offload == "all",
    )
    assert (memory.frozen, memory.trained, memory.adapters) == (
        8_000 * frozen,
        2_000 * trained,
        400 * trained,
    )
    assert (memory.gradients, memory.optimizer) == (2_400 * gradients, 600 * optimizer)
    assert memory.host == 600 * host + (10_400 / 4 if offload == "all" else 0)
    assert memory.exchange == {0: 0, 3: 3_400}.get(zero, 2_400)


def test_memory_per_process_falls_with_the_stage_and_their_number() -> None:
    def needed(stage: int, processes: int) -> int:
        one = zero_memory(
            Held(2_000_000, 4_000_000, 0, 10_000), 1_000_000, stage=stage, processes=processes
        )
        return one.frozen + one.trained + one.adapters + one.gradients + one.optimizer

    for processes in (4, 16, 64):
        stages = [needed(stage, processes) for stage in range(4)]
        assert stages == sorted(stages, reverse=True) and len(set(stages)) == 4
    for stage in (1, 2, 3):
        assert needed(stage, 4) > needed(stage, 8) > needed(stage, 64)
    assert zero_memory(Held(1, 1, 1, 1), 1, stage=0, processes=1, accumulating=True).exchange == 0
    assert zero_memory(Held(1, 1, 1, 1), 1, stage=0, processes=2, accumulating=True).exchange == 4
    for stage, offloaded in ((0, {"offload_optimizer": True}), (2, {"offload_parameters": True})):
        with pytest.raises(ValueError, match=f"ZeRO-{stage}"):
            zero_memory(Held(1, 1, 1, 1), 1, stage=stage, processes=2, **offloaded)


@pytest.mark.parametrize(
    ("events", "sizes", "largest", "best"),
    [
        ((1, 2, -1, 3), (1, 1, 1), 2, 2),  # what fits exactly leaves no hole
        ((1, 2, -1, 3), (1, 1, 2), 4, 4),  # what is larger than the hole goes on top
        ((1, 2, 3, -1, -2, 4), (1, 1, 1, 2), 3, 3),  # holes side by side are one
        ((1, 2, 3, -2, -1, 4), (1, 1, 1, 2), 3, 3),
        (
            (1, 2, 3, 4, -1, -3, 5, 6),
            (3, 1, 2, 1, 2, 3),
            10,
            7,
        ),  # glibc's takes the smallest that fits, ours the lowest
        ((1, 2, -2, 3), (1, 1, 2), 3, 3),  # a hole at the end is the end
    ],
)
def test_blocks_go_where_they_fit(
    events: tuple[int, ...], sizes: tuple[int, ...], largest: int, best: int
) -> None:
    """A step that takes block n at an event n and gives it back at -n; sizes in blocks of 64 kB."""
    unit = 1 << 16
    for memory, aside, expected in ((Range(), 0, largest), (Glibc(), ASIDE, best)):
        places = {}
        for event in events:
            if event > 0:
                places[event] = memory.take(memory.taken(sizes[event - 1] * unit - aside))
            else:
                memory.give(places.pop(-event))
        assert memory.largest == expected * unit


def test_holes_are_those_of_two_steps() -> None:
    """An activation (1) below a gradient (2).

    In the second step the optimizer's states are there, where the activation was.
    """
    unit = 1 << 20
    step = Trace([1, 2, -1, -2], [0, 2 * unit, unit], ["activations", "activations", "gradients"])
    # First step: activation 0-2, gradient 2-3, states 0-2. Second: activation 2-4, gradient 4-5:
    # all of 5 are in use.
    assert holes(step, "range", accumulating=False) == 0
    longer = Trace(
        [1, 2, 3, -1, -3, -2],
        [0, 2 * unit, unit, unit],
        ["activations", "activations", "activations", "gradients"],
    )
    # Second step of it: states 0-2, activations 2-4 and 4-5, gradient 5-6.
    assert holes(longer, "range", accumulating=False) == 0
    trace = Trace(
        [1, 2, -1, 3, -3, -2],
        [0, unit, unit, 3 * unit],
        ["activations", "activations", "gradients", "activations"],
    )
    # Second step: states 0 and 2, activation 1, gradient 3; where the activation was nothing of 3
    # fits.
    assert holes(trace, "range", accumulating=False) == unit
    # With accumulation the second gradient goes where the third storage was, and is gone before it
    # comes.
    assert holes(trace, "range", accumulating=True) == unit


def test_every_device_has_holes_and_a_cpu_the_kernels_of_bf16(tiny_recipe: TinyRecipe) -> None:
    recipe = parsed(with_tune(tiny_recipe("causal", precision="bf16")))
    (cpu,), (gpu,) = plan(recipe, tokens=1000).stages, plan(recipe, gpu_memory="24GB").stages
    assert 0 < cpu.memory.holes < cpu.memory.activations + cpu.memory.logits + cpu.memory.gradients
    assert cpu.memory.kernels == KERNELS * KERNEL_BYTES
    assert gpu.memory.kernels == 0 < gpu.memory.holes
    assert gpu.memory.workspaces > 0 == cpu.memory.workspaces
    # In fp32 products are MKL's, which keeps none.
    assert plan(parsed(with_tune(tiny_recipe("causal")))).stages[0].memory.kernels == 0


def test_without_a_compiler_the_plan_counts_on_malloc(
    tiny_recipe: TinyRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    assert plan(recipe, tokens=60).allocator == "range"
    monkeypatch.setattr(native, "library", lambda name: None)
    planned = plan(recipe, tokens=60)
    assert (
        planned.allocator == "malloc"
        and plan(recipe, tokens=60, gpu_memory="1GB").allocator is None
    )
    show_plan(Console(), planned)
    assert "no C++ compiler" in capsys.readouterr().out


def test_the_optimizer_s_step_finds_all_gradients_and_no_activations() -> None:
    shares = zero_memory(Held(0, 0, 0, 0), 1_000, stage=0, processes=1)
    memory = _memory(
        np.array([900, 0, 0, 0, 0, 0, 0, 0, 100]),
        0,
        shares,
        Setting(1, 0, None, True, "none", CONTEXT),
        half=True,
    )
    assert (memory.exchange, memory.activations, memory.gradients) == (0, 0, 4_000)


def test_settings_that_exclude_each_other_are_refused(
    tiny_recipe: TinyRecipe, tmp_path: Path
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    for offload, zero, least in (("optimizer", 0, "1 or more"), ("all", 0, "3"), ("all", 2, "3")):
        with pytest.raises(RecipeError) as raised:
            plan(recipe, processes=3, offload=offload, zero=zero)
        (problem,) = raised.value.problems
        assert problem.where == "--offload"
        assert problem.message == f"{offload} needs --zero {least}, not {zero}"
    quantized = parsed(
        with_tune(with_llm(tiny_recipe("causal"), tmp_path, "causal", ", quantize: int8"))
    )
    with pytest.raises(RecipeError, match="--zero: ZeRO-3 can't shard an LLM in int8"):
        plan(quantized, processes=3, zero=3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flops_are_the_formula_s(tiny_recipe: TinyRecipe, precision: str) -> None:
    """LoRA on a decoder.

    4 T N + 6 T N_lora + 12 L h d A + 4 S d V, and 6 a weight of the connector.
    """
    recipe = parsed(with_tune(tiny_recipe("causal", precision=precision)))
    (stage,) = plan(recipe).stages
    model = built(recipe)
    apply_rules(model, recipe.tune, learning_rate=1e-3, precision=torch.float32)
    named = [
        (n, p)
        for n, p in model.llm.model.named_parameters()
        if p.ndim == 2 and "embed" not in n and "lm_head" not in n
    ]
    frozen = sum(p.numel() for n, p in named if "lora_" not in n)
    lora = sum(p.numel() for n, p in named if "lora_" in n)
    connector = sum(
        m.weight.numel() for m in model.connector.modules() if isinstance(m, torch.nn.Linear)
    )
    mean, width, vocabulary = stage.mean, 32, model.llm.head.weight.shape[0]
    expected = (
        mean.tokens * (4 * frozen + 6 * lora)
        + 12 * 2 * 32 * mean.attended
        + 4 * mean.supervised * width * vocabulary
    )
    images = mean.images * model.processor.spec.tokens_per_image
    assert stage.flops == pytest.approx(expected + 6 * images * connector, rel=0.02)


@pytest.mark.usefixtures("kernels")
def test_a_frozen_head_writes_logits_on_a_gpu_and_none_by_the_kernel(
    tiny_recipe: TinyRecipe,
) -> None:
    # Left open, a CPU caches features and a GPU runs so small a tower in every step.
    recipe = parsed(with_tune(tiny_recipe("causal", precision="bf16")), train__cache_features=True)
    (cpu,), (gpu,) = (
        plan(recipe, tokens=60).stages,
        plan(recipe, tokens=60, gpu_memory="24GB").stages,
    )
    assert cpu.memory.logits == 0 < gpu.memory.logits
    assert cpu.flops == pytest.approx(gpu.flops, rel=1e-6)


def test_advice_is_a_plan_of_its_own(tiny_recipe: TinyRecipe) -> None:
    recipe = parsed(with_tune(tiny_recipe("causal", precision="bf16")))
    planned = plan(recipe, gpu_memory=1, tokens=100)
    assert planned.fits is False
    changed = [advice for advice in planned.advice if advice.changes]
    assert len(changed) >= 2
    for advice in changed:
        values = dict(change.split("=") for change in advice.changes)
        again = parsed(
            with_tune(tiny_recipe("causal", precision="bf16")),
            **{k.replace(".", "__"): json.loads(v) for k, v in values.items()},
        )
        assert plan(again, gpu_memory=1, tokens=100).needed == advice.needed < planned.needed
    assert plan(recipe, gpu_memory="1TB", tokens=100).fits is True


def test_advice_reaches_stages_that_set_what_it_changes(tiny_recipe: TinyRecipe) -> None:
    stages = "stages:\n  - {name: one, train: {batch_size: 8}}\n  - {name: two}\n"
    planned = plan(parsed(tiny_recipe("causal") + stages), gpu_memory=1, tokens=100)
    (halved,) = [advice for advice in planned.advice if advice.text.startswith("half")]
    assert halved.changes == [
        "train.batch_size=2",
        "train.gradient_accumulation=2",
        "stages.0.train.batch_size=4",
    ]


def test_nothing_but_configs_is_read(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    """A 7B model of a folder that holds config.json alone, with its tokenizer missing.

    The real sizes, from max_length.
    """
    text = with_llm(
        tiny_recipe("causal", precision="bf16"),
        CONFIGS / "vicuna-7b-v1.5",
        "causal",
        ", quantize: nf4",
    )
    text = with_tower(
        with_tune(text), f"{{kind: transformers, name: {CONFIGS / 'clip-vit-large-patch14-336'}}}"
    )
    (stage,) = plan(parsed(text.replace("max_length: 128", "max_length: 1024"))).stages
    tower, _, llm = stage.parts
    assert llm.total - llm.adapters == 6_738_415_616
    assert 285_000_000 < tower.total < 305_000_000
    linears = 6_738_415_616 - 2 * 32000 * 4096 - 65 * 4096
    assert llm.bytes == pytest.approx(
        linears * (0.5 + 4 / 64) + (2 * 32000 + 65) * 4096 * 2 + 4 * llm.adapters, rel=1e-5
    )
    assert stage.source.startswith("max_length")
    assert stage.peak.length == 1024


def test_nf4_bytes_are_those_of_bitsandbytes(tiny_recipe: TinyRecipe, tmp_path: Path) -> None:
    base = parsed(tiny_recipe("causal", precision="bf16"))
    folder = save_llm(
        tmp_path / "llm",
        "causal",
        rows_of(base),
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=2,
    )
    recipe = parsed(
        with_tune(
            with_llm(tiny_recipe("causal", precision="bf16"), folder, "causal", ", quantize: nf4")
        )
    )
    (bare, _), real = bare_model(recipe), built(recipe)
    for name, module in real.llm.model.named_modules():
        if type(module).__name__ == "Linear4bit":
            stand_in = bare.llm.model.get_submodule(name)
            state = module.weight.quant_state
            assert stand_in.weight.nbytes == module.weight.nbytes
            assert stand_in.scales.nbytes == state.absmax.nbytes


def test_dora_over_packed_weights_is_planned_and_not_offered_shards(
    tiny_recipe: TinyRecipe, tmp_path: Path
) -> None:
    """DoRA asks a layer for its whole weight, which the engines that shard have packed."""
    base = parsed(tiny_recipe("causal", precision="bf16"))
    folder = save_llm(tmp_path / "llm", "causal", rows_of(base))
    text = with_llm(tiny_recipe("causal", precision="bf16"), folder, "causal", ", quantize: nf4")
    dora = parsed(with_tune(text, LORA_TUNE.replace("r: 4,", "r: 4, variant: dora,")))
    lora = parsed(with_tune(text))
    states = [plan(recipe, tokens=100).stages[0].memory.optimizer for recipe in (dora, lora)]
    assert states[0] > states[1]  # DoRA's magnitudes train too
    stages = [{stage for *_, stage in changes(recipe, 1, 0)} for recipe in (dora, lora)]
    assert stages == [{0, 2}, {0, 2, 3}]


def test_lengths_come_from_the_data_where_it_is_there(tiny_recipe: TinyRecipe) -> None:
    recipe = parsed(tiny_recipe("causal"))
    read, given = plan(recipe).stages[0], plan(recipe, tokens=77).stages[0]
    assert "batches of the data" in read.source
    assert read.peak.length < recipe.data.max_length
    assert read.feature_cache > 0
    assert (given.peak.length, given.source) == (77, "--tokens 77")


def test_longest_batch_supervises_text_and_no_image(tiny_recipe: TinyRecipe) -> None:
    recipe = parsed(tiny_recipe("causal"))
    batch = longest_batch(recipe, bare_model(recipe)[0].processor.spec, 50)
    assert ((batch.labels == IGNORE_INDEX) == batch.image_mask).all()


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_completions_that_will_be_sampled_are_planned_for(
    tiny_recipe: TinyRecipe, kind: str
) -> None:
    """As many and as long as the objective says, beside each other after one prompt."""
    changes: Any = {
        "objective": {"kind": "grpo", "num_generations": 3, "max_completion_length": 20},
        "train__batch_size": 2,
    }
    tuned = parsed(with_tune(tiny_recipe(kind)), **changes)
    plain = parsed(with_tune(tiny_recipe(kind)), train__batch_size=2)
    for tokens in (None, 50):
        sampled, read = (plan(each, tokens=tokens).stages[0].peak for each in (tuned, plain))
        assert sampled.supervised == 2 * 3 * 20 > read.supervised
        assert sampled.rows == read.rows == 2
    assert plan(tuned).stages[0].memory.activations > plan(plain).stages[0].memory.activations


def test_attended_positions_of_branches_are_those_of_their_mask(tiny_recipe: TinyRecipe) -> None:
    changes: Any = {"objective": {"kind": "grpo", "num_generations": 3, "max_completion_length": 4}}
    recipe = parsed(with_tune(tiny_recipe("causal")), **changes)
    batch = longest_batch(recipe, bare_model(recipe)[0].processor.spec, 10)
    assert batch.visible_until is not None
    mask = tree_mask(batch.visible_until) & batch.attention_mask[:, None, :, None]
    assert work_of(batch).attended == int(mask.sum())


def test_a_name_without_a_config_and_a_size_that_is_none_are_told(
    tiny_recipe: TinyRecipe, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="config"):
        plan(parsed(with_llm(tiny_recipe("causal"), tmp_path / "empty", "causal")), tokens=50)
    assert (parse_size("24GB"), parse_size("1.5 GiB")) == (24 * 10**9, 3 * 2**29)
    for text in ("much", "GB", "24XB"):
        with pytest.raises(RecipeError, match="gpu-memory"):
            parse_size(text)


def test_command_prints_the_plan_and_ends_with_5_where_it_does_not_fit(
    tiny_recipe: TinyRecipe, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny_recipe("causal"))
    assert "optimizer (AdamW)" in cli("plan", str(path))
    report = json.loads(
        cli(
            "plan",
            str(path),
            "--json",
            "--gpu-memory",
            "1MB",
            "--processes",
            "2",
            "--zero",
            "2",
            code=5,
        )
    )
    assert report["fits"] is False
    assert report["advice"]
    assert report["stages"][0]["memory"]["exchange"] > 0


# --- steps and time ----------------------------------------------------------------------------


def test_steps_are_those_of_the_run_and_time_follows_from_a_measured_rate(
    tiny_recipe: Callable[..., str],
) -> None:
    recipe = parsed(tiny_recipe("causal"), train__steps=None, train__epochs=3, train__batch_size=4)
    planned = plan(recipe)
    stage = planned.stages[0]
    assert stage.steps == 6  # eight rows, four a batch, three times
    assert (
        planned.machine is not None
        and planned.machine.rate > 0
        and "no GPU" in " ".join(planned.machine.lacks)
    )
    least, most = planned.time(stage) or (0.0, 0.0)
    assert least == pytest.approx(6 * stage.flops / planned.machine.rate) and most == pytest.approx(
        5 * least
    )
    assert planned.summary()["stages"][0]["time"] == (least, most)


def test_no_time_is_told_of_another_machine_or_of_rows_that_are_not_known(
    tiny_recipe: Callable[..., str],
) -> None:
    recipe = parsed(tiny_recipe("causal"), train__steps=None, train__epochs=3)
    elsewhere = plan(recipe, gpu_memory="24GB", tokens=32)
    assert (
        elsewhere.machine is None
        and elsewhere.stages[0].steps is None
        and elsewhere.time(elsewhere.stages[0]) is None
    )


# --- a GPU -------------------------------------------------------------------------------------


def test_a_plan_for_a_gpu_is_the_same_on_a_machine_that_has_one(
    tiny_recipe: TinyRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parsed(with_tune(tiny_recipe("causal", precision="bf16")))
    elsewhere = plan(recipe, gpu_memory="24GB", processes=2, tokens=60)
    assert elsewhere.stages[0].memory.collectives == COLLECTIVES
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    here = plan(recipe, processes=2, tokens=60)
    assert here.device == "gpu"
    assert here.stages[0].memory == elsewhere.stages[0].memory
    assert here.stages[0].flops == elsewhere.stages[0].flops


def test_functions_that_cuda_s_autocast_widens_are_those_of_torch() -> None:
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    text = header.read_text()

    def listed(name: str) -> set[str]:
        part = re.search(rf"#define {name}\(_\)(.*?)\n\n", text, re.DOTALL)
        assert part is not None
        return set(re.findall(r"_\((\w+)", part[1]))

    widened = {name for name in listed("AT_FORALL_FP32") if "upsample" not in name}
    assert len(widened) > 30 and widened <= WIDENED
    assert listed("AT_FORALL_FP32_SET_OPT_DTYPE") <= SUMMED | WIDENED
    # All that a CPU's autocast, which is active too, casts to 16 bits. Recurrent cells and
    # quantised products are in neither tower nor LLM.
    products = {"linear", "matmul", "bmm", "conv2d", "addmm", "scaled_dot_product_attention"}
    assert products <= listed("AT_FORALL_LOWER_PRECISION_FP")


def test_autocast_by_cuda_s_rules_widens_norms_and_sums_and_no_products() -> None:
    layer = torch.nn.Linear(8, 8)
    norm = torch.nn.LayerNorm(8, dtype=torch.bfloat16)
    x = torch.ones(2, 8, dtype=torch.bfloat16, requires_grad=True)

    def widths(y: torch.Tensor) -> list[torch.dtype]:
        outputs = (layer(y), norm(y), y.softmax(-1), y.sum(), y**2, norm(y).relu(), y + y)
        return [output.dtype for output in outputs]

    half, full = torch.bfloat16, torch.float32
    with cuda_autocast(half):
        assert widths(x) == [half, full, full, full, full, full, half]
        assert x.softmax(-1, dtype=half).dtype == half
        with torch.autocast("cpu", enabled=False):
            assert norm(x).dtype == half
    with cuda_autocast(full):
        assert norm(x).dtype == half
    seen: list[torch.dtype] = []

    def block(y: torch.Tensor) -> torch.Tensor:
        seen.append(norm(y).dtype)
        return layer(norm(y))

    with cuda_autocast(half):
        # Recomputed in the backward pass by the same rules.
        checkpoint(block, x, use_reentrant=False, context_fn=recomputed).sum().backward()
    assert seen == [full, full]


def test_pytorch_s_cuda_allocator_cuts_blocks_from_segments() -> None:
    unit = 1 << 20
    memory = Caching()
    small = [memory.take(1000), memory.take(1)]
    assert memory.largest == 2 * unit and memory.fullest == 1001
    medium = memory.take(3 * unit)
    assert memory.largest == 22 * unit  # what is left of its 20 MiB is there for others
    other = memory.take(9 * unit)
    assert memory.largest == 22 * unit
    memory.take(10 * unit + 1)
    assert memory.largest == (22 + 12) * unit  # its own segment, in steps of 2 MiB
    for place in (medium, other):
        memory.give(place)
    assert memory.take(20 * unit)[0] == medium[0]  # free neighbours were joined
    assert memory.largest == 34 * unit
    for place in small:
        memory.give(place)
    assert memory.take(unit)[0] == small[0][0]
    # Nothing of less than 1 MiB is cut off a large block.
    memory.give((medium[0], 0))
    memory.take(19 * unit + 512)
    memory.take(2 * unit)  # 512 bytes more than is left of the segment of 12 MiB
    assert memory.largest == 54 * unit


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (None, 2 * 32 << 20),
        (":4096:8", 2 * 32 << 20),
        (":4096:2:16:8", 2 * (8192 + 128) << 10),
        (":0:0", 0),
        ("much", 2 * 32 << 20),
    ],
)
def test_cublas_workspaces_are_those_of_the_environment(
    text: str | None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if text is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", text)
    assert workspaces() == size


def test_a_gpu_is_warmed_up_and_timed_by_its_own_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products take 5 ms, and 100 ms until the clock has risen; launches take no time of it."""
    clock = [0.0]
    calls = [0]
    waits: list[int] = []

    class Event:
        at = 0.0

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

        def synchronize(self) -> None:
            waits.append(calls[0])

    def product() -> None:
        calls[0] += 1
        clock[0] += 100 if calls[0] <= machine.WARM_UP else 5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(calls[0]))
    times = machine.gpu_times(product)
    assert set(times) == {0.005} and sum(times) >= machine.MEASURING
    # The host waits once after the warm-up and once a block, not for each product.
    assert waits == [machine.WARM_UP + block * machine.BLOCK for block in range(len(waits))]


def test_a_plan_says_why_features_are_cached(
    tiny_recipe: TinyRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = parsed(tiny_recipe("causal"), train__steps=None, train__epochs=1)
    show_plan(Console(), plan(recipe))
    assert "no step runs the tower" in capsys.readouterr().out
    (stage,) = plan(parsed(tiny_recipe("causal"), data__augment={"flip": 0.5})).stages
    assert not stage.cached and stage.why_cached == "images are augmented"
