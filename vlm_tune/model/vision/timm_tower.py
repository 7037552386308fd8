"""Vision towers from the feature maps of timm backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_tune.config.towers import TimmTower
from vlm_tune.errors import ModelError
from vlm_tune.model.hub import hub_answers
from vlm_tune.model.vision.base import CLIP_MEAN, CLIP_STD, FeatureMaps, VisionTower
from vlm_tune.model.weights import load_into, read_safetensors


class TimmVision(VisionTower):
    """Feature maps of a timm backbone, pooled to one grid and concatenated by channel."""

    def __init__(self, config: TimmTower, rebuild: dict[str, Any] | None) -> None:
        import timm

        use_hub = config.pretrained is True and not rebuild
        if use_hub:
            hub_answers()
        try:
            trunk: Any = timm.create_model(
                config.name,
                pretrained=use_hub,
                features_only=True,
                out_indices=tuple(config.stages),
            )
        except (RuntimeError, AssertionError, IndexError) as error:
            raise ModelError(
                f"model.tower.name: {error or f'{config.name} has no stages {config.stages}'}"
            ) from None
        known: Any = timm.get_pretrained_cfg(config.name)
        mean, std = (known.mean, known.std) if known else (CLIP_MEAN, CLIP_STD)
        usual = known.input_size[-1] if known else 224
        super().__init__(config, config.image_size or usual, mean, std)
        if isinstance(config.pretrained, str) and not rebuild:
            _load_backbone(trunk, Path(config.pretrained))
        self.rebuild = {"timm": config.name}
        self.trunk = trunk
        self.class_token = config.class_token
        # timm wraps a transformer, with its blocks unchanged; a convolutional backbone becomes a
        # list of its stages.
        self.whole = getattr(trunk, "model", None)
        if known and known.fixed_input_size and self.image_size != usual:
            if not hasattr(self.whole, "set_input_size"):
                raise ModelError(
                    f"timm's {config.name} takes images of {usual} pixels only; "
                    "leave out model.tower.image_size"
                )
            self.whole.set_input_size(img_size=self.image_size)  # type: ignore[union-attr]
        if config.class_token and getattr(self.whole, "cls_token", None) is None:
            raise ModelError(f"model.tower.class_token: timm's {config.name} has none")

    def maps(self, pixels: torch.Tensor) -> FeatureMaps:
        if self.class_token:
            outputs = self.whole.forward_intermediates(  # type: ignore[union-attr]
                pixels,
                indices=self.trunk.out_indices,
                intermediates_only=True,
                return_prefix_tokens=True,
            )
            return [one for one, _ in outputs], torch.cat(
                [prefix[:, :1] for _, prefix in outputs], dim=2
            )
        outputs = self.trunk(pixels)
        if str(getattr(self.trunk, "output_fmt", "NCHW")).endswith("NHWC"):
            outputs = [one.permute(0, 3, 1, 2) for one in outputs]
        return outputs, None


def _load_backbone(trunk: nn.Module, file: Path) -> None:
    """Loads a timm checkpoint into a feature backbone.

    Raises `ModelError` if any tensor of the backbone is missing.
    """

    def plain(name: str) -> str:
        # timm renames modules when it wraps a model: stages.0 becomes stages_0, blocks becomes
        # model.blocks.
        return name.removeprefix("model.").replace(".", "_")

    weights = {plain(name): value for name, value in read_safetensors(file).items()}
    # A backbone has no classifier: its file may hold more tensors than the backbone, but not fewer.
    load_into(
        trunk,
        {name: weights[plain(name)] for name in trunk.state_dict() if plain(name) in weights},
        file,
    )
