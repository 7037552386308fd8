"""Existing vision-language models that is not supported.

Refused with what was found and what was expected.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiled_samples import save_internvl, save_llava_next, save_llava_onevision
from tests.helpers.tiny_models import built, parsed, rows_of
from tests.helpers.vlm_samples import (
    save_blip,
    save_idefics3,
    save_llava,
    save_llava_original,
    with_pretrained,
)
from vlm_tune.errors import ModelError, RecipeError
from vlm_tune.model.build import build_processor
from vlm_tune.model.pretrained.vlm_checkpoints import model_section

Tiny = Callable[..., str]


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def llava(tiny_recipe: Tiny, tmp_path: Path) -> tuple[Path, str]:
    """The folder of a tiny LLaVA, and a recipe over it."""
    text = tiny_recipe("causal")
    save_llava(tmp_path / "llava", rows_of(parsed(text)))
    return tmp_path / "llava", with_pretrained(text, tmp_path / "llava", "vicuna")


def test_fault_31_missing_and_unexpected_tensors_of_every_part(llava: tuple[Path, str]) -> None:
    folder, text = llava
    original = (folder / "model.safetensors").read_bytes()
    cases = {
        "vision_tower.embeddings.class_embedding": (
            r"the tower in .* does not fit the model; missing: embeddings.class_embedding"
        ),
        "multi_modal_projector.linear_2.bias": (
            r"llava does not fit the model; missing: layers.2.bias"
        ),
        "language_model.model.norm.weight": r"do not fit the model; missing: model.norm.weight",
    }
    for name, message in cases.items():
        change_tensors(folder, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(ModelError, match=message):
            built(parsed(text))
        (folder / "model.safetensors").write_bytes(original)
    for name, message in {
        "vision_tower.extra": "unexpected: extra",
        "multi_modal_projector.extra": "unexpected: extra",
        "image_newline": "unexpected: image_newline",
    }.items():
        change_tensors(folder, lambda tensors, name=name: tensors.update({name: torch.zeros(3)}))
        with pytest.raises(ModelError, match=message):
            built(parsed(text))
        (folder / "model.safetensors").write_bytes(original)
    change_tensors(
        folder,
        lambda tensors: tensors.update(
            {"multi_modal_projector.linear_1.weight": torch.zeros(3, 3)}
        ),
    )
    with pytest.raises(
        ModelError, match=r"misshapen: layers.0.weight is \[3, 3\], expected \[32, 32\]"
    ):
        built(parsed(text))


def test_fault_28_pickled_weights_of_an_existing_model_are_refused(
    llava: tuple[Path, str], tmp_path: Path
) -> None:
    folder, text = llava
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"found pytorch_model\.bin: pickled weights are not loaded"
    ):
        built(parsed(text))
    parts = text.replace("vicuna", "chatml")
    plain = parts.partition("\nmodel:")[2].partition("\ndata:")[0]
    scratch = (
        "\n  tower: {kind: open_clip, config: {layers: 1, width: 64, head_width: 32, "
        "patch_size: 16, image_size: 32}}"
    )
    scratch += f"\n  connector: {{kind: mlp, weights: {tmp_path / 'mm_projector.bin'}}}"
    scratch += (
        "\n  llm: {kind: causal, scratch: {model_type: llama, config: {hidden_size: 32, "
        "num_hidden_layers: 1, "
    )
    scratch += "intermediate_size: 48, num_attention_heads: 2}}}"
    with pytest.raises(
        ModelError,
        match=r"mm_projector\.bin: pickled weights are not loaded, convert them to safetensors",
    ):
        built(parsed(parts.replace(plain, scratch)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava_next_video"}, "is no vision-language model of a known kind"),
        (
            {"model_type": "llava_next"},
            "has a CLIPImageProcessor for its images.* expected an image processor with "
            "image_grid_pinpoints",
        ),
        ({"projector_hidden_act": "relu"}, "a projector with relu .* expected gelu"),
        (
            {"projector_hidden_act": "linear", "multimodal_projector_bias": False},
            "a linear projector without biases",
        ),
    ],
)
def test_llavas_of_another_shape_are_refused(
    changes: dict[str, Any], message: str, llava: tuple[Path, str]
) -> None:
    folder, text = llava
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=message):
        model_section(parsed(text))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_image_splitting": False}, r"not tiled .* expected true"),
        ({"resample": 3}, "or not by Lanczos.* expected resample: 1"),
        ({"do_normalize": False}, "does not resize, rescale and normalise"),
        ({"rescale_factor": 1.0}, r"pixels scaled by 1\.0"),
        ({"size": {"longest_edge": 5000}}, "expected a longest_edge from 32 to 4096"),
        ({"size": {"height": 64, "width": 64}}, "expected a longest_edge from 32 to 4096"),
    ],
)
def test_idefics3_with_other_images_is_refused(
    changes: dict[str, Any], message: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    save_idefics3(tmp_path / "vlm", "idefics3")
    file = tmp_path / "vlm" / "processor_config.json"
    written = json.loads(file.read_text())
    written["image_processor"] |= changes
    file.write_text(json.dumps(written))
    text = with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", "idefics3")
    with pytest.raises(ModelError, match=message):
        model_section(parsed(text))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("images", {"min_patches": 2}, r"at least 2 tiles .* expected 1"),
        ("images", {"size": {"height": 32, "width": 16}}, "expected one square size"),
        ("images", {"resample": 2}, "or not bicubically.* expected resample: 3"),
        ("config", {"vision_feature_layer": -2}, r"vision_feature_layer: -2.* expected -1"),
        ("config", {"projector_hidden_act": "silu"}, "expected gelu"),
        ("tower", {"image_size": [32, 64]}, r"image_size \[32, 64\]; expected equal sides"),
    ],
)
def test_internvl_of_another_kind_is_refused(
    file: str, changes: dict[str, Any], message: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    save_internvl(tmp_path / "vlm")
    name = "processor_config.json" if file == "images" else "config.json"
    written = json.loads((tmp_path / "vlm" / name).read_text())
    parts = {"images": "image_processor", "tower": "vision_config"}
    part = written[parts[file]] if file in parts else written
    part |= changes
    (tmp_path / "vlm" / name).write_text(json.dumps(written))
    recipe = parsed(with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", "internvl"))
    with pytest.raises(ModelError, match=message):
        build_processor(recipe, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 2}, "or not bicubically.* expected resample: 3"),
        ({"crop_size": {"height": 16, "width": 16}}, "expected 32, the tower's image_size"),
        ({"image_grid_pinpoints": [[32, 64]]}, "expected one list in both of its configs"),
        ({"vision_feature_select_strategy": "full"}, "expected default"),
    ],
)
def test_llava_next_of_another_kind_is_refused(
    changes: dict[str, Any], message: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    (key,) = changes
    of_images = key in ("resample", "crop_size", "image_grid_pinpoints")
    save_llava_next(tmp_path / "vlm", **({} if of_images else changes))
    if of_images:
        file = tmp_path / "vlm" / "processor_config.json"
        written = json.loads(file.read_text())
        written["image_processor"] |= changes
        file.write_text(json.dumps(written))
    text = with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", "llava_mistral")
    with pytest.raises(ModelError, match=message):
        model_section(parsed(text))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 2}, "or not bicubically.* expected resample: 3"),
        ({"size": {"height": 16, "width": 16}}, "expected 32, the tower's image_size"),
        ({"crop_size": {"height": 16, "width": 16}}, "expected 32, the tower's image_size"),
        ({"image_grid_pinpoints": [[32, 64]]}, "expected one list in both of its configs"),
        ({"vision_feature_select_strategy": "default"}, "expected full"),
        ({"vision_aspect_ratio": "square"}, "vision_aspect_ratio: square.* expected anyres_max_9"),
    ],
)
def test_llava_onevision_of_another_kind_is_refused(
    changes: dict[str, Any], message: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    save_llava_onevision(tmp_path / "vlm")
    of_images = set(changes) & {"resample", "size", "crop_size", "image_grid_pinpoints"}
    file = tmp_path / "vlm" / ("processor_config.json" if of_images else "config.json")
    written = json.loads(file.read_text())
    (written["image_processor"] if of_images else written).update(changes)
    file.write_text(json.dumps(written))
    text = with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", "llava_onevision")
    with pytest.raises(ModelError, match=message):
        model_section(parsed(text))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "mlp1x_gelu"}, "expected linear or mlp2x_gelu"),
        (
            {"image_aspect_ratio": "anyres"},
            "image_aspect_ratio anyres.* expected LLaVA-1.5's square or pad",
        ),
        ({"mm_use_im_start_end": True}, "tokens around an image"),
    ],
)
def test_original_llavas_of_another_shape_are_refused(
    changes: dict[str, Any], message: str, llava: tuple[Path, str], tmp_path: Path
) -> None:
    from transformers import LlavaForConditionalGeneration

    folder, text = llava
    theirs = LlavaForConditionalGeneration.from_pretrained(folder)
    save_llava_original(tmp_path / "original", theirs, folder, tower=False, **changes)
    with pytest.raises(ModelError, match=message):
        model_section(parsed(text.replace(str(folder), str(tmp_path / "original"))))


def test_image_processors_of_another_kind_are_refused(llava: tuple[Path, str]) -> None:
    folder, text = llava
    path = next(
        path for path in folder.glob("*processor_config.json") if "image_mean" in path.read_text()
    )
    whole = json.loads(path.read_text())
    image_processor = whole.get("image_processor", whole)
    for changes, message in (
        ({"resample": 2}, "not bicubically"),
        ({"crop_size": {"height": 16, "width": 32}}, "expected one square size"),
    ):
        path.write_text(
            json.dumps(
                whole
                | (
                    {"image_processor": image_processor | changes}
                    if "image_processor" in whole
                    else changes
                )
            )
        )
        with pytest.raises(ModelError, match=message):
            model_section(parsed(text))
    path.unlink()
    with pytest.raises(ModelError, match=r"needs its preprocessor_config\.json"):
        model_section(parsed(text))


def test_blip_of_another_shape_is_refused(tiny_recipe: Tiny, tmp_path: Path) -> None:
    text = tiny_recipe("seq2seq")
    folder = tmp_path / "blip"
    save_blip(folder, rows_of(parsed(text)), "blip-2")
    recipe = with_pretrained(text, folder, "blip2")
    former = json.loads((folder / "config.json").read_text())["qformer_config"]
    change_config(folder, qformer_config=former | {"intermediate_size": 48})
    with pytest.raises(
        ModelError,
        match="a Q-Former whose intermediate_size is 48, which is not supported; expected 64",
    ):
        model_section(parsed(recipe))


def test_a_recipe_that_does_not_go_with_the_parts_found_is_told(
    tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """No recipe check reads the checkpoint: what depends on it is told when the model is made."""
    text = tiny_recipe("seq2seq")
    save_blip(tmp_path / "blip", rows_of(parsed(text)), "blip-2")
    recipe = with_pretrained(text, tmp_path / "blip", "blip2").replace(
        "precision: fp32", "precision: fp16"
    )
    with pytest.raises(
        RecipeError,
        match=r"train.precision: T5's activations overflow in fp16.*is seq2seq with a qformer",
    ):
        built(parsed(recipe))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "{pretrained: x, llm: {quantise: nf4}}",
            r"unknown key 'quantise'; did you mean quantize\?",
        ),
        ("{pretrained: x, connector: {kind: mlp}}", "unknown key 'connector'"),
        (
            "{pretrained: x, tower: {resize: shrink}}",
            "model.tower.resize: 'shrink' is not one of squash, crop, pad",
        ),
        ("{}", "model.tower is required"),
    ],
)
def test_faults_of_the_models_section_are_told_with_their_place(
    model: str, message: str, tiny_recipe: Tiny
) -> None:
    head, _, rest = tiny_recipe("causal").partition("\nmodel:")
    with pytest.raises(RecipeError, match=message):
        parsed(f"{head}\nmodel: {model}{rest[rest.index(chr(10) + 'data:') :]}")


def test_a_folder_that_is_not_there_is_named(llava: tuple[Path, str]) -> None:
    folder, text = llava
    with pytest.raises(ModelError, match="there is no such folder, and no vision-language model"):
        model_section(parsed(text.replace(str(folder), "merged")))
