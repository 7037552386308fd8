"""transformers' LLaVA layout: which models it can express, and a model's weights in it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from vlm_tune.config.model import LinearConnector, MlpConnector, OpenClipTower, TransformersTower
from vlm_tune.data.chat.template import processor_jinja
from vlm_tune.errors import ModelError
from vlm_tune.model.connectors.projectors import Linear
from vlm_tune.model.language.causal import CausalLLM
from vlm_tune.model.language.logits import HeadRule
from vlm_tune.model.vision.base import VisionTower
from vlm_tune.model.vision.open_clip_tower import OpenClipVision
from vlm_tune.model.vision.transformers_tower import TransformersVision
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.quoting import applying, reason_of

IMAGE_TOKEN = "<image>"
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


def check_target(config: VisionLanguageConfig, text: Any) -> None:
    """Raises `ModelError` with every reason of `llava_reasons`."""
    reasons = llava_reasons(config, text)
    if reasons:
        raise ModelError(
            f"this model can't be exported as LLaVA: {'; '.join(reasons)}. `vlm-tune merge` "
            "writes a self-contained folder"
        )


def llava_reasons(config: VisionLanguageConfig, text: Any) -> list[str]:
    """The reasons why a model can't be a LLaVA, from configs alone.

    `text` is the LLM's transformers config, None for an encoder-decoder.
    """
    language = (
        ["its language model is an encoder-decoder, LLaVA's a decoder"]
        if text is None
        else decoder_reasons(text)
    )
    return [*tower_reasons(config), *_connector_reasons(config), *language]


def decoder_reasons(text: Any) -> list[str]:
    """The reasons why a decoder can't be LLaVA's, from its transformers config."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_MAPPING,
        AutoModel,
        AutoModelForCausalLM,
    )

    name = text.model_type
    if type(text) not in MODEL_MAPPING or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return [
            f"its language model is of type {name}, of which transformers has no decoder without "
            "a head"
        ]
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(text)
        body = AutoModel.from_config(text)
        llm = CausalLLM(whole)
    rule = "" if llm.rule is None else f" ({llm.rule})"
    return applying(
        (
            llm.rule != HeadRule(),
            f"its language model, a {name}, scales, caps or shifts its logits{rule}, which LLaVA "
            "does not",
        ),
        (
            llm.factor != 1,
            f"its language model, a {name}, multiplies its embeddings by {llm.factor:.4g}, which "
            "LLaVA does not",
        ),
        (
            not hasattr(body, "embed_tokens") or type(whole.base_model) is not type(body),
            f"its language model is of type {name}, whose embeddings are not where LLaVA looks "
            "for them",
        ),
        (
            getattr(whole.get_output_embeddings(), "bias", None) is not None,
            "its language model's head has a bias, LLaVA's has none",
        ),
    )


def tower_reasons(config: VisionLanguageConfig) -> list[str]:
    """The reasons why a tower can't be LLaVA's."""
    tower = config.model.tower
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


def llava_processor(model: VisionLanguageNetwork) -> Any:
    """A `LlavaProcessor` that gives the token ids and pixels of the model's own processor.

    `<image>` is a token of its tokenizer.
    """
    from tokenizers import AddedToken
    from transformers import LlavaProcessor

    processor = model.processor
    tower = model.tower
    tokenizer: Any = copy.deepcopy(processor.tokenizer)
    tokenizer.add_tokens(
        [AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True
    )
    # `save_pretrained` writes the value in `init_kwargs`.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(processor.spec.pad_id)
    if not any(piece.control == "bos" for piece in processor.template.start):
        _add_nothing(tokenizer)
    tokenizer.chat_template = processor_jinja(processor.template, processor.system, IMAGE_TOKEN)
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


def _add_nothing(tokenizer: Any) -> None:
    """Stops a tokenizer from adding special tokens around a text.

    For chat formats that do not begin with a BOS token.
    """
    from tokenizers import processors

    if tokenizer("a").input_ids != tokenizer("a", add_special_tokens=False).input_ids:
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])


def _strategy(tower: Any, has_class: bool) -> Literal["default", "full"]:
    return "default" if has_class and not tower.class_token else "full"


def _image_processor(model: VisionLanguageNetwork) -> Any:
    from transformers import CLIPImageProcessor, LlavaImageProcessor

    size = model.tower.image_size
    resize = model.processor.images.resize
    square = {"height": size, "width": size}
    common: dict[str, Any] = {
        "crop_size": square,
        "image_mean": list(model.tower.mean),
        "image_std": list(model.tower.std),
    }
    if resize == "pad":
        return LlavaImageProcessor(size=square, do_pad=True, **common)
    if resize == "crop":
        return CLIPImageProcessor(size={"shortest_edge": size}, **common)
    return CLIPImageProcessor(size=square, do_center_crop=False, **common)


# --- the model ------------------------------------------------------------------------------------


def llava_model(model: VisionLanguageNetwork, image_token: int, dtype: torch.dtype) -> Any:
    """A `LlavaForConditionalGeneration` with the model's weights in `dtype`.

    Weights that have this dtype already are shared, not copied. Raises `ModelError` for weights
    that LLaVA has no place for.
    """
    from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

    language: Any = model.llm.model
    _make_room(language, image_token)
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
        vision_feature_layer=-1,
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
    for name, (part, state) in parts.items():
        try:
            part.load_state_dict(
                {key: _cast(value, dtype) for key, value in state.items()}, strict=True, assign=True
            )
        except RuntimeError as error:
            raise ModelError(f"the weights don't fit LLaVA's {name}: {reason_of(error)}") from None
    llava.tie_weights()
    stops = model.processor.stop_ids
    tokenizer = model.processor.tokenizer
    llava.generation_config = GenerationConfig(
        eos_token_id=stops,
        pad_token_id=model.processor.spec.pad_id,
        bos_token_id=tokenizer.bos_token_id,
        do_sample=False,
    )
    return llava


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    value = value.detach().to(dtype) if value.is_floating_point() else value.detach()
    return value.contiguous()


def _make_room(language: Any, token: int) -> None:
    """Extends the embedding and the head with rows up to `token`.

    A new row is the mean of the old ones, so that its logit is never the largest.
    """
    rows = language.get_input_embeddings().num_embeddings
    if token < rows:
        return
    language.resize_token_embeddings(token + 1, mean_resizing=False)
    for layer in (language.get_input_embeddings(), language.get_output_embeddings()):
        layer.weight.data[rows:] = layer.weight.data[:rows].float().mean(0).to(layer.weight.dtype)


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


def vision_weights(tower: VisionTower) -> tuple[Any, dict[str, torch.Tensor]]:
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
