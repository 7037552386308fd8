"""Processors of native models: templates taken apart or refused, bounds of pixels, other models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PaliGemmaProcessor, SiglipImageProcessor

from tests.helpers.gemma_samples import paligemma_tokenizer
from tests.helpers.native_models import KINDS, Kind, native_model, native_processor, save_native
from tests.helpers.native_tiled import llama4_config
from tests.helpers.vlm_samples import save_idefics3
from vlm_tune.config.model import NativeLlm, NativeSection
from vlm_tune.config.native import NativeModel
from vlm_tune.config.towers import NativeTower
from vlm_tune.data.chat.own_template import image_text, message
from vlm_tune.data.chat.processor_jinja import processor_jinja
from vlm_tune.data.types import Conversation, Message, Segment
from vlm_tune.errors import DataError, ModelError
from vlm_tune.model.language.native import NativeLLM
from vlm_tune.model.pretrained.native import (
    load_native_processor,
    native_section,
    renderer,
    stop_ids,
    template_of,
)
from vlm_tune.model.pretrained.native_images import native_images

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{{ part.text if part.type == 'text' else '<|image_pad|>' }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(jinja: str) -> Any:
    processor = native_processor("qwen3_vl")
    processor.chat_template = jinja
    return processor


def as_loaded(kind: Kind, folder: Path) -> tuple[Any, list[int]]:
    """A model's processor, as it is loaded from a folder, and the ids that end its answers."""
    native_processor(kind).save_pretrained(folder)
    native_model(kind).config.save_pretrained(folder)
    section = NativeSection(llm=NativeLlm(name=str(folder)))
    return load_native_processor(section, None), stop_ids(str(folder))


def texts_of(segments: list[Segment]) -> str:
    return "".join(str(segment.payload) for segment in segments)


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_and_its_end_train_and_nothing_else(kind: Kind, tmp_path: Path) -> None:
    processor, stops = as_loaded(kind, tmp_path)
    template = template_of(processor, stops)
    turns = [("user", "Hot?"), ("assistant", "No."), ("user", "Cold?"), ("assistant", "Yes.")]
    row = Conversation("one", tuple(Message(role, (text,)) for role, text in turns))
    segments = template.segments(row)
    trained = [segment.payload for segment in segments if segment.trained]
    (end,) = template.ends
    # GLM's own template has a line end there that a prompt without reasoning lacks.
    line = "\n" if kind == "glm46v" else ""
    assert trained == [f"{line}No.", end, f"{line}Yes.", end]
    text = texts_of(segments)
    messages = [message(role, text) for role, text in turns]
    # Molmo2's processor puts its start token before what the template writes.
    start = "<|endoftext|>" if kind == "molmo2" else ""
    theirs = start + renderer(processor)(messages, False)
    assert text == (theirs if theirs.rstrip().endswith(end) else f"{theirs}{end}")
    opened = texts_of(template.segments(row, prompt_only=True))
    assert opened == start + renderer(processor)(messages[:-1], True)
    # So does the template that is written in its place where the recipe has a system text.
    processor.chat_template = processor_jinja(template, None, image_text(renderer(processor)))
    assert renderer(processor)(messages, False) == text
    assert renderer(processor)(messages[:-1], True) == opened


def test_reasoning_is_left_out_unless_it_is_asked_for(tmp_path: Path) -> None:
    """Only the last answer has Qwen3.5's empty block of reasoning; GLM ends it by the next turn."""
    processor, stops = as_loaded("qwen3_5", tmp_path)
    opened = renderer(processor)([message("user", "Hot?")], True)
    assert opened.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    reasoned = processor.apply_chat_template(
        [message("user", "Hot?")], add_generation_prompt=True, enable_thinking=True, tokenize=False
    )
    assert reasoned.endswith("<|im_start|>assistant\n<think>\n")
    template = template_of(processor, stops)
    answer = Message("assistant", ("<think>\nIt is June.\n</think>\n\nYes.",))
    row = Conversation("one", (Message("user", ("Hot?",)), answer))
    with pytest.raises(DataError, match="answers are without reasoning") as caught:
        template.segments(row)
    assert "data.enable_thinking: true" in str(caught.value)


def test_a_default_system_text_gives_way_to_a_rows_own() -> None:
    template = template_of(native_processor("qwen2_5_vl"))
    assert template.default_system == "You are a helpful assistant."
    row = Conversation("one", (Message("user", ("Hot?",)), Message("assistant", ("No.",))))
    words = [str(segment.payload) for segment in template.segments(row, system="Be brief.")]
    assert "system\nBe brief." in words and not any("helpful" in word for word in words)


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        (
            PLAIN.replace("<|im_end|>\n", "<|im_end|>{{ '' if loop.last else ' ' }}\n"),
            "renders a turn depending on what follows it",
        ),
        (PLAIN.replace("assistant\n{% endif", "assistant\n<think>{% endif"), "opens an answer"),
        (PLAIN.replace("<|im_end|>\n", "\n"), "no special token stands after an answer"),
        (PLAIN.replace("{{ part.text", "{{ (part.text | upper)"), "changes a turn's text"),
        (PLAIN.replace("'<|image_pad|>'", "''"), "writes nothing for an image"),
        ("{{ raise_exception('tools only') }}", "tools only"),
        ("{% for a in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
    ],
)
def test_a_template_that_cant_be_taken_apart_is_refused(jinja: str, reason: str) -> None:
    processor = with_template(jinja)
    with pytest.raises(DataError, match="can't be split into turns") as caught:
        template_of(processor)
        native_images(processor)
    assert reason in str(caught.value)
    assert "data.template" in str(caught.value)


def test_bounds_of_pixels_are_those_of_the_recipe(tmp_path: Path) -> None:
    save_native(tmp_path, "qwen3_vl")

    def loaded(**bounds: int) -> Any:
        tower = NativeTower(**bounds)
        section = NativeSection(tower=tower, llm=NativeLlm(name=str(tmp_path)))
        return load_native_processor(section, None).image_processor.size

    assert loaded(max_pixels=4096).longest_edge == 4096
    assert loaded(min_pixels=2048).shortest_edge == 2048
    with pytest.raises(ModelError, match="at least 99999 and at most"):
        loaded(min_pixels=99999)


def test_bounds_of_pixels_are_refused_where_there_are_none(tmp_path: Path) -> None:
    native_processor("lfm2_vl").save_pretrained(tmp_path)
    section = NativeSection(tower=NativeTower(max_pixels=4096), llm=NativeLlm(name=str(tmp_path)))
    with pytest.raises(ModelError, match="has no pixel limits"):
        load_native_processor(section, None)


def test_models_without_images_are_refused(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no image-text-to-text model of"):
        native_section(NativeModel(kind="native", pretrained=str(tmp_path)))
    with pytest.raises(ModelError, match="no such folder"):
        native_section(NativeModel(kind="native", pretrained=str(tmp_path / "none")))
    with pytest.raises(ModelError, match="no processor in"):
        load_native_processor(NativeSection(llm=NativeLlm(name=str(tmp_path))), None)


@pytest.mark.parametrize("token", [0, 10**6])
def test_a_config_with_another_image_token_than_the_processors_is_refused(
    token: int, tmp_path: Path
) -> None:
    save_native(tmp_path, "qwen2_5_vl")
    native_images(native_processor("qwen2_5_vl"), str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_token_id": token}))
    with pytest.raises(ModelError, match=f"has image_token_id {token} in its config, and its"):
        native_images(native_processor("qwen2_5_vl"), str(tmp_path))


def test_a_processor_that_joins_images_is_refused(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    save_idefics3(tmp_path, "idefics3")
    with pytest.raises(ModelError, match="differently from each one alone"):
        native_images(AutoProcessor.from_pretrained(tmp_path))


def test_types_of_tokens_that_are_not_their_ids_are_refused() -> None:
    processor = native_processor("qwen3_vl")
    whole = processor.create_mm_token_type_ids
    processor.create_mm_token_type_ids = lambda ids: [
        [kind if place < 3 else 0 for place, kind in enumerate(row)] for row in whole(ids)
    ]
    with pytest.raises(ModelError, match="by more than its id"):
        native_images(processor)


def test_a_forward_pass_that_needs_marked_tokens_gets_them_or_is_refused() -> None:
    processor = native_processor("qwen3_vl")
    llm = NativeLLM(native_model("qwen3_vl"))
    llm.takes(native_images(processor))
    assert llm.blank is not None and llm.token_types["mm_token_type_ids"]
    with pytest.raises(ModelError, match="tells tokens apart by mm_token_type_ids"):
        llm.takes(replace(native_images(processor), token_types={"mm_token_type_ids": {}}))


def test_a_model_without_one_under_its_head_is_refused() -> None:
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(llama4_config())
    with pytest.raises(ModelError, match="no model without its head"):
        NativeLLM(model)


def test_a_processor_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    images: Any = SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    PaliGemmaProcessor(images, paligemma_tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="needs the processor of a chat model"):
        load_native_processor(NativeSection(llm=NativeLlm(name=str(tmp_path))), None)
