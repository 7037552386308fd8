"""transformers' layouts of Mistral 3 and of Pixtral: which models fit, and their weights there."""

from __future__ import annotations

import copy
from typing import Any

import torch

from vlm_tune.config.connectors import MlpConnector, PatchMergerConnector
from vlm_tune.config.towers import TransformersTower
from vlm_tune.data.images.shaped import ROW_ENDS, ShapedImages
from vlm_tune.exporting.hf_layout import (
    Target,
    Weights,
    decoder_reasons,
    vision_of,
    written_tokenizer,
)
from vlm_tune.exporting.llava_layout import bidirectional_reasons
from vlm_tune.model.vision.shaped_tower import PixtralVision
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.quoting import applying

IMAGE = "[IMG]"
PROJECTOR = {
    "norm": "norm",
    "merging": "patch_merger.merging_layer",
    "layers.0": "linear_1",
    "layers.2": "linear_2",
}
"""The names of the connector's modules here, and in transformers."""


def tower_reasons(config: VisionLanguageConfig, name: str) -> list[str]:
    """The reasons why a model's tower can't be that of a Pixtral or a Mistral 3, by its `name`."""
    tower = config.model.tower
    vision = config.tower_rebuild.get("vision_config", {}).get("model_type")
    return applying(
        (vision != "pixtral", f"its tower is of type {vision}, {name}'s is pixtral"),
        (
            isinstance(tower, TransformersTower) and not tower.row_ends,
            f"no tokens end the rows of its images, as {name}'s do (model.tower.row_ends)",
        ),
    )


def _mistral3_reasons(config: VisionLanguageConfig, text: Any) -> list[str]:
    connector = config.model.connector
    eps = getattr(text, "rms_norm_eps", None)
    return [
        *tower_reasons(config, "Mistral 3"),
        *applying(
            (
                isinstance(connector, PatchMergerConnector) and connector.eps != eps,
                f"its connector's norm adds another eps than its language model's, {eps} "
                "(model.connector.eps)",
            )
        ),
        *decoder_reasons(text, "Mistral 3"),
        *bidirectional_reasons(config),
    ]


def _pixtral_reasons(config: VisionLanguageConfig, text: Any) -> list[str]:
    connector = config.model.connector
    fits = isinstance(connector, MlpConnector) and (connector.depth, connector.norm) == (2, False)
    return [
        *tower_reasons(config, "Pixtral"),
        *applying((not fits, "its connector is not Pixtral's, an MLP of two layers without norm")),
        *decoder_reasons(text, "Pixtral"),
        *bidirectional_reasons(config),
    ]


def _processor(model: VisionLanguageNetwork) -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor

    tokenizer = written_tokenizer(model, IMAGE)
    tower, images = vision_of(model)
    assert isinstance(images, ShapedImages)
    return PixtralProcessor(
        PixtralImageProcessor(
            size={"longest_edge": tower.image_size},
            patch_size={"height": images.patch, "width": images.patch},
            image_mean=list(tower.mean),
            image_std=list(tower.std),
        ),
        tokenizer,
        patch_size=images.patch,
        spatial_merge_size=images.merge,
        image_token=IMAGE,
        image_break_token=ROW_ENDS[0],
        image_end_token=ROW_ENDS[1],
        chat_template=tokenizer.chat_template,
    )


def _vision(model: VisionLanguageNetwork) -> tuple[Any, dict[str, torch.Tensor]]:
    """The tower's config and weights."""
    tower = model.tower
    assert isinstance(tower, PixtralVision)
    config = copy.deepcopy(tower.model.config)
    config.num_hidden_layers = len(tower.model.transformer.layers)
    config.image_size = tower.image_size
    return config, tower.model.state_dict()


def _parts(model: VisionLanguageNetwork, written: Any, vision: dict[str, torch.Tensor]) -> Weights:
    language: Any = model.llm.model
    projector = {
        f"{PROJECTOR[name]}.{kind}": value
        for key, value in model.connector.state_dict().items()
        for name, _, kind in [key.rpartition(".")]
    }
    return {
        "vision_tower": (written.model.vision_tower, vision),
        "multi_modal_projector": (written.model.multi_modal_projector, projector),
        "language_model": (written.model.language_model, language.base_model.state_dict()),
        "lm_head": (written.lm_head, language.get_output_embeddings().state_dict()),
    }


def _mistral3_model(
    model: VisionLanguageNetwork, image_token: int, dtype: torch.dtype
) -> tuple[Any, Weights]:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    connector = model.config.model.connector
    assert isinstance(connector, PatchMergerConnector)
    text = model.llm.model.config
    vision, weights = _vision(model)
    config = Mistral3Config(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        multimodal_projector_bias=connector.bias,
        spatial_merge_size=connector.factor,
        tie_word_embeddings=text.tie_word_embeddings,
        dtype=dtype,
    )
    with torch.device("meta"):
        written: Any = Mistral3ForConditionalGeneration(config)
    return written, _parts(model, written, weights)


def _pixtral_model(
    model: VisionLanguageNetwork, image_token: int, dtype: torch.dtype
) -> tuple[Any, Weights]:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = model.llm.model.config
    vision, weights = _vision(model)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        multimodal_projector_bias=True,
        tie_word_embeddings=text.tie_word_embeddings,
        dtype=dtype,
    )
    with torch.device("meta"):
        written: Any = LlavaForConditionalGeneration(config)
    return written, _parts(model, written, weights)


MISTRAL3 = Target("Mistral 3", _mistral3_reasons, _processor, _mistral3_model, IMAGE)
PIXTRAL = Target("Pixtral", _pixtral_reasons, _processor, _pixtral_model, IMAGE)
