"""What the README and docs/ show: commands parse, the recipe loads, calls fit, links lead on."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import png
from vlm_tune.cli.entry import app
from vlm_tune.config.load import parse_recipe
from vlm_tune.resources import resource_names

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    (page.name, line.strip().removeprefix("$ "))
    for page in PAGES
    for line in page.read_text(encoding="utf-8").splitlines()
    if re.match(r" *(\$ )?vlm-tune [a-z]", line)
]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[line[:60] for _, line in COMMANDS])
def test_a_shown_command_parses(page: str, line: str) -> None:
    name, *arguments = shlex.split(line.split(" > ")[0], comments=True)[1:]
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, arguments)


def test_the_readmes_recipe_loads() -> None:
    (text,) = blocks("yaml")
    assert parse_recipe(text, "README.md").name == "my-vqa"


def test_the_readmes_calls_fit_the_functions() -> None:
    (code,) = blocks("python")
    tree = ast.parse(code)
    names: dict[str, object] = dict(vars(builtins))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            names |= {alias.name: getattr(module, alias.name) for alias in node.names}
    names["vlm"] = names["VisionLanguageModel"]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert len(calls) == 7
    for call in calls:
        target = _target(call.func, names)
        unbound = inspect.isfunction(target) and isinstance(call.func, ast.Attribute)
        arguments = [None] * (len(call.args) + unbound)
        keywords = {str(keyword.arg): None for keyword in call.keywords}
        inspect.signature(target).bind(*arguments, **keywords)  # type: ignore[arg-type]


def test_the_python_page_runs(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = talkative(tiny_recipe("causal"), data__max_length=512)
    for run in ("mine", "other", "captions"):
        model.save_pretrained(tmp_path / "runs" / run)
    for name in ("shape", "other"):
        (tmp_path / f"{name}.png").write_bytes(png((200, 30, 30)).read())
    monkeypatch.chdir(tmp_path)
    code = blocks("python", (ROOT / "docs/python.md").read_text(encoding="utf-8"))
    assert len(code) == 9
    names: dict[str, Any] = {}
    for block in code:
        exec(block, names)
    assert names["images"].shape == (20, 32) and names["texts"].shape == (3, 32)
    assert names["chat"].turns == [] and set(names["answer"].probabilities) >= {"red", "blue"}


def _target(function: ast.expr, names: dict[str, object]) -> object:
    if isinstance(function, ast.Attribute):
        return getattr(_target(function.value, names), function.attr)
    assert isinstance(function, ast.Name)
    return names[function.id]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://")):
            assert (page.parent / link).exists(), link


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", index)) == pages


def test_the_recipes_page_lists_every_recipe() -> None:
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.-]+)` \|", page, re.MULTILINE)
    assert sorted(rows) == resource_names("recipes")


def test_every_fault_has_its_test() -> None:
    """Of the list in tests/faults/README.md, and no test is of a fault that is not listed."""
    folder = ROOT / "tests"
    listed = {
        int(number)
        for line in (folder / "faults/README.md").read_text(encoding="utf-8").splitlines()
        if re.match(r"\| \d", line)
        for number in line.split("|")[1].split(",")
    }
    tested = {
        int(number)
        for path in folder.rglob("test_*.py")
        for number in re.findall(r"def test_fault_(\d+)_", path.read_text(encoding="utf-8"))
    }
    assert listed == tested == set(range(1, 69))
