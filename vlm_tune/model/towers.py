"""Vision towers: uint8 pixels [B, 3, H, W] to patch features [B, N, D].

Every tower normalises its own pixels, keeps only the blocks its features come from, and pools to `grid` x `grid`
tokens where the recipe says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from vlm_tune.config import OpenClipTower, TimmTower, Tower, TransformersTower
from vlm_tune.errors import ModelError
from vlm_tune.model.weights import check_folder, check_safetensors, load_into, read_safetensors

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class VisionTower(nn.Module):
    """Base of the towers; a subclass gives `maps`, its feature maps float[B, C, h, w].

    `rebuild` is what `build_tower` needs to make the same architecture again without its weights.
    """

    image_size: int
    scale: torch.Tensor
    offset: torch.Tensor
    rebuild: dict[str, Any]

    def __init__(self, config: Tower, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.grid, self.image_size = config.grid, image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("offset", torch.tensor([m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1), persistent=False)

    def maps(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps float[B, C, h, w] of normalised pixels float[B, 3, H, W]."""
        raise NotImplementedError

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features [B, N, D] of uint8 pixels [B, 3, H, W], rows of the image from the top."""
        dtype = next(self.parameters()).dtype
        normalised = (pixels.float() * self.scale - self.offset).to(dtype, memory_format=torch.channels_last)
        maps = self.maps(normalised)
        if self.grid is not None:
            maps = [adaptive_avg_pool2d(one, self.grid) if one.shape[-2:] != (self.grid, self.grid) else one for one in maps]
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)

    def measure(self) -> tuple[int, int]:
        """(tokens an image, width), from one blank image."""
        parameter = next(self.parameters())
        was, blank = self.training, torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8, device=parameter.device)
        with torch.no_grad():
            _, tokens, width = self.eval()(blank).shape
        self.train(was)
        return tokens, width


class OpenClipVision(VisionTower):
    """An open_clip vision tower (ViT, ModifiedResNet or timm trunk)."""

    def __init__(self, config: OpenClipTower, rebuild: dict[str, Any] | None) -> None:
        import open_clip

        source: dict[str, Any] = {"quick_gelu": False, "mean": CLIP_MEAN, "std": CLIP_STD}
        if rebuild or config.config is not None:
            source |= rebuild or {"vision_cfg": dict(config.config or {})}
            visual = _bare_open_clip(source, config.image_size)
        else:
            assert config.name is not None
            if config.name not in open_clip.list_models() and not config.name.startswith("hf-hub:"):
                raise ModelError(f"open_clip has no model {config.name!r} (open_clip.list_models() lists them)")
            model = _pretrained_open_clip(config)
            visual: Any = model.visual
            preprocess = open_clip.get_model_preprocess_cfg(model)
            known = open_clip.get_model_config(config.name) or {}
            source |= {"vision_cfg": known.get("vision_cfg", {}), "quick_gelu": _uses_quick_gelu(visual)}
            source |= {"mean": preprocess["mean"], "std": preprocess["std"]}
        size = visual.image_size[0] if isinstance(visual.image_size, tuple | list) else visual.image_size
        super().__init__(config, int(size), source["mean"], source["std"])
        self.rebuild = source
        self.visual: Any = visual
        self._trim(config.layer)

    def _trim(self, layer: int) -> None:
        """Removes what the features don't need: later blocks, the final norm, pooling and projection."""
        visual = self.visual
        if hasattr(visual, "transformer"):
            blocks = visual.transformer.resblocks
            if -layer > len(blocks):
                raise ModelError(f"the tower has {len(blocks)} blocks, there is no layer {layer}")
            visual.transformer.resblocks = blocks[: len(blocks) + layer + 1]
            visual.ln_post, visual.proj, visual.attn_pool = nn.Identity(), None, None
        elif hasattr(visual, "attnpool"):
            if layer != -1:
                raise ModelError("a ModifiedResNet tower gives its last feature map only: layer -1")
            visual.attnpool = nn.Identity()

    def maps(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        return self.visual.forward_intermediates(pixels, indices=1, intermediates_only=True)["image_intermediates"]


def open_clip_config(name: str) -> dict[str, Any]:
    """What `build_tower` needs to make open_clip's model of a name without its weights. Raises `ModelError` if unknown."""
    import open_clip

    known = open_clip.get_model_config(name)
    if known is None:
        raise ModelError(f"open_clip has no model {name!r} (open_clip.list_models() lists them)")
    return {"vision_cfg": known["vision_cfg"], "quick_gelu": known.get("quick_gelu", False), "mean": CLIP_MEAN, "std": CLIP_STD}


def _bare_open_clip(source: dict[str, Any], image_size: int | None) -> Any:
    """A vision tower with random weights; open_clip builds towers in pairs, so the text side is made minimal."""
    import open_clip

    vision = dict(source["vision_cfg"])
    if image_size is not None:
        vision["image_size"] = image_size
    text = {"vocab_size": 8, "context_length": 4, "width": 64, "heads": 1, "layers": 1}
    try:
        return open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text, quick_gelu=source["quick_gelu"]).visual  # type: ignore[arg-type]
    except (TypeError, AssertionError, ZeroDivisionError) as error:
        raise ModelError(f"model.tower.config is no open_clip vision_cfg: {error}") from None


def _pretrained_open_clip(config: OpenClipTower) -> Any:
    """open_clip's model of a name, with the weights of its tag or file."""
    import open_clip

    file = Path(config.pretrained) if config.pretrained else None
    if file is not None and file.is_file():
        if file.suffix != ".safetensors":
            raise ModelError(f"{file}: pickled weights are not loaded, convert them to safetensors")
        check_safetensors(file)
    try:
        return open_clip.create_model(str(config.name), pretrained=config.pretrained, force_image_size=config.image_size)
    except (RuntimeError, OSError, ValueError) as error:
        raise ModelError(f"can't load the tower {config.name} with pretrained: {config.pretrained}: {error}") from None


def _uses_quick_gelu(visual: nn.Module) -> bool:
    return any(type(module).__name__ == "QuickGELU" for module in visual.modules())


class TransformersVision(VisionTower):
    """transformers' CLIP vision model."""

    def __init__(self, config: TransformersTower, rebuild: dict[str, Any] | None) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        mean, std = CLIP_MEAN, CLIP_STD
        if rebuild:
            model = CLIPVisionModel(CLIPVisionConfig(**rebuild["vision_config"]))
        else:
            model = _pretrained_clip(config.name)
        vision: Any = model.config
        super().__init__(config, config.image_size or vision.image_size, mean, std)
        trunk: Any = getattr(model, "vision_model", model)
        blocks = trunk.encoder.layers
        if -config.layer > len(blocks):
            raise ModelError(f"the tower has {len(blocks)} blocks, there is no layer {config.layer}")
        self.rebuild = {"vision_config": vision.to_dict()}
        trunk.encoder.layers = blocks[: len(blocks) + config.layer + 1]
        trunk.post_layernorm = nn.Identity()
        self.model = model
        self.side = self.image_size // vision.patch_size

    def maps(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        resized = self.image_size != self.model.config.image_size
        hidden = self.model(pixel_values=pixels, interpolate_pos_encoding=resized).last_hidden_state[:, 1:]
        return [hidden.transpose(1, 2).unflatten(2, (self.side, self.side))]


def _pretrained_clip(name: str) -> Any:
    """transformers' CLIP vision model of a hub name or folder, with all of its weights."""
    from transformers import CLIPVisionModel

    if Path(name).is_dir():
        check_folder(Path(name))
    factory: Any = CLIPVisionModel
    try:
        model, info = factory.from_pretrained(name, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"can't load the tower {name!r}: {error}") from None
    # A whole CLIP model holds more than its vision part, but nothing of that may be missing or of another shape.
    unfit = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if unfit:
        raise ModelError(f"the weights in {name!r} do not fit the tower; missing or misshapen: {', '.join(unfit[:8])}")
    return model


class TimmVision(VisionTower):
    """Feature maps of a timm backbone, pooled to one grid and concatenated by channel."""

    def __init__(self, config: TimmTower, rebuild: dict[str, Any] | None) -> None:
        import timm

        own = config.pretrained is True and not rebuild
        try:
            trunk: Any = timm.create_model(config.name, pretrained=own, features_only=True, out_indices=tuple(config.stages))
        except RuntimeError as error:
            raise ModelError(f"model.tower.name: {error}") from None
        known: Any = timm.get_pretrained_cfg(config.name)
        mean, std = (known.mean, known.std) if known else (CLIP_MEAN, CLIP_STD)
        size = config.image_size or (known.input_size[-1] if known else 224)
        super().__init__(config, size, mean, std)
        if isinstance(config.pretrained, str) and not rebuild:
            tensors = read_safetensors(Path(config.pretrained))
            wanted = trunk.state_dict()
            # A backbone has no classifier: its file may hold more, but nothing that the backbone needs may be missing.
            load_into(trunk, {name: value for name, value in tensors.items() if name in wanted}, config.pretrained)
        self.rebuild = {"timm": config.name}
        self.trunk = trunk

    def maps(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        return self.trunk(pixels)


TOWERS: dict[str, type[VisionTower]] = {"open_clip": OpenClipVision, "transformers": TransformersVision, "timm": TimmVision}


def build_tower(config: Tower, rebuild: dict[str, Any] | None = None) -> VisionTower:
    """The recipe's tower with its weights, or with `rebuild` the same architecture with random ones.

    Raises `ModelError` for an unknown name, layer or architecture.
    """
    kind: Any = TOWERS[getattr(config, "kind")]  # noqa: B009
    # Convolutions are several times faster with channels last, on CPUs and GPUs; transformers don't mind.
    return kind(config, rebuild).to(memory_format=torch.channels_last)
