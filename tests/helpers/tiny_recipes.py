"""Small real things to test with.

Images that differ, a messages file about them, and recipes for tiny models.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {
    "red": (200, 30, 30),
    "green": (30, 180, 40),
    "blue": (40, 60, 200),
    "yellow": (220, 210, 40),
}
TINY = {
    "seq2seq": "{model_type: t5, vocab_size: 400, config: {d_model: 32, d_kv: 16, d_ff: 64, "
    "num_layers: 2, num_decoder_layers: 1, "
    "num_heads: 2, dropout_rate: 0.0, feed_forward_proj: gated-gelu}}",
    "causal": "{model_type: llama, vocab_size: 400, config: {hidden_size: 32, intermediate_size: "
    "64, num_hidden_layers: 2, "
    "num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 256}}",
}

COMPILED = Path(tempfile.gettempdir()) / f"vlm_tune-tests-{os.getuid()}"
"""Folder in which the parts in C++ are compiled once for all tests and later sessions.

Their names say what they are made of.
"""


def write_color_rows(folder: Path) -> Path:
    """messages.jsonl: four images of one color each and two questions about each, eight rows."""
    rng = np.random.default_rng(0)
    rows = []
    for name, color in COLORS.items():
        noise = rng.integers(-20, 20, (32, 32, 3))
        pixels = (np.full((32, 32, 3), color) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        for question, answer in (
            ("what color is it?", name),
            (f"is it {'red' if name != 'red' else 'blue'}?", "no"),
        ):
            rows.append(
                {
                    "messages": [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": answer},
                    ],
                    "images": [f"{name}.png"],
                }
            )
    path = folder / "messages.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_text(kind: str, rows: Path, output: Path, precision: str = "fp32") -> str:
    """A recipe that trains a tiny scratch model ("causal" or "seq2seq") in full on messages."""
    return f"""
name: tiny
output: {output}
model:
  tower: {{kind: open_clip, config: {{layers: 2, width: 64, head_width: 32, \
patch_size: 16, image_size: 32}}}}
  connector: {{kind: mlp, norm: true}}
  llm: {{kind: {kind}, scratch: {TINY[kind]}}}
data:
  train: [{{kind: file, path: {rows}}}]
  validation: [{{kind: file, path: {rows}}}]
  template: {"flan" if kind == "seq2seq" else "chatml"}
  max_length: 128
tune:
  - {{match: "tower.*", how: frozen}}
  - {{match: "*", how: full}}
train: {{steps: 4, batch_size: 4, learning_rate: 3.0e-3, precision: {precision}, \
schedule: {{warmup: 0}}}}
evaluate: {{max_new_tokens: 6, samples: 2}}
"""
