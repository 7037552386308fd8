"""Reads the commands of a shell script: quotes, comments, variables and whole-number arithmetic."""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Iterator, Mapping

# Characters that stand for others while words are split.
QUOTED_DOLLAR = "\ue000"
"""A `$` in double quotes, whose value is one word."""
LITERAL_DOLLAR = "\ue001"
"""A `$` in single quotes or behind a backslash."""
BLANK = "\ue002"
"""White space within `$(...)`, which splits no word."""

VARIABLE = re.compile(rf"[$\{QUOTED_DOLLAR}](?:(\w+)|\{{(\w+)(?::?-([^}}]*))?\}})")
"""`$NAME`, `${NAME}` and `${NAME:-default}`."""
TERMS = r"((?:[^()]|\([^()]*\))*)"
ARITHMETIC = re.compile(rf"[$\{QUOTED_DOLLAR}]\((?:\({TERMS}\)|\s*expr\s{TERMS})\)")
"""`$((A / B))` and `$(expr A / B)`."""
NAME = re.compile(r"[A-Za-z_]\w*")
CONTINUED = re.compile(r"\\[ \t]*\n")
COMMENT = re.compile(r"#[^\n]*")
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}


def commands(text: str) -> Iterator[str]:
    """Yields the commands of a script, one by one, for `words_of`.

    Comments are left out, and lines that go on with a backslash or within quotes are joined.
    """
    text = text.replace("\r\n", "\n")
    command = ""
    quote = ""
    depth = 0
    place = 0
    while place < len(text):
        character = text[place]
        step = 1
        if quote == "'":
            quote = "" if character == "'" else quote
            command += LITERAL_DOLLAR if character == "$" else character
        elif continued := CONTINUED.match(text, place):
            command += " "
            step = len(continued[0])
        elif character == "\\":
            step = 2
            command += LITERAL_DOLLAR if text[place + 1 : place + 2] == "$" else text[place:][:2]
        elif quote:
            quote = "" if character == quote else quote
            command += QUOTED_DOLLAR if character == "$" else character
        elif character == "\n" and not depth:
            yield command
            command = ""
        # shlex takes any # for a comment's begin, and ms-swift has `rows.jsonl#500`.
        elif character == "#" and not command[-1:].strip():
            comment = COMMENT.match(text, place)
            step = len(comment[0]) if comment else 1
        else:
            if character == "(" and (depth or command.endswith("$")):
                depth += 1
            elif character == ")" and depth:
                depth -= 1
            quote = character if character in "'\"" else ""
            command += BLANK if depth and character.isspace() else character
        place += step
    yield command


def words_of(command: str, variables: Mapping[str, str]) -> list[str]:
    """The words of a command, with what is known of its variables and arithmetic in place.

    Raises `ValueError` for a quote that is not closed.
    """
    words: list[str] = []
    for word in shlex.split(command):
        value = _expanded(word, variables)
        # Outside of quotes a variable may hold several words.
        alone = word.startswith("$") and VARIABLE.fullmatch(word) and value != word
        words += value.split() if alone else [value]
    return words


def _expanded(word: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        default = match[0] if match[3] is None else match[3]
        return variables.get(match[1] or match[2], default)

    def number(match: re.Match[str]) -> str:
        expression = match[1] or match[2]
        if match[1]:  # within $((...)) a variable needs no $
            expression = NAME.sub(lambda name: variables.get(name[0], name[0]), expression)
        whole = _whole_number(expression.replace("\\", ""))
        return match[0] if whole is None else str(whole)

    expanded = VARIABLE.sub(value, word.replace(BLANK, " "))
    expanded = ARITHMETIC.sub(number, expanded)
    return expanded.replace(QUOTED_DOLLAR, "$").replace(LITERAL_DOLLAR, "$")


def _whole_number(expression: str) -> int | None:
    """The value of an expression of whole numbers; None for any other."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
        raise ValueError

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError):
        return None
