"""The language model's blocks compiled for training: one graph for all that are alike, for every batch size and length.

What is compiled is kept on disk, so that the next run takes it from there. Evaluation stays eager: it reads a few rows
of other shapes with a cache, and would be compiled for more seconds than it takes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from vlm_tune.model.blocks import block_names
from vlm_tune.model.llm import LanguageModel
from vlm_tune.model.tree_attention import compiler
from vlm_tune.resources import cache_folder

LARGE = 50_000_000
"""Parameters from which a language model is worth the compiler's half minute."""

LONG = 50
"""Optimizer steps from which a stage is."""


def why_not(llm: LanguageModel, asked: bool | str, steps: int) -> str | None:
    """Why the blocks are not compiled: empty where that is no news, None where they are."""
    if asked is False:
        return ""
    if asked == "auto" and (steps < LONG or sum(parameter.numel() for parameter in llm.parameters()) < LARGE):
        return ""
    device = next(llm.parameters()).device.type
    if device == "cpu" and compiler() is None:
        return "no C++ compiler was found, so the blocks are not compiled and a step takes about a third longer"
    if any(getattr(parameter, "CB", None) is not None for parameter in llm.parameters()):
        return "the blocks are not compiled: int8 layers can't be traced"
    return None


@contextlib.contextmanager
def compiled(llm: LanguageModel) -> Iterator[None]:
    """The blocks run compiled within; compiled when they are first called."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        # torch's own place is a temporary folder.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder("compiled"))
    blocks: list[Any] = [llm.model.get_submodule(name) for name in block_names(llm.model)]
    for block in blocks:
        # Batch size and length are symbols: static shapes would be compiled anew for each of a run's many.
        block.compile(dynamic=True)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def eager() -> contextlib.AbstractContextManager[Any]:
    """Within, compiled blocks run as they are written."""
    return torch.compiler.set_stance("force_eager")
