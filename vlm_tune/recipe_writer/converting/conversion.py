"""Shared by the converters of all frameworks: the arguments, the draft, and what trains."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vlm_tune.recipe_writer.converting.arguments import Arguments
from vlm_tune.recipe_writer.draft import Draft


@dataclass
class Conversion:
    """A configuration on its way to a recipe.

    Attributes:
        framework: The framework's name.
        folder: The configuration's folder.
        arguments: Its keys and values.
        draft: The recipe.
        model: The model that the user names in place of the configuration's.
        tower: The tower that the user names.
        model_type: transformers' type of a native model, where it is known.
    """

    framework: str
    folder: Path
    arguments: Arguments
    model: str | None = None
    tower: str | None = None
    draft: Draft = field(default_factory=Draft)
    model_type: str | None = None

    @property
    def native(self) -> bool:
        """Whether the recipe's model is of `kind: native`."""
        return self.draft.values.get("model.kind") == "native"

    def set(self, name: str, value: Any, key: str = "") -> None:
        """Sets a value of the recipe, and the key that it comes from as its reason."""
        self.draft.set(name, value, f"from {key}" if key else "")

    def set_or_default(self, name: str, given: Any, default: Any, key: str) -> None:
        """Sets the value that a key has, or the framework's default where `given` is None."""
        if given is None:
            self.draft.set(name, default, f"{self.framework}'s default of {key}")
        else:
            self.set(name, given, key)

    def leave_out(self, name: str, key: str, reason: str) -> None:
        """Takes a value out of the recipe, if it is there: the `key` has no counterpart."""
        value = self.draft.values.pop(name, None)
        if value is not None:
            self.draft.reasons.pop(name, None)
            self.arguments.refuse(key, value, reason)


Method = Literal["lora", "full"]
ONE_MATRIX = "gemma3"
"""The chat format of the family whose connector has no linear layer."""


@dataclass
class WhatTrains:
    """Which parts of the model train, how, and at which rates.

    `lora` has the keys of a LoRA rule, `last_layers` is the number of the LLM's blocks that train
    alone, None for all. A rate of None is the common one. `connector_by_lora`
    says that the framework trains the connector by LoRA where it does the LLM.
    """

    method: Method = "lora"
    tower: bool = False
    connector: bool = True
    llm: bool = True
    lora: dict[str, Any] = field(default_factory=dict)
    last_layers: int | None = None
    tower_rate: float | None = None
    connector_rate: float | None = None
    connector_by_lora: bool = True


def set_rules(conversion: Conversion, trains: WhatTrains, *, new_connector: bool) -> None:
    """Writes the rules of `tune`; a connector from random weights trains in any case."""
    draft = conversion.draft
    framework = conversion.framework
    if conversion.native and trains.last_layers:
        reason = "the last blocks of a native model don't train alone; the recipe takes LoRA"
        conversion.arguments.refuse("finetuning_type", "freeze", reason)
        trains = replace(trains, method="lora", last_layers=None)
    if trains.tower:
        _rule(draft, "tower.*", trains, trains.tower_rate, f"{framework} trains the tower")
    else:
        draft.rule(f"{framework} leaves the tower as it is", match="tower.*", how="frozen")
    if trains.connector or new_connector:
        _connector_rule(conversion, trains, new_connector=new_connector)
    else:
        draft.rule(f"{framework} leaves the connector as it is", match="connector.*", how="frozen")
    if trains.llm:
        _rule(draft, "llm.*", trains, None, f"{framework} trains the LLM")
    else:
        draft.rule(f"{framework} leaves the LLM as it is", match="llm.*", how="frozen")


def _connector_rule(conversion: Conversion, trains: WhatTrains, *, new_connector: bool) -> None:
    """Writes the rule of a connector that trains, in full where LoRA could not do it."""
    reason = f"{conversion.framework} trains the connector"
    if trains.method == "lora" and not trains.connector_by_lora:
        trains = replace(trains, method="full")
    if new_connector:
        trains = replace(trains, method="full")
        reason = "the connector starts from random weights here, so it has to train"
    elif trains.method == "lora" and conversion.draft.values.get("data.template") == ONE_MATRIX:
        trains = replace(trains, method="full")
        reason += "; it is one matrix in no linear layer, so not by LoRA"
    _rule(conversion.draft, "connector.*", trains, trains.connector_rate, reason)


def _rule(draft: Draft, match: str, trains: WhatTrains, rate: float | None, reason: str) -> None:
    how: dict[str, Any] = {"how": "full"}
    if trains.last_layers and match == "llm.*":
        how = {"how": "last_layers", "layers": trains.last_layers}
    if trains.method == "lora":
        lora = dict(trains.lora)
        if match != "llm.*":  # names of the LLM's modules are not those of other parts
            lora["target_modules"] = "all-linear"
        how = {"how": "lora", **lora}
    draft.rule(reason, match=match, **how, **({"learning_rate": rate} if rate else {}))
