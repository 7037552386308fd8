"""GGUF files give, read by others' code, the tokens, logits and text of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_samples import llava_text, photos, saved_model
from gguf import GGUFReader
from small import cli, parsed, rows_of, with_tower
from test_exporting import tower_text

from vlm_tune.exporting import export

LLAMA3 = "rope_parameters: {rope_type: llama3, rope_theta: 500000.0, factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, "
LLAMA3 += "original_max_position_embeddings: 32}"
DECODERS = {
    "llama": ("llama", "head_dim: 24"),
    "tied llama": ("llama", "tie_word_embeddings: true"),
    "llama 3": ("llama", LLAMA3),
    "mistral": ("mistral", "sliding_window: 128"),
    "qwen2": ("qwen2", "tie_word_embeddings: true"),
    "qwen3": ("qwen3", "head_dim: 24"),
}


def decoder_text(make: Callable[..., str], decoder: str) -> str:
    kind, extra = DECODERS[decoder]
    text = llava_text(make)
    return text.replace("model_type: llama", f"model_type: {kind}").replace("hidden_size: 32,", f"hidden_size: 32, {extra},")


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_gives_the_same_logits(decoder: str, tiny_recipe: Callable[..., str], tmp_path: Path) -> None:
    photos(tmp_path)
    run, _ = saved_model(decoder_text(tiny_recipe, decoder), tmp_path / "saved")
    report = export(run, tmp_path / "gguf", format="gguf", dtype="fp32")
    assert report.difference is not None and report.difference <= 1e-5
    assert report.same_text and report.format == "gguf"
    assert {path.name for path in (tmp_path / "gguf").glob("*.gguf")} == {"model-f32.gguf", "mmproj-f32.gguf"}
