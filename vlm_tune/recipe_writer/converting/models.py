"""The model of another framework's configuration as a recipe's `model` and chat format."""

from __future__ import annotations

from typing import Any

from vlm_tune.config.native import OWN_TEMPLATE
from vlm_tune.errors import ModelError
from vlm_tune.model.families.base import Vlm
from vlm_tune.model.families.registry import FAMILIES, family_names, stored_config, vlm_of
from vlm_tune.model.pretrained.native import native_types
from vlm_tune.quoting import quoted
from vlm_tune.recipe_writer.converting.conversion import Conversion
from vlm_tune.recipe_writer.models import (
    LARGE_WIDTH,
    LLAVA,
    NATIVE_REASON,
    OWN_REASON,
    causal_template,
    named_model,
    tower_section,
    whole_template,
)

TEXT = "text"
REMOTE = "remote"
"""What a configuration may say of a model in place of transformers' model type: a language model; a
vision-language model whose code comes with it."""
OPENGVLAB = "internvl_chat"
"""The model type of InternVL in OpenGVLab's own layout, whose code comes with it."""
UNREAD = (
    "; its config is not on this machine, so `vlm-tune check` has to say whether it can be taken"
)
GUESSED_TEMPLATE = "that of LLaVA-1.5: the model's config is not on this machine, so name its own"
LAYOUTS = (
    "; of an InternVL, name the checkpoint in transformers' layout, which ends in -hf: OpenGVLab's "
    "own has code of its own"
)

LLAMA_MODULES = {
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
}  # fmt: skip
"""The linear layers of LLaVA-1.5's language model."""


def set_model(
    conversion: Conversion,
    key: str,
    name: str | None,
    *,
    declared: str | None = None,
    template: str | None = None,
    quantize: str | None = None,
) -> bool:
    """Sets the model, its quantisation and its chat format.

    Args:
        conversion: the configuration on its way.
        key: the key that names the model.
        name: the model's folder or hub name; None where the configuration names none.
        declared: what the configuration says the model is: a family's model type or transformers',
            or `TEXT` or `REMOTE`. The model's config goes first, where it can be read.
        template: our name of the configuration's chat format.
        quantize: how the LLM's weights are packed.

    Returns:
        Whether the connector starts from random weights.
    """
    if conversion.model is not None:
        return _take_users(conversion, quantize)
    unnamed = name is None
    name = name or LLAVA
    config = stored_config(name)
    vlm = None if config is None else vlm_of(name, config)
    model_type = declared if config is None else str(config.get("model_type"))
    if vlm is not None or (config is None and model_type in (None, *FAMILIES)):
        guessed = vlm is None and model_type is None and template is None and name != LLAVA
        chat_format = _family_template(vlm, model_type, template)
        _set_whole(conversion, key, name, vlm, chat_format, guessed=guessed)
        if unnamed:
            reason = f"the configuration has no {key}: name the model"
            conversion.draft.reasons["model.pretrained"] = reason
    elif model_type in native_types():
        _set_native(conversion, key, name, model_type, read=config is not None)
    elif declared in (None, TEXT) and "vision_config" not in (config or {}):
        _set_llm(conversion, key, name, config, template, quantize)
        return True
    else:
        _replace(conversion, key, name, model_type)
    if quantize:
        conversion.set("model.llm", {"quantize": quantize}, "its quantisation")
    return False


def _family_template(vlm: Vlm | None, model_type: str | None, template: str | None) -> str:
    """The chat format of a family's model: by the model, the configuration, or the family."""
    if vlm is not None:
        return whole_template(vlm)
    return template or FAMILIES[model_type or "llava"].templates[-1]


def _set_whole(
    conversion: Conversion,
    key: str,
    name: str,
    vlm: Vlm | None,
    template: str,
    *,
    guessed: bool,
) -> None:
    """Sets a model of a family; `vlm` is None where its config is not on this machine.

    `guessed` says that neither the model nor the configuration tells the family.
    """
    conversion.set("model.pretrained", name, key)
    if vlm is None:
        layouts = LAYOUTS if template == "internvl" else ""
        conversion.draft.reasons["model.pretrained"] += UNREAD + layouts
    reason = GUESSED_TEMPLATE if guessed else "the chat format of this model"
    conversion.draft.set("data.template", template, reason)


def _set_native(
    conversion: Conversion, key: str, name: str, model_type: str | None, *, read: bool
) -> None:
    """Sets a model of transformers of no family; `read` says that its config was read."""
    conversion.model_type = model_type
    draft = conversion.draft
    draft.set("model.kind", "native", NATIVE_REASON)
    conversion.set("model.pretrained", name, key)
    if not read:
        draft.reasons["model.pretrained"] += UNREAD
    draft.set("data.template", OWN_TEMPLATE, OWN_REASON)


def _replace(conversion: Conversion, key: str, name: str, model_type: str | None) -> None:
    """Sets LLaVA-1.5 in place of a model that can't be taken."""
    reason = (
        "transformers has no image-text-to-text model of this type, and code that comes with a "
        f"checkpoint is never run; {family_names()} are taken, and others that transformers has; "
        f"the recipe takes {LLAVA} (--model chooses another)"
    )
    if model_type == OPENGVLAB:
        reason += LAYOUTS
    conversion.arguments.refuse(key, name, reason)
    conversion.draft.set("model.pretrained", LLAVA, f"in place of {quoted(name)}")
    conversion.draft.set("data.template", "vicuna", "the chat format of this model")


def _take_users(conversion: Conversion, quantize: str | None) -> bool:
    """Takes the model that --model names."""
    choice = named_model(str(conversion.model), conversion.tower)
    conversion.model_type = choice.native_type
    draft = conversion.draft
    for name, value in choice.draft.values.items():
        draft.set(name, value, choice.draft.reasons.get(name, ""))
    if quantize:
        llm = {**draft.values.get("model.llm", {}), "quantize": quantize}
        draft.set("model.llm", llm, "named by --model; the quantisation is the configuration's")
    return "model.pretrained" not in draft.values


def _set_llm(
    conversion: Conversion,
    key: str,
    name: str,
    config: dict[str, Any] | None,
    template: str | None,
    quantize: str | None,
) -> None:
    """Sets a language model under a tower, which its configuration does not have."""
    known = config or {}
    seq2seq = bool(known.get("is_encoder_decoder")) or known.get("model_type") == "t5"
    packed = {"quantize": quantize} if quantize else {}
    llm = {"kind": "seq2seq" if seq2seq else "causal", "name": name, **packed}
    conversion.set("model.llm", llm, key)
    draft = conversion.draft
    if "model.tower" not in draft.values:
        section, reason = tower_section(conversion.tower, _width(config) >= LARGE_WIDTH)
        draft.set("model.tower", section, f"the configuration names none; {reason}")
        draft.set("model.connector", {"kind": "mlp", "depth": 2}, "from random weights")
    if seq2seq:
        template = "flan"
    elif template is None:
        try:
            template = causal_template(name)
        except ModelError:  # not on this machine
            template = "chatml"
    draft.set("data.template", template, "the chat format of this language model")


def _width(config: dict[str, Any] | None) -> int:
    """The width of a language model; that of a large one where it is not known."""
    if config is None:
        return LARGE_WIDTH
    return config.get("hidden_size") or config.get("d_model") or 0


def lora_targets(conversion: Conversion, names: list[str], key: str) -> list[str] | str:
    """The modules of a LoRA rule: the configuration's names, or all linear layers."""
    if not names or any(name in ("all", "all-linear") for name in names):
        return "all-linear"
    swapped = conversion.draft.values.get("model.pretrained") == LLAVA and conversion.model is None
    if swapped and not set(names) <= LLAMA_MODULES:
        reason = f"{LLAVA} has no such modules, so all linear layers of its LLM are taken"
        conversion.arguments.refuse(key, names, reason)
        return "all-linear"
    return names


def lora_rule(
    conversion: Conversion,
    rank_key: str,
    targets_key: str | None = None,
    *,
    rank: int,
    alpha: int | None = None,
    dropout: float = 0.05,
) -> dict[str, Any]:
    """The keys of a LoRA rule that the frameworks have in common.

    Args:
        conversion: the configuration on its way.
        rank_key: the framework's key of the rank.
        targets_key: its key of the modules; None where it always takes all linear layers.
        rank: its default rank.
        alpha: its default `lora_alpha`; twice the rank if None.
        dropout: its default dropout.
    """
    arguments = conversion.arguments
    rank = arguments.count(rank_key) or rank
    targets: list[str] | str = "all-linear"
    if targets_key is not None:
        targets = lora_targets(conversion, arguments.names(targets_key), targets_key)
    rule: dict[str, Any] = {
        "r": rank,
        "lora_alpha": arguments.count("lora_alpha") or alpha or 2 * rank,
        "target_modules": targets,
    }
    given = arguments.number("lora_dropout")
    dropout = dropout if given is None else given
    if dropout:
        rule["lora_dropout"] = dropout
    if arguments.flag("use_dora"):
        rule["variant"] = "dora"
    elif arguments.flag("use_rslora"):
        rule["variant"] = "rslora"
    return rule
