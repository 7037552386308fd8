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
NO_LIBRARY = {
    "vlm_tune/data/batching/loader.py": {"_exit"},  # of os, documented
    "vlm_tune/data/sources/records.py": {"_shot_places", "_shots"},  # of a copy of its own class
    "vlm_tune/train/signals.py": {"_exit"},
    "vlm_tune/train/watchdog.py": {"_exit"},
}
"""Names that only look private."""
LEFT = {
    # Kernels import nothing of ours but errors and paths.
    "vlm_tune/kernels/reference_attention.py": {"_softmax_backward_data"},
    "vlm_tune/kernels/cpu/native.py": {
        "_is_amx_tile_supported",
        "_is_avx2_supported",
        "_is_avx512_bf16_supported",
        "_is_avx512_supported",
    },
    "vlm_tune/memory_plan/step.py": {"torch._subclasses.fake_tensor.FakeTensorMode"},
    "vlm_tune/memory_plan/tracer.py": {
        "_buffers",
        "_forward_pre_hooks",
        "_modules",
        "_parameters",
        "torch._subclasses.fake_tensor.FakeTensor",
        "torch._subclasses.fake_tensor.FakeTensorMode",
        "torch.utils._python_dispatch.TorchDispatchMode",
        "torch.utils._pytree.tree_map_only",
    },
}
"""Private names of other libraries outside of `vlm_tune/compat*.py`: the list only shrinks."""


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


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_names(tree: ast.AST) -> Iterator[str]:
    """Yields the private names that a file takes from other modules.

    They are names of attributes of anything but `self`, `cls` and `super()`, also by `getattr`,
    `hasattr`, `setattr` and `delattr`, and whole paths of imports.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                continue
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"))):
                continue
            case ast.Attribute(attr=name) if private(name):
                yield name
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr" | "delattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ) if private(name) and ast.unparse(node.args[0]) not in ("self", "cls"):
                yield name
            case ast.Import(names=names):
                yield from (each.name for each in names if any(map(private, each.name.split("."))))
            case ast.ImportFrom(module=str(module), names=names):
                paths = [f"{module}.{each.name}" for each in names]
                yield from (path for path in paths if any(map(private, path.split("."))))


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_private_names_of_other_libraries_are_used_in_compat_alone(path: Path) -> None:
    file = relative(path)
    if file in ("vlm_tune/compat.py", "vlm_tune/compat_engines.py"):
        return
    names = set(private_names(ast.parse(path.read_text(encoding="utf-8"))))
    listed = NO_LIBRARY.get(file, set()) | LEFT.get(file, set())
    assert not names - listed, "write a function and a test of it in compat"
    assert not listed - names, "no longer used: take it off the list"


def test_the_list_of_private_names_is_of_files_that_there_are() -> None:
    assert {*NO_LIBRARY, *LEFT} <= set(map(relative, PACKAGE))


def test_private_names_are_recognised() -> None:
    text = """
import torch._dynamo, os
from torch._C import store
from torch.distributed import _world, ReduceOp
from vlm_tune.version import __version__

class Module(Other):
    def act(self, other):
        super()._act()
        self._count = cls._count + other.__dict__["_count"]
        self.model._buffers.clear()
        return hasattr(other, "_loaded") and getattr(self, "_kind") or getattr(other, name)
"""
    assert set(private_names(ast.parse(text))) == {
        "torch._dynamo",
        "torch._C.store",
        "torch.distributed._world",
        "_buffers",
        "_loaded",
    }
