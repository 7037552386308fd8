"""Detection of a text's language."""

from __future__ import annotations

from vlm_tune.errors import DataError


def language_of(text: str) -> str | None:
    """The ISO 639-1 code of a text's most probable language.

    Returns None for a text without evidence (numbers, a name). Raises `DataError` without the
    `language` extra.
    """
    try:
        import py3langid
    except ImportError:
        raise DataError(
            "clean.languages needs the `language` extra: pip install 'vlm_tune[language]'",
            source="data.clean",
        ) from None
    code, score = py3langid.classify(text)
    # The library scores a text without any feature of its model with the smallest float.
    return str(code) if score > -1e30 else None
