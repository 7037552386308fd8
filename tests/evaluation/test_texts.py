"""Comparisons of texts follow the rules of the benchmarks that they are named after."""

from __future__ import annotations

import random

import pytest

from vlm_tune.evaluation.texts import (
    anls,
    levenshtein,
    relaxed_match,
    vqa_accuracy,
    vqa_normalise,
)

# Made by processPunctuation and processDigitArticle of GT-Vision-Lab/VQA at c4e6a0e.
NORMALISED = [
    ("A red ball.", "red ball"),
    ("two", "2"),
    ("the dog, cat", "dog cat"),
    ("t-shirt", "t shirt"),
    ("1,000", "1000"),
    ("1.5", "1.5"),
    ("It's 3 o'clock", "it's 3 o'clock"),
    ("oclock", "o'clock"),
    ("dont know", "don't know"),
    ("Yes!", "yes"),
    ("black/white", "black white"),
    ("black / white", "black white"),
    ("none", "0"),
    ("U.S.A.", "usa"),
    ("couldn'tve", "couldn't've"),
    ('"stop"', "stop"),
    ("no\tidea\n", "no idea"),
]


@pytest.mark.parametrize(("text", "expected"), NORMALISED)
def test_vqa_normalises_as_its_challenge(text: str, expected: str) -> None:
    assert vqa_normalise(text) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Yes", ["yes"] * 2 + ["no"] * 8, 0.6),
        ("two", ["2"] * 3 + ["3"] * 7, 0.9),
        ("two", ["2"] + ["3"] * 9, 0.3),
        ("red", ["blue"] * 10, 0.0),
        ("4", ["4", "four", "5", "5"], 0.5),
    ],
)
def test_vqa_accuracy_leaves_each_reference_out_once(
    prediction: str, references: list[str], expected: float
) -> None:
    """The values are those of the challenge's own evaluation."""
    assert vqa_accuracy(prediction, references) == pytest.approx(expected, abs=1e-9)


def test_vqa_accuracy_normalises_references_that_are_all_the_same() -> None:
    """The challenge's own script does not, and gives 0."""
    assert vqa_accuracy("blue", ["Blue."] * 10) == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("105.1", "100", False),
        ("-105", "100", False),
        ("50%", "0.5", True),
        ("52", "50%", False),
        (" Yes ", "yes", True),
        ("yes.", "yes", False),
        ("0.0", "0", False),
        ("0", "0", True),
        ("nan", "5", False),
        ("1e999", "5", False),
        ("5 apples", "5", False),
    ],
)
def test_relaxed_match_allows_five_percent(prediction: str, reference: str, same: bool) -> None:
    assert relaxed_match(prediction, reference) is same


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("invoice 42", ["Invoice  42"], 1.0),
        ("invoice 43", ["invoice 42"], 0.9),
        ("abcd", ["abxy"], 0.5),
        ("abcd", ["axyz"], 0.0),
        ("abcd", ["axyz", "abce"], 0.75),
        ("", ["a"], 0.0),
    ],
)
def test_anls_is_the_best_similarity_from_a_half(
    prediction: str, references: list[str], expected: float
) -> None:
    assert anls(prediction, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("", "", 0), ("flaw", "lawn", 2)],
)
def test_levenshtein(one: str, other: str, distance: int) -> None:
    assert levenshtein(one, other) == distance


def test_levenshtein_equals_the_table_of_distances() -> None:
    generator = random.Random(0)
    for _ in range(50):
        one, other = (
            "".join(generator.choices("abc\u0130", k=generator.randint(0, 90))) for _ in range(2)
        )
        row = list(range(len(other) + 1))
        for number, letter in enumerate(one, 1):
            above = row
            row = [number]
            for place, target in enumerate(other):
                row.append(
                    min(above[place + 1] + 1, row[-1] + 1, above[place] + (letter != target))
                )
        assert levenshtein(one, other) == row[-1]
