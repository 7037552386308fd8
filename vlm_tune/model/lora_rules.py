"""The tune rules of LoRA: the layers that one gives adapters to, and PEFT's config of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlm_tune.compat import is_attention_projection
from vlm_tune.config.tune import LORA_RANK, TuneRule
from vlm_tune.errors import ModelError
from vlm_tune.model.lora import (
    PISSA,
    attach_adapter,
    clean,
    is_adapter,
    is_pissa,
    merge_adapter,
    parts,
    rule_name,
    same_adapter,
    start_from_singular_vectors,
)
from vlm_tune.model.task_adapters import attach_task_adapters
from vlm_tune.model.task_sharing import TaskSharing
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.quoting import quoted

ADAPTER_KEYS = {"r", "lora_alpha", "lora_dropout", "variant", "init", "pissa_niter"}
"""Keys of a rule that describe a whole adapter."""
INITS: dict[str, Any] = {"default": True, "gaussian": "gaussian", "pissa": PISSA}
"""PEFT's names of the initialisations of LoRA."""


def apply_lora_rules(
    model: VisionLanguageNetwork,
    rules: Sequence[TuneRule],
    owner: dict[str, int],
    device: torch.device | None = None,
    tasks: Sequence[str] = (),
) -> None:
    """Attaches, keeps or merges each part's LoRA layers as the rules require.

    `owner` has the index of each parameter's rule by name. PiSSA's singular vectors are computed on
    `device`, if None on that of the weights. `tasks` are those of the rows, for a rule by which
    each has an adapter of its own. Raises `ModelError` if adapters of tasks would have to be
    merged.
    """
    for part, module in parts(model).items():
        places = lora_places(model, part, rules, owner)
        _check_together(model, part, [rules[place] for place in places])
        config = _lora_config(model, part, rules, places, owner) if places else None
        present = model.adapters.get(part)
        sharing = _sharing(rules[places[0]], tasks) if places else None
        present_sharing = model.sharing if part == "llm" else None
        if (
            present is not None
            and config is not None
            and sharing == present_sharing
            and same_adapter(module, present.peft_config["default"], config)
        ):
            continue
        if present_sharing is not None:
            raise ModelError(
                f"tune: the llm has adapters of the tasks {', '.join(present_sharing.tasks)}, "
                "and can't have all merged into it; give a later stage the same LoRA rule and tasks"
            )
        if present is not None:
            merge_adapter(model, part)
        if config is not None and sharing is not None:
            attach_task_adapters(model, config, sharing)
        elif config is not None:
            attach_adapter(model, part, config)
            if is_pissa(config):
                start_from_singular_vectors(module, config, device)


def _sharing(rule: TuneRule, tasks: Sequence[str]) -> TaskSharing | None:
    """How the rule has tasks share its adapter; None where all have the same."""
    return TaskSharing(tuple(tasks), rule.shared_layers or 0) if rule.by_task else None


def _check_together(model: VisionLanguageNetwork, part: str, rules: Sequence[TuneRule]) -> None:
    """Raises `ModelError` for LoRA rules of one part that one adapter can't follow."""
    if len(rules) < 2:
        return
    if not model.llm.native:
        raise ModelError(f"tune: {len(rules)} LoRA rules match the {part}; a part has one adapter")
    first, *others = [rule.model_dump(include=ADAPTER_KEYS) for rule in rules]
    differing = sorted({key for other in others for key in other if other[key] != first[key]})
    if differing:
        raise ModelError(
            "tune: a native model has one adapter, so its LoRA rules must have the same "
            f"{', '.join(differing)}"
        )


def lora_places(
    model: VisionLanguageNetwork, part: str, rules: Sequence[TuneRule], owner: dict[str, int]
) -> list[int]:
    """The indices of the LoRA rules that cover a parameter of a part."""
    return [
        place
        for place, rule in enumerate(rules)
        if rule.how == "lora"
        and any(
            (model.llm.native or name.startswith(f"{part}.")) and owner_place == place
            for name, owner_place in owner.items()
        )
    ]


def _lora_config(
    model: VisionLanguageNetwork,
    part: str,
    rules: Sequence[TuneRule],
    places: Sequence[int],
    owner: dict[str, int],
) -> Any:
    """PEFT's LoRA config of a part, for the rules at the indices `places`.

    Raises `ModelError` if a rule or one of its target modules matches no linear layer.
    """
    from peft import LoraConfig

    module = parts(model)[part]
    chosen: list[str] = []
    for place in places:
        layers = _adaptable_layers(model, module, rules[place])
        matched = [
            name for name in layers if owner.get(rule_name(model, part, f"{name}.weight")) == place
        ]
        chosen += _target_layers(rules[place], matched)
    rule = rules[places[0]]
    alpha = rule.lora_alpha or 2 * (rule.r or LORA_RANK)
    init = INITS[rule.init or "default"]
    if rule.pissa_niter:
        init = f"{PISSA}_niter_{rule.pissa_niter}"
    short = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    # PEFT takes all modules with a last name, also those that are no linear layers.
    every = {clean(f"{name}.").removesuffix(".") for name, _ in module.named_modules()}
    exact = {name for name in every if name.rsplit(".", 1)[-1] in short} == set(chosen) and all(
        "." in name for name in chosen
    )
    return LoraConfig(
        r=rule.r or LORA_RANK,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        lora_dropout=rule.lora_dropout or 0.0,
        target_modules=short if exact else sorted(chosen),
        bias="none",
        use_rslora=rule.variant == "rslora",
        use_dora=rule.variant == "dora",
        init_lora_weights=init,  # type: ignore[arg-type]
        task_type=None
        if part != "llm"
        else "SEQ_2_SEQ_LM"
        if model.llm.layout == "seq2seq"
        else "CAUSAL_LM",
        base_model_name_or_path=model.config.llm.name if part == "llm" else None,
    )


def _adaptable_layers(
    model: VisionLanguageNetwork, module: nn.Module, rule: TuneRule
) -> dict[str, nn.Module]:
    """The layers of a part that LoRA can be attached to, by name.

    Raises `ModelError` if one is an embedding that PiSSA would have to initialise.
    """
    named = rule.target_modules if isinstance(rule.target_modules, list) else []
    # The head and the embedding get LoRA only if target_modules names them.
    apart = {id(model.llm.head), id(model.llm.model.get_input_embeddings())}
    apart |= {
        id(getattr(layer, "base_layer", None))
        for layer in (model.llm.head, model.llm.model.get_input_embeddings())
    }
    every = {
        short: layer
        for name, layer in module.named_modules()
        if not is_adapter(name)
        and (short := clean(f"{name}.").removesuffix("."))
        and (
            any(short == target or short.endswith(f".{target}") for target in named)
            if id(layer) in apart
            else is_linear(layer)
        )
    }
    if rule.init == "pissa" and any(isinstance(layer, nn.Embedding) for layer in every.values()):
        raise ModelError(
            f"tune: the LoRA rule {quoted(rule.match)} is init: pissa, "
            "which takes linear layers' weights, and names the embedding"
        )
    return every


def _target_layers(rule: TuneRule, matched: list[str]) -> list[str]:
    """The layers that get LoRA among those that a rule covers: all, or its target modules.

    Raises `ModelError` if there is none, or one of the target modules is not one of these layers.
    """
    if isinstance(rule.target_modules, list):
        chosen = [
            name
            for name in matched
            if any(name == target or name.endswith(f".{target}") for target in rule.target_modules)
        ]
        unused = [
            target
            for target in rule.target_modules
            if not any(n == target or n.endswith(f".{target}") for n in chosen)
        ]
        if unused:
            kinds = sorted({name.rsplit(".", 1)[-1] for name in matched})
            raise ModelError(
                f"tune: target_modules {unused} match no linear layer of {quoted(rule.match)}; "
                f"it has {', '.join(kinds)}"
            )
    else:
        chosen = matched
    if not chosen:
        raise ModelError(
            f"tune: the LoRA rule {quoted(rule.match)} matches no linear layer; train what it "
            "matches with how: full, or leave it frozen"
        )
    return chosen


def is_linear(layer: nn.Module) -> bool:
    """Whether LoRA can be attached to a layer: torch's or GPT-2's linear one that is called."""
    if is_attention_projection(layer):
        return False  # never called: LoRA there would change nothing
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
