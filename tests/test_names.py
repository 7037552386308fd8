"""Names, lengths and docstrings as CONTRIBUTING.md asks for them, read from syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path
    for folder in ("vlm_tune", "tests", "benchmarks", "dev")
    for path in (ROOT / folder).rglob("*.py")
)
PACKAGE = [path for path in FILES if path.is_relative_to(ROOT / "vlm_tune")]
FILLERS = {"found", "said", "told", "kept", "held", "asked", "made", "own"}
LONGEST_FILE, LONGEST_FUNCTION = 450, 60


def named(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields the line and name of everything that a file names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_value_is_named_for_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    fillers = [f"line {line}: {name}" for line, name in named(tree) if name in FILLERS]
    assert not fillers, "name each for what it holds"


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{node.name} takes {lines} lines"


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_docstrings_say_what_a_thing_is(path: Path) -> None:
    """None begins with "What"; "Whether" is for what gives a bool."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            continue
        first = (ast.get_docstring(node) or " ").split(" ")[0]
        assert first != "What", getattr(node, "name", "the module")
        if first == "Whether":
            assert isinstance(node, ast.FunctionDef) and "bool" in ast.unparse(
                node.returns or ast.Constant("")
            )
