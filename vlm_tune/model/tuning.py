"""Ordered tune rules: which parameters train, how, and at which learning rate.

Every parameter must be covered by a rule, and every rule must match a parameter.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence

import torch
from torch import nn

from vlm_tune.config.grpo import Grpo
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.tune import TuneRule
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.errors import ModelError
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.new_prompt import new_prompt
from vlm_tune.model.language.virtual_tokens import KINDS, TOKENS
from vlm_tune.model.layer_index import block_names, columns
from vlm_tune.model.lora import clean, is_adapter, is_trained_adapter, parts, rule_name
from vlm_tune.model.lora_rules import apply_lora_rules
from vlm_tune.model.optimizer_groups import Tuned, collect_groups
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import castable
from vlm_tune.quoting import quoted


def check_fits(llm: LanguageModel, rows: Prepared, stage: Recipe) -> None:
    """Checks that a language model supports a stage's rows.

    Raises `ModelError` if they are longer than its positions, or joined and it can't separate them.
    Answers to one prompt are joined too, also those that are sampled in training.
    """
    virtual = max(
        (rule.tokens or TOKENS for rule in stage.tune if rule.how in ("prompt", "prefix")),
        default=0,
    )
    llm.check_length(rows.longest + virtual)
    several = rows.store.has_answers or isinstance(stage.objective, Grpo)
    if rows.joins or (several and llm.reads_branches):
        llm.check_joined()


def apply_rules(
    model: VisionLanguageNetwork,
    rules: Sequence[TuneRule],
    *,
    learning_rate: float,
    precision: torch.dtype,
    exact: Collection[str] = (),
    device: torch.device | None = None,
    tasks: Sequence[str] = (),
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
        device: where PiSSA's singular vectors are computed; if None, where the weights are.
        tasks: the tasks of the rows, for a LoRA rule by which each has an adapter of its own.

    Raises:
        ModelError: no rule covers a parameter; a rule matches no parameter, or none that it can
            train; adapters would have to be merged into quantised weights; LoRA lies behind frozen
            gates of value 0; or other virtual tokens exist already.
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
    apply_lora_rules(model, rules, owner, device, tasks)
    _prompt(model, rules, precision)
    _freeze_and_cast(model, owner, _trained(model, rules, owner), precision, exact)
    if "connector" in model.adapters and model.connector.closed:
        raise ModelError(
            "tune: the connector's gates are 0 and frozen, so LoRA in its blocks gets no gradient: "
            'train them by a rule before it, {match: "connector.*_gate", how: full}'
        )
    return collect_groups(model, rules, owner, learning_rate)


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
                names.setdefault(id(parameter), []).append(rule_name(model, part, name))
    return list(names.values())


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
                    names.add(rule_name(model, part, f"{name}.{leaf}"))
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
        halves -= _beside_trained(model, part, trained)
        for name, parameter in module.named_parameters():
            base = rule_name(model, part, name) in trained
            changes |= base
            if base and not parameter.dtype.is_floating_point:
                raise ModelError(
                    f"{rule_name(model, part, name)} is packed in {model.config.llm.quantize}, "
                    "and quantised weights can't be trained; use how: lora "
                    "for what its rule matches, or drop model.llm.quantize"
                )
            if parameter.dtype.is_floating_point:
                half = not base and not is_adapter(name) and id(parameter) in halves
                parameter.data = parameter.data.to(precision if half else torch.float32)
                parameter.requires_grad_(base or is_trained_adapter(name))
        if changes and part == "llm" and _kept_apart(model, trained):
            model.beside |= {name.partition(".")[2] for name in _of_llm(model, trained)}
        elif changes and part != "connector":
            model.changed.add(part)


def _kept_apart(model: VisionLanguageNetwork, trained: set[str]) -> bool:
    """Whether the LLM's trained weights are saved without its other weights, which stay its base's.

    This is so beside quantised layers, if only the rows of new tokens train, and in a native model.
    """
    if "llm" in model.changed or model.config.llm.name is None:
        return False
    if model.llm.native:
        return True
    names = _of_llm(model, trained)
    return bool(model.config.llm.quantize) or (
        bool(model.config.llm.words) and names <= vocabulary_weights(model)
    )


def _of_llm(model: VisionLanguageNetwork, names: Collection[str]) -> set[str]:
    """Those of the names that rules know parameters of the module `llm` by."""
    return {name for name in names if model.llm.native or name.startswith("llm.")}


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


def _beside_trained(model: VisionLanguageNetwork, part: str, trained: set[str]) -> set[int]:
    """The ids of a norm's parameters if one of them trains.

    The frozen ones stay in fp32 too: torch has no norm whose weight and bias differ in dtype.
    """
    ids: set[int] = set()
    for name, layer in parts(model)[part].named_modules():
        layer_parameters = dict(layer.named_parameters(recurse=False))
        if all(value.dim() < 2 for value in layer_parameters.values()) and any(
            rule_name(model, part, f"{name}.{key}") in trained for key in layer_parameters
        ):
            ids |= {id(value) for value in layer_parameters.values()}
    return ids
