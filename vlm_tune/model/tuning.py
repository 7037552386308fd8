"""Ordered rules decide what trains: frozen, full or LoRA; every parameter is covered, every rule matches something."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vlm_tune.config import TuneRule
from vlm_tune.errors import ModelError
from vlm_tune.model.vlm import VisionLanguageModel
from vlm_tune.model.weights import castable

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TuneRow:
    """One line of the tuning table: a rule and the parameters it decides about."""

    match: str
    how: str
    learning_rate: float | None
    trained: int
    total: int
    detail: str


@dataclass
class Tuned:
    """Optimizer groups by rule, and the table that is printed and saved."""

    groups: list[dict[str, Any]]
    names: list[list[str]]
    table: list[TuneRow]


def parts(model: VisionLanguageModel) -> dict[str, nn.Module]:
    """The model's parts under the names that rules use; llm.* continues with transformers' own names."""
    return {"tower": model.tower, "connector": model.connector, "llm": model.llm.model}


def clean(name: str) -> str:
    """A parameter's name without what PEFT adds to it."""
    return name.replace(".base_layer.", ".")


def base_parameters(model: VisionLanguageModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter that is not an adapter's, by rule name."""
    for part, module in parts(model).items():
        for name, parameter in module.named_parameters():
            if "lora_" not in name:
                yield f"{part}.{clean(name)}", parameter


def apply_rules(
    model: VisionLanguageModel,
    rules: Sequence[TuneRule],
    *,
    learning_rate: float,
    precision: torch.dtype,
    exact: Collection[str] = (),
) -> Tuned:
    """Freezes, unfreezes and adds LoRA as the rules say; frozen weights go to `precision`, trained ones to fp32.

    The parts named in `exact` stay in fp32 though frozen: a later stage trains them in full.

    Adapters of an earlier stage stay if the rules ask for the same ones, else they are merged first. Raises
    `ModelError` for parameters no rule covers, rules that match nothing, and adapters that would have to be merged
    into quantised weights.
    """
    owner, uncovered = _owners(model, rules)
    if uncovered:
        raise ModelError(
            f"no tune rule covers {', '.join(uncovered[:5])}{' ...' if len(uncovered) > 5 else ''}; end the list with a catch-all"
        )
    for place, rule in enumerate(rules):
        if place not in owner.values():
            raise ModelError(f"the tune rule {rule.match!r} matches nothing; parameters are named as {', '.join(list(owner)[:3])}, ...")
    _adapters(model, rules, owner)
    _freeze_and_cast(model, rules, owner, precision, exact)
    return _collect(model, rules, owner, learning_rate)


def _owners(model: VisionLanguageModel, rules: Sequence[TuneRule]) -> tuple[dict[str, int], list[str]]:
    owner: dict[str, int] = {}
    uncovered: list[str] = []
    for name, _ in base_parameters(model):
        place = next((place for place, rule in enumerate(rules) if fnmatch.fnmatchcase(name, rule.match)), None)
        if place is None:
            uncovered.append(name)
        else:
            owner[name] = place
    return owner, uncovered


def _adapters(model: VisionLanguageModel, rules: Sequence[TuneRule], owner: dict[str, int]) -> None:
    """Brings each part's LoRA layers to what the rules ask for."""
    for part, module in parts(model).items():
        asked = [
            place
            for place, rule in enumerate(rules)
            if rule.how == "lora" and any(name.startswith(f"{part}.") and where == place for name, where in owner.items())
        ]
        if len(asked) > 1:
            raise ModelError(f"{len(asked)} LoRA rules match the {part}; a part has one adapter")
        config = _lora_config(part, module, rules[asked[0]], asked[0], owner, model) if asked else None
        present = model.adapters.get(part)
        if present is not None and config is not None and _same(present.peft_config["default"], config):
            continue
        if present is not None:
            merge_adapter(model, part)
        if config is not None:
            attach_adapter(model, part, config)


def _lora_config(part: str, module: nn.Module, rule: TuneRule, place: int, owner: dict[str, int], model: VisionLanguageModel) -> Any:
    from peft import LoraConfig

    head = {id(model.llm.head)}
    every = {
        clean(f"{name}.").removesuffix("."): layer
        for name, layer in module.named_modules()
        if _is_linear(layer) and id(layer) not in head and "lora_" not in name
    }
    matched = [name for name in every if owner.get(f"{part}.{name}.weight") == place]
    if isinstance(rule.target_modules, list):
        chosen = [name for name in matched if any(name == target or name.endswith(f".{target}") for target in rule.target_modules)]
        unused = [target for target in rule.target_modules if not any(n == target or n.endswith(f".{target}") for n in chosen)]
        if unused:
            kinds = sorted({name.rsplit(".", 1)[-1] for name in matched})
            raise ModelError(f"target_modules {unused} match no linear layer of {rule.match!r}; it has {', '.join(kinds)}")
    else:
        chosen = matched
    if not chosen:
        raise ModelError(f"the LoRA rule {rule.match!r} matches no linear layer")
    alpha = rule.lora_alpha or 2 * (rule.r or 16)
    short = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    exact = [name for name in every if name.rsplit(".", 1)[-1] in short] == chosen and all("." in name for name in chosen)
    return LoraConfig(
        r=rule.r or 16,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        lora_dropout=rule.lora_dropout or 0.0,
        target_modules=short if exact else sorted(chosen),
        bias="none",
        task_type=None if part == "tower" else "SEQ_2_SEQ_LM" if model.llm.layout == "seq2seq" else "CAUSAL_LM",
        base_model_name_or_path=model.config.llm.name if part == "llm" else None,
    )


def _is_linear(layer: nn.Module) -> bool:
    # nn.MultiheadAttention reads its output projection's weight and never calls it: LoRA there would change nothing.
    uncalled = isinstance(layer, NonDynamicallyQuantizableLinear)
    return (isinstance(layer, nn.Linear) and not uncalled) or type(layer).__name__ == "Conv1D"


def _same(one: Any, other: Any) -> bool:
    return all(getattr(one, key) == getattr(other, key) for key in ("r", "lora_alpha", "lora_dropout")) and set(one.target_modules) == set(
        other.target_modules
    )


def attach_adapter(model: VisionLanguageModel, part: str, config: Any) -> None:
    """Puts LoRA layers into a part, in place, weights as PEFT initialises them (a change of nothing)."""
    from peft.tuners.lora import LoraModel

    from vlm_tune.model.fused import LoraLinear

    if not model.config.llm.quantize or part != "llm":
        config._register_custom_module({nn.Linear: LoraLinear})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.adapters[part] = LoraModel(parts(model)[part], {"default": config}, "default")
    for name, parameter in parts(model)[part].named_parameters():
        if "lora_" in name:
            # PEFT makes them as the base is, and what is read into half precision is no longer what was saved.
            parameter.data = parameter.data.float()


def merge_adapter(model: VisionLanguageModel, part: str) -> None:
    """Adds a part's LoRA change to its base weights and removes the adapter.

    Raises `ModelError` for quantised base weights, which can't hold the sum, and for sums that are not finite.
    """
    if part == "llm" and model.config.llm.quantize:
        raise ModelError("an adapter can't be merged into quantised weights; load the 16-bit base and merge into that")
    try:
        model.adapters.pop(part).merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"merging the {part}'s adapter: {error}") from None
    model.changed.add(part)


def _freeze_and_cast(
    model: VisionLanguageModel, rules: Sequence[TuneRule], owner: dict[str, int], precision: torch.dtype, exact: Collection[str]
) -> None:
    for part, module in parts(model).items():
        full, halves = False, set() if part in exact else {id(parameter) for parameter in castable(module)}
        for name, parameter in module.named_parameters():
            lora = "lora_" in name
            trained = lora or rules[owner[f"{part}.{clean(name)}"]].how == "full"
            full |= trained and not lora
            if parameter.dtype.is_floating_point:
                parameter.data = parameter.data.to(precision if not trained and id(parameter) in halves else torch.float32)
                parameter.requires_grad_(trained)
        if full and part != "connector":
            model.changed.add(part)


def _collect(model: VisionLanguageModel, rules: Sequence[TuneRule], owner: dict[str, int], learning_rate: float) -> Tuned:
    members: list[list[tuple[str, nn.Parameter]]] = [[] for _ in rules]
    totals = [0] * len(rules)
    for part, module in parts(model).items():
        lora_place = next(
            (
                p
                for p, rule in enumerate(rules)
                if rule.how == "lora" and any(n.startswith(f"{part}.") and w == p for n, w in owner.items())
            ),
            0,
        )
        for name, parameter in module.named_parameters():
            place = lora_place if "lora_" in name else owner[f"{part}.{clean(name)}"]
            totals[place] += _count(parameter)
            if parameter.requires_grad:
                members[place].append((f"{part}.{name}", parameter))
    groups, names, table = [], [], []
    for rule, found, total in zip(rules, members, totals, strict=True):
        rate = rule.learning_rate or learning_rate
        if found:
            groups.append({"params": [parameter for _, parameter in found], "lr": rate})
            names.append([name for name, _ in found])
        detail = f"r={rule.r or 16}, alpha={rule.lora_alpha or 2 * (rule.r or 16):g}" if rule.how == "lora" else ""
        trained = sum(parameter.numel() for _, parameter in found)
        table.append(TuneRow(rule.match, rule.how, rate if found else None, trained, total, detail))
    return Tuned(groups, names, table)


def _count(parameter: nn.Parameter) -> int:
    """Numbers a parameter stands for: bitsandbytes packs two 4-bit weights in a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
