"""Families of vision-language models as GGUF: ids, logits and text are the model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from PIL import Image
from transformers import AutoTokenizer

from tests.helpers.export_samples import photos, saved_model
from tests.helpers.gemma_samples import LLAMA_CPP, save_gemma3
from tests.helpers.tiny_models import parsed
from tests.helpers.vlm_samples import IDEFICS3_SIDE, save_idefics3, with_pretrained
from vlm_tune.config.towers import TransformersTower
from vlm_tune.data.types import Media
from vlm_tune.errors import ModelError
from vlm_tune.exporting import export, possible_exports
from vlm_tune.exporting.gguf.mmproj_reading import Mmproj
from vlm_tune.exporting.gguf.projectors import mmproj_reasons
from vlm_tune.exporting.gguf.writer import read_fields
from vlm_tune.model.checkpoint import load_model

Tiny = Callable[..., str]
Kind = Literal["idefics3", "smolvlm"]


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
        ({"kind": "internvl", "max_tiles": 2}, "puts an InternVL's class token behind the patches"),
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
