"""The tensors that a Qwen-VL's vision tower derives from shapes of images, made on the host.

Its own forward pass reads the shapes where the pixels are, some of them in every layer, and the
host waits for a GPU each time.
"""

from __future__ import annotations

from typing import Any

import torch

from vlm_tune.compat import attention_name
from vlm_tune.transfer import to_device


def vision_shapes(
    tower: Any, grids: torch.Tensor, device: torch.device, modality: str
) -> dict[str, torch.Tensor]:
    """Arguments of a Qwen-VL's forward pass, by which its tower need not derive them.

    Empty for a tower that attends in another way than by one call of torch's attention an image.

    Args:
        tower: transformers' tower of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
        grids: The patches of each image or video in time, rows and columns, int64[M, 3], on the
            host.
        device: The device of the pixels.
        modality: image or video, with which the arguments' names begin.
    """
    from transformers import vision_utils

    if attention_name(tower) not in ("sdpa", "eager"):
        return {}
    merge = tower.spatial_merge_size
    positions = vision_utils.get_vision_position_ids(grids, merge)
    # Where images and windows end is read as a list of numbers: that stays on the host.
    shapes = {"cu_seqlens": vision_utils.get_vision_cu_seqlens(grids)}
    moved = {"position_ids": positions}
    if hasattr(tower, "window_size"):
        moved["window_index"], shapes["cu_window_seqlens"] = vision_utils.get_vision_window_index(
            grids, merge, tower.window_size, tower.patch_size
        )
    if hasattr(tower, "num_grid_per_side"):
        moved["interp_indices"], moved["interp_weights"] = (
            vision_utils.get_vision_interpolation_indices_and_weights(
                grids,
                tower.num_grid_per_side,
                mode=tower.interpolation_mode,
                align_corners=tower.interpolation_align_corners,
                spatial_merge_size=merge,
            )
        )
    shapes |= {name: to_device(each, device) for name, each in moved.items()}
    return {f"{modality}_{name}": each for name, each in shapes.items()}
