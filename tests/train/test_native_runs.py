"""Runs of native models: resumed, merged and exported in their own layout, opened elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from tests.helpers.native_families import NEWEST
from tests.helpers.native_models import FAMILIES, save_native, with_native, write_questions
from tests.helpers.served import chat, served, with_images
from tests.helpers.tiny_models import (
    LORA_TUNE,
    assert_same_bits,
    built,
    interrupted,
    parsed,
    rows_of,
    tensors_of,
    with_tune,
)
from tests.helpers.tiny_recipes import tiny_text
from tests.helpers.transformers_parity import write_rows
from tests.parity.test_parity_native import their_inputs
from vlm_tune import VisionLanguageModel, export, merge
from vlm_tune.api import sft
from vlm_tune.config.native import NativeModel
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.chat.own_template import message
from vlm_tune.errors import ModelError
from vlm_tune.exporting import possible_exports
from vlm_tune.model.pretrained.native import renderer
from vlm_tune.serving.engine import BatchingEngine

BOTH = """
tune:
  - {match: "connector.*", how: full}
  - {match: "tower.*", how: lora, r: 4, learning_rate: 1.0e-3}
  - {match: "llm.*", how: lora, r: 4}
train:"""


def recipe_of(
    folder: Path, output: str, tune: str = LORA_TUNE, extra: str = "", **changes: Any
) -> Recipe:
    """A recipe of four steps on the model in `vlm`."""
    text = tiny_text("causal", folder / "rows.jsonl", folder / output)
    return parsed(
        with_tune(with_native(text, folder / "vlm", extra), tune),
        train__batch_size=2,
        train__log_every=1,
        evaluate__every=2,
        **changes,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the model `vlm`, rows about odd images, and the finished run `run`."""
    folder = tmp_path_factory.mktemp("native")
    write_rows(folder / "rows.jsonl")
    save_native(folder / "vlm", "qwen3_vl")
    sft(recipe_of(folder, "run", BOTH))
    yield folder


def test_a_resumed_run_is_the_uninterrupted_one(trained: Path) -> None:
    recipe = recipe_of(trained, "stopped", BOTH)
    interrupted(partial(sft, recipe), stage=0, step=3)
    sft(recipe, resume=True)
    assert_same_bits(trained / "run" / "model", trained / "stopped" / "model")
    one, other = (
        max((trained / name).glob("stages/*/checkpoints/step-*")) for name in ("run", "stopped")
    )
    assert one.name == other.name
    assert_same_bits(one, other)


def test_a_resumed_run_with_branches_is_the_uninterrupted_one(tmp_path: Path) -> None:
    write_questions(tmp_path / "rows.jsonl")
    save_native(tmp_path / "vlm", "qwen3_vl")
    sft(recipe_of(tmp_path, "run", BOTH, data__group="image"))
    recipe = recipe_of(tmp_path, "stopped", BOTH, data__group="image")
    interrupted(partial(sft, recipe), stage=0, step=3)
    sft(recipe, resume=True)
    assert_same_bits(tmp_path / "run" / "model", tmp_path / "stopped" / "model")


def test_parts_are_known_by_names_and_share_one_adapter(trained: Path) -> None:
    table = json.loads((trained / "run" / "tuning.json").read_text())
    rows = {row["match"]: row for row in table[0]["rows"] if row["trained"]}
    assert rows.keys() == {"connector.*", "tower.*", "llm.*"}
    assert rows["tower.*"]["learning_rate"] == 1e-3
    assert rows["llm.*"]["learning_rate"] == 3e-3
    names = tensors_of(trained / "run" / "model" / "adapter").keys()
    targets = {name.partition(".lora_")[0].partition("base_model.model.")[2] for name in names}
    assert "model.visual.blocks.0.attn.qkv" in targets
    assert "model.language_model.layers.0.self_attn.q_proj" in targets
    assert not any("merger" in name or "lm_head" in name for name in targets)


def test_an_export_opens_in_plain_transformers(trained: Path) -> None:
    from transformers import AutoModelForImageTextToText

    report = export(trained / "run", trained / "out", dtype="fp32")
    assert report.difference is not None and report.difference <= 1e-4
    theirs = AutoModelForImageTextToText.from_pretrained(trained / "out").eval()
    ours = VisionLanguageModel.from_pretrained(trained / "run", dtype="fp32")
    image = str(trained / "wide.png")
    answer = ours.chat("What is it?", images=[image], max_new_tokens=6)
    row = rows_of(recipe_of(trained, "run"))[0]
    given = their_inputs(trained / "out", row, prompt=True)
    ids = theirs.generate(**given, max_new_tokens=6)[0, given["input_ids"].shape[1] :]
    assert ours.processor.decode(ids.tolist()) == answer
    with pytest.raises(ModelError, match="of its own checkpoint"):
        export(trained / "run", trained / "gguf", format="gguf")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind in NEWEST or kind == "molmo2"])
def test_the_newest_families_train_and_open_in_plain_transformers(
    kind: str, tmp_path: Path
) -> None:
    """Verified there: ids, tensors of images, logits, greedy text; also merged, and a start."""
    write_rows(tmp_path / "rows.jsonl")
    save_native(tmp_path / "vlm", kind)
    recipe = recipe_of(tmp_path, "run", BOTH, train__steps=2, data__max_length=512)
    sft(recipe)
    report = export(tmp_path / "run", tmp_path / "out", dtype="fp32")
    assert report.difference is not None and report.difference <= 1e-4
    assert report.same_text and report.rows == 4
    merged = merge(tmp_path / "run", tmp_path / "merged", dtype="fp32")
    assert merged.difference_to_base > 1e-3
    (tmp_path / "vlm").rename(tmp_path / "gone")
    again = built(
        recipe.model_copy(
            update={"model": NativeModel(kind="native", pretrained=str(tmp_path / "merged"))}
        )
    )
    ours = VisionLanguageModel.from_pretrained(tmp_path / "merged", dtype="fp32")
    assert again.processor.template == ours.processor.template
    chat_of = [
        model.chat("What is it?", images=[str(tmp_path / "wide.png")]) for model in (again, ours)
    ]
    assert chat_of[0] == chat_of[1]


def test_an_adapter_is_plain_pefts_over_the_checkpoint(trained: Path) -> None:
    report = export(trained / "run", trained / "adapter", format="adapter")
    assert report.difference is not None and report.difference <= 1e-4
    assert report.same_text
    assert (trained / "adapter" / "processor_config.json").is_file()


def test_a_server_answers_as_chat_does(trained: Path) -> None:
    model = VisionLanguageModel.from_pretrained(trained / "run")
    engine = BatchingEngine({"tiny": model}, queue=4, batch=2)
    image = (trained / "wide.png").read_bytes()
    replies = [chat(served(model, engine), with_images(image, max_tokens=6)) for _ in range(2)]
    engine.close(10)
    texts = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
    expected = model.chat("What color?", images=[image], max_new_tokens=6)
    assert texts == [expected, expected]


def test_a_merged_model_is_a_start_again(trained: Path) -> None:
    report = merge(trained / "run", trained / "merged", dtype="fp32")
    assert report.difference_to_base > 1e-3
    again = recipe_of(trained, "again").model_copy(
        update={"model": NativeModel(kind="native", pretrained=str(trained / "merged"))}
    )
    assert possible_exports(again)["transformers"] is None
    assert built(again).config.llm.name == str(trained / "merged" / "llm")


def test_a_quantised_model_packs_the_blocks_of_its_llm(trained: Path) -> None:
    frozen = BOTH.replace("how: full", "how: frozen")
    packing = ", llm: {quantize: nf4}, max_pixels: 4096"
    settings: dict[str, Any] = {"train__precision": "bf16", "data__system": "Be brief."}
    sft(recipe_of(trained, "packed", frozen, packing, **settings))
    model = VisionLanguageModel.from_pretrained(trained / "packed")
    packed = [
        name
        for name, layer in model.llm.model.named_modules()
        if type(layer).__name__ == "Linear4bit"
    ]
    assert len(packed) == 3 * 7
    assert all(name.startswith("model.language_model.layers.") for name in packed)
    report = merge(trained / "packed", trained / "unpacked", dtype="fp32")
    assert report.quantized == "nf4"
    # Its own processor writes the recipe's system text.
    processor: Any = AutoProcessor.from_pretrained(trained / "unpacked" / "llm")
    assert "Be brief." in renderer(processor)([message("user", "Hot?")], False)
    written = json.loads((trained / "unpacked" / "llm" / "processor_config.json").read_text())
    assert written["image_processor"]["size"]["longest_edge"] == 4096
