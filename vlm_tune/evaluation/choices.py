"""Multiple choice: which of the choices an answer names, by its letter or by its text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlm_tune.data.sources.fields import LETTERS
from vlm_tune.evaluation.texts import normalise

ALONE = re.compile(r"\(?([A-Za-z])[).:]?")
"""The whole answer is a letter: `B`, `b`, `(B)`, `B.`."""
LEADING = re.compile(r"(?:\(([A-Z])\)|([A-Z])[).:])\s")
"""The answer begins with a letter that is marked as one: `B. red`, `(B) red`."""
NAMED = re.compile(
    r"(?i:answer|choice|option)(?i: is)?:?\s*"
    r"(?:\(([A-Za-z])\)|([B-HJ-Z])\b|([AI])(?=\s*(?:$|[).:,;]|(?:because|since)\b))"
    r"|([a-z])(?=[).]?\s*$))"
)
"""`The answer is B`, `Answer: (b)`, `option b.`: a lower-case letter in brackets or at the end.

`A` and `I` are words too: nothing but a mark or a reason may follow them.
"""


def letter_place(text: str, count: int) -> int | None:
    """The place, from 0, of the choice whose letter an answer gives; None where it gives none.

    Args:
        text: the answer.
        count: the number of choices.
    """
    text = text.strip()
    match = ALONE.fullmatch(text) or LEADING.match(text) or NAMED.search(text)
    if match is None:
        return None
    letter = next(group for group in match.groups() if group)
    place = LETTERS.index(letter.upper())
    return place if place < count else None


def names_choice(text: str, choices: Sequence[str], place: int) -> bool:
    """Whether an answer is the words of the choice at a place, compared as in exact match.

    A letter before the words (`B. red`) does not count.
    """
    marked = LEADING.match(text.strip())
    answers = [text, *([text.strip()[marked.end() :]] if marked else [])]
    return normalise(choices[place]) in map(normalise, answers)
