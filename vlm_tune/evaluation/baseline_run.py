"""Computes the baselines of an evaluation, those that are cheap unless the recipe names them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal, TypeVar, get_args

import numpy as np
import torch

from vlm_tune.config.train import Baseline, EvaluateSection
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.types import Conversation, Media, distinct_media
from vlm_tune.errors import DataError, ModelError
from vlm_tune.evaluation.answering import answer_rows
from vlm_tune.evaluation.assessment import Measured, clusters_of, compare_answers
from vlm_tune.evaluation.baselines import (
    Known,
    majority,
    mean_box,
    nearest,
    probe,
    probe_work,
    repeats,
    same_question,
)
from vlm_tune.evaluation.metrics import Scores
from vlm_tune.evaluation.texts import normalise
from vlm_tune.model.feature_cache import has_features, token_count, tower_features
from vlm_tune.model.feature_choice import trains_tower
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.tower_pass import tower_batches
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.quoting import reason_of

CHEAP = 60.0
"""Seconds up to which `auto` computes a baseline."""
MOST_ROWS = 20_000
"""Training rows that baselines use."""
MOST_READ = 200_000
"""Training rows up to which `auto` reads those that baselines use."""
MOST_IMAGES = 50_000
"""Training images up to which the features that a run has cached are looked for."""
RATE = 2e9
"""Multiplications a second of a probe's fit."""
TIMED = 16
"""Images that are timed for an estimate."""

Given = TypeVar("Given")


@dataclass(frozen=True)
class Training:
    """Training rows for baselines, and the images whose features the run has cached together."""

    rows: list[Conversation] = field(default_factory=list)
    media: list[Media] = field(default_factory=list)


def training_rows(prepared: Prepared, *, few: bool) -> Training:
    """At most `MOST_ROWS` rows of a prepared training part, drawn from all of its sources.

    Args:
        prepared: the training part.
        few: whether more than `MOST_READ` rows, which all are read to draw some, are refused.

    Raises:
        DataError: there are too many rows, or a source has changed.
    """
    places = prepared.places("train")
    if few and len(places) > MOST_READ:
        raise DataError(
            f"to draw from {len(places):,} training rows takes long; evaluate.baselines: "
            "[majority, ...] does that"
        )
    # Drawn, as rows at equal distances may all ask the same question.
    drawn = np.random.default_rng(0).permutation(len(places))[:MOST_ROWS]
    return Training(list(prepared.conversations(places[np.sort(drawn)])), prepared.media)


@dataclass
class BaselineRun:
    """The computation of an evaluation's baselines.

    Attributes:
        model: the model that answered the rows.
        rows: the scored rows.
        training: reads the training rows; called where a baseline uses them.
        settings: the recipe's evaluation settings.
        seconds: how long the model would take to answer the rows in this process.
        caches: whether the tower's features may be cached already; what is computed is not stored.
        autocast: as in `tower_features`.
        progress: called with the number of rows that the blind model has answered, and their total.
    """

    model: VisionLanguageNetwork
    rows: Sequence[Conversation]
    training: Callable[[], Training]
    settings: EvaluateSection
    seconds: float
    caches: bool | Literal["auto"]
    autocast: torch.dtype | None = None
    progress: Callable[[int, int], None] | None = None

    def add(self, scores: Scores, measured: Sequence[Measured]) -> None:
        """Adds baselines, and notes on those that are left out, to the scores of `rows`.

        A baseline that fails is one of them: the scores count without it.

        Args:
            scores: the scores of `rows`.
            measured: their metrics, as `assess` returns them.
        """
        chosen = self.settings.baselines
        names: Sequence[str] = get_args(Baseline) if chosen == "auto" else chosen
        notes = scores.notes
        wanted = [name for name in names if name != "blind"]
        answers = self._from_training(wanted, notes) if wanted else {}
        shown = any(row.without_shots().media for row in self.rows)
        if "blind" in names and shown and self._affordable("blind", self.seconds, notes):
            blind = self._attempt("baseline blind is", self._blind, notes)
            if blind is not None:
                answers["blind"] = blind
        clusters = clusters_of(scores.answers)
        missing: dict[str, str] = {}
        for name, texts in answers.items():
            others = [
                replace(
                    answer,
                    generated=text,
                    correct=normalise(text) == normalise(answer.expected),
                    tokens=0,
                    ranks=None,
                )
                for answer, text in zip(scores.answers, texts, strict=True)
            ]
            entries, skipped = compare_answers(measured, clusters, others)
            scores.baselines[name] = entries
            missing |= {metric: f"{name}: {reason}" for metric, reason in skipped.items()}
        notes += [
            f"baselines are not compared by {metric} ({reason})"
            for metric, reason in missing.items()
        ]

    @staticmethod
    def _attempt(what: str, act: Callable[[], Given], notes: list[str]) -> Given | None:
        """The value of a function; None, with a note, where it fails."""
        try:
            return act()
        # Whatever goes wrong, also a stop of the run: the scores beside it have been computed.
        except Exception as error:
            notes.append(f"{what} left out: {reason_of(error)}")
            return None

    # --- from training rows ---

    def _from_training(self, names: Sequence[str], notes: list[str]) -> dict[str, list[str]]:
        """The answers of the baselines that need training rows."""
        training = self._attempt("baselines from training rows are", self.training, notes)
        if training is None:
            return {}
        if not training.rows:
            if not self._auto:
                notes.append("baselines but blind need training rows, of which there are none")
            return {}
        # As the scored answers, those of the training rows are without their reasoning.
        parted = self.model.processor.template.parted
        known = [Known.of(parted(row)) for row in self.rows]
        examples = [Known.of(parted(row)) for row in training.rows]
        answers: dict[str, list[str]] = {}
        if "majority" in names:
            answers["majority"] = majority(examples, known)
        if "same_question" in names:
            answers["same_question"] = same_question(examples, known)
        if self._auto and answers["same_question"] == answers["majority"]:
            answers.pop("same_question")
        if "mean_box" in names:
            boxes = mean_box(training.rows, self.rows)
            if any(boxes):
                answers["mean_box"] = boxes
            elif not self._auto:
                notes.append("baseline mean_box needs rows whose answer is one box")
        visual = [name for name in ("nearest", "probe") if name in names]
        if visual:
            alone = len(visual) == 1
            from_features = self._attempt(
                f"baseline {visual[0]} is" if alone else "baselines nearest and probe are",
                lambda: self._from_features(visual, training, examples, known, notes),
                notes,
            )
            answers |= from_features or {}
        return answers

    @property
    def _auto(self) -> bool:
        return self.settings.baselines == "auto"

    def _affordable(self, name: str, seconds: float, notes: list[str]) -> bool:
        """Whether a baseline is computed; notes what it would cost where not, if it is long."""
        if seconds <= CHEAP:
            return True
        if self._auto:
            notes.append(
                f"baseline {name} left out: it takes about {seconds:,.0f} s; "
                f"evaluate.baselines: [..., {name}] computes it"
            )
        else:
            notes.append(f"baseline {name} takes about {seconds:,.0f} s")
        return not self._auto

    # --- without the image ---

    def _blind(self) -> list[str]:
        """The model's answers to the questions without their images.

        The prompts are those of rows that never had an image: without slots for it.
        """
        model = self.model
        rows = [_without_images(row) for row in self.rows]
        return answer_rows(
            model,
            rows,
            decoding=Decoding(self.settings.max_new_tokens, self.settings.num_beams),
            likelihood=self.settings.answering == "likelihood",
            fetch=PixelCache(model.processor.images),
            cached=False,
            batch_size=self.settings.batch_size,
            progress=self.progress,
        )

    # --- from features ---

    def _from_features(
        self,
        names: Sequence[str],
        training: Training,
        examples: Sequence[Known],
        known: Sequence[Known],
        notes: list[str],
    ) -> dict[str, list[str]]:
        """The answers of nearest neighbours and of a probe, where rows have images.

        Raises `VlmTuneError` for an image that can't be read, and for features that are not finite.
        """
        rows = [row.without_shots() for row in training.rows]
        scored = [row.without_shots() for row in self.rows]
        shown = all(row.media for row in (*rows, *scored))
        if self.model.llm.native:
            if not self._auto:
                notes.append(
                    "baselines nearest and probe need features, which a native model's "
                    "own forward pass keeps to itself"
                )
            return {}
        if self._auto and (not shown or trains_tower(self.model)):
            return {}
        if not shown:
            notes.append("baselines nearest and probe need an image in every row")
            return {}
        if not repeats(examples):
            if not self._auto and "probe" in names:
                notes.append("baseline probe left out: training answers hardly repeat")
            names = [name for name in names if name != "probe"]
        features = self._features(names, training, rows, scored, notes) if names else None
        if features is None:
            return {}
        train, test = features
        if not np.isfinite(train).all() or not np.isfinite(test).all():
            raise ModelError("the tower's features are not finite")
        answers = {}
        if "nearest" in names:
            answers["nearest"] = nearest(examples, train, known, test)
        if "probe" in names:
            work = probe_work(examples, known, train.shape[1]) / RATE
            if self._affordable("probe", work, notes):
                answers["probe"] = probe(examples, train, known, test)
        return answers

    def _features(
        self,
        names: Sequence[str],
        training: Training,
        rows: Sequence[Conversation],
        scored: Sequence[Conversation],
        notes: list[str],
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean features of the training and of the scored rows' images; None if too expensive.

        They are of rows without few-shot examples.
        """
        # Features are cached by the whole set of images, whose bytes have to be read.
        few = len(training.media) <= MOST_IMAGES
        shown = distinct_media(training.rows)
        # The rows are read again, and may name images by other paths than the prepared part does.
        sets = [*([[*training.media, *shown]] if few else []), shown]
        cached = self._cached(*sets)
        scored_cached = self._cached(distinct_media(self.rows))
        new = [
            *(distinct_media(rows) if cached is None else ()),
            *(distinct_media(scored) if scored_cached is None else ()),
        ]
        if new and not self._affordable(" and ".join(names), self._tower_seconds(new), notes):
            return None
        return self._means(rows, cached), self._means(scored, scored_cached)

    def _cached(self, *sets: Sequence[Media]) -> Sequence[Media] | None:
        """The first set of images whose features the cache has."""
        if not self.caches:
            return None
        lookup = (each for each in sets if has_features(self.model, each, autocast=self.autocast))
        return next(lookup, None)

    def _means(self, rows: Sequence[Conversation], cached: Sequence[Media] | None) -> np.ndarray:
        """The mean of each row's features over places and images, float32[N, D].

        They come from the cache of the features of a set of images, or are computed and not stored:
        those of all places may be a thousand times as large.
        """
        shown = distinct_media(rows)
        frames = [self.model.processor.images.whole(item) for item in shown]
        if cached is None:
            features = chain.from_iterable(self._tower(frames))
        else:
            features = map(tower_features(self.model, cached, autocast=self.autocast), frames)
        means = {
            item: each[: token_count(self.model, frame)].float().mean(0).numpy()
            for item, frame, each in zip(shown, frames, features, strict=True)
        }
        return np.stack([np.mean([means[item] for item in row.media], axis=0) for row in rows])

    def _tower(self, media: Sequence[Media]) -> Iterator[torch.Tensor]:
        """The features [B, N, D] of consecutive images."""
        dtype = self.autocast or next(self.model.tower.parameters()).dtype
        with self.model.evaluating():
            yield from tower_batches(self.model, media, dtype)

    def _tower_seconds(self, media: Sequence[Media]) -> float:
        """An estimate of the time that the tower takes for images, from the first few."""
        few = [self.model.processor.images.whole(item) for item in media[:TIMED]]
        seconds = 0.0
        # The first pass may load, compile or tune: the second one is timed.
        for _ in range(2):
            started = time.perf_counter()
            for _ in self._tower(few):
                pass
            seconds = time.perf_counter() - started
        return seconds * len(media) / len(few)


def _without_images(row: Conversation) -> Conversation:
    messages = tuple(
        replace(message, parts=tuple(part for part in message.parts if isinstance(part, str)))
        for message in row.messages
    )
    return replace(row, messages=messages)
