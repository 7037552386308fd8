"""The training loop of one stage, on accelerate."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NoReturn

import torch
from accelerate.utils import gather_object
from peft.helpers import disable_input_dtype_casting

from vlm_tune.config.recipe import Recipe
from vlm_tune.config.tune import task_rule
from vlm_tune.data.batch import Batch
from vlm_tune.data.batching.loader import PreparedFeed
from vlm_tune.errors import Interrupted
from vlm_tune.events import Note, StageReport, TrainSteps
from vlm_tune.model.acceleration.compiling import blocks, compiled, why_not
from vlm_tune.model.optimizer_groups import Tuned
from vlm_tune.model.task_adapters import activate
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.train.allocator import trim_heap
from vlm_tune.train.checkpoint import (
    CheckpointWriter,
    Progress,
    capture_checkpoint,
    load_random,
    random_state,
    read_optimizer,
    read_scaler,
)
from vlm_tune.train.checkpoint_policy import CheckpointPolicy
from vlm_tune.train.engines.base import Engine
from vlm_tune.train.evaluator import Evaluator
from vlm_tune.train.gpu_memory import gpu_peak
from vlm_tune.train.kernel_report import report_kernels
from vlm_tune.train.meetings import Meeting, Meetings
from vlm_tune.train.nonfinite import NonFinitePolicy
from vlm_tune.train.objective_registry import build_objective
from vlm_tune.train.objectives import Counts, Objective
from vlm_tune.train.prefetch import on_device
from vlm_tune.train.rates import Rates
from vlm_tune.train.references import dropout_off, reference_model
from vlm_tune.train.sampling import build_sampler
from vlm_tune.train.schedule import schedule_factor
from vlm_tune.train.stage_data import StageData
from vlm_tune.train.stage_position import StagePosition
from vlm_tune.train.step_figures import MetricSums, read_figures, summed
from vlm_tune.train.step_trace import Step, cut_trace, digest, json_number, write_step
from vlm_tune.train.task_tie import TaskTie
from vlm_tune.train.watchdog import Watch

log = logging.getLogger(__name__)


class StageLoop:
    """Trains one stage from `progress` on; every epoch's order is a function of (seed, epoch)."""

    _compiles = False

    def __init__(
        self,
        model: VisionLanguageNetwork,
        recipe: Recipe,
        tuned: Tuned,
        data: StageData,
        engine: Engine,
        *,
        folder: Path,
        progress: Progress,
        report: StageReport,
        recipe_text: str,
        stop: Callable[[], bool],
        resume_from: Path | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.tuned = tuned
        self.data = data
        self.engine = engine
        self.accelerator = engine.accelerator
        self.folder = folder
        self.progress = progress
        self.report = report
        self.recipe_text = recipe_text
        train = recipe.train
        self.objective = self._objective(resumed=resume_from is not None)
        self._prepare_engine(resume_from)
        progress.processes = self.accelerator.num_processes
        self.position = StagePosition(data.feed, progress, train, resume_from)
        self.total = self.position.total
        self.watch = watch or Watch(self.accelerator, train.timeout)
        self.sampler = build_sampler(model, recipe, engine, self.watch, report)
        self.writer = CheckpointWriter(
            folder, train.checkpoints.keep, background=train.checkpoints.background
        )
        self.meetings = Meetings(self.accelerator, train.timeout, stop=stop, writer=self.writer)
        self.nonfinite = NonFinitePolicy(
            self.accelerator, report, most=train.max_nonfinite, skips=engine.skips
        )
        self.policy = CheckpointPolicy(
            recipe, progress, self.position, self.nonfinite, validates=bool(data.validation)
        )
        self.evaluator = Evaluator(
            model,
            engine,
            self.objective,
            recipe.evaluate,
            data.validation,
            data.validation_features,
            data.validation_references,
            report=report,
            watch=self.watch,
            stop=stop,
            any_stops=self.meetings.stopping,
            seed=recipe.seed,
        )

    def _objective(self, *, resumed: bool) -> Objective:
        """The stage's objective, with its reference model as the weights are before the engine."""
        reference = reference_model(
            self.model, self.recipe, self.tuned, self.folder, resumed=resumed
        )
        return build_objective(
            self.recipe.objective,
            reference,
            partial(summed, self.accelerator),
            self.accelerator.device,
            lambda figures: self.meetings.by_rank(figures),
        )

    def _prepare_engine(self, resume_from: Path | None) -> None:
        """Hands the model to the engine, and restores optimizer and random state on resuming."""
        if self.recipe.train.gradient_checkpointing:
            self.model.llm.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        rule = task_rule(self.recipe.tune)
        self.tie = None if rule is None else TaskTie(self.model, rule.tie or 0.0)
        self.engine.prepare(self.model, self.tuned, self.recipe.train)
        if resume_from is not None:
            self.engine.load_optimizer_state(read_optimizer(resume_from, self.tuned.names))
            self.engine.load_scaler_state(read_scaler(resume_from))
            load_random(resume_from, self.accelerator.process_index, self.accelerator.device)

    def run(self) -> Progress:
        """Trains to the end of the stage.

        Raises `Interrupted` when asked to stop, and `TrainingError` if too many steps are not
        finite, a checkpoint can't be written, or another process is lost.
        """
        with self._training():
            try:
                self._run()
            except RuntimeError as error:
                killed = (
                    self.data.feed.killed_worker(error)
                    if isinstance(self.data.feed, PreparedFeed)
                    else None
                )
                raise error if killed is None else killed from error
            finally:
                self.writer.close()
        return self.progress

    def _run(self) -> None:
        """The loop over steps: each is taken, logged, scored and saved, as far as it is due."""
        started = time.perf_counter()
        before = self.progress.seconds
        rates = Rates()
        rates.loss, rates.count = self.progress.unlogged
        rates.add_metrics(self.progress.unlogged_metrics)
        if self.accelerator.is_main_process:
            cut_trace(self.folder, self.progress.step)
        if self.progress.unscored:
            self._evaluate(self.progress.step)
            self._save(self.progress.step)
            if self.progress.unscored:
                self._stop(saved=True)
        saved = True
        for batches, waited in self._windows():
            step = self.progress.step + 1
            rates.waited += waited
            meeting = self._meet(batches, step, rates)
            if meeting.stops:
                self._stop(saved=saved)
            rate = self._step(batches, step, rates, meeting)
            batches.clear()  # their memory is free for those of the step after the next
            self.position.advance()
            if self._compiles and step == self._first_step + 1:
                self._note_compiling(started)
            self.progress.seconds = before + time.perf_counter() - started
            last = step == self.total
            if step % self.recipe.train.log_every == 0 or last:
                self._report_rates(step, rates, rate, started)
                rates = Rates()
            self.progress.unlogged = rates.loss, rates.count
            self.progress.unlogged_metrics = rates.metrics
            if self.policy.scores_at(step):
                with rates.paused():
                    self._evaluate(step)
                self.progress.seconds = before + time.perf_counter() - started
            saved = self.policy.saves_at(step) or self.progress.unscored
            if saved:
                with rates.paused():
                    self._save(step)
            if self.progress.unscored:
                self._stop(saved=True)
        self.meetings.written()

    def _stop(self, *, saved: bool) -> NoReturn:
        """Ends the run after the last step, once its checkpoint is written.

        `saved` says that it is being written, or that no step was taken.
        """
        step = self.progress.step
        if not saved:
            self._save(step)
        self.meetings.written()
        place = f"at step {step} of {self.total}" if step else "before the first step"
        raise Interrupted(f"stopped {place}; continue with --resume")

    def _note_compiling(self, started: float) -> None:
        """Reports how long the first step took, which compiled the blocks."""
        if self.accelerator.device.type == "cpu":
            trim_heap()  # a compiler's small objects
        taken = time.perf_counter() - started
        text = f"the first step took {taken:.0f} s with compiling; later runs find it compiled"
        self.report(Note(text))

    def _report_rates(self, step: int, rates: Rates, rate: float, started: float) -> None:
        """Reports the loss since the last report, the throughput and the time that is left."""
        taken = time.perf_counter() - started
        left = taken / max(step - self._first_step, 1) * (self.total - step)
        self.report(
            TrainSteps(
                step=step,
                of=self.total,
                epoch=self.position.epochs_done(),
                **rates.figures(),
                learning_rate=rate,
                **gpu_peak(self.accelerator.device),
                left=left,
            )
        )

    @contextlib.contextmanager
    def _training(self) -> Iterator[None]:
        """The context of the training steps.

        The model's blocks are compiled where recipe, model and engine allow it, and other processes
        are watched.
        """
        why = why_not(self.model.llm, self.recipe.train.compile, self.total)
        if why is None:
            why = self.engine.uncompiled
        to_compile = blocks(self.model.llm, training=True) if why is None else []
        self._compiles = bool(to_compile)
        if to_compile:
            log.info(
                "training; the first step compiles the language model's blocks, "
                "up to a minute where that is new"
            )
        else:
            log.info("training")
        if why:
            self.report(Note(why))
        self.model.train()
        report_kernels(self.model, self.recipe, self.tuned, self.accelerator.device, self.report)
        # PEFT casts a layer's input to the adapter's fp32 and autocast casts it back: two copies of
        # every activation.
        casts = disable_input_dtype_casting(
            self.model, active=self.accelerator.mixed_precision != "no"
        )
        drops = self.recipe.objective.uses_dropout
        steady = contextlib.nullcontext() if drops else dropout_off(self.model)
        with casts, steady, compiled(to_compile), self.watch.guarding():
            yield

    def replay(self, end: int, trace: Path, at: set[int]) -> Iterator[tuple[int, Path]]:
        """Repeats the steps up to `end` and yields the states after the steps `at`.

        A state is yielded as its step and a folder that holds it as a checkpoint would, removed
        afterwards. The trace is written to the folder `trace`. Raises `Interrupted` when asked to
        stop.
        """
        self.folder = trace
        with self._training():
            for batches, _ in self._windows():
                step = self.progress.step + 1
                rates = Rates()
                meeting = self._meet(batches, step, rates)
                if meeting.stops:
                    raise Interrupted("the replay was stopped")
                self._step(batches, step, rates, meeting)
                batches.clear()
                self.position.advance()
                states = gather_object([random_state(self.accelerator.device)])
                if step in at and self.accelerator.is_main_process:
                    written = trace / f"replayed-{step}"
                    written.mkdir()
                    self._captured(states)(written)
                    yield step, written
                    shutil.rmtree(written)
                elif step in at and self.engine.collects:
                    self._captured(states)
                if step == end:
                    return

    def _captured(self, states: list[dict[str, torch.Tensor]]) -> Callable[[Path], None]:
        drawn = self.position.drawn() if self.accelerator.is_main_process else {}
        return capture_checkpoint(
            self.model,
            self.engine.optimizer_state(),
            self.engine.scaler_state(),
            self.progress,
            self.recipe_text,
            states,
            drawn,
        )

    def _windows(self) -> Iterator[tuple[list[Batch], float]]:
        """Yields the micro-batches of each remaining step and the seconds waited for them."""
        self._first_step = self.progress.step
        while self.progress.step < self.total:
            epoch = self.position.in_data.epoch
            # A process forked while a thread writes could wait for ever for a lock that the thread
            # holds. If the write fails, the step's meeting raises.
            self.writer.settle()
            windows = on_device(
                islice(
                    self.data.feed.windows(self.position.in_data), self.total - self.progress.step
                ),
                self.accelerator.device,
            )
            while self.progress.step < self.total and self.position.in_data.epoch == epoch:
                self.watch.at(
                    f"the batches of step {self.progress.step + 1}", (self.progress.step + 1, 0)
                )
                start = time.perf_counter()
                window = next(windows)
                waited = time.perf_counter() - start
                if self.sampler is not None:
                    window = self.sampler(window, self.progress.step + 1, compiled=self._compiles)
                yield window, waited

    def _step(self, batches: list[Batch], step: int, rates: Rates, meeting: Meeting) -> float:
        """One step, of one update or several by its batches; returns the highest rate used."""
        self.watch.at(f"step {step}", (step, 2))
        for batch in batches:
            rates.add(batch)
        factor = schedule_factor(self.recipe.train.schedule, *self.position.in_schedule(step))
        updates = range(self.recipe.objective.updates)
        figures = [self._update(batches, step, factor, rates, meeting) for _ in updates]
        loss_sum, norm = figures[-1]
        if self.accelerator.is_main_process:
            norm_written = None if norm is None else json_number(norm)
            line = Step(step, json_number(loss_sum), norm_written, f"{meeting.samples:x}")
            write_step(self.folder, line)
        return factor * max(self.engine.rates)

    def _update(
        self, batches: list[Batch], step: int, factor: float, rates: Rates, meeting: Meeting
    ) -> tuple[float, float | None]:
        """One optimizer step, with `factor` times the full learning rates.

        The gradient is that of the mean over all supervised items of all micro-batches and ranks,
        each item's loss multiplied by the weight of its source, and of the tie of tasks.

        Returns:
            The summed loss, and the gradient's norm where the engine has it.
        """
        total = torch.zeros((), device=self.accelerator.device)
        metrics = MetricSums(self.objective.metrics)
        with self.accelerator.autocast():
            self.objective.before(self.engine.model, batches, meeting.counts)
        for place, batch in enumerate(batches):
            last = place == len(batches) - 1
            if batch.task is not None:
                activate(self.model, batch.task)
            with self.engine.micro_batch(last=last):
                loss = self.objective(self.engine.model, batch, meeting.counts)
                weighted = loss.sum * batch.loss_weight
                share = weighted / meeting.counts.items
                if last and self.tie is not None:
                    share = share + self.tie.penalty() / self.accelerator.num_processes
                self.engine.backward(share)
            total += weighted.detach()
            metrics.add(loss)
        norms = self.engine.clip(factor)
        figures = summed(self.accelerator, metrics.beside(total))
        (loss_sum, *metric_sums), norm = read_figures(figures, norms)
        ids = [identity for batch in batches for identity in batch.ids]
        if self.nonfinite.allows(step, loss_sum, norm, ids, self.folder, last=step >= self.total):
            self.engine.step()
            rates.loss = rates.loss + loss_sum
            rates.count = rates.count + meeting.counts.items
            rates.add_metrics(metrics.named(metric_sums))
        else:
            self.engine.skip()
        return loss_sum, norm

    def _meet(self, batches: list[Batch], step: int, rates: Rates) -> Meeting:
        """Meets the other processes before a step. Raises as `Meetings.before_step` does."""
        self.watch.at(f"step {step}, meeting the others", (step, 1))
        counts = [self.objective.counts(batch) for batch in batches]
        # Rows without supervised items fill up a process's batches; their number may vary, so the
        # digest omits them.
        counted = (
            identity
            for batch, count in zip(batches, counts, strict=True)
            if count.items
            for identity in batch.ids
        )
        cost = round(sum(map(self.data.cost, batches)))
        meeting = self.meetings.before_step(sum(counts, Counts(0)), digest(counted), cost)
        rates.work(meeting.costs)
        return meeting

    def _evaluate(self, step: int) -> None:
        """Scores the model, unless the run is asked to stop meanwhile."""
        evaluation = self.evaluator.evaluation(step, compiled=self._compiles)
        self.progress.unscored = evaluation is None
        if evaluation is not None:
            self.report(evaluation)
            self.policy.record(evaluation)

    def _save(self, step: int) -> None:
        """Starts to write a checkpoint, if the model may be saved.

        Raises `TrainingError` on all processes if the last one could not be written.
        """
        self.watch.at(f"the checkpoint of step {step}", (step, 4))
        self.meetings.written()
        if not self.policy.may_save:
            return
        states = gather_object([random_state(self.accelerator.device)])
        if self.accelerator.is_main_process:
            self.writer.save(step, self._captured(states), self.progress.best_step)
        elif self.engine.collects:
            self._captured(states)
