"""Names that other libraries changed from one version to the next; the rest of the package asks here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from functools import cache
from typing import Any

HARMLESS = ("transformers.configuration_utils", "bitsandbytes.backends.cpu.ops")
"""Loggers that warn of what is meant to be so: a config.json of our own type, and a 4-bit kernel that is not installed."""


@contextmanager
def without_harmless_warnings() -> Iterator[None]:
    """Within, the loggers of `HARMLESS` tell errors alone; their levels come back after."""
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
    """transformers' name of the KV cache, as an argument and in outputs: `cache` from 5.24 on, `past_key_values` before."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return (
        "cache"
        if "cache" in {field.name for field in fields(BaseModelOutputWithPast)}
        else "past_key_values"
    )


def recompute_operator_inputs() -> AbstractContextManager[Any]:
    """Within, a compiler's backward pass computes the inputs of operators anew where elementwise work from what is saved gives them.

    torch saves them otherwise: a norm's input and its output, of which the latter is a product of the former.
    """
    from torch._functorch import config

    return config.patch(ban_recompute_materialized_backward=False)


def build_no_shared_memory_op() -> None:
    """Keeps DeepSpeed from compiling an operator for exchange through shared memory, which training does not call.

    It is compiled as processes join, without a word, behind a lock file that outlives a killed process: every later run
    then waits for that file for ever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
