"""transformers' layout of InternVL: which models it can express, and a model's weights in it."""

from __future__ import annotations

import copy
from typing import Any

import torch

from vlm_tune.config.connectors import PixelShuffleConnector
from vlm_tune.config.towers import InternVLSplit, Tower, TransformersTower
from vlm_tune.data.images.split import InternVLFrames
from vlm_tune.errors import ModelError
from vlm_tune.exporting.hf_layout import (
    Target,
    Weights,
    decoder_reasons,
    vision_of,
    written_tokenizer,
)
from vlm_tune.exporting.llava_layout import bidirectional_reasons
from vlm_tune.model.connectors.projectors import PixelShuffle
from vlm_tune.model.vision.transformers_tower import TransformersVision
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.quoting import applying

IMAGE = "<IMG_CONTEXT>"
TOKENS = ("start_image_token", "end_image_token", "context_image_token", "video_token")
"""The names of the tokens that InternVL's processor asks its tokenizer for."""
PROJECTOR = {"norm": "layer_norm", "layers.0": "linear_1", "layers.2": "linear_2"}


def part_reasons(config: VisionLanguageConfig) -> list[str]:
    """The reasons why a model's tower or connector can't be those of an InternVL, from configs."""
    tower = config.model.tower
    assert isinstance(tower, Tower)  # by `target_of`
    connector = config.model.connector
    fits = isinstance(connector, PixelShuffleConnector) and (
        (connector.depth, connector.bias, connector.norm) == (2, True, True)
    )
    return applying(
        (
            not isinstance(tower, TransformersTower) or not tower.final_norm,
            "its tower's features are taken before the last norm, InternVL's after it "
            "(model.tower.final_norm)",
        ),
        (tower.grid is not None, "its tower pools to a grid (model.tower.grid)"),
        (
            not isinstance(tower.split, InternVLSplit),
            "it does not cut images as InternVL does (model.tower.split)",
        ),
        (
            not fits,
            "its connector is not InternVL's: a pixel shuffle, a norm and two linear layers "
            "with biases",
        ),
    )


def _reasons(config: VisionLanguageConfig, text: Any) -> list[str]:
    return [
        *part_reasons(config),
        *decoder_reasons(text, "InternVL"),
        *bidirectional_reasons(config),
    ]


def _processor(model: VisionLanguageNetwork) -> Any:
    """An `InternVLProcessor`. Raises `ModelError` for a tokenizer that is not InternVL's."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    tower, images = vision_of(model)
    split = images.split
    assert isinstance(split, InternVLFrames)
    tokenizer = written_tokenizer(model, IMAGE)
    missing = [name for name in TOKENS if getattr(tokenizer, name, None) is None]
    if missing:
        raise ModelError(
            f"the tokenizer names no {', '.join(missing)}, which InternVL's processor needs: "
            "expected the tokenizer of an InternVL"
        )
    sizes: dict[str, Any] = {
        "size": {"height": tower.image_size, "width": tower.image_size},
        "image_mean": list(tower.mean),
        "image_std": list(tower.std),
    }
    return InternVLProcessor(
        GotOcr2ImageProcessor(max_patches=split.max_tiles, **sizes),
        tokenizer,
        InternVLVideoProcessor(**sizes),
        image_seq_length=model.processor.spec.tokens_per_image,
        chat_template=tokenizer.chat_template,
    )


def _model(
    model: VisionLanguageNetwork, image_token: int, dtype: torch.dtype
) -> tuple[Any, Weights]:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    language: Any = model.llm.model
    tower = model.tower
    connector = model.connector
    if not isinstance(tower, TransformersVision) or not isinstance(connector, PixelShuffle):
        raise ModelError(f"a {type(tower).__name__} tower has no place in InternVL")
    vision: Any = tower.model
    vision_config = copy.deepcopy(vision.config)
    vision_config.num_hidden_layers = len(vision.encoder.layer)
    vision_config.use_mask_token = False
    config = InternVLConfig(
        vision_config=vision_config,
        text_config=language.config,
        image_token_id=image_token,
        image_seq_length=model.processor.spec.tokens_per_image,
        downsample_ratio=1 / connector.factor,
        tie_word_embeddings=language.config.tie_word_embeddings,
        dtype=dtype,
    )
    with torch.device("meta"):
        written: Any = InternVLForConditionalGeneration(config)
    norm = {f"layernorm.{key}": value for key, value in tower.norm.state_dict().items()}
    projector = {
        f"{PROJECTOR[name]}.{kind}": value
        for key, value in connector.state_dict().items()
        for name, _, kind in [key.rpartition(".")]
    }
    return written, {
        "vision_tower": (written.model.vision_tower, {**vision.state_dict(), **norm}),
        "multi_modal_projector": (written.model.multi_modal_projector, projector),
        "language_model": (written.model.language_model, language.base_model.state_dict()),
        "lm_head": (written.lm_head, language.get_output_embeddings().state_dict()),
    }


INTERNVL = Target("InternVL", _reasons, _processor, _model, IMAGE)
