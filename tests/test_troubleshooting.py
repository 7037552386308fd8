"""docs/troubleshooting.md names every error, exit code and kind of row.

It quotes messages as the package has them.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from vlm_tune import errors
from vlm_tune.data_check.row_errors import KINDS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))


def rows(heading: str) -> list[str]:
    """The first cells of the tables whose first column is called so."""
    cells: list[str] = []
    inside = False
    for line in PAGE.splitlines():
        first = line.split("|")[1].strip() if line.startswith("|") else None
        if first is None or first == heading:
            inside = first == heading
        elif inside and not first.startswith("---"):
            cells.append(first)
    return cells


def test_every_error_and_exit_code_has_its_line() -> None:
    for kind in subclasses(errors.VlmTuneError):
        if kind.__module__ == "vlm_tune.errors":
            assert f"`{kind.__name__}`" in PAGE, kind
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert codes <= {int(code) for code in rows("exit code")}
    for kind in (
        errors.RecipeError,
        errors.DataError,
        errors.ModelError,
        errors.TrainingError,
        errors.Interrupted,
    ):
        assert f"| {kind.exit_code} | `{kind.__name__}` |" in PAGE


def test_every_kind_of_row_has_its_line_and_no_other() -> None:
    named = re.findall(r"`(\w+)`", " ".join(rows("kind")))
    assert sorted(named) == sorted(KINDS)


def test_every_message_is_one_that_the_package_has() -> None:
    # Of the syntax trees: a long message stands in several pieces in the source.
    texts = "\n".join(
        node.value
        for path in sorted((ROOT / "vlm_tune").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    quoted = [message for cell in rows("message") for message in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 50
    missing = [
        piece
        for message in quoted
        for piece in map(str.strip, message.split("..."))
        if piece and piece not in texts
    ]
    assert missing == []
