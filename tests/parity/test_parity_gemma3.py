"""Gemma 3 taken over by a recipe: inputs, logits, gradients and text."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.gemma_samples import save_gemma3
from tests.helpers.tiny_models import batch_of, built, largest, parsed, rows_of
from tests.helpers.vlm_samples import with_pretrained
from tests.parity.test_parity_idefics3 import ids_of, their_inputs, their_logits, write_rows
from tests.parity.test_parity_pretrained import our_step, same_gradients, their_step
from vlm_tune.data.types import IGNORE_INDEX, Conversation
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.language.decoding import Decoding

Tiny = Callable[..., str]
NAMES = {
    "model.vision_tower.post_layernorm.": "tower.norm.",
    "model.vision_tower.": "tower.model.",
    "model.multi_modal_projector.mm_input_projection_weight": "connector.projection",
    "model.multi_modal_projector.mm_soft_emb_norm.": "connector.norm.",
    "model.language_model.": "llm.model.model.",
    "lm_head.": "llm.model.lm_head.",
}
Taken = tuple[VisionLanguageModel, Any, list[Conversation]]


def our_name(name: str) -> str:
    return next(
        ours + name.removeprefix(theirs)
        for theirs, ours in NAMES.items()
        if name.startswith(theirs)
    )


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def taken(
    request: pytest.FixtureRequest, tiny_recipe: Tiny, color_rows: Path, tmp_path: Path
) -> Taken:
    """The model taken over from the folder `vlm`, transformers' own, and the rows."""
    write_rows(color_rows)
    turns = [
        ("system", "Answer in one line. "),
        ("user", " <image> What is it?\n"),
        ("assistant", "a high image"),
        ("user", "And this? <image>"),
        ("assistant", "a small one"),
    ]
    messages = [{"role": role, "content": text} for role, text in turns]
    with color_rows.open("a") as file:
        file.write(json.dumps({"messages": messages, "images": ["high.png", "small.png"]}) + "\n")
    theirs = save_gemma3(tmp_path / "vlm", tied=request.param)
    recipe = parsed(with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", "gemma3"))
    return built(recipe).eval(), theirs, rows_of(recipe)


def test_ids_pixels_logits_and_gradients_are_transformers(taken: Taken, tmp_path: Path) -> None:
    model, theirs, rows = taken
    # An image's marker joins the line end before it to one token.
    assert len(model.processor.encoder.text("\n\n\n")) == 1
    examples = [model.processor.examples(row)[0] for row in rows]
    inputs = [their_inputs(tmp_path / "vlm", row) for row in rows]
    for example, given in zip(examples, inputs, strict=True):
        ids = ids_of(example, theirs.config.image_token_id)
        assert given["input_ids"][0, : len(ids)].tolist() == ids
        if example.media:
            pixels = torch.stack([model.processor.images(frame) for frame in example.media])
            ours = pixels.float() * model.tower.scale - model.tower.offset
            assert largest(ours, given["pixel_values"]) <= 1e-5
    assert [len(example.media) for example in examples] == [1, 2, 1, 0, 2]
    batch = batch_of(model, examples)
    with torch.no_grad():
        expected = their_logits(theirs, batch, inputs)
        logits = model.llm.supervised_logits(model.embed(batch), batch)
    assert largest(logits, expected) <= 1e-5 * max(1.0, float(expected.abs().max()))
    # Another image is seen: the first tokens of two answers to one question differ.
    first = [0, *torch.tensor([e.supervised for e in examples]).cumsum(0).tolist()]
    assert largest(logits[first[0]], logits[first[2]]) > 1e-3
    # So are later tokens of the same image.
    model.llm.bidirectional = None  # type: ignore[assignment]
    with torch.no_grad():
        one_way = model.llm.supervised_logits(model.embed(batch), batch)
    model.llm.bidirectional = "images"  # type: ignore[assignment]
    assert largest(one_way, expected) > 1e-3
    losses = torch.nn.functional.cross_entropy(
        their_logits(theirs, batch, inputs), batch.labels[batch.labels != IGNORE_INDEX]
    )
    theirs.zero_grad(set_to_none=True)
    same_gradients(our_step(model, batch), their_step(theirs, losses, our_name))


@pytest.mark.parametrize("beams", [1, 2])
def test_text_is_transformers(taken: Taken, beams: int, tmp_path: Path) -> None:
    model, theirs, rows = taken
    answers = answer_prompts(
        model,
        [model.processor.prompt(row) for row in rows],
        Decoding(6, num_beams=beams),
        fetch=model.processor.images,
    )
    stops = model.processor.stop_ids
    # Older releases repeat each image for the beams, and not the row's images in turn.
    mixed_up = "mm_encoder_outputs" not in inspect.signature(theirs.forward).parameters
    for row, answer in zip(rows, answers, strict=True):
        if beams > 1 and mixed_up and len(row.media) > 1:
            continue
        prompt = their_inputs(tmp_path / "vlm", row, prompt=True)
        generated = theirs.generate(
            **prompt, max_new_tokens=6, do_sample=False, num_beams=beams, eos_token_id=stops
        )
        ids = generated[0, prompt["input_ids"].shape[1] :].tolist()
        ends = [place for place, token in enumerate(ids) if token in stops]
        assert answer == model.processor.decode(ids[: ends[0] if ends else None])
