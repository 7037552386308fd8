"""CLIP towers of open_clip, by name or from a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_tune.config.towers import OpenClipTower
from vlm_tune.errors import ModelError
from vlm_tune.model.hub import hub_answers, is_path, load_reason
from vlm_tune.model.vision.base import CLIP_MEAN, CLIP_STD, FeatureMaps, VisionTower
from vlm_tune.model.weights import check_folder, check_safetensors
from vlm_tune.paths import is_file, shown_path
from vlm_tune.quoting import quoted, reason_of


class OpenClipVision(VisionTower):
    """An open_clip vision tower (ViT, ModifiedResNet or timm trunk)."""

    def __init__(self, config: OpenClipTower, rebuild: dict[str, Any] | None) -> None:
        import open_clip

        source: dict[str, Any] = {"quick_gelu": False, "mean": CLIP_MEAN, "std": CLIP_STD}
        if rebuild or config.config is not None:
            source |= rebuild or {"vision_cfg": dict(config.config or {})}
            visual = _bare_open_clip(source, config.image_size)
        else:
            source |= open_clip_config(str(config.name))
            model = _pretrained_open_clip(config)
            visual: Any = model.visual
            preprocess = open_clip.get_model_preprocess_cfg(model)
            source |= {
                "quick_gelu": _uses_quick_gelu(visual),
                "mean": preprocess["mean"],
                "std": preprocess["std"],
            }
        size = (
            visual.image_size[0]
            if isinstance(visual.image_size, tuple | list)
            else visual.image_size
        )
        super().__init__(config, int(size), source["mean"], source["std"])
        self.rebuild = source
        self.visual: Any = visual
        self.class_token = config.class_token
        self._trim(config.layer)

    def _trim(self, layer: int) -> None:
        """Removes modules after the features: later blocks, the final norm, pooling, projection."""
        visual = self.visual
        if hasattr(visual, "trunk"):
            trunk = visual.trunk
            if not hasattr(trunk, "prune_intermediate_layers"):
                raise ModelError(
                    f"model.tower.layer: timm's {type(trunk).__name__}, which this tower is, "
                    "gives no intermediate features"
                )
            try:
                trunk.prune_intermediate_layers([layer], prune_norm=True, prune_head=True)
            except AssertionError:
                raise ModelError(f"model.tower.layer: the tower has no layer {layer}") from None
            visual.head = nn.Identity()
            has_class = getattr(trunk, "cls_token", None) is not None
        elif hasattr(visual, "transformer"):
            blocks = visual.transformer.resblocks
            if -layer > len(blocks):
                raise ModelError(
                    f"model.tower.layer: the tower has {len(blocks)} blocks, "
                    f"there is no layer {layer}"
                )
            visual.transformer.resblocks = blocks[: len(blocks) + layer + 1]
            visual.ln_post = nn.Identity()
            visual.proj = None
            visual.attn_pool = None
            visual.attn_pool_contrastive = None
            has_class = True
        else:
            if layer != -1:
                raise ModelError(
                    "model.tower.layer: a ModifiedResNet tower gives its last feature map only, "
                    "layer -1"
                )
            visual.attnpool = nn.Identity()
            has_class = False
        if self.class_token and not has_class:
            raise ModelError("model.tower.class_token: this tower has none")

    def maps(self, pixels: torch.Tensor) -> FeatureMaps:
        outputs = self.visual.forward_intermediates(
            pixels, indices=1, intermediates_only=True, output_extra_tokens=self.class_token
        )
        return outputs["image_intermediates"], outputs["image_intermediates_prefix"][0][
            :, :1
        ] if self.class_token else None


def open_clip_config(name: str) -> dict[str, Any]:
    """The description from which `build_tower` makes an open_clip model without its weights.

    `name` is one of open_clip's list, or a model's location: hf-hub:owner/name or local-dir:folder.
    Raises `ModelError` if it is unknown.
    """
    import open_clip

    if name.startswith("hf-hub:"):
        hub_answers()
    try:
        known = open_clip.get_model_config(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.tower.name: can't load the tower {quoted(name)}: {load_reason(name, error)}"
        ) from None
    if known is None:
        raise ModelError(
            f"model.tower.name: open_clip has no model {quoted(name)} "
            "(open_clip.list_models() lists them)"
        )
    return {
        "vision_cfg": known["vision_cfg"],
        "quick_gelu": known.get("quick_gelu", False),
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
    }


def _bare_open_clip(source: dict[str, Any], image_size: int | None) -> Any:
    """An open_clip vision tower with random weights.

    open_clip builds a vision and a text tower together, so the text tower is made minimal.
    """
    import open_clip

    vision: Any = {**source["vision_cfg"], "timm_model_pretrained": False}
    if image_size is not None:
        vision["image_size"] = image_size
    text: Any = {"vocab_size": 8, "context_length": 4, "width": 64, "heads": 1, "layers": 1}
    try:
        visual: Any = open_clip.CLIP(
            embed_dim=64, vision_cfg=vision, text_cfg=text, quick_gelu=source["quick_gelu"]
        ).visual
        if image_size is not None and hasattr(visual, "set_input_size"):
            visual.set_input_size(image_size)
        return visual
    except (TypeError, AssertionError, ZeroDivisionError) as error:
        raise ModelError(
            f"model.tower.config is no open_clip vision_cfg: {reason_of(error)}"
        ) from None


def _pretrained_open_clip(config: OpenClipTower) -> Any:
    """The open_clip model of a name, with the weights of its tag or file."""
    import open_clip

    if str(config.name).startswith("local-dir:"):
        check_folder(Path(str(config.name).removeprefix("local-dir:")))
    file = Path(config.pretrained) if config.pretrained else None
    if file is not None and not is_file(file) and is_path(str(file)):
        raise ModelError(f"model.tower.pretrained: no such file: {shown_path(file)}")
    if file is None or not is_file(file):
        hub_answers()
    if file is not None and is_file(file):
        if file.suffix != ".safetensors":
            raise ModelError(f"{file}: pickled weights are not loaded, convert them to safetensors")
        check_safetensors(file)
    try:
        return open_clip.create_model(
            str(config.name), pretrained=config.pretrained, force_image_size=config.image_size
        )
    except (RuntimeError, OSError, ValueError) as error:
        reason = load_reason(str(config.pretrained or config.name), error)
        raise ModelError(
            f"can't load the tower {config.name} with pretrained: {config.pretrained}: {reason}"
        ) from None


def _uses_quick_gelu(visual: nn.Module) -> bool:
    return any(type(module).__name__ == "QuickGELU" for module in visual.modules())
