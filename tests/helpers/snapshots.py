"""What a user reads, as text files in tests/golden/, so that a change of words is reviewed as such.

`make snapshots` writes them anew.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

import vlm_tune
from vlm_tune.cli.entry import COMMANDS, root

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden"


def snapshots() -> dict[str, str]:
    """The texts of all snapshots, by their files in tests/golden/."""
    package = ROOT / "vlm_tune"
    folders: dict[str, list[Path]] = {}
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        folders.setdefault(inside.parts[0] if len(inside.parts) > 1 else "vlm_tune", []).append(
            path
        )
    return {
        "command_line.txt": command_line(),
        "public_api.txt": public_api(),
        **{
            f"messages/{folder}.txt": texts
            for folder, paths in folders.items()
            if (texts := "\n".join(filter(None, map(file_messages, paths))))
        },
    }


# --- the command line -----------------------------------------------------------------------------


def command_line() -> str:
    """Every command with its help, and its arguments and options with theirs.

    It is of what the package declares, and not what one release of typer makes of it.
    """
    commands = {"": root} | COMMANDS
    return "\n".join(
        f"{f'vlm-tune {name}'.strip()}\n    {' '.join((inspect.getdoc(command) or '').split())}\n"
        + "".join(f"  {parameter(each)}\n" for each in parameters(command))
        for name, command in commands.items()
    )


def parameters(command: Callable[..., None]) -> list[inspect.Parameter]:
    every = inspect.signature(command, eval_str=True).parameters.values()
    return [each for each in every if get_origin(each.annotation) is Annotated]


def parameter(each: inspect.Parameter) -> str:
    kind, declared = get_args(each.annotation)
    # Within `Annotated` typer takes the first name for a default.
    names = [name for name in (declared.default, *(declared.param_decls or ())) if name is not ...]
    names = names or [f"--{each.name.replace('_', '-')}"]
    if isinstance(declared, typer.models.ArgumentInfo):
        names = [declared.metavar or each.name.upper()]
    facts = [
        kind.__name__ if inspect.isclass(kind) else re.sub(r"pathlib\.(_local\.)?", "", str(kind)),
        "required" if each.default is inspect.Parameter.empty else f"default {each.default!r}",
        *(["hidden"] if declared.hidden else []),
    ]
    return f"{', '.join(names)} ({', '.join(facts)}): {declared.help or ''}".rstrip()


# --- Python ---------------------------------------------------------------------------------------


def public_api() -> str:
    """Every name of `vlm_tune.__all__`: a function's signature, a class with its public methods."""
    return "".join(
        "".join(f"{line}\n" for line in entry(name, getattr(vlm_tune, name)))
        for name in sorted(vlm_tune.__all__)
    )


def entry(name: str, member: Any) -> Iterator[str]:
    if inspect.isclass(member):
        yield f"class {name}"
        for base in member.__mro__:
            if base.__module__.startswith("vlm_tune."):
                for key, each in vars(base).items():
                    yield from () if key.startswith("_") else attribute(key, each)
    elif callable(member):
        yield f"{name}{inspect.signature(member)}"
        yield f"    {first_line(member)}"
    else:
        yield name


def attribute(name: str, member: Any) -> Iterator[str]:
    if isinstance(member, staticmethod | classmethod):
        member = member.__func__
    if inspect.isfunction(member):
        yield f"    {name}{inspect.signature(member)}"
        yield f"        {first_line(member)}"
    elif isinstance(member, property):
        yield f"    {name}: {first_line(member)}"


def first_line(member: Any) -> str:
    return (inspect.getdoc(member) or "").partition("\n")[0]


# --- messages -------------------------------------------------------------------------------------


def file_messages(path: Path) -> str:
    """The texts of a file with a blank in them, without docstrings, in the order of the source."""
    lines = dict.fromkeys(texts(ast.parse(path.read_text(encoding="utf-8"))))
    title = f"{path.relative_to(ROOT)}\n"
    return title + "".join(f"    {line}\n" for line in lines) if lines else ""


def texts(node: ast.AST) -> Iterator[str]:
    """The texts below a node; `...` stands for what a formatted one puts in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue  # a docstring
        if isinstance(child, ast.JoinedStr):
            text = "".join(
                str(piece.value) if isinstance(piece, ast.Constant) else "..."
                for piece in child.values
            )
            yield from shown(text)
            for piece in child.values:
                if isinstance(piece, ast.FormattedValue):
                    yield from texts(piece)
        elif isinstance(child, ast.Constant):
            yield from shown(child.value) if isinstance(child.value, str) else ()
        else:
            yield from texts(child)


def shown(text: str) -> Iterator[str]:
    if re.search(r"\s", text.strip()) and re.search("[a-z]{2}", text):
        yield ascii(text)[1:-1]


def main() -> None:
    """Writes all snapshots, and removes those of which nothing is left."""
    current = snapshots()
    for path in GOLDEN.rglob("*.txt"):
        if path.relative_to(GOLDEN).as_posix() not in current:
            path.unlink()
    for name, text in current.items():
        path = GOLDEN / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
