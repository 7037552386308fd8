"""Scores the model on a stage's validation rows while it is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from accelerate.utils import gather_object

from vlm_tune.config.train import EvaluateSection
from vlm_tune.data.batch import Batch
from vlm_tune.data.batching.collate import collate
from vlm_tune.data.batching.corruption import corruption_of
from vlm_tune.data.batching.references import StoredReferences
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.prepare.dataset import Group
from vlm_tune.data.types import Conversation, Example
from vlm_tune.evaluation.assessment import add_metrics
from vlm_tune.evaluation.evaluate import score, score_options
from vlm_tune.evaluation.metrics import Scores, join_scores
from vlm_tune.evaluation.registry import main_metric
from vlm_tune.events import Evaluation, Scoring, StageReport, ValidationLoss
from vlm_tune.model.acceleration.compiling import eager
from vlm_tune.model.feature_cache import FeatureStore
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.train.engines.base import Engine
from vlm_tune.train.objectives import Counts, Objective
from vlm_tune.train.precomputed import validation_units
from vlm_tune.train.rates import Rates, metric_means
from vlm_tune.train.step_figures import MetricSums
from vlm_tune.train.watchdog import Watch

Row = TypeVar("Row")


class _CutShort(Exception):
    """Ends an evaluation because the run is asked to stop."""


class Evaluator:
    """Scores the model on validation rows, as its training objective is scored.

    `rows` are the validation part, of which the first `settings.limit` are scored, and `features`
    the cached features of their images; `references` are the reference model's
    log-probabilities of their answers, if stored before training. `stop` says whether this
    process is asked to stop, `any_stops` whether any is: every process must call it. `seed`
    is the recipe's, by which spans are masked.
    """

    def __init__(
        self,
        model: VisionLanguageNetwork,
        engine: Engine,
        objective: Objective,
        settings: EvaluateSection,
        rows: Sequence[Conversation],
        features: FeatureStore | None,
        references: StoredReferences | None = None,
        *,
        report: StageReport,
        watch: Watch,
        stop: Callable[[], bool],
        any_stops: Callable[[], bool],
        seed: int,
    ) -> None:
        self.model = model
        self.engine = engine
        self.accelerator = engine.accelerator
        self.objective = objective
        self.settings = settings
        self.rows = rows[: settings.limit]
        self.features = features
        self.references = references
        self._pixels = PixelCache(model.processor.images)
        self.report = report
        self.watch = watch
        self.stop = stop
        self.any_stops = any_stops
        self.seed = seed

    def evaluation(self, step: int, *, compiled: bool) -> Evaluation | None:
        """The scores after a step; None if the run is asked to stop meanwhile.

        Every process must call it. The model's blocks run eagerly, also where they are `compiled`
        for the training steps.
        """
        self.watch.at(f"the evaluation of step {step}", (step, 3))
        with self.engine.inference(), eager() if compiled else contextlib.nullcontext():
            by_answers = self.objective.config.selects_by == "answers"
            evaluation = self._scored(step) if by_answers else self._compared(step)
        self.model.train()
        return evaluation

    def _scored(self, step: int) -> Evaluation | None:
        """Scores of the rows; None if the run is asked to stop meanwhile."""
        settings = self.settings
        options = score_options(settings, self.objective.config)
        # Retrieval ranks all rows together.
        mine, together = (self.rows, True) if options["ranks"] else self._shard(self.rows)

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

    @torch.no_grad()
    def _compared(self, step: int) -> Evaluation | None:
        """Loss and figures of an objective of preferences; None if the run is asked to stop."""
        self.model.eval()
        mine, together = self._shard(self._units())
        size = self.settings.batch_size
        parts = [
            [example for unit in mine[start : start + size] for example in unit]
            for start in range(0, len(mine), size)
        ]
        spec = self.model.processor.spec
        shares = gather_object(
            [sum((self.objective.counts(collate(part, spec)) for part in parts), Counts(0))]
        )
        totals = shares[0] if together else sum(shares, Counts(0))
        sums = MetricSums(self.objective.metrics)
        loss_sum = 0.0
        cut_short = False
        with self.accelerator.autocast():
            self.objective.before(self.model, self._watched(parts), totals)
            for number, part in enumerate(parts):
                done = number * size
                self.watch.at(f"the evaluation, {done} of {len(mine)} rows")
                self.report(ValidationLoss(done, len(mine)))
                cut_short = self.any_stops() if together else self.stop()
                if cut_short:
                    break
                loss = self.objective(self.model, self._batch(part), totals)
                loss_sum += float(loss.sum)
                sums.add(loss)
        shards = gather_object([(loss_sum, sums.read(), cut_short)])[: 1 if together else None]
        if any(shard[-1] for shard in shards):
            return None
        rates = Rates()
        for _, metrics, _ in shards:
            rates.add_metrics(metrics)
        return self._judged(step, totals, sum(shard[0] for shard in shards), rates.metrics)

    def _judged(
        self, step: int, totals: Counts, loss_sum: float, sums: dict[str, list[float]]
    ) -> Evaluation:
        """The evaluation of an objective of preferences, from sums over the validation part."""
        return Evaluation(
            step=step,
            accuracy=None,
            n=totals.items,
            loss=loss_sum / max(totals.items, 1),
            best_by=self.objective.config.selects_by,
            metrics={name: {"value": mean} for name, mean in metric_means(sums).items()},
        )

    def _units(self) -> list[Group]:
        """The examples of each row, with the reference model's log-probabilities, if stored."""
        units = validation_units(self.model, self.rows, mismatches=self.objective.config.mismatches)
        corruption = corruption_of(self.objective.config, self.model.processor, self.seed)
        if corruption is not None:
            units = [corruption.of_unit(unit, 0) for unit in units]
        if self.references is None:
            return units
        return [self.references.attached(place, unit) for place, unit in enumerate(units)]

    def _shard(self, rows: Sequence[Row]) -> tuple[Sequence[Row], bool]:
        """The rows that this process scores, and whether all processes score the same.

        Where weights are gathered as modules run, all ranks must run the same modules equally
        often.
        """
        if self.engine.sharded:
            return rows, True
        return rows[self.accelerator.process_index :: self.accelerator.num_processes], False

    def _watched(self, parts: Sequence[Sequence[Example]]) -> Iterator[Batch]:
        """The batches of a pass before that of the loss, each of which is a sign of progress."""
        for done, part in enumerate(parts):
            self.watch.at(f"the evaluation, before its loss, {done} of {len(parts)} batches")
            yield self._batch(part)

    def _batch(self, examples: Sequence[Example]) -> Batch:
        """The examples as a batch on the model's device."""
        batch = collate(
            examples,
            self.model.processor.spec,
            fetch=self.features or self._pixels,
            cached=self.features is not None,
        )
        return batch.to(self.accelerator.device)
