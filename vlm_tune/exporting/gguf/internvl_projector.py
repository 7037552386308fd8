"""llama.cpp's projector of InternVL: an InternViT, a pixel shuffle, a norm and two linear layers.

llama.cpp puts the class token behind the patches, and adds the positions in the order of the file:
so they are written in that order, the class token's last.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from vlm_tune.config.towers import InternVLSplit, Tower
from vlm_tune.data.images.split import InternVLFrames
from vlm_tune.exporting.gguf.projector import (
    VISION,
    Projector,
    connector_tensors,
    square_ids,
)
from vlm_tune.exporting.hf_layout import vision_of
from vlm_tune.exporting.internvl_layout import part_reasons
from vlm_tune.exporting.llava_layout import bidirectional_reasons
from vlm_tune.model.connectors.projectors import PixelShuffle
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.quoting import applying

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from vlm_tune.exporting.gguf.mmproj_reading import Mmproj

TOWER = "model.vision_tower."
"""What the package gguf has in front of the tensors of an InternViT of transformers."""
WITHOUT_SUFFIX = ("lambda_1", "lambda_2", "position_embeddings")
"""Parameters whose names in an mmproj file end with `.weight`."""
CONNECTOR = {
    "norm": "mm.model.mlp.0",
    "layers.0": "mm.model.mlp.1",
    "layers.2": "mm.model.mlp.3",
}
MARKERS = (InternVLFrames.start, InternVLFrames.end)
EPS = 1e-5
"""The number that llama.cpp's norm before the linear layers adds."""


def _reasons(config: VisionLanguageConfig, text: Any) -> list[str]:
    tower = config.model.tower
    split = tower.split if isinstance(tower, Tower) else None
    tiles = split.max_tiles if isinstance(split, InternVLSplit) else 1
    vision = config.tower_rebuild.get("vision_config", {})
    model_type = vision.get("model_type")
    plain = vision.get("norm_type") == "layer_norm" and not vision.get("use_qk_norm")
    return [
        *part_reasons(config),
        *applying(
            (
                model_type != "internvl_vision",
                f"its tower is of type {model_type}, InternVL's internvl_vision",
            ),
            (
                model_type == "internvl_vision" and not plain,
                "its tower has RMSNorms, or norms of queries and keys, as InternViT-6B has",
            ),
            (
                tiles > 1,
                "llama.cpp cuts images in other tiles than in training, and pads them; it sees "
                "those of a model as in training that has one tile an image "
                "(model.tower.split.max_tiles)",
            ),
        ),
        *bidirectional_reasons(config),
    ]


def _notes(model: VisionLanguageNetwork) -> list[str]:
    side = vision_of(model)[0].image_size
    return [
        f"llama.cpp shows an image that is longer than {side} pixels on a side twice, cut and "
        f"whole; give it images of at most {side} x {side} pixels",
        "the positions of patches are in the order in which llama.cpp adds them, the class token's "
        "last; a version that puts the class token first would see images wrongly",
    ]


def _vision(tower: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    vision = tower.model
    config = copy.deepcopy(vision.config)
    config.num_hidden_layers = len(vision.encoder.layer)
    config.image_size = tower.image_size
    config.patch_size = config.patch_size[0]
    state = {}
    for key, tensor in vision.state_dict().items():
        suffix = ".weight" if key.endswith(WITHOUT_SUFFIX) else ""
        state[f"{TOWER}{key}{suffix}"] = tensor
    state[f"{TOWER}embeddings.cls_token"] = vision.embeddings.cls_token.flatten()
    positions = f"{TOWER}embeddings.position_embeddings.weight"
    state[positions] = _positions(vision.embeddings, tower.image_size)
    for key, tensor in tower.norm.state_dict().items():
        state[f"{VISION}post_layernorm.{key}"] = tensor
    return config, state


def _positions(embeddings: Any, side: int) -> torch.Tensor:
    """The positions [N + 1, D] for images of this side, the class token's last."""
    weight = embeddings.position_embeddings
    patches = (side // embeddings.patch_size[0]) ** 2
    with torch.no_grad():
        shown = torch.empty(1, patches + 1, weight.shape[-1], device=weight.device)
        positions = embeddings.interpolate_pos_encoding(shown, side, side)[0]
    return torch.cat([positions[1:], positions[:1]])


def _describe(writer: GGUFWriter, vision: Any, model: VisionLanguageNetwork) -> None:
    assert isinstance(model.connector, PixelShuffle)
    writer.add_vision_projector_scale_factor(model.connector.factor)
    writer.add_uint32("clip.vision.preproc_min_tiles", 1)
    writer.add_uint32("clip.vision.preproc_max_tiles", 1)


def _connector(model: VisionLanguageNetwork, dtype: str) -> dict[str, torch.Tensor]:
    return connector_tensors(model.connector, CONNECTOR)


def _features(mmproj: Mmproj, pixels: torch.Tensor) -> torch.Tensor:
    """As `clip_graph_internvl` in llama.cpp's `models/internvl.cpp`."""
    joined = mmproj.shuffled(mmproj.encode(pixels, class_last=True))
    normed = mmproj.norm("mm.model.mlp.0", joined, EPS)
    return mmproj.mlp("mm.model.mlp.1", "mm.model.mlp.3", normed)


INTERNVL = Projector(
    name="internvl",
    reasons=_reasons,
    markers=MARKERS,
    notes=_notes,
    vision=_vision,
    describe=_describe,
    connector=_connector,
    features=_features,
    image_ids=square_ids(MARKERS),
    norm_eps=EPS,
)
