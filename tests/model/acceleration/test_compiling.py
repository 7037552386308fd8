"""Compiled blocks compute what the written ones compute.

They do for every shape by one graph, and only while training.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tests.helpers.pretended_gpu import CUDA, pretended
from tests.helpers.tiny_architectures import tiny
from tests.helpers.tiny_models import (
    LORA_TUNE,
    assert_close,
    batch_of,
    built,
    loss_and_gradients,
    parsed,
    rows_of,
    tuned_by,
    wake_adapters,
    with_tune,
)
from vlm_tune.data.batch import Batch
from vlm_tune.generation.continuing import Continuation
from vlm_tune.generation.picking import Picker
from vlm_tune.kernels import devices
from vlm_tune.model.acceleration.compiling import blocks, compiled, eager, reading, why_not
from vlm_tune.model.acceleration.lora_layers import merge_projections
from vlm_tune.model.language import kv_cache
from vlm_tune.model.language.attention import MaskedAttention, StaticPrefill
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.causal import CausalLLM
from vlm_tune.model.language.decoding import Decoding


def ready(text: str) -> Any:
    recipe = parsed(text)
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    merge_projections(model)
    return model.train()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "backend", "operator", "checkpointing"),
    [
        ("causal", "inductor", True, False),
        ("seq2seq", "aot_eager", True, False),
        ("causal", "aot_eager", False, True),
    ],
)
def test_compiled_blocks_are_exact_for_every_shape_by_few_graphs(
    kind: str,
    backend: str,
    operator: bool,
    checkpointing: bool,
    tiny_recipe: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """T5 is traced and differentiated as for the compiler, but not compiled.

    Its five graphs would take minutes. Without the operators the LoRA layers are traced through, as
    on a GPU.
    """
    if not operator:
        monkeypatch.setattr(devices, "by_operator", lambda device: False)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    text = with_tune(tiny_recipe(kind), LORA_TUNE)
    model = ready(text)
    examples = [
        example for row in rows_of(parsed(text)) for example in model.processor.examples(row)
    ]
    batches = [batch_of(model, examples[:size]) for size in (2, 3, 5)]
    wanted = [loss_and_gradients(model, [batch]) for batch in batches]
    counters.clear()
    torch._dynamo.reset()
    if checkpointing:
        model.llm.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    with compiled(blocks(model.llm, training=True)):
        with eager():
            loss_and_gradients(model, batches[:1])
        assert not counters["stats"]["unique_graphs"]
        for batch, (loss, gradients) in zip(batches, wanted, strict=True):
            compiled_loss, theirs = loss_and_gradients(model, [batch])
            assert float((compiled_loss - loss).abs() / loss.abs()) <= 1e-5
            assert_close(theirs, gradients, 1e-5)
    # Blocks that are alike share theirs: the first and the other ones of T5's two stacks differ.
    assert 1 <= counters["stats"]["unique_graphs"] <= (1 if kind == "causal" else 5)
    assert not counters["graph_break"]
    counters.clear()
    loss_and_gradients(model, batches[:1])
    assert not counters["stats"]["calls_captured"]


def test_forward_is_compiled_within_a_blocks_hooks_and_not_beside_a_growing_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Layer(nn.Module):
        def forward(self, x: torch.Tensor, cache: DynamicCache | None = None) -> torch.Tensor:
            traced.append(torch.compiler.is_compiling())
            return x + 1

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    traced: list[bool] = []
    hooked: list[bool] = []
    layer = Layer()
    layer.register_forward_pre_hook(lambda *_: hooked.append(torch.compiler.is_compiling()))
    x = torch.zeros(2, 3, 4)
    with compiled([layer]):
        layer(x, DynamicCache())
        assert traced == [False]
        layer(x)
    layer(x)
    assert traced == [False, True, False]
    assert hooked == [False, False, False]


class _Static(MaskedAttention):
    """Attention as on a GPU."""

    def prefill(self, *args: Any) -> StaticPrefill:
        return StaticPrefill(*args)


def test_decode_steps_of_a_static_cache_are_compiled_to_one_graph_for_all_layers_and_caches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = CausalLLM(tiny(LlamaConfig, LlamaForCausalLM, "causal").eval())
    llm.attention = _Static()
    # The caches grow in answers of more than five tokens.
    monkeypatch.setattr(kv_cache, "ROOM", 5)

    def answers(rows: int, length: int, branches: int, new_tokens: int) -> list[Any]:
        ids = torch.arange(rows * length).view(rows, length) * 7 % 90 + 3
        batch = Batch(
            ["a"] * rows,
            ids,
            torch.ones_like(ids, dtype=torch.bool),
            torch.zeros_like(ids, dtype=torch.bool),
            ids,
            ids[:0, 0],
            positions=torch.arange(length).expand(rows, -1),
            visible_until=torch.full((rows, length), length),
        )
        leaves = torch.arange(length - branches, length).expand(rows, -1)
        picker = Picker(llm, Decoding(new_tokens), [], None, torch.device("cpu"))
        with torch.inference_mode():
            prefilled = llm.branches(llm.embed(ids), batch, leaves, new_tokens)
        continuation = Continuation(prefilled, picker, [2], new_tokens)
        assert list(continuation.run(look_every=16))
        return continuation.ids.tolist()

    shapes = [(2, 11, 3, 8), (3, 13, 3, 20), (4, 9, 2, 12), (2, 30, 5, 6)]
    expected = [answers(*shape) for shape in shapes]
    graphs = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    torch._dynamo.reset()
    for number, shape in enumerate(shapes):
        with compiled(blocks(llm, training=False)):
            assert answers(*shape) == expected[number]
        # The second one shows which sizes differ, and its graph is for all.
        assert graphs.frame_count == min(number + 1, 2)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_answers_are_compiled_on_a_gpu_where_their_cache_has_a_fixed_size(
    kind: str, tiny_recipe: Callable[..., str]
) -> None:
    llm = built(parsed(tiny_recipe(kind))).llm
    with pretended(llm, CUDA):
        for setting, compiles in ((False, False), (True, kind == "causal"), ("auto", False)):
            with reading(llm, setting, questions=1):
                chosen = blocks(llm, training=False)
                assert {"forward" in vars(block) for block in chosen} == {compiles}


def test_small_models_short_stages_and_machines_without_a_compiler_stay_eager(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm: LanguageModel = built(parsed(tiny_recipe("causal"))).llm
    assert why_not(llm, "auto", 10_000) == ""
    assert why_not(llm, False, 10_000) == ""
    assert why_not(llm, True, 1) is None
    monkeypatch.setattr("vlm_tune.model.acceleration.compiling.LARGE", 1)
    assert why_not(llm, "auto", 10_000) is None
    assert why_not(llm, "auto", 10) == ""
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no C++ compiler" in (why_not(llm, True, 1) or "")
