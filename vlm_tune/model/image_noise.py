"""Noise on images' tokens in training, so that the LLM reads unclear ones too.

Shapes: M images, N tokens of an image, E width.
"""

from __future__ import annotations

import torch

from vlm_tune.config.objectives import LEAST_IMAGES


def noised(tokens: torch.Tensor, largest: float) -> torch.Tensor:
    """The tokens [M, N, E] of a batch's images with noise; their lengths stay as they are.

    The noise of an image is a random mixture of the batch's images, so it lies in the directions in
    which images differ. Few images are learned by heart otherwise: an LLM then reads each of them
    and none that lies between them.

    Args:
        tokens: the connector's outputs.
        largest: the largest length of the noise, as a multiple of that of an image's tokens; each
            image draws its own, from 0 on. With 0, or fewer than `LEAST_IMAGES` images, the tokens
            are returned unchanged.
    """
    if not largest or len(tokens) < LEAST_IMAGES:
        return tokens
    flat = tokens.float().flatten(1)
    with torch.no_grad():
        centred = flat - flat.mean(0)
        mixing = torch.randn(len(flat), len(flat), device=flat.device)
        noise = torch.nn.functional.normalize(mixing @ centred, dim=1)
        sizes = largest * torch.rand(len(flat), 1, device=flat.device)
    lengths = flat.norm(dim=1, keepdim=True)
    noisy = torch.nn.functional.normalize(flat + sizes * lengths.detach() * noise, dim=1) * lengths
    return noisy.view_as(tokens).to(tokens.dtype)
