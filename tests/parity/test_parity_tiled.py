"""Models that see images as tiles, taken over by a recipe: inputs, logits, gradients and text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiled_samples import (
    LLAVA_ONEVISION_TEMPLATE,
    SAMPLES,
    Sample,
    save_llava_onevision,
)
from tests.helpers.tiny_models import batch_of, built, largest, parsed, rows_of
from tests.helpers.vlm_samples import with_pretrained
from tests.parity.test_parity_idefics3 import ids_of, their_inputs, their_logits, write_rows
from tests.parity.test_parity_pretrained import our_step, same_gradients, their_step
from vlm_tune.data.types import Conversation
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.build import build_processor
from vlm_tune.model.language.decoding import Decoding

Tiny = Callable[..., str]


@pytest.fixture(params=SAMPLES)
def sample(request: pytest.FixtureRequest) -> Sample:
    return SAMPLES[request.param]


@pytest.fixture
def taken(
    sample: Sample, tiny_recipe: Tiny, color_rows: Path, tmp_path: Path
) -> tuple[VisionLanguageModel, Any, list[Conversation]]:
    """The model taken over from the folder `vlm`, transformers' own, and the rows."""
    write_rows(color_rows)
    theirs = sample.save(tmp_path / "vlm")
    recipe = parsed(with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", sample.template))
    return built(recipe).eval(), theirs, rows_of(recipe)


def test_ids_pixels_logits_and_gradients_are_transformers(
    sample: Sample, taken: tuple[VisionLanguageModel, Any, list[Conversation]], tmp_path: Path
) -> None:
    model, theirs, rows = taken
    examples = [model.processor.examples(row)[0] for row in rows]
    inputs = [their_inputs(tmp_path / "vlm", row) for row in rows]
    for example, given in zip(examples, inputs, strict=True):
        ids = ids_of(example, theirs.config.image_token_id)
        assert given["input_ids"][0, : len(ids)].tolist() == ids
        if example.media:
            pixels = torch.stack([model.processor.images(frame) for frame in example.media])
            ours = pixels.float() * model.tower.scale - model.tower.offset
            theirs_shown = given["pixel_values"].flatten(0, -4)
            # Images of fewer tiles are padded with frames of zeros.
            shown = theirs_shown[theirs_shown.flatten(1).any(1)]
            assert largest(ours, shown) <= 1e-5
    assert [len(example.media) for example in examples] == sample.frames
    batch = batch_of(model, examples)
    with torch.no_grad():
        expected = their_logits(theirs, batch, inputs)
        logits = model.llm.supervised_logits(model.embed(batch), batch)
    assert largest(logits, expected) <= 1e-5 * max(1.0, float(expected.abs().max()))
    # Another image is seen: the first tokens of two answers to one question differ.
    first = [0, *torch.tensor([e.supervised for e in examples]).cumsum(0).tolist()]
    assert largest(logits[first[0]], logits[first[2]]) > 1e-3
    losses = torch.nn.functional.cross_entropy(
        their_logits(theirs, batch, inputs), batch.labels[batch.labels >= 0]
    )
    theirs.zero_grad(set_to_none=True)
    same_gradients(our_step(model, batch), their_step(theirs, losses, sample.our_name))


def test_llava_onevisions_prompts_are_those_of_its_published_template(
    tiny_recipe: Tiny, color_rows: Path, tmp_path: Path
) -> None:
    write_rows(color_rows)
    save_llava_onevision(tmp_path / "vlm", template=LLAVA_ONEVISION_TEMPLATE)
    recipe = with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", "llava_onevision")
    processor = build_processor(parsed(recipe), [])
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    for row in rows_of(parsed(recipe)):
        given = their_inputs(tmp_path / "vlm", row, prompt=True)
        assert ids_of(processor.prompt(row), image) == given["input_ids"][0].tolist()


def test_greedy_text_is_transformers(
    taken: tuple[VisionLanguageModel, Any, list[Conversation]], tmp_path: Path
) -> None:
    model, theirs, rows = taken
    prompts = [model.processor.prompt(row) for row in rows]
    answers = answer_prompts(model, prompts, Decoding(6), fetch=model.processor.images)
    stops = model.processor.stop_ids
    for row, answer in zip(rows, answers, strict=True):
        prompt = their_inputs(tmp_path / "vlm", row, prompt=True)
        generated = theirs.generate(**prompt, max_new_tokens=6, do_sample=False)
        ids = generated[0, prompt["input_ids"].shape[1] :].tolist()
        ends = [place for place, token in enumerate(ids) if token in stops]
        assert answer == model.processor.decode(ids[: ends[0] if ends else None])
