"""Values in messages: short, named in plain words, and harmless to a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_tune.quoting import (
    QUOTED,
    QUOTED_NAME,
    REASON,
    cut,
    escaped,
    json_line,
    name_list,
    quoted,
    reason_of,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain 蓝 é 😀", "plain 蓝 é 😀"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\u202eb\u200bc\ufeff", r"a\u202eb\u200bc\ufeff"),
        ("half \ud83d", r"half \ud83d"),
        ("line\nnext\ttab\0", r"line\nnext\ttab\x00"),
    ],
)
def test_what_does_not_print_is_escaped(text: str, shown: str) -> None:
    assert escaped(text) == shown
    assert escaped(text).isprintable() and escaped(text).encode()


@pytest.mark.parametrize(
    "text",
    [
        "plain 蓝 é 😀",
        'a "b" \\',
        "\x7f\x9b31m",
        "\u202e\u2028",
        "\ue000\U000e0041",
        "\ud83d",
        "\n\t\0",
    ],
)
def test_json_for_a_terminal_prints_and_holds_the_same(text: str) -> None:
    line = json_line({text: [text, Path("a")]})
    assert line.isprintable() and line.encode()
    assert json.loads(line) == {text: [text, "a"]}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "nothing (null)"),
        (True, "true"),
        (0.5, "0.5"),
        (float("nan"), "nan"),
        (10**1000, "an integer of 3,322 bits"),
        ("it's", "'it's'"),
        ("", "''"),
        ("x" * 5000, f"'{'x' * QUOTED}'... (5,000 characters)"),
        (b"\x00" * 2048, "2,048 bytes"),
        ({}, "an empty mapping"),
        ({"url": "x" * 9000, "b": 1}, "a mapping with url, b"),
        ([], "an empty list"),
        ([1, {"a": 2}], "a list of 2"),
        (object(), "a object"),
    ],
)
def test_a_value_is_named_in_few_words(value: Any, shown: str) -> None:
    assert quoted(value) == shown


def test_a_mapping_of_long_keys_is_cut() -> None:
    assert len(quoted({f"{number}" * 200: 1 for number in range(9)})) < 2 * QUOTED
    assert cut("short") == "short" and cut("y" * 300) == f"{'y' * QUOTED}... (300 characters)"


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("one\n\n  two \n"), "one; two"),
        (KeyError(), "KeyError"),
        (OSError("\x1b[31m" + "x" * 9), r"\x1b[31mxxxxxxxxx"),
    ],
)
def test_a_library_s_error_is_one_line(error: Exception, shown: str) -> None:
    assert reason_of(error) == shown


def test_a_long_error_of_a_library_is_cut() -> None:
    text = reason_of(ValueError("line\n" * 1000))
    assert len(text) < REASON + 40 and "\n" not in text


def test_a_list_of_names_is_cut_by_name_and_by_number() -> None:
    assert name_list(["a", "b\x1b", 3]) == r"a, b\x1b, 3"
    assert name_list([]) == ""
    assert name_list(map(str, range(30)), 3) == "0, 1, 2 and 27 more"
    assert len(name_list(["x" * 9000] * 1000)) < 25 * (QUOTED_NAME + 30)
