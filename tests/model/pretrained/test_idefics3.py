"""Recipes that start from an Idefics3 or a SmolVLM: trained, resumed, planned, joined, merged."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.family_runs import (
    assert_planned_without_weights,
    assert_resumed_and_merged,
    logits_of,
)
from tests.helpers.tiny_models import (
    LORA_TUNE,
    assert_close,
    assert_same_outputs,
    batch_of,
    built,
    examples_of,
    largest,
    loss_and_gradients,
    parsed,
    rows_of,
    run,
    tuned_by,
    wake_adapters,
    with_tune,
)
from tests.helpers.vlm_samples import save_idefics3, with_pretrained
from vlm_tune.config.towers import Idefics3Split
from vlm_tune.data.prepare.run import prepare
from vlm_tune.data.types import IGNORE_INDEX
from vlm_tune.errors import ModelError
from vlm_tune.exporting import export, possible_exports
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.language.decoding import Decoding

Tiny = Callable[..., str]
OTHER_PATHS = os.pathsep.join(path for path in sys.path if not (Path(path) / "vlm_tune").is_dir())


@pytest.fixture
def smolvlm(tiny_recipe: Tiny, tmp_path: Path) -> str:
    """A recipe over a tiny SmolVLM: LoRA on the LLM, the connector in full."""
    save_idefics3(tmp_path / "vlm", "smolvlm")
    return with_tune(with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", "smolvlm"), LORA_TUNE)


def test_losses_gradients_and_answers_of_branches_equal_rows(
    smolvlm: str, color_rows: Path
) -> None:
    recipe = parsed(smolvlm)
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    grouped = recipe.data.model_copy(update={"group": "image"})
    branches = examples_of(prepare(grouped, grouped.train, model.processor, seed=recipe.seed))
    assert [(len(example.media), example.questions) for example in branches] == [(5, 2)] * 4
    rows = [example for row in rows_of(recipe) for example in model.processor.examples(row)]
    alone, expected = loss_and_gradients(model, [batch_of(model, [example]) for example in rows])
    together, gradients = loss_and_gradients(model, [batch_of(model, branches)])
    assert float(together) == pytest.approx(float(alone), rel=1e-5)
    assert_close(gradients, expected)
    model.eval()
    prompts = model.processor.prompts(rows_of(recipe))
    fetch = model.processor.images
    one_by_one = [
        answer_prompts(model, [prompt], Decoding(4), fetch=fetch)[0] for prompt in prompts
    ]
    assert answer_prompts(model, prompts, Decoding(4), fetch=fetch) == one_by_one


@pytest.mark.slow
def test_a_run_is_resumed_bit_for_bit_and_merged_without_the_original(
    smolvlm: str, tmp_path: Path
) -> None:
    assert_resumed_and_merged(smolvlm, tmp_path)


def test_the_plan_reads_no_weights_and_knows_every_frame(smolvlm: str, tmp_path: Path) -> None:
    assert_planned_without_weights(smolvlm, tmp_path)


PLAIN = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
from PIL import Image

sys.modules["vlm_tune"] = None
rows = json.loads(Path("rows.json").read_text())
for folder in map(Path, sys.argv[1:]):
    adapter = folder / "adapter_config.json"
    source = folder
    if adapter.is_file():
        source = json.loads(adapter.read_text())["base_model_name_or_path"]
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    names = [type(model).__name__]
    if adapter.is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder)).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    logits = []
    for row in rows:
        part = {"type": "image", "image": Image.open(row["image"]).convert("RGB")}
        text = {"type": "text", "text": row["question"]}
        turns = [
            {"role": "user", "content": [part, text]},
            {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
        ]
        inputs = processor.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            logits.append(model(**inputs).logits[0].tolist())
    names.append(type(processor).__name__)
    (folder / "logits.json").write_text(json.dumps([names, logits]))
"""
"""Prints nothing; writes the logits of the rows of `rows.json` into each folder."""


def trained(template: str, recipe: str, folder: Path, tune: str = LORA_TUNE) -> VisionLanguageModel:
    """A model over the checkpoint `vlm`, as if trained, saved in `run` beside its recipe."""
    text = with_tune(with_pretrained(recipe, folder / "vlm", template), tune)
    model = built(parsed(text))
    tuned_by(model, parsed(text))
    wake_adapters(model, 0.1)
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.mul_(1.5)
    (folder / "run").mkdir()
    model.save_pretrained(folder / "run" / "model")
    (folder / "run" / "recipe.yaml").write_text(text)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "tied"), [("smolvlm", False), ("idefics3", False), ("idefics3", True)]
)
def test_what_was_trained_is_written_as_what_it_was(
    kind: Literal["idefics3", "smolvlm"], tied: bool, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """Verified by transformers: ids, pixels, logits and text; and it is a start again."""
    save_idefics3(tmp_path / "vlm", kind, tied=tied)
    model = trained(kind, tiny_recipe("causal"), tmp_path)
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    assert possible_exports(parsed(text))["transformers"] is None
    report = export(tmp_path / "run", tmp_path / "exported", dtype="fp32")
    assert report.difference is not None and report.allowed is not None and report.same_text
    assert report.difference <= report.allowed and report.rows == 4
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written["model_type"] == kind
    again = built(parsed(text.replace(str(tmp_path / "vlm"), str(tmp_path / "exported"))))
    rows = rows_of(parsed(text))
    assert largest(logits_of(again, rows), logits_of(model, rows)) <= 1e-3


@pytest.mark.parametrize("kind", ["smolvlm", "idefics3"])
def test_the_adapter_has_the_whole_models_names(
    kind: Literal["idefics3", "smolvlm"], tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """Plain PEFT over the checkpoint answers as the model; the tower's layers are left alone."""
    save_idefics3(tmp_path / "vlm", kind)
    trained(kind, tiny_recipe("causal"), tmp_path)
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    assert possible_exports(parsed(text))["adapter"] is None
    report = export(tmp_path / "run", tmp_path / "adapter", format="adapter")
    assert report.difference is not None and report.allowed is not None and report.same_text
    assert report.difference <= report.allowed and report.rows == 4
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "vlm")
    assert config["modules_to_save"] == ["model.connector.modality_projection.proj"]
    assert len(config["target_modules"]) == 2 * 7
    assert all(name.startswith("model.text_model.layers.") for name in config["target_modules"])
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(key for key in tensors if key.endswith("layers.1.self_attn.v_proj.lora_B.weight"))
    assert key.startswith("base_model.model.model.text_model.")


def test_lora_on_the_connector_is_in_every_export(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """Merged into the connector, which plain PEFT has in `modules_to_save`."""
    save_idefics3(tmp_path / "vlm", "smolvlm")
    lora = LORA_TUNE.replace('"connector.*", how: full', '"connector.*", how: lora, variant: dora')
    model = trained("smolvlm", tiny_recipe("causal"), tmp_path, lora)
    assert list(model.adapters) == ["connector", "llm"]
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    assert possible_exports(parsed(text))["adapter"] is None
    for kind in ("adapter", "transformers"):
        report = export(tmp_path / "run", tmp_path / kind, format=kind)
        assert report.difference is not None and report.allowed is not None and report.same_text
        assert report.difference <= report.allowed
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.connector.modality_projection.proj"]
    assert not config["use_dora"]
    assert export(tmp_path / "run", tmp_path / "again").merged == ["connector", "llm"]


def test_an_adapter_without_the_trained_tower_is_refused(tiny_recipe: Tiny, tmp_path: Path) -> None:
    save_idefics3(tmp_path / "vlm", "idefics3")
    trained("idefics3", tiny_recipe("causal"), tmp_path)
    (tmp_path / "run" / "model" / "tower_adapter").mkdir()
    with pytest.raises(ModelError, match="the tower is trained too"):
        export(tmp_path / "run", tmp_path / "adapter", format="adapter", verify=False)
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    lora = "how: lora, r: 4, target_modules: all-linear"
    recipe = parsed(text.replace('"tower.*", how: frozen', f'"tower.*", {lora}'))
    assert "the tower is trained too" in str(possible_exports(recipe)["adapter"])


@pytest.mark.slow
def test_what_was_trained_opens_in_a_process_without_vlm_tune(
    tiny_recipe: Tiny, tmp_path: Path
) -> None:
    models: dict[Path, VisionLanguageModel] = {}
    kinds: list[Literal["idefics3", "smolvlm"]] = ["smolvlm", "idefics3"]
    for kind in kinds:
        folder = tmp_path / kind
        save_idefics3(folder / "vlm", kind)
        models[folder / "exported"] = trained(kind, tiny_recipe("causal"), folder)
        export(folder / "run", folder / "exported", dtype="fp32")
    rows = rows_of(parsed(tiny_recipe("causal")))[:3]
    written = [
        {
            "image": str(row.media[0].source),
            "question": row.messages[0].text,
            "answer": row.messages[1].text,
        }
        for row in rows
    ]
    (tmp_path / "rows.json").write_text(json.dumps(written))
    folders = [str(folder) for folder in models]
    run([sys.executable, "-c", PLAIN, *folders], cwd=tmp_path, PYTHONPATH=OTHER_PATHS)
    for stem, (folder, model) in zip(("SmolVLM", "Idefics3"), models.items(), strict=True):
        names, logits = json.loads((folder / "logits.json").read_text())
        assert names == [f"{stem}ForConditionalGeneration", f"{stem}Processor"]
        for row, theirs in zip(rows, logits, strict=True):
            batch = batch_of(model, model.processor.examples(row))
            with torch.no_grad():
                ours = model.llm.supervised_logits(model.embed(batch), batch)
            supervised = (batch.labels[0] != IGNORE_INDEX).nonzero()[:, 0]
            other = torch.tensor(theirs)[supervised]
            assert largest(ours, other) <= 1e-5 * max(1.0, float(ours.abs().max()))


def test_fewer_tiles_by_the_recipe(smolvlm: str) -> None:
    split = "model: {tower: {split: {kind: idefics3, longest_edge: 32}}, "
    model = built(parsed(smolvlm.replace("model: {", split)))
    (row, *_) = rows_of(parsed(smolvlm))
    assert len(model.processor.prompt(row).media) == 1
    saved = model.config.model.tower.split
    assert isinstance(saved, Idefics3Split) and saved.longest_edge == 32


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_a_head_that_is_the_embedding(
    kind: Literal["idefics3", "smolvlm"], tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """It is where the whole model's config says so, whatever the LLM's own says."""
    theirs = save_idefics3(tmp_path / "vlm", kind, tied=True)
    written = json.loads((tmp_path / "vlm" / "config.json").read_text())
    assert not written["text_config"]["tie_word_embeddings"]
    recipe = parsed(with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", kind))
    model = built(recipe)
    language: Any = model.llm.model
    assert language.get_output_embeddings().weight is language.get_input_embeddings().weight
    assert torch.equal(language.lm_head.weight, theirs.lm_head.weight)
    model.config = model.config.model_copy(update={"precision": "fp32"})
    model.changed |= {"llm", "tower"}
    model.save_pretrained(tmp_path / "saved")
    again = VisionLanguageModel.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    rows = rows_of(recipe)
    assert_same_outputs(logits_of(again, rows), logits_of(model, rows))
