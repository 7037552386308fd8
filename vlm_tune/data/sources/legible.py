"""Whether a text is one that a reader can see, and which cells of a table hold no value."""

from __future__ import annotations

import re
import unicodedata

SURROGATE = re.compile("[\ud800-\udfff]")
BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols without ink: Hangul fillers, and the braille pattern without a dot."""
UNSEEN = {"Cc", "Cf", "Co", "Cs", "Mn", "Me", "Zl", "Zp", "Zs"}
"""Categories of characters that show nothing by themselves: controls, formats, private use, marks, spaces."""

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
"""Cells of CSV and TSV files that are no value, unless the source says which are (`null_values`)."""
MAYBE_NULLS = frozenset(["NA", "N/A", "n/a", "None"])
"""Cells that programs write for no value, and that people write as answers."""


def is_legible(text: str) -> bool:
    """Whether any character of a text can be seen."""
    return any(each not in BLANK and unicodedata.category(each) not in UNSEEN for each in text)
