"""Which model a converted recipe has: one of a family, a native one, or LLaVA-1.5 in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import vlm_tune
from tests.helpers.gemma_samples import save_gemma3
from tests.helpers.native_models import native_model, save_native
from tests.helpers.tiny_recipes import write_color_rows
from vlm_tune.config.model import PretrainedModel
from vlm_tune.config.native import NativeModel
from vlm_tune.recipe_writer.converting import llama_factory, ms_swift
from vlm_tune.recipe_writer.converting.models import OPENGVLAB, REMOTE
from vlm_tune.recipe_writer.models import LLAVA
from vlm_tune.recipe_writer.written import Written

FAMILY = {
    ("template", "llava"): "vicuna",
    ("template", "llava_next"): "vicuna",
    ("template", "llava_next_llama3"): "llama3",
    ("template", "llava_next_mistral"): "llava_mistral",
    ("template", "llava_next_yi"): "chatml",
    ("template", "gemma3"): "gemma3",
    ("template", "intern_vl"): "internvl",
    ("template", "paligemma"): "paligemma",
    ("template", "pixtral"): "pixtral",
    ("template", "smolvlm"): "smolvlm",
    ("model_type", "llava1_6_mistral_hf"): "llava_mistral",
    ("model_type", "llava1_6_vicuna_hf"): "vicuna",
    ("model_type", "llava_next_qwen_hf"): "chatml",
    ("model_type", "llava_onevision_hf"): "llava_onevision",
    ("model_type", "gemma3_vision"): "gemma3",
    ("model_type", "idefics3"): "idefics3",
    ("model_type", "internvl_hf"): "internvl",
    ("model_type", "mistral3"): "mistral3",
    ("model_type", "paligemma"): "paligemma",
    ("model_type", "pixtral"): "pixtral",
}
"""Chat formats by the frameworks' names."""
LORA = {"template": "finetuning_type", "model_type": "tuner_type"}
"""The key of LoRA, by the key that names the model's kind."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder of its own."""
    monkeypatch.chdir(tmp_path)


def converted(values: dict[str, Any], **options: Any) -> Written:
    Path("run.json").write_text(json.dumps({"learning_rate": 1e-4, **values}))
    return vlm_tune.init(configuration="run.json", force=True, **options)


def named(key: str, name: str, model: str, **values: Any) -> Written:
    """A configuration whose framework names the kind of the model."""
    place = "model_name_or_path" if key == "template" else "model"
    return converted({key: name, place: model, LORA[key]: "lora", **values})


def reasons(written: Written) -> dict[str, str]:
    return {each.key: each.reason for each in written.unmatched}


@pytest.mark.parametrize(("key", "name"), FAMILY)
def test_a_name_of_a_family_gives_its_chat_format(key: str, name: str) -> None:
    written = named(key, name, "some/model-hf")
    model = written.recipe.model
    assert isinstance(model, PretrainedModel) and model.pretrained == "some/model-hf"
    assert written.recipe.data.template == FAMILY[key, name]
    text = " ".join(written.path.read_text().replace("#", "").split())
    assert "its config is not on this machine" in text
    assert ("which ends in -hf" in text) == (written.recipe.data.template == "internvl")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("template", "qwen2_vl"),
        ("template", "qwen3_vl_nothink"),
        ("template", "video_llava"),
        ("model_type", "qwen2_5_vl"),
        ("model_type", "glm4_1v"),
        ("model_type", "llava_next_video_hf"),
    ],
)
def test_other_models_of_transformers_are_native(key: str, name: str) -> None:
    written = named(key, name, "some/model")
    model = written.recipe.model
    assert isinstance(model, NativeModel) and model.pretrained == "some/model"
    assert written.recipe.data.template == "own" and not written.unmatched
    default = 768 * 768 if name.startswith("qwen") and key == "template" else None
    assert model.max_pixels == default and model.min_pixels is None


@pytest.mark.parametrize(
    ("key", "name", "model"),
    [
        ("template", "minicpm_v", "openbmb/MiniCPM-V-2_6"),
        ("model_type", "deepseek_vl", "deepseek-ai/deepseek-vl-7b-chat"),
        ("model_type", "ovis2", "AIDC-AI/Ovis2-2B"),
        ("model_type", "internvl3_5", "OpenGVLab/InternVL3_5-8B"),
    ],
)
def test_a_model_with_code_of_its_own_is_replaced(key: str, name: str, model: str) -> None:
    written = named(key, name, model)
    assert written.recipe.model.model_dump()["pretrained"] == LLAVA
    assert written.recipe.data.template == "vicuna"
    (reason,) = reasons(written).values()
    assert "code that comes with a checkpoint is never run" in reason
    assert ("which ends in -hf" in reason) == model.startswith("OpenGVLab")


def test_an_internvl_whose_name_ends_in_hf_is_in_transformers_layout() -> None:
    written = named("model_type", "internvl3_5", "OpenGVLab/InternVL3_5-8B-HF")
    assert written.recipe.model.model_dump()["pretrained"] == "OpenGVLab/InternVL3_5-8B-HF"
    assert written.recipe.data.template == "internvl" and not written.unmatched


def test_transformers_has_every_type_that_a_name_stands_for() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    types = {*llama_factory.VLM_TEMPLATES.values(), *ms_swift.MODEL_TYPES.values()}
    assert types - MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() == {
        "pixtral",
        OPENGVLAB,
        REMOTE,
    }


def test_the_models_config_goes_before_its_name(tmp_path: Path) -> None:
    """TRL's configurations name no kind, and other names may be wrong."""
    save_gemma3(tmp_path / "gemma")
    values = {"model_name_or_path": "gemma", "use_peft": True, "lora_target_modules": ["q_proj"]}
    written = converted(values)
    assert isinstance(written.recipe.model, PretrainedModel)
    assert written.recipe.data.template == "gemma3"
    native_model("qwen3_vl").config.save_pretrained(tmp_path / "qwen")
    written = converted(values | {"model_name_or_path": "qwen"})
    assert isinstance(written.recipe.model, NativeModel)
    assert written.recipe.tune[2].model_dump()["target_modules"] == ["q_proj"]
    assert "is not on this machine" not in written.path.read_text().partition("data:")[0]
    assert isinstance(named("template", "llava", "qwen").recipe.model, NativeModel)
    (tmp_path / "other").mkdir()
    config = {"model_type": "internvl_chat", "vision_config": {}, "auto_map": {}}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    written = named("template", "intern_vl", "other")
    assert "which ends in -hf" in reasons(written)["model_name_or_path"]


def test_what_a_native_model_does_not_take_is_left_out_with_the_reason() -> None:
    written = named(
        "template",
        "qwen3_vl",
        "Qwen/Qwen3-VL-4B-Instruct",
        finetuning_type="freeze",
        freeze_trainable_layers=2,
        packing=True,
        fsdp="full_shard",
        image_max_pixels=262144,
        image_min_pixels=1024,
        quantization_bit=4,
    )
    recipe = written.recipe
    assert recipe.model.model_dump(exclude_unset=True) == {
        "kind": "native",
        "pretrained": "Qwen/Qwen3-VL-4B-Instruct",
        "min_pixels": 1024,
        "max_pixels": 262144,
        "llm": {"quantize": "nf4"},
    }
    assert recipe.data.packing and recipe.engine.kind == "fsdp"
    assert [rule.how for rule in recipe.tune] == ["frozen", "frozen", "lora"]
    missing = reasons(written)
    assert set(missing) == {"finetuning_type"}
    other = named("template", "qwen3_5", "some/model", packing=True)
    assert not other.recipe.data.packing
    assert "reads one sample a row" in reasons(other)["packing"]
    assert "the recipe takes LoRA" in missing["finetuning_type"]


@pytest.mark.parametrize(("key", "value"), [("fsdp", "full_shard"), ("deepspeed", "zero3")])
def test_weights_in_4_bit_are_sharded_and_those_in_8_bit_are_not(key: str, value: str) -> None:
    four, eight = (
        named("template", "llava", "some/model-hf", quantization_bit=bits, **{key: value})
        for bits in (4, 8)
    )
    assert four.recipe.engine.kind == key and key not in reasons(four)
    assert "int8 weights can't be sharded" in reasons(eight)[key]
    assert eight.recipe.engine.kind == {"fsdp": "auto", "deepspeed": "deepspeed"}[key]
    stages = [written.recipe.engine.model_dump().get("stage") for written in (four, eight)]
    assert stages == {"fsdp": [None, None], "deepspeed": [3, 2]}[key]


def test_bounds_of_pixels_are_for_processors_that_take_them() -> None:
    both = {"MAX_PIXELS": 602112, "max_pixels": 401408, "min_pixels": 3136}
    written = named("model_type", "qwen2_5_vl", "some/model", **both)
    model = written.recipe.model.model_dump()
    assert (model["min_pixels"], model["max_pixels"]) == (3136, 401408)
    written = named("model_type", "llava_next_video_hf", "some/model", max_pixels=401408)
    assert "llava_next_video is not known to take bounds" in reasons(written)["max_pixels"]
    written = named("model_type", "llava1_6_mistral_hf", "some/model", max_pixels=401408)
    assert "a tower reads images of one size" in reasons(written)["max_pixels"]


def test_a_native_model_may_be_named_in_place_of_the_configurations(tmp_path: Path) -> None:
    native_model("qwen2_5_vl").config.save_pretrained(tmp_path / "qwen")
    values = {"model_name_or_path": "some/llm", "template": "llama3", "finetuning_type": "lora"}
    written = converted(values | {"image_max_pixels": 262144}, model="qwen")
    model = written.recipe.model
    assert isinstance(model, NativeModel) and model.pretrained == "qwen"
    assert model.max_pixels == 262144 and not written.unmatched
    assert [rule.how for rule in written.recipe.tune] == ["frozen", "frozen", "lora"]


def test_a_converted_recipe_of_a_native_model_passes_its_check(tmp_path: Path) -> None:
    save_native(tmp_path / "qwen", "qwen3_vl")
    rows = write_color_rows(tmp_path)
    written = named("model_type", "qwen3_vl", "qwen", dataset=[str(rows)], MAX_PIXELS=12288)
    assert written.report is not None and written.report.exit_code == 0


def test_paligemmas_chat_format_with_turns_is_named() -> None:
    written = named("template", "paligemma_chat", "some/model")
    assert written.recipe.data.template == "paligemma"
    assert "no turns" in reasons(written)["template"]
