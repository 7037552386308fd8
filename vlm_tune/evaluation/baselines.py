"""Answers without training, beside which a score is read: what a question alone tells, and what the
tower's features tell without the language model.

This module does not import torch.

Shapes: N rows, D width of the features.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from vlm_tune.data.regions import Region, pixel_text
from vlm_tune.data.types import Conversation
from vlm_tune.evaluation.texts import normalise

TITLES = {
    "majority": "most frequent answer",
    "same_question": "question's usual answer",
    "mean_box": "mean box",
    "nearest": "nearest image's answer",
    "probe": "linear probe",
    "blind": "model without image",
}
"""The names of the baselines in tables."""
NOUNS = {"audio": "clip", "video": "video"}
"""What the titles call the rows' medium where it is no image."""
SIMILARITIES = 50_000_000
"""Similarities of images that are in memory at a time."""
GROUP_ROWS = 2000
"""Training rows of one question that a probe is fitted to."""
LEAST_REPEATS = 2.0
"""Mean number of training rows of an answer from which a probe is fitted."""
PASSES = 300
"""Most iterations of a probe's fit."""


def baseline_title(name: str, modality: Any) -> str:
    """A baseline's name in tables of scores on images, videos or audio."""
    noun = NOUNS.get(modality)
    of_noun = {"nearest": f"nearest {noun}'s answer", "blind": f"model without the {noun}"}
    return of_noun[name] if noun and name in of_noun else TITLES.get(name, name)


@dataclass(frozen=True)
class Known:
    """A question with its answer, as the baselines see it.

    Attributes:
        question: what rows that ask the same have in common.
        answer: the reference answer.
    """

    question: str
    answer: str

    @classmethod
    def of(cls, row: Conversation) -> Known:
        """The last question of a row, and its answer.

        A classification's phrasings and orders of choices are one question.
        """
        references = row.references
        if references.form == "classify":
            question = _choices_key(references.choices)
        else:
            question = normalise(row.question)
        return cls(question, row.messages[-1].text.strip())


@lru_cache(maxsize=64)
def _choices_key(choices: tuple[str, ...]) -> str:
    """A digest of choices in any order: there may be thousands, of thousands of rows."""
    listed = "\n".join(sorted(map(normalise, choices)))
    return f"choices {hashlib.sha256(listed.encode('utf-8', 'surrogatepass')).hexdigest()}"


def _most_common(answers: Sequence[str]) -> str:
    return Counter(answers).most_common(1)[0][0]


def majority(training: Sequence[Known], rows: Sequence[Known]) -> list[str]:
    """The most frequent training answer, for every row."""
    return [_most_common([known.answer for known in training])] * len(rows)


def _by_question(training: Sequence[Known]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = defaultdict(list)
    for place, known in enumerate(training):
        places[known.question].append(place)
    return places


def same_question(training: Sequence[Known], rows: Sequence[Known]) -> list[str]:
    """The most frequent training answer to the same question; to all where it is not known."""
    common = {
        question: _most_common([training[place].answer for place in places])
        for question, places in _by_question(training).items()
    }
    overall = _most_common([known.answer for known in training])
    return [common.get(row.question, overall) for row in rows]


def mean_box(training: Sequence[Conversation], rows: Sequence[Conversation]) -> list[str]:
    """The mean of training boxes, as shares of their images, for every row that has one.

    Boxes are those of answers with one box and no other. Other rows get an empty answer; all do
    where there is nothing to take the mean of.
    """
    shares = [_shares(box) for box in map(_only_box, training) if box is not None]
    if not shares:
        return [""] * len(rows)
    mean = np.mean(shares, axis=0)
    boxes = [_only_box(row) for row in rows]
    return ["" if box is None else pixel_text(mean * (box.size * 2)) for box in boxes]


def _only_box(row: Conversation) -> Region | None:
    """The box of a row's answer, if it has one and no other region."""
    regions = [part for part in row.messages[-1].parts if isinstance(part, Region)]
    return regions[0] if len(regions) == 1 and len(regions[0].coordinates) == 4 else None


def _shares(box: Region) -> np.ndarray:
    return np.array(box.coordinates) / (box.size * 2)


Answered = Callable[[list[str], np.ndarray, np.ndarray], list[str]]
"""Answers of training rows, their features and those of rows to answer, to answers of these."""


def _for_each_question(
    training: Sequence[Known],
    features: np.ndarray,
    rows: Sequence[Known],
    row_features: np.ndarray,
    answered: Answered,
) -> list[str]:
    """Answers the rows of each question from the training rows of the same one.

    A question that training has not is answered from all training rows.
    """
    known = _by_question(training)
    wanted: dict[str | None, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        wanted[row.question if row.question in known else None].append(place)
    answers = [""] * len(rows)
    for question, places in wanted.items():
        source = list(range(len(training))) if question is None else known[question]
        texts = [training[place].answer for place in source]
        given = answered(texts, features[source], row_features[places])
        for place, text in zip(places, given, strict=True):
            answers[place] = text
    return answers


def nearest(
    training: Sequence[Known], features: np.ndarray, rows: Sequence[Known], row_features: np.ndarray
) -> list[str]:
    """The answer to the same question about the training image with the largest cosine similarity.

    Args:
        training: the training rows [N].
        features: of their images [N, D].
        rows: the rows to answer.
        row_features: of their images.
    """
    return _for_each_question(training, features, rows, row_features, _nearest)


def _nearest(answers: list[str], features: np.ndarray, others: np.ndarray) -> list[str]:
    known = _unit(features).T
    step = max(SIMILARITIES // len(answers), 1)
    chunks = (_unit(others[start : start + step]) for start in range(0, len(others), step))
    return [answers[place] for chunk in chunks for place in (chunk @ known).argmax(1).tolist()]


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def repeats(training: Sequence[Known]) -> bool:
    """Whether answers repeat enough for a probe."""
    distinct = len({(known.question, known.answer) for known in training})
    return len(training) >= LEAST_REPEATS * max(distinct, 1)


def probe(
    training: Sequence[Known], features: np.ndarray, rows: Sequence[Known], row_features: np.ndarray
) -> list[str]:
    """A logistic regression on the tower's features for each question; arguments as `nearest`.

    Features are standardised, and of a question at most `GROUP_ROWS` training rows are used.
    """
    return _for_each_question(training, features, rows, row_features, _probe)


def _probe(answers: list[str], features: np.ndarray, others: np.ndarray) -> list[str]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    chosen = np.linspace(0, len(answers) - 1, min(len(answers), GROUP_ROWS)).astype(int)
    fitted = [answers[place] for place in chosen.tolist()]
    names = sorted(set(fitted))
    if len(names) < 2:
        return names * len(others)
    number = {name: place for place, name in enumerate(names)}
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=PASSES))
    with warnings.catch_warnings():
        # A fit that is cut short is a probe all the same.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features[chosen], [number[name] for name in fitted])
    return [names[place] for place in model.predict(others).tolist()]


def probe_work(training: Sequence[Known], rows: Sequence[Known], width: int) -> float:
    """The multiplications of the fits of `probe`, about."""
    by_question = _by_question(training)
    questions = {row.question for row in rows}
    groups = [places for question, places in by_question.items() if question in questions]
    if not questions <= by_question.keys():
        groups.append(list(range(len(training))))
    return sum(
        2.0
        * PASSES
        * width
        * min(len(places), GROUP_ROWS)
        * min(len({training[place].answer for place in places}), GROUP_ROWS)
        for places in groups
    )
