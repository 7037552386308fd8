"""Visible and invisible characters of texts, and cells of a table that mean a missing value."""

from __future__ import annotations

import re
import unicodedata

SURROGATE = re.compile("[\ud800-\udfff]")
BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols without ink: Hangul fillers, and the empty braille pattern."""
UNSEEN = {"Cc", "Cf", "Co", "Cs", "Mn", "Me", "Zl", "Zp", "Zs"}
"""Unicode categories without ink of their own: controls, formats, private use, marks, spaces."""

NULLS = frozenset(
    [
        "",
        "nan",
        "NaN",
        "-nan",
        "-NaN",
        "null",
        "NULL",
        "<NA>",
        "#N/A",
        "#NA",
        "#N/A N/A",
        "1.#IND",
        "1.#QNAN",
        "-1.#IND",
        "-1.#QNAN",
    ]
)
"""Cells of CSV and TSV files that mean a missing value, unless the source sets `null_values`."""
MAYBE_NULLS = frozenset(["NA", "N/A", "n/a", "None"])
"""Cells that programs write for a missing value, and that people write as answers."""


def is_legible(text: str) -> bool:
    """Whether a text has a visible character."""
    return any(
        character not in BLANK and unicodedata.category(character) not in UNSEEN
        for character in text
    )
