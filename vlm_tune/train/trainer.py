"""The training loop of one stage, on accelerate."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft.helpers import disable_input_dtype_casting

from vlm_tune.config.recipe import Recipe
from vlm_tune.data.batching.collate import collate
from vlm_tune.data.batching.loader import Feed, Position, PreparedFeed
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.types import Batch, Conversation
from vlm_tune.errors import Interrupted, TrainingError
from vlm_tune.evaluation.evaluate import score
from vlm_tune.evaluation.metrics import Scores, join_scores
from vlm_tune.model.acceleration.compiling import blocks, compiled, eager, why_not
from vlm_tune.model.acceleration.interval_attention import attending
from vlm_tune.model.feature_cache import FeatureStore
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.optimizer_groups import Tuned
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.train.allocator import trim_heap
from vlm_tune.train.checkpoint import (
    CheckpointWriter,
    Progress,
    capture_checkpoint,
    load_random,
    random_state,
    read_drawn,
    read_optimizer,
)
from vlm_tune.train.engines.base import Engine
from vlm_tune.train.nonfinite import NonFinitePolicy
from vlm_tune.train.objectives import build_objective
from vlm_tune.train.rates import Rates
from vlm_tune.train.schedule import schedule_factor
from vlm_tune.train.step_trace import DIGESTS, Step, cut_trace, digest, json_number, write_step
from vlm_tune.train.watchdog import Watch

log = logging.getLogger(__name__)
Report = Callable[[dict[str, Any]], None]
"""Takes one event of the run, to be logged, shown and tracked."""


@dataclass
class StageData:
    """The data that one stage trains on and is scored on."""

    feed: Feed
    validation: list[Conversation]
    validation_features: FeatureStore | None
    image_cost: float = 0.0
    """Cost of an image, in tokens."""


class _CutShort(Exception):
    """Ends an evaluation because the run is asked to stop."""


class StageLoop:
    """Trains one stage from `progress` on; every epoch's order is a function of (seed, epoch)."""

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
        report: Report,
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
        self.stop = stop
        train = recipe.train
        self.objective = build_objective(recipe.objective)
        if train.gradient_checkpointing:
            model.llm.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        engine.prepare(model, tuned, train)
        if resume_from is not None:
            engine.load_optimizer_state(read_optimizer(resume_from, tuned.names))
            load_random(resume_from, self.accelerator.process_index)
        progress.processes = self.accelerator.num_processes
        self.position = self._begin(resume_from)
        self.watch = watch or Watch(self.accelerator, train.timeout)
        self.writer = CheckpointWriter(
            folder, train.checkpoints.keep, background=train.checkpoints.background
        )
        self.nonfinite = NonFinitePolicy(
            self.accelerator, report, most=train.max_nonfinite, skips=engine.skips
        )
        self._compiles = False
        self._attention = model.llm.model.config._attn_implementation
        self.total = train.steps or self._steps_of(train.epochs or 1)
        self._epoch_ended = False
        self.pixels = PixelCache(model.processor.images)

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
        started = time.perf_counter()
        before = self.progress.seconds
        rates = Rates()
        rates.loss, rates.count = self.progress.unlogged
        if self.accelerator.is_main_process:
            cut_trace(self.folder, self.progress.step)
        if self.progress.unscored:
            self._evaluate(self.progress.step)
            self._save(self.progress.step)
        for batches, waited in self._windows():
            step = self.progress.step + 1
            rates.waited += waited
            rate = self._step(batches, step, rates)
            self._advance()
            if self._compiles and step == self._first_step + 1:
                if self.accelerator.device.type == "cpu":
                    trim_heap()  # a compiler's small objects
                taken = time.perf_counter() - started
                self.report(
                    {
                        "event": "note",
                        "text": f"the first step took {taken:.0f} s with compiling; "
                        "later runs find it compiled",
                    }
                )
            self.progress.seconds = before + time.perf_counter() - started
            last = step == self.total
            if step % self.recipe.train.log_every == 0 or last:
                left = (
                    (time.perf_counter() - started)
                    / max(step - self._first_step, 1)
                    * (self.total - step)
                )
                place = {"step": step, "of": self.total, **self._epochs_done()}
                self.report(
                    {"event": "train", **place, **rates.line(), "learning_rate": rate, "left": left}
                )
                rates = Rates()
            self.progress.unlogged = rates.loss, rates.count
            if self.data.validation and (self._scored(step) or last):
                with rates.paused():
                    self._evaluate(step)
                self.progress.seconds = before + time.perf_counter() - started
            stopping = self._stopping()
            if self._due(step) or last or stopping or self.progress.best_step == step:
                with rates.paused():
                    self._save(step)
            if stopping and (not last or self.progress.unscored):
                self.writer.wait()
                raise Interrupted(f"stopped at step {step} of {self.total}; go on with --resume")
        self.writer.wait()

    @contextlib.contextmanager
    def _training(self) -> Iterator[None]:
        """The context of the training steps.

        The model's blocks are compiled where recipe, model and engine allow it, and other processes
        are watched.
        """
        why = (
            why_not(self.model.llm, self.recipe.train.compile, self.total)
            if self.engine.compiles
            else ""
        )
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
            self.report({"event": "note", "text": why})
        self.model.train()
        # PEFT casts a layer's input to the adapter's fp32 and autocast casts it back: two copies of
        # every activation.
        casts = disable_input_dtype_casting(
            self.model, active=self.accelerator.mixed_precision != "no"
        )
        with casts, self._attending(), compiled(to_compile), self.watch.guarding():
            yield

    def _attending(self) -> contextlib.AbstractContextManager[None]:
        """The context of attention by intervals, if the model supports it."""
        llm = self.model.llm
        return attending(llm.model) if llm.supports_intervals else contextlib.nullcontext()

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
                self._step(batches, step, Rates())
                self._advance()
                states = gather_object([random_state()])
                if step in at and self.accelerator.is_main_process:
                    written = trace / f"replayed-{step}"
                    written.mkdir()
                    self._captured(states)(written)
                    yield step, written
                    shutil.rmtree(written)
                elif step in at and self.engine.collects:
                    self._captured(states)
                if self._stopping():
                    raise Interrupted("the replay was stopped")
                if step == end:
                    return

    def _captured(self, states: list[dict[str, torch.Tensor]]) -> Callable[[Path], None]:
        drawn = self.data.feed.drawn(self.position) if self.accelerator.is_main_process else {}
        return capture_checkpoint(
            self.model,
            self.engine.optimizer_state(),
            self.progress,
            self.recipe_text,
            states,
            drawn,
        )

    def _scored(self, step: int) -> bool:
        """Whether the recipe asks for an evaluation at this step."""
        every = self.recipe.evaluate.every
        return self._epoch_ended if every is None else step % every == 0

    def _due(self, step: int) -> bool:
        """Whether the recipe asks for a checkpoint at this step."""
        every = self.recipe.train.checkpoints.every
        if every is None:
            return self._scored(step) if self.data.validation else self._epoch_ended
        return step % every == 0

    # --- position in the data ---

    def _begin(self, resume_from: Path | None) -> Position:
        """The position in the data at which the loop starts, from a checkpoint or new.

        If the plan has changed since the checkpoint, the schedule's origin is set in `progress`.
        """
        progress = self.progress
        feed = self.data.feed
        cut = self.data.feed.cut()
        position = Position(progress.epoch, progress.epoch_step, rows=progress.rows)
        if resume_from is not None:
            position = feed.resumed(position, progress.cut, read_drawn(resume_from))
        while feed.steps(position) == 0:
            position = Position(position.epoch + 1)
        if resume_from is not None and progress.cut != cut:
            share = self._schedule_share(position)
            progress.origin = (progress.step, share) if share < 1 else (0, 0.0)
        progress.cut = cut
        self._note(position)
        return position

    def _note(self, position: Position) -> None:
        self.progress.epoch = position.epoch
        self.progress.epoch_step = position.step
        self.progress.rows = position.rows

    def _schedule_share(self, position: Position) -> float:
        """The share of all training that is done before the position."""
        train = self.recipe.train
        if train.steps:
            return self.progress.step / train.steps
        return (position.epoch + self.data.feed.share(position)) / (train.epochs or 1)

    def _steps_of(self, epochs: float) -> int:
        """Optimizer steps of `epochs` epochs, those that are done included; at least one."""
        steps = self.progress.step - self.position.step
        for epoch in range(self.position.epoch, math.ceil(epochs)):
            start = (
                replace(self.position, step=0) if epoch == self.position.epoch else Position(epoch)
            )
            part = min(epochs - epoch, 1.0)
            done = self.data.feed.share(start)
            whole = self.data.feed.steps(start) or 0
            steps += whole if part == 1 else round(whole * max(part - done, 0.0) / (1 - done))
        return max(steps, 1)

    def _schedule_place(self, step: int) -> tuple[float, float]:
        """A step and the total number of steps, as the schedule counts them.

        If the plan changed during the run, the steps before the change are rescaled to the share of
        the schedule that was done.
        """
        start, share = self.progress.origin
        total = (self.total - start) / (1 - share)
        return share * total + step - start, total

    def _advance(self) -> None:
        """Updates progress and position after a step."""
        self.progress.step += 1
        self.position = replace(self.position, step=self.position.step + 1)
        self._epoch_ended = self.position.step == self.data.feed.steps(self.position)
        if self._epoch_ended:
            self.position = Position(self.position.epoch + 1)
        self._note(self.position)

    def _epochs_done(self) -> dict[str, float]:
        """The epochs done, by rows, as a figure for the log; empty with streaming."""
        if self.data.feed.steps(self.position) is None:
            return {}
        return {"epoch": self.position.epoch + self.data.feed.share(self.position)}

    def _windows(self) -> Iterator[tuple[list[Batch], float]]:
        """Yields the micro-batches of each remaining step and the seconds waited for them."""
        self._first_step = self.progress.step
        while self.progress.step < self.total:
            epoch = self.position.epoch
            # A process forked while a thread writes could wait for ever for a lock that the thread
            # holds.
            self.writer.wait()
            windows = self.data.feed.windows(self.position)
            while self.progress.step < self.total and self.position.epoch == epoch:
                self.watch.at(
                    f"the batches of step {self.progress.step + 1}", (self.progress.step + 1, 0)
                )
                start = time.perf_counter()
                window = [batch.to(self.accelerator.device) for batch in next(windows)]
                yield window, time.perf_counter() - start

    def _step(self, batches: list[Batch], step: int, rates: Rates) -> float:
        """One optimizer step; returns the highest learning rate used.

        The gradient is that of the mean over all supervised items of all micro-batches and ranks.
        """
        accelerator = self.accelerator
        ids = [identity for batch in batches for identity in batch.ids]
        self.watch.at(f"step {step}, meeting the others", (step, 1))
        counts = [self.objective.count(batch) for batch in batches]
        # Rows without supervised items fill up a process's batches; their number may vary, so the
        # digest omits them.
        counted = (
            identity
            for batch, count in zip(batches, counts, strict=True)
            if count
            for identity in batch.ids
        )
        mine = [sum(counts), digest(counted), round(sum(map(self._cost, batches)))]
        by_rank: Any = accelerator.gather(torch.tensor([mine], device=accelerator.device))
        rates.work(by_rank[:, 2])
        total = max(int(by_rank[:, 0].sum()), 1)
        samples = int(by_rank[:, 1].sum()) % DIGESTS
        summed = torch.zeros((), device=accelerator.device)
        self.watch.at(f"step {step}", (step, 2))
        for place, batch in enumerate(batches):
            rates.add(batch)
            last = place == len(batches) - 1
            with self.engine.micro_batch(last=last):
                loss = self.objective(self.engine.model, batch)
                self.engine.backward(loss.sum / total)
            summed += loss.sum.detach()
        value = float(_summed(accelerator, summed))
        factor = schedule_factor(self.recipe.train.schedule, *self._schedule_place(step))
        norm = self.engine.clip(factor)
        if self.nonfinite.allows(step, value, norm, ids, self.folder, last=step >= self.total):
            self.engine.step()
            rates.loss = rates.loss + value
            rates.count = rates.count + total
        else:
            self.engine.skip()
        if accelerator.is_main_process:
            write_step(
                self.folder,
                Step(
                    step,
                    json_number(value),
                    None if norm is None else json_number(norm),
                    f"{samples:x}",
                ),
            )
        return factor * max(self.engine.rates)

    def _cost(self, batch: Batch) -> float:
        """The cost of a batch's forward and backward pass, in tokens."""
        images = batch.pixels if batch.features is None else batch.features
        return batch.input_ids.numel() + self.data.image_cost * (
            0 if images is None else len(images)
        )

    def _stopping(self) -> bool:
        """Whether any process is asked to stop.

        Raises `TrainingError` on all processes if the last checkpoint could not be written.
        """
        flags = torch.tensor(
            [int(self.stop()), int(self.writer.failed())], device=self.accelerator.device
        )
        stop, failed = (int(value) for value in _summed(self.accelerator, flags))
        if failed:
            self.writer.wait()
            raise TrainingError("the first process could not write its checkpoint")
        return bool(stop)

    def _evaluate(self, step: int) -> None:
        self.watch.at(f"the evaluation of step {step}", (step, 3))
        with (
            self.engine.inference(),
            eager() if self._compiles else contextlib.nullcontext(),
            attending(self.model.llm.model, self._attention),
        ):
            scores = self._generated() if self.objective.generates else self._matched()
        self.model.train()
        self.progress.unscored = scores is None
        if scores is None:
            return
        self.report({"event": "evaluate", "step": step, **scores})
        better = self.progress.best_score is None or scores["accuracy"] >= self.progress.best_score
        # Of equal scores the later wins: that model has trained longer. Weights with a non-finite
        # loss are never the best.
        if better and math.isfinite(scores["loss"] or 0.0) and not self.nonfinite.in_a_row:
            self.progress.best_score = scores["accuracy"]
            self.progress.best_step = step
        self.progress.history.append(
            {"step": step, **{key: scores[key] for key in ("loss", "accuracy", "n")}}
        )

    def _generated(self) -> dict[str, Any] | None:
        """Scores of generated answers; None if the run is asked to stop meanwhile."""
        settings = self.recipe.evaluate
        rows = self.data.validation[: settings.limit]
        # Where weights are gathered as modules run, all ranks must run the same modules equally
        # often: they score the same rows.
        together = self.engine.sharded
        mine = (
            rows
            if together
            else rows[self.accelerator.process_index :: self.accelerator.num_processes]
        )

        def progress(done: int, of: int) -> None:
            self.watch.at(f"the evaluation, {done} of {of} rows")
            self.report({"event": "scoring", "done": done, "of": of})
            if self._stopping() if together else self.stop():
                raise _CutShort

        scores: Scores | None = None
        with contextlib.suppress(_CutShort), self.accelerator.autocast():
            scores = score(
                self.model,
                mine or rows[:1],
                decoding=Decoding(settings.max_new_tokens, settings.num_beams),
                batch_size=settings.batch_size,
                features=self.data.validation_features,
                progress=progress,
            )
        shards = gather_object([scores])
        if any(shard is None for shard in shards):
            return None
        return (shards[0] if together or len(shards) == 1 else join_scores(shards)).summary()

    @torch.no_grad()
    def _matched(self) -> dict[str, Any]:
        """Loss and accuracy, over the whole validation part, of an objective without generation."""
        self.model.eval()
        examples = [
            example
            for row in self.data.validation[: self.recipe.evaluate.limit]
            for example in self.model.processor.examples(row)
        ]
        stored = self.data.validation_features
        batch = collate(
            examples,
            self.model.processor.spec,
            fetch=stored or self.pixels,
            cached=stored is not None,
        )
        batch = batch.to(self.accelerator.device)
        with self.accelerator.autocast():
            loss = self.objective(self.model, batch)
        return {
            "loss": float(loss.sum) / max(loss.count, 1),
            "accuracy": (loss.correct or 0) / max(loss.count, 1),
            "n": loss.count,
        }

    def _save(self, step: int) -> None:
        """Starts to write a checkpoint.

        Not while the loss is not finite, so that it does not replace a good one.
        """
        if self.nonfinite.in_a_row:
            return
        self.watch.at(f"the checkpoint of step {step}", (step, 4))
        states = gather_object([random_state()])
        if self.accelerator.is_main_process:
            self.writer.save(step, self._captured(states), self.progress.best_step)
        elif self.engine.collects:
            self._captured(states)


def _summed(accelerator: Accelerator, value: torch.Tensor) -> torch.Tensor:
    """The tensor's sum over all ranks."""
    total: Any = accelerator.reduce(value, "sum")
    return total
