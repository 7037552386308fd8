"""Differences between versions of other libraries, and workarounds, for the whole package."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
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


def attention_name(model: Any) -> str:
    """The name of the attention function of a transformers model."""
    return model.config._attn_implementation


def supports_attention_functions(model: Any) -> bool:
    """Whether a transformers model calls the attention function of its config's name."""
    return bool(model._supports_attention_backend)


def register_attention(name: str, function: Callable[..., Any], *, masks_of: str) -> None:
    """Registers an attention function with transformers.

    Its masks are those of the function `masks_of` ("eager" or "sdpa").
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(name, function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masks_of])


def sdpa_attention(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """transformers' attention by torch's scaled dot product."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*args, **kwargs)


def eager_attention(module: Any) -> Callable[..., tuple[Any, Any]]:
    """transformers' attention by matrix products, which each model's file defines for itself."""
    return sys.modules[type(module).__module__].eager_attention_forward


def has_hooks(module: Any) -> bool:
    """Whether a module has forward hooks of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def set_attention(config: Any, name: str) -> None:
    """Sets the attention function of the transformers models that have this config."""
    config._attn_implementation = name


def compile_calls(module: Any, eager: Callable[[tuple[Any, ...], dict[str, Any]], bool]) -> None:
    """Compiles a module's calls, with symbolic shapes.

    Args:
        module: The module; each is compiled at its first call.
        eager: Says from a call's arguments whether it runs without the compiled code.
    """
    module.compile(dynamic=True)
    compiled = module._compiled_call_impl
    plain = module._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        return (plain if eager(args, kwargs) else compiled)(*args, **kwargs)

    module._compiled_call_impl = call


def forget_compiled_calls(module: Any) -> None:
    """Makes a module's calls run eagerly again."""
    module._compiled_call_impl = None


def submodules(module: Any) -> dict[str, Any]:
    """A module's children by name, empty places (None) included."""
    return module._modules
