"""JSON schemas as grammars of llguidance, which say what tokens an answer may continue with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vlm_tune.errors import ArgumentError
from vlm_tune.quoting import quoted, reason_of

GRAMMAR = 'start: " "? answer\nanswer: %json '
"""A grammar in Lark's notation; a tokenizer's word may begin with a space."""
REASONED = """start: {opening} reasoning lines answer
reasoning[suffix={closing}]: /(?s:.*)/
lines: /\\n{{0,2}}/
answer: %json """
"""The same after reasoning, up to the text that ends it, and up to two line ends."""
SPACE = {"whitespace_pattern": " "}
"""At most one space between the tokens of JSON: any number of them would not end."""


def json_grammar(schema: Any, reasoning: tuple[str, str] | None = None) -> str:
    """The grammar of the JSON texts that fit a schema.

    Args:
        schema: The schema.
        reasoning: The texts that begin and end the reasoning before an answer; the first is empty
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
    opening, closing = map(json.dumps, reasoning)
    begin = REASONED.format(opening=opening if reasoning[0] else "", closing=closing)
    return LLMatcher.grammar_from_lark(begin + text)
