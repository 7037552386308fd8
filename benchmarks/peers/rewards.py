"""A reward that a comparison of both sides trains by; it costs next to nothing."""

from __future__ import annotations

from typing import Any


def vowels(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """The share of vowels in each completion's text, which differs within any group."""
    texts = [messages[0]["content"].lower() for messages in completions]
    return [sum(map(text.count, "aeiou")) / max(len(text), 1) for text in texts]
