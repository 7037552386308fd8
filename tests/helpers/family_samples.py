"""A tiny checkpoint of each family of whole models over a decoder, and our names of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.helpers.chat_samples import TEXTS, turns
from tests.helpers.gemma_samples import save_gemma3, save_paligemma
from tests.helpers.shaped_samples import save_mistral3, save_pixtral
from tests.helpers.tiled_samples import (
    save_granite_vision,
    save_internvl,
    save_llava_next,
    save_llava_onevision,
)
from tests.helpers.transformers_parity import pictures, processor_of, their_inputs
from tests.helpers.vlm_samples import save_idefics3, save_llava
from vlm_tune.data.chat.template import load_template
from vlm_tune.data.types import Conversation

LANGUAGE = {"model.language_model.": "llm.model.model.", "lm_head.": "llm.model.lm_head."}
LINEAR = {
    "model.multi_modal_projector.linear_1.": "connector.layers.0.",
    "model.multi_modal_projector.linear_2.": "connector.layers.2.",
}
TOWER = {"model.vision_tower.": "tower.model."}
NORMED = {"model.vision_tower.post_layernorm.": "tower.norm."} | TOWER
IDEFICS3 = {
    "model.vision_model.post_layernorm.": "tower.norm.",
    "model.vision_model.": "tower.model.",
    "model.connector.modality_projection.proj.": "connector.layers.0.",
    "model.text_model.": "llm.model.model.",
    "lm_head.": "llm.model.lm_head.",
}
NEWLINE = {"model.image_newline": "connector.newline"}
INTERNVL = {"model.multi_modal_projector.layer_norm.": "connector.norm."} | LINEAR
MERGER = {
    "model.multi_modal_projector.norm.": "connector.norm.",
    "model.multi_modal_projector.patch_merger.merging_layer.": "connector.merging.",
} | LINEAR
GEMMA3 = {
    "model.multi_modal_projector.mm_input_projection_weight": "connector.projection",
    "model.multi_modal_projector.mm_soft_emb_norm.": "connector.norm.",
}
PALIGEMMA = {"model.multi_modal_projector.linear.": "connector.linear."}


class Inputs(Protocol):
    """What a checkpoint's own processor makes of a row, of all of it or of its prompt."""

    def __call__(self, folder: Path, row: Conversation, *, prompt: bool = False) -> Any: ...


def llava_inputs(folder: Path, row: Conversation, *, prompt: bool = False) -> Any:
    """LLaVA-1.5's, whose format is Vicuna's."""
    question, answer = row.messages
    words = "".join(part if isinstance(part, str) else "<image>" for part in question.parts)
    text = f"{load_template('vicuna').default_system} USER: {words} ASSISTANT:"
    return processor_of(folder)(
        images=pictures(row) or None,
        text=text if prompt else f"{text} {answer.text}</s>",
        return_tensors="pt",
    )


def paligemma_inputs(folder: Path, row: Conversation, *, prompt: bool = False) -> Any:
    """PaliGemma's, which has no chat template; it refuses a row of words."""
    processor = processor_of(folder)
    question, answer = row.messages
    images = pictures(row)
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


@dataclass(frozen=True)
class Sample:
    """A tiny checkpoint: how it is saved, its chat format, and our names of its tensors.

    Args:
        save: writes it into a folder; `tied=...` says whether its head is its embedding.
        template: the name of the chat format.
        names: our beginnings of names by theirs, the first that fits.
        frames: the numbers of frames of the rows of `write_rows`.
        turns: a row of several turns and images, as (role, text) pairs, if it takes one.
        inputs: what its own processor makes of a row.
        scale: the factor from the logits of transformers' class to those of the LLM's own class.
    """

    save: Callable[..., Any]
    template: str
    names: dict[str, str]
    frames: tuple[int, ...] = (1, 2, 1, 0)
    turns: tuple[tuple[str, str], ...] = ()
    inputs: Inputs = their_inputs
    scale: float = 1.0

    def our_name(self, name: str) -> str:
        """Our name of a tensor of theirs."""
        return next(
            ours + name.removeprefix(theirs)
            for theirs, ours in self.names.items()
            if name.startswith(theirs)
        )

    @property
    def saved(self) -> list[str]:
        """The modules of the connector in its class."""
        return sorted(
            theirs.removesuffix(".")
            for theirs, ours in self.names.items()
            if ours.startswith("connector.") and theirs.endswith(".")
        )


def _save_llava(folder: Path, *, tied: bool = False) -> Any:
    rows = [Conversation("", turns(text, text)) for text in TEXTS]
    return save_llava(folder, rows, tie_word_embeddings=tied)


SEVERAL_TURNS = (
    ("system", "Answer in one line. "),
    ("user", " <image> What is it?\n"),
    ("assistant", "a high image"),
    ("user", "And this? <image>"),
    ("assistant", "a small one"),
)

TILED = {
    "llava_next": Sample(
        save_llava_next, "llava_mistral", TOWER | LINEAR | NEWLINE | LANGUAGE, (3, 6, 3, 0)
    ),
    "granite_vision": Sample(
        save_granite_vision,
        "granite_vision",
        TOWER | LINEAR | NEWLINE | LANGUAGE,
        (3, 6, 3, 0),
        scale=1 / 4,
    ),
    # 3 x 2 tiles, shrunk, and the whole; two images seen whole; one of one tile, and the whole.
    "llava_onevision": Sample(
        save_llava_onevision, "llava_onevision", TOWER | LINEAR | NEWLINE | LANGUAGE, (7, 2, 2, 0)
    ),
    # An image of 3 x 1 tiles and itself; one of 1 x 4 and one too small to be cut.
    "internvl": Sample(save_internvl, "internvl", TOWER | INTERNVL | LANGUAGE, (4, 6, 1, 0)),
    # InternVL3, and InternViT-6B's norms.
    "internvl-qwen2": Sample(
        lambda folder, **options: save_internvl(
            folder, "qwen2", use_qk_norm=True, norm_type="rms_norm", **options
        ),
        "internvl",
        TOWER | INTERNVL | LANGUAGE,
        (4, 6, 1, 0),
    ),
}
"""Families that see an image as tiles."""

SHAPED = {
    "mistral3": Sample(save_mistral3, "mistral3", TOWER | MERGER | LANGUAGE),
    "ministral3": Sample(
        lambda folder, **options: save_mistral3(folder, "ministral3", **{"tied": True} | options),
        "mistral3",
        TOWER | MERGER | LANGUAGE,
    ),
    "pixtral": Sample(save_pixtral, "pixtral", TOWER | LINEAR | LANGUAGE),
}
"""Families whose tower keeps an image's shape."""

FAMILIES = {
    "llava": Sample(_save_llava, "vicuna", TOWER | LINEAR | LANGUAGE, inputs=llava_inputs),
    # An image and its tiles: 2 x 1, then 1 x 2 and 2 x 2, then 2 x 2.
    "idefics3": Sample(
        lambda folder, **options: save_idefics3(folder, "idefics3", **options),
        "idefics3",
        IDEFICS3,
        (3, 8, 5, 0),
    ),
    "smolvlm": Sample(
        lambda folder, **options: save_idefics3(folder, "smolvlm", **options),
        "smolvlm",
        IDEFICS3,
        (3, 8, 5, 0),
    ),
    **TILED,
    **SHAPED,
    "gemma3": Sample(save_gemma3, "gemma3", NORMED | GEMMA3 | LANGUAGE, turns=SEVERAL_TURNS),
    "paligemma": Sample(
        lambda folder, **options: save_paligemma(folder, "gemma", **options),
        "paligemma",
        NORMED | PALIGEMMA | LANGUAGE,
        inputs=paligemma_inputs,
    ),
    "paligemma2": Sample(
        lambda folder, **options: save_paligemma(folder, "gemma2", **options),
        "paligemma",
        NORMED | PALIGEMMA | LANGUAGE,
        inputs=paligemma_inputs,
    ),
}
