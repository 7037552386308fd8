"""LoRA on connectors: every kind trains, is saved and merged; runs resume, export and are swapped.

Gradients are compared with PEFT's over whole models in tests/parity.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.connector_kinds import KINDS, with_connector
from tests.helpers.tiny_models import (
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
    tensors_of,
    tuned_by,
    wake_adapters,
    with_llm,
    with_tune,
)
from vlm_tune import VisionLanguageModel, export, merge, plan
from vlm_tune.api import sft
from vlm_tune.errors import ModelError, RecipeError
from vlm_tune.exporting import possible_exports
from vlm_tune.exporting.verify import observe
from vlm_tune.model.checkpoint import load_model, restore_model
from vlm_tune.model.lora import is_adapter

TUNE = """
tune:
  - {match: "connector.*_gate", how: full}
  - {match: "connector.*", how: lora, r: 2, KEYS}
  - {match: "tower.*", how: frozen}
  - {match: "llm.*", how: lora, r: 4}
train:"""
VARIANTS = {
    "lora": "lora_alpha: 4",
    "rslora": "variant: rslora, lora_alpha: 3.0",
    "dora": "variant: dora",
    "pissa": "init: pissa",
    "some": "target_modules: [layers.2]",
}
ADAPTED = [kind for kind in KINDS if kind != "gemma3"]


def tune(kind: str = "mlp", keys: str = "lora_alpha: 4") -> str:
    text = TUNE.replace("KEYS", keys)
    gates = '  - {match: "connector.*_gate", how: full}\n'
    return text if kind == "cross_attention" else text.replace(gates, "")


def woken(text: str) -> tuple[VisionLanguageModel, Any]:
    """The model of a recipe with adapters, and gates, of values other than 0."""
    recipe = parsed(text)
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    for name, parameter in model.connector.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(0.5)
    return model.eval(), recipe


@pytest.mark.parametrize(
    ("kind", "llm"),
    [(kind, "causal") for kind in ADAPTED]
    + [(kind, "seq2seq") for kind in ("linear", "qformer-text", "cross_attention")],
)
def test_every_connector_trains_is_saved_and_merged(
    kind: str, llm: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    model, recipe = woken(with_tune(with_connector(tiny_recipe(llm), kind), tune(kind)))
    rows = rows_of(recipe)
    examples = [example for row in rows for example in model.processor.examples(row)]
    _, gradients = loss_and_gradients(model, [batch_of(model, examples)])
    linear = {
        name.removesuffix(".base_layer")
        for name, layer in model.connector.named_modules()
        if isinstance(layer, torch.nn.Linear) and ".lora_" not in name
    }
    trained = {name for name in gradients if name.startswith("connector.") and is_adapter(name)}
    assert {name.split(".lora_")[0].removeprefix("connector.") for name in trained} == linear
    assert all(float(gradients[name].abs().sum()) > 0 for name in trained)
    logits, _ = observe(model, rows)
    model.save_pretrained(tmp_path / "saved")
    assert not any(map(is_adapter, load_file(tmp_path / "saved" / "connector.safetensors")))
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    assert_same_outputs(observe(again, rows)[0], logits)
    report = merge(tmp_path / "saved", tmp_path / "merged", dtype="fp32")
    assert report.parts == ["connector", "llm"]
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    assert not merged.adapters
    assert largest(observe(merged, rows)[0], logits) <= 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_saved_to_the_bit_and_trains_on(
    variant: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    text = with_tune(with_connector(tiny_recipe("causal"), "mlp"), tune(keys=VARIANTS[variant]))
    model, recipe = woken(text)
    model.save_pretrained(tmp_path / "saved")
    again = restore_model(tmp_path / "saved", dtype=torch.float32, model_class=VisionLanguageModel)
    tuner = again.adapters["connector"]
    tuned_by(again, recipe)
    assert again.adapters["connector"] is tuner
    again.save_pretrained(tmp_path / "again")
    assert_same_bits(tmp_path / "saved", tmp_path / "again")
    layers = {name.split(".lora_")[0] for name in tensors_of(tmp_path / "saved/connector_adapter")}
    assert len(layers) == (1 if variant == "some" else 2)
    rows = rows_of(recipe)
    report = merge(tmp_path / "saved", tmp_path / "merged", dtype="fp32")
    assert report.difference_to_adapter <= 1e-4
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    assert largest(observe(merged, rows)[0], observe(again.eval(), rows)[0]) <= 1e-4


def test_a_rule_that_can_not_train_is_refused(tiny_recipe: Callable[..., str]) -> None:
    matrix = parsed(with_tune(with_connector(tiny_recipe("causal"), "gemma3"), tune()))
    with pytest.raises(ModelError, match="matches no linear layer; train what it matches with how"):
        tuned_by(built(matrix), matrix)
    closed = parsed(with_tune(with_connector(tiny_recipe("causal"), "cross_attention"), tune()))
    with pytest.raises(ModelError, match="the connector's gates are 0 and frozen"):
        tuned_by(built(closed), closed)
    every = tune().replace('"connector.*"', '"*"')
    with pytest.raises(RecipeError, match="a LoRA rule is of one part: begin match with llm"):
        parsed(with_tune(tiny_recipe("causal"), every))


@pytest.fixture
def over_base(tiny_recipe: Callable[..., str], tmp_path: Path) -> Callable[..., Any]:
    """Recipes of four steps over one saved LLM, by the run's name."""
    base = save_llm(tmp_path / "base", "causal", rows_of(parsed(tiny_recipe("causal"))))

    def recipe(name: str, keys: str = "lora_alpha: 4", **changes: Any) -> Any:
        text = with_llm(tiny_recipe("causal", output=str(tmp_path / name)), base, "causal")
        changes = {"train__log_every": 1, "evaluate__every": 2, "train__steps": 4, **changes}
        return parsed(with_tune(text, tune(keys=keys)), train__batch_size=2, **changes)

    return recipe


def test_a_run_resumes_exports_and_is_swapped(
    over_base: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = over_base("run")
    sft(recipe)
    stopped = over_base("stopped")
    interrupted(partial(sft, stopped), stage=0, step=3)
    sft(stopped, resume=True)
    assert_same_bits(tmp_path / "run" / "model", tmp_path / "stopped" / "model")
    table = json.loads((tmp_path / "run" / "tuning.json").read_text())[0]["rows"]
    row = next(row for row in table if row["match"] == "connector.*")
    assert (row["how"], row["detail"]) == ("lora", "r=2, alpha=4") and row["trained"] > 0
    sizes = {part.part: part for part in plan(recipe).stages[0].parts}
    assert sizes["connector"].adapters == sizes["connector"].trained == row["trained"]
    # A further run's connector and adapter are its own.
    other = over_base("other", "variant: dora", seed=5)
    sft(other)
    model = VisionLanguageModel.from_pretrained(tmp_path / "run", dtype="fp32")
    second = model.load_adapter(tmp_path / "other", "other")
    rows = rows_of(recipe)
    for loaded, name in ((second, "other"), (model, "run")):
        alone = load_model(tmp_path / name, dtype=torch.float32)
        assert_same_outputs(observe(loaded, rows)[0], observe(alone, rows)[0])
    assert possible_exports(recipe)["adapter"] is None
    report = export(tmp_path / "run", tmp_path / "adapter", format="adapter")
    assert (tmp_path / "adapter" / "connector_adapter" / "adapter_model.safetensors").is_file()
    assert any("not the connector" in note for note in report.notes)


def test_a_connector_without_its_adapter_is_no_start(
    over_base: Callable[..., Any], tmp_path: Path
) -> None:
    sft(over_base("run", train__steps=1, evaluate__every=1))
    weights = tmp_path / "run" / "model" / "connector.safetensors"
    connector = {"model__connector": {"kind": "mlp", "norm": True, "weights": str(weights)}}
    with pytest.raises(ModelError, match="the connector without its LoRA adapter"):
        built(over_base("next", **connector))


def test_a_later_stage_merges_the_adapter_and_trains_in_full(
    over_base: Callable[..., Any], tmp_path: Path
) -> None:
    full = [
        {"match": "connector.*", "how": "full"},
        {"match": "*", "how": "frozen"},
    ]
    stages = [{"name": "first"}, {"name": "second", "tune": full}]
    sft(over_base("run", stages=stages))
    folder = tmp_path / "run" / "model"
    assert not (folder / "connector_adapter").exists()
    assert not any(map(is_adapter, load_file(folder / "connector.safetensors")))
