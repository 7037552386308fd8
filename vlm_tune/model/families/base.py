"""Families of vision-language models: what a checkpoint of theirs is made of, and its tensors.

A family is a module of this folder and a line in `registry`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from vlm_tune.config.connectors import BaseConnector, QFormerConnector
from vlm_tune.config.towers import TransformersTower
from vlm_tune.errors import ModelError
from vlm_tune.model.hub import config_source, load_reason
from vlm_tune.model.weights import check_folder, check_safetensors
from vlm_tune.paths import is_folder
from vlm_tune.quoting import quoted, reason_of

Part = Literal["tower", "connector"]
VlmParts = tuple[TransformersTower, BaseConnector | QFormerConnector, Literal["causal", "seq2seq"]]
"""A model's tower and connector as sections of a recipe, and the kind of its LLM."""


@dataclass(frozen=True)
class Layout:
    """The names of tensors in a kind of checkpoint.

    `tower` and `connector` are patterns of the prefixes of these parts. `language` maps patterns of
    the LLM's names to the names in its own class, where `{base}` stands for the class's name of
    everything but the head. `projection` maps the beginnings of the connector's names to ours.
    """

    tower: str
    connector: str
    language: Mapping[str, str]
    projection: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A family of vision-language models.

    Attributes:
        name: its name in messages.
        templates: the chat formats that its models were tuned with. A model's is the first whose
            control tokens its tokenizer has.
        layout: the names of its tensors.
        parts: describes a model's parts as sections of a recipe; raises `ModelError` for a model
            with a part that can't be expressed.
        language: gives transformers' config of a model's LLM.
        by_language: the chat format by transformers' type of the LLM, where no control token tells.
        modules: the whole model's names of modules in memory, by the beginnings of ours: of the
            LLM's in its own class, and of the connector's after `connector.`. A `*` stands for a
            layer's number. An adapter can be exported over models of a family that has them.
        scaled: transformers' types of LLMs whose own class scales logits, as models of the family
            were trained, where the whole model's class does not.
        bidirectional: which tokens of its LLM see each other both ways, if any do
            (`model.llm.bidirectional`).
    """

    name: str
    templates: tuple[str, ...]
    layout: Layout
    parts: Callable[[Vlm], VlmParts]
    language: Callable[[Vlm], Any]
    modules: Mapping[str, str] = field(default_factory=dict)
    bidirectional: Literal["images", "prompt"] | None = None
    by_language: Mapping[str, str] = field(default_factory=dict)
    scaled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vlm:
    """A vision-language model of a known family.

    `name` is its hub name or folder, `config` its config.json.
    """

    name: str
    family: Family
    config: dict[str, Any]

    @property
    def layout(self) -> Layout:
        """The names of its tensors."""
        return self.family.layout

    def foreign(self, tensor: str) -> bool:
        """Whether a tensor is not the LLM's, but the tower's or the connector's."""
        return any(
            re.match(pattern, tensor) for pattern in (self.layout.tower, self.layout.connector)
        )


# --- configs --------------------------------------------------------------------------------------


def refuse(vlm: Vlm, feature: str, expected: str) -> NoReturn:
    """Raises `ModelError` for a model with a feature that is not supported."""
    raise ModelError(
        f"model.pretrained: {quoted(vlm.name)} has {feature}, which is not supported; expected "
        f"{expected}"
    )


def whole_config(vlm: Vlm) -> Any:
    """transformers' config of the whole model. Raises `ModelError` if it can't be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(config_source(vlm.name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.pretrained: can't read the config of {quoted(vlm.name)}: "
            f"{load_reason(vlm.name, error)}"
        ) from None


def decoder_config(vlm: Vlm) -> Any:
    """The config of an LLM whose head stands beside it in the whole model.

    So the whole model's config says whether the head's weight is the embedding's.
    """
    whole = whole_config(vlm)
    whole.text_config.tie_word_embeddings = whole.tie_word_embeddings
    return whole.text_config


def image_processor(vlm: Vlm, *options: str) -> Any:
    """The checkpoint's image processor, on Pillow.

    Raises `ModelError` if it is missing, or is of a kind without one of the `options`.
    """
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(
            config_source(vlm.name), backend="pil", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.pretrained: {quoted(vlm.name)} needs its preprocessor_config.json: "
            f"{reason_of(error)}"
        ) from None
    missing = [name for name in options if getattr(processor, name, None) is None]
    if missing:
        kind = type(processor).__name__.removesuffix("Pil")
        refuse(vlm, f"a {kind} for its images", f"an image processor with {missing[0]}")
    return processor


def check_scaling(vlm: Vlm, processor: Any, resample: int, name: str) -> None:
    """Refuses an image processor that does not resize by `resample`, rescale and normalise.

    `name` is that of the resampling. Raises `ModelError`.
    """
    if processor.resample != resample or not (
        processor.do_resize and processor.do_rescale and processor.do_normalize
    ):
        refuse(
            vlm,
            f"an image processor that does not resize, rescale and normalise, or not {name}",
            f"resample: {resample}",
        )
    if abs(processor.rescale_factor * 255 - 1) > 1e-6:
        refuse(vlm, f"pixels scaled by {processor.rescale_factor}", "1/255")


def square_images(vlm: Vlm, side: int) -> dict[str, Any]:
    """The tower's options that reproduce the checkpoint's own image processor.

    These are `resize`, how an image is made square, and `image_size` if it is not `side`, the
    tower's. Raises `ModelError` for an image processor that is missing or not supported.
    """
    processor = image_processor(vlm)
    check_scaling(vlm, processor, 3, "bicubically")
    size = processor.size
    crop = processor.crop_size
    if getattr(processor, "do_pad", None):
        how = "pad"
        sides = {size.height, size.width} - {None} or {size.shortest_edge}
    elif getattr(processor, "do_center_crop", None):
        how = "crop" if size.shortest_edge else "squash"
        sides = {crop.height, crop.width, size.shortest_edge or size.height}
    else:
        how = "squash"
        sides = {size.height, size.width}
    if len(sides) != 1 or None in sides:
        refuse(
            vlm,
            f"an image processor with size {dict(size)} and crop_size {dict(crop or {})}",
            "one square size",
        )
    input_size = sides.pop()
    return {"resize": how} | ({} if input_size == side else {"image_size": input_size})


def counted_layers(vlm: Vlm, depth: int) -> int | list[int]:
    """The layers of a tower of `depth` blocks whose features a model takes, from the end."""

    def counted(layer: int) -> int:
        return layer if layer < 0 else layer - depth - 1

    layer = whole_config(vlm).vision_feature_layer
    written = [layer] if isinstance(layer, int) else layer
    if not isinstance(written, list) or not all(isinstance(each, int) for each in written or [""]):
        refuse(vlm, f"the vision_feature_layer {quoted(layer)}", "a number or a list of numbers")
    layers = [counted(each) for each in written]
    return layers if len(layers) > 1 else layers[0]


def language_names(vlm: Vlm, config: Any) -> dict[str, str]:
    """The names of the LLM's tensors in its own class, by patterns of their names in the files."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    base = mapping[type(config)].base_model_prefix if type(config) in mapping else ""
    return {
        old.replace("{base}", base): new.replace("{base}", base)
        for old, new in vlm.layout.language.items()
    }


# --- tensors --------------------------------------------------------------------------------------


def part_tensors(vlm: Vlm, part: Part) -> dict[str, torch.Tensor]:
    """Loads the tensors of a part, with the part's prefix removed from their names.

    Raises `ModelError` for missing, truncated and pickled files.
    """
    from safetensors import safe_open

    pattern = re.compile(getattr(vlm.layout, part))
    tensors = {}
    for file in _files(vlm.name):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - no mapping
                match = pattern.match(key)
                # Old checkpoints contain position ids, which are not weights.
                if match and not key.endswith(".position_ids"):
                    tensors[key[match.end() :]] = opened.get_tensor(key)
    return {_projected(vlm, key): value for key, value in tensors.items()}


def _projected(vlm: Vlm, key: str) -> str:
    """Our name of a connector's tensor, where the layout has one; else the name itself."""
    names = vlm.layout.projection.items()
    return next(
        (ours + key[len(theirs) :] for theirs, ours in names if key.startswith(theirs)), key
    )


def tensor_names(vlm: Vlm) -> set[str]:
    """The names of all tensors, from the index of shards if there is one.

    So a plan downloads no weights.
    """
    from transformers.utils.hub import cached_file

    try:
        index = cached_file(vlm.name, "model.safetensors.index.json")
        return set(json.loads(Path(str(index)).read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError):
        return {key for file in _files(vlm.name) for key in check_safetensors(file)}


def _files(name: str) -> list[Path]:
    """The weight files of a folder or a hub name, downloaded if they are not cached."""
    if is_folder(name):
        return check_folder(Path(name))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return check_folder(
            Path(
                snapshot_download(
                    name, allow_patterns=["*.safetensors", "*.safetensors.index.json"]
                )
            )
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(
            f"can't fetch the weights of {quoted(name)}: {load_reason(name, error)}"
        ) from None
