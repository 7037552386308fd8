"""llama.cpp's projector of Gemma 3: means of squares of patches, a norm and one matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import avg_pool2d

from vlm_tune.config.connectors import Gemma3Connector
from vlm_tune.data.images.gemma3_frames import Gemma3Frames
from vlm_tune.exporting.gemma3_layout import gemma3_reasons
from vlm_tune.exporting.gguf.projector import Projector, clip_names, square_ids
from vlm_tune.exporting.llava_layout import vision_weights
from vlm_tune.model.connectors.gemma3 import Gemma3Projector
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.quoting import applying

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from vlm_tune.exporting.gguf.mmproj_reading import Mmproj

MARKERS = (Gemma3Frames.begin, Gemma3Frames.end)
BATCH = 512
"""Tokens that llama.cpp computes at once by default (`--ubatch-size`)."""


def _reasons(config: VisionLanguageConfig, text: Any) -> list[str]:
    connector = config.model.connector
    tokens = connector.grid**2 if isinstance(connector, Gemma3Connector) else 0
    window = getattr(text, "sliding_window", None) or tokens
    return [
        *gemma3_reasons(config, text),
        *applying(
            (
                tokens > window,
                f"an image has {tokens} tokens, more than the window of {window} in which "
                "llama.cpp lets them see each other (model.connector.grid)",
            )
        ),
    ]


def _notes(model: VisionLanguageNetwork) -> list[str]:
    tokens = model.processor.spec.tokens_per_image
    return [
        "llama.cpp pads images to squares with black, this model was trained with squashed ones; "
        "give it square images",
        *applying(
            (
                tokens > BATCH,
                f"an image has {tokens} tokens, which llama.cpp has to compute at once: start it "
                f"with --ubatch-size {tokens} or more",
            )
        ),
    ]


def _vision(tower: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    config, state = vision_weights(tower)
    norm = {f"post_layernorm.{key}": value for key, value in tower.norm.state_dict().items()}
    return config, clip_names({**state, **norm})


def _describe(writer: GGUFWriter, vision: Any, model: VisionLanguageNetwork) -> None:
    assert isinstance(model.connector, Gemma3Projector)
    side = vision.image_size // vision.patch_size
    writer.add_vision_projector_scale_factor(side // model.connector.grid)


def _connector(model: VisionLanguageNetwork, dtype: str) -> dict[str, torch.Tensor]:
    connector = model.connector
    assert isinstance(connector, Gemma3Projector)
    return {
        "mm.soft_emb_norm.weight": connector.norm.weight.float() + 1,
        "mm.input_projection.weight": connector.projection,
    }


def _features(mmproj: Mmproj, pixels: torch.Tensor) -> torch.Tensor:
    """As `clip_graph_siglip` in llama.cpp's `models/siglip.cpp`."""
    factor = mmproj.vision["projector.scale_factor"]
    side = mmproj.vision["image_size"] // mmproj.vision["patch_size"]
    hidden = mmproj.encode(pixels)
    means = avg_pool2d(hidden.T.unflatten(1, (side, side)), factor).flatten(1).T
    normed = mmproj.rms_norm("mm.soft_emb_norm", means)
    return normed @ mmproj.tensors["mm.input_projection.weight"]


GEMMA3 = Projector(
    name="gemma3",
    reasons=_reasons,
    markers=MARKERS,
    notes=_notes,
    vision=_vision,
    describe=_describe,
    connector=_connector,
    features=_features,
    image_ids=square_ids(MARKERS),
    around=Gemma3Frames.around,
    both_ways=True,
)
