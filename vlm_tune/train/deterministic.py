"""Deterministic training on a GPU: the same steps give the same bits, or an error says why not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from vlm_tune.compat import deterministic_compiling
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import TrainingError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Environment variable with the sizes of cuBLAS's workspaces, read before its first product."""

FIXED_WORKSPACES = (":4096:8", ":16:8")
"""Its values with which cuBLAS is deterministic; the first is the faster one."""

NO_IMPLEMENTATION = "does not have a deterministic implementation"
"""Part of torch's message for an operation that it refuses then."""


@contextlib.contextmanager
def determinism(recipe: Recipe) -> Iterator[None]:
    """Within the context torch is deterministic if a stage of the recipe asks for it.

    Sets torch's deterministic algorithms (which the attention kernels follow in their backward
    passes), cuBLAS's workspaces, cuDNN and the compiler, and restores all of them afterwards. Must
    be entered before the process's first product on a GPU. An operation that has no deterministic
    implementation raises `RuntimeError`; see `nondeterministic`.
    """
    if not any(stage.train.deterministic for _, stage in recipe.resolved_stages()):
        yield
        return
    cudnn = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    algorithms = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = memory.fill_uninitialized_memory
    flags = cudnn.benchmark, cudnn.deterministic
    workspace = os.environ.get(WORKSPACE)
    try:
        if workspace not in FIXED_WORKSPACES:
            os.environ[WORKSPACE] = FIXED_WORKSPACES[0]
        torch.use_deterministic_algorithms(True)
        # Writes NaN to all new memory: it finds faults in code and changes no result.
        memory.fill_uninitialized_memory = False
        cudnn.benchmark, cudnn.deterministic = False, True
        with deterministic_compiling():
            yield
    finally:
        torch.use_deterministic_algorithms(algorithms, warn_only=warns)
        memory.fill_uninitialized_memory = fills
        cudnn.benchmark, cudnn.deterministic = flags
        os.environ.pop(WORKSPACE, None)
        if workspace is not None:
            os.environ[WORKSPACE] = workspace


def nondeterministic(error: RuntimeError) -> TrainingError | None:
    """The error for an operation that can't be deterministic; None for another failure."""
    text = str(error)
    if NO_IMPLEMENTATION not in text:  # a `RuntimeError` like any other
        return None
    return TrainingError(
        f"train.deterministic: {text.partition(NO_IMPLEMENTATION)[0].strip()} has no "
        "deterministic form on this device; set train.deterministic: false (--resume "
        "--accept-changes continues)"
    )
