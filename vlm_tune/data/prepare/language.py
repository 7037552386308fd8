"""Which language a text is in."""

from __future__ import annotations

from vlm_tune.errors import DataError


def language_of(text: str) -> str | None:
    """The ISO 639-1 code of a text's most probable language; None where it tells nothing (numbers, a name).

    Raises `DataError` without the `language` extra.
    """
    try:
        import py3langid
    except ImportError:
        raise DataError(
            "clean.languages needs the `language` extra: pip install 'vlm_tune[language]'",
            source="data.clean",
        ) from None
    code, score = py3langid.classify(text)
    # The library's score of a text in which no feature of its model occurs is the least float.
    return str(code) if score > -1e30 else None
