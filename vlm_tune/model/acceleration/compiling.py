"""Compiles the language model's blocks: one graph for each kind of block, for all input shapes.

Compiled code is cached on disk, and the next run loads it from there. Blocks are compiled for
training steps, except decoder layers that one kernel computes there, and for answering many
questions about images (`reading`): on a CPU for the prefill and the decode steps of the answers, on
a GPU for the decode steps. Tokens beside a transformers KV cache that grows run eagerly.

A block's `forward` is compiled, inside of the hooks of its calls: FSDP2 gathers the block's weights
in these and shards them again, and the compiled code gets whole weights.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from vlm_tune.compat import (
    checkpoint_function,
    checkpointed_forward,
    default_compile_cache,
    is_kv_cache,
    recompute_operator_inputs,
)
from vlm_tune.kernels.cpu.native import compiler
from vlm_tune.model.acceleration.decoder_layers import DecoderLayer
from vlm_tune.model.acceleration.interval_attention import CACHE
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.kv_cache import layer_cache, takes_static_cache
from vlm_tune.model.layer_index import block_names
from vlm_tune.model.weights import is_sharded
from vlm_tune.resources import cache_folder

LARGE = 50_000_000
"""Parameters of a language model from which compiling, which takes half a minute, pays."""

LONG = 50
"""Optimizer steps of a stage from which compiling pays."""

MANY = 2000
"""Questions from which compiling for their prefill pays."""


def why_not(llm: LanguageModel, setting: bool | str, steps: int) -> str | None:
    """The reason why the blocks are not compiled.

    Args:
        llm: The language model, on the device where it runs.
        setting: The recipe's `compile`: True, False or "auto".
        steps: Optimizer steps of the stage.

    Returns:
        A message for the user; an empty string where they need none; None if blocks are compiled.
    """
    if setting is False or (llm.native and setting == "auto"):
        return ""
    if llm.native:
        return "the blocks of a native model are not compiled"
    if setting == "auto" and (
        steps < LONG or sum(parameter.numel() for parameter in llm.parameters()) < LARGE
    ):
        return ""
    device = next(llm.parameters()).device.type
    if device == "cpu" and compiler() is None:
        return (
            "no C++ compiler was found, so the blocks are not compiled and a step takes about a "
            "third longer"
        )
    if any(getattr(parameter, "CB", None) is not None for parameter in llm.parameters()):
        return "the blocks are not compiled: int8 layers can't be traced"
    return None


def blocks(llm: LanguageModel, *, training: bool) -> list[nn.Module]:
    """The blocks to compile.

    For training, decoder layers that one kernel computes are left out: in them nothing is left to
    compile.
    """
    candidates = [llm.model.get_submodule(name) for name in block_names(llm.model)]
    quick = training and llm.supports_intervals
    return [
        block
        for block in candidates
        if not (quick and isinstance(block, DecoderLayer) and block.built_reason() is None)
    ]


@contextlib.contextmanager
def compiled(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Runs these blocks compiled within the context; each is compiled at its first call."""
    if not blocks:
        yield
        return
    if (
        os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_compile_cache())
        == default_compile_cache()
    ):
        # torch's default cache is in a temporary folder.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder("compiled"))
    try:
        for block in blocks:
            _compile_forward(block)
        with recompute_operator_inputs():
            yield
    finally:
        for block in blocks:
            # Another thread that evaluates the model may have removed it.
            block.__dict__.pop("forward", None)


def _compile_forward(block: Any) -> None:
    """Gives a block a compiled `forward` of its own, which hides that of its class.

    Checkpointing stays outside of the compiled code: a compiler does not trace through it what
    projections of the same input hand to each other.
    """
    plain = block.forward
    checkpointed = checkpointed_forward(block)
    # Batch size and length are symbolic: static shapes would be compiled again for each of the many
    # shapes of a run, and a CUDA graph, which is off by default, captured for each.
    inner = plain if checkpointed is None else MethodType(checkpointed, block)
    quick = torch.compile(inner, dynamic=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if _runs_eagerly(args, kwargs):
            return plain(*args, **kwargs)
        name = next((name for name, value in kwargs.items() if is_kv_cache(value)), None)
        if name is not None:
            layer = layer_cache(kwargs[name], block)
            if layer is None:
                return plain(*args, **kwargs)
            kwargs[name] = layer
        checkpoint = None
        if checkpointed is not None and torch.is_grad_enabled():
            checkpoint = checkpoint_function(block)
        if checkpoint is None:
            return quick(*args, **kwargs)
        return checkpoint(partial(quick, **kwargs), *args)

    block.forward = forward


def _runs_eagerly(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of a compiled block runs eagerly, where it would be compiled once more.

    That is in generation on a CPU, for a size of 1, and for a cache that is no keyword.
    """
    states = args[0] if args else kwargs["hidden_states"]
    return any(map(is_kv_cache, args)) or (kwargs.get(CACHE) is not None and 1 in states.shape[:2])


def reading(
    llm: LanguageModel, setting: bool | str, questions: int
) -> contextlib.AbstractContextManager[None]:
    """Runs the blocks compiled while questions are answered, where the setting and model allow it.

    Args:
        llm: The language model, on the device where it runs.
        setting: The recipe's `compile`: True, False or "auto" (compile from `MANY` questions).
        questions: How many questions are answered within the context.
    """
    if (
        setting is False
        or (setting == "auto" and questions < MANY)
        or why_not(llm, setting, LONG) is not None
    ):
        return contextlib.nullcontext()
    ready = (llm.supports_intervals or _decodes_statically(llm)) and not any(
        is_sharded(parameter) for parameter in llm.parameters()
    )
    return compiled(blocks(llm, training=False)) if ready else contextlib.nullcontext()


def _decodes_statically(llm: LanguageModel) -> bool:
    """Whether answers are written by decode steps whose KV cache has a fixed size."""
    continued = llm.layout == "causal" and llm.uncontinued is None
    return continued and takes_static_cache(llm.model, next(llm.parameters()).device)


def eager() -> contextlib.AbstractContextManager[Any]:
    """Runs compiled blocks eagerly within the context."""
    return torch.compiler.set_stance("force_eager")
