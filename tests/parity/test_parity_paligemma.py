"""PaliGemma and PaliGemma 2 taken over by a recipe: inputs, logits, gradients and text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image

from tests.helpers.gemma_samples import save_paligemma
from tests.helpers.tiny_models import batch_of, built, largest, parsed, rows_of
from tests.helpers.vlm_samples import with_pretrained
from tests.parity.test_parity_idefics3 import ids_of, their_logits, write_rows
from tests.parity.test_parity_pretrained import our_step, same_gradients, their_step
from vlm_tune.data.types import IGNORE_INDEX, Conversation
from vlm_tune.errors import ModelError
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.language.decoding import Decoding

Tiny = Callable[..., str]
Taken = tuple[VisionLanguageModel, Any, list[Conversation]]
CASES = [("gemma", True), ("gemma2", True), ("gemma2", False)]
NAMES = {
    "model.vision_tower.post_layernorm.": "tower.norm.",
    "model.vision_tower.": "tower.model.",
    "model.multi_modal_projector.linear.": "connector.linear.",
    "model.language_model.": "llm.model.model.",
    "lm_head.": "llm.model.lm_head.",
}


def our_name(name: str) -> str:
    return next(
        ours + name.removeprefix(theirs)
        for theirs, ours in NAMES.items()
        if name.startswith(theirs)
    )


@pytest.fixture(params=CASES, ids=["1", "2", "2, untied"])
def taken(
    request: pytest.FixtureRequest, tiny_recipe: Tiny, color_rows: Path, tmp_path: Path
) -> Taken:
    """The model taken over from the folder `vlm`, transformers' own, and the rows."""
    language: Literal["gemma", "gemma2"] = request.param[0]
    write_rows(color_rows)
    theirs = save_paligemma(tmp_path / "vlm", language, tied=request.param[1])
    recipe = parsed(with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", "paligemma"))
    return built(recipe).eval(), theirs, rows_of(recipe)


def their_inputs(folder: Path, row: Conversation, *, prompt: bool = False) -> Any:
    """What the checkpoint's own processor makes of a row, with Pillow; it refuses one of words."""
    from transformers import AutoImageProcessor, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    question, answer = row.messages
    images = [Image.open(str(media.source)).convert("RGB") for media in row.media]
    suffix = None if prompt else answer.text
    if not images:
        tokenizer = processor.tokenizer
        pair = None if prompt else f"{suffix}{tokenizer.eos_token}"
        text = f"{tokenizer.bos_token}{question.text}\n"
        return tokenizer(text, pair, return_token_type_ids=True, return_tensors="pt")
    text = "<image>" * len(images) + question.text
    inputs = processor(images=images, text=text, suffix=suffix, return_tensors="pt")
    inputs.pop("labels")
    return inputs


def test_ids_pixels_logits_and_gradients_are_transformers(taken: Taken, tmp_path: Path) -> None:
    model, theirs, rows = taken
    examples = [model.processor.examples(row)[0] for row in rows]
    inputs = [their_inputs(tmp_path / "vlm", row) for row in rows]
    for example, given in zip(examples, inputs, strict=True):
        ids = ids_of(example, theirs.config.image_token_id)
        assert [*ids, int(example.labels[-1])] == given["input_ids"][0].tolist()
        if example.media:
            pixels = torch.stack([model.processor.images(frame) for frame in example.media])
            ours = pixels.float() * model.tower.scale - model.tower.offset
            assert largest(ours, given["pixel_values"]) <= 1e-5
    assert [len(example.media) for example in examples] == [1, 2, 1, 0]
    batch = batch_of(model, examples)
    with torch.no_grad():
        expected = their_logits(theirs, batch, inputs)
        logits = model.llm.supervised_logits(model.embed(batch), batch)
    assert largest(logits, expected) <= 1e-5 * max(1.0, float(expected.abs().max()))
    # Another image is seen: the first tokens of two answers to one question differ.
    first = [0, *torch.tensor([e.supervised for e in examples]).cumsum(0).tolist()]
    assert largest(logits[first[0]], logits[first[2]]) > 1e-3
    # The image's tokens see the question.
    model.llm.bidirectional = "images"  # type: ignore[assignment]
    with torch.no_grad():
        of_images = model.llm.supervised_logits(model.embed(batch), batch)
    model.llm.bidirectional = "prompt"  # type: ignore[assignment]
    assert largest(of_images, expected) > 1e-3
    losses = torch.nn.functional.cross_entropy(
        their_logits(theirs, batch, inputs), batch.labels[batch.labels != IGNORE_INDEX]
    )
    theirs.zero_grad(set_to_none=True)
    same_gradients(our_step(model, batch), their_step(theirs, losses, our_name))


@pytest.mark.parametrize("beams", [1, 2])
def test_text_is_transformers(taken: Taken, beams: int, tmp_path: Path) -> None:
    model, theirs, rows = taken
    if beams > 1 and theirs.config.text_config.model_type == "gemma2":
        # The last token of a prompt would see no more than its window, and not all of the prompt.
        prompts = [model.processor.prompt(row) for row in rows]
        with pytest.raises(ModelError, match="leave out beams"):
            answer_prompts(model, prompts, Decoding(6, num_beams=2), fetch=model.processor.images)
        return
    answers = answer_prompts(
        model,
        [model.processor.prompt(row) for row in rows],
        Decoding(6, num_beams=beams),
        fetch=model.processor.images,
    )
    stops = model.processor.stop_ids
    for row, answer in zip(rows, answers, strict=True):
        prompt = their_inputs(tmp_path / "vlm", row, prompt=True)
        generated = theirs.generate(
            **prompt, max_new_tokens=6, do_sample=False, num_beams=beams, eos_token_id=stops
        )
        ids = generated[0, prompt["input_ids"].shape[1] :].tolist()
        assert answer == model.processor.decode(_until(ids, stops))


def _until(ids: Sequence[int], stops: Sequence[int]) -> Sequence[int]:
    ends = [place for place, token in enumerate(ids) if token in stops]
    return ids[: ends[0] if ends else None]
