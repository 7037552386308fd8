"""transformers' layout of LLaVA-NeXT: which models it can express, and a model's weights in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlm_tune.config.connectors import MlpConnector
from vlm_tune.config.towers import Tower, TransformersTower
from vlm_tune.data.images.split import LlavaNextFrames
from vlm_tune.exporting.hf_layout import (
    IMAGE_TOKEN,
    Target,
    Weights,
    decoder_reasons,
    vision_of,
    written_tokenizer,
)
from vlm_tune.exporting.llava_layout import (
    bidirectional_reasons,
    has_bias,
    vision_weights,
    written_layers,
)
from vlm_tune.model.families.llava_next import SCALED, STRATEGIES
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.quoting import applying

CONNECTOR = {
    "layers.0.": "multi_modal_projector.linear_1.",
    "layers.2.": "multi_modal_projector.linear_2.",
    "newline": "image_newline",
}
"""The beginnings of the names of the connector's tensors here, and in transformers."""


def _reasons(config: VisionLanguageConfig, text: Any) -> list[str]:
    towers = tuple(STRATEGIES)
    return joined_reasons(config, text, "LLaVA-NeXT", towers, "a CLIP or SigLIP", SCALED)


def joined_reasons(
    config: VisionLanguageConfig,
    text: Any,
    name: str,
    vision_types: Sequence[str],
    tower_name: str,
    scaled: Sequence[str] = (),
) -> list[str]:
    """The reasons why a model that joins tiles can't be of the layout `name`, from configs alone.

    `text` is as in `Target.reasons`. The layout's tower is of one of transformers' `vision_types`,
    `tower_name` in words. `scaled` is as in `decoder_reasons`.
    """
    tower = config.model.tower
    assert isinstance(tower, Tower)  # by `target_of`
    connector = config.model.connector
    vision = config.tower_rebuild.get("vision_config", {}).get("model_type")
    fits = isinstance(connector, MlpConnector) and (
        (connector.depth, connector.norm, connector.newline) == (2, False, True)
    )
    return [
        *applying(
            (
                not isinstance(tower, TransformersTower) or vision not in vision_types,
                f"its tower is not {tower_name} of transformers, as {name}'s is",
            ),
            (
                isinstance(tower, TransformersTower) and tower.final_norm,
                "its tower's last norm is on the features (model.tower.final_norm)",
            ),
            (tower.grid is not None, "its tower pools to a grid (model.tower.grid)"),
            (
                not fits,
                f"its connector is not {name}'s: an MLP of two layers without norm, and "
                "newline: true",
            ),
        ),
        *decoder_reasons(text, name, scaled),
        *bidirectional_reasons(config),
    ]


def pinpoints(model: VisionLanguageNetwork) -> list[list[int]]:
    """The sizes [height, width] in pixels of the grids of tiles."""
    tower, images = vision_of(model)
    split = images.split
    assert isinstance(split, LlavaNextFrames)
    side = tower.image_size
    return [[rows * side, columns * side] for columns, rows in split.grids]


def _processor(model: VisionLanguageNetwork) -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    tokenizer = written_tokenizer(model)
    tower, _ = vision_of(model)
    vision, _ = vision_weights(tower)
    side = tower.image_size
    return LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=pinpoints(model),
            image_mean=list(tower.mean),
            image_std=list(tower.std),
        ),
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=STRATEGIES[vision.model_type],
        num_additional_image_tokens=int(vision.model_type == "clip_vision_model"),
        image_token=IMAGE_TOKEN,
        chat_template=tokenizer.chat_template,
    )


def _model(
    model: VisionLanguageNetwork, image_token: int, dtype: torch.dtype
) -> tuple[Any, Weights]:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    language: Any = model.llm.model
    vision, vision_state = vision_weights(model.tower)
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=language.config,
        image_token_index=image_token,
        image_grid_pinpoints=pinpoints(model),
        image_seq_length=model.processor.spec.tokens_per_image,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=STRATEGIES[vision.model_type],
        vision_feature_layer=written_layers(model.tower),
        multimodal_projector_bias=has_bias(model),
        tie_word_embeddings=language.config.tie_word_embeddings,
        dtype=dtype,
    )
    with torch.device("meta"):
        written: Any = LlavaNextForConditionalGeneration(config)
    return written, joined_weights(model, written, vision_state)


def joined_weights(
    model: VisionLanguageNetwork, written: Any, vision_state: dict[str, torch.Tensor]
) -> Weights:
    """A model's weights in a layout with a token for rows' ends, by the parts of `written`."""
    language: Any = model.llm.model
    connector = {
        theirs + key.removeprefix(ours): value
        for key, value in model.connector.state_dict().items()
        for ours, theirs in CONNECTOR.items()
        if key.startswith(ours)
    }
    body = language.base_model.state_dict()
    weights = {
        **{f"vision_tower.{key}": value for key, value in vision_state.items()},
        **connector,
        **{f"language_model.{key}": value for key, value in body.items()},
    }
    return {
        "model": (written.model, weights),
        "lm_head": (written.lm_head, language.get_output_embeddings().state_dict()),
    }


LLAVA_NEXT = Target("LLaVA-NeXT", _reasons, _processor, _model, scaled=SCALED)
