"""Reads a recipe's YAML 1.2 into plain values, keeping where each key and value stands in the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from vlm_tune.errors import Problem, RecipeError

MAX_BYTES = 1_000_000
MAX_NODES = 50_000
MAX_DEPTH = 50

Path = tuple[str | int, ...]
"""Where a value stands in the recipe: `("tune", 0, "learning_rate")`."""


@dataclass
class Located:
    """Plain values and, by path, the `file:line:column` of each value and of each key."""

    value: Any
    values: dict[Path, str] = field(default_factory=dict)
    keys: dict[Path, str] = field(default_factory=dict)

    def where(self, path: Path, *, key: bool = False) -> str:
        """The place of `path`, or of its nearest parent that the file contains."""
        if key and path in self.keys:
            return self.keys[path]
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path, "recipe")


class _Reader:
    """Builds plain values from a composed node tree; refuses tags, duplicate keys and oversized trees."""

    def __init__(self, name: str) -> None:
        self.name, self.nodes, self.problems = name, 0, list[Problem]()
        self.located = Located(None)

    def place(self, node: Any) -> str:
        return f"{self.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def read(self, node: Any, path: Path) -> Any:
        self.nodes += 1
        # An alias is the same node met again, so counting visits bounds what aliases can expand to.
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:
            limit = f"more than {MAX_NODES:,} values once its aliases are expanded, or nested over {MAX_DEPTH} deep"
            raise RecipeError([Problem(self.place(node), f"{limit}; a recipe is never that large")])
        self.located.values[path] = self.place(node)
        kind = str(node.tag).rsplit(":", 1)[-1]
        if not str(node.tag).startswith("tag:yaml.org,2002:") or "python" in str(node.tag):
            self.problems.append(Problem(self.place(node), f"the tag {node.tag} is not allowed; recipes hold plain values"))
            return None
        if node.id == "mapping":
            return self._mapping(node, path)
        if node.id == "sequence":
            return [self.read(child, (*path, index)) for index, child in enumerate(node.value)]
        return self._scalar(node, kind)

    def _mapping(self, node: Any, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.id != "scalar":
                self.problems.append(Problem(self.place(key_node), "a key must be a plain name"))
                continue
            key = str(key_node.value)
            if key == "<<":
                self.problems.append(Problem(self.place(key_node), "merge keys (<<) are not YAML 1.2; write the keys out"))
                continue
            if key in found:
                first = self.located.keys[(*path, key)]
                self.problems.append(Problem(self.place(key_node), f"duplicate key {key!r}, first given at {first}"))
                continue
            self.located.keys[(*path, key)] = self.place(key_node)
            found[key] = self.read(value_node, (*path, key))
        return found

    def _scalar(self, node: Any, kind: str) -> Any:
        text = str(node.value)
        try:
            if kind == "null":
                return None
            if kind == "bool":  # a %YAML 1.1 header would make bools of yes and no as well
                return text.lower() == "true" if text.lower() in ("true", "false") else text
            if kind == "int":
                return int(text.replace("_", ""), 0)
            if kind == "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            return text
        return text


def _compose(text: str, name: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        # Not "rt": the round-trip reader marks the folds of a `>` text with bell characters.
        return YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise RecipeError([Problem(where, f"not YAML: {error.problem or error.context}")]) from None
    except (YAMLError, RecursionError) as error:
        raise RecipeError([Problem(name, f"not YAML: {str(error) or 'nested too deeply'}")]) from None


def read_yaml(path: str | FilePath) -> Located:
    """The values of a YAML file with their places.

    Raises `RecipeError` for a file that is missing, larger than 1 MB or not UTF-8 YAML 1.2, and for
    duplicate keys, tags and merge keys (all of them at once).
    """
    file = FilePath(path)
    if not file.is_file():
        raise RecipeError([Problem(str(path), "no such recipe file (`vlm-tune recipes` lists the ones that are shipped)")])
    if file.stat().st_size > MAX_BYTES:
        raise RecipeError([Problem(str(path), f"larger than {MAX_BYTES:,} bytes; a recipe is never that large")])
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError([Problem(str(path), f"not UTF-8 text: {error.reason} at byte {error.start}")]) from None
    return read_yaml_text(text, str(path))


def read_yaml_text(text: str, name: str) -> Located:
    """As `read_yaml`, from text; `name` stands for the file in messages."""
    node = _compose(text, name)
    reader = _Reader(name)
    if node is None or node.id != "mapping":
        raise RecipeError([Problem(f"{name}:1:1", "a recipe is a mapping of keys to values")])
    reader.located.value = reader.read(node, ())
    if reader.problems:
        raise RecipeError(reader.problems)
    return reader.located


def apply_override(located: Located, override: str) -> None:
    """Sets `a.b.0.c=value` (the value is YAML) in place; the override is named as its place.

    Raises `RecipeError` for an override without `=` or a path that leads through a plain value.
    """
    name, equals, text = override.partition("=")
    where = f"--set {override}"
    if not equals or not name:
        raise RecipeError([Problem(where, "an override is written key.key=value")])
    reader = _Reader(where)
    node = _compose(text, where)
    value = None if node is None else reader.read(node, ())
    if reader.problems:
        raise RecipeError(reader.problems)
    path: list[str | int] = []
    target = located.value
    parts = name.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(target, list):
            if not part.isdecimal() or int(part) >= len(target):
                raise RecipeError(
                    [Problem(where, f"{'.'.join(map(str, path))} is a list of {len(target)}; {part!r} is none of its places")]
                )
            key: str | int = int(part)
        elif isinstance(target, dict):
            key = part
        else:
            raise RecipeError([Problem(where, f"{'.'.join(map(str, path))} is a plain value, it has no key {part!r}")])
        path.append(key)
        if last:
            target[key] = value  # type: ignore[index]
        else:
            if isinstance(target, dict) and target.get(part) is None:
                target[part] = {}
                located.values[tuple(path)] = where
            target = target[key]  # type: ignore[index]
    prefix = tuple(path)
    for known in [known for known in located.values if known[: len(prefix)] == prefix]:
        del located.values[known]
    for known in [known for known in located.keys if known[: len(prefix)] == prefix]:
        del located.keys[known]
    located.values[prefix] = where
    located.keys[prefix] = where
