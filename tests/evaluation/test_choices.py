"""Answers to multiple choice, by letter and by text."""

from __future__ import annotations

import pytest

from vlm_tune.evaluation.choices import letter_place, text_place

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
    ],
)
def test_a_letter_is_read_where_it_is_one(text: str, place: int | None) -> None:
    assert letter_place(text, len(CHOICES)) == place


@pytest.mark.parametrize(
    ("text", "place"),
    [("Red.", 0), ("B. A blue car", 1), ("a  BLUE car", 1), ("B", None), ("blue", None)],
)
def test_a_text_is_read_as_exact_match_reads_it(text: str, place: int | None) -> None:
    assert text_place(text, CHOICES) == place
