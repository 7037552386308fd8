"""transformers' layouts of Idefics3 and SmolVLM: which models they can express, and weights."""

from __future__ import annotations

import copy
import functools
from importlib.util import find_spec
from typing import Any, Literal

import torch

from vlm_tune.config.connectors import PixelShuffleConnector
from vlm_tune.config.towers import AudioTower, TransformersTower
from vlm_tune.data.images.split import Idefics3Frames
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

Kind = Literal["Idefics3", "SmolVLM"]
"""The beginning of the names of transformers' classes."""


def part_reasons(config: VisionLanguageConfig, kind: Kind) -> list[str]:
    """The reasons why a model's tower or connector can't be those of an Idefics3, from configs."""
    tower = config.model.tower
    if isinstance(tower, AudioTower):
        return ["its tower takes audio, and the layout is for images"]
    connector = config.model.connector
    plain = isinstance(connector, PixelShuffleConnector) and (
        (connector.depth, connector.bias, connector.norm) == (1, False, False)
    )
    return applying(
        (
            not isinstance(tower, TransformersTower) or not tower.final_norm,
            f"its tower's features are taken before the last norm, {kind}'s after it "
            "(model.tower.final_norm)",
        ),
        (tower.grid is not None, "its tower pools to a grid (model.tower.grid)"),
        (
            getattr(tower.split, "kind", None) != "idefics3",
            f"it does not cut images as {kind} does (model.tower.split)",
        ),
        (
            not plain,
            f"its connector is not {kind}'s: a pixel shuffle and one linear layer without norm "
            "and bias",
        ),
    )


def _reasons(config: VisionLanguageConfig, text: Any, *, kind: Kind) -> list[str]:
    return [
        *part_reasons(config, kind),
        *applying(
            (
                kind == "SmolVLM" and find_spec("num2words") is None,
                "transformers makes SmolVLM's processor with the package num2words alone "
                "(pip install num2words)",
            ),
        ),
        *decoder_reasons(text, kind),
        *bidirectional_reasons(config),
    ]


def _processor(model: VisionLanguageNetwork, *, kind: Kind) -> Any:
    import transformers

    tower, images = vision_of(model)
    split = images.split
    assert isinstance(split, Idefics3Frames)
    tokenizer = written_tokenizer(model)
    sizes: dict[str, Any] = {
        "size": {"longest_edge": split.longest_edge},
        "max_image_size": {"longest_edge": tower.image_size},
        "image_mean": list(tower.mean),
        "image_std": list(tower.std),
    }
    video = [transformers.SmolVLMVideoProcessor(**sizes)] if kind == "SmolVLM" else []
    return getattr(transformers, f"{kind}Processor")(
        getattr(transformers, f"{kind}ImageProcessor")(**sizes),
        tokenizer,
        *video,
        image_seq_len=model.processor.spec.tokens_per_image,
        chat_template=tokenizer.chat_template,
    )


def _model(
    model: VisionLanguageNetwork, image_token: int, dtype: torch.dtype, *, kind: Kind
) -> tuple[Any, Weights]:
    import transformers

    language: Any = model.llm.model
    tower = model.tower
    connector = model.connector
    if not isinstance(tower, TransformersVision) or not isinstance(connector, PixelShuffle):
        raise ModelError(f"a {type(tower).__name__} tower has no place in {kind}")
    vision: Any = tower.model
    vision_config = copy.deepcopy(vision.config)
    vision_config.num_hidden_layers = len(vision.encoder.layers)
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision_config,
        text_config=language.config,
        image_token_id=image_token,
        scale_factor=connector.factor,
        tie_word_embeddings=language.config.tie_word_embeddings,
        dtype=dtype,
    )
    with torch.device("meta"):
        written: Any = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    norm = {f"post_layernorm.{key}": value for key, value in tower.norm.state_dict().items()}
    projection: Any = {"modality_projection.proj.weight": connector.layers[0].weight}
    return written, {
        "vision_model": (written.model.vision_model, {**vision.state_dict(), **norm}),
        "connector": (written.model.connector, projection),
        "text_model": (written.model.text_model, language.base_model.state_dict()),
        "lm_head": (written.lm_head, language.get_output_embeddings().state_dict()),
    }


def _target(kind: Kind) -> Target:
    return Target(
        kind,
        functools.partial(_reasons, kind=kind),
        functools.partial(_processor, kind=kind),
        functools.partial(_model, kind=kind),
    )


IDEFICS3 = _target("Idefics3")
SMOLVLM = _target("SmolVLM")
