"""The functions of `import vlm_tune`: train, score, predict, merge, export; the CLI calls them."""

from __future__ import annotations

from vlm_tune.api.scoring import compare, evaluate, evaluate_model, predict, report
from vlm_tune.api.sweeping import sweep
from vlm_tune.api.training import dpo, grpo, kto, sft
from vlm_tune.exporting import export
from vlm_tune.exporting.merge import merge
from vlm_tune.train.replay import verify_run

__all__ = [
    "compare",
    "dpo",
    "evaluate",
    "evaluate_model",
    "export",
    "grpo",
    "kto",
    "merge",
    "predict",
    "report",
    "sft",
    "sweep",
    "verify_run",
]
