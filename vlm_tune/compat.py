"""Differences between versions of other libraries, and workarounds, for the whole package."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from functools import cache
from typing import Any

HARMLESS = ("transformers.configuration_utils", "bitsandbytes.backends.cpu.ops")
"""Loggers whose warnings are harmless.

They warn of a config.json of our own type, and of a 4-bit kernel that is not installed.
"""


@contextmanager
def without_harmless_warnings() -> Iterator[None]:
    """Context in which the loggers of `HARMLESS` report errors only; their levels are restored."""
    loggers = [logging.getLogger(name) for name in HARMLESS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@cache
def cache_name() -> str:
    """Returns transformers' name of the KV cache, as an argument and in outputs.

    It is `cache` from 5.24 on and `past_key_values` before.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return (
        "cache"
        if "cache" in {field.name for field in fields(BaseModelOutputWithPast)}
        else "past_key_values"
    )


def recompute_operator_inputs() -> AbstractContextManager[Any]:
    """Context in which a compiled backward pass recomputes operators' inputs from saved tensors.

    It does so where elementwise work gives them. Otherwise torch saves them: both a norm's input
    and its output, which is a product of the input.
    """
    from torch._functorch import config

    return config.patch(ban_recompute_materialized_backward=False)


def build_no_shared_memory_op() -> None:
    """Keeps DeepSpeed from compiling its shared-memory operator, which training does not call.

    DeepSpeed compiles it silently as processes join, behind a lock file that outlives a killed
    process: every later run then waits for that file for ever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
