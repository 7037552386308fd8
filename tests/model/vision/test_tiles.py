"""Tiles through the whole model.

In prompts, in the loss, in cached features, and in a saved model's answers.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_tune.config.load import parse_recipe
from vlm_tune.data.batching.collate import collate
from vlm_tune.data.types import Conversation, Media, Message
from vlm_tune.errors import DataError, RecipeError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.build import build
from vlm_tune.model.feature_cache import tower_features

LLMS = {
    "seq2seq": (
        "{model_type: t5, config: {d_model: 32, d_kv: 16, d_ff: 64, num_layers: 1, "
        "num_decoder_layers: 1, num_heads: 2}}"
    ),
    "causal": "{model_type: llama, config: {hidden_size: 32, intermediate_size: 64, "
    "num_hidden_layers: 1, "
    "num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 256}}",
}
TOKENS = 4


def recipe_text(
    kind: str = "causal", tiles: str = "[[2, 1], [1, 2], [2, 2]]", more: str = ""
) -> str:
    return f"""
name: tiny
output: nowhere
model:
  tower:
    kind: open_clip
    config: {{layers: 2, width: 64, head_width: 32, patch_size: 16, image_size: 32}}
    tiles: {tiles}
  llm: {{kind: {kind}, scratch: {LLMS[kind]}}}
data:
  train: [{{kind: easy_vqa, split: train}}]
  template: {"flan" if kind == "seq2seq" else "chatml"}
{more}
tune: [{{match: "*", how: full}}]
train: {{steps: 1, batch_size: 1, learning_rate: 1.0e-3, precision: fp32}}
"""


def photo(width: int, height: int, seed: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ).save(stream, "PNG")
    return stream.getvalue()


def conversation(name: str, *media: Media) -> Conversation:
    return Conversation(
        name, (Message("user", (*media, "what is it?")), Message("assistant", ("a thing",)))
    )


@pytest.fixture
def rows(tmp_path: Path) -> list[Conversation]:
    """A wide image by file, a high one by bytes, two in one row, and a row without any."""
    (tmp_path / "wide.png").write_bytes(photo(64, 30))
    wide, high = Media(tmp_path / "wide.png"), Media(photo(30, 64, 1))
    return [
        conversation("wide", wide),
        conversation("high", high),
        conversation("both", wide, high),
        conversation("none"),
    ]


def built(rows: list[Conversation], kind: str = "causal", **options: Any) -> VisionLanguageModel:
    recipe = parse_recipe(recipe_text(kind, **options))
    return build(recipe, rows, model_class=VisionLanguageModel).eval()


@pytest.mark.parametrize("kind", LLMS)
def test_every_tile_has_its_slots_after_its_image(kind: str, rows: list[Conversation]) -> None:
    processor = built(rows, kind).processor
    plain = built(rows, kind, tiles="[]").processor
    wide, high = rows[0].media[0], rows[1].media[0]
    for row, tiles in zip(rows, (2, 2, 4, 0), strict=True):
        for tiled, whole in zip(processor.examples(row), plain.examples(row), strict=True):
            assert len(tiled.input_ids) == len(whole.input_ids) + tiles * TOKENS
            assert (
                tiled.image_mask.sum()
                == whole.image_mask.sum() + tiles * TOKENS
                == len(tiled.media) * TOKENS
            )
            # Words and labels are what they are without tiles.
            assert np.array_equal(
                tiled.input_ids[~tiled.image_mask], whole.input_ids[~whole.image_mask]
            )
            assert (tiled.labels[tiled.labels >= 0] == whole.labels[whole.labels >= 0]).all()
    media = processor.prompt(rows[2]).media
    assert [(item.source, item.tile and (item.tile.column, item.tile.row)) for item in media] == [
        *((wide.source, place) for place in (None, (0, 0), (1, 0))),
        *((high.source, place) for place in (None, (0, 0), (0, 1))),
    ]


@pytest.mark.parametrize("kind", LLMS)
def test_cached_features_of_tiles_are_the_towers(kind: str, rows: list[Conversation]) -> None:
    model = built(rows, kind)
    # As evaluation asks: by the conversations' images, which name no tile.
    features = tower_features(
        model, list(dict.fromkeys(item for row in rows for item in row.media))
    )
    examples = [example for row in rows for example in model.processor.examples(row)]
    spec = model.processor.spec
    with torch.inference_mode():
        for item in dict.fromkeys(item for example in examples for item in example.media):
            expected = model.tower(model.processor.images(item)[None])[0]
            assert torch.allclose(features(item), expected, atol=1e-5), item.tile
        plain: Any = model(collate(examples, spec, fetch=model.processor.images))
        cached: Any = model(collate(examples, spec, fetch=features, cached=True))
    assert float(cached.sum) == pytest.approx(float(plain.sum), rel=1e-5)


def test_every_tile_counts_and_their_order_too(rows: list[Conversation]) -> None:
    model = built(rows)
    example = model.processor.examples(rows[0])[0]

    def loss(pixels: list[torch.Tensor]) -> float:
        fetched = dict(zip(example.media, pixels, strict=True))
        with torch.inference_mode():
            output: Any = model(collate([example], model.processor.spec, fetch=fetched.__getitem__))
        return float(output.sum)

    whole, left, right = (model.processor.images(item) for item in example.media)
    losses = [
        loss([whole, left, right]),
        loss([whole, right, left]),
        loss([whole, left, left]),
        loss([left, left, right]),
    ]
    assert len({round(value, 6) for value in losses}) == 4


@pytest.mark.parametrize("kind", LLMS)
def test_a_saved_model_tiles_as_the_trained_one(
    kind: str, rows: list[Conversation], tmp_path: Path
) -> None:
    model = built(rows, kind)
    model.save_pretrained(tmp_path / "model")
    again = VisionLanguageModel.from_pretrained(tmp_path / "model")
    assert again.processor.images == model.processor.images and again.processor.images.tiles == (
        (2, 1),
        (1, 2),
        (2, 2),
    )
    one, other = model.processor.prompt(rows[2]), again.processor.prompt(rows[2])
    assert one.media == other.media and np.array_equal(one.input_ids, other.input_ids)
    request = ("what is it?", [rows[0].media[0].source])
    assert model.chat(*request, max_new_tokens=8) == again.chat(*request, max_new_tokens=8)


def test_an_image_without_a_readable_header_is_named_with_its_row(rows: list[Conversation]) -> None:
    processor = built(rows).processor
    bad = Conversation(
        "r", conversation("r", Media(b"<html>")).messages, source="rows.jsonl", row=7
    )
    with pytest.raises(DataError, match=r"rows\.jsonl, row 7: <bytes>: not an image"):
        processor.examples(bad)


@pytest.mark.parametrize(
    "change",
    ["crop: 0.5", "flip: 0.5", "transpose: 1.0", "shift: 0.1", "rotation: 5.0", "rand_augment: {}"],
)
def test_changes_that_would_move_each_tile_by_itself_are_refused(change: str) -> None:
    parse_recipe(
        recipe_text(more="  augment: {crop: 1.0, flip: 0.0, colour: 0.1, hue: 0.1, noise: 0.1}")
    )
    parse_recipe(recipe_text(tiles="[]", more=f"  augment: {{{change}}}"))
    with pytest.raises(RecipeError, match="tiles are cut first"):
        parse_recipe(recipe_text(more=f"  augment: {{{change}}}"))
