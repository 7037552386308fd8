"""Checks that a recipe's parts with random weights can be built from the numbers in the recipe.

The keys and defaults are those of the libraries that build the parts, so this module imports
transformers (and open_clip). It runs where a recipe's model is first needed, before data and
weights are loaded, and its errors have the locations in the recipe.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

import psutil
import torch
from torch import nn

from vlm_tune.config.model import AnySection, ModelSection, Scratch
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.towers import AudioTower, OpenClipTower, PairTower
from vlm_tune.data.chat.template import ChatTemplate
from vlm_tune.errors import ModelError, Problem, RecipeError, is_finite
from vlm_tune.quoting import REASON, cut, quoted

LARGEST = 2**31 - 1
"""The largest absolute value of a number in a config."""
LAYERS = 2048
"""Limit of the number of layers, more than any model has: each is an object, however small."""
POSITIONS = 50
"""Positions that a second of audio takes in Whisper's encoder."""
UNDECLARED = {"rope_theta", "rope_scaling", "head_dim"}
"""Keys that transformers' models read although not all of their configs declare them."""
Fault = tuple[tuple[str | int, ...], str]
"""A location in the recipe, and the message about what is wrong there."""


def check_model(recipe: Recipe) -> None:
    """Checks the numbers and keys of a recipe's parts with random weights.

    Raises `RecipeError` with the locations of all values from which no model can be built, and of
    unknown keys.
    """
    if not isinstance(recipe.model, ModelSection):
        return
    faults: list[Fault] = []
    llm = recipe.model.llm
    tower = recipe.model.tower
    if llm.scratch:
        faults += _scratch_faults(llm.scratch, llm.kind)
    if isinstance(tower, AudioTower) and tower.config is not None:
        faults += [
            (("model", "tower", *rest), message) for rest, message in _audio_faults(tower.config)
        ]
    towers = enumerate(tower.towers) if isinstance(tower, PairTower) else [(None, tower)]
    for number, part in towers:
        if isinstance(part, OpenClipTower) and part.config is not None:
            path: tuple[str | int, ...] = (
                ("model", "tower") if number is None else ("model", "tower", "towers", number)
            )
            faults += [((*path, *rest), message) for rest, message in _vision_faults(part)]
    if faults:
        raise RecipeError([Problem(recipe.where(path), message) for path, message in faults])


def check_memory(module: nn.Module, name: str) -> None:
    """Raises `ModelError` if a module does not fit into the free memory in fp32.

    The module may be on the meta device. `name` begins the message.
    """
    _check_free(sum(parameter.numel() for parameter in module.parameters()), name)


def _check_free(parameters: int, name: str) -> None:
    needed = 4 * parameters
    free = psutil.virtual_memory().available
    if needed > free:
        raise ModelError(
            f"{name} has {needed // 4:,} parameters, {needed / 1e9:,.1f} GB in fp32, "
            f"and {free / 1e9:.1f} GB are free"
        )


def _scratch_faults(scratch: Scratch, kind: str) -> list[Fault]:
    """The faults of a language model from scratch."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    at = ("model", "llm", "scratch")
    if scratch.model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(scratch.model_type, CONFIG_MAPPING.keys(), n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return [
            (
                (*at, "model_type"),
                f"transformers has no model type {quoted(scratch.model_type)}{hint}",
            )
        ]
    wrong_kind = _kind_fault(scratch.model_type, kind)
    if wrong_kind is not None:
        return [((*at, "model_type"), wrong_kind)]
    default: Any = CONFIG_MAPPING[scratch.model_type]()
    values = default.to_dict()
    values |= {
        alias: values.get(name) for alias, name in default.attribute_map.items()
    } | dict.fromkeys(UNDECLARED)
    faults = _value_faults(scratch.config, values, f"a {scratch.model_type}'s config")
    if faults:
        return [((*at, "config", *path), message) for path, message in faults]
    try:
        fault, parameters = _built(
            scratch.model_type,
            kind,
            json.dumps({"vocab_size": scratch.vocab_size, **scratch.config}),
        )
        if fault is None:
            _check_free(parameters, "it")
    # What a library raises for numbers from which it can't build a model; the numbers are all that
    # it reads here.
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        AssertionError,
        RuntimeError,
        ZeroDivisionError,
        StrictDataclassError,
        ModelError,
    ) as error:
        line = [line for line in str(error).strip().splitlines() if line.strip()] or [
            type(error).__name__
        ]
        fault = f"no {scratch.model_type} can be built from it: {cut(line[-1].strip(), REASON)}"
    return [((*at, "config"), fault)] if fault else []


@functools.lru_cache(maxsize=64)
def _built(model_type: str, kind: str, config_json: str) -> tuple[str | None, int]:
    """The fault of a config's heads, or None and the parameters of the model that is built from it.

    Raises whatever the library raises that can't build one. A run checks its recipe's model several
    times, hence the cache.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    given = json.loads(config_json)
    # The tokenizer's ids are set later; a family's default ids may be outside a small vocabulary.
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    config = CONFIG_MAPPING[model_type](**{**ids, **given})
    fault = _heads_fault(config, given)
    if fault is not None:
        return fault, 0
    factory: Any = AutoModelForSeq2SeqLM if kind == "seq2seq" else AutoModelForCausalLM
    with torch.device("meta"):
        model = factory.from_config(config)
    return None, sum(parameter.numel() for parameter in model.parameters())


def _kind_fault(model_type: str, kind: str) -> str | None:
    """The message about a model type that transformers lacks in a kind; None if it has it."""
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    models = {
        "causal": MODEL_FOR_CAUSAL_LM_MAPPING,
        "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    }
    config = CONFIG_MAPPING[model_type]
    if config in models[kind]:
        return None
    other = [name for name, mapping in models.items() if config in mapping]
    hint = f"; it has one of kind {other[0]}" if other else ""
    return f"transformers has no language model of kind {kind} and type {quoted(model_type)}{hint}"


def _heads_fault(config: Any, given: Mapping[str, Any]) -> str | None:
    """The message about a width or key-value heads that the attention heads do not divide.

    The width counts only if the config in the recipe, `given`, sets no width of a head. None if all
    is well.
    """
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    groups = getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        return f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
    sets_head_width = any(key in given for key in ("head_dim", "d_kv"))
    if (
        isinstance(heads, int)
        and isinstance(width, int)
        and not sets_head_width
        and not hasattr(config, "d_kv")
        and width % heads
    ):
        return f"a width of {width} is no multiple of {heads} heads"
    if (
        isinstance(heads, int)
        and isinstance(width, int)
        and getattr(config, "rope_parameters", None)
    ):
        head_width = getattr(config, "head_dim", None) or width // heads
        if isinstance(head_width, int) and head_width % 2:
            return f"{heads} heads of width {head_width} can't be rotated: their width must be even"
    return None


def _vision_faults(tower: OpenClipTower) -> list[Fault]:
    """The faults of an open_clip tower's own config; locations are relative to the tower."""
    from open_clip.model import CLIPVisionCfg

    known: dict[str, Any] = {
        field.name: None if field.default is MISSING else field.default
        for field in fields(CLIPVisionCfg)  # type: ignore[arg-type]
    }
    config = dict(tower.config or {})
    faults: list[Fault] = [
        (("config", *path), message)
        for path, message in _value_faults(config, known, "an open_clip vision_cfg")
    ]
    if faults or config.get("timm_model_name"):
        return faults
    width, head, patch = (
        config.get(key, known[key]) for key in ("width", "head_width", "patch_size")
    )
    image = tower.image_size or config.get("image_size", known["image_size"])
    resnet = isinstance(config.get("layers"), list)
    side, multiple_of = (
        (32, "32, by which a ResNet shrinks it") if resnet else (patch, f"the patch_size {patch}")
    )
    if isinstance(image, int) and isinstance(side, int) and (image % side or image < side):
        near = sorted({max(image // side, 1) * side, (image // side + 1) * side})
        key = ("image_size",) if tower.image_size else ("config",)
        faults.append(
            (
                key,
                f"image_size {image} is no multiple of {multiple_of}; "
                f"{' or '.join(map(str, near))} is",
            )
        )
    if not resnet and width % head:
        faults.append((("config",), f"width {width} is no multiple of the head_width {head}"))
    return faults


def _audio_faults(config: Mapping[str, Any]) -> list[Fault]:
    """The faults of an audio tower's own config; locations are relative to the tower."""
    from transformers import WhisperConfig

    known = WhisperConfig().to_dict()
    faults: list[Fault] = [
        (("config", *path), message)
        for path, message in _value_faults(config, known, "a WhisperConfig")
    ]
    if faults:
        return faults
    width = config.get("d_model", known["d_model"])
    heads = config.get("encoder_attention_heads", known["encoder_attention_heads"])
    positions = config.get("max_source_positions", known["max_source_positions"])
    if width % heads or width % 2:
        faults.append(
            (("config",), f"d_model {width} is no even multiple of {heads} encoder_attention_heads")
        )
    if positions < POSITIONS:
        faults.append(
            (
                ("config", "max_source_positions"),
                f"max_source_positions {positions}: a second of audio needs {POSITIONS}",
            )
        )
    return faults


def _value_faults(given: Mapping[str, Any], known: Mapping[str, Any], what: str) -> list[Fault]:
    """The faults of unknown keys, and of values of another type or range than their defaults.

    Args:
        given: the config in the recipe.
        known: the library's default of each key, None where it has none.
        what: the kind of config, for the messages.
    """
    faults: list[Fault] = []
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2, cutoff=0.6)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"known are {', '.join(sorted(known)[:12])}, ..."
            )
            faults.append(((key,), f"{what} has no key {quoted(key)}; {hint}"))
        elif (fault := _value_fault(key, value, known[key])) is not None:
            faults.append(((key,), f"{key}: {fault}, got {quoted(value)}"))
    return faults


def _value_fault(key: str, value: Any, default: Any) -> str | None:
    """The expectation that a value does not meet, as a phrase; None if it meets all."""
    numbers = list(_numbers(value))
    if any(not is_finite(number) for number in numbers):
        return "expected a finite number"
    if any(abs(number) > LARGEST for number in numbers):
        return f"expected at most {LARGEST:,}"
    if isinstance(default, bool) or default is None or value is None:
        if isinstance(default, bool) and not isinstance(value, bool):
            return "expected true or false"
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and not key.endswith("_id")
            and value < 1
        ):
            return "expected at least 1"
        return None
    if isinstance(default, int):
        if not isinstance(value, int | list) or isinstance(value, bool):
            return "expected an integer"
        least = 1 if default > 0 and not key.endswith("_id") else -LARGEST
        most = LAYERS if "layer" in key else LARGEST
        inside = all(isinstance(number, int) and least <= number <= most for number in numbers)
        return None if inside and numbers else f"expected integers from {least} to {most:,}"
    if isinstance(default, float):
        return (
            None
            if isinstance(value, int | float) and not isinstance(value, bool)
            else "expected a number"
        )
    if isinstance(default, str):
        return None if isinstance(value, str) else "expected text"
    return None


def _numbers(value: Any) -> Iterable[int | float]:
    """Yields the numbers in a value, including those in lists and mappings."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _numbers(each)


def check_questions(section: AnySection, template: ChatTemplate) -> None:
    """Raises `ModelError` for a chat format of several questions where prompts see them both ways.

    In training the later ones would stand behind an answer, and be read one way.
    """
    if section.llm.bidirectional == "prompt" and not template.one_question:
        raise ModelError(
            f"data.template: the chat format {quoted(template.name)} takes later questions, whose "
            "tokens would see each other both ways in a prompt alone (model.llm.bidirectional: "
            "prompt); expected one with one_question, as paligemma"
        )
