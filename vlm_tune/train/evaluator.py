"""Scores the model on a stage's validation rows while it is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from accelerate.utils import gather_object

from vlm_tune.config.train import Contrastive, EvaluateSection, LanguageModeling
from vlm_tune.data.types import Conversation
from vlm_tune.evaluation.assessment import add_metrics
from vlm_tune.evaluation.evaluate import score, score_options
from vlm_tune.evaluation.metrics import Scores, join_scores
from vlm_tune.evaluation.registry import main_metric
from vlm_tune.events import Evaluation, Scoring, StageReport
from vlm_tune.model.acceleration.compiling import eager
from vlm_tune.model.feature_cache import FeatureStore
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.train.engines.base import Engine
from vlm_tune.train.watchdog import Watch


class _CutShort(Exception):
    """Ends an evaluation because the run is asked to stop."""


class Evaluator:
    """Scores the model on validation rows, as its training objective is scored.

    `rows` are the validation part, of which the first `settings.limit` are scored, and `features`
    the cached features of their images. `stop` says whether this process is asked to stop,
    `any_stops` whether any is: every process must call it.
    """

    def __init__(
        self,
        model: VisionLanguageNetwork,
        engine: Engine,
        objective: LanguageModeling | Contrastive,
        settings: EvaluateSection,
        rows: Sequence[Conversation],
        features: FeatureStore | None,
        *,
        report: StageReport,
        watch: Watch,
        stop: Callable[[], bool],
        any_stops: Callable[[], bool],
    ) -> None:
        self.model = model
        self.engine = engine
        self.accelerator = engine.accelerator
        self.objective = objective
        self.settings = settings
        self.rows = rows[: settings.limit]
        self.features = features
        self.report = report
        self.watch = watch
        self.stop = stop
        self.any_stops = any_stops

    def evaluation(self, step: int, *, compiled: bool) -> Evaluation | None:
        """The scores after a step; None if the run is asked to stop meanwhile.

        Every process must call it. The model's blocks run eagerly, also where they are `compiled`
        for the training steps.
        """
        self.watch.at(f"the evaluation of step {step}", (step, 3))
        with self.engine.inference(), eager() if compiled else contextlib.nullcontext():
            evaluation = self._scored(step)
        self.model.train()
        return evaluation

    def _scored(self, step: int) -> Evaluation | None:
        """Scores of the rows; None if the run is asked to stop meanwhile."""
        settings = self.settings
        options = score_options(settings, self.objective)
        # Where weights are gathered as modules run, all ranks must run the same modules equally
        # often: they score the same rows. Retrieval ranks all rows together.
        together = self.engine.sharded or options["ranks"]
        mine = (
            self.rows
            if together
            else self.rows[self.accelerator.process_index :: self.accelerator.num_processes]
        )

        def progress(done: int, of: int) -> None:
            self.watch.at(f"the evaluation, {done} of {of} rows")
            self.report(Scoring(done, of))
            if self.any_stops() if together else self.stop():
                raise _CutShort

        scores: Scores | None = None
        with contextlib.suppress(_CutShort), self.accelerator.autocast():
            if mine:
                scores = score(
                    self.model,
                    mine,
                    **options,
                    features=self.features,
                    progress=progress,
                )
        shards = gather_object([(scores, bool(mine) and scores is None)])
        if any(cut_short for _, cut_short in shards):
            return None
        # A process has no rows where there are fewer rows than processes.
        scored = [shard for shard, _ in shards if shard is not None]
        joined = scored[0] if together or len(scored) == 1 else join_scores(scored)
        add_metrics(joined, settings.metrics)
        best_by = main_metric(joined.answers, settings)
        return Evaluation(step=step, best_by=best_by, **joined.summary())
