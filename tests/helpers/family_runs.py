"""What holds for a run over every family's checkpoint, in the folder `vlm` beside the run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.helpers.tiny_models import (
    batch_of,
    built,
    interrupted,
    largest,
    parsed,
    rows_of,
    tuned_by,
)
from tests.invariants.test_resume import assert_same_runs, run_of
from vlm_tune.api import sft
from vlm_tune.exporting.merge import merge
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.memory_plan.plan import plan
from vlm_tune.model.build import build_processor
from vlm_tune.model.checkpoint import load_model


def logits_of(model: VisionLanguageModel, rows: Any) -> torch.Tensor:
    """The supervised logits [S, V] of rows in one batch."""
    with torch.no_grad():
        batch = batch_of(
            model.eval(), [example for row in rows for example in model.processor.examples(row)]
        )
        return model.llm.supervised_logits(model.embed(batch), batch)


def assert_resumed_and_merged(recipe: str, folder: Path) -> None:
    """An interrupted run ends with the bits of a whole one; merged, it needs the original no more.

    The merged folder opens by itself, and as a recipe's start.
    """
    settings: dict[str, Any] = {"train__log_every": 1, "evaluate__every": 2}
    whole, stopped = (
        parsed(
            recipe.replace(str(folder / "run"), str(folder / name)),
            **settings,
            train__checkpoints={"keep": 10},
        )
        for name in ("whole", "stopped")
    )
    sft(whole)
    interrupted(lambda show: run_of(stopped, show=show), stage=0, step=2)
    run_of(stopped, resume=True)
    assert_same_runs(folder / "whole", folder / "stopped")
    trained = load_model(folder / "whole", dtype=torch.float32, model_class=VisionLanguageModel)
    rows = rows_of(whole)
    expected = logits_of(trained, rows)
    assert largest(logits_of(built(whole), rows), expected) > 1e-3
    merge(folder / "whole", folder / "merged", dtype="fp32")
    (folder / "vlm").rename(folder / "gone")
    merged = load_model(folder / "merged", dtype=torch.float32, model_class=VisionLanguageModel)
    assert merged.processor.images == trained.processor.images
    assert largest(logits_of(merged, rows), expected) <= 1e-4
    again = built(parsed(recipe.replace(str(folder / "vlm"), str(folder / "merged"))))
    assert largest(logits_of(again, rows), expected) <= 1e-4


def assert_planned_without_weights(recipe: str, folder: Path) -> None:
    """A plan knows what trains, and the tokens and media of each prompt, from configs alone."""
    config = parsed(recipe)
    model = built(config)
    table = tuned_by(model, config).table
    (folder / "vlm" / "model.safetensors").unlink()
    (stage,) = plan(config).stages
    assert [(row.match, row.trained, row.total) for row in stage.tuning] == [
        (row.match, row.trained, row.total) for row in table
    ]
    processor = build_processor(config, [])
    for row in rows_of(config):
        planned, example = processor.prompt(row), model.processor.prompt(row)
        assert planned.input_ids.tolist() == example.input_ids.tolist()
        assert planned.media == example.media
