"""Instruction tuning of vision-language LLMs; `import vlm_tune` loads no torch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vlm_tune.version import __version__

# bitsandbytes warns of an optional package on every import without it; 4 bit works all the same.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in str(record.msg)
)

if TYPE_CHECKING:
    from vlm_tune.api import compare, dpo, evaluate, grpo, kto, predict, report, sft, sweep
    from vlm_tune.config.load import load_recipe
    from vlm_tune.data_check.check import check
    from vlm_tune.exporting import export
    from vlm_tune.exporting.merge import merge
    from vlm_tune.generation.chat import VisionLanguageModel
    from vlm_tune.memory_plan.plan import plan
    from vlm_tune.model.vlm import VisionLanguageConfig
    from vlm_tune.recipe_writer.init import init
    from vlm_tune.serving.run import serve
    from vlm_tune.train.replay import verify_run

_HOMES = {
    "VisionLanguageModel": "vlm_tune.generation.chat",
    "VisionLanguageConfig": "vlm_tune.model.vlm",
    "load_recipe": "vlm_tune.config.load",
    "sft": "vlm_tune.api",
    "dpo": "vlm_tune.api",
    "kto": "vlm_tune.api",
    "grpo": "vlm_tune.api",
    "check": "vlm_tune.data_check.check",
    "compare": "vlm_tune.api",
    "evaluate": "vlm_tune.api",
    "merge": "vlm_tune.exporting.merge",
    "verify_run": "vlm_tune.train.replay",
    "export": "vlm_tune.exporting",
    "plan": "vlm_tune.memory_plan.plan",
    "predict": "vlm_tune.api",
    "report": "vlm_tune.api",
    "sweep": "vlm_tune.api",
    "init": "vlm_tune.recipe_writer.init",
    "serve": "vlm_tune.serving.run",
}

__all__ = [
    "VisionLanguageConfig",
    "VisionLanguageModel",
    "__version__",
    "check",
    "compare",
    "dpo",
    "evaluate",
    "export",
    "grpo",
    "init",
    "kto",
    "load_recipe",
    "merge",
    "plan",
    "predict",
    "report",
    "serve",
    "sft",
    "sweep",
    "verify_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlm_tune' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
