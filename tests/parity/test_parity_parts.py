"""Towers, preprocessing and language model losses against the libraries they come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny_models import (
    CLIP,
    batch_of,
    built,
    largest,
    parsed,
    rows_of,
    save_llm,
    unshifted,
    with_llm,
)
from vlm_tune.config.towers import OpenClipTower, TransformersTower
from vlm_tune.data.types import Conversation, Example, Message
from vlm_tune.model.vision.registry import build_tower

VIT = {"layers": 3, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}


def noise(*shape: int) -> torch.Tensor:
    """Random uint8 pixels."""
    return torch.from_numpy(np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8))


def text_examples(processor: Any) -> list[Example]:
    """Rows without images, with answers of different lengths."""
    rows = [
        ("what is it?", "a red square"),
        ("say something long", "the quick brown fox jumps over the lazy dog"),
        ("?", "no"),
    ]
    return [
        example
        for place, (question, answer) in enumerate(rows)
        for example in processor.examples(
            Conversation(
                str(place), (Message("user", (question,)), Message("assistant", (answer,)))
            )
        )
    ]


@torch.no_grad()
def test_t5_loss_equals_transformers(tiny_recipe: Callable[..., str], tmp_path: Path) -> None:
    text = tiny_recipe("seq2seq")
    folder = save_llm(tmp_path / "t5", "seq2seq", rows_of(parsed(text)))
    ours = built(parsed(with_llm(text, folder, "seq2seq"))).eval()
    from transformers import T5ForConditionalGeneration

    theirs = T5ForConditionalGeneration.from_pretrained(folder).eval()
    batch = batch_of(ours, text_examples(ours.processor))
    loss: Any = ours(batch)
    expected = theirs(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), labels=batch.labels
    )
    assert float(loss.sum) / loss.count == pytest.approx(float(expected.loss), abs=1e-5)
    logits = ours.llm.supervised_logits(ours.embed(batch), batch)
    assert largest(logits, expected.logits[batch.labels != -100]) <= 1e-5


@torch.no_grad()
def test_causal_loss_equals_transformers(tiny_recipe: Callable[..., str], tmp_path: Path) -> None:
    text = tiny_recipe("causal")
    folder = save_llm(tmp_path / "llama", "causal", rows_of(parsed(text)))
    ours = built(parsed(with_llm(text, folder, "causal"))).eval()
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(folder).eval()
    batch = batch_of(ours, text_examples(ours.processor))
    loss: Any = ours(batch)
    labels = unshifted(batch.labels)
    ids = torch.nn.functional.pad(batch.input_ids, (0, 1)).where(labels == -100, labels)
    expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    assert float(loss.sum) / loss.count == pytest.approx(float(expected.loss), abs=1e-5)


@pytest.mark.parametrize("layer", [-1, -2, -3])
@torch.no_grad()
def test_clip_tower_gives_the_hidden_state_of_its_layer(tmp_path: Path, layer: int) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(2)
    theirs = CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval()
    theirs.save_pretrained(tmp_path)
    ours = build_tower(
        TransformersTower(kind="transformers", name=str(tmp_path), layer=layer)
    ).eval()
    pixels = noise(2, 3, 32, 32)
    expected = theirs(
        pixel_values=pixels.float() * ours.scale - ours.offset, output_hidden_states=True
    ).hidden_states[layer][:, 1:]
    assert largest(ours(pixels), expected) <= 1e-5


@pytest.mark.parametrize("layer", [-1, -2])
@torch.no_grad()
def test_open_clip_tower_gives_the_intermediate_of_its_layer(layer: int) -> None:
    import open_clip

    torch.manual_seed(3)
    ours = build_tower(OpenClipTower(kind="open_clip", config=VIT, layer=layer)).eval()
    text = {"vocab_size": 8, "context_length": 4, "width": 64, "heads": 1, "layers": 1}
    theirs: Any = open_clip.CLIP(
        embed_dim=64,
        vision_cfg=VIT,  # type: ignore[arg-type]
        text_cfg=text,  # type: ignore[arg-type]
    ).visual.eval()
    known = theirs.state_dict()
    weights = {name.removeprefix("visual."): value for name, value in ours.state_dict().items()}
    assert weights.keys() <= known.keys()
    theirs.load_state_dict(known | weights)
    pixels = noise(2, 3, 32, 32)
    normalised = pixels.float() * ours.scale - ours.offset
    blocks = theirs.forward_intermediates(normalised, intermediates_only=True)[
        "image_intermediates"
    ]
    expected = blocks[layer].flatten(2).transpose(1, 2)
    assert largest(ours(pixels), expected) <= 1e-5
    other = blocks[-3].flatten(2).transpose(1, 2)
    assert largest(ours(pixels), other) > 1e-2


@torch.no_grad()
def test_the_last_open_clip_block_gives_its_class_embedding_when_pooled_as_open_clip_does() -> None:
    """The tokens we take are those from which open_clip makes its embedding."""
    import open_clip

    torch.manual_seed(4)
    ours = build_tower(
        OpenClipTower(kind="open_clip", config={**VIT, "pool_type": "avg", "no_ln_pre": True})
    ).eval()
    text = {"vocab_size": 8, "context_length": 4, "width": 64, "heads": 1, "layers": 1}
    config: Any = {**VIT, "pool_type": "avg", "no_ln_pre": True}
    theirs: Any = open_clip.CLIP(
        embed_dim=64,
        vision_cfg=config,  # type: ignore[arg-type]
        text_cfg=text,  # type: ignore[arg-type]
    ).visual.eval()
    weights = {name.removeprefix("visual."): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(theirs.state_dict() | weights)
    pixels = noise(2, 3, 32, 32)
    pooled = theirs.ln_post(ours(pixels)).mean(1) @ theirs.proj
    assert largest(pooled, theirs(pixels.float() * ours.scale - ours.offset)) <= 1e-5


def test_normalised_pixels_equal_the_clip_image_processor(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    from vlm_tune.data.images.decode import ImageProcessor

    ours = build_tower(OpenClipTower(kind="open_clip", config=VIT))
    image = Image.fromarray(noise(32, 32, 3).numpy())
    pixels = ImageProcessor(32).pixels(image)
    theirs: Any = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    expected = theirs(images=image, return_tensors="pt")["pixel_values"][0]
    assert largest((pixels[None].float() * ours.scale - ours.offset)[0], expected) <= 1e-5


def test_resized_and_cropped_pixels_equal_the_clip_image_processor() -> None:
    from transformers import CLIPImageProcessorPil

    from vlm_tune.data.images.decode import ImageProcessor

    image = Image.fromarray(noise(90, 61, 3).numpy())
    pixels = ImageProcessor(32).pixels(image)
    theirs: Any = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_normalize=False
    )
    expected = theirs(images=image, return_tensors="pt")["pixel_values"][0] * 255
    assert largest(pixels, expected) <= 1.01
