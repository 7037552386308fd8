"""The whole model on a pretended GPU: no operator mixes devices, and outputs are a CPU's.

The last test runs the same comparison on a real GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.connector_kinds import KINDS, READS_TEXT, Tiny, with_connector
from tests.helpers.pretended_gpu import CUDA, META, PretendedTensor, pretended
from tests.helpers.tiny_architectures import tiny
from tests.helpers.tiny_models import (
    LORA_TUNE,
    assert_close,
    batch_of,
    built,
    loss_and_gradients,
    parsed,
    rows_of,
    save_llm,
    tuned_by,
    wake_adapters,
    with_llm,
    with_tune,
)
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.tune import TuneRule
from vlm_tune.data.batch import Batch
from vlm_tune.data.batching.collate import Fetch, collate
from vlm_tune.data.packing import pack_layout, trees
from vlm_tune.data.types import Example
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.acceleration.install import uninstall
from vlm_tune.model.acceleration.lora_layers import merge_projections
from vlm_tune.model.feature_cache import tower_features
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.language.registry import LLMS
from vlm_tune.model.tuning import apply_rules

both_llms = pytest.mark.parametrize("llm", ["causal", "seq2seq"])
WIDE = {
    "causal": {"hidden_size": 64, "intermediate_size": 128},
    "seq2seq": {"d_model": 64, "d_kv": 32, "d_ff": 128},
}
"""Widths that blocks of quantised weights divide."""
QUESTIONS = 3
"""Two about one image, which branch from one prefill where the model allows it, and a third."""


def examples_of(model: VisionLanguageModel, recipe: Recipe) -> list[Example]:
    rows = rows_of(recipe)[:QUESTIONS]
    return [example for row in rows for example in model.processor.examples(row)]


def on(batch: Batch, device: torch.device) -> Batch:
    """A copy of the batch, moved as the trainer moves it."""
    return replace(batch).to(device)


def answers(
    model: VisionLanguageModel, recipe: Recipe, *, features: Fetch | None = None, beams: int = 1
) -> list[str]:
    return answer_prompts(
        model,
        model.processor.prompts(rows_of(recipe)[:QUESTIONS]),
        Decoding(2, beams),
        fetch=features or model.processor.images.inputs,
        cached=features is not None,
    )


def gradients_on_meta(model: VisionLanguageModel, batch: Batch) -> dict[str, torch.Tensor]:
    """The gradients of a batch on the pretended device `meta`, which a model must be on."""
    outcome: Any = model(on(batch, META))
    outcome.sum.backward()
    return {
        name: parameter.grad.host
        for name, parameter in model.named_parameters()
        if isinstance(parameter.grad, PretendedTensor)
    }


def assert_same_passes(
    model: VisionLanguageModel,
    batches: Sequence[Batch],
    *,
    copies_indices: bool = False,
    relative: float = 1e-4,
) -> None:
    """Asserts that losses and gradients of batches are the same on a GPU as on the CPU.

    The pretended GPU has no kernels for the CPU, so the CPU does without them too.
    """
    uninstall(model.llm)
    for batch in batches:
        loss, gradients = loss_and_gradients(model, [batch])
        assert gradients
        with pretended(model, META, copies_indices=copies_indices):
            other = gradients_on_meta(model, batch)
        assert_close(other, gradients, relative)
        with pretended(model, CUDA, copies_indices=copies_indices), torch.no_grad():
            outcome = model(on(batch, CUDA))
            assert outcome.sum.device == CUDA
            assert float(outcome.sum) == pytest.approx(float(loss), rel=1e-5)


def test_a_mixture_of_devices_is_seen() -> None:
    with pretended(nn.Module(), CUDA):
        x = torch.arange(6.0, device="cuda").view(2, 3)
        assert x.device == CUDA
        assert (x * torch.tensor(2.0)).tolist() == [[0, 2, 4], [6, 8, 10]]  # as CUDA allows it
        assert torch.zeros(2).to("cuda").cpu().device.type == "cpu"
        assert torch.tensor([[1]], device="cuda").device == CUDA
        for mixed in (
            lambda: x + torch.ones(3),
            lambda: x[torch.tensor([0])],
            lambda: x.masked_fill(torch.ones(2, 3, dtype=torch.bool), 0),
            lambda: torch.cat([x, torch.ones(2, 3)]),
        ):
            with pytest.raises(RuntimeError, match="from the host"):
                mixed()


@pytest.mark.parametrize("kind", KINDS)
@both_llms
def test_every_connector_trains_and_answers(kind: str, llm: str, tiny_recipe: Tiny) -> None:
    recipe = parsed(with_connector(tiny_recipe(llm), kind))
    model = built(recipe).eval()
    expected = answers(model, recipe)
    with pretended(model, CUDA):
        assert answers(model, recipe) == expected
    assert_same_passes(model, [batch_of(model, examples_of(model, recipe))])


@both_llms
def test_cached_features_train_and_answer_by_beams(
    llm: str, tiny_recipe: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Copies have ended when they return.
    done = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: done)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    recipe = parsed(tiny_recipe(llm))
    model = built(recipe).eval()
    examples = examples_of(model, recipe)
    media = [item for each in examples for item in each.media]
    features = tower_features(model, media)
    expected = answers(model, recipe, features=features, beams=2)
    with pretended(model, CUDA):
        computed_there = tower_features(model, media)
        assert answers(model, recipe, features=computed_there, beams=2) == expected
    cached = collate(examples, model.processor.spec, fetch=features, cached=True)
    assert_same_passes(model, [cached])


@both_llms
def test_adapters_answer(llm: str, tiny_recipe: Tiny) -> None:
    recipe = parsed(with_tune(tiny_recipe(llm), LORA_TUNE))
    model = built(recipe).eval()
    tuned_by(model, recipe)
    wake_adapters(model)
    expected = answers(model, recipe)
    with pretended(model, CUDA):
        assert answers(model, recipe) == expected


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "null"])
@both_llms
def test_adapters_over_any_weights_train_and_answer(
    quantize: str, llm: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """Codes and scales are dequantised where they are; projections of one input are one product."""
    text = tiny_recipe(llm)
    folder = save_llm(tmp_path / "base", llm, rows_of(parsed(text)), **WIDE[llm])
    recipe = parsed(with_tune(with_llm(text, folder, llm, f", quantize: {quantize}"), LORA_TUNE))
    model = built(recipe).eval()
    tuned_by(model, recipe)
    wake_adapters(model)
    uninstall(model.llm)
    expected = answers(model, recipe)
    batch = batch_of(model, examples_of(model, recipe))
    loss, gradients = loss_and_gradients(model, [batch])
    with pretended(model, META):
        merge_projections(model)
        other = gradients_on_meta(model, batch)
    assert_close(other, gradients, 1e-4)
    with pretended(model, CUDA):
        merge_projections(model)
        assert answers(model, recipe) == expected
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            outcome = model(on(batch, CUDA))
    assert float(outcome.sum) == pytest.approx(float(loss), rel=1e-2)


@both_llms
def test_joined_rows_train(llm: str, tiny_recipe: Tiny) -> None:
    recipe = parsed(tiny_recipe(llm))
    model = built(recipe).eval()
    examples = examples_of(model, recipe)
    joined = [pack_layout(examples, llm)]
    if llm == "causal":
        joined += [tree.row for tree in trees(examples[:2], 1024)]
        assert len(joined) == 2
    assert_same_passes(model, [batch_of(model, [row]) for row in joined])


@both_llms
@pytest.mark.parametrize("how", ["prompt", "prefix"])
def test_virtual_tokens_train_and_answer(how: Any, llm: str, tiny_recipe: Tiny) -> None:
    recipe = parsed(tiny_recipe(llm))
    model = built(recipe).eval()
    rules = [TuneRule(match="llm.*", how=how, tokens=3), TuneRule(match="*", how="frozen")]
    apply_rules(model, rules, learning_rate=1e-3, precision=torch.float32)
    expected = answers(model, recipe)
    with pretended(model, CUDA):
        assert answers(model, recipe) == expected
    assert_same_passes(model, [batch_of(model, examples_of(model, recipe))])


@both_llms
def test_virtual_tokens_are_made_where_the_model_is(llm: str, tiny_recipe: Tiny) -> None:
    model = built(parsed(tiny_recipe(llm)))
    rules = [TuneRule(match="llm.*", how="prefix", tokens=3), TuneRule(match="*", how="frozen")]
    with pretended(model, CUDA):
        apply_rules(model, rules, learning_rate=1e-3, precision=torch.float32)
        assert model.llm.prompt is not None
        assert model.llm.prompt.values.device == CUDA


@pytest.mark.parametrize("kind", ["mlp", "cross_attention", *READS_TEXT])
@both_llms
def test_a_model_answers_as_it_was_trained(kind: str, llm: str, tiny_recipe: Tiny) -> None:
    """Its connector is in fp32 beside a tower and an LLM in bf16, and there is no autocast."""
    recipe = parsed(with_connector(tiny_recipe(llm), kind))
    model = built(recipe).eval()
    model.tower.bfloat16()
    model.llm.bfloat16()
    assert len(answers(model, recipe)) == QUESTIONS
    with torch.no_grad():
        loss: Any = model(batch_of(model, examples_of(model, recipe)))
    assert torch.isfinite(loss.sum)


@pytest.mark.parametrize("name", ["Bart", "Gemma", "OPT"])
def test_how_logits_are_computed_is_found_out_on_a_gpu(name: str) -> None:
    """A quantised language model is there when its head and embedding are probed.

    Bart adds a buffer to its logits, Gemma scales and OPT places its embeddings.
    """
    import transformers

    layout = "seq2seq" if name == "Bart" else "causal"
    kind = {"Bart": "ForConditionalGeneration"}.get(name, "ForCausalLM")
    model = tiny(
        getattr(transformers, f"{name}Config"), getattr(transformers, name + kind), layout
    ).eval()
    expected = LLMS[layout](model)
    with pretended(model, CUDA):
        llm = LLMS[layout](model)
        assert llm.rule == expected.rule
        assert llm.factor == expected.factor
        llm.check()


# --- on a real GPU -----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@both_llms
def test_losses_and_gradients_of_a_gpu_are_those_of_a_cpu(
    kind: str, llm: str, tiny_recipe: Callable[..., str]
) -> None:
    recipe = parsed(with_connector(tiny_recipe(llm), kind))
    model = built(recipe).eval()
    batch = batch_of(model, examples_of(model, recipe))
    loss, gradients = loss_and_gradients(model, [batch])
    model.to("cuda")
    other_loss, other = loss_and_gradients(model, [on(batch, torch.device("cuda"))])
    assert float(other_loss) == pytest.approx(float(loss), rel=1e-5)
    assert_close({name: value.cpu() for name, value in other.items()}, gradients, 1e-4)
    assert len(answers(model, recipe)) == QUESTIONS
