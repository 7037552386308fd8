"""When a stage is evaluated and saved, and which of its checkpoints is the best."""

from __future__ import annotations

import math

from vlm_tune.config.recipe import Recipe
from vlm_tune.evaluation.registry import lower_is_better
from vlm_tune.events import Evaluation
from vlm_tune.train.checkpoint import Progress
from vlm_tune.train.nonfinite import NonFinitePolicy
from vlm_tune.train.stage_position import StagePosition


class CheckpointPolicy:
    """Decides at which steps of a stage the model is scored and saved, and which step is the best.

    The best step is set in `progress`: its checkpoint stays, with the last ones that the recipe
    keeps. `validates` says that there are rows to score.
    """

    def __init__(
        self,
        recipe: Recipe,
        progress: Progress,
        position: StagePosition,
        nonfinite: NonFinitePolicy,
        *,
        validates: bool,
    ) -> None:
        self.evaluate_every = recipe.evaluate.every
        self.save_every = recipe.train.checkpoints.every
        self.progress = progress
        self.position = position
        self.nonfinite = nonfinite
        self.validates = validates

    def scores_at(self, step: int) -> bool:
        """Whether the model is scored after this step, the one just taken."""
        return self.validates and (self._evaluation_due(step) or step == self.position.total)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is written after this step, the one just taken and scored."""
        return (
            self._checkpoint_due(step)
            or step == self.position.total
            or step == self.progress.best_step
        )

    def _evaluation_due(self, step: int) -> bool:
        """Whether the recipe asks for an evaluation at this step."""
        if self.evaluate_every is None:
            return self.position.epoch_ended
        return step % self.evaluate_every == 0

    def _checkpoint_due(self, step: int) -> bool:
        """Whether the recipe asks for a checkpoint at this step."""
        if self.save_every is None:
            return self._evaluation_due(step) if self.validates else self.position.epoch_ended
        return step % self.save_every == 0

    @property
    def may_save(self) -> bool:
        """Whether the model may be saved.

        Not while the loss is not finite, so that it does not replace a good checkpoint.
        """
        return not self.nonfinite.in_a_row

    def record(self, evaluation: Evaluation) -> None:
        """Adds the scores of a step to the stage's history, and sets whether it is the best.

        Of equal scores the later wins: that model has trained longer. Weights with a non-finite
        loss are never the best. After a resume by another metric earlier steps do not compete.
        """
        progress = self.progress
        score = evaluation.score
        if progress.best_by != evaluation.best_by:
            progress.best_by = evaluation.best_by
            progress.best_score = None
        sound = math.isfinite(evaluation.loss or 0.0) and not self.nonfinite.in_a_row
        if sound and score is not None and self._better(score):
            progress.best_score = score
            progress.best_step = evaluation.step
        names = ("step", "loss", "accuracy", "n", "best_by", "score")
        progress.history.append({name: getattr(evaluation, name) for name in names})

    def _better(self, score: float) -> bool:
        """Whether a score is as good as the best so far."""
        best = self.progress.best_score
        if best is None:
            return True
        return score <= best if lower_is_better(self.progress.best_by) else score >= best
