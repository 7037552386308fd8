"""Objectives of other frameworks' trainers of preferences and rewards."""

from __future__ import annotations

import re
from typing import Any, get_args

from vlm_tune.config.grpo import GrpoLoss
from vlm_tune.config.objectives import DpoLoss
from vlm_tune.recipe_writer.converting.conversion import Conversion

REWARDS: dict[str, Any] = {
    "accuracy": "trl.rewards:accuracy_reward",
    "accuracy_reward": "trl.rewards:accuracy_reward",
    "reasoning_accuracy_reward": "trl.rewards:reasoning_accuracy_reward",
    "think_format_reward": "trl.rewards:think_format_reward",
    "format": {
        "function": "format",
        "arguments": {"pattern": r"<think>.*?</think>\s*<answer>.*?</answer>"},
    },
}
"""Our names of the reward functions of TRL's and ms-swift's own."""
NUMBERS = ("temperature", "top_p", "epsilon", "epsilon_high", "beta")
COUNTS = ("num_generations", "max_completion_length", "num_iterations", "top_k")
"""Keys of GRPO that mean the same here, numbers and whole numbers."""
SCALES = {"group": "group", "batch": "batch", "none": "none", "true": "group", "false": "none"}
"""Our values of `scale_rewards` by TRL's of all releases."""
UNSHARDED = "generation and a reference model need whole weights"


def set_dpo(conversion: Conversion, key: str, beta: float, losses: dict[str, float]) -> None:
    """Sets DPO, with the weights of its losses by name; those that are not here are refused."""
    known = {name: weight for name, weight in losses.items() if name in get_args(DpoLoss)}
    for name in (name for name in losses if name not in known):
        reason = f"the losses of dpo are {', '.join(get_args(DpoLoss))}"
        conversion.arguments.refuse(key, name, reason)
    if not known.keys() - {"sft"}:
        known = {"sigmoid": 1.0, **known}
    objective: dict[str, Any] = {"kind": "dpo", "beta": beta, "loss_type": next(iter(known))}
    if len(known) > 1:
        objective |= {"loss_type": list(known), "loss_weights": list(known.values())}
    conversion.set("objective", objective, key)


def set_grpo(conversion: Conversion, key: str, defaults: dict[str, Any]) -> None:
    """Sets GRPO from keys that TRL and ms-swift share, over the framework's `defaults`."""
    arguments = conversion.arguments
    objective: dict[str, Any] = {"kind": "grpo", "reward_funcs": _reward_functions(conversion)}
    objective |= defaults
    for name in COUNTS:
        count = arguments.count(name)
        if count is not None:
            objective[name] = count
    if objective.get("num_generations") == 1:
        reason = "a group has 2 completions at least, which are compared with each other"
        raise arguments.unsupported("num_generations", 1, reason)
    for name in NUMBERS:
        number = arguments.number(name)
        if number is not None:
            objective[name] = number
    weights = arguments.numbers("reward_weights")
    if len(weights) == len(objective["reward_funcs"]):
        objective["reward_weights"] = weights
    elif weights:
        arguments.refuse("reward_weights", weights, "some of its functions have no counterpart")
    loss = arguments.text("loss_type")
    if loss in get_args(GrpoLoss):
        objective["loss_type"] = loss
    elif loss:
        reason = f"the losses of grpo are {', '.join(get_args(GrpoLoss))}"
        arguments.refuse("loss_type", loss, reason)
    level = arguments.text("importance_sampling_level")
    if level in ("token", "sequence"):
        objective["importance_sampling_level"] = level
    elif level:
        reason = "ratios are those of tokens or sequences"
        arguments.refuse("importance_sampling_level", level, reason)
    scale = arguments.word("scale_rewards")
    if scale in SCALES:
        objective["scale_rewards"] = SCALES[scale]
    elif scale:
        reason = f"rewards are scaled by {', '.join(SCALES)}"
        arguments.refuse("scale_rewards", scale, reason)
    if arguments.flag("mask_truncated_completions") | arguments.flag("overlong_filter"):
        objective["mask_truncated_completions"] = True
    conversion.set("objective", objective, key)


def _reward_functions(conversion: Conversion) -> list[Any]:
    """Our names of a configuration's reward functions, and a metric where none is left."""
    functions: list[Any] = []
    for name in conversion.arguments.names("reward_funcs"):
        if name in REWARDS:
            functions.append(REWARDS[name])
        elif re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
            module, _, function = name.rpartition(".")
            functions.append(f"{module}:{function}")
        else:
            reason = (
                "name a function by objective.reward_funcs (docs/rewards.md); without any it is "
            )
            reason += "exact_match"
            conversion.arguments.refuse("reward_funcs", name, reason)
    return functions or ["exact_match"]


def settle(conversion: Conversion) -> None:
    """Leaves out what the recipe's objective, or a stream of rows, can't have."""
    values = conversion.draft.values
    kind = values.get("objective", {}).get("kind")
    if kind is not None:
        _settle_objective(conversion, values["objective"])
    if not values.get("data.streaming"):
        return
    if kind in ("grpo", "kto"):
        conversion.leave_out("data.streaming", "streaming", f"{kind} needs prepared rows")
    elif "train.steps" not in values:
        reason = "a stream has no epochs, and no max_steps are given: rows are prepared"
        conversion.leave_out("data.streaming", "streaming", reason)
    else:
        reason = "a stream is read by the training process"
        conversion.leave_out("train.loader_workers", "dataloader_num_workers", reason)
        reason = "rows of a stream are not held out: name validation data"
        conversion.leave_out("data.split", "the share of rows that is held out", reason)


def _settle_objective(conversion: Conversion, objective: dict[str, Any]) -> None:
    """Fits the reference model, and what else is of the whole recipe."""
    draft = conversion.draft
    refers = objective["kind"] in ("dpo", "kto") or objective.get("beta", 0) > 0
    by_adapter = all(
        rule["how"] == "frozen" or (rule["how"] == "lora" and rule.get("variant") != "dora")
        for rule, _ in draft.rules
    )
    if objective["kind"] in ("dpo", "kto", "grpo") and refers and not by_adapter:
        objective["reference"] = "copy"
    grpo = objective["kind"] == "grpo"
    engine = draft.values.get("engine", {})
    shards = engine.get("kind") == "fsdp" or engine.get("stage") == 3
    if shards and (grpo or objective.get("reference") == "copy"):
        key = "fsdp" if engine["kind"] == "fsdp" else "deepspeed"
        conversion.leave_out("engine", key, f"{UNSHARDED}, so the engine is ZeRO-2")
        draft.set("engine", {"kind": "deepspeed", "stage": 2})
    if grpo:
        conversion.leave_out("data.packing", "packing", "completions of each prompt are sampled")
        reason = "grpo samples the last answer of whole rows"
        if draft.values.get("data.overlong") in ("split", "trim"):
            draft.set("data.overlong", "drop", reason)
