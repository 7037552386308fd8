"""llama.cpp's projector of LLaVA: two linear layers with GELU between them, one square image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlm_tune.config.connectors import MlpConnector
from vlm_tune.config.towers import TransformersTower
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.types import Media
from vlm_tune.exporting.gguf.projector import (
    IMAGE_SLOT,
    Projector,
    clip_names,
    connector_tensors,
)
from vlm_tune.exporting.hf_layout import vision_of
from vlm_tune.exporting.llava_layout import (
    bidirectional_reasons,
    tower_reasons,
    vision_weights,
)
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.quoting import applying

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from vlm_tune.exporting.gguf.mmproj_reading import Mmproj

PAD = (122, 116, 104)
"""The colour with which llama.cpp pads an image to a square: CLIP's mean."""
CONNECTOR = {"layers.0": "mm.0", "layers.2": "mm.2", "norm": "v.post_ln"}
"""mmproj names of the connector's layers. A LayerNorm before the MLP is stored as the norm that
mmproj has after the tower's last block."""


def _reasons(config: VisionLanguageConfig, text: Any) -> list[str]:
    tower = config.model.tower
    connector = config.model.connector
    mlp = isinstance(connector, MlpConnector)
    depth = connector.depth if isinstance(connector, MlpConnector) else 2
    layers = applying(
        (
            getattr(tower, "class_token", False),
            "its connector gets the class token (model.tower.class_token)",
        ),
        (not mlp, f"its connector is of kind {connector.kind}"),
        (depth != 2, f"its connector has {depth} layers"),
        (
            isinstance(connector, MlpConnector) and not connector.bias,
            "its connector has no biases (model.connector.bias)",
        ),
        (
            isinstance(tower, TransformersTower) and len(tower.layers) > 1,
            "its features are those of several layers (model.tower.layer)",
        ),
    )
    return [*tower_reasons(config), *layers, *bidirectional_reasons(config)]


def _notes(model: VisionLanguageNetwork) -> list[str]:
    tower, images = vision_of(model)
    pads = images.resize == "pad"
    return applying(
        (
            vision_weights(tower)[0].model_type == "clip_vision_model",
            "llama.cpp versions with its issue 25814 (since pull request 13321, until 25844) put "
            "a CLIP tower's class token in the wrong place, and see images wrongly; SigLIP towers "
            "have none",
        ),
        (
            not pads,
            "llama.cpp pads images to squares, this model was trained with resize: "
            f"{images.resize}; give it square images",
        ),
        (
            pads and tuple(int(255 * value) for value in images.mean) != PAD,
            f"llama.cpp pads images with the colour {PAD}, this model was trained with its "
            "tower's own; give it square images",
        ),
    )


def _vision(tower: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    config, state = vision_weights(tower)
    # Features are taken before the tower's last norm.
    return config, clip_names(
        {key: state[key] for key in state if not key.startswith("post_layernorm")}
    )


def _describe(writer: GGUFWriter, vision: Any, model: VisionLanguageNetwork) -> None:
    # Without this field llama.cpp leaves out the last block.
    writer.add_array("clip.vision.feature_layer", [vision.num_hidden_layers])


def _connector(model: VisionLanguageNetwork, dtype: str) -> dict[str, torch.Tensor]:
    return connector_tensors(model.connector, CONNECTOR)


def _features(mmproj: Mmproj, pixels: torch.Tensor) -> torch.Tensor:
    return mmproj.mlp("mm.0", "mm.2", mmproj.encode(pixels))


def _image_ids(
    tokenizer: Any, vision: dict[str, Any], media: Media, processor: Processor
) -> list[int]:
    return [IMAGE_SLOT] * processor.spec.tokens_per_image


MLP = Projector(
    name="mlp",
    reasons=_reasons,
    markers=(),
    notes=_notes,
    vision=_vision,
    describe=_describe,
    connector=_connector,
    features=_features,
    image_ids=_image_ids,
)
