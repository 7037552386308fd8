"""Layouts of transformers' own vision-language models, and a model's weights in one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlm_tune.data.chat.processor_jinja import processor_jinja
from vlm_tune.data.images.decode import ImageProcessor
from vlm_tune.data.types import Conversation
from vlm_tune.errors import ModelError
from vlm_tune.model.language.causal import CausalLLM
from vlm_tune.model.language.logits import HeadRule
from vlm_tune.model.vision.base import VisionTower
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.quoting import applying, reason_of

IMAGE_TOKEN = "<image>"
Weights = Mapping[str, tuple[nn.Module, dict[str, torch.Tensor]]]
"""The parts of a model on the meta device with their weights, by their names."""


@dataclass(frozen=True)
class Target:
    """A layout that a model can be written in.

    Attributes:
        name: its name in messages.
        reasons: gives the reasons why a model can't be of this layout, from its config and
            transformers' config of its LLM (None for an encoder-decoder).
        processor: makes a processor that gives the ids and pixels of the model's own.
        empty: makes the model with its weights on the meta device, for the id of the image's token
            and a dtype, and gives it with the weights of its parts.
        image_token: the token whose id stands in an image's slots.
        inputs: makes a processor's inputs of messages, where its chat template takes prompts alone.
        comparable: gives what transformers' model takes of a row, to compare by; None for a row
            that it does not take. By default it takes every row.
        scaled: transformers' types of LLMs whose own class scales logits, where the layout's does
            not: its logits are compared times that scale.
        example: the code that a model card shows, if not that of a chat template.
    """

    name: str
    reasons: Callable[[VisionLanguageConfig, Any], list[str]]
    processor: Callable[[VisionLanguageNetwork], Any]
    empty: Callable[[VisionLanguageNetwork, int, torch.dtype], tuple[Any, Weights]]
    image_token: str = IMAGE_TOKEN
    inputs: Callable[[Any, Sequence[dict[str, Any]]], Any] | None = None
    comparable: Callable[[Conversation], Conversation | None] | None = None
    scaled: tuple[str, ...] = ()
    example: str | None = None


def vision_of(model: VisionLanguageNetwork) -> tuple[VisionTower, ImageProcessor]:
    """The tower and the preprocessing of a model that sees images, as a target's `reasons` ask."""
    tower = model.tower
    images = model.processor.images
    assert isinstance(tower, VisionTower)
    assert isinstance(images, ImageProcessor)
    return tower, images


def written_model(
    target: Target, model: VisionLanguageNetwork, image_token: int, dtype: torch.dtype
) -> Any:
    """A model of transformers in the target's layout, with the model's weights in `dtype`.

    Weights that have this dtype already are shared, not copied. Raises `ModelError` for weights
    that the layout has no place for.
    """
    from transformers import GenerationConfig

    _make_room(model.llm.model, image_token)
    written, parts = target.empty(model, image_token, dtype)
    for name, (part, state) in parts.items():
        try:
            part.load_state_dict(
                {key: _cast(value, dtype) for key, value in state.items()}, strict=True, assign=True
            )
        except RuntimeError as error:
            raise ModelError(
                f"the weights don't fit {target.name}'s {name}: {reason_of(error)}"
            ) from None
    written.tie_weights()
    written.generation_config = GenerationConfig(
        eos_token_id=model.processor.stop_ids,
        pad_token_id=model.processor.spec.pad_id,
        bos_token_id=model.processor.tokenizer.bos_token_id,
        do_sample=False,
    )
    return written


def written_tokenizer(
    model: VisionLanguageNetwork, image_token: str = IMAGE_TOKEN, placeholder: str | None = None
) -> Any:
    """A tokenizer for a processor of transformers, with the chat template and the image's token.

    The chat template writes an image as `placeholder`, or else as its token.
    """
    from tokenizers import AddedToken

    processor = model.processor
    tokenizer: Any = copy.deepcopy(processor.tokenizer)
    tokenizer.add_tokens(
        [AddedToken(image_token, special=True, normalized=False)], special_tokens=True
    )
    # `save_pretrained` writes the value in `init_kwargs`.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(processor.spec.pad_id)
    if not any(piece.control == "bos" for piece in processor.template.start):
        _add_nothing(tokenizer)
    tokenizer.chat_template = processor_jinja(
        processor.template, processor.system, placeholder or image_token
    )
    return tokenizer


def _add_nothing(tokenizer: Any) -> None:
    """Stops a tokenizer from adding special tokens around a text.

    For chat formats that do not begin with a BOS token.
    """
    from tokenizers import processors

    if tokenizer("a").input_ids != tokenizer("a", add_special_tokens=False).input_ids:
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])


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


def decoder_reasons(text: Any, layout: str, scaled: Sequence[str] = ()) -> list[str]:
    """The reasons why a decoder can't be that of a `layout`, from its transformers config.

    `text` is None for an encoder-decoder. Decoders of the types `scaled` may scale logits.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_MAPPING,
        AutoModel,
        AutoModelForCausalLM,
    )

    if text is None:
        return [f"its language model is an encoder-decoder, {layout}'s a decoder"]

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
            llm.rule != HeadRule() and not (name in scaled and llm.rule and llm.rule.scale),
            f"its language model, a {name}, scales, caps or shifts its logits{rule}, which "
            f"{layout} does not",
        ),
        (
            llm.factor != 1,
            f"its language model, a {name}, multiplies its embeddings by {llm.factor:.4g}, which "
            f"{layout} does not",
        ),
        (
            not hasattr(body, "embed_tokens") or type(whole.base_model) is not type(body),
            f"its language model is of type {name}, whose embeddings are not where {layout} "
            "looks for them",
        ),
        (
            getattr(whole.get_output_embeddings(), "bias", None) is not None,
            f"its language model's head has a bias, {layout}'s has none",
        ),
    )
