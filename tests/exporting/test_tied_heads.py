"""Heads that are the embedding, with LoRA on both: merged and written, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.family_runs import logits_of
from tests.helpers.family_samples import FAMILIES
from tests.helpers.native_models import save_native, with_native
from tests.helpers.tiny_models import (
    LORA_TUNE,
    built,
    largest,
    parsed,
    rows_of,
    tuned_by,
    with_tune,
)
from tests.helpers.tiny_recipes import tiny_text
from tests.helpers.transformers_parity import stir_adapters, write_rows
from tests.helpers.vlm_samples import with_pretrained
from vlm_tune.exporting import export
from vlm_tune.exporting.merge import merge
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.checkpoint import load_model

WORDS = LORA_TUNE.replace("all-linear", "[embed_tokens, lm_head, q_proj]").replace(
    '"connector.*", how: full', '"connector.*", how: frozen'
)
LAYOUTS = [
    family for family in FAMILIES if family not in ("internvl-qwen2", "ministral3", "paligemma2")
]
"""The families; others have the layout of one of these."""


NATIVE = ("qwen3_vl",)


def recipe_over(family: str, folder: Path) -> str:
    """A recipe over a tiny checkpoint of the family whose head is its embedding."""
    write_rows(folder / "rows.jsonl")
    text = tiny_text("causal", folder / "rows.jsonl", folder / "run")
    text = text.replace("max_length: 128", "max_length: 512")
    if family in NATIVE:
        save_native(folder / "vlm", family, tied=True)
        return with_tune(with_native(text, folder / "vlm"), WORDS)
    sample = FAMILIES[family]
    sample.save(folder / "vlm", tied=True)
    return with_tune(with_pretrained(text, folder / "vlm", sample.template), WORDS)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*LAYOUTS, *NATIVE])
def test_a_tied_head_with_lora_is_written_as_two_weights(family: str, tmp_path: Path) -> None:
    """Verified by transformers and PEFT: logits and text. The folders open by themselves."""
    text = recipe_over(family, tmp_path)
    model = built(parsed(text))
    rows = rows_of(parsed(text))
    before = logits_of(model, rows)
    tuned_by(model, parsed(text))
    stir_adapters(model)
    (tmp_path / "run").mkdir()
    model.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "recipe.yaml").write_text(text)
    expected = logits_of(model, rows)
    assert largest(before, expected) > 1e-2
    for kind in ("adapter", "transformers"):
        dtype = None if kind == "adapter" else "fp32"
        report = export(tmp_path / "run", tmp_path / kind, format=kind, dtype=dtype)
        assert report.difference is not None and report.allowed is not None
        assert report.difference <= report.allowed and report.same_text
    again = built(parsed(text.replace(str(tmp_path / "vlm"), str(tmp_path / "transformers"))))
    assert largest(logits_of(again, rows), expected) <= 1e-4
    merge(tmp_path / "run", tmp_path / "merged", dtype="fp32")
    (tmp_path / "vlm").rename(tmp_path / "gone")
    merged = load_model(tmp_path / "merged", dtype=torch.float32, model_class=VisionLanguageModel)
    assert largest(logits_of(merged, rows), expected) <= 1e-4
