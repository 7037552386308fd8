"""LoRA's variants: rsLoRA, DoRA, PiSSA, LoRA+.

Each begins as no change, is saved to the bit, opens in plain PEFT and merges.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import (
    assert_same_bits,
    assert_same_outputs,
    batch_of,
    built,
    largest,
    loss_and_gradients,
    parsed,
    rows_of,
    save_llm,
    wake_adapters,
    with_llm,
    with_tower,
)
from vlm_tune.config.tune import TuneRule
from vlm_tune.errors import ModelError
from vlm_tune.exporting.verify import observe
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.checkpoint import restore_model
from vlm_tune.model.lora import adapter_state, load_adapter_state, merge_adapter, parts
from vlm_tune.model.tuning import apply_rules

FROZEN = TuneRule(match="*", how="frozen")
VARIANTS: dict[str, dict[str, Any]] = {
    "gaussian": {"init": "gaussian"},
    "rslora": {"variant": "rslora", "lora_alpha": 3.0},
    "dora": {"variant": "dora"},
    "pissa": {"init": "pissa", "lora_alpha": 6.0},
    "rslora_pissa": {"variant": "rslora", "init": "pissa"},
}
BOTH = pytest.mark.parametrize("kind", ["seq2seq", "causal"])
EACH = pytest.mark.parametrize("variant", VARIANTS)


def lora(variant: str, match: str = "llm.*") -> TuneRule:
    return TuneRule(match=match, how="lora", r=4, **VARIANTS[variant])


def applied(model: Any, *rules: TuneRule, precision: torch.dtype = torch.float32) -> Any:
    return apply_rules(model, [*rules, FROZEN], learning_rate=1e-3, precision=precision)


@pytest.fixture
def named(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> Callable[[str], tuple[Any, list[Any], Path]]:
    """A model over a saved tiny Llama or T5, rows, and the folder of the language model."""

    def make(kind: str) -> tuple[Any, list[Any], Path]:
        text = tiny_recipe(kind)
        folder = save_llm(tmp_path / "base", kind, rows_of(parsed(text)))
        recipe = parsed(with_llm(text, folder, kind))
        return built(recipe), rows_of(recipe), folder

    return make


def perturb(model: Any) -> None:
    """A step in some direction for every trained tensor of the adapters."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@BOTH
@EACH
def test_an_adapter_begins_as_no_change_and_leaves_the_base(
    variant: str, kind: str, named: Any
) -> None:
    model, rows, _ = named(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    base, _ = observe(model, rows)
    applied(model, lora(variant))
    assert largest(base, observe(model, rows)[0]) <= 1e-5
    after = {
        name.replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }
    assert all(torch.equal(before[name], after[name]) for name in before)


@BOTH
@EACH
def test_saved_found_again_opened_in_plain_peft_and_merged(
    variant: str, kind: str, named: Any, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    model, rows, folder = named(kind)
    base, _ = observe(model, rows)
    applied(model, lora(variant))
    perturb(model)
    adapted, texts = observe(model, rows)
    assert largest(base, adapted) > 1e-2
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "llm").exists()

    again = restore_model(tmp_path / "saved", dtype=torch.float32, model_class=VisionLanguageModel)
    applied(again, lora(variant))
    first, second = dict(model.named_parameters()), dict(again.named_parameters())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name for name in first if first[name].requires_grad} == {
        name for name in second if second[name].requires_grad
    }
    again.save_pretrained(tmp_path / "twice")
    assert_same_bits(tmp_path / "saved", tmp_path / "twice")
    logits, same = observe(again, rows)
    assert_same_outputs(logits, adapted)
    assert same == texts

    factory: Any = AutoModelForSeq2SeqLM if kind == "seq2seq" else AutoModelForCausalLM
    plain = factory.from_pretrained(folder).eval()
    ids = torch.tensor([[5, 60, 70, 80, 90, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | (
        {"decoder_input_ids": ids} if kind == "seq2seq" else {}
    )
    with torch.no_grad():
        ours = model.llm.model.eval()(**inputs).logits
        theirs: Any = PeftModel.from_pretrained(plain, str(tmp_path / "saved" / "adapter"))
        # Of PiSSA plain PEFT sums both halves in one product.
        assert largest(ours, theirs(**inputs).logits) <= (5e-5 if "pissa" in variant else 1e-5)

    merge_adapter(again, "llm")
    assert not any("lora_" in name for name, _ in again.named_parameters())
    assert largest(observe(again, rows)[0], adapted) <= 1e-4


@EACH
def test_every_trained_tensor_gets_a_gradient_and_what_pissa_started_from_none(
    variant: str, named: Any
) -> None:
    model, rows, _ = named("causal")
    tuned = applied(model, lora(variant), precision=torch.bfloat16)
    perturb(model)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        _, gradients = loss_and_gradients(
            model, [batch_of(model, [e for row in rows for e in model.processor.examples(row)])]
        )
    wanted = {
        name for name, _ in model.named_parameters() if "lora_" in name and ".initial." not in name
    }
    assert {name for name, value in gradients.items() if float(value.abs().sum())} == wanted
    assert {f"llm.{name.removeprefix('llm.model.')}" for name in wanted} == {
        name for names in tuned.names for name in names
    }


@torch.no_grad()
def test_pissa_begins_where_peft_begins(named: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model, _, folder = named("causal")
    applied(model, lora("pissa"))
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        init_lora_weights="pissa",
        target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    theirs: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),  # type: ignore[arg-type]
        config,
    )
    for name in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        one = parts(model)["llm"].get_submodule(f"model.{name}")
        other = theirs.get_submodule(f"base_model.model.model.{name}")
        assert largest(one.lora_A.default.weight, other.lora_A.default.weight) <= 1e-6
        assert largest(one.lora_B.default.weight, other.lora_B.default.weight) <= 1e-6
        residual = (
            one.get_base_layer().weight
            + one.scaling["initial"] * one.lora_B.initial.weight @ one.lora_A.initial.weight
        )
        assert largest(residual, other.get_base_layer().weight) <= 1e-6


def test_pissa_of_a_rank_larger_than_a_side_is_refused(named: Any) -> None:
    model, _, _ = named("causal")
    with pytest.raises(ModelError, match=r"PiSSA of rank 17 in a layer of \[16, 32\]"):
        applied(model, TuneRule(match="llm.*", how="lora", r=17, init="pissa"))


@pytest.mark.parametrize("changed", [{"variant": "rslora"}, {"variant": "dora"}, {"init": "pissa"}])
def test_another_variant_in_the_next_stage_is_merged_first(
    changed: dict[str, Any], named: Any
) -> None:
    model, rows, _ = named("causal")
    applied(model, TuneRule(match="llm.*", how="lora", r=4))
    wake_adapters(model)
    adapted, _ = observe(model, rows)
    applied(model, TuneRule.model_validate({"match": "llm.*", "how": "lora", "r": 4, **changed}))
    assert "llm" in model.changed
    assert largest(adapted, observe(model, rows)[0]) <= 1e-4


def test_lora_plus_gives_b_its_own_rate(named: Any) -> None:
    model, _, _ = named("seq2seq")
    tuned = applied(
        model, TuneRule(match="llm.*", how="lora", r=4, learning_rate=2e-4, lora_plus_ratio=16)
    )
    assert [group["lr"] for group in tuned.groups] == [2e-4 * 16, 2e-4]
    b, a = tuned.names
    assert b
    assert len(a) == len(b)
    assert all("lora_B" in name for name in b)
    assert all("lora_A" in name for name in a)
    assert "B at 0.0032" in tuned.table[0].detail


@EACH
def test_a_towers_adapter_is_saved_and_found_again(
    variant: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from tests.helpers.tiny_models import CLIP

    CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(tmp_path / "clip")
    recipe = parsed(
        with_tower(tiny_recipe("causal"), f"{{kind: transformers, name: {tmp_path / 'clip'}}}")
    )
    model, rows = built(recipe), rows_of(recipe)
    applied(model, lora(variant, "tower.*"))
    perturb(model)
    adapted, _ = observe(model, rows)
    model.save_pretrained(tmp_path / "saved")
    again = restore_model(tmp_path / "saved", dtype=torch.float32)
    applied(again, lora(variant, "tower.*"))
    assert_same_outputs(observe(again, rows)[0], adapted)


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_an_adapter_of_other_layers_or_another_rank_is_refused_by_name(
    init: str, named: Any
) -> None:
    model, _, _ = named("causal")
    applied(model, TuneRule.model_validate({"match": "llm.*", "how": "lora", "r": 4, "init": init}))
    module = parts(model)["llm"]
    state = {key: value.clone() for key, value in adapter_state(module).items()}
    load_adapter_state(module, state, "here")
    key = min(key for key in state if "lora_A" in key)
    others = {
        "missing": {name: value for name, value in state.items() if name != key},
        "unexpected": {**state, "base_model.model.other.lora_A.weight": state[key]},
        "misshapen": {**state, key: torch.cat([state[key], state[key]])},
    }
    for word, tensors in others.items():
        with pytest.raises(ModelError, match=rf"here.*{word}"):
            load_adapter_state(module, tensors, "here")
