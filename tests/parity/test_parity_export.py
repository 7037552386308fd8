"""open_clip's ViTs in transformers' layout: the same features with the same weights."""

from __future__ import annotations

import pytest
import torch

from vlm_tune.config.towers import OpenClipTower
from vlm_tune.exporting.llava_layout import vision_weights
from vlm_tune.model.vision.registry import architecture, build_tower


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "layer", "activation"),
    [("ViT-B-32", -2, "gelu"), ("ViT-B-32-quickgelu", -1, "quick_gelu")],
)
def test_an_open_clip_vit_b_32_as_clip_vision_model(name: str, layer: int, activation: str) -> None:
    from transformers import CLIPVisionModel

    torch.manual_seed(0)
    section = OpenClipTower(kind="open_clip", name=name, layer=layer, class_token=True)
    tower = build_tower(section, architecture(section)).eval()
    for parameter in tower.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.01)  # norms and biases too
    config, state = vision_weights(tower)
    assert (config.hidden_act, config.num_hidden_layers, config.patch_size) == (
        activation,
        13 + layer,
        32,
    )
    theirs = CLIPVisionModel(config).eval()
    theirs.load_state_dict(state)
    pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    hidden = theirs(
        pixel_values=pixels.float() * tower.scale - tower.offset, output_hidden_states=True
    ).hidden_states
    features = tower(pixels)
    assert features.shape == (1, 50, 768)
    difference = float((hidden[-1] - features).abs().max())
    assert difference <= 1e-5 * max(1.0, float(features.abs().max()))
