"""Answers without training, beside which a score is read: what a question alone tells, and what the
tower's features tell without the language model.

This module does not import torch.

Shapes: N rows, D width of the features.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_tune.data.types import Conversation
from vlm_tune.evaluation.texts import normalise

TITLES = {
    "majority": "most frequent answer",
    "same_question": "question's usual answer",
    "nearest": "nearest image's answer",
    "probe": "linear probe",
    "blind": "model without image",
}
"""The names of the baselines in tables."""
GROUP_ROWS = 2000
"""Training rows of one question that a probe is fitted to."""
LEAST_REPEATS = 2.0
"""Mean number of training rows of an answer from which a probe is fitted."""
PASSES = 300
"""Most iterations of a probe's fit."""


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
        last = next((m.text for m in reversed(row.messages) if m.role == "user"), "")
        references = row.references
        question = "\n".join(sorted(references.choices)) if references.form == "classify" else last
        return cls(normalise(question), row.messages[-1].text.strip())


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
    (overall, *_) = majority(training, [training[0]])
    return [common.get(row.question, overall) for row in rows]


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
    wanted: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        wanted[row.question if row.question in known else ""].append(place)
    answers = [""] * len(rows)
    for question, places in wanted.items():
        source = known.get(question) or list(range(len(training)))
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
    similar = _unit(others) @ _unit(features).T
    return [answers[place] for place in similar.argmax(1).tolist()]


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
    classes = np.array(answers)[chosen]
    if len(set(classes.tolist())) < 2:
        return [answers[0]] * len(others)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=PASSES))
    with warnings.catch_warnings():
        # A fit that is cut short is a probe all the same.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features[chosen], classes)
    return model.predict(others).tolist()


def probe_work(training: Sequence[Known], width: int) -> float:
    """The multiplications of the fits of `probe`, about."""
    return sum(
        2.0
        * PASSES
        * width
        * min(len(places), GROUP_ROWS)
        * len({training[place].answer for place in places})
        for places in _by_question(training).values()
    )
