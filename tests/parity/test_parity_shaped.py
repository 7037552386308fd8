"""Models whose tower keeps an image's shape, taken over: inputs, logits, gradients and text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.shaped_samples import LONGEST, SAMPLES
from tests.helpers.tiled_samples import Sample
from tests.helpers.tiny_models import batch_of, built, largest, parsed, rows_of
from tests.helpers.vlm_samples import with_pretrained
from tests.parity.test_parity_idefics3 import ids_of, their_inputs, their_logits, write_rows
from tests.parity.test_parity_pretrained import our_step, same_gradients, their_step
from tests.parity.test_parity_tiled import test_greedy_text_is_transformers  # noqa: F401
from vlm_tune.data.types import IGNORE_INDEX, Conversation
from vlm_tune.generation.chat import VisionLanguageModel

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
    shapes = set()
    for example, given in zip(examples, inputs, strict=True):
        ids = ids_of(example, theirs.config.image_token_id)
        assert given["input_ids"][0, : len(ids)].tolist() == ids
        for place, media in enumerate(example.media):
            pixels = model.processor.images(media)
            shapes.add(tuple(pixels.shape[1:]))
            assert pixels.shape[1:] == tuple(given["image_sizes"][place])
            shown = given["pixel_values"][place, :, : pixels.shape[1], : pixels.shape[2]]
            ours = (pixels.float() * model.tower.scale - model.tower.offset)[0]
            assert largest(ours, shown) <= 1e-5
    assert [len(example.media) for example in examples] == sample.frames
    assert len(shapes) == 3
    assert max(map(max, shapes)) == LONGEST
    batch = batch_of(model, examples)
    # One batch of all shapes: the smaller ones are padded.
    assert batch.pixels is not None
    assert batch.patch_places is not None
    assert batch.pixels.shape[2] == 3 * model.tower.patch**2
    assert bool((batch.patch_places == -1).any())
    with torch.no_grad():
        expected = their_logits(theirs, batch, inputs)
        logits = model.llm.supervised_logits(model.embed(batch), batch)
    assert largest(logits, expected) <= 1e-5 * max(1.0, float(expected.abs().max()))
    # Another image is seen: the first tokens of two answers to one question differ.
    first = [0, *torch.tensor([e.supervised for e in examples]).cumsum(0).tolist()]
    assert largest(logits[first[0]], logits[first[2]]) > 1e-3
    losses = torch.nn.functional.cross_entropy(
        their_logits(theirs, batch, inputs), batch.labels[batch.labels != IGNORE_INDEX]
    )
    theirs.zero_grad(set_to_none=True)
    same_gradients(our_step(model, batch), their_step(theirs, losses, sample.our_name))
