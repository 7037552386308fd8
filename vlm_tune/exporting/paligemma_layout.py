"""transformers' layout of PaliGemma: which models it can express, and a model's weights in it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from vlm_tune.config.connectors import LinearConnector
from vlm_tune.config.towers import Tower, TransformersTower
from vlm_tune.data.chat.processor_jinja import processor_jinja
from vlm_tune.errors import ModelError
from vlm_tune.exporting.hf_layout import IMAGE_TOKEN, Target, Weights, vision_of, written_tokenizer
from vlm_tune.exporting.llava_layout import vision_weights
from vlm_tune.model.connectors.projectors import Linear
from vlm_tune.model.families.paligemma import LANGUAGES
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.quoting import applying

ENDS = ("<loc0000>", "<loc1023>", "<seg000>", "<seg127>")
"""The first and last of the tokens that transformers adds where a tokenizer lacks them."""


def _reasons(config: VisionLanguageConfig, text: Any) -> list[str]:
    tower = config.model.tower
    assert isinstance(tower, Tower)  # by `target_of`
    connector = config.model.connector
    vision = config.tower_rebuild.get("vision_config", {})
    model_type = None if text is None else text.model_type
    return applying(
        (
            not isinstance(tower, TransformersTower)
            or not tower.final_norm
            or vision.get("model_type") != "siglip_vision_model",
            "its tower is no SigLIP with its last norm on the features (model.tower.final_norm)",
        ),
        (tower.grid is not None, "its tower pools to a grid (model.tower.grid)"),
        (
            bool(tower.tiles) or tower.split is not None or tower.resize != "squash",
            "its images are not squashed to one square (model.tower.resize, tiles and split)",
        ),
        (
            not isinstance(connector, LinearConnector) or connector.norm,
            "its connector is not one linear layer without a norm (model.connector)",
        ),
        (
            model_type not in LANGUAGES,
            f"its language model is of type {model_type}, PaliGemma's {' or '.join(LANGUAGES)}",
        ),
        (
            config.template.get("name") != "paligemma",
            "its chat format is not PaliGemma's (data.template)",
        ),
    )


def _processor(model: VisionLanguageNetwork) -> Any:
    from transformers import PaliGemmaProcessor, SiglipImageProcessor

    tokenizer = written_tokenizer(model)
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in ENDS if token not in vocabulary]
    if missing:
        raise ModelError(
            f"the tokenizer has no {missing[0]}, which PaliGemma's processor would add; expected "
            "the tokenizer of a PaliGemma"
        )
    tower, _ = vision_of(model)
    size = tower.image_size
    images: Any = SiglipImageProcessor(
        size={"height": size, "width": size},
        image_mean=list(tower.mean),
        image_std=list(tower.std),
    )
    images.image_seq_length = model.processor.spec.tokens_per_image
    # The processor puts the start token and the line's end around the question itself.
    ours = model.processor.template
    user = [piece for piece in ours.user if piece.content]
    prompts = ours.model_copy(update={"user": user, "assistant": []})
    template = processor_jinja(prompts, model.processor.system, IMAGE_TOKEN)
    return PaliGemmaProcessor(images, tokenizer, chat_template=template)


def _inputs(processor: Any, messages: Sequence[dict[str, Any]]) -> Any:
    answered = messages[-1]["role"] == "assistant"
    prompt = list(messages[:-1] if answered else messages)
    text = processor.apply_chat_template(prompt, tokenize=False)
    images = [
        part["image"] for turn in prompt for part in turn["content"] if part["type"] == "image"
    ]
    answer = (
        "".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")
        if answered
        else None
    )
    if images:
        return processor(images=images, text=text, suffix=answer, return_tensors="pt")
    # Without an image the processor refuses a text.
    tokenizer = processor.tokenizer
    *system, question = text.rpartition("\n") if len(prompt) > 1 else (text,)
    return tokenizer(
        f"{''.join(system)}{tokenizer.bos_token}{question}\n",
        text_pair=None if answer is None else f"{answer}{tokenizer.eos_token}",
        add_special_tokens=False,
        return_token_type_ids=True,
        return_tensors="pt",
    )


def _model(
    model: VisionLanguageNetwork, image_token: int, dtype: torch.dtype
) -> tuple[Any, Weights]:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    language: Any = model.llm.model
    tower: Any = model.tower
    connector = model.connector
    assert isinstance(connector, Linear)
    vision_config, vision = vision_weights(tower)
    norm = {f"post_layernorm.{key}": value for key, value in tower.norm.state_dict().items()}
    vision_config.projection_dim = model.llm.width
    text_config = copy.deepcopy(language.config)
    text_config.use_bidirectional_attention = True
    config = PaliGemmaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_token,
        projection_dim=model.llm.width,
        hidden_size=model.llm.width,
        tie_word_embeddings=language.config.tie_word_embeddings,
        dtype=dtype,
    )
    with torch.device("meta"):
        written: Any = PaliGemmaForConditionalGeneration(config)
    return written, {
        "vision_tower": (written.model.vision_tower, {**vision, **norm}),
        "multi_modal_projector": (written.model.multi_modal_projector, connector.state_dict()),
        "language_model": (written.model.language_model, language.base_model.state_dict()),
        "lm_head": (written.lm_head, language.get_output_embeddings().state_dict()),
    }


PALIGEMMA = Target("PaliGemma", _reasons, _processor, _model, inputs=_inputs)
