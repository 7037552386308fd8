"""Videos of native models in their own form: inputs, logits, gradients, text are transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.native_videos import VIDEO_KINDS, video_recipe
from tests.helpers.tiny_models import batch_of, built, largest, parsed, rows_of
from tests.helpers.transformers_parity import peft_over, with_adapters
from tests.parity.test_parity_native import Taken, assert_step_is_theirs, our_name, their_inputs
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.model.language.decoding import Decoding


@pytest.fixture(scope="module", params=VIDEO_KINDS)
def taken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    from transformers import AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp(request.param)
    text = video_recipe(folder, request.param)
    recipe = parsed(text)
    theirs: Any = AutoModelForImageTextToText.from_pretrained(folder / "vlm", dtype=torch.float32)
    return Taken(built(recipe).eval(), theirs.eval(), rows_of(recipe), folder / "vlm", text)


def test_ids_and_tensors_are_the_processors(taken: Taken) -> None:
    model = taken.model
    examples = [model.processor.examples(row)[0] for row in taken.rows]
    # A video is one item, and its frames are not.
    assert [len(example.media) for example in examples] == [1, 1, 1, 2, 2, 2, 1, 0]
    for example, row in zip(examples, taken.rows, strict=True):
        given = their_inputs(taken.folder, row)
        ids = example.input_ids.tolist()
        assert given["input_ids"][0, : len(ids)].tolist() == ids
        native = batch_of(model, [example]).native
        shown = {key for key in given if key.startswith(("pixel", "image", "video", "second"))}
        assert native.keys() >= shown
        assert all(torch.equal(native[key], given[key]) for key in native)
    assert any("pixel_values_videos" in batch_of(model, [each]).native for each in examples)


def test_logits_and_gradients_of_a_batch_are_transformers(taken: Taken) -> None:
    """Of rows with unequal numbers of images and videos, and with none."""
    taken.model.requires_grad_(True)
    assert_step_is_theirs(taken, taken.model, taken.theirs)


def test_a_lora_step_is_that_of_peft_over_transformers(taken: Taken) -> None:
    tuned = with_adapters(taken.model, taken.recipe)
    assert_step_is_theirs(taken, tuned, peft_over(taken.theirs, tuned, our_name))


@torch.no_grad()
def test_another_frame_changes_the_logits(taken: Taken) -> None:
    model = taken.model
    batch = batch_of(model, [model.processor.examples(taken.rows[0])[0]])
    before = model.llm.supervised_logits(model.embed(batch), batch)
    batch.native["pixel_values_videos"] = -batch.native["pixel_values_videos"].flip(0, -1)
    after = model.llm.supervised_logits(model.embed(batch), batch)
    assert largest(before, after) > 1e-3


def test_greedy_text_is_transformers(taken: Taken) -> None:
    """With prompts that share a video answered from one prefill, where the model can do that."""
    model, theirs, rows, folder = taken[:4]
    prompts = model.processor.prompts(rows)
    texts = answer_prompts(model, prompts, Decoding(8), fetch=PixelCache(model.processor.images))
    for row, text in zip(rows, texts, strict=True):
        given = their_inputs(folder, row, prompt=True)
        ids = theirs.generate(
            **given, max_new_tokens=8, do_sample=False, eos_token_id=model.processor.stop_ids
        )
        expected = model.processor.decode(ids[0, given["input_ids"].shape[1] :].tolist())
        assert text == expected
