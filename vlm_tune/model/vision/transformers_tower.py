"""Vision towers of transformers: CLIP, SigLIP, DINOv2, and those of vision-language models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_tune.compat import all_true_on_meta
from vlm_tune.config.towers import TransformersTower
from vlm_tune.errors import ModelError
from vlm_tune.model.families.base import part_tensors
from vlm_tune.model.families.registry import family_names, find_vlm
from vlm_tune.model.hub import check_base, config_source, load_reason
from vlm_tune.model.vision.base import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    FeatureMaps,
    VisionTower,
)
from vlm_tune.model.weights import check_folder, check_loading, load_into
from vlm_tune.paths import is_folder
from vlm_tune.quoting import quoted

HALF = (0.5, 0.5, 0.5)


def _states(model: Any, pixels: torch.Tensor, **options: Any) -> torch.Tensor:
    """The last hidden states [B, N, D] of a vision model."""
    return model(pixel_values=pixels, **options).last_hidden_state


def _states_at(
    model: Any, pixels: torch.Tensor, places: Sequence[int], **options: Any
) -> list[torch.Tensor]:
    """The hidden states [B, N, D] of a vision model at places counted from the end."""
    states = model(pixel_values=pixels, output_hidden_states=True, **options).hidden_states
    # A memory plan measures towers of fewer blocks than these.
    return [states[max(place, -len(states))] for place in places]


def _states_of_whole_images(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """`_states` of a vision model that takes padded images, for images without padding.

    Its own forward pass looks at the mask's values, for which a GPU waits and a plan has none.
    """
    batch, _, height, width = pixels.shape
    grid = (batch, height // model.patch_size, width // model.patch_size)
    mask = torch.ones(grid, dtype=torch.bool, device=pixels.device)
    # Before 5.23 transformers indexes by the mask.
    with all_true_on_meta(mask):
        states = model.embeddings(pixel_values=pixels, patch_attention_mask=mask)
    return model.encoder(inputs_embeds=states).last_hidden_state


@dataclass(frozen=True)
class Family:
    """A family of vision models in transformers.

    It has the names of the classes, of the blocks and of the last norm, and the normalisation of
    pixels. `mean` and `std` are for checkpoints without `preprocessor_config.json`. `states` gives
    a model's last hidden states.
    """

    config: str
    model: str
    blocks: str
    norm: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_token: bool = True
    asks_to_interpolate: bool = False
    states: Callable[..., torch.Tensor] = _states


FAMILIES = {
    "clip_vision_model": Family(
        "CLIPVisionConfig",
        "CLIPVisionModel",
        "layers",
        "post_layernorm",
        CLIP_MEAN,
        CLIP_STD,
        asks_to_interpolate=True,
    ),
    # SigLIP 2 of fixed resolution is stored as this type too.
    "siglip_vision_model": Family(
        "SiglipVisionConfig",
        "SiglipVisionModel",
        "layers",
        "post_layernorm",
        HALF,
        HALF,
        class_token=False,
        asks_to_interpolate=True,
    ),
    "blip_2_vision_model": Family(
        "Blip2VisionConfig",
        "Blip2VisionModel",
        "layers",
        "post_layernorm",
        CLIP_MEAN,
        CLIP_STD,
        asks_to_interpolate=True,
    ),
    "instructblip_vision_model": Family(
        "InstructBlipVisionConfig",
        "InstructBlipVisionModel",
        "layers",
        "post_layernorm",
        CLIP_MEAN,
        CLIP_STD,
        asks_to_interpolate=True,
    ),
    "dinov2": Family(
        "Dinov2Config", "Dinov2Model", "layer", "layernorm", IMAGENET_MEAN, IMAGENET_STD
    ),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        "layer",
        "layernorm",
        IMAGENET_MEAN,
        IMAGENET_STD,
    ),
    "idefics3_vision": Family(
        "Idefics3VisionConfig",
        "Idefics3VisionTransformer",
        "layers",
        "post_layernorm",
        HALF,
        HALF,
        class_token=False,
        states=_states_of_whole_images,
    ),
    "internvl_vision": Family(
        "InternVLVisionConfig",
        "InternVLVisionModel",
        "layer",
        "layernorm",
        IMAGENET_MEAN,
        IMAGENET_STD,
    ),
    "pixtral": Family(
        "PixtralVisionConfig",
        "PixtralVisionModel",
        "",
        "",
        CLIP_MEAN,
        CLIP_STD,
        class_token=False,
    ),
    "siglip2_vision_model": Family(
        "Siglip2VisionConfig",
        "Siglip2VisionModel",
        "layers",
        "post_layernorm",
        HALF,
        HALF,
        class_token=False,
    ),
    "smolvlm_vision": Family(
        "SmolVLMVisionConfig",
        "SmolVLMVisionTransformer",
        "layers",
        "post_layernorm",
        HALF,
        HALF,
        class_token=False,
        states=_states_of_whole_images,
    ),
}
"""Families by transformers' model_type."""


class TransformersVision(VisionTower):
    """A vision model of transformers, of one of FAMILIES; features are a layer's hidden states.

    Those of several layers are joined by channel: `joined` has their places among the hidden states
    of the blocks that are left, counted from the end.
    """

    def __init__(self, config: TransformersTower, source: dict[str, Any], model: Any) -> None:
        vision = source["vision_config"]
        family = FAMILIES[vision["model_type"]]
        super().__init__(
            config,
            config.image_size or vision["image_size"],
            source.get("mean", family.mean),
            source.get("std", family.std),
        )
        for option in ("row_ends", "max_num_patches"):
            if getattr(config, option):
                raise ModelError(
                    f"model.tower.{option}: this is for towers that keep an image's shape, and one "
                    f"of type {vision['model_type']} takes square images"
                )
        if config.class_token and not family.class_token:
            raise ModelError(
                f"model.tower.class_token: a tower of type {vision['model_type']} has none"
            )
        blocks = getattr(model.encoder, family.blocks)
        last = max(config.layers)
        if -min(config.layers) > len(blocks):
            raise ModelError(
                f"model.tower.layer: the tower has {len(blocks)} blocks, "
                f"there is no layer {min(config.layers)}"
            )
        if len(config.layers) > 1 and (config.final_norm or family.states is not _states):
            raise ModelError(
                f"model.tower.layer: {config.layers} are several layers, and "
                + (
                    "final_norm is for one"
                    if config.final_norm
                    else f"a tower of type {vision['model_type']} gives those of one"
                )
            )
        setattr(model.encoder, family.blocks, blocks[: len(blocks) + last + 1])
        self.joined = [layer - last - 1 for layer in config.layers]
        self.norm = getattr(model, family.norm) if config.final_norm else nn.Identity()
        setattr(model, family.norm, nn.Identity())
        drop_unused(model)
        self.rebuild = source
        self.model = model
        self.states = family.states
        self.class_token = config.class_token
        self.side = self.image_size // vision["patch_size"]
        # A tower may have been trained with pixels beyond its last patch, which it leaves out.
        if not self.side or self.image_size != vision["image_size"]:
            check_patches(self.image_size, vision["patch_size"])
        resized = family.asks_to_interpolate and self.image_size != vision["image_size"]
        self.options = {"interpolate_pos_encoding": True} if resized else {}

    def maps(self, pixels: torch.Tensor) -> FeatureMaps:
        if len(self.joined) > 1:
            hidden = torch.cat(_states_at(self.model, pixels, self.joined, **self.options), -1)
        else:
            hidden = self.norm(self.states(self.model, pixels, **self.options))
        # The class token and registers come first.
        patches = hidden[:, hidden.shape[1] - self.side**2 :]
        return [patches.transpose(1, 2).unflatten(2, (self.side, self.side))], hidden[
            :, :1
        ] if self.class_token else None


def check_patches(size: int, patch: int) -> None:
    """Raises `ModelError` for an image whose side is no multiple of a patch's."""
    if not size or size % patch:
        near = max(size // patch, 1)
        raise ModelError(
            f"model.tower.image_size: {size} is no multiple of "
            f"the tower's patches of {patch} pixels; {near * patch} or {(near + 1) * patch} is"
        )


def drop_unused(model: Any) -> None:
    """Removes parameters on which no feature depends.

    In distributed training of the tower, ranks would wait for their gradients.
    """
    if hasattr(model, "use_head"):
        model.use_head = False
        if hasattr(model, "head"):
            del model.head
    if hasattr(model.embeddings, "mask_token"):
        model.embeddings.mask_token = None


def transformers_config(name: str) -> dict[str, Any]:
    """The description from which `build_tower` makes a transformers model without its weights.

    `name` is a Hub name or a folder. Raises `ModelError` if it has no vision model of a known
    family.
    """
    from transformers import AutoConfig
    from transformers.image_processing_base import ImageProcessingMixin

    check_base(name, "model.tower.name")
    try:
        whole: Any = AutoConfig.from_pretrained(config_source(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.tower.name: can't load the tower {quoted(name)}: {load_reason(name, error)}"
        ) from None
    vision = getattr(whole, "vision_config", whole)
    described = vision.to_dict()  # an instance may bear the type that its file has
    described |= _sides(name, described)
    family = FAMILIES.get(described["model_type"])
    if family is None:
        raise ModelError(
            f"the tower {quoted(name)} is of type {described['model_type']}; "
            f"known are {', '.join(FAMILIES)}"
        )
    try:
        pixels, _ = ImageProcessingMixin.get_image_processor_dict(config_source(name))
    except OSError:
        pixels = {}
    scale = {
        "mean": pixels.get("image_mean") or family.mean,
        "std": pixels.get("image_std") or family.std,
    }
    return {"vision_config": described, **{key: list(value) for key, value in scale.items()}}


def _sides(name: str, vision: dict[str, Any]) -> dict[str, int]:
    """The sides of a tower's image and patches that its config has as heights and widths."""
    pairs = {key: vision[key] for key in ("image_size", "patch_size") if key in vision}
    pairs = {key: pair for key, pair in pairs.items() if isinstance(pair, list | tuple)}
    for key, pair in pairs.items():
        if len(set(pair)) != 1:
            raise ModelError(
                f"the tower {quoted(name)} has {key} {list(pair)}; expected equal sides"
            )
    return {key: pair[0] for key, pair in pairs.items()}


def described_vision(source: dict[str, Any]) -> Any:
    """The vision model of a description, with random weights."""
    import transformers

    vision = source["vision_config"]
    family = FAMILIES[vision["model_type"]]
    return getattr(transformers, family.model)(getattr(transformers, family.config)(**vision))


def pretrained_vision(config: TransformersTower, source: dict[str, Any]) -> Any:
    """The vision model of a Hub name or folder, or of a vision-language model, with its weights.

    Raises `ModelError` if a weight is missing or has another shape.
    """
    import transformers

    name = config.name
    vlm = find_vlm(config.weights or config.name)
    if vlm is not None:
        tower = described_vision(source)
        load_into(tower, part_tensors(vlm, "tower"), f"the tower in {quoted(vlm.name)}")
        return tower
    if config.weights is not None:
        raise ModelError(
            f"model.tower.weights: {quoted(config.weights)} is no vision-language model "
            f"of a known kind ({family_names()})"
        )
    if is_folder(name):
        check_folder(Path(name))
    factory: Any = getattr(transformers, FAMILIES[source["vision_config"]["model_type"]].model)
    try:
        model, info = factory.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.tower.name: can't load the tower {quoted(name)}: {load_reason(name, error)}"
        ) from None
    # A whole CLIP model holds more than its vision part, but no weight of that part may be missing
    # or have another shape.
    check_loading(
        info | {"unexpected_keys": ()}, f"the weights in {quoted(name)} do not fit the tower"
    )
    return model
