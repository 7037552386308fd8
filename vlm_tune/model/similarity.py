"""The learned scale and bias of similarities between images and captions, as in CLIP and SigLIP."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_tune.model.weights import load_into, read_safetensors

SIMILARITY = "similarity"
"""Its name among the parameters that train, and of its file in a model folder."""
MOST = math.log(100)
"""The largest logarithm of the scale, as in CLIP."""


class Similarity(nn.Module):
    """A scale that cosine similarities are multiplied by, and a bias that is added to them.

    Attributes:
        logit_scale: The logarithm of the scale, fp32[1]. The scale is the inverse temperature.
        logit_bias: The bias, fp32[1]; None for a loss without one (CLIP).
    """

    def __init__(self, temperature: float = 1.0, bias: float | None = None) -> None:
        super().__init__()
        # Of one dimension: FSDP shards no scalars.
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor([bias]))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The scale, from 1 to 100, and the bias.

        The scale's gradient is that without the bounds, so that it can come back from them.
        """
        excess = (self.logit_scale - self.logit_scale.clamp(0, MOST)).detach()
        # A copy: an engine that shards weights takes this parameter's memory back after the call.
        bias = None if self.logit_bias is None else self.logit_bias.clone()
        return (self.logit_scale - excess).exp(), bias


def read_similarity(path: Path) -> Similarity:
    """A similarity from its safetensors file. Raises `ModelError` if it is none."""
    tensors: dict[str, Any] = read_safetensors(path)
    similarity = Similarity(bias=0.0 if "logit_bias" in tensors else None)
    load_into(similarity, tensors, path)
    return similarity
