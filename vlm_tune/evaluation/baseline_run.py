"""Computes the baselines of an evaluation, those that are cheap unless the recipe names them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal, get_args

import numpy as np
import torch

from vlm_tune.config.train import Baseline, EvaluateSection
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.types import Conversation, Media, distinct_media
from vlm_tune.errors import VlmTuneError
from vlm_tune.evaluation.assessment import clusters_of, compare_answers, measure
from vlm_tune.evaluation.baselines import (
    Known,
    majority,
    nearest,
    probe,
    probe_work,
    repeats,
    same_question,
)
from vlm_tune.evaluation.metrics import Scores
from vlm_tune.evaluation.texts import normalise
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.model.feature_cache import has_features, tower_features
from vlm_tune.model.feature_choice import caches_images, trains_tower
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.tower_pass import tower_batches
from vlm_tune.model.vlm import VisionLanguageNetwork

CHEAP = 60.0
"""Seconds up to which `auto` computes a baseline."""
MOST_ROWS = 20_000
"""Training rows that baselines read."""
MOST_IMAGES = 50_000
"""Training images up to which the features that a run has cached are looked for."""
RATE = 2e9
"""Multiplications a second of a probe's fit."""
TIMED = 16
"""Images that are timed for an estimate."""


@dataclass(frozen=True)
class Training:
    """Training rows for baselines, and the images whose features the run has cached together."""

    rows: list[Conversation] = field(default_factory=list)
    media: list[Media] = field(default_factory=list)


def training_rows(prepared: Prepared) -> Training:
    """The first rows of a prepared training part, at most `MOST_ROWS`, spread over ten times as
    many.
    """
    places = prepared.places("train")[: 10 * MOST_ROWS]
    chosen = np.unique(np.linspace(0, len(places) - 1, min(len(places), MOST_ROWS)).astype(int))
    return Training(list(prepared.conversations(places[chosen])), prepared.media)


@dataclass
class BaselineRun:
    """The computation of an evaluation's baselines.

    Attributes:
        model: the model that answered the rows.
        rows: the scored rows.
        training: the training rows.
        settings: the recipe's evaluation settings.
        seconds: how long the model took to answer the rows.
        caches: whether the tower's features are cached; auto: where there is room.
        autocast: as in `tower_features`.
        progress: called with the number of rows that the blind model has answered, and their total.
    """

    model: VisionLanguageNetwork
    rows: Sequence[Conversation]
    training: Training
    settings: EvaluateSection
    seconds: float
    caches: bool | Literal["auto"]
    autocast: torch.dtype | None = None
    progress: Callable[[int, int], None] | None = None

    def add(self, scores: Scores) -> None:
        """Adds baselines, and notes on those that are left out, to the scores of `rows`."""
        chosen = self.settings.baselines
        names: Sequence[str] = get_args(Baseline) if chosen == "auto" else chosen
        known = [Known.of(row) for row in self.rows]
        training = [Known.of(row) for row in self.training.rows]
        answers: dict[str, list[str]] = {}
        if training:
            if "majority" in names:
                answers["majority"] = majority(training, known)
            if "same_question" in names:
                answers["same_question"] = same_question(training, known)
            wanted = [name for name in ("nearest", "probe") if name in names]
            answers |= self._from_features(wanted, training, known, scores.notes)
        elif {*names} - {"blind"} and not self._auto:
            scores.notes.append("baselines but blind need training rows, of which there are none")
        shown = any(row.media for row in self.rows)
        if "blind" in names and shown and self._affordable("blind", self.seconds, scores.notes):
            answers["blind"] = self._blind()
        if self._auto and answers.get("same_question") == answers.get("majority"):
            answers.pop("same_question", None)
        measured = measure(scores.answers, self.settings.metrics)[0] if answers else []
        clusters = clusters_of(scores.answers)
        for name, texts in answers.items():
            others = [
                replace(
                    answer,
                    generated=text,
                    correct=normalise(text) == normalise(answer.expected),
                    tokens=0,
                )
                for answer, text in zip(scores.answers, texts, strict=True)
            ]
            scores.baselines[name] = compare_answers(measured, clusters, others)

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
        return answer_prompts(
            model,
            model.processor.prompts(rows),
            Decoding(self.settings.max_new_tokens, self.settings.num_beams),
            fetch=PixelCache(model.processor.images),
            batch_size=self.settings.batch_size,
            progress=self.progress,
        )

    # --- from features ---

    def _from_features(
        self,
        names: Sequence[str],
        training: Sequence[Known],
        known: Sequence[Known],
        notes: list[str],
    ) -> dict[str, list[str]]:
        """The answers of nearest neighbours and of a probe, where rows have images."""
        shown = all(row.media for row in (*self.rows, *self.training.rows))
        if self._auto and (not shown or trains_tower(self.model)):
            return {}
        if not names:
            return {}
        if not shown:
            notes.append("baselines nearest and probe need an image in every row")
            return {}
        if not repeats(training):
            if not self._auto and "probe" in names:
                notes.append("baseline probe left out: training answers hardly repeat")
            names = [name for name in names if name != "probe"]
        try:
            features = self._features(names, notes)
        except VlmTuneError as error:
            notes.append(f"baselines nearest and probe left out: {error}")
            return {}
        if features is None:
            return {}
        train, test = features
        answers = {}
        if "nearest" in names:
            answers["nearest"] = nearest(training, train, known, test)
        work = probe_work(training, train.shape[1]) / RATE
        if "probe" in names and self._affordable("probe", work, notes):
            answers["probe"] = probe(training, train, known, test)
        return answers

    def _features(
        self, names: Sequence[str], notes: list[str]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean features of the training and of the scored rows' images; None if too expensive."""
        model = self.model
        training = distinct_media(self.training.rows)
        caches = caches_images(model, training, self.caches)
        # Features are cached by the whole set of images, whose bytes have to be read.
        few = len(self.training.media) <= MOST_IMAGES
        sets = [*([self.training.media] if few else []), training]
        lookup = (each for each in sets if has_features(model, each, autocast=self.autocast))
        cached = next(lookup, None) if caches else None
        training = training if cached is None else cached
        if cached is None:
            seconds = self._tower_seconds(training)
            if not self._affordable(" and ".join(names), seconds, notes):
                return None
        scored = distinct_media(self.rows)
        return (
            self._means(self.training.rows, training, cached=caches),
            self._means(self.rows, scored, cached=caches_images(model, scored, self.caches)),
        )

    def _means(
        self, rows: Sequence[Conversation], media: Sequence[Media], *, cached: bool
    ) -> np.ndarray:
        """The mean of each row's features over places and images, float32[N, D].

        They come from the cache of the features of `media`, which holds all images of the rows, or
        are computed for the rows' own images.
        """
        alone = [row.without_shots() for row in rows]
        shown = distinct_media(alone)
        if cached:
            features = map(tower_features(self.model, media, autocast=self.autocast), shown)
        else:
            features = chain.from_iterable(self._tower(shown))
        means = {
            item: each.float().mean(0).numpy() for item, each in zip(shown, features, strict=True)
        }
        return np.stack([np.mean([means[item] for item in row.media], axis=0) for row in alone])

    def _tower(self, media: Sequence[Media]) -> Iterator[torch.Tensor]:
        """The features [B, N, D] of consecutive images."""
        dtype = self.autocast or next(self.model.tower.parameters()).dtype
        with self.model.evaluating():
            yield from tower_batches(self.model, media, dtype)

    def _tower_seconds(self, media: Sequence[Media]) -> float:
        """An estimate of the time that the tower takes for images, from the first few."""
        few = media[:TIMED]
        started = time.perf_counter()
        for _ in self._tower(few):
            pass
        return (time.perf_counter() - started) * len(media) / max(len(few), 1)


def _without_images(row: Conversation) -> Conversation:
    messages = tuple(
        replace(message, parts=tuple(part for part in message.parts if isinstance(part, str)))
        for message in row.messages
    )
    return replace(row, messages=messages)
