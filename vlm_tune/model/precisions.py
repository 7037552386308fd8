"""The dtypes in which a recipe's weights are loaded, and which of them stay exact."""

from __future__ import annotations

import torch

from vlm_tune.config.native import NativeModel
from vlm_tune.config.recipe import Recipe
from vlm_tune.precision import DTYPES


def trained_later(recipe: Recipe, stage: int) -> set[str]:
    """The parts whose base weights a later stage trains: rounding them now would lose precision."""
    rules = [
        rule
        for _, later in recipe.resolved_stages()[stage + 1 :]
        for rule in later.tune
        if rule.trains_base
    ]
    if isinstance(recipe.model, NativeModel):  # all of its weights are in the module llm
        return {"llm"} if rules else set()
    return {
        part
        for part in ("tower", "llm")
        if any(rule.match.split(".")[0] in (part, "*") for rule in rules)
    }


def load_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype to load the LLM in: the training precision, or fp32 if a stage trains its weights.

    fp32 keeps the base weights exact. A quantised LLM is always loaded in the training precision:
    the parameters that train beside its quantised weights are separate fp32 tensors.
    """
    full = recipe.model.llm.quantize is None and any(
        rule.trains_base and (rule.match.startswith("llm") or rule.match.startswith("*"))
        for _, stage in recipe.resolved_stages()
        for rule in stage.tune
    )
    return torch.float32 if full else DTYPES[recipe.train.precision]
