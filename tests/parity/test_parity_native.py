"""Native models, called as they are: inputs, logits, gradients and text are transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from tests.helpers.native_models import KINDS, save_native, with_native
from tests.helpers.tiny_models import batch_of, built, largest, parsed, rows_of
from tests.helpers.tiny_recipes import tiny_text
from tests.parity.test_parity_idefics3 import write_rows
from tests.parity.test_parity_pretrained import our_step
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Media
from vlm_tune.errors import ModelError
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.language.decoding import Decoding


def their_inputs(folder: Path, row: Conversation, *, prompt: bool = False) -> Any:
    """What the checkpoint's own processor makes of a row."""
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder)
    turns = [
        {"role": message.role, "content": [_part(part) for part in message.parts]}
        for message in (row.messages[:-1] if prompt else row.messages)
    ]
    # Without reasoning, where the template can open an answer by it.
    options = {"enable_thinking": False} if "enable_thinking" in processor.chat_template else {}
    return processor.apply_chat_template(
        turns,
        add_generation_prompt=prompt,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )


def _part(part: str | Media) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "image": Image.open(str(part.source)).convert("RGB")}


class Taken(NamedTuple):
    """The model of a recipe, transformers' own in the folder `vlm`, and the rows."""

    model: VisionLanguageModel
    theirs: Any
    rows: list[Conversation]
    folder: Path


@pytest.fixture(scope="module", params=KINDS)
def taken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    folder = tmp_path_factory.mktemp(request.param)
    write_rows(folder / "rows.jsonl")
    theirs = save_native(folder / "vlm", request.param)
    text = tiny_text("causal", folder / "rows.jsonl", folder / "run")
    recipe = parsed(with_native(text, folder / "vlm"), data__max_length=512)
    return Taken(built(recipe).eval(), theirs, rows_of(recipe), folder / "vlm")


def test_ids_pixels_logits_and_gradients_are_transformers(taken: Taken) -> None:
    model, theirs, rows, folder = taken
    examples = [model.processor.examples(row)[0] for row in rows]
    inputs = [their_inputs(folder, row) for row in rows]
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


def test_another_image_changes_the_logits(taken: Taken) -> None:
    model, _, rows, _ = taken
    batch = batch_of(model, [model.processor.examples(rows[0])[0]])
    with torch.no_grad():
        before = model.llm.supervised_logits(model.embed(batch), batch)
        batch.native["pixel_values"] = -batch.native["pixel_values"].flip(0, -1)
        after = model.llm.supervised_logits(model.embed(batch), batch)
    assert largest(before, after) > 1e-3


def test_greedy_text_is_transformers(taken: Taken) -> None:
    model, theirs, rows, folder = taken
    texts = answer_prompts(
        model,
        model.processor.prompts(rows),
        Decoding(8),
        fetch=PixelCache(model.processor.images),
    )
    for row, text in zip(rows, texts, strict=True):
        given = their_inputs(folder, row, prompt=True)
        ids = theirs.generate(
            **given, max_new_tokens=8, do_sample=False, eos_token_id=model.processor.stop_ids
        )
        expected = model.processor.decode(ids[0, given["input_ids"].shape[1] :].tolist())
        assert text == expected


@pytest.mark.parametrize("taken", ["qwen3_vl"], indirect=True)
def test_beams_of_several_images_are_refused_where_transformers_mixes_them_up(
    taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, rows, _ = taken
    one_image, two_images = model.processor.prompts(rows[:2])
    cache = PixelCache(model.processor.images)
    beams = Decoding(2, num_beams=2)
    assert len(answer_prompts(model, [one_image, two_images], beams, fetch=cache)) == 2
    monkeypatch.setattr("vlm_tune.model.language.native.beams_keep_images", lambda _: False)
    answer_prompts(model, [one_image], beams, fetch=cache)
    with pytest.raises(ModelError, match="mixes up the images of a row in a beam search"):
        answer_prompts(model, [two_images], beams, fetch=cache)
