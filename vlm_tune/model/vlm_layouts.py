"""Layouts of other vision-language models' checkpoints, and the tensors of a part in them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vlm_tune.errors import ModelError
from vlm_tune.model.hub import config_source, load_reason
from vlm_tune.model.weights import check_folder, check_safetensors
from vlm_tune.paths import is_folder
from vlm_tune.quoting import quoted

Part = Literal["tower", "connector"]
QFORMER_TOKENIZER = "qformer_tokenizer"
"""The subfolder of InstructBLIP's second tokenizer."""


@dataclass(frozen=True)
class Layout:
    """The names of tensors in a kind of checkpoint.

    `tower` and `connector` are patterns of the prefixes of these parts. `language` maps patterns of
    the LLM's names to the names in its own class, where `{base}` stands for the class's name of
    everything but the head.
    """

    tower: str
    connector: str
    language: Mapping[str, str]


BLIP = Layout(
    r"^vision_model\.",
    r"^(?=qformer\.|query_tokens$|language_projection\.)",
    {r"^language_model\.": ""},
)
LAYOUTS = {
    "llava": Layout(
        r"^(?:model\.)?vision_tower\.(?:vision_model\.)?",
        r"^(?:model\.)?multi_modal_projector\.",
        {
            r"^language_model\.lm_head\.": "lm_head.",
            r"^(?:model\.)?language_model\.(?:{base}\.)?": "{base}.",
        },
    ),
    "llava_original": Layout(
        r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?", r"^model\.mm_projector\.", {}
    ),
    "blip-2": BLIP,
    "instructblip": BLIP,
}
"""The layouts by kind."""

ORIGINAL_TYPES = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
"""transformers' model types of the language models, by the LLaVA repository's model types."""


@dataclass(frozen=True)
class Vlm:
    """A vision-language model of a known kind.

    `name` is its hub name or folder, `config` its config.json.
    """

    name: str
    kind: str
    config: dict[str, Any]

    @property
    def layout(self) -> Layout:
        """The names of its tensors."""
        return LAYOUTS[self.kind]

    def foreign(self, tensor: str) -> bool:
        """Whether a tensor is not the LLM's, but the tower's or the connector's."""
        return any(
            re.match(pattern, tensor) for pattern in (self.layout.tower, self.layout.connector)
        )


def stored_config(name: str) -> dict[str, Any] | None:
    """The config of a hub name or folder, None where it can't be read."""
    from transformers.configuration_utils import PretrainedConfig

    try:
        return PretrainedConfig.get_config_dict(config_source(name))[0]
    except (OSError, ValueError):
        return None


def find_vlm(name: str) -> Vlm | None:
    """The vision-language model of a hub name or folder; None if there is none of a known kind."""
    config = stored_config(name)
    return None if config is None else vlm_of(name, config)


def vlm_of(name: str, config: dict[str, Any]) -> Vlm | None:
    """The vision-language model of this name and config; None if it is none of a known kind."""
    model_type = config.get("model_type")
    if model_type in ORIGINAL_TYPES and "mm_vision_tower" in config:
        return Vlm(name, "llava_original", config)
    return (
        Vlm(name, model_type, config)
        if model_type in LAYOUTS and "vision_config" in config
        else None
    )


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
    return tensors


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
