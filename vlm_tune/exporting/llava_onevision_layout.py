"""transformers' layout of LLaVA-OneVision: which models it can express, and weights in it."""

from __future__ import annotations

from typing import Any

import torch

from vlm_tune.config.towers import Tower
from vlm_tune.data.images.split import LlavaOnevisionFrames
from vlm_tune.errors import ModelError
from vlm_tune.exporting.hf_layout import (
    IMAGE_TOKEN,
    Target,
    Weights,
    vision_of,
    written_tokenizer,
)
from vlm_tune.exporting.llava_layout import has_bias, vision_weights, written_layers
from vlm_tune.exporting.llava_next_layout import joined_reasons, joined_weights, pinpoints
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.quoting import applying

VIDEO_TOKEN = "<video>"


def _reasons(config: VisionLanguageConfig, text: Any) -> list[str]:
    tower = config.model.tower
    assert isinstance(tower, Tower)  # by `target_of`
    return [
        *joined_reasons(config, text, "LLaVA-OneVision", ("siglip_vision_model",), "a SigLIP"),
        *applying(
            (
                tower.resize != "pad",
                "images among several are not padded to squares (model.tower.resize: pad)",
            )
        ),
    ]


def _ratio(model: VisionLanguageNetwork) -> str:
    """transformers' name of how pictures of joined tiles are shrunk."""
    split = vision_of(model)[1].split
    assert isinstance(split, LlavaOnevisionFrames)
    return f"anyres_max_{split.max_tiles}"


def _processor(model: VisionLanguageNetwork) -> Any:
    """A `LlavaOnevisionProcessor`. Raises `ModelError` for a tokenizer without `<video>`."""
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    tower, _ = vision_of(model)
    tokenizer = written_tokenizer(model)
    if VIDEO_TOKEN not in tokenizer.get_vocab():
        raise ModelError(
            f"the tokenizer has no {VIDEO_TOKEN}, which LLaVA-OneVision's processor needs: "
            "expected the tokenizer of a LLaVA-OneVision"
        )
    sizes: dict[str, Any] = {
        "size": {"height": tower.image_size, "width": tower.image_size},
        "image_mean": list(tower.mean),
        "image_std": list(tower.std),
    }
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(image_grid_pinpoints=pinpoints(model), **sizes),
        tokenizer,
        LlavaOnevisionVideoProcessor(**sizes),
        num_image_tokens=model.processor.spec.tokens_per_image,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        video_token=VIDEO_TOKEN,
        vision_aspect_ratio=_ratio(model),
        chat_template=tokenizer.chat_template,
    )


def _model(
    model: VisionLanguageNetwork, image_token: int, dtype: torch.dtype
) -> tuple[Any, Weights]:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    language: Any = model.llm.model
    tokenizer: Any = model.processor.tokenizer
    vision, vision_state = vision_weights(model.tower)
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=language.config,
        image_token_index=image_token,
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
        image_grid_pinpoints=pinpoints(model),
        projector_hidden_act="gelu",
        vision_feature_select_strategy="full",
        vision_feature_layer=written_layers(model.tower),
        multimodal_projector_bias=has_bias(model),
        vision_aspect_ratio=_ratio(model),
        tie_word_embeddings=language.config.tie_word_embeddings,
        dtype=dtype,
    )
    with torch.device("meta"):
        written: Any = LlavaOnevisionForConditionalGeneration(config)
    return written, joined_weights(model, written, vision_state)


LLAVA_ONEVISION = Target("LLaVA-OneVision", _reasons, _processor, _model)
