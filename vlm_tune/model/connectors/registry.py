"""The connectors by kind; docs/extending.md says how to add one."""

from __future__ import annotations

from typing import Any

from vlm_tune.config.connectors import AnyConnector, CrossAttentionConnector, FusionConnector
from vlm_tune.model.connectors.cross_attention import CrossAttention
from vlm_tune.model.connectors.fusion import Fusion
from vlm_tune.model.connectors.gemma3 import Gemma3Projector
from vlm_tune.model.connectors.native import NativeJoin
from vlm_tune.model.connectors.patch_merger import PatchMerger
from vlm_tune.model.connectors.projectors import AvgPool, Connector, Linear, Mlp, PixelShuffle
from vlm_tune.model.connectors.qformer import QFormer
from vlm_tune.model.connectors.resampler import Resampler

CONNECTORS: dict[str, type[Connector]] = {
    "linear": Linear,
    "mlp": Mlp,
    "pixel_shuffle": PixelShuffle,
    "avg_pool": AvgPool,
    "gemma3": Gemma3Projector,
    "patch_merger": PatchMerger,
    "resampler": Resampler,
    "qformer": QFormer,
    "fusion": Fusion,
    "cross_attention": CrossAttention,
    "native": NativeJoin,
}


def build_connector(config: AnyConnector, width: int, llm_width: int) -> Connector:
    """A connector with random weights, from the tower's width to the LLM's.

    Raises `ModelError` for heads that don't divide a width.
    """
    kind: Any = CONNECTORS[config.kind]
    if isinstance(config, FusionConnector | CrossAttentionConnector):
        return kind(config, build_connector(config.base, width, llm_width), llm_width)
    return kind(config, width, llm_width)
