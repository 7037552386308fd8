"""Idefics3 and SmolVLM taken over by a recipe: inputs, logits, gradients and text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image

from tests.helpers.tiny_models import batch_of, built, largest, parsed, rows_of
from tests.helpers.vlm_samples import save_idefics3, with_pretrained
from tests.parity.test_parity_pretrained import our_step, same_gradients, their_step
from vlm_tune.data.batch import Batch
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example, Media
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.language.decoding import Decoding

Tiny = Callable[..., str]
Kind = Literal["idefics3", "smolvlm"]
KINDS: list[Kind] = ["idefics3", "smolvlm"]
NAMES = {
    "model.vision_model.post_layernorm.": "tower.norm.",
    "model.vision_model.": "tower.model.",
    "model.connector.modality_projection.proj.": "connector.layers.0.",
    "model.text_model.": "llm.model.model.",
    "lm_head.": "llm.model.lm_head.",
}


def our_name(name: str) -> str:
    return next(
        ours + name.removeprefix(theirs)
        for theirs, ours in NAMES.items()
        if name.startswith(theirs)
    )


def write_rows(path: Path) -> None:
    """Rows about images of odd sizes, several of them, between words, and about none."""
    sizes = {"wide": (60, 21), "high": (9, 50), "small": (7, 7)}
    for seed, (name, size) in enumerate(sizes.items()):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator)
        Image.fromarray(pixels.byte().numpy()).save(path.parent / f"{name}.png")
    rows = [
        (["wide"], "<image>What is it?", "a wide image"),
        (["high", "small"], "Look at <image> and at\n<image>: same?", "no, one is high"),
        (["small"], "<image>What is it?", "a small image"),
        ([], "Only words here?", "yes"),
    ]
    with path.open("w") as file:
        for names, question, answer in rows:
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            images = [f"{name}.png" for name in names]
            file.write(json.dumps({"messages": turns, "images": images}) + "\n")


def their_inputs(folder: Path, row: Conversation, *, prompt: bool = False) -> Any:
    """What the checkpoint's own processor makes of a row, with Pillow."""
    from transformers import AutoImageProcessor, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    turns = [
        {"role": message.role, "content": [_part(part) for part in message.parts]}
        for message in (row.messages[:-1] if prompt else row.messages)
    ]
    return processor.apply_chat_template(
        turns,
        add_generation_prompt=prompt,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
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
    """The model taken over from the folder `vlm`, transformers' own, and the rows."""
    write_rows(color_rows)
    theirs = save_idefics3(tmp_path / "vlm", kind)
    recipe = parsed(with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", kind))
    return built(recipe).eval(), theirs, rows_of(recipe)


def ids_of(example: Example, image: int) -> list[int]:
    ids = torch.from_numpy(example.input_ids).long()
    return ids.masked_fill(torch.from_numpy(example.image_mask), image).tolist()


def their_logits(theirs: Any, batch: Batch, rows: Sequence[Any]) -> torch.Tensor:
    """transformers' logits at the supervised places of a batch's rows."""
    logits = []
    for row, labels in zip(rows, batch.labels, strict=True):
        output = theirs(**row).logits[0]
        places = (labels != IGNORE_INDEX).nonzero()[:, 0]
        logits.append(output[places])
    return torch.cat(logits)


def test_ids_pixels_logits_and_gradients_are_transformers(
    taken: tuple[VisionLanguageModel, Any, list[Conversation]], tmp_path: Path
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
            assert largest(ours, given["pixel_values"][0]) <= 1e-5
    # An image and its tiles: 2 x 1, then 1 x 2 and 2 x 2, then 2 x 2.
    assert [len(example.media) for example in examples] == [3, 8, 5, 0]
    batch = batch_of(model, examples)
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
    same_gradients(our_step(model, batch), their_step(theirs, losses, our_name))


def test_greedy_text_is_transformers(
    taken: tuple[VisionLanguageModel, Any, list[Conversation]], tmp_path: Path
) -> None:
    model, theirs, rows = taken
    answers = answer_prompts(
        model,
        [model.processor.prompt(row) for row in rows],
        Decoding(6),
        fetch=model.processor.images,
    )
    stops = model.processor.stop_ids
    for row, answer in zip(rows, answers, strict=True):
        prompt = their_inputs(tmp_path / "vlm", row, prompt=True)
        generated = theirs.generate(**prompt, max_new_tokens=6, do_sample=False)
        ids = generated[0, prompt["input_ids"].shape[1] :].tolist()
        ends = [place for place, token in enumerate(ids) if token in stops]
        assert answer == model.processor.decode(ids[: ends[0] if ends else None])
