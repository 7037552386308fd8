"""The tuning rules: who decides, what they refuse, the table, and LoRA between stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import (
    LORA_TUNE,
    built,
    largest,
    parsed,
    rows_of,
    save_llm,
    tuned_by,
    wake_adapters,
    with_llm,
    with_tower,
    with_tune,
)
from vlm_tune.config.tune import TuneRule
from vlm_tune.errors import ModelError
from vlm_tune.exporting.verify import observe
from vlm_tune.model.lora import parts
from vlm_tune.model.precisions import load_dtype
from vlm_tune.model.tuning import apply_rules

FROZEN = TuneRule(match="*", how="frozen")
TOWER = {
    "open_clip": (
        "{kind: open_clip, config: {layers: 2, width: 64, head_width: 32, patch_size: 16, "
        "image_size: 32}}"
    ),
    "timm": "{kind: timm, name: resnet18, image_size: 32, grid: 2}",
}


def applied(model: Any, *rules: TuneRule, precision: torch.dtype = torch.float32) -> Any:
    return apply_rules(model, rules, learning_rate=1e-4, precision=precision)


def lora(match: str = "llm.*", **keys: Any) -> TuneRule:
    return TuneRule(match=match, how="lora", **keys)


@pytest.fixture(params=["seq2seq", "causal"])
def model(request: pytest.FixtureRequest, tiny_recipe: Callable[..., str]) -> Any:
    return built(parsed(tiny_recipe(request.param)))


def test_the_first_rule_that_matches_wins(model: Any) -> None:
    first = "llm.shared.*" if model.llm.layout == "seq2seq" else "llm.model.embed_tokens.*"
    tuned = applied(
        model,
        TuneRule(match=first, how="full"),
        TuneRule(match="connector.*", how="full", learning_rate=0.5),
        FROZEN,
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        name
        for name, _ in model.named_parameters()
        if "shared" in name or "embed_tokens" in name or "connector" in name
    }
    assert [group["lr"] for group in tuned.groups] == [1e-4, 0.5]
    with pytest.raises(ModelError, match="matches nothing"):
        applied(model, FROZEN, TuneRule(match="connector.*", how="full"))


def test_a_parameter_no_rule_covers_is_named(model: Any) -> None:
    with pytest.raises(ModelError, match=r"no tune rule covers connector\.norm\.weight"):
        applied(model, TuneRule(match="tower.*", how="frozen"), TuneRule(match="llm.*", how="full"))


def test_a_rule_that_matches_nothing_is_named(model: Any) -> None:
    with pytest.raises(
        ModelError, match=r"'llm\.nothing\.\*' matches nothing; parameters are named as tower\."
    ):
        applied(model, TuneRule(match="llm.nothing.*", how="full"), FROZEN)


def test_the_table_counts_every_parameter_once(model: Any) -> None:
    total = sum(parameter.numel() for parameter in model.parameters())
    connector = sum(parameter.numel() for parameter in model.connector.parameters())
    tuned = applied(
        model,
        TuneRule(match="connector.*", how="full"),
        lora(r=2, lora_alpha=6, learning_rate=0.1),
        FROZEN,
    )
    adapter = sum(
        parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name
    )
    assert adapter > 0
    assert sum(parameter.numel() for parameter in model.parameters()) == total + adapter
    full, low_rank, frozen = tuned.table
    assert (full.trained, full.total, full.learning_rate) == (connector, connector, 1e-4)
    assert (low_rank.trained, low_rank.learning_rate, low_rank.detail) == (
        adapter,
        0.1,
        "r=2, alpha=6",
    )
    assert (frozen.trained, frozen.learning_rate) == (0, None)
    assert sum(row.total for row in tuned.table) == total + adapter
    optimised = [parameter for group in tuned.groups for parameter in group["params"]]
    assert (
        len(optimised)
        == len({id(parameter) for parameter in optimised})
        == sum(len(names) for names in tuned.names)
    )


def test_all_linear_leaves_out_the_head_and_the_embedding(model: Any) -> None:
    applied(model, lora(target_modules="all-linear"), FROZEN)
    with_lora = {
        name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_A" in name
    }
    linears = {
        name
        for name, module in model.llm.model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name
    }
    bases = {f"llm.model.{name.removesuffix('.base_layer')}" for name in linears}
    assert with_lora == bases - {"llm.model.lm_head"}
    assert "llm.model.lm_head" in bases


def test_only_the_named_modules_get_lora(model: Any) -> None:
    targets = ["q", "v"] if model.llm.layout == "seq2seq" else ["q_proj", "v_proj"]
    applied(model, lora(target_modules=targets), FROZEN)
    kinds = {
        name.split(".lora_")[0].rsplit(".", 1)[-1]
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }
    assert kinds == set(targets)


def test_only_the_matched_layers_get_lora(tiny_recipe: Callable[..., str]) -> None:
    model = built(parsed(tiny_recipe("causal")))
    applied(model, lora("llm.model.layers.1.*"), FROZEN)
    names = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(names) == 7
    assert all(".layers.1." in name for name in names)


def test_target_modules_that_do_not_exist_are_named_with_those_that_do(model: Any) -> None:
    with pytest.raises(
        ModelError,
        match=r"target_modules \['qq_proj'\] match no linear layer of 'llm\.\*'; it has "
        r".*(v_proj|v)",
    ):
        applied(
            model,
            lora(target_modules=["qq_proj", "v_proj" if model.llm.layout == "causal" else "v"]),
            FROZEN,
        )


def test_one_adapter_a_part(tiny_recipe: Callable[..., str]) -> None:
    model = built(parsed(tiny_recipe("causal")))
    with pytest.raises(ModelError, match="2 LoRA rules match the llm"):
        applied(model, lora("llm.model.layers.0.*", r=2), lora("llm.model.layers.1.*", r=4), FROZEN)


@pytest.mark.parametrize(("alpha", "scale"), [(8.0, 2.0), (0.5, 0.125), (None, 2.0)])
def test_the_adapter_is_scaled_by_alpha_over_r(
    alpha: float | None, scale: float, tiny_recipe: Callable[..., str]
) -> None:
    model = built(parsed(tiny_recipe("causal")))
    applied(model, lora(r=4, lora_alpha=alpha), FROZEN)
    layer: Any = parts(model)["llm"].get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.scaling["default"] == scale


def test_half_precision_for_the_frozen_and_fp32_for_what_trains(model: Any) -> None:
    applied(
        model, lora(), TuneRule(match="connector.*", how="full"), FROZEN, precision=torch.bfloat16
    )
    for name, parameter in model.named_parameters():
        trained = "lora_" in name or name.startswith("connector")
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name


# --- between stages ----------------------------------------------------------------------------


def test_the_same_lora_is_kept_between_stages(model: Any, tiny_recipe: Callable[..., str]) -> None:
    applied(model, lora(r=4), FROZEN)
    wake_adapters(model)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    values = {name: parameter.clone() for name, parameter in model.named_parameters()}
    tuned = applied(
        model, TuneRule(match="connector.*", how="full"), lora(r=4, learning_rate=0.3), FROZEN
    )
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert all(torch.equal(values[name], parameter) for name, parameter in model.named_parameters())
    assert tuned.groups[1]["lr"] == 0.3
    assert "llm" not in model.changed or model.config.llm.scratch


def test_another_lora_is_merged_first(model: Any, tiny_recipe: Callable[..., str]) -> None:
    rows = rows_of(parsed(tiny_recipe(model.llm.layout)))
    base, _ = observe(model, rows)
    applied(model, lora(r=4), FROZEN)
    wake_adapters(model)
    adapted, _ = observe(model, rows)
    assert largest(base, adapted) > 1e-3
    applied(model, lora(r=8), FROZEN)
    assert all(
        parameter.shape[0] == 8 for name, parameter in model.named_parameters() if "lora_A" in name
    )
    merged, _ = observe(model, rows)
    assert largest(adapted, merged) <= 1e-4
    applied(model, TuneRule(match="connector.*", how="full"), FROZEN)
    assert not any("lora_" in name or "base_layer" in name for name, _ in model.named_parameters())
    assert largest(adapted, observe(model, rows)[0]) <= 1e-4
    assert "llm" in model.changed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lora_is_found_again_after_a_save(
    precision: str, tmp_path: Path, tiny_recipe: Callable[..., str]
) -> None:
    """A resumed run applies its rules to a model that has its adapters already.

    Not a bit of them is lost.
    """
    from vlm_tune.model.checkpoint import restore_model

    recipe = parsed(with_tune(tiny_recipe("causal", precision=precision), LORA_TUNE))
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    model.save_pretrained(tmp_path / "saved")
    again = restore_model(tmp_path / "saved", dtype=load_dtype(recipe))
    tuned_by(again, recipe)
    first, second = dict(model.named_parameters()), dict(again.named_parameters())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- the adapter's files -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
@pytest.mark.parametrize("targets", ["all-linear", "some"])
def test_the_adapter_folder_opens_in_plain_peft(
    kind: str, targets: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    text = tiny_recipe(kind)
    folder = save_llm(tmp_path / "base", kind, rows_of(parsed(text)))
    model = built(parsed(with_llm(text, folder, kind)))
    some = "llm.decoder.*" if kind == "seq2seq" else "llm.model.layers.1.*"
    applied(model, lora("llm.*" if targets == "all-linear" else some, r=4), FROZEN)
    wake_adapters(model)
    model.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not (tmp_path / "saved" / "llm").exists()
    factory: Any = AutoModelForSeq2SeqLM if kind == "seq2seq" else AutoModelForCausalLM
    base = factory.from_pretrained(folder).eval()
    ids = torch.tensor([[5, 60, 70, 80, 90, 7], [8, 40, 41, 42, 43, 1]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | (
        {"decoder_input_ids": ids} if kind == "seq2seq" else {}
    )
    with torch.no_grad():
        plain = base(**inputs).logits
        ours = model.llm.model.eval()(**inputs).logits
        peft_model: Any = PeftModel.from_pretrained(base, str(tmp_path / "saved" / "adapter"))
        theirs = peft_model(**inputs).logits
    assert largest(ours, plain) > 1e-2
    assert largest(ours, theirs) <= 1e-5


# --- LoRA on the tower -------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["open_clip", "transformers"])
def test_every_lora_layer_of_a_tower_takes_part(
    tower: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    from tests.helpers.tiny_models import CLIP, batch_of, loss_and_gradients

    text = tiny_recipe("causal")
    if tower == "transformers":
        from transformers import CLIPVisionConfig, CLIPVisionModel

        CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(tmp_path / "clip")
        text = with_tower(text, f"{{kind: transformers, name: {tmp_path / 'clip'}}}")
    recipe = parsed(text)
    model = built(recipe)
    rows = rows_of(recipe)
    base, _ = observe(model, rows)
    applied(model, lora("tower.*", r=4), FROZEN)
    wake_adapters(model, 1.0)
    adapted, texts = observe(model, rows)
    assert largest(base, adapted) > 1e-5
    _, gradients = loss_and_gradients(
        model, [batch_of(model, [e for row in rows for e in model.processor.examples(row)])]
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert {
        name for name in trained if name in gradients and float(gradients[name].abs().sum())
    } == trained
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tower_adapter" / "adapter_model.safetensors").is_file()
    again = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float32)
    logits, same = observe(again, rows)
    assert largest(logits, adapted) <= 1e-5
    assert same == texts


def test_lora_on_layers_that_would_ignore_it_is_refused(tiny_recipe: Callable[..., str]) -> None:
    """torch's MultiheadAttention reads its projections' weights without calling them.

    So LoRA there would do nothing.
    """
    model = built(parsed(tiny_recipe("causal")))
    with pytest.raises(ModelError, match=r"target_modules \['out_proj'\] match no linear layer"):
        applied(model, lora("tower.*", target_modules=["out_proj"]), FROZEN)
    convolutions = built(parsed(with_tower(tiny_recipe("causal"), TOWER["timm"])))
    with pytest.raises(ModelError, match=r"the LoRA rule 'tower\.\*' matches no linear layer"):
        applied(convolutions, lora("tower.*"), FROZEN)
