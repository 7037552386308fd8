"""transformers' LLaVA layout: which models it can express, and a model's weights in it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from vlm_tune.config.connectors import LinearConnector, MlpConnector
from vlm_tune.config.towers import AudioTower, OpenClipTower, TransformersTower
from vlm_tune.errors import ModelError
from vlm_tune.exporting.hf_layout import (
    IMAGE_TOKEN,
    Target,
    Weights,
    decoder_reasons,
    vision_of,
    written_tokenizer,
)
from vlm_tune.model.connectors.projectors import Linear
from vlm_tune.model.media_tower import MediaTower
from vlm_tune.model.vision.open_clip_tower import OpenClipVision
from vlm_tune.model.vision.transformers_tower import TransformersVision
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.quoting import applying

VISION_TYPES = ("clip_vision_model", "siglip_vision_model")
PROJECTOR = {"layers.0": "linear_1", "layers.2": "linear_2"}
OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OPEN_CLIP_STEM = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
}


def _llava_reasons(config: VisionLanguageConfig, text: Any) -> list[str]:
    """The reasons why a model can't be a LLaVA, from configs alone.

    `text` is the LLM's transformers config, None for an encoder-decoder.
    """
    language = decoder_reasons(text, "LLaVA")
    both_ways = bidirectional_reasons(config)
    return [*tower_reasons(config), *_connector_reasons(config), *language, *both_ways]


def bidirectional_reasons(config: VisionLanguageConfig) -> list[str]:
    """The reasons why a decoder that sees earlier tokens alone is not the model's."""
    return applying(
        (
            config.llm.bidirectional is not None,
            "some of its tokens attend to each other in both directions (model.llm.bidirectional)",
        )
    )


def tower_reasons(config: VisionLanguageConfig) -> list[str]:
    """The reasons why a tower can't be LLaVA's."""
    tower = config.model.tower
    if isinstance(tower, AudioTower):
        return ["its tower takes audio, and the layout is for images"]
    by_transformers = isinstance(tower, TransformersTower)
    by_open_clip = isinstance(tower, OpenClipTower)
    vision = config.tower_rebuild.get("vision_cfg", {})
    model_type = config.tower_rebuild.get("vision_config", {}).get("model_type")
    return applying(
        (
            by_transformers and model_type not in VISION_TYPES,
            f"its tower is of type {model_type}, LLaVA's {' or '.join(VISION_TYPES)}",
        ),
        (
            by_open_clip
            and (vision.get("timm_model_name") or isinstance(vision.get("layers"), list | tuple)),
            "its tower is not a ViT of open_clip's own",
        ),
        (
            not by_transformers and not by_open_clip,
            f"its tower is of kind {tower.kind}, LLaVA's is one CLIP or SigLIP ViT",
        ),
        (
            isinstance(tower, TransformersTower) and tower.final_norm,
            "its tower's last norm is on the features (model.tower.final_norm)",
        ),
        (tower.grid is not None, "its tower pools to a grid (model.tower.grid)"),
        (tower.tiles, "it sees images as tiles (model.tower.tiles)"),
        (tower.split, "it sees images as tiles with markers (model.tower.split)"),
    )


def _connector_reasons(config: VisionLanguageConfig) -> list[str]:
    connector = config.model.connector
    if not isinstance(connector, LinearConnector | MlpConnector):
        return [f"its connector is of kind {connector.kind}, LLaVA's is linear or an MLP"]
    depth = connector.depth if isinstance(connector, MlpConnector) else 2
    return applying(
        (connector.norm, "its connector begins with a LayerNorm (model.connector.norm)"),
        (depth != 2, f"its connector has {depth} layers, LLaVA's MLP has 2"),
    )


# --- the processor --------------------------------------------------------------------------------


def _llava_processor(model: VisionLanguageNetwork) -> Any:
    """A `LlavaProcessor` that gives the token ids and pixels of the model's own processor.

    `<image>` is a token of its tokenizer.
    """
    from transformers import LlavaProcessor

    tower = model.tower
    tokenizer = written_tokenizer(model)
    vision, _ = vision_weights(tower)
    has_class = vision.model_type == "clip_vision_model"
    return LlavaProcessor(
        image_processor=_image_processor(model),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=_strategy(tower, has_class),
        num_additional_image_tokens=int(has_class),
        image_token=IMAGE_TOKEN,
        chat_template=tokenizer.chat_template,
    )


def _strategy(tower: Any, has_class: bool) -> Literal["default", "full"]:
    return "default" if has_class and not tower.class_token else "full"


def _image_processor(model: VisionLanguageNetwork) -> Any:
    from transformers import CLIPImageProcessor, LlavaImageProcessor

    tower, images = vision_of(model)
    size = tower.image_size
    resize = images.resize
    square = {"height": size, "width": size}
    common: dict[str, Any] = {
        "crop_size": square,
        "image_mean": list(tower.mean),
        "image_std": list(tower.std),
    }
    if resize == "pad":
        return LlavaImageProcessor(size=square, do_pad=True, **common)
    if resize == "crop":
        return CLIPImageProcessor(size={"shortest_edge": size}, **common)
    return CLIPImageProcessor(size=square, do_center_crop=False, **common)


# --- the model ------------------------------------------------------------------------------------


def _llava_model(
    model: VisionLanguageNetwork, image_token: int, dtype: torch.dtype
) -> tuple[Any, Weights]:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    language: Any = model.llm.model
    vision, vision_state = vision_weights(model.tower)
    linear = isinstance(model.connector, Linear)
    has_class = vision.model_type == "clip_vision_model"
    config = LlavaConfig(
        vision_config=vision,
        text_config=language.config,
        image_token_index=image_token,
        image_seq_length=model.processor.spec.tokens_per_image,
        # With the identity as its second layer and no activation, LLaVA's MLP is a linear
        # connector.
        projector_hidden_act="linear" if linear else "gelu",
        vision_feature_select_strategy=_strategy(model.tower, has_class),
        vision_feature_layer=written_layers(model.tower),
        multimodal_projector_bias=has_bias(model),
        dtype=dtype,
    )
    with torch.device("meta"):
        llava: Any = LlavaForConditionalGeneration(config)
    parts = {
        "vision_tower": (llava.model.vision_tower, vision_state),
        "multi_modal_projector": (
            llava.model.multi_modal_projector,
            _projector_state(model.connector),
        ),
        "language_model": (llava.model.language_model, language.base_model.state_dict()),
        "lm_head": (llava.lm_head, language.get_output_embeddings().state_dict()),
    }
    return llava, parts


def _projector_state(connector: nn.Module) -> dict[str, torch.Tensor]:
    if isinstance(connector, Linear):
        width = connector.linear.out_features
        first = {f"linear_1.{key}": value for key, value in connector.linear.state_dict().items()}
        return {**first, "linear_2.weight": torch.eye(width), "linear_2.bias": torch.zeros(width)}
    state = connector.state_dict().items()
    return {
        f"{PROJECTOR[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value
        for key, value in state
    }


def written_layers(tower: MediaTower) -> int | list[int]:
    """The layers of a written tower that features are taken from, counted from its end."""
    joined = tower.joined if isinstance(tower, TransformersVision) else [-1]
    return joined if len(joined) > 1 else -1


def has_bias(model: VisionLanguageNetwork) -> bool:
    """Whether the layers of a model's projector have biases."""
    return getattr(model.config.model.connector, "bias", True)


def vision_weights(tower: MediaTower) -> tuple[Any, dict[str, torch.Tensor]]:
    """A tower's transformers config and state dict, without blocks that its features don't need.

    Features are taken before the final norm, which is therefore the identity. Raises `ModelError`
    for towers that are neither transformers' nor open_clip's.
    """
    if isinstance(tower, TransformersVision):
        config, state = _transformers_vision(tower)
    elif isinstance(tower, OpenClipVision):
        config, state = _open_clip_vision(tower)
    else:
        raise ModelError(f"a {type(tower).__name__} tower has no place in LLaVA")
    state |= {
        "post_layernorm.weight": torch.ones(config.hidden_size),
        "post_layernorm.bias": torch.zeros(config.hidden_size),
    }
    return config, state


def _transformers_vision(tower: TransformersVision) -> tuple[Any, dict[str, torch.Tensor]]:
    model: Any = tower.model
    config = copy.deepcopy(model.config)
    state = dict(model.state_dict())
    if tower.options:
        # Positions for another image size are interpolated here once, instead of in every forward.
        embeddings = model.embeddings
        side = tower.side * config.patch_size
        weight = model.embeddings.position_embedding.weight
        with torch.no_grad():
            positions = embeddings.interpolate_pos_encoding(
                torch.empty(1, 2, weight.shape[1], device=weight.device), side, side
            )
        state["embeddings.position_embedding.weight"] = positions[0]
    config.image_size = tower.image_size
    config.num_hidden_layers = len(model.encoder.layers)
    if hasattr(model, "use_head"):
        config.vision_use_head = False
    return config, state


def _open_clip_vision(tower: OpenClipVision) -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import CLIPVisionConfig

    visual: Any = tower.visual
    blocks: Sequence[Any] = visual.transformer.resblocks
    state = {}
    left = dict(visual.state_dict())
    for ours, theirs in OPEN_CLIP_STEM.items():
        if ours in left:
            state[theirs] = left.pop(ours)
    for number in range(len(blocks)):
        block = f"transformer.resblocks.{number}."
        layer = f"encoder.layers.{number}."
        for kind in ("weight", "bias"):
            for ours, theirs in OPEN_CLIP_BLOCK.items():
                if f"{block}{ours}.{kind}" in left:
                    state[f"{layer}{theirs}.{kind}"] = left.pop(f"{block}{ours}.{kind}")
            joined = left.pop(f"{block}attn.in_proj_{kind}", None)
            if joined is not None:
                for name, part in zip("qkv", joined.chunk(3), strict=True):
                    state[f"{layer}self_attn.{name}_proj.{kind}"] = part
    if left or "pre_layrnorm.weight" not in state:
        odd = ", ".join(sorted(left)[:4]) or "no norm before its blocks"
        raise ModelError(
            f"this open_clip tower is no plain CLIP ViT ({odd}): it can't be exported as LLaVA"
        )
    width = state["embeddings.class_embedding"].shape[0]
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        image_size=tower.image_size,
        patch_size=visual.conv1.kernel_size[0],
        hidden_act=_activation(blocks[0].mlp.gelu),
        layer_norm_eps=blocks[0].ln_1.eps,
    )
    return config, state


def _activation(layer: nn.Module) -> str:
    if isinstance(layer, nn.GELU):
        return "gelu_pytorch_tanh" if layer.approximate == "tanh" else "gelu"
    if type(layer).__name__ == "QuickGELU":
        return "quick_gelu"
    raise ModelError(f"an open_clip tower with {type(layer).__name__} can't be exported as LLaVA")


LLAVA = Target("LLaVA", _llava_reasons, _llava_processor, _llava_model)
