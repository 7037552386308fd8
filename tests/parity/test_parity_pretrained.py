"""Existing LLaVA, BLIP-2 and InstructBLIP models taken over by a recipe.

Inputs, logits, gradients and text of transformers' own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.helpers.tiny_models import built, largest, parsed, rows_of
from tests.helpers.transformers_parity import (
    assert_same_logits,
    our_step,
    peft_over,
    same_gradients,
    their_step,
    trained_step,
    until_stop,
    with_adapters,
)
from tests.helpers.vlm_samples import (
    Blip,
    one_batch,
    our_pixels,
    save_blip,
    save_llava,
    save_llava_original,
    their_inputs,
    with_pretrained,
)
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.types import IGNORE_INDEX, Conversation
from vlm_tune.exporting import export
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.families.blip import QFORMER_LAYER
from vlm_tune.model.language.decoding import Decoding

Tiny = Callable[..., str]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)


def wide(path: Path, text: str) -> None:
    """Adds a row about an image that is not square to a messages file."""
    image = Image.radial_gradient("L").resize((60, 36)).convert("RGB")
    image.save(path.parent / "wide.png")
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "a ring"}]
    with path.open("a") as file:
        file.write(json.dumps({"messages": turns, "images": ["wide.png"]}) + "\n")


def model_and_rows(recipe: str) -> tuple[VisionLanguageModel, list[Conversation]]:
    loaded: Recipe = parsed(recipe)
    return built(loaded).eval(), rows_of(loaded)


def llava_name(name: str) -> str | None:
    stems = {
        "model.vision_tower.": "tower.model.",
        "model.language_model.": "llm.model.model.",
        "lm_head.": "llm.model.lm_head.",
        "model.multi_modal_projector.linear_1.": "connector.layers.0.",
        "model.multi_modal_projector.linear_2.": "connector.layers.2.",
    }
    return next(
        ours + name.removeprefix(theirs)
        for theirs, ours in stems.items()
        if name.startswith(theirs)
    )


def same_as_llava(
    model: VisionLanguageModel, theirs: Any, source: Path, rows: list[Conversation]
) -> None:
    """Asserts equal token ids, pixels, logits, gradients and greedy text.

    It compares the first row and the wide one.
    """
    for row in (rows[0], rows[-1]):
        example, batch = one_batch(model, row)
        given = their_inputs(
            source,
            row,
            f"{SYSTEM} USER: <image>{row.messages[0].text} ASSISTANT: {row.messages[1].text}",
        )
        image = theirs.config.image_token_id
        ids = batch.input_ids.masked_fill(batch.image_mask, image)
        assert given["input_ids"].tolist() == ids.tolist()
        assert largest(our_pixels(model, batch), given["pixel_values"]) <= 1e-5
        logits = theirs(**given).logits
        supervised = batch.labels != IGNORE_INDEX
        assert (
            largest(model.llm.supervised_logits(model.embed(batch), batch), logits[supervised])
            <= 1e-5
        )
        theirs.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(logits[supervised], batch.labels[supervised])
        same_gradients(our_step(model, batch), their_step(theirs, loss, llava_name))
        prompt = their_inputs(
            source, row, f"{SYSTEM} USER: <image>{row.messages[0].text} ASSISTANT:"
        )
        generated = theirs.generate(**prompt, max_new_tokens=6, do_sample=False)[
            0, prompt["input_ids"].shape[1] :
        ].tolist()
        stops = model.processor.stop_ids
        expected = until_stop(generated, stops)
        answer = answer_prompts(
            model, [model.processor.prompt(row)], Decoding(6), fetch=model.processor.images
        )
        assert answer == [model.processor.decode(expected)]
        assert len(example.media) == 1


@pytest.mark.parametrize("pad", [False, True])
def test_a_llava_of_transformers(
    pad: bool, tiny_recipe: Tiny, color_rows: Path, tmp_path: Path
) -> None:
    wide(color_rows, "What is this?")
    text = tiny_recipe("causal")
    folder = tmp_path / "llava"
    theirs = save_llava(folder, rows_of(parsed(text)), pad=pad)
    model, rows = model_and_rows(with_pretrained(text, folder, "vicuna"))
    tower: Any = model.config.model.tower
    assert (tower.layer, tower.resize, tower.class_token) == (-2, "pad" if pad else "crop", False)
    same_as_llava(model, theirs, folder, rows)


def test_a_llava_with_class_token_another_layer_and_new_key_names(
    tiny_recipe: Tiny, color_rows: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    text = tiny_recipe("causal")
    folder = tmp_path / "llava"
    theirs = save_llava(
        folder, rows_of(parsed(text)), vision_feature_layer=1, vision_feature_select_strategy="full"
    )
    file = folder / "model.safetensors"
    renamed = {}
    for key, value in load_file(file).items():
        new = key.replace("language_model.lm_head", "lm_head").replace(
            "language_model.model.", "model.language_model."
        )
        renamed[f"model.{new}" if new.startswith(("vision_tower", "multi_modal")) else new] = value
    save_file(renamed, file, metadata={"format": "pt"})
    model, rows = model_and_rows(with_pretrained(text, folder, "vicuna"))
    tower: Any = model.config.model.tower
    assert (tower.layer, tower.class_token, model.processor.spec.tokens_per_image) == (-3, True, 5)
    _, batch = one_batch(model, rows[0])
    ids = batch.input_ids.masked_fill(batch.image_mask, theirs.config.image_token_id)
    expected = theirs(input_ids=ids, pixel_values=our_pixels(model, batch)).logits[
        batch.labels != IGNORE_INDEX
    ]
    assert largest(model.llm.supervised_logits(model.embed(batch), batch), expected) <= 1e-5


def test_a_llava_with_features_of_several_layers_and_no_biases(
    tiny_recipe: Tiny, color_rows: Path, tmp_path: Path
) -> None:
    """And it comes out again as one, with the blocks that its features need."""
    wide(color_rows, "What is this?")
    text = tiny_recipe("causal")
    folder = tmp_path / "llava"
    changes = {"vision_feature_layer": [-2, 1, -3], "multimodal_projector_bias": False}
    theirs = save_llava(folder, rows_of(parsed(text)), **changes)
    model, rows = model_and_rows(with_pretrained(text, folder, "vicuna"))
    assert model.config.model.tower.layer == [-2, -3, -3]
    same_as_llava(model, theirs, folder, rows)
    model.save_pretrained(tmp_path / "model")
    report = export(tmp_path / "model", tmp_path / "exported", dtype="fp32")
    assert report.difference is not None and report.allowed is not None
    assert report.difference <= report.allowed and report.same_text
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written["vision_feature_layer"] == [-1, -2, -2]
    assert not written["multimodal_projector_bias"]
    assert written["vision_config"]["num_hidden_layers"] == 2


@pytest.mark.parametrize("tower", [False, True])
def test_a_llava_of_the_original_layout(
    tower: bool, tiny_recipe: Tiny, color_rows: Path, tmp_path: Path
) -> None:
    """With the tower's weights inside, and with those of the CLIP that it names."""
    wide(color_rows, "What is this?")
    text = tiny_recipe("causal")
    theirs = save_llava(tmp_path / "llava", rows_of(parsed(text)), pad=True)
    folder = tmp_path / "original"
    save_llava_original(folder, theirs, tmp_path / "llava", tower=tower)
    model, rows = model_and_rows(with_pretrained(text, folder, "vicuna"))
    assert model.config.model.tower.resize == "pad"
    same_as_llava(model, theirs, tmp_path / "llava", rows)


def blip_name(name: str) -> str:
    if name.startswith("vision_model.post_layernorm."):
        return name.replace("vision_model.post_layernorm", "tower.norm")
    stems = {
        "vision_model.": "tower.model.",
        "language_model.": "llm.model.",
        "language_projection.": "connector.project.",
        "qformer.layernorm.": "connector.norm.",
        "qformer.embeddings.layernorm.": "connector.norm.",
        "qformer.embeddings.word_embeddings.": "connector.words.",
        "qformer.embeddings.position_embeddings.": "connector.positions.",
    }
    if name == "query_tokens":
        return "connector.queries"
    for theirs, ours in stems.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    place, rest = name.removeprefix("qformer.encoder.layer.").split(".", 1)
    stem, _, kind = rest.rpartition(".")
    return (
        f"connector.layers.{place}."
        f"{next(ours for ours, theirs in QFORMER_LAYER.items() if theirs == stem)}.{kind}"
    )


@pytest.mark.parametrize("kind", ["blip-2", "instructblip"])
def test_blip_with_flan_t5(kind: Blip, tiny_recipe: Tiny, color_rows: Path, tmp_path: Path) -> None:
    wide(color_rows, "Is THIS a circle, or  two?")
    text = tiny_recipe("seq2seq")
    folder = tmp_path / "blip"
    theirs = save_blip(folder, rows_of(parsed(text)), kind)
    model, rows = model_and_rows(with_pretrained(text, folder, "blip2"))
    assert model.processor.images.resize == "squash"
    outputs = []
    for row in (rows[0], rows[-1]):
        _, batch = one_batch(model, row)
        given = their_inputs(folder, row, row.messages[0].text)
        ids = batch.input_ids.masked_fill(batch.image_mask, theirs.config.image_token_id)
        assert given["input_ids"].tolist() == ids.tolist()
        assert largest(our_pixels(model, batch), given["pixel_values"]) <= 1e-5
        theirs.zero_grad(set_to_none=True)
        output = theirs(**given, labels=batch.labels)
        logits = model.llm.supervised_logits(model.embed(batch), batch)
        assert largest(logits, output.logits[0]) <= 1e-5
        wanted = their_step(theirs, output.loss, blip_name)
        gradients = our_step(model, batch)
        same_gradients(gradients, wanted)
        generated = theirs.generate(**given, max_new_tokens=6, do_sample=False)[0, 1:].tolist()
        expected = until_stop(generated, model.processor.stop_ids)
        answer = answer_prompts(
            model, [model.processor.prompt(row)], Decoding(6), fetch=model.processor.images
        )
        assert answer == [model.processor.decode(expected)]
        outputs.append(logits)
    assert largest(outputs[0][:1], outputs[1][:1]) > 1e-3


@pytest.mark.parametrize("kind", ["blip-2", "instructblip"])
def test_a_lora_step_over_blip_is_that_of_peft_over_transformers(
    kind: Blip, tiny_recipe: Tiny, color_rows: Path, tmp_path: Path
) -> None:
    """On tower and T5, with the Q-Former in full."""
    text = tiny_recipe("seq2seq")
    folder = tmp_path / "blip"
    theirs = save_blip(folder, rows_of(parsed(text)), kind)
    recipe = with_pretrained(text, folder, "blip2")
    model, rows = model_and_rows(recipe)
    tuned = with_adapters(model, recipe)
    whole = peft_over(theirs, tuned, blip_name)
    _, batch = one_batch(model, rows[0])
    given = their_inputs(folder, rows[0], rows[0].messages[0].text)
    output = whole(**given, labels=batch.labels)
    with torch.no_grad():
        before, logits = (
            each.llm.supervised_logits(each.embed(batch), batch) for each in (model, tuned)
        )
    assert largest(before, logits) > 1e-3
    assert_same_logits(logits, output.logits[0].detach())
    wanted = their_step(
        whole, output.loss, lambda name: blip_name(name.replace(".base_layer.", "."))
    )
    same_gradients(trained_step(tuned, batch), wanted)
