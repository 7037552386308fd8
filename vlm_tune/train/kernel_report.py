"""Reports what computes the steps of a stage."""

from __future__ import annotations

import torch

from vlm_tune.config.recipe import Recipe
from vlm_tune.events import Acceleration, StageReport
from vlm_tune.model.acceleration.install import running
from vlm_tune.model.optimizer_groups import Tuned
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.precision import DTYPES


def report_kernels(
    model: VisionLanguageNetwork,
    recipe: Recipe,
    tuned: Tuned,
    device: torch.device,
    report: StageReport,
) -> None:
    """Reports which parts of the language model train by the kernels, and why others do not.

    On a GPU it reports how the language model attends. Where none of it trains, nothing.
    """
    precision = DTYPES[recipe.train.precision]
    if device.type != "cuda" and (device.type != "cpu" or precision == torch.float32):
        return
    if not any(name.startswith("llm.") for group in tuned.names for name in group):
        return
    kernels = running(model.llm, precision, device)
    report(
        Acceleration(
            str(kernels),
            dict(kernels.replaced),
            {kind: dict(reasons) for kind, reasons in kernels.skipped.items()},
        )
    )
