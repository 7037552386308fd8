"""Virtual tokens.

Soft prompts and prefixes compute what PEFT computes, in single, batched, branched and packed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import (
    assert_close,
    assert_same_bits,
    assert_same_outputs,
    batch_of,
    built,
    interrupted,
    largest,
    loss_and_gradients,
    parsed,
    rows_of,
    save_llm,
    with_llm,
    with_tune,
)
from vlm_tune.api import sft
from vlm_tune.config.tune import TuneRule
from vlm_tune.data.batch import Batch
from vlm_tune.data.packing import branch_layout, pack_layout
from vlm_tune.errors import ModelError, RecipeError
from vlm_tune.events import TrainSteps
from vlm_tune.exporting.verify import observe
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.checkpoint import load_model, restore_model
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.tuning import apply_rules

FROZEN = TuneRule(match="*", how="frozen")
KINDS = [("prompt", "causal"), ("prompt", "seq2seq"), ("prefix", "causal"), ("prefix", "seq2seq")]
EACH = pytest.mark.parametrize(("how", "kind"), KINDS)
TUNE = """
tune:
  - {{match: "tower.*", how: frozen}}
  - {{match: "connector.*", how: full}}
  - {{match: "llm.*", how: {how}, tokens: 5, learning_rate: 0.01}}
train:"""


def applied(model: Any, how: str, tokens: int = 5, precision: torch.dtype = torch.float32) -> Any:
    return apply_rules(
        model,
        [TuneRule(match="llm.*", how=how, tokens=tokens), FROZEN],
        learning_rate=1e-3,
        precision=precision,
    )  # type: ignore[arg-type]


@pytest.fixture
def named(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> Callable[[str], tuple[Any, Any, Path]]:
    """A model over a saved tiny Llama or T5, its recipe, and the folder of the language model."""

    def make(kind: str) -> tuple[Any, Any, Path]:
        text = tiny_recipe(kind)
        folder = save_llm(tmp_path / "base", kind, rows_of(parsed(text)))
        recipe = parsed(with_llm(text, folder, kind))
        return built(recipe), recipe, folder

    return make


def move(model: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    model.llm.prompt.values.data += 0.3 * torch.randn(
        model.llm.prompt.values.shape, generator=generator
    )


def text_batch(ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> Batch:
    return Batch(
        ["a"] * len(ids),
        ids,
        mask,
        torch.zeros_like(mask),
        labels,
        torch.zeros(0, dtype=torch.int64),
    )


def greedy(plain: Any, ids: torch.Tensor, kind: str, steps: int) -> torch.Tensor:
    """Token ids that a PEFT model generates greedily, a whole forward pass a token.

    Not PEFT's own `generate`: up to 0.21.2 it looks for the cache by the name that transformers
    gave up in 5.24, finds none, and puts a decoder's virtual tokens before every new token.
    """
    out = torch.zeros(len(ids), 1, dtype=torch.int64) if kind == "seq2seq" else ids
    for _ in range(steps):
        inputs = (
            {"input_ids": ids, "decoder_input_ids": out}
            if kind == "seq2seq"
            else {"input_ids": out}
        )
        out = torch.cat([out, plain(**inputs).logits[:, -1:].argmax(-1)], 1)
    return out[:, -steps:]


@EACH
def test_logits_and_generation_are_plain_pefts(
    how: str, kind: str, named: Any, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    model, _, folder = named(kind)
    applied(model, how)
    move(model)
    model.eval().save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "llm").exists()
    factory: Any = AutoModelForSeq2SeqLM if kind == "seq2seq" else AutoModelForCausalLM
    plain: Any = PeftModel.from_pretrained(
        factory.from_pretrained(folder), str(tmp_path / "saved" / "prompt")
    ).eval()
    ids = torch.tensor([[5, 60, 70, 80, 90, 7], [8, 40, 41, 42, 43, 1]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = text_batch(ids, mask, ids)
    more = {"labels": ids} if kind == "seq2seq" else {}
    with torch.no_grad():
        ours = model.llm.supervised_logits(model.llm.embed(ids), batch)
        theirs = (
            plain(input_ids=ids, attention_mask=mask.long(), **more).logits[:, -6:].flatten(0, 1)
        )
        base = plain.get_base_model()(
            input_ids=ids, attention_mask=mask.long(), **more
        ).logits.flatten(0, 1)
        generated = model.llm.generate(model.llm.embed(ids), batch, Decoding(8), 0, [999])
        expected = greedy(plain, ids, kind, 8)
    assert largest(ours, theirs) <= 1e-5
    assert largest(ours, base) > 1e-2
    assert torch.equal(generated, expected)


@EACH
def test_saved_found_again_and_trained_on(how: str, kind: str, named: Any, tmp_path: Path) -> None:
    model, recipe, _ = named(kind)
    rows = rows_of(recipe)
    base, _ = observe(model, rows)
    applied(model, how)
    move(model)
    prompted, texts = observe(model, rows)
    assert largest(base, prompted) > 1e-2
    model.save_pretrained(tmp_path / "saved")
    again = restore_model(tmp_path / "saved", dtype=torch.float32, model_class=VisionLanguageModel)
    tuned = applied(again, how)
    assert tuned.names == [["llm.prompt.values"]]
    assert torch.equal(again.llm.prompt.values, model.llm.prompt.values)  # type: ignore[union-attr]
    logits, same = observe(again, rows)
    assert_same_outputs(logits, prompted)
    assert same == texts
    again.save_pretrained(tmp_path / "twice")
    assert_same_bits(tmp_path / "saved", tmp_path / "twice")
    without = load_model(tmp_path / "saved", dtype=torch.float32, adapters=False)
    assert largest(observe(without, rows)[0], base) <= 1e-6


@EACH
def test_batched_and_left_padded_rows_are_rows_one_by_one(how: str, kind: str, named: Any) -> None:
    model, recipe, _ = named(kind)
    applied(model, how)
    move(model)
    model.eval()
    prompts = model.processor.prompts(rows_of(recipe))
    assert len({len(prompt.input_ids) for prompt in prompts}) > 1
    for decoding in (Decoding(8), Decoding(8, 3)):
        together = answer_prompts(model, prompts, decoding, fetch=model.processor.images)
        alone = [
            answer_prompts(model, [prompt], decoding, fetch=model.processor.images)[0]
            for prompt in prompts
        ]
        assert together == alone
        assert any(together)


@pytest.mark.parametrize("how", ["prompt", "prefix"])
@pytest.mark.parametrize("join", ["padded", "branches", "packed"])
def test_joined_rows_give_the_losses_and_gradients_of_rows_one_by_one(
    join: str, how: str, named: Any
) -> None:
    model, recipe, _ = named("causal")
    applied(model, how)
    move(model)
    model.connector.requires_grad_(True)
    rows = [example for row in rows_of(recipe) for example in model.processor.examples(row)]
    if join == "branches":
        together = [
            example
            for place in range(0, len(rows), 2)
            for example in branch_layout(rows[place : place + 2], 512)
        ]
        assert len(together) == 4
    else:
        together = (
            rows
            if join == "padded"
            else [pack_layout(rows[:3], "causal"), pack_layout(rows[3:], "causal")]
        )
    alone, expected = loss_and_gradients(model, [batch_of(model, [example]) for example in rows])
    joined, gradients = loss_and_gradients(model, [batch_of(model, together)])
    assert float(expected["llm.prompt.values"].abs().max()) > 1e-4
    assert float(joined) == pytest.approx(float(alone), rel=1e-5)
    assert_close(gradients, expected)


@pytest.mark.parametrize("how", ["prompt", "prefix"])
def test_an_encoder_decoder_takes_no_packed_rows_after_virtual_tokens(how: str, named: Any) -> None:
    model, recipe, _ = named("seq2seq")
    applied(model, how)
    rows = [example for row in rows_of(recipe) for example in model.processor.examples(row)]
    with pytest.raises(ModelError, match=r"takes no packed rows"):
        model(batch_of(model, [pack_layout(rows, "seq2seq")]))


def test_virtual_tokens_stay_for_the_next_stage(named: Any) -> None:
    model, recipe, _ = named("causal")
    applied(model, "prompt")
    move(model)
    rows = rows_of(recipe)
    before, _ = observe(model, rows)
    tuned = apply_rules(
        model,
        [TuneRule(match="connector.*", how="full"), FROZEN],
        learning_rate=1e-3,
        precision=torch.float32,
    )
    assert_same_outputs(observe(model, rows)[0], before)
    assert not model.llm.prompt.values.requires_grad
    assert not any("prompt" in name for names in tuned.names for name in names)
    with pytest.raises(ModelError, match="has a SoftPrompt of 5 tokens already"):
        applied(model, "prompt", 6)
    with pytest.raises(ModelError, match="has a SoftPrompt of 5 tokens already"):
        applied(model, "prefix")


def test_a_prompt_and_lora_go_together_and_lora_merges_under_it(named: Any, tmp_path: Path) -> None:
    from vlm_tune.model.lora import merge_adapter

    model, recipe, _ = named("causal")
    rules = [
        TuneRule(match="llm.model.embed_tokens.*", how="prompt"),
        TuneRule(match="llm.*", how="lora", r=4, variant="dora"),
        FROZEN,
    ]
    tuned = apply_rules(model, rules, learning_rate=1e-3, precision=torch.float32)
    assert (tuned.table[0].trained, tuned.table[0].detail) == (20 * 32, "20 tokens")
    move(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    logits, _ = observe(model, rows_of(recipe))
    merge_adapter(model, "llm")
    model.save_pretrained(tmp_path / "merged")
    assert (
        largest(
            observe(load_model(tmp_path / "merged", dtype=torch.float32), rows_of(recipe))[0],
            logits,
        )
        <= 1e-4
    )


@pytest.mark.slow
@EACH
def test_a_run_resumes_bit_for_bit_and_learns(
    how: str, kind: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    def recipe(output: str) -> Any:
        text = with_tune(tiny_recipe(kind, output=output, precision="bf16"), TUNE.format(how=how))
        return parsed(
            text,
            train__log_every=1,
            train__steps=6,
            evaluate__every=2,
            train__checkpoints={"keep": 10},
        )

    losses: list[float] = []
    sft(
        recipe("whole"),
        show=lambda event: losses.append(event.loss) if isinstance(event, TrainSteps) else None,
    )
    assert losses[-1] < losses[0]
    interrupted(lambda show: sft(recipe("parts"), show=show), stage=0, step=3)
    sft(recipe("parts"), resume=True)
    assert_same_bits(tmp_path / "whole" / "model", tmp_path / "parts" / "model")
    assert (tmp_path / "whole" / "model" / "prompt" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("kind", "how", "changes", "message"),
    [
        ("seq2seq", "prefix", {"data__packing": True}, "takes no packed rows"),
        (
            "causal",
            "prefix",
            {"train__gradient_checkpointing": True},
            "where it checkpoints gradients",
        ),
        ("seq2seq", "prompt", {"data__packing": True}, "takes no packed rows"),
        (
            "causal",
            "prompt",
            {"model__connector": {"kind": "cross_attention", "every": 1}},
            "the cross_attention connector does not know",
        ),
        ("causal", "prompt", {"tune__2__match": "*"}, "takes a rule for llm"),
        ("causal", "prompt", {"tune__2__r": 4}, "r belongs to how: lora, this rule is how: prompt"),
        (
            "causal",
            "prompt",
            {"tune__1__tokens": 4},
            "tokens belongs to how: prompt or prefix, this rule is how: full",
        ),
    ],
)
def test_what_virtual_tokens_do_not_go_with(
    kind: str, how: str, changes: dict[str, Any], message: str, tiny_recipe: Any
) -> None:
    with pytest.raises(RecipeError) as caught:
        parsed(with_tune(tiny_recipe(kind), TUNE.format(how=how)), **changes)
    assert any(message in problem.message for problem in caught.value.problems)


@EACH
def test_what_is_no_prompt_is_refused(how: str, kind: str, named: Any, tmp_path: Path) -> None:
    from vlm_tune.model.language.virtual_tokens import read_prompt, write_prompt
    from vlm_tune.model.weights import write_safetensors

    model, _, _ = named(kind)
    applied(model, how)
    write_prompt(model.llm.prompt.config, model.llm.prompt.values, tmp_path / "prompt")
    write_safetensors(
        {"prompt_embeddings": model.llm.prompt.values[:3]},
        tmp_path / "prompt" / "adapter_model.safetensors",
    )
    with pytest.raises(ModelError, match="does not fit its config"):
        read_prompt(tmp_path / "prompt")
