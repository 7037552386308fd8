"""Clips of tones, rows about them, and a recipe of a tiny model that hears."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path

import numpy as np

from tests.helpers.tiny_recipes import TINY

TONES = {"low": 220.0, "high": 880.0}


def tone(hertz: float = 440.0, seconds: float = 0.5, rate: int = 16_000) -> np.ndarray:
    """A sine of half of the full amplitude, float32[samples]."""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(
        np.float32
    )


def wav(samples: np.ndarray, rate: int = 16_000, channels: int = 1) -> bytes:
    """A WAV file of 16-bit samples, the same in all channels."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes((samples * 32767).astype("<i2").repeat(channels).tobytes())
    return buffer.getvalue()


def write_tone_rows(folder: Path) -> Path:
    """clips.jsonl: two clips, the second one longer than a second, and two questions about each."""
    rows = []
    for number, (name, hertz) in enumerate(TONES.items()):
        (folder / f"{name}.wav").write_bytes(wav(tone(hertz, 0.5 + number)))
        rows += [
            {"question": "is the tone low or high?", "answer": name, "audio": f"{name}.wav"},
            {"question": "is it high?", "answer": "yes" * number or "no", "audio": f"{name}.wav"},
        ]
    path = folder / "clips.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hearing_recipe(kind: str, rows: Path, output: Path) -> str:
    """A recipe that trains a tiny model ("causal" or "seq2seq") in full on clips."""
    return f"""
name: hears
output: {output}
model:
  tower: {{kind: audio, seconds: 1, windows: 2, pool: 10, config: {{d_model: 32, \
encoder_layers: 1, encoder_attention_heads: 2, encoder_ffn_dim: 32, max_source_positions: 50}}}}
  connector: {{kind: mlp, norm: true}}
  llm: {{kind: {kind}, scratch: {TINY[kind]}}}
data:
  train: [{{kind: file, path: {rows}}}]
  validation: [{{kind: file, path: {rows}}}]
  template: {"flan" if kind == "seq2seq" else "chatml"}
  max_length: 128
tune:
  - {{match: "*", how: full}}
train: {{steps: 2, batch_size: 2, learning_rate: 3.0e-3, precision: fp32}}
evaluate: {{max_new_tokens: 6, samples: 2}}
"""
