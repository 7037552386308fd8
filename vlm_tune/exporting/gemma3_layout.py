"""transformers' layout of Gemma 3: which models it can express, and a model's weights in it."""

from __future__ import annotations

from typing import Any

import torch

from vlm_tune.config.connectors import Gemma3Connector
from vlm_tune.config.towers import Tower, TransformersTower
from vlm_tune.errors import ModelError
from vlm_tune.exporting.hf_layout import Target, Weights, vision_of, written_tokenizer
from vlm_tune.exporting.llava_layout import vision_weights
from vlm_tune.model.connectors.gemma3 import Gemma3Projector
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.quoting import applying, name_list

TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
"""Gemma 3's tokens of images, by the names that its tokenizer has for them."""


def gemma3_reasons(config: VisionLanguageConfig, text: Any) -> list[str]:
    """The reasons why a model can't be a Gemma 3, from configs alone.

    `text` is the LLM's transformers config, None for an encoder-decoder.
    """
    tower = config.model.tower
    assert isinstance(tower, Tower)  # an audio tower does not cut images
    connector = config.model.connector
    vision = config.tower_rebuild.get("vision_config", {})
    model_type = None if text is None else text.model_type
    split = getattr(tower.split, "kind", None)
    eps = connector.eps if isinstance(connector, Gemma3Connector) else None
    return applying(
        (
            not isinstance(tower, TransformersTower)
            or not tower.final_norm
            or vision.get("model_type") != "siglip_vision_model",
            "its tower is no SigLIP with its last norm on the features (model.tower.final_norm)",
        ),
        (tower.grid is not None, "its tower pools to a grid (model.tower.grid)"),
        (split != "gemma3", "its images are not between Gemma 3's markers (model.tower.split)"),
        (eps is None, "its connector is not Gemma 3's (model.connector.kind)"),
        (
            eps is not None and eps != vision.get("layer_norm_eps"),
            f"its connector's eps is {eps}, the tower's {vision.get('layer_norm_eps')}, and Gemma "
            "3 has one for both",
        ),
        (
            model_type != "gemma3_text",
            f"its language model is of type {model_type}, Gemma 3's gemma3_text",
        ),
        (
            config.llm.bidirectional != "images",
            "tokens of an image see earlier ones alone (model.llm.bidirectional)",
        ),
    )


def _processor(model: VisionLanguageNetwork) -> Any:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    tokenizer = written_tokenizer(model, TOKENS["image_token"], TOKENS["boi_token"])
    unnamed = [name for name, token in TOKENS.items() if getattr(tokenizer, name, None) != token]
    if unnamed:
        raise ModelError(
            f"the tokenizer does not name Gemma 3's {name_list(unnamed)}; expected the tokenizer "
            "of a Gemma 3 with images"
        )
    tower, _ = vision_of(model)
    size = tower.image_size
    images = Gemma3ImageProcessor(
        size={"height": size, "width": size},
        image_mean=list(tower.mean),
        image_std=list(tower.std),
    )
    return Gemma3Processor(
        images,
        tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=model.processor.spec.tokens_per_image,
    )


def _model(
    model: VisionLanguageNetwork, image_token: int, dtype: torch.dtype
) -> tuple[Any, Weights]:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    language: Any = model.llm.model
    tower: Any = model.tower
    connector = model.connector
    assert isinstance(connector, Gemma3Projector)
    vision_config, vision = vision_weights(tower)
    norm = {f"post_layernorm.{key}": value for key, value in tower.norm.state_dict().items()}
    control = model.processor.encoder.control
    config = Gemma3Config(
        vision_config=vision_config,
        text_config=language.config,
        mm_tokens_per_image=connector.grid**2,
        boi_token_index=control(TOKENS["boi_token"]),
        eoi_token_index=control(TOKENS["eoi_token"]),
        image_token_index=image_token,
        tie_word_embeddings=language.config.tie_word_embeddings,
        dtype=dtype,
    )
    with torch.device("meta"):
        written: Any = Gemma3ForConditionalGeneration(config)
    projector: dict[str, torch.Tensor] = {
        "mm_input_projection_weight": connector.projection,
        "mm_soft_emb_norm.weight": connector.norm.weight,
    }
    return written, {
        "vision_tower": (written.model.vision_tower, {**vision, **norm}),
        "multi_modal_projector": (written.model.multi_modal_projector, projector),
        "language_model": (written.model.language_model, language.base_model.state_dict()),
        "lm_head": (written.lm_head, language.get_output_embeddings().state_dict()),
    }


GEMMA3 = Target("Gemma 3", gemma3_reasons, _processor, _model, TOKENS["image_token"])
