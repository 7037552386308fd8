"""Exported folders compute in plain transformers what the model computes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.helpers.export_samples import llava_text, opened, photos, saved_model, tower_text
from tests.helpers.tiny_models import (
    LORA_TUNE,
    batch_of,
    built,
    cli,
    largest,
    parsed,
    rows_of,
    run_card,
    save_llm,
    tuned_by,
    wake_adapters,
    with_llm,
    with_tower,
    with_tune,
)
from vlm_tune.errors import ModelError
from vlm_tune.exporting import export
from vlm_tune.exporting.verify import observe
from vlm_tune.generation.chat import VisionLanguageModel


@pytest.mark.parametrize(
    "tower",
    [
        "open_clip",
        "open_clip class token, pad",
        "clip",
        "clip class token",
        "clip larger images",
        "siglip",
        "siglip larger images",
    ],
)
def test_every_tower_gives_the_same_logits(
    tower: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    text = with_tower(llava_text(tiny_recipe), tower_text(tmp_path, tower))
    photos(tmp_path)
    run, recipe = saved_model(text, tmp_path / "saved")
    report = export(run, tmp_path / "llava", dtype="fp32")
    assert report.difference is not None and report.difference <= 1e-5
    assert report.same_text and report.merged == []
    theirs, processor = opened(tmp_path / "llava")
    assert type(theirs).__name__ == "LlavaForConditionalGeneration"
    ours = VisionLanguageModel.from_pretrained(run, dtype=torch.float32)
    for row in rows_of(recipe):
        # All of it by their own means, from the image file on.
        (image,), question = row.media, row.messages[0].parts[1]
        shown = Image.open(io.BytesIO(image.read()))
        turns = [
            {
                "role": "user",
                "content": [{"type": "image", "image": shown}, {"type": "text", "text": question}],
            }
        ]
        inputs = processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        batch = batch_of(ours, [ours.processor.prompt(row)])
        with torch.no_grad():
            our_logits = ours.llm.model(inputs_embeds=ours.embed(batch)).logits
            their_logits = theirs(**inputs).logits[..., : our_logits.shape[-1]]
        assert largest(their_logits, our_logits) <= 1e-5


def test_logits_depend_on_the_image(tiny_recipe: Callable[..., str], tmp_path: Path) -> None:
    """A dependence that the comparisons above would not see otherwise."""
    run, recipe = saved_model(llava_text(tiny_recipe), tmp_path / "saved")
    ours = VisionLanguageModel.from_pretrained(run, dtype=torch.float32)
    logits, _ = observe(ours, rows_of(recipe)[:4])
    rows = logits.unflatten(0, (-1, len(ours.processor.tokenizer)))
    assert largest(rows[0], rows[2 * (len(rows) // 4)]) > 1e-2


@pytest.mark.parametrize("connector", ["{kind: linear}", "{kind: mlp, depth: 2}"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_adapters_are_merged_on_the_way(
    connector: str, dtype: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    run, _ = saved_model(
        llava_text(tiny_recipe, connector), tmp_path / "saved", lora=True, sharpen=1.0
    )
    report = export(run, tmp_path / "llava", dtype=dtype)
    assert report.merged == ["llm"] and report.same_text
    assert report.difference is not None and report.difference <= 1e-5
    theirs, _ = opened(tmp_path / "llava")
    assert str(theirs.dtype).endswith(
        {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype]
    )


def test_shards_card_and_command_line(
    tiny_recipe: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _ = saved_model(llava_text(tiny_recipe), tmp_path / "saved")
    (run / "result.json").write_text(json.dumps({"accuracy": 0.875, "n": 8, "by_category": {}}))
    out = json.loads(
        cli(
            "export",
            str(run),
            "--output",
            str(tmp_path / "llava"),
            "--dtype",
            "fp32",
            "--max-shard-size",
            "300KB",
            "--json",
        )
    )
    assert out["difference"] <= 1e-5 and out["same_text"] and out["format"] == "transformers"
    names = {path.name for path in (tmp_path / "llava").iterdir()}
    assert names >= {
        "model.safetensors.index.json",
        "chat_template.jinja",
        "generation_config.json",
        "processor_config.json",
        "tokenizer.json",
    }
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert json.loads((tmp_path / "llava" / "export.json").read_text()) == out
    card = (tmp_path / "llava" / "README.md").read_text()
    assert (
        "Exact match on 8 test questions: 0.8750" in card
        and "name: tiny" in card
        and "library_name: transformers" in card
    )
    assert run_card(tmp_path / "llava", monkeypatch, capsys)
    output = cli("export", str(run), "--output", str(tmp_path / "plain"), "--no-verify")
    assert "not verified" in output
    assert "not verified" in (tmp_path / "plain" / "README.md").read_text()


def test_stop_ids_are_the_models(tiny_recipe: Callable[..., str], tmp_path: Path) -> None:
    run, _ = saved_model(llava_text(tiny_recipe), tmp_path / "saved")
    export(run, tmp_path / "llava")
    theirs, _ = opened(tmp_path / "llava")
    ours = VisionLanguageModel.from_pretrained(run)
    assert theirs.generation_config.eos_token_id == ours.processor.stop_ids
    assert theirs.generation_config.pad_token_id == ours.processor.spec.pad_id
    assert not theirs.generation_config.do_sample


def test_rows_that_no_token_has_take_the_image_token(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """An embedding that is larger than its tokenizer, as Qwen's, is not resized."""
    text = llava_text(tiny_recipe)
    llm = save_llm(tmp_path / "base", "causal", rows_of(parsed(text)), vocab_size=512)
    run, _ = saved_model(with_llm(text, llm, "causal"), tmp_path / "saved")
    assert export(run, tmp_path / "llava", dtype="fp32").difference is not None
    theirs, processor = opened(tmp_path / "llava")
    assert theirs.get_input_embeddings().num_embeddings == 512
    assert theirs.config.image_token_id == len(processor.tokenizer) - 1 < 512


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_an_adapter_opens_in_plain_peft(
    kind: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

    base = save_llm(tmp_path / "base", kind, rows_of(parsed(tiny_recipe(kind))))
    given = GenerationConfig.from_pretrained(base)
    given.repetition_penalty = 1.5
    (base / "generation_config.json").write_text(given.to_json_string(use_diff=True))
    text = with_llm(tiny_recipe(kind), base, kind)
    recipe = parsed(with_tune(text, LORA_TUNE))
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    model.save_pretrained(tmp_path / "saved")
    report = export(tmp_path / "saved", tmp_path / "adapter", format="adapter")
    assert report.difference is not None and report.difference <= 1e-5
    assert len(report.notes) == 2 and "repetition_penalty 1.5" in report.notes[0]
    assert "LoRA alone, and not the connector or the tower's weights: serve" in report.notes[1]
    factory: Any = AutoModelForCausalLM if kind == "causal" else AutoModelForSeq2SeqLM
    theirs = PeftModel.from_pretrained(
        factory.from_pretrained(base), str(tmp_path / "adapter")
    ).eval()
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(base)
    ids = torch.arange(5, 20)[None]
    given = {"input_ids": ids} if kind == "causal" else {"input_ids": ids, "labels": ids}
    with torch.no_grad():
        assert largest(theirs(**given).logits, model.eval().llm.model(**given).logits) <= 1e-5
    assert (tmp_path / "adapter" / "connector.safetensors").is_file()


def test_adapters_that_can_not_be_exported(tiny_recipe: Callable[..., str], tmp_path: Path) -> None:
    run, recipe = saved_model(llava_text(tiny_recipe), tmp_path / "saved", lora=True)
    with pytest.raises(ModelError, match="no hub name or folder of its own"):
        export(run, tmp_path / "adapter", format="adapter")
    built(recipe).save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match="no adapter"):
        export(tmp_path / "plain", tmp_path / "adapter", format="adapter")
    base = save_llm(tmp_path / "base", "causal", rows_of(recipe))
    recipe = parsed(with_tune(with_llm(tiny_recipe("causal"), base, "causal"), LORA_TUNE))
    model = built(recipe)
    tuned_by(model, recipe)
    model.save_pretrained(tmp_path / "zero")
    with pytest.raises(ModelError, match="has no effect"):
        export(tmp_path / "zero", tmp_path / "adapter", format="adapter")
    assert not (tmp_path / "adapter").exists()
