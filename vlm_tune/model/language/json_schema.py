"""JSON schemas as grammars of llguidance, which say what tokens an answer may continue with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vlm_tune.errors import ArgumentError
from vlm_tune.quoting import quoted, reason_of

GRAMMAR = 'start: " "? answer\nanswer: %json '
"""A grammar in Lark's notation; a tokenizer's word may begin with a space."""
LINES = "lines: /\\n{0,2}/\n"
"""Up to two line ends, as formats have them before and after reasoning."""
SPACE = {"whitespace_pattern": " "}
"""At most one space between the tokens of JSON: any number of them would not end."""


Mark = list[str | int]
"""A mark of reasoning: texts, and ids of tokens."""


def json_grammar(schema: Any, reasoning: tuple[Mark, Mark] | None = None) -> str:
    """The grammar of the JSON texts that fit a schema.

    Args:
        schema: The schema.
        reasoning: The marks that begin and end the reasoning before an answer; the first is empty
            where the prompt has it.

    Raises:
        ArgumentError: The schema is no mapping, or none that JSON can hold, nothing fits it, or it
            has a keyword that can't be followed token by token.
    """
    from llguidance import LLMatcher

    if not isinstance(schema, Mapping):
        raise ArgumentError(f"json_schema must be a mapping (a JSON schema), got {quoted(schema)}")
    try:
        text = json.dumps({**schema, "x-guidance": SPACE})
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"json_schema can't be written as JSON: {reason_of(error)}") from None
    fault = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(text))
    if fault:
        raise ArgumentError(f"json_schema: no answer can follow it: {' '.join(fault.split())}")
    if reasoning is None:
        return LLMatcher.grammar_from_lark(GRAMMAR + text)
    opening, (end, *others) = reasoning
    # No text holds a token by its id.
    ended = f"[suffix={json.dumps(end)}]" if isinstance(end, str) else ""
    after = others if isinstance(end, str) else [end, *others]
    before = ["lines", *map(_written, opening)] if opening else []
    start = " ".join([*before, "reasoning", *map(_written, after)])
    rules = f"start: {start} lines answer\nreasoning{ended}: /(?s:.*)/\n{LINES}answer: %json "
    return LLMatcher.grammar_from_lark(rules + text)


def _written(part: str | int) -> str:
    """A part of a mark in Lark's notation, as llguidance extends it."""
    return f"<[{part}]>" if isinstance(part, int) else json.dumps(part)
