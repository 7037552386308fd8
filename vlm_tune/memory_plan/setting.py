"""The devices and options that a plan is made for, and the checks of what the user sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import Problem, RecipeError, check_count
from vlm_tune.memory_plan.results import Offload
from vlm_tune.memory_plan.traced_stage import TracedStage
from vlm_tune.quoting import quoted

MOST_PROCESSES = 1_000_000
UNITS = {
    "": 1,
    "B": 1,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
LONGEST = 1_000_000
"""Most tokens of a row that `tokens` may set."""


@dataclass(frozen=True)
class Setting:
    """The devices and options of a plan.

    `tokens` is a row's length if the user sets it, `base` the bytes that are taken before the run.
    `known` caches the traced stages, so that a change of processes alone needs no new trace.
    """

    processes: int
    zero: int
    tokens: int | None
    gpu: bool
    offload: Offload
    base: int
    known: dict[Any, TracedStage] = field(default_factory=dict)


def check_arguments(gpu_memory: Any, processes: Any, zero: Any, offload: Any, tokens: Any) -> None:
    """Raises `RecipeError` for an argument of another kind than `plan` takes."""
    if not isinstance(gpu_memory, str):
        check_count("--gpu-memory", gpu_memory)
    check_count("--processes", processes)
    if processes > MOST_PROCESSES:
        raise RecipeError(
            [Problem("--processes", f"expected at most {MOST_PROCESSES:,}, not {processes:,}")]
        )
    if zero not in (0, 1, 2, 3):
        raise RecipeError([Problem("--zero", f"expected 0 to 3, not {quoted(zero)}")])
    if offload not in get_args(Offload):
        raise RecipeError(
            [
                Problem(
                    "--offload", f"{quoted(offload)} is not one of {', '.join(get_args(Offload))}"
                )
            ]
        )
    check_count("--tokens", tokens)
    if tokens is not None and not 2 <= tokens <= LONGEST:
        raise RecipeError([Problem("--tokens", f"expected 2 to {LONGEST:,}, not {tokens:,}")])


def parse_size(text: str) -> int:
    """Bytes of a text like 24GB or 22.5 GiB. Raises `RecipeError` for any other text."""
    number = text.strip().rstrip("BGMTbgmti ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise RecipeError(
            [Problem("--gpu-memory", f"{quoted(text)} is not a size such as 24GB or 40GiB")]
        ) from None
    if size <= 0:
        raise RecipeError(
            [Problem("--gpu-memory", f"expected a size above 0 such as 24GB, not {quoted(text)}")]
        )
    return size


def check_setting(recipe: Recipe, setting: Setting) -> None:
    """Raises `RecipeError` for settings that exclude each other."""
    int8 = recipe.model.llm.quantize == "int8"
    least = {"none": 0, "optimizer": 1, "all": 3}[setting.offload]
    rules = (
        (
            setting.zero < least,
            "--offload",
            f"{setting.offload} needs --zero {least}{'' if least == 3 else ' or more'}, "
            f"not {setting.zero}",
        ),
        (
            int8 and setting.zero == 3,
            "--zero",
            "ZeRO-3 can't shard an LLM in int8 (model.llm.quantize), only nf4 or fp4; use --zero 2",
        ),
    )
    problems = [Problem(option, message) for broken, option, message in rules if broken]
    if problems:
        raise RecipeError(problems)
