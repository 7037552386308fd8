"""Ordered tune rules: which parameters train, how, and at which learning rate.

Every parameter must be covered by a rule, and every rule must match a parameter.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vlm_tune.config.tune import TuneRule
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.errors import ModelError
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.new_prompt import new_prompt
from vlm_tune.model.language.virtual_tokens import KINDS
from vlm_tune.model.layer_index import block_names, columns, depths
from vlm_tune.model.lora import (
    PISSA,
    attach_adapter,
    clean,
    is_adapter,
    is_trained_adapter,
    merge_adapter,
    parts,
    same_adapter,
)
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import castable
from vlm_tune.quoting import quoted

INITS: dict[str, Any] = {"default": True, "gaussian": "gaussian", "pissa": PISSA}
"""PEFT's names of the initialisations of LoRA."""
TOKENS = 20
"""Default number of virtual tokens."""


@dataclass(frozen=True)
class TuneRow:
    """One line of the tuning table: a rule, and how many parameters it covers and trains."""

    match: str
    how: str
    learning_rate: float | None
    trained: int
    total: int
    detail: str


@dataclass
class Tuned:
    """Optimizer groups with their parameters' names, and the table that is printed and saved."""

    groups: list[dict[str, Any]]
    names: list[list[str]]
    table: list[TuneRow]


def base_parameters(model: VisionLanguageNetwork) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields every parameter that is not an adapter's, with the name that rules match."""
    for part, module in parts(model).items():
        for name, parameter in module.named_parameters():
            if not is_adapter(name):
                yield f"{part}.{clean(name)}", parameter


def check_fits(llm: LanguageModel, rows: Prepared, rules: Sequence[TuneRule]) -> None:
    """Checks that a language model supports a stage's rows.

    Raises `ModelError` if they are longer than its positions, or joined and it can't separate them.
    """
    virtual = max(
        (rule.tokens or TOKENS for rule in rules if rule.how in ("prompt", "prefix")), default=0
    )
    llm.check_length(rows.longest + virtual)
    if rows.joins:
        llm.check_joined()


def apply_rules(
    model: VisionLanguageNetwork,
    rules: Sequence[TuneRule],
    *,
    learning_rate: float,
    precision: torch.dtype,
    exact: Collection[str] = (),
) -> Tuned:
    """Freezes, unfreezes and adds LoRA as the rules say, and builds the optimizer groups.

    Adapters of an earlier stage stay if the rules describe the same ones; otherwise they are merged
    first. Virtual tokens of an earlier stage stay.

    Args:
        model: the model, changed in place.
        rules: the stage's rules; the first one that matches a parameter decides about it.
        learning_rate: for rules without one of their own.
        precision: the dtype of frozen weights; trained ones are fp32.
        exact: parts that stay in fp32 even if frozen, because a later stage trains them in full.

    Raises:
        ModelError: no rule covers a parameter; a rule matches no parameter, or none that it can
            train; adapters would have to be merged into quantised weights; or other virtual tokens
            exist already.
    """
    owner, uncovered = _owners(model, rules)
    if uncovered:
        raise ModelError(
            f"no tune rule covers {', '.join(uncovered[:5])}"
            f"{' ...' if len(uncovered) > 5 else ''}; end the list with a catch-all"
        )
    for place, rule in enumerate(rules):
        if place not in owner.values():
            raise ModelError(
                f"tune: the rule {quoted(rule.match)} matches nothing; "
                f"parameters are named as {', '.join(list(owner)[:3])}, ..."
            )
    _adapters(model, rules, owner)
    _prompt(model, rules, precision)
    _freeze_and_cast(model, owner, _trained(model, rules, owner), precision, exact)
    return _collect(model, rules, owner, learning_rate)


def _owners(
    model: VisionLanguageNetwork, rules: Sequence[TuneRule]
) -> tuple[dict[str, int], list[str]]:
    """The index of the rule that covers each parameter, by name, and the names without a rule."""
    owner: dict[str, int] = {}
    uncovered: list[str] = []
    for names in _all_names(model):
        place = next(
            (
                place
                for place, rule in enumerate(rules)
                if any(fnmatch.fnmatchcase(name, rule.match) for name in names)
            ),
            None,
        )
        if place is None:
            uncovered.append(names[0])
        else:
            owner |= dict.fromkeys(names, place)
    return owner, uncovered


def _all_names(model: VisionLanguageNetwork) -> list[list[str]]:
    """The names of every parameter that is not an adapter's.

    A weight that the head shares with the embedding has two names.
    """
    names: dict[int, list[str]] = {}
    for part, module in parts(model).items():
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if not is_adapter(name):
                names.setdefault(id(parameter), []).append(f"{part}.{clean(name)}")
    return list(names.values())


def _adapters(
    model: VisionLanguageNetwork, rules: Sequence[TuneRule], owner: dict[str, int]
) -> None:
    """Attaches, keeps or merges each part's LoRA layers as the rules require.

    `owner` has the index of each parameter's rule by name.
    """
    for part, module in parts(model).items():
        lora_places = [
            place
            for place, rule in enumerate(rules)
            if rule.how == "lora"
            and any(
                name.startswith(f"{part}.") and owner_place == place
                for name, owner_place in owner.items()
            )
        ]
        if len(lora_places) > 1:
            raise ModelError(
                f"tune: {len(lora_places)} LoRA rules match the {part}; a part has one adapter"
            )
        config = (
            _lora_config(part, module, rules[lora_places[0]], lora_places[0], owner, model)
            if lora_places
            else None
        )
        present = model.adapters.get(part)
        if (
            present is not None
            and config is not None
            and same_adapter(present.peft_config["default"], config)
        ):
            continue
        if present is not None:
            merge_adapter(model, part)
        if config is not None:
            attach_adapter(model, part, config, fresh=True)


def _lora_config(
    part: str,
    module: nn.Module,
    rule: TuneRule,
    place: int,
    owner: dict[str, int],
    model: VisionLanguageNetwork,
) -> Any:
    """PEFT's LoRA config of a part, for the rule at index `place`.

    Raises `ModelError` if the rule or one of its target modules matches no linear layer.
    """
    from peft import LoraConfig

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
    matched = [name for name in every if owner.get(f"{part}.{name}.weight") == place]
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
        raise ModelError(f"tune: the LoRA rule {quoted(rule.match)} matches no linear layer")
    alpha = rule.lora_alpha or 2 * (rule.r or 16)
    short = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    exact = [name for name in every if name.rsplit(".", 1)[-1] in short] == chosen and all(
        "." in name for name in chosen
    )
    return LoraConfig(
        r=rule.r or 16,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        lora_dropout=rule.lora_dropout or 0.0,
        target_modules=short if exact else sorted(chosen),
        bias="none",
        use_rslora=rule.variant == "rslora",
        use_dora=rule.variant == "dora",
        init_lora_weights=INITS[rule.init or "default"],
        task_type=None
        if part == "tower"
        else "SEQ_2_SEQ_LM"
        if model.llm.layout == "seq2seq"
        else "CAUSAL_LM",
        base_model_name_or_path=model.config.llm.name if part == "llm" else None,
    )


def is_linear(layer: nn.Module) -> bool:
    """Whether LoRA can be attached to a layer: torch's or GPT-2's linear one that is called."""
    # nn.MultiheadAttention reads its output projection's weight and never calls it: LoRA there
    # would change nothing.
    uncalled = isinstance(layer, NonDynamicallyQuantizableLinear)
    return (isinstance(layer, nn.Linear) and not uncalled) or type(layer).__name__ == "Conv1D"


def _prompt(
    model: VisionLanguageNetwork, rules: Sequence[TuneRule], precision: torch.dtype
) -> None:
    """Creates the virtual tokens that a rule requires.

    Those of an earlier stage stay, and train if a rule requires the same ones again. Raises
    `ModelError` for several such rules, and for a rule that would replace existing virtual tokens.
    """
    prompt_rules = [rule for rule in rules if rule.how in KINDS]
    if len(prompt_rules) > 1:
        raise ModelError(
            f"tune: {len(prompt_rules)} rules put virtual tokens before the llm's input; one can"
        )
    present = model.llm.prompt
    if prompt_rules:
        kind = KINDS[prompt_rules[0].how]
        tokens = prompt_rules[0].tokens or TOKENS
        if present is None:
            with torch.autocast(model.device.type, precision, enabled=precision != torch.float32):
                model.llm.prompt = new_prompt(
                    model.llm, prompt_rules[0].how, tokens, model.config.llm.name
                )
        elif type(present) is not kind or present.tokens != tokens:
            raise ModelError(
                f"the llm has a {type(present).__name__} of {present.tokens} tokens already; "
                "a later stage can train it on "
                "(with the same how and tokens) or leave it as it is, but not replace it"
            )
    if model.llm.prompt is not None:
        model.llm.prompt.requires_grad_(bool(prompt_rules))


def _trained(
    model: VisionLanguageNetwork, rules: Sequence[TuneRule], owner: dict[str, int]
) -> set[str]:
    """The names of the base parameters that train.

    Raises `ModelError` for a rule that matches no parameter of its kind.
    """
    # The rows of new tokens get their values only from training, whichever rule matches them.
    trained = vocabulary_weights(model) if model.config.llm.words else set[str]()
    for place, rule in enumerate(rules):
        if not rule.trains_base:
            continue
        owned = {name for name, owner_place in owner.items() if owner_place == place}
        rule_names = owned if rule.how == "full" else owned & _of_kind(model, rule, owned)
        if not rule_names:
            raise ModelError(
                f"tune: the rule {quoted(rule.match)} is how: {rule.how}, "
                "and there are none in what it matches"
            )
        trained |= rule_names
    return trained


def _of_kind(model: VisionLanguageNetwork, rule: TuneRule, owned: set[str]) -> set[str]:
    """The names of the base parameters that a rule's `how` selects.

    These are the parameters in the last of the blocks that it owns, all norms, or all biases.
    """
    names: set[str] = set()
    for part, module in parts(model).items():
        if rule.how == "last_layers":
            if any(name.startswith(f"{part}.") for name in owned):
                names |= _last_blocks(part, module, rule, owned)
            continue
        for name, layer in module.named_modules():
            for leaf, _ in layer.named_parameters(recurse=False):
                norm = "norm" in type(layer).__name__.lower()
                if norm if rule.how == "norms" else leaf == "bias" or leaf.endswith("_bias"):
                    names.add(clean(f"{part}.{name}.{leaf}"))
    return names


def _last_blocks(part: str, module: nn.Module, rule: TuneRule, owned: set[str]) -> set[str]:
    """Of the `owned` names those in the part's last `rule.layers` blocks, in each tower of a pair.

    Raises `ModelError` if the rule matches some blocks but fewer than that.
    """
    names: set[str] = set()
    for prefix, column in columns(module).items():
        blocks = [f"{part}.{prefix}{block}." for block in block_names(column)]
        matched = [block for block in blocks if any(name.startswith(block) for name in owned)]
        wanted = rule.layers or 1
        if 0 < len(matched) < wanted:
            raise ModelError(
                f"tune: the rule {quoted(rule.match)} wants the last {wanted} blocks, "
                f"and matches {len(matched)}"
            )
        names |= {name for name in owned if name.startswith(tuple(matched[-wanted:]))}
    return names


def _freeze_and_cast(
    model: VisionLanguageNetwork,
    owner: dict[str, int],
    trained: set[str],
    precision: torch.dtype,
    exact: Collection[str],
) -> None:
    """Sets `requires_grad` and the dtype of every parameter, and records which weights will change.

    The model's `changed` and `beside` are updated. Raises `ModelError` for trained base weights
    that are quantised.
    """
    for part, module in parts(model).items():
        changes = False
        halves = set() if part in exact else {id(parameter) for parameter in castable(module)}
        halves -= _beside_trained(part, module, trained)
        for name, parameter in module.named_parameters():
            base = f"{part}.{clean(name)}" in trained
            changes |= base
            if base and not parameter.dtype.is_floating_point:
                raise ModelError(
                    f"{part}.{clean(name)} is packed in {model.config.llm.quantize}, "
                    "and quantised weights can't be trained; use how: lora "
                    "for what its rule matches, or drop model.llm.quantize"
                )
            if parameter.dtype.is_floating_point:
                half = not base and not is_adapter(name) and id(parameter) in halves
                parameter.data = parameter.data.to(precision if half else torch.float32)
                parameter.requires_grad_(base or is_trained_adapter(name))
        if changes and part == "llm" and _kept_apart(model, trained):
            model.beside |= {
                name.removeprefix("llm.") for name in trained if name.startswith("llm.")
            }
        elif changes and part != "connector":
            model.changed.add(part)


def _kept_apart(model: VisionLanguageNetwork, trained: set[str]) -> bool:
    """Whether the LLM's trained weights are saved without its other weights, which stay its base's.

    This is so beside quantised layers, and if only the rows of new tokens train.
    """
    if "llm" in model.changed or model.config.llm.name is None:
        return False
    names = {name for name in trained if name.startswith("llm.")}
    return bool(model.config.llm.quantize) or (
        bool(model.config.llm.words) and names <= vocabulary_weights(model)
    )


def vocabulary_weights(model: VisionLanguageNetwork) -> set[str]:
    """The names of the embedding's and the head's base parameters, as rules match them."""
    language = model.llm.model
    layers = [language.get_input_embeddings(), language.get_output_embeddings()]
    wanted = {
        id(parameter)
        for layer in layers
        for name, parameter in layer.named_parameters()
        if not is_adapter(name)
    }
    return {
        f"llm.{clean(name)}"
        for name, parameter in language.named_parameters(remove_duplicate=False)
        if id(parameter) in wanted and not is_adapter(name)
    }


def _beside_trained(part: str, module: nn.Module, trained: set[str]) -> set[int]:
    """The ids of a norm's parameters if one of them trains.

    The frozen ones stay in fp32 too: torch has no norm whose weight and bias differ in dtype.
    """
    ids: set[int] = set()
    for name, layer in module.named_modules():
        layer_parameters = dict(layer.named_parameters(recurse=False))
        if all(value.dim() < 2 for value in layer_parameters.values()) and any(
            clean(f"{part}.{name}.{key}") in trained for key in layer_parameters
        ):
            ids |= {id(value) for value in layer_parameters.values()}
    return ids


def _collect(
    model: VisionLanguageNetwork,
    rules: Sequence[TuneRule],
    owner: dict[str, int],
    learning_rate: float,
) -> Tuned:
    """Builds the optimizer groups, one per rule and factor of its learning rate, and the table."""
    members: list[list[tuple[str, nn.Parameter, float]]] = [[] for _ in rules]
    totals = [0] * len(rules)
    for part, module in parts(model).items():
        lora_place = next(
            (
                p
                for p, rule in enumerate(rules)
                if rule.how == "lora"
                and any(n.startswith(f"{part}.") and w == p for n, w in owner.items())
            ),
            0,
        )
        under = _depths(part, module, rules, owner)
        for name, parameter in module.named_parameters():
            place = lora_place if is_adapter(name) else owner[f"{part}.{clean(name)}"]
            totals[place] += count_of(parameter)
            if parameter.requires_grad:
                members[place].append(
                    (f"{part}.{name}", parameter, _factor(rules[place], name, under))
                )
    prompt = next((place for place, rule in enumerate(rules) if rule.how in KINDS), None)
    if prompt is not None and model.llm.prompt is not None:
        values = model.llm.prompt.values
        totals[prompt] += values.numel()
        members[prompt].append(("llm.prompt.values", values, 1.0))
    groups = []
    names = []
    table = []
    for rule, rule_members, total in zip(rules, members, totals, strict=True):
        rate = rule.learning_rate or learning_rate
        factors = sorted({factor for _, _, factor in rule_members}, reverse=True)
        for factor in factors:
            groups.append(
                {
                    "params": [
                        parameter
                        for _, parameter, parameter_factor in rule_members
                        if parameter_factor == factor
                    ],
                    "lr": rate * factor,
                }
            )
            names.append(
                [name for name, _, parameter_factor in rule_members if parameter_factor == factor]
            )
        trained = sum(parameter.numel() for _, parameter, _ in rule_members)
        table.append(
            TuneRow(
                rule.match,
                rule.how,
                rate if rule_members else None,
                trained,
                total,
                _detail(rule, rate, factors),
            )
        )
    return Tuned(groups, names, table)


def _depths(
    part: str, module: nn.Module, rules: Sequence[TuneRule], owner: dict[str, int]
) -> dict[str, int]:
    """The depths of the part's parameters, if a rule for it has a layer decay; empty otherwise."""
    decayed = {place for place, rule in enumerate(rules) if rule.layer_decay is not None}
    if not any(where in decayed and name.startswith(f"{part}.") for name, where in owner.items()):
        return {}
    return {
        f"{prefix}{name}": depth
        for prefix, column in columns(module).items()
        for name, depth in depths(column, language=part == "llm").items()
    }


def _factor(rule: TuneRule, name: str, under: dict[str, int]) -> float:
    """The factor of a parameter's learning rate, from LoRA+ or the layer decay."""
    if rule.lora_plus_ratio is not None:
        return rule.lora_plus_ratio if "lora_B" in name else 1.0
    return 1.0 if rule.layer_decay is None else rule.layer_decay ** under[name]


def _detail(rule: TuneRule, rate: float, factors: Sequence[float]) -> str:
    """The table's details of a rule beside its learning rate."""
    phrases = []
    if rule.how == "last_layers":
        phrases.append(f"last {rule.layers}")
    if rule.layer_decay is not None and factors:
        phrases.append(
            f"decay={rule.layer_decay:g}, from {rate * factors[0]:.2g} to {rate * factors[-1]:.2g}"
        )
    if rule.how in KINDS:
        phrases.append(f"{rule.tokens or TOKENS} tokens")
    if rule.how == "lora":
        phrases.append(f"r={rule.r or 16}, alpha={rule.lora_alpha or 2 * (rule.r or 16):g}")
        phrases += [
            name for name in (rule.variant, rule.init) if name not in (None, "lora", "default")
        ]
        if rule.lora_plus_ratio is not None:
            phrases.append(f"B at {rate * rule.lora_plus_ratio:.2g}")
    return ", ".join(phrases)


def count_of(parameter: nn.Parameter) -> int:
    """The number of weights in a parameter; bitsandbytes packs two 4-bit weights in a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
