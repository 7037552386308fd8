"""The language model's blocks compiled: one graph for all that are alike, for every batch size and length.

What is compiled is kept on disk, so that the next run takes it from there. Compiled are training steps, but for decoder layers
that are one kernel there, and the reading of many questions about images and the tokens of their answers (`reading`); tokens
beside a cache stay eager.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from vlm_tune.compat import recompute_operator_inputs
from vlm_tune.kernels.cpu.native import compiler
from vlm_tune.model.acceleration.decoder_layer import DecoderLayer
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.layer_index import block_names
from vlm_tune.model.weights import is_sharded
from vlm_tune.resources import cache_folder

LARGE = 50_000_000
"""Parameters from which a language model is worth the compiler's half minute."""

LONG = 50
"""Optimizer steps from which a stage is."""

MANY = 2000
"""Questions from which their reading is."""


def why_not(llm: LanguageModel, asked: bool | str, steps: int) -> str | None:
    """Why the blocks are not compiled: empty where that is no news, None where they are."""
    if asked is False:
        return ""
    if asked == "auto" and (
        steps < LONG or sum(parameter.numel() for parameter in llm.parameters()) < LARGE
    ):
        return ""
    device = next(llm.parameters()).device.type
    if device == "cpu" and compiler() is None:
        return "no C++ compiler was found, so the blocks are not compiled and a step takes about a third longer"
    if any(getattr(parameter, "CB", None) is not None for parameter in llm.parameters()):
        return "the blocks are not compiled: int8 layers can't be traced"
    return None


def blocks(llm: LanguageModel, *, training: bool) -> list[nn.Module]:
    """Those that a compiler is given: in training none that is one kernel, for there it would find nothing to do."""
    found = [llm.model.get_submodule(name) for name in block_names(llm.model)]
    quick = training and llm.supports_intervals
    return [
        block
        for block in found
        if not (quick and isinstance(block, DecoderLayer) and block.is_ready())
    ]


@contextlib.contextmanager
def compiled(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Blocks run compiled within; compiled when they are first called."""
    if not blocks:
        yield
        return
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        # torch's own place is a temporary folder.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder("compiled"))
    for block in blocks:
        # Batch size and length are symbols: static shapes would be compiled anew for each of a run's many.
        block.compile(dynamic=True)
    try:
        with recompute_operator_inputs():
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # type: ignore[assignment]


def reading(
    llm: LanguageModel, asked: bool | str, questions: int
) -> contextlib.AbstractContextManager[None]:
    """Within, the blocks run compiled while they read so many questions, where `asked` and the model allow it."""
    if (
        asked is False
        or (asked == "auto" and questions < MANY)
        or why_not(llm, asked, LONG) is not None
    ):
        return contextlib.nullcontext()
    ready = llm.supports_intervals and not any(
        is_sharded(parameter) for parameter in llm.parameters()
    )
    return compiled(blocks(llm, training=False)) if ready else contextlib.nullcontext()


def eager() -> contextlib.AbstractContextManager[Any]:
    """Within, compiled blocks run as they are written."""
    return torch.compiler.set_stance("force_eager")
