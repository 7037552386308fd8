"""BLIP-2 and InstructBLIP over decoders: inputs, logits, gradients and text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image

from tests.helpers.tiny_models import batch_of, built, largest, parsed, rows_of
from tests.helpers.transformers_parity import ids_of, write_rows
from tests.helpers.vlm_samples import QUERIES, Blip, save_blip, with_pretrained
from tests.parity.test_parity_pretrained import blip_name, our_step, same_gradients, their_step
from vlm_tune.data.types import IGNORE_INDEX, Conversation
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.language.decoding import Decoding

Tiny = Callable[..., str]
Taken = tuple[VisionLanguageModel, Any, list[Conversation]]
CASES: list[tuple[Blip, Literal["opt", "llama"], str]] = [
    ("blip-2", "opt", "blip2_opt"),
    ("instructblip", "llama", "instructblip"),
]
ENDS = {"blip2_opt": "\n", "instructblip": "</s>"}


@pytest.fixture(params=CASES, ids=["BLIP-2 with OPT", "InstructBLIP with Vicuna"])
def taken(
    request: pytest.FixtureRequest, tiny_recipe: Tiny, color_rows: Path, tmp_path: Path
) -> Taken:
    """The model taken over from the folder `vlm`, transformers' own, and the rows."""
    kind, language, template = request.param
    write_rows(color_rows)
    text = tiny_recipe("causal")
    theirs = save_blip(tmp_path / "vlm", rows_of(parsed(text)), kind, language)
    recipe = parsed(with_pretrained(text, tmp_path / "vlm", template))
    return built(recipe).eval(), theirs, rows_of(recipe)


def their_inputs(folder: Path, row: Conversation, end: str | None) -> Any:
    """What the checkpoint's own processor makes of a row, and of its answer before an `end`.

    That is made for a single image. Of several, each is prepared so, and the Q-Former reads the
    question with each.
    """
    from transformers import AutoImageProcessor, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    question, answer = row.messages
    text = question.text if end is None else f"{question.text} {answer.text}{end}"
    inputs = processor(text=text, return_tensors="pt")
    images = [Image.open(str(media.source)).convert("RGB") for media in row.media]
    shown = [processor(images=image, text=text, return_tensors="pt") for image in images]
    if len(images) == 1:
        inputs["input_ids"] = shown[0]["input_ids"]
    elif images:
        tokens = shown[0]["input_ids"][:, :QUERIES].repeat(1, len(images))
        inputs["input_ids"] = torch.cat([tokens, inputs["input_ids"]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if images:
        inputs["pixel_values"] = torch.cat([one["pixel_values"] for one in shown])
    if "qformer_input_ids" in inputs:
        read = processor(text=question.text, return_tensors="pt")
        for name in ("qformer_input_ids", "qformer_attention_mask"):
            inputs[name] = read[name].expand(len(images), -1)
    return inputs


def their_logits(theirs: Any, inputs: Any) -> torch.Tensor:
    """Logits [T, V] of a row; transformers' model takes none without images, and its LLM does."""
    if "pixel_values" in inputs:
        return theirs(**inputs).logits[0]
    return theirs.language_model(input_ids=inputs["input_ids"]).logits[0]


def test_ids_pixels_logits_and_gradients_are_transformers(taken: Taken, tmp_path: Path) -> None:
    model, theirs, rows = taken
    end = ENDS[model.processor.template.name]
    examples = [model.processor.examples(row)[0] for row in rows]
    inputs = [their_inputs(tmp_path / "vlm", row, end) for row in rows]
    for example, given in zip(examples, inputs, strict=True):
        ids = ids_of(example, theirs.config.image_token_id)
        assert [*ids, int(example.labels[-1])] == given["input_ids"][0].tolist()
        if example.media:
            pixels = torch.stack([model.processor.images(frame) for frame in example.media])
            ours = pixels.float() * model.tower.scale - model.tower.offset
            assert largest(ours, given["pixel_values"]) <= 1e-5
    assert [len(example.media) for example in examples] == [1, 2, 1, 0]
    batch = batch_of(model, examples)
    places = [torch.from_numpy(example.labels != IGNORE_INDEX) for example in examples]

    def expected() -> torch.Tensor:
        given = zip(inputs, places, strict=True)
        return torch.cat([their_logits(theirs, one)[: len(at)][at] for one, at in given])

    with torch.no_grad():
        logits = model.llm.supervised_logits(model.embed(batch), batch)
        wanted = expected()
    assert largest(logits, wanted) <= 1e-5 * max(1.0, float(wanted.abs().max()))
    # Another image is seen: the first tokens of two answers to one question differ.
    first = [0, *torch.tensor([e.supervised for e in examples]).cumsum(0).tolist()]
    assert largest(logits[first[0]], logits[first[2]]) > 1e-3
    theirs.zero_grad(set_to_none=True)
    loss = torch.nn.functional.cross_entropy(expected(), batch.labels[batch.labels != IGNORE_INDEX])
    same_gradients(our_step(model, batch), their_step(theirs, loss, blip_name))


@pytest.mark.parametrize("beams", [1, 2])
def test_text_is_transformers(taken: Taken, beams: int, tmp_path: Path) -> None:
    model, theirs, rows = taken
    rows = [row for row in rows if row.media]
    prompts = [model.processor.prompt(row) for row in rows]
    answers = answer_prompts(
        model, prompts, Decoding(6, num_beams=beams), fetch=model.processor.images
    )
    stops = model.processor.stop_ids
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": stops}
    for row, answer in zip(rows, answers, strict=True):
        given = their_inputs(tmp_path / "vlm", row, None)
        generated = theirs.generate(**given, **options)[0, given["input_ids"].shape[1] :]
        assert answer == model.processor.decode(_until(generated.tolist(), stops))


def _until(ids: Sequence[int], stops: Sequence[int]) -> Sequence[int]:
    ends = [place for place, token in enumerate(ids) if token in stops]
    return ids[: ends[0] if ends else None]


def test_the_end_of_a_line_ends_an_answer_of_blip_2(taken: Taken) -> None:
    model, _, (row, *_) = taken
    processor = model.processor
    line = processor.tokenizer.convert_tokens_to_ids("Ċ")
    end = int(processor.examples(row)[0].labels[-1])
    assert (line in processor.stop_ids) == (end == line) == (processor.template.name == "blip2_opt")
    assert processor.stop_ids[-1] == processor.tokenizer.eos_token_id
