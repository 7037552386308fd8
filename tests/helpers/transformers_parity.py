"""What the tests of parity share: rows of odd images, and what transformers makes of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.helpers.tiny_models import assert_close, largest, parsed, tuned_by, with_tune
from vlm_tune.data.batch import Batch
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example, Media, Video
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.lora import is_adapter

Gradients = dict[str, torch.Tensor]
LORA = """
tune:
  - {{match: "tower.*", how: lora, r: 4, lora_alpha: 8}}
  - {{match: "connector.*", {connector}}}
  - {{match: "llm.*", how: lora, r: 4, lora_alpha: 8, target_modules: {layers}}}
train:"""
"""LoRA on all linear layers of the tower and on `layers` of the LLM; the connector as told."""
BY_LORA = "how: lora, r: 4, lora_alpha: 8"


# --- rows -----------------------------------------------------------------------------------------


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


def pictures(row: Conversation) -> list[Image.Image]:
    """The images of a row."""
    return [Image.open(str(media.source)).convert("RGB") for media in row.media]


@lru_cache(maxsize=4)
def processor_of(folder: Path) -> Any:
    """A checkpoint's own processor, with Pillow, which resizes as we do."""
    from transformers import AutoImageProcessor, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor


def their_inputs(folder: Path, row: Conversation, *, prompt: bool = False) -> Any:
    """What a checkpoint's own processor, with Pillow, makes of a row by its chat template."""
    return by_chat_template(processor_of(folder), row, prompt=prompt)


def by_chat_template(processor: Any, row: Conversation, *, prompt: bool = False) -> Any:
    """What a processor makes of a row, or of its prompt, by its chat template."""
    turns = [
        {"role": message.role, "content": [_part(part) for part in message.parts]}
        for message in (row.messages[:-1] if prompt else row.messages)
    ]
    # Without reasoning, where the template can open an answer by it.
    options: dict[str, Any] = (
        {"enable_thinking": False} if "enable_thinking" in processor.chat_template else {}
    )
    videos = [item.source for item in row.items if isinstance(item.source, Video)]
    if videos:
        metadata = [
            {"total_num_frames": each.count, "fps": each.fps, "frames_indices": [*each.places]}
            for each in videos
        ]
        options["processor_kwargs"] = {"do_sample_frames": False, "video_metadata": metadata}
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
    if isinstance(part.source, Video):
        return {"type": "video", "video": [_part(frame)["image"] for frame in part.source.frames]}
    return {"type": "image", "image": Image.open(str(part.source)).convert("RGB")}


# --- ids, pixels, logits, text --------------------------------------------------------------------


def ids_of(example: Example, image: int) -> list[int]:
    """An example's token ids, with the id of the image's token in its slots."""
    ids = torch.from_numpy(example.input_ids).long()
    return ids.masked_fill(torch.from_numpy(example.image_mask), image).tolist()


def assert_same_pixels(model: VisionLanguageModel, example: Example, given: Any) -> None:
    """Asserts that the tower sees the pixels that their processor makes, frame by frame.

    Theirs are padded: with frames of zeros to the most of a batch, and each frame to the largest.
    """
    theirs = given["pixel_values"].flatten(0, -4)
    shown = theirs[theirs.flatten(1).any(1)]
    assert len(shown) == len(example.media)
    for frame, padded in zip(example.media, shown, strict=True):
        pixels = model.processor.images(frame)
        ours = (pixels[None].float() * model.tower.scale - model.tower.offset)[0]
        filled = padded[:, : ours.shape[1], : ours.shape[2]]
        assert largest(ours, filled) <= 1e-5
        assert filled.count_nonzero() == padded.count_nonzero()


def their_logits(theirs: Any, batch: Batch, rows: Sequence[Any]) -> torch.Tensor:
    """transformers' logits at the supervised places of a batch's rows."""
    logits = []
    for row, labels in zip(rows, batch.labels, strict=True):
        output = theirs(**row).logits[0]
        places = (labels != IGNORE_INDEX).nonzero()[:, 0]
        logits.append(output[places])
    return torch.cat(logits)


def assert_same_logits(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts that logits agree within 1e-5 (of the largest, where that is over 1)."""
    assert largest(ours, expected) <= 1e-5 * max(1.0, float(expected.abs().max()))


def until_stop(ids: Sequence[int], stops: Sequence[int]) -> Sequence[int]:
    """The ids before the first that ends an answer."""
    ends = [place for place, token in enumerate(ids) if token in stops]
    return ids[: ends[0] if ends else None]


# --- gradients ------------------------------------------------------------------------------------


def our_step(model: VisionLanguageModel, batch: Any) -> Gradients:
    """Gradients of the mean loss with regard to every weight, by name."""
    model.requires_grad_(True)
    return trained_step(model, batch)


def trained_step(model: VisionLanguageModel, batch: Any) -> Gradients:
    """Gradients of the mean loss with regard to what trains, by name."""
    model.zero_grad(set_to_none=True)
    loss: Any = model(batch)
    (loss.sum / loss.count).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def their_step(model: Any, loss: torch.Tensor, names: Callable[[str], str | None]) -> Gradients:
    """Gradients under our names; those of parameters that ours has not are all none."""
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and (ours := names(name)) is not None:
            gradients[ours] = parameter.grad.clone()
    return gradients


def same_gradients(actual: Gradients, wanted: Gradients) -> None:
    """Asserts that gradients agree within 1e-5 (of the largest, where that is over 1).

    None that matters may be left out.
    """
    assert not [
        name for name, gradient in wanted.items() if name not in actual and gradient.abs().max() > 0
    ]
    known = {name: wanted[name] for name in actual}
    for name, gradient in known.items():
        assert largest(actual[name], gradient) <= 1e-5 * max(1.0, float(gradient.abs().max())), name
    assert_close(actual, known, relative=1e-3)


# --- LoRA -----------------------------------------------------------------------------------------


def with_adapters(
    model: VisionLanguageModel,
    recipe: str,
    layers: str = "all-linear",
    connector: str = "how: full",
) -> VisionLanguageModel:
    """A copy of a recipe's model with LoRA whose values are all random, in eval mode."""
    tuned = deepcopy(model)
    tuned_by(tuned, parsed(with_tune(recipe, LORA.format(layers=layers, connector=connector))))
    stir_adapters(tuned)
    return tuned.eval()


def stir_adapters(model: VisionLanguageModel) -> None:
    """Gives every matrix of LoRA random values, those of embeddings too."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def peft_over(theirs: Any, tuned: VisionLanguageModel, names: Callable[[str], str | None]) -> Any:
    """PEFT's own LoRA over a copy of transformers' model, with the values of ours.

    It is on the layers of those names on which `tuned` has it, and what `tuned` trains of the
    model's own weights trains.
    """
    from peft import LoraConfig, get_peft_model

    ours = dict(tuned.named_parameters())
    layers = {name.partition(".lora_")[0] for name in ours if is_adapter(name)}
    targets = {
        name.removesuffix(".weight")
        for name, _ in theirs.named_parameters(remove_duplicate=False)
        if str(names(name)).removesuffix(".weight") in layers
    }
    assert len(targets) == len(layers)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    with warnings.catch_warnings():
        # Of heads that are the embedding: here each of the two has an adapter.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        whole: Any = get_peft_model(deepcopy(theirs), config).eval().base_model.model
    for name, parameter in whole.named_parameters():
        known = str(names(name.replace(".base_layer.", ".")))
        if is_adapter(name):
            parameter.data = ours[known].detach().clone()
        elif known in ours:
            parameter.requires_grad_(ours[known].requires_grad)
    return whole
