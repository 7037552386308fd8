"""Sweeps by Python: `sweep`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_tune.api.training import train_by
from vlm_tune.config.load import as_recipe
from vlm_tune.config.objectives import COMMANDS
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import Problem, RecipeError, check_count
from vlm_tune.events import Event, Report
from vlm_tune.paths import check_path, home
from vlm_tune.quoting import quoted
from vlm_tune.rendering.sweep_report import write_sweep_report
from vlm_tune.sweeping.records import Sweep
from vlm_tune.sweeping.run import Setting, run_sweep
from vlm_tune.sweeping.space import Scalar, parse_search
from vlm_tune.train.run import Run

KEEP = ("best", "all")
"""Values of `keep`."""


def sweep(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] | dict[str, Any] = (),
    *,
    search: Mapping[str, str | Sequence[Scalar]],
    trials: int = 20,
    output: str | Path | None = None,
    prune: bool = True,
    keep: str = "best",
    resume: bool = False,
    show: Report | None = None,
) -> Sweep:
    """Trains a recipe with different values, and returns the trials with their validation scores.

    Each trial is a run in a folder of `trials/`, whose test part is not scored. The values come
    from optuna's TPE, and the score is the one that chooses a run's best checkpoint.

    Args:
        recipe: as in `sft`, like `overrides`. Its objective may be one of `dpo` or `kto` too.
        overrides: changes to the recipe.
        search: values by a recipe's dotted names: `"log:1e-5..1e-3"`, `"1..8"`, `"0.0..0.3:0.1"`,
            or a list as `[8, 16, 32]`, also written `"8,16,32"`.
        trials: how many there are to be, with those of an earlier start.
        output: the sweep's folder; by default that of the recipe with `-sweep` at its end.
        prune: stop trials whose scores are worse than the median of the complete ones.
        keep: whose models and checkpoints stay: `"best"`, that is the best trial's and, of a sweep
            that was interrupted, the unfinished one's, or `"all"`.
        resume: continue the sweep in the folder; an interrupted trial continues first.
        show: called with every event of the sweep and of its runs.

    Returns:
        The sweep: its folder, its trials, and the best one, whose recipe is best.yaml there.

    Raises:
        VlmTuneError: as `sft`, and a `RecipeError` for a recipe without a validation part or a
            search that it can't take.
    """
    loaded = as_recipe(recipe, overrides)
    check_count("--trials", trials or 0)
    if keep not in KEEP:
        raise RecipeError([Problem("--keep", f"expected {' or '.join(KEEP)}, got {quoted(keep)}")])
    if output is not None:
        check_path("output", output)
    folder = Path(f"{loaded.output.rstrip('/')}-sweep" if output is None else home(str(output)))
    command = COMMANDS[loaded.last_stage.objective.kind]

    def train(changed: Recipe, *, resume: bool, show: Report) -> Run:
        return train_by(command, changed, resume=resume, test=False, show=show)

    def ignore(event: Event) -> None:
        """Shows nothing."""

    return run_sweep(
        Setting(loaded, parse_search(search), folder, trials, prune, keep == "all"),
        resume=resume,
        train=train,
        write_report=write_sweep_report,
        show=show or ignore,
    )
