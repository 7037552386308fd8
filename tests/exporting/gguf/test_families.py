"""Families of vision-language models as GGUF: ids, logits and text are the model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from tests.helpers.export_samples import photos, saved_model
from tests.helpers.gemma_samples import LLAMA_CPP, save_gemma3
from tests.helpers.shaped_samples import VISION, save_mistral3, save_pixtral
from tests.helpers.tiled_samples import save_internvl
from tests.helpers.tiny_models import parsed
from tests.helpers.vlm_samples import IDEFICS3_SIDE, save_idefics3, with_pretrained
from vlm_tune.config.towers import TransformersTower
from vlm_tune.data.types import Media
from vlm_tune.errors import ModelError
from vlm_tune.exporting import export, possible_exports
from vlm_tune.exporting.gguf.mmproj_reading import Mmproj
from vlm_tune.exporting.gguf.projectors import mmproj_reasons
from vlm_tune.exporting.gguf.writer import read_fields, read_tensors
from vlm_tune.model.checkpoint import load_model

Tiny = Callable[..., str]
Kind = Literal["idefics3", "smolvlm"]
AXIAL = {"rope_type": "axial", "rope_theta": 500.0}


def smolvlm_text(make: Tiny, folder: Path, kind: Kind, extra: str = "") -> str:
    """A recipe over a tiny SmolVLM whose tokenizer has the empty line that llama.cpp looks up."""
    save_idefics3(folder / "vlm", kind, smolvlm_tokenizer=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "vlm")
    tokenizer.add_tokens(["\n\n"])
    tokenizer.save_pretrained(folder / "vlm")
    return with_pretrained(make("causal"), folder / "vlm", "smolvlm", extra)


# The first SmolVLMs are stored as Idefics3.
@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_a_smolvlm_gives_the_same_ids_logits_and_text(
    kind: Kind, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    photos(tmp_path)
    text = smolvlm_text(tiny_recipe, tmp_path, kind)
    run, _ = saved_model(text, tmp_path / "saved", lora=True, sharpen=1.0)
    report = export(run, tmp_path / "gguf", format="gguf", dtype="fp32")
    assert report.merged == ["llm"] and report.same_text
    assert report.difference is not None and report.difference <= 1e-5
    # Its tower's GELU is the tanh form already.
    assert not [note for note in report.notes if "tanh" in note]
    fields = read_fields(tmp_path / "gguf" / "mmproj-f32.gguf")
    # What llama.cpp's clip.cpp reads of this projector.
    assert fields["clip.projector_type"] == "idefics3"
    assert fields["clip.vision.projector.scale_factor"] == 2
    assert fields["clip.vision.preproc_image_size"] == 2 * IDEFICS3_SIDE
    assert fields["clip.vision.image_size"] == IDEFICS3_SIDE
    assert fields["clip.use_gelu"]


def test_frames_have_llama_cpps_markers_whatever_an_images_shape(
    tiny_recipe: Tiny, tmp_path: Path
) -> None:
    run, _ = saved_model(smolvlm_text(tiny_recipe, tmp_path, "smolvlm"), tmp_path / "saved")
    export(run, tmp_path / "gguf", format="gguf", verify=False)
    mmproj = Mmproj(next((tmp_path / "gguf").glob("mmproj-*.gguf")))
    processor = load_model(run).processor
    tokenizer = processor.tokenizer
    for size in ((64, 64), (65, 64), (64, 33), (640, 11), (11, 640), (31, 32), (900, 451)):
        path = tmp_path / "image.png"
        Image.new("RGB", size).save(path)
        theirs = mmproj.projector.image_ids(tokenizer, mmproj.vision, Media(path), processor)
        assert processor.images.split is not None
        segments = processor.images.split.segments(Media(path), size, IDEFICS3_SIDE)
        ours: list[int] = []
        for segment in segments:
            ours += [-1] * 4 if segment.kind == "media" else tokenizer.encode(segment.payload)
        assert theirs == ours, size


def test_a_gemma_3_gives_the_same_ids_logits_and_text(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """Its images' tokens see each other both ways, and the rest through windows."""
    save_gemma3(tmp_path / "vlm", text=LLAMA_CPP)
    photos(tmp_path)
    text = with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", "gemma3")
    assert possible_exports(parsed(text))["gguf"] is None
    run, _ = saved_model(text, tmp_path / "saved", lora=True, sharpen=1.0)
    report = export(run, tmp_path / "gguf", format="gguf", dtype="fp32")
    assert report.merged == ["llm"] and report.same_text
    assert report.difference is not None and report.difference <= 1e-5
    fields = read_fields(tmp_path / "gguf" / "mmproj-f32.gguf")
    assert fields["clip.projector_type"] == "gemma3"
    assert fields["clip.vision.projector.scale_factor"] == 2
    language = read_fields(tmp_path / "gguf" / "model-f32.gguf")
    assert language["gemma3.rope.scaling.type"] == "linear"
    assert language["gemma3.rope.scaling.factor"] == 8
    assert "\\n\\n" in language["tokenizer.chat_template"]


def test_an_internvl_gives_the_same_ids_logits_and_text(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """With one tile an image; the class token's position is written last, as llama.cpp adds it."""
    theirs = save_internvl(tmp_path / "vlm", max_tiles=1)
    photos(tmp_path)
    text = with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", "internvl")
    assert possible_exports(parsed(text))["gguf"] is None
    run, _ = saved_model(text, tmp_path / "saved", lora=True, sharpen=1.0)
    report = export(run, tmp_path / "gguf", format="gguf", dtype="fp32")
    assert report.difference is not None and report.difference <= 1e-5 and report.same_text
    mmproj = tmp_path / "gguf" / "mmproj-f32.gguf"
    fields = read_fields(mmproj)
    assert fields["clip.projector_type"] == "internvl"
    assert fields["clip.vision.preproc_max_tiles"] == 1
    positions = theirs.model.vision_tower.embeddings.position_embeddings[0]
    stored = read_tensors(mmproj)["v.position_embd.weight"]
    assert torch.equal(stored[-1], positions[0]) and torch.equal(stored[:-1], positions[1:])


@pytest.mark.parametrize(
    ("save", "template", "dtype"),
    [(save_pixtral, "pixtral", "q8_0"), (save_mistral3, "mistral3", "fp32")],
)
def test_images_that_keep_their_shape_give_the_same_ids_logits_and_text(
    save: Callable[[Path], Any], template: str, dtype: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """The token between rows comes from the mmproj file, rounded as in the language model's."""
    save(tmp_path / "vlm")
    photos(tmp_path)
    for path in tmp_path.glob("*.png"):
        image = Image.open(path)
        image.thumbnail((20, 20))
        image.save(path)
    text = with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", template)
    assert possible_exports(parsed(text))["gguf"] is None
    run, _ = saved_model(text, tmp_path / "saved", lora=True, sharpen=1.0)
    report = export(run, tmp_path / "gguf", format="gguf", dtype=dtype)
    assert report.difference is not None
    if dtype == "q8_0":
        assert 1e-5 < report.difference < 0.5
    else:
        assert report.difference <= 1e-5 and report.same_text
    mmproj = Mmproj(next((tmp_path / "gguf").glob("mmproj-*.gguf")))
    merge = 2 if template == "mistral3" else 1
    assert mmproj.vision["spatial_merge_size"] == merge
    assert ("mm.patch_merger.weight" in mmproj.tensors) == (merge == 2)
    processor = load_model(run).processor
    rows = read_tensors(next((tmp_path / "gguf").glob("model-*.gguf")))["token_embd.weight"]
    end = rows[processor.encoder.control("[IMG_BREAK]")]
    assert torch.equal(mmproj.tensors["v.token_embd.img_break"], end)


@pytest.mark.parametrize(
    ("save", "template", "reason"),
    [
        (save_internvl, "internvl", "cuts images in other tiles than in training"),
        (
            lambda folder: save_internvl(folder, max_tiles=1, use_qk_norm=True),
            "internvl",
            "norms of queries and keys",
        ),
        (
            lambda folder: save_pixtral(folder, vision_config=VISION | {"rope_parameters": AXIAL}),
            "pixtral",
            "rotary base is 500.0, and llama.cpp's 10000.0",
        ),
        (save_gemma3, "gemma3", "more than the window of 3"),
        (
            lambda folder: save_mistral3(folder, "ministral3", tied=True),
            "mistral3",
            "is of type ministral3, not llama",
        ),
    ],
)
def test_families_that_llama_cpp_computes_otherwise_are_refused(
    save: Callable[[Path], Any], template: str, reason: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    save(tmp_path / "vlm")
    text = with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", template)
    assert reason in str(possible_exports(parsed(text))["gguf"])


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (f", tower: {{split: {{kind: idefics3, longest_edge: {IDEFICS3_SIDE}}}}}", "is 32, and"),
        (", tower: {split: {kind: idefics3, longest_edge: 80}}", "is 80, and"),
        (", tower: {image_size: 16}", "its tower's positions 32"),
        (", tower: {grid: 2}", "pools to a grid"),
    ],
)
def test_images_that_llama_cpp_would_cut_otherwise_are_refused(
    extra: str, reason: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    text = smolvlm_text(tiny_recipe, tmp_path, "smolvlm", extra)
    run, _ = saved_model(text, tmp_path / "saved")
    with pytest.raises(ModelError, match=f"can't be exported as GGUF: .*{reason}"):
        export(run, tmp_path / "gguf", format="gguf")


def test_a_tokenizer_without_llama_cpps_tokens_is_refused(
    tiny_recipe: Tiny, tmp_path: Path
) -> None:
    save_idefics3(tmp_path / "vlm", "idefics3")
    text = with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", "idefics3")
    run, _ = saved_model(text, tmp_path / "saved")
    with pytest.raises(ModelError, match=r"no single token for '\\n\\n', '<global-img>', which"):
        export(run, tmp_path / "gguf", format="gguf")


@pytest.mark.parametrize(
    ("split", "reason"),
    [
        ({"kind": "llava_next", "grids": [[1, 2]]}, "without the learned tokens for rows' ends"),
        ({"kind": "llava_onevision", "grids": [[1, 2]]}, "the learned tokens for rows' ends"),
    ],
)
def test_ways_of_cutting_that_llama_cpp_has_otherwise_are_refused(
    split: dict[str, Any], reason: str
) -> None:
    described = {"kind": "transformers", "name": "tower", "split": split}
    config: Any = SimpleNamespace(
        model=SimpleNamespace(tower=TransformersTower.model_validate(described))
    )
    (refused,) = mmproj_reasons(config, None)
    assert reason in refused
