"""Processors of native models: templates taken apart or refused, bounds of pixels, other models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.helpers.native_models import KINDS, Kind, native_processor, save_native
from tests.helpers.vlm_samples import save_idefics3
from vlm_tune.config.model import NativeLlm, NativeSection
from vlm_tune.config.native import NativeModel
from vlm_tune.config.towers import NativeTower
from vlm_tune.data.chat.own_template import message
from vlm_tune.data.types import Conversation, Message
from vlm_tune.errors import DataError, ModelError
from vlm_tune.model.pretrained.native import (
    load_native_processor,
    native_images,
    native_section,
    renderer,
    template_of,
)

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


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_and_its_end_train_and_nothing_else(kind: Kind) -> None:
    processor = native_processor(kind)
    template = template_of(processor)
    turns = [("user", "Hot?"), ("assistant", "No."), ("user", "Cold?"), ("assistant", "Yes.")]
    row = Conversation("one", tuple(Message(role, (text,)) for role, text in turns))
    segments = template.segments(row)
    trained = [segment.payload for segment in segments if segment.trained]
    assert trained == ["No.", "<|im_end|>", "Yes.", "<|im_end|>"]
    text = "".join(str(segment.payload) for segment in segments)
    theirs = renderer(processor)([message(role, text) for role, text in turns], False)
    assert text == theirs


def test_a_default_system_text_gives_way_to_a_rows_own() -> None:
    template = template_of(native_processor("qwen2_5_vl"))
    assert template.default_system == "You are a helpful assistant."
    row = Conversation("one", (Message("user", ("Hot?",)), Message("assistant", ("No.",))))
    words = [str(segment.payload) for segment in template.segments(row, system="Be brief.")]
    assert "system\nBe brief." in words and not any("helpful" in word for word in words)


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        # As Qwen3.5's: the last answer has a block for thoughts, earlier ones have none.
        (
            PLAIN.replace(
                "<|im_start|>{{ m.role }}\n",
                "<|im_start|>{{ m.role }}\n"
                "{{ '<think></think>' if loop.last and m.role != 'user' }}",
            ),
            "opens an answer in one way",
        ),
        (PLAIN.replace("assistant\n{% endif", "assistant\n<think>{% endif"), "opens an answer"),
        (PLAIN.replace("<|im_end|>\n", "\n"), "no special token stands after an answer"),
        (PLAIN.replace("{{ part.text", "{{ (part.text | upper)"), "changes a turn's text"),
        (PLAIN.replace("'<|image_pad|>'", "''"), "nothing in an image's place"),
        ("{{ raise_exception('tools only') }}", "tools only"),
    ],
)
def test_a_template_that_cant_be_taken_apart_is_refused(jinja: str, reason: str) -> None:
    processor = with_template(jinja)
    with pytest.raises(DataError, match="can't be taken apart") as caught:
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
    with pytest.raises(ModelError, match="takes no bounds of pixels"):
        load_native_processor(section, None)


def test_models_without_images_are_refused(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no image-text-to-text model of"):
        native_section(NativeModel(kind="native", pretrained=str(tmp_path)))
    with pytest.raises(ModelError, match="no such folder"):
        native_section(NativeModel(kind="native", pretrained=str(tmp_path / "none")))
    with pytest.raises(ModelError, match="no processor in"):
        load_native_processor(NativeSection(llm=NativeLlm(name=str(tmp_path))), None)


def test_a_processor_that_joins_images_is_refused(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    save_idefics3(tmp_path, "idefics3")
    with pytest.raises(ModelError, match="another thing than of each"):
        native_images(AutoProcessor.from_pretrained(tmp_path))
