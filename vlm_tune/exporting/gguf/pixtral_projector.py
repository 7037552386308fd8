"""llama.cpp's projector of Pixtral and Mistral 3: images keep their shape, rows end with a token.

Shapes: N patches of an image, H heads, W width of a head.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import unfold

from vlm_tune.config.connectors import MlpConnector, PatchMergerConnector
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.images.shaped import ROW_ENDS, ShapedImages
from vlm_tune.data.types import Media
from vlm_tune.exporting.gguf.language import paired
from vlm_tune.exporting.gguf.projector import (
    IMAGE_SLOT,
    Projector,
    connector_tensors,
)
from vlm_tune.exporting.gguf.writer import as_stored
from vlm_tune.exporting.hf_layout import vision_of
from vlm_tune.exporting.llava_layout import bidirectional_reasons
from vlm_tune.exporting.mistral3_layout import tower_reasons
from vlm_tune.model.connectors.patch_merger import PatchMerger
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.quoting import applying

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from vlm_tune.exporting.gguf.mmproj_reading import Mmproj

EPS = 1e-5
"""The number that a Pixtral's norms add, in transformers too."""
THETA = 10_000.0
"""The base of the rotary positions, which llama.cpp does not read."""
TOKENS = (8, 1024)
"""The fewest and the most tokens that llama.cpp gives an image."""
CONNECTOR = {
    "norm": "mm.input_norm",
    "merging": "mm.patch_merger",
    "layers.0": "mm.1",
    "layers.2": "mm.2",
}
BREAK, END = ROW_ENDS


def _reasons(config: VisionLanguageConfig, text: Any) -> list[str]:
    connector = config.model.connector
    merger = isinstance(connector, PatchMergerConnector)
    eps = connector.eps if isinstance(connector, PatchMergerConnector) else EPS
    plain = isinstance(connector, MlpConnector) and (connector.depth, connector.norm) == (2, False)
    vision = config.tower_rebuild.get("vision_config", {})
    width = vision.get("hidden_size", 0) / (vision.get("num_attention_heads") or 1)
    theta = (vision.get("rope_parameters") or {}).get("rope_theta", THETA)
    return [
        *tower_reasons(config, "Pixtral"),
        *applying(
            (
                not merger and not plain,
                "its connector is neither Mistral 3's nor an MLP of two layers without norm",
            ),
            (
                vision.get("head_dim") not in (None, width),
                "its tower's heads are not its width divided by their number",
            ),
            (
                eps != EPS,
                f"its connector's norm adds {eps}, and llama.cpp's {EPS} (model.connector.eps)",
            ),
            (theta != THETA, f"its tower's rotary base is {theta}, and llama.cpp's {THETA}"),
        ),
        *bidirectional_reasons(config),
    ]


def _notes(model: VisionLanguageNetwork) -> list[str]:
    tower, images = vision_of(model)
    assert isinstance(images, ShapedImages)
    unit = images.patch * images.merge
    fewest, most = TOKENS
    return [
        f"llama.cpp rounds an image's sides to the nearest multiples of {unit} pixels, training "
        f"rounded them up; it gives an image {fewest} to {most} tokens, training shrank it to "
        f"{tower.image_size} pixels a side. Give it images whose sides are such multiples, within "
        "both bounds"
    ]


def _vision(tower: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    vision = tower.model
    config = copy.deepcopy(vision.config)
    config.num_hidden_layers = len(vision.transformer.layers)
    config.image_size = tower.image_size
    config.layer_norm_eps = EPS
    state = {}
    for key, tensor in vision.state_dict().items():
        turned = key.endswith(("q_proj.weight", "k_proj.weight"))
        state[f"vision_tower.{key}"] = (
            paired(tensor, config.num_attention_heads) if turned else tensor
        )
    return config, state


def _describe(writer: GGUFWriter, vision: Any, model: VisionLanguageNetwork) -> None:
    connector = model.connector
    factor = connector.factor if isinstance(connector, PatchMerger) else 1
    writer.add_uint32("clip.vision.spatial_merge_size", factor)


def _connector(model: VisionLanguageNetwork, dtype: str) -> dict[str, torch.Tensor]:
    embedding = model.llm.model.get_input_embeddings().weight
    row = embedding[model.processor.encoder.control(BREAK)]
    # As it is in the language model's file, from which it comes where a text has the token.
    stored = as_stored("token_embd.weight", row[None], dtype)[0]
    return {
        **connector_tensors(model.connector, CONNECTOR),
        "v.token_embd.img_break": stored,
    }


def _features(mmproj: Mmproj, pixels: torch.Tensor) -> torch.Tensor:
    """As `clip_graph_pixtral` in llama.cpp's `models/pixtral.cpp`."""
    patch = mmproj.vision["patch_size"]
    factor = mmproj.vision["spatial_merge_size"]
    rows, columns = (side // patch for side in pixels.shape[1:])
    hidden = mmproj.encode(pixels, rms=True, turned=lambda states: _turned(states, rows, columns))
    if "mm.patch_merger.weight" in mmproj.tensors:
        normed = mmproj.rms_norm("mm.input_norm", hidden)
        squares = unfold(normed.T.reshape(1, -1, rows, columns), factor, stride=factor)
        hidden = mmproj.linear("mm.patch_merger", squares[0].T)
    tokens = mmproj.mlp("mm.1", "mm.2", hidden).unflatten(0, (rows // factor, -1))
    ends = mmproj.tensors["v.token_embd.img_break"].expand(len(tokens), 1, -1)
    return torch.cat([tokens, ends], dim=1).flatten(0, 1)[:-1]


def _turned(states: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """States [H, N, W] turned by their row in the first half, by their column in the second.

    Neighbouring numbers are a pair, as `build_rope_2d` in llama.cpp's `clip.cpp` has them.
    """
    width = states.shape[-1]
    place = torch.arange(rows * columns)[:, None]
    even = THETA ** (-torch.arange(0, width, 4) / width)
    odd = THETA ** (-torch.arange(2, width, 4) / width)
    angles = torch.cat([place // columns * even, place % columns * odd], dim=1)
    first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
    cosines = angles.cos()
    sines = angles.sin()
    turned = (first * cosines - second * sines, first * sines + second * cosines)
    return torch.stack(turned, dim=-1).flatten(-2)


def _image_ids(
    tokenizer: Any, vision: dict[str, Any], media: Media, processor: Processor
) -> list[int]:
    grid = processor.images.whole(media).grid
    assert grid is not None  # of a tower that keeps an image's shape
    rows, columns = grid.slots
    slots = [IMAGE_SLOT] * (rows * columns + rows - 1)
    return [*slots, *tokenizer.encode(END, add_special_tokens=False)]


PIXTRAL = Projector(
    name="pixtral",
    reasons=_reasons,
    markers=ROW_ENDS,
    notes=_notes,
    vision=_vision,
    describe=_describe,
    connector=_connector,
    features=_features,
    image_ids=_image_ids,
    row_end=BREAK,
)
