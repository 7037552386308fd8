"""Classification scores equal scikit-learn's over the classes that references name."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
)

from vlm_tune.evaluation import classes

LABELS = ["cat", "dog", "fish", "owl"]


def drawn(seed: int, rows: int = 200) -> list[tuple[str, str]]:
    """(answer, reference) pairs; some answers are no class, and `owl` is never the reference."""
    generator = random.Random(seed)
    return [
        (generator.choice([*LABELS, "a long sentence", label]), label)
        for label in generator.choices(LABELS[:3], [6, 3, 1], k=rows)
    ]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_are_scikit_learns(seed: int) -> None:
    pairs = drawn(seed)
    totals = np.asarray(classes.class_statistics(pairs).sum(axis=0)).ravel()
    answers, references = zip(*pairs, strict=True)
    for mean, wrap in (("macro", classes.macro), ("micro", classes.micro)):
        expected = precision_recall_fscore_support(
            references,
            answers,
            labels=LABELS[:3],
            average=mean,
            zero_division=0,  # type: ignore[arg-type]
        )
        measures = (classes.precision, classes.recall, classes.f1)
        values = [float(wrap(measure)(totals)) for measure in measures]
        assert values == pytest.approx(expected[:3], abs=1e-6)
    # scikit-learn warns that answers are of classes that are not in the references.
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected_recall = balanced_accuracy_score(references, answers)
    assert float(classes.macro(classes.recall)(totals)) == pytest.approx(expected_recall, abs=1e-6)


def test_scores_of_a_group_leave_out_classes_that_it_has_not() -> None:
    pairs = [("cat", "Cat."), ("dog", "dog"), ("cat", "dog")]
    statistics = classes.class_statistics(pairs)
    first = np.asarray(statistics[:1].sum(axis=0)).ravel()
    assert float(classes.macro(classes.recall)(first)) == 1.0


def test_the_confusion_matrix_is_scikit_learns() -> None:
    pairs = drawn(3)
    table = classes.class_table(pairs)
    assert table is not None and table["labels"] == LABELS[:3]
    known = [(answer if answer in LABELS[:3] else "other", label) for answer, label in pairs]
    answers, references = zip(*known, strict=True)
    expected = confusion_matrix(references, answers, labels=[*LABELS[:3], "other"])[:3]
    assert table["matrix"] == expected.tolist()
    assert [row["n"] for row in table["rows"]] == expected.sum(1).tolist()
    assert table["rows"][0]["recall"] == expected[0, 0] / expected[0].sum()


@pytest.mark.parametrize(
    "pairs",
    [
        [("yes", "yes")] * 5,
        [(str(number), str(number)) for number in range(30)],
        [(str(number), str(number)) for number in range(41)] * 3,
    ],
    ids=["one class", "answers do not repeat", "too many classes"],
)
def test_answers_that_are_no_classes_have_no_matrix(pairs: list[tuple[str, str]]) -> None:
    assert classes.class_table(pairs) is None
