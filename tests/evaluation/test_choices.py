"""Answers to multiple choice, by letter and by text."""

from __future__ import annotations

import pytest

from vlm_tune.evaluation.choices import letter_place, names_choice

CHOICES = ("red", "a blue car", "green")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("B", 1),
        ("b", 1),
        (" (B) ", 1),
        ("B.", 1),
        ("B. a blue car", 1),
        ("(C) green", 2),
        ("The answer is B", 1),
        ("Answer: (c)", 2),
        ("A blue car", None),
        ("D", None),
        ("a blue car", None),
        ("", None),
        ("Because", None),
        ("the answer is b.", 1),
        ("Answer: (a) because it is", 0),
        ("The answer is C because it is", 2),
        ("The answer is A, as it is", 0),
        ("The answer is a dog.", None),
        ("The answer is A dog", None),
        ("The answer is \u0130", None),
        ("The answer is \u212a", None),
    ],
)
def test_a_letter_is_read_where_it_is_one(text: str, place: int | None) -> None:
    assert letter_place(text, len(CHOICES)) == place


def test_a_pronoun_is_no_letter() -> None:
    assert letter_place("My choice: I do not know", 26) is None
    assert letter_place("My choice: I", 26) == 8


@pytest.mark.parametrize(
    ("text", "place"),
    [("Red.", 0), ("B. A blue car", 1), ("a  BLUE car", 1), ("B", None), ("blue", None)],
)
def test_a_text_is_read_as_exact_match_reads_it(text: str, place: int | None) -> None:
    named = [number for number in range(len(CHOICES)) if names_choice(text, CHOICES, number)]
    assert named == ([] if place is None else [place])


def test_choices_that_are_equal_but_for_case_are_both_right() -> None:
    assert names_choice("US", ("us", "US"), 0) and names_choice("US", ("us", "US"), 1)
