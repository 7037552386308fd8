"""How far a stage is: its place in the data, its steps in all, and its place in the schedule."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlm_tune.config.train import TrainSection
from vlm_tune.data.batching.loader import Feed, Position
from vlm_tune.train.checkpoint import Progress, read_drawn


class StagePosition:
    """The position of a stage in its data, and `progress` with it.

    `in_data` is the feed's position, `total` the stage's number of optimizer steps, those that are
    done included, and `epoch_ended` whether the last step was the last of its epoch.
    """

    def __init__(
        self, feed: Feed, progress: Progress, train: TrainSection, resume_from: Path | None
    ) -> None:
        self.feed = feed
        self.progress = progress
        self.train = train
        self.in_data = self._begin(resume_from)
        self.total = train.steps or self._steps_of(train.epochs or 1)
        self.epoch_ended = False

    def _begin(self, resume_from: Path | None) -> Position:
        """The position in the data at which the loop starts, from a checkpoint or new.

        If the plan has changed since the checkpoint, the schedule's origin is set in `progress`.
        """
        progress = self.progress
        feed = self.feed
        cut = feed.cut()
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
        if self.train.steps:
            return self.progress.step / self.train.steps
        return (position.epoch + self.feed.share(position)) / (self.train.epochs or 1)

    def _steps_of(self, epochs: float) -> int:
        """Optimizer steps of `epochs` epochs, those that are done included; at least one."""
        present = self.in_data
        steps = self.progress.step - present.step
        for epoch in range(present.epoch, math.ceil(epochs)):
            start = replace(present, step=0) if epoch == present.epoch else Position(epoch)
            part = min(epochs - epoch, 1.0)
            done = self.feed.share(start)
            whole = self.feed.steps(start) or 0
            steps += whole if part == 1 else round(whole * max(part - done, 0.0) / (1 - done))
        return max(steps, 1)

    def in_schedule(self, step: int) -> tuple[float, float]:
        """A step and the total number of steps, as the schedule counts them.

        If the plan changed during the run, the steps before the change are rescaled to the share of
        the schedule that was done.
        """
        start, share = self.progress.origin
        total = (self.total - start) / (1 - share)
        return share * total + step - start, total

    def advance(self) -> None:
        """Updates progress and position after a step."""
        self.progress.step += 1
        self.in_data = replace(self.in_data, step=self.in_data.step + 1)
        self.epoch_ended = self.in_data.step == self.feed.steps(self.in_data)
        if self.epoch_ended:
            self.in_data = Position(self.in_data.epoch + 1)
        self._note(self.in_data)

    def epochs_done(self) -> float | None:
        """The epochs done, by rows; None with streaming."""
        if self.feed.steps(self.in_data) is None:
            return None
        return self.in_data.epoch + self.feed.share(self.in_data)

    def drawn(self) -> dict[str, np.ndarray]:
        """Arrays of the feed that a checkpoint stores, so that the epoch can continue from here."""
        return self.feed.drawn(self.in_data)
