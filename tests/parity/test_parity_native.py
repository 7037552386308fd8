"""Native models, called as they are: inputs, logits, gradients and text are transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.helpers.native_models import KINDS, Kind, save_native, with_native
from tests.helpers.tiny_models import batch_of, built, largest, parsed, rows_of
from tests.parity.test_parity_idefics3 import write_rows
from tests.parity.test_parity_pretrained import our_step
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Media
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.language.decoding import Decoding

Tiny = Callable[..., str]


def their_inputs(folder: Path, row: Conversation, *, prompt: bool = False) -> Any:
    """What the checkpoint's own processor makes of a row."""
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder)
    turns = [
        {"role": message.role, "content": [_part(part) for part in message.parts]}
        for message in (row.messages[:-1] if prompt else row.messages)
    ]
    return processor.apply_chat_template(
        turns, add_generation_prompt=prompt, tokenize=True, return_dict=True, return_tensors="pt"
    )


def _part(part: str | Media) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "image": Image.open(str(part.source)).convert("RGB")}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
def taken(
    kind: Kind, tiny_recipe: Tiny, color_rows: Path, tmp_path: Path
) -> tuple[VisionLanguageModel, Any, list[Conversation]]:
    """The model of a recipe, transformers' own in the folder `vlm`, and the rows."""
    write_rows(color_rows)
    theirs = save_native(tmp_path / "vlm", kind)
    recipe = parsed(with_native(tiny_recipe("causal"), tmp_path / "vlm"))
    return built(recipe).eval(), theirs, rows_of(recipe)


def test_ids_pixels_logits_and_gradients_are_transformers(
    taken: tuple[VisionLanguageModel, Any, list[Conversation]], tmp_path: Path
) -> None:
    model, theirs, rows = taken
    examples = [model.processor.examples(row)[0] for row in rows]
    inputs = [their_inputs(tmp_path / "vlm", row) for row in rows]
    assert [len(example.media) for example in examples] == [1, 2, 1, 0]
    for example, given in zip(examples, inputs, strict=True):
        ids = example.input_ids.tolist()
        assert given["input_ids"][0, : len(ids)].tolist() == ids
        native = batch_of(model, [example]).native
        assert native.keys() == {key for key in given if key in native}
        assert all(torch.equal(native[key], given[key]) for key in native)
        assert bool(native) == bool(example.media)
    batch = batch_of(model, examples)
    logits = model.llm.supervised_logits(model.embed(batch), batch)
    expected = []
    loss = torch.zeros(())
    for given, example in zip(inputs, examples, strict=True):
        output = theirs(**given).logits[0]
        labels = torch.from_numpy(example.labels).long()
        places = (labels != IGNORE_INDEX).nonzero()[:, 0]
        expected.append(output[places])
        loss = loss + torch.nn.functional.cross_entropy(
            output[places], labels[places], reduction="sum"
        )
    assert largest(logits, torch.cat(expected)) <= 1e-5 * max(1.0, float(logits.abs().max()))
    (loss / len(logits)).backward()
    wanted = {
        f"llm.model.{name}": p.grad for name, p in theirs.named_parameters() if p.grad is not None
    }
    ours = our_step(model, batch)
    for name, gradient in wanted.items():
        assert largest(ours[name], gradient) <= 1e-5 * max(1.0, float(gradient.abs().max())), name


def test_another_image_changes_the_logits(
    taken: tuple[VisionLanguageModel, Any, list[Conversation]],
) -> None:
    model, _, rows = taken
    batch = batch_of(model, [model.processor.examples(rows[0])[0]])
    with torch.no_grad():
        before = model.llm.supervised_logits(model.embed(batch), batch)
        batch.native["pixel_values"] = -batch.native["pixel_values"].flip(0)
        after = model.llm.supervised_logits(model.embed(batch), batch)
    assert largest(before, after) > 1e-3


def test_greedy_text_is_transformers(
    taken: tuple[VisionLanguageModel, Any, list[Conversation]], tmp_path: Path
) -> None:
    model, theirs, rows = taken
    texts = answer_prompts(
        model,
        model.processor.prompts(rows),
        Decoding(8),
        fetch=PixelCache(model.processor.images),
    )
    for row, text in zip(rows, texts, strict=True):
        given = their_inputs(tmp_path / "vlm", row, prompt=True)
        ids = theirs.generate(
            **given, max_new_tokens=8, do_sample=False, eos_token_id=model.processor.stop_ids
        )
        expected = model.processor.decode(ids[0, given["input_ids"].shape[1] :].tolist())
        assert text == expected
