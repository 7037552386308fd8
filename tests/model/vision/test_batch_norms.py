"""A pretrained tower that trains keeps the statistics of its batch norms; one from scratch learns
them."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from vlm_tune.config.towers import TimmTower
from vlm_tune.model.vision.registry import build_tower


def test_a_trained_image_does_not_depend_on_those_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "tower.safetensors"
    save_file(timm.create_model("resnet10t").state_dict(), file)
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    for pretrained in (str(file), False):
        config = TimmTower(
            kind="timm", name="resnet10t", pretrained=pretrained, image_size=64, grid=1
        )
        tower = build_tower(config).train()
        before = {name: each.clone() for name, each in tower.named_buffers()}
        together = tower(pixels)
        alone = torch.cat([tower(each[None]) for each in pixels])
        changed = [name for name, each in tower.named_buffers() if not each.equal(before[name])]
        apart = float((together - alone).detach().abs().max())
        if pretrained:
            assert apart < 1e-4 and not changed
            assert tower.training and any(p.requires_grad for p in tower.parameters())
        else:
            assert apart > 1e-2 and changed
        assert not tower.eval().training
