"""The exports a model can have are known from its recipe.

Others are refused before anything is merged.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.export_samples import llava_text
from tests.helpers.tiny_models import (
    LORA_TUNE,
    built,
    parsed,
    rows_of,
    save_llm,
    tuned_by,
    with_llm,
    with_tune,
)
from vlm_tune.errors import ModelError, RecipeError
from vlm_tune.exporting import FORMATS, export, merge, possible_exports

Tiny = Callable[..., str]
GPT2 = (
    "{model_type: gpt2, vocab_size: 400, config: {n_embd: 32, n_layer: 2, n_head: 2, "
    "n_positions: 128}}"
)


def test_the_recipe_tells_which_exports_its_model_can_have(
    tiny_recipe: Tiny, tmp_path: Path
) -> None:
    plain = llava_text(tiny_recipe)
    named = with_tune(
        with_llm(plain, save_llm(tmp_path / "base", "causal", rows_of(parsed(plain))), "causal"),
        LORA_TUNE,
    )
    assert possible_exports(parsed(named)) == dict.fromkeys(FORMATS)
    assert list(possible_exports(parsed(named))) == list(FORMATS)
    assert possible_exports(parsed(plain))["adapter"] == (
        "no rule puts LoRA on the llm; its language model starts from random weights, "
        "and has no name to be an adapter over"
    )
    normed = possible_exports(parsed(tiny_recipe("causal")))
    assert (
        "its connector begins with a LayerNorm" in str(normed["transformers"])
        and normed["gguf"] is None
    )
    t5 = possible_exports(parsed(tiny_recipe("seq2seq")))
    assert "encoder-decoder" in str(t5["transformers"]) and "encoder-decoder" in str(t5["gguf"])
    prompted = with_tune(
        named, '\ntune:\n  - {match: "llm.*", how: prompt}\n  - {match: "*", how: frozen}\ntrain:'
    )
    assert all(
        "soft prompt" in str(reason) for reason in possible_exports(parsed(prompted)).values()
    )


def test_gpt2_is_no_llava_and_that_is_told_before_it_is_merged(
    tiny_recipe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(
        f"  llm: {{kind: causal, scratch: {GPT2}}}" if line.startswith("  llm:") else line
        for line in llava_text(tiny_recipe).splitlines()
    )
    text = with_tune(text + "\n", LORA_TUNE)
    recipe = parsed(text)
    reason = (
        "its language model is of type gpt2, whose embeddings are not where LLaVA looks for them"
    )
    assert possible_exports(recipe)["transformers"] == reason
    model = built(recipe)
    tuned_by(model, recipe)
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(merge, "load_model", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(ModelError, match=reason):
        export(tmp_path / "saved", tmp_path / "out", format="transformers")
    # Neither may an output lie in what is read.
    with pytest.raises(ModelError, match="the output lies in the model folder that is read"):
        merge.merge(tmp_path / "saved", tmp_path / "saved" / "out")
    with pytest.raises(ModelError, match="dtype: there is no 'int8'; expected one of bf16, fp16"):
        merge.merge(tmp_path / "saved", tmp_path / "out", dtype="int8")
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="--tolerance: expected a number above 0"):
            merge.merge(tmp_path / "saved", tmp_path / "out", tolerance=value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "saved" / "out").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"model_type": "vlm_tune"}'])
def test_cut_files_of_a_model_folder(content: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    """Whatever a file of a model folder holds in place of what was written, the error names it."""
    recipe = parsed(with_tune(llava_text(tiny_recipe), LORA_TUNE))
    model = built(recipe)
    tuned_by(model, recipe)
    model.save_pretrained(tmp_path / "saved")
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        shutil.copytree(tmp_path / "saved", tmp_path / "cut")
        (tmp_path / "cut" / path.relative_to(tmp_path / "saved")).write_bytes(
            content.encode("latin-1")
        )
        for call in (merge.merge, export):
            with pytest.raises(ModelError, match=f"{path.name}|no complete model|cut/llm"):
                call(tmp_path / "cut", tmp_path / "out")
        shutil.rmtree(tmp_path / "cut")
    assert not (tmp_path / "out").exists()
