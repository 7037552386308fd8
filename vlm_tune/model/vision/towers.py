"""Vision towers: uint8 pixels [B, 3, H, W] to patch features [B, N, D].

Every tower normalises its own pixels, keeps only the blocks its features come from, and pools to `grid` x `grid`
tokens where the recipe says so; a class token, where asked for, comes before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from vlm_tune.config.model import AnyTower, OpenClipTower, PairTower, TimmTower, Tower, TransformersTower
from vlm_tune.errors import ModelError
from vlm_tune.model.pretrained.hub import check_base, config_source, hub_answers, is_path, load_reason
from vlm_tune.model.pretrained.vlm_checkpoints import find_vlm, part_tensors
from vlm_tune.model.weights import check_folder, check_safetensors, load_into, read_safetensors
from vlm_tune.quoting import quoted

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Found = tuple[list[torch.Tensor], torch.Tensor | None]
"""Feature maps float[B, C, h, w], and the class token's features float[B, 1, C] if asked for."""


class VisionTower(nn.Module):
    """Base of the towers; a subclass gives `maps`.

    `rebuild` is what `build_tower` needs to make the same architecture again without its weights.
    """

    image_size: int
    scale: torch.Tensor
    offset: torch.Tensor
    rebuild: dict[str, Any]
    measured: tuple[int, int] | None = None

    def __init__(self, config: Tower, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.grid, self.image_size = config.grid, image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("offset", torch.tensor([m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1), persistent=False)

    def maps(self, pixels: torch.Tensor) -> Found:
        """What is found in normalised pixels float[B, 3, H, W]."""
        raise NotImplementedError

    def found(self, pixels: torch.Tensor) -> Found:
        """What is found in pixels [B, 3, H, W] of 0 to 255, pooled to the tower's grid."""
        dtype = next(self.parameters()).dtype
        maps, first = self.maps((pixels.float() * self.scale - self.offset).to(dtype, memory_format=torch.channels_last))
        return [pool(one, self.grid) for one in maps], first

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features [B, N, D] of uint8 pixels [B, 3, H, W], rows of the image from the top."""
        maps, first = self.found(pixels)
        features = torch.cat(maps, dim=1).flatten(2).transpose(1, 2)
        return features if first is None else torch.cat([first, features], dim=1)

    def measure(self) -> tuple[int, int]:
        """(tokens an image, width), from one blank image; remembered, since a sharded tower can't be run by one rank."""
        if self.measured:
            return self.measured
        parameter = next(self.parameters())
        was, blank = self.training, torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8, device=parameter.device)
        with torch.no_grad():
            _, tokens, width = self.eval()(blank).shape
        self.train(was)
        self.measured = tokens, width
        return self.measured


def pool(features: torch.Tensor, grid: int | None) -> torch.Tensor:
    """A feature map [B, C, h, w] as [B, C, grid, grid]; as it is where no grid is given."""
    return features if grid is None or features.shape[-2:] == (grid, grid) else adaptive_avg_pool2d(features, grid)


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
            source |= {"quick_gelu": _uses_quick_gelu(visual), "mean": preprocess["mean"], "std": preprocess["std"]}
        size = visual.image_size[0] if isinstance(visual.image_size, tuple | list) else visual.image_size
        super().__init__(config, int(size), source["mean"], source["std"])
        self.rebuild = source
        self.visual: Any = visual
        self.class_token = config.class_token
        self._trim(config.layer)

    def _trim(self, layer: int) -> None:
        """Removes what the features don't need: later blocks, the final norm, pooling and projection."""
        visual = self.visual
        if hasattr(visual, "trunk"):
            trunk = visual.trunk
            if not hasattr(trunk, "prune_intermediate_layers"):
                raise ModelError(f"model.tower.layer: timm's {type(trunk).__name__}, which this tower is, gives no intermediate features")
            try:
                trunk.prune_intermediate_layers([layer], prune_norm=True, prune_head=True)
            except AssertionError:
                raise ModelError(f"model.tower.layer: the tower has no layer {layer}") from None
            visual.head = nn.Identity()
            has_class = getattr(trunk, "cls_token", None) is not None
        elif hasattr(visual, "transformer"):
            blocks = visual.transformer.resblocks
            if -layer > len(blocks):
                raise ModelError(f"model.tower.layer: the tower has {len(blocks)} blocks, there is no layer {layer}")
            visual.transformer.resblocks = blocks[: len(blocks) + layer + 1]
            visual.ln_post, visual.proj, visual.attn_pool = nn.Identity(), None, None
            visual.attn_pool_contrastive = None
            has_class = True
        else:
            if layer != -1:
                raise ModelError("model.tower.layer: a ModifiedResNet tower gives its last feature map only, layer -1")
            visual.attnpool, has_class = nn.Identity(), False
        if self.class_token and not has_class:
            raise ModelError("model.tower.class_token: this tower has none")

    def maps(self, pixels: torch.Tensor) -> Found:
        found = self.visual.forward_intermediates(pixels, indices=1, intermediates_only=True, output_extra_tokens=self.class_token)
        return found["image_intermediates"], found["image_intermediates_prefix"][0][:, :1] if self.class_token else None


def open_clip_config(name: str) -> dict[str, Any]:
    """What `build_tower` needs to make open_clip's model of a name without its weights. Raises `ModelError` if unknown.

    A name is one of open_clip's list, or where a model is kept: hf-hub:owner/name or local-dir:folder.
    """
    import open_clip

    if name.startswith("hf-hub:"):
        hub_answers()
    try:
        known = open_clip.get_model_config(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.tower.name: can't load the tower {quoted(name)}: {load_reason(name, error)}") from None
    if known is None:
        raise ModelError(f"model.tower.name: open_clip has no model {quoted(name)} (open_clip.list_models() lists them)")
    return {"vision_cfg": known["vision_cfg"], "quick_gelu": known.get("quick_gelu", False), "mean": CLIP_MEAN, "std": CLIP_STD}


def _bare_open_clip(source: dict[str, Any], image_size: int | None) -> Any:
    """A vision tower with random weights; open_clip builds towers in pairs, so the text side is made minimal."""
    import open_clip

    vision = {**source["vision_cfg"], "timm_model_pretrained": False}
    if image_size is not None:
        vision["image_size"] = image_size
    text = {"vocab_size": 8, "context_length": 4, "width": 64, "heads": 1, "layers": 1}
    try:
        visual: Any = open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text, quick_gelu=source["quick_gelu"]).visual  # type: ignore[arg-type]
        if image_size is not None and hasattr(visual, "set_input_size"):
            visual.set_input_size(image_size)
        return visual
    except (TypeError, AssertionError, ZeroDivisionError) as error:
        raise ModelError(f"model.tower.config is no open_clip vision_cfg: {error}") from None


def _pretrained_open_clip(config: OpenClipTower) -> Any:
    """open_clip's model of a name, with the weights of its tag or file."""
    import open_clip

    if str(config.name).startswith("local-dir:"):
        check_folder(Path(str(config.name).removeprefix("local-dir:")))
    file = Path(config.pretrained) if config.pretrained else None
    if file is not None and not file.is_file() and is_path(str(file)):
        raise ModelError(f"model.tower.pretrained: no such file: {file}")
    if file is None or not file.is_file():
        hub_answers()
    if file is not None and file.is_file():
        if file.suffix != ".safetensors":
            raise ModelError(f"{file}: pickled weights are not loaded, convert them to safetensors")
        check_safetensors(file)
    try:
        return open_clip.create_model(str(config.name), pretrained=config.pretrained, force_image_size=config.image_size)
    except (RuntimeError, OSError, ValueError) as error:
        reason = load_reason(str(config.pretrained or config.name), error)
        raise ModelError(f"can't load the tower {config.name} with pretrained: {config.pretrained}: {reason}") from None


def _uses_quick_gelu(visual: nn.Module) -> bool:
    return any(type(module).__name__ == "QuickGELU" for module in visual.modules())


@dataclass(frozen=True)
class Family:
    """A family of vision models in transformers: its classes, where its blocks and last norm are, and its pixels' scale.

    `mean` and `std` hold for checkpoints that bring no `preprocessor_config.json`.
    """

    config: str
    model: str
    blocks: str
    norm: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_token: bool = True
    asks_to_interpolate: bool = False


FAMILIES = {
    "clip_vision_model": Family(
        "CLIPVisionConfig", "CLIPVisionModel", "layers", "post_layernorm", CLIP_MEAN, CLIP_STD, asks_to_interpolate=True
    ),
    # SigLIP 2 of fixed resolution is stored as this type too.
    "siglip_vision_model": Family(
        "SiglipVisionConfig", "SiglipVisionModel", "layers", "post_layernorm", HALF, HALF, class_token=False, asks_to_interpolate=True
    ),
    "blip_2_vision_model": Family(
        "Blip2VisionConfig", "Blip2VisionModel", "layers", "post_layernorm", CLIP_MEAN, CLIP_STD, asks_to_interpolate=True
    ),
    "instructblip_vision_model": Family(
        "InstructBlipVisionConfig", "InstructBlipVisionModel", "layers", "post_layernorm", CLIP_MEAN, CLIP_STD, asks_to_interpolate=True
    ),
    "dinov2": Family("Dinov2Config", "Dinov2Model", "layer", "layernorm", IMAGENET_MEAN, IMAGENET_STD),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", "layer", "layernorm", IMAGENET_MEAN, IMAGENET_STD
    ),
}
"""By transformers' model_type."""


class TransformersVision(VisionTower):
    """A vision model of transformers, of one of FAMILIES: the hidden state of a layer."""

    def __init__(self, config: TransformersTower, rebuild: dict[str, Any] | None) -> None:
        import transformers

        source = rebuild or transformers_config(config.name)
        vision = dict(source["vision_config"])
        family = FAMILIES[vision["model_type"]]
        if rebuild:
            model: Any = getattr(transformers, family.model)(getattr(transformers, family.config)(**vision))
        else:
            model = _pretrained_vision(config, family, vision)
        super().__init__(config, config.image_size or vision["image_size"], source.get("mean", family.mean), source.get("std", family.std))
        if config.class_token and not family.class_token:
            raise ModelError(f"model.tower.class_token: a tower of type {vision['model_type']} has none")
        blocks = getattr(model.encoder, family.blocks)
        if -config.layer > len(blocks):
            raise ModelError(f"model.tower.layer: the tower has {len(blocks)} blocks, there is no layer {config.layer}")
        setattr(model.encoder, family.blocks, blocks[: len(blocks) + config.layer + 1])
        self.norm = getattr(model, family.norm) if config.final_norm else nn.Identity()
        setattr(model, family.norm, nn.Identity())
        _drop_unused(model)
        self.rebuild, self.model, self.class_token = source, model, config.class_token
        self.side, left = divmod(self.image_size, vision["patch_size"])
        if left or not self.side:
            patch, near = vision["patch_size"], max(self.side, 1)
            raise ModelError(
                f"model.tower.image_size: {self.image_size} is no multiple of the tower's patches of {patch} pixels; "
                f"{near * patch} or {(near + 1) * patch} is"
            )
        resized = family.asks_to_interpolate and self.image_size != vision["image_size"]
        self.options = {"interpolate_pos_encoding": True} if resized else {}

    def maps(self, pixels: torch.Tensor) -> Found:
        hidden = self.norm(self.model(pixel_values=pixels, **self.options).last_hidden_state)
        patches = hidden[:, hidden.shape[1] - self.side**2 :]  # class token and registers come first
        return [patches.transpose(1, 2).unflatten(2, (self.side, self.side))], hidden[:, :1] if self.class_token else None


def _drop_unused(model: Any) -> None:
    """Removes parameters that no feature depends on: a trained tower's processes would wait for their gradients."""
    if hasattr(model, "use_head"):
        model.use_head = False
        if hasattr(model, "head"):
            del model.head
    if hasattr(model.embeddings, "mask_token"):
        model.embeddings.mask_token = None


def transformers_config(name: str) -> dict[str, Any]:
    """What `build_tower` needs to make transformers' vision model of a hub name or folder without its weights.

    Raises `ModelError` if there is none, or none of a known family.
    """
    from transformers import AutoConfig
    from transformers.image_processing_base import ImageProcessingMixin

    check_base(name, "model.tower.name")
    try:
        whole: Any = AutoConfig.from_pretrained(config_source(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.tower.name: can't load the tower {quoted(name)}: {load_reason(name, error)}") from None
    vision = getattr(whole, "vision_config", whole)
    family = FAMILIES.get(vision.model_type)
    if family is None:
        raise ModelError(f"the tower {quoted(name)} is of type {vision.model_type}; known are {', '.join(FAMILIES)}")
    try:
        pixels, _ = ImageProcessingMixin.get_image_processor_dict(config_source(name))
    except OSError:
        pixels = {}
    scale = {"mean": pixels.get("image_mean") or family.mean, "std": pixels.get("image_std") or family.std}
    return {"vision_config": vision.to_dict(), **{key: list(value) for key, value in scale.items()}}


def _pretrained_vision(config: TransformersTower, family: Family, vision: dict[str, Any]) -> Any:
    """transformers' vision model of a hub name or folder, or of a vision-language model's, with all of its weights."""
    import transformers

    name, vlm = config.name, find_vlm(config.weights or config.name)
    if vlm is not None:
        found = getattr(transformers, family.model)(getattr(transformers, family.config)(**vision))
        load_into(found, part_tensors(vlm, "tower"), f"the tower in {quoted(vlm.name)}")
        return found
    if config.weights is not None:
        raise ModelError(f"model.tower.weights: {quoted(config.weights)} is no vision-language model of a known kind (LLaVA-1.5, BLIP-2)")
    if Path(name).is_dir():
        check_folder(Path(name))
    factory: Any = getattr(transformers, family.model)
    try:
        model, info = factory.from_pretrained(name, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.tower.name: can't load the tower {quoted(name)}: {load_reason(name, error)}") from None
    # A whole CLIP model holds more than its vision part, but nothing of that may be missing or of another shape.
    unfit = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if unfit:
        raise ModelError(f"the weights in {quoted(name)} do not fit the tower; missing or misshapen: {', '.join(unfit[:8])}")
    return model


class TimmVision(VisionTower):
    """Feature maps of a timm backbone, pooled to one grid and concatenated by channel."""

    def __init__(self, config: TimmTower, rebuild: dict[str, Any] | None) -> None:
        import timm

        own = config.pretrained is True and not rebuild
        if own:
            hub_answers()
        try:
            trunk: Any = timm.create_model(config.name, pretrained=own, features_only=True, out_indices=tuple(config.stages))
        except (RuntimeError, AssertionError, IndexError) as error:
            raise ModelError(f"model.tower.name: {error or f'{config.name} has no stages {config.stages}'}") from None
        known: Any = timm.get_pretrained_cfg(config.name)
        mean, std = (known.mean, known.std) if known else (CLIP_MEAN, CLIP_STD)
        usual = known.input_size[-1] if known else 224
        super().__init__(config, config.image_size or usual, mean, std)
        if isinstance(config.pretrained, str) and not rebuild:
            _load_backbone(trunk, Path(config.pretrained))
        self.rebuild = {"timm": config.name}
        self.trunk, self.class_token = trunk, config.class_token
        # A transformer comes wrapped, with its blocks unchanged; a convolutional backbone as a list of its stages.
        self.whole = getattr(trunk, "model", None)
        if known and known.fixed_input_size and self.image_size != usual:
            if not hasattr(self.whole, "set_input_size"):
                raise ModelError(f"timm's {config.name} takes images of {usual} pixels only; leave out model.tower.image_size")
            self.whole.set_input_size(img_size=self.image_size)  # type: ignore[union-attr]
        if config.class_token and getattr(self.whole, "cls_token", None) is None:
            raise ModelError(f"model.tower.class_token: timm's {config.name} has none")

    def maps(self, pixels: torch.Tensor) -> Found:
        if self.class_token:
            found = self.whole.forward_intermediates(  # type: ignore[union-attr]
                pixels, indices=self.trunk.out_indices, intermediates_only=True, return_prefix_tokens=True
            )
            return [one for one, _ in found], torch.cat([prefix[:, :1] for _, prefix in found], dim=2)
        found = self.trunk(pixels)
        if str(getattr(self.trunk, "output_fmt", "NCHW")).endswith("NHWC"):
            found = [one.permute(0, 3, 1, 2) for one in found]
        return found, None


def _load_backbone(trunk: nn.Module, file: Path) -> None:
    """Loads a timm checkpoint into a backbone of feature maps. Raises `ModelError` if any of its tensors is missing."""

    def plain(name: str) -> str:
        # timm renames modules where it wraps a model: stages.0 becomes stages_0, blocks becomes model.blocks.
        return name.removeprefix("model.").replace(".", "_")

    given = {plain(name): value for name, value in read_safetensors(file).items()}
    # A backbone has no classifier: its file may hold more, but nothing that the backbone needs may be missing.
    load_into(trunk, {name: given[plain(name)] for name in trunk.state_dict() if plain(name) in given}, file)


class PairVision(VisionTower):
    """Two towers side by side, each with its own size and normalisation; features of equal grids joined by channel."""

    def __init__(self, config: PairTower, rebuild: dict[str, Any] | None) -> None:
        sources = rebuild["towers"] if rebuild else [None, None]
        towers = [build_tower(part, source) for part, source in zip(config.towers, sources, strict=True)]
        odd = [part.resize for part in config.towers if part.resize not in ("crop", config.resize)]
        if odd:
            raise ModelError(f"two towers see one image: set model.tower.resize: {odd[0]} for the pair, not for one of them")
        if len({getattr(part, "class_token", False) for part in config.towers}) > 1:
            raise ModelError("model.tower.towers: two towers side by side need class_token in both or in none")
        super().__init__(config, config.image_size or max(tower.image_size for tower in towers), towers[0].mean, towers[0].std)
        self.towers = nn.ModuleList(towers)
        self.rebuild = {"towers": [tower.rebuild for tower in towers]}

    def found(self, pixels: torch.Tensor) -> Found:
        every = [tower.found(resized(pixels, tower.image_size)) for tower in self.towers]  # type: ignore[operator, arg-type]
        grid = self.grid or min(one.shape[-1] for maps, _ in every for one in maps)
        first = [token for _, token in every if token is not None]
        return [pool(one, grid) for maps, _ in every for one in maps], torch.cat(first, dim=2) if first else None


def resized(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Pixels [B, 3, S, S] of 0 to 255 as [B, 3, size, size], bicubic."""
    if pixels.shape[-1] == size:
        return pixels
    return interpolate(pixels.float(), (size, size), mode="bicubic", antialias=True).round().clamp(0, 255)


def architecture(config: AnyTower) -> dict[str, Any] | None:
    """What `build_tower` needs to make a recipe's tower without its weights; None where that is the recipe itself.

    Raises `ModelError` for unknown names.
    """
    if isinstance(config, PairTower):
        return {"towers": [architecture(part) for part in config.towers]}
    if isinstance(config, TransformersTower):
        return transformers_config(config.name)
    if isinstance(config, TimmTower):
        return {"timm": config.name}
    return open_clip_config(config.name) if config.name else None


TOWERS: dict[str, type[VisionTower]] = {
    "open_clip": OpenClipVision,
    "transformers": TransformersVision,
    "timm": TimmVision,
    "pair": PairVision,
}


def build_tower(config: AnyTower, rebuild: dict[str, Any] | None = None) -> VisionTower:
    """The recipe's tower with its weights, or with `rebuild` the same architecture with random ones.

    Raises `ModelError` for an unknown name, layer or architecture.
    """
    kind: Any = TOWERS[config.kind]
    # Convolutions are several times faster with channels last, on CPUs and GPUs; transformers don't mind.
    return kind(config, rebuild).to(memory_format=torch.channels_last)
