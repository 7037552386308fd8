"""Quantised language models.

What is packed, that LoRA trains on it, and that merging goes into the 16-bit base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import (
    LORA_TUNE,
    assert_close,
    assert_same_bits,
    batch_of,
    built,
    interrupted,
    largest,
    loss_and_gradients,
    parsed,
    rows_of,
    save_llm,
    tuned_by,
    wake_adapters,
    with_llm,
    with_tune,
)
from vlm_tune.api import sft
from vlm_tune.errors import ModelError
from vlm_tune.events import TrainSteps
from vlm_tune.exporting.merge import merge
from vlm_tune.exporting.verify import observe
from vlm_tune.kernels import devices
from vlm_tune.model.acceleration.lora_layers import LoraLinear, merge_projections
from vlm_tune.model.checkpoint import load_model

SIZES = {
    "causal": {"hidden_size": 64, "intermediate_size": 128},
    "seq2seq": {"d_model": 64, "d_kv": 32, "d_ff": 128},
}


@pytest.fixture
def quantized(tiny_recipe: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """Text of a recipe that trains LoRA on a quantised Llama or T5 of random weights."""

    def make(quantize: str, kind: str = "causal", precision: str = "bf16") -> str:
        text = tiny_recipe(kind, precision=precision)
        folder = save_llm(tmp_path / kind, kind, rows_of(parsed(text)), **SIZES[kind])
        return with_tune(with_llm(text, folder, kind, f", quantize: {quantize}"), LORA_TUNE)

    return make


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_only_the_blocks_are_packed(
    quantize: str, kind: str, quantized: Callable[..., str]
) -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    recipe = parsed(quantized(quantize, kind))
    model = built(recipe)
    tuned_by(model, recipe)
    packed_kind = Linear8bitLt if quantize == "int8" else Linear4bit
    packed = {name for name, module in model.named_modules() if isinstance(module, packed_kind)}
    linears = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert packed == {name for name in linears if ".layers." in name or ".block." in name} & packed
    assert len(packed) >= 14
    assert not any(
        name.startswith(("tower.", "connector.")) or "lm_head" in name for name in packed
    )
    head: Any = model.llm.head
    assert type(head) is torch.nn.Linear
    assert head.weight.dtype == torch.bfloat16
    whole = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dtype in (torch.uint8, torch.int8)
    }
    assert {name.removesuffix(".weight").removesuffix(".base_layer") for name in whole} == {
        name.removesuffix(".base_layer") for name in packed
    }
    assert not any(parameter.requires_grad for parameter in whole.values())
    assert {p.dtype for p in model.tower.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.connector.parameters()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}


def test_the_table_counts_packed_weights_as_what_they_stand_for(
    quantized: Callable[..., str],
) -> None:
    text = quantized("nf4")
    packed, plain = parsed(text), parsed(text.replace(", quantize: nf4", ""))
    tables = [tuned_by(built(recipe), recipe).table for recipe in (packed, plain)]
    assert tables[0] == tables[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_lora_trains_and_merges_into_the_16_bit_base(
    quantize: str, kind: str, quantized: Callable[..., str], tmp_path: Path
) -> None:
    recipe = parsed(
        quantized(quantize, kind),
        train__steps=40,
        train__learning_rate=5e-3,
        train__log_every=1,
        evaluate__every=40,
    )
    losses = []
    run = sft(
        recipe,
        show=lambda event: losses.append(event.loss) if isinstance(event, TrainSteps) else None,
    )
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.85 * losses[0]
    assert sorted(path.name for path in (run.folder / "model").iterdir() if path.is_dir()) == [
        "adapter"
    ]
    report = merge(run.folder, tmp_path / "merged", dtype="bf16")
    assert f"(the run was {quantize})" in report.base
    assert "bf16" in report.base
    assert 0 <= report.difference_to_adapter <= 2e-2 < report.difference_to_base
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.llm.quantize is None
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    adapted = load_model(run.folder, dtype=torch.bfloat16, quantize=False).float()
    rows = rows_of(recipe)
    assert largest(observe(merged, rows)[0], observe(adapted, rows)[0]) <= 2e-2


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_evaluation_leaves_the_gradients_as_they_were(
    quantize: str, quantized: Callable[..., str]
) -> None:
    """bitsandbytes repacks 4-bit weights for a CPU at the first pass in eval mode.

    The packed kernel has no gradient.
    """
    recipe = parsed(quantized(quantize, precision="fp32"))
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    rows = rows_of(recipe)
    batch = batch_of(model, [example for row in rows for example in model.processor.examples(row)])
    model.train()
    _, before = loss_and_gradients(model, [batch])
    observe(model, rows)
    model.train()
    _, after = loss_and_gradients(model, [batch])
    assert any(float(value.abs().max()) > 1e-4 for value in before.values())
    assert_close(before, after)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_run_resumes_bit_for_bit(
    quantize: str, quantized: Callable[..., str], tmp_path: Path
) -> None:
    text = quantized(quantize).replace("r: 4,", "r: 4, lora_dropout: 0.1,")
    whole = sft(parsed(text, output=str(tmp_path / "whole")))
    recipe = parsed(text, output=str(tmp_path / "parts"), train__log_every=1)
    interrupted(lambda show: sft(recipe, show=show), stage=0, step=2)
    parts = sft(recipe, resume=True)
    assert_same_bits(whole.folder / "model", parts.folder / "model")
    config = json.loads((parts.folder / "model" / "config.json").read_text())
    assert config["model"]["llm"]["quantize"] == quantize


def test_a_stage_that_would_merge_into_packed_weights_is_refused(
    quantized: Callable[..., str],
) -> None:
    recipe = parsed(quantized("nf4"))
    model = built(recipe)
    tuned_by(model, recipe)
    other = parsed(quantized("nf4").replace("r: 4", "r: 8"))
    with pytest.raises(ModelError, match="can't be merged into quantised weights"):
        tuned_by(model, other)


def test_a_head_of_another_name_is_not_packed(
    quantized: Callable[..., str], tmp_path: Path
) -> None:
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    text = quantized("nf4")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "causal")
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    tokenizer.save_pretrained(tmp_path / "neox")
    model = built(parsed(text.replace(str(tmp_path / "causal"), str(tmp_path / "neox"))))
    packed = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(packed) == 8
    assert type(model.llm.head) is torch.nn.Linear


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_variants_train_on_packed_weights(variant: str, quantized: Callable[..., str]) -> None:
    recipe = parsed(quantized("fp4").replace("r: 4,", f"r: 4, variant: {variant},"))
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    model.train()
    batch = batch_of(
        model, [example for row in rows_of(recipe) for example in model.processor.examples(row)]
    )
    with torch.autocast("cpu", torch.bfloat16):
        _, gradients = loss_and_gradients(model, [batch])
    assert all(float(value.abs().sum()) for name, value in gradients.items() if "lora_" in name)
    assert any("lora_" in name for name in gradients)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize(("quantize", "operator"), [("nf4", True), ("fp4", True), ("nf4", False)])
def test_fused_layers_on_packed_weights_compute_what_pefts_do(
    quantize: str,
    operator: bool,
    kind: str,
    quantized: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = parsed(quantized(quantize, kind, precision="fp32"))
    if not operator:
        monkeypatch.setattr(devices, "by_operator", lambda device: False)

    def step(*, fused: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = built(recipe)
        tuned_by(model, recipe)
        wake_adapters(model)
        if fused:
            assert merge_projections(model) > 0
            layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
            assert layers and all(layer.packed for layer in layers)
        examples = [example for row in rows_of(recipe) for example in model.processor.examples(row)]
        return loss_and_gradients(model.train(), [batch_of(model, examples)])

    fused_loss, gradients = step(fused=True)
    loss, wanted = step(fused=False)
    assert float((fused_loss - loss).abs() / loss) <= 1e-5
    assert_close(gradients, wanted, 1e-4)
