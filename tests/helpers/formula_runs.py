"""A stand-in for training in tests of sweeps: a formula gives a run's validation scores.

The run's folder has what a real one has of it: the mark, the recipe, the log, done.json, and in
place of weights a file in a checkpoint and in the model's folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlm_tune.config.load import dump_recipe, load_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.evaluation.registry import lower_is_better
from vlm_tune.events import Evaluation, Report, StageStart
from vlm_tune.run_folder import MANIFEST, MODEL, open_run
from vlm_tune.sweeping.records import Sweep
from vlm_tune.sweeping.run import Setting, run_sweep
from vlm_tune.sweeping.space import parse_search
from vlm_tune.train.checkpoint import Progress, stage_folder, step_folder
from vlm_tune.train.step_trace import Step, write_step

VALIDATIONS = 3
RECIPE = """
name: formula
output: {output}
model:
  tower: {{kind: open_clip, config: {{layers: 2, width: 64, head_width: 32, patch_size: 16,
    image_size: 32}}}}
  connector: {{kind: mlp}}
  llm: {{kind: causal, name: nowhere}}
data:
  train: [{{kind: file, path: rows.jsonl}}]
  validation: [{{kind: file, path: rows.jsonl}}]
  template: chatml
tune:
  - {{match: "tower.*", how: frozen}}
  - {{match: "llm.*", how: lora, r: 8}}
  - {{match: "*", how: full}}
train: {{steps: 30, learning_rate: 1.0e-3}}
evaluate: {{every: 10}}
"""


def write_formula_recipe(folder: Path) -> Path:
    """A recipe for `FormulaRuns`, which needs none of the files that it names."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(output=folder / "run"))
    return path


@dataclass
class FormulaRuns:
    """Trains nothing: the n-th validation of a run (from 1) scores `score(recipe, n)`.

    Attributes:
        score: the formula.
        faults: what is raised as a run begins, by the run's number; each once.
        runs: the recipe of each run and whether it was resumed, in order.
    """

    score: Callable[[Recipe, int], float]
    faults: dict[int, BaseException] = field(default_factory=dict)
    runs: list[tuple[Recipe, bool]] = field(default_factory=list)

    def __call__(self, recipe: Recipe, /, *, resume: bool, show: Report) -> None:
        """Stands in for `vlm_tune.sft`."""
        folder = Path(recipe.output)
        options = {"resume": resume, "overwrite": False, "accept_changes": False}
        open_run(folder, recipe, dump_recipe(recipe), **options)
        self.runs.append((recipe, resume))
        show(StageStart(steps=10 * VALIDATIONS, from_step=0, stage=0, name="main"))
        if int(folder.name) in self.faults:
            raise self.faults.pop(int(folder.name))
        scores = [self.score(recipe, count) for count in range(1, VALIDATIONS + 1)]
        stage = stage_folder(folder, 0, "main")
        stage.mkdir(parents=True, exist_ok=True)
        for count, score in enumerate(scores, 1):
            write_step(stage, Step(10 * count, 1.0, 1.0, "0"))
            event = Evaluation(
                step=10 * count,
                accuracy=score,
                n=8,
                loss=score,
                best_by=recipe.evaluate.best or "exact_match",
                stage=0,
                name="main",
            )
            with (folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(event.line()) + "\n")
            show(event)
            _write_weights(step_folder(stage, event.step))
        _write_weights(folder / MODEL)
        (stage / "done.json").write_text(json.dumps(asdict(_progress(recipe, scores))))


def _write_weights(folder: Path) -> None:
    """A folder of weights, which are none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").touch()
    (folder / MANIFEST).write_text(json.dumps({"files": {"weights": {}}}))


def _progress(recipe: Recipe, scores: list[float]) -> Progress:
    """The state of a stage after its last validation."""
    metric = recipe.evaluate.best or "exact_match"
    progress = Progress(step=10 * VALIDATIONS, best_by=metric)
    finite = [score for score in scores if math.isfinite(score)]
    if finite:
        progress.best_score = min(finite) if lower_is_better(metric) else max(finite)
        progress.best_step = 10 * (1 + scores.index(progress.best_score))
    return progress


def formula_sweep(
    recipe: Path,
    search: dict[str, Any],
    train: FormulaRuns,
    *,
    of: int = 8,
    resume: bool = False,
    prune: bool = True,
    keep_all: bool = False,
    show: Report | None = None,
) -> Sweep:
    """A sweep in the folder `sweep` beside a recipe, which writes no page."""
    folder = recipe.parent / "sweep"
    setting = Setting(load_recipe(recipe), parse_search(search), folder, of, prune, keep_all)

    def ignore(_: object) -> None:
        """Takes an event or a sweep."""

    return run_sweep(setting, resume=resume, train=train, write_report=ignore, show=show or ignore)
