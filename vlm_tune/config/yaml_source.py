"""Reads a recipe's YAML 1.2 into plain values, with the place of each key and value in the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from vlm_tune.errors import Problem, RecipeError
from vlm_tune.paths import is_file, is_folder, reason, shown_path
from vlm_tune.quoting import cut, escaped, quoted, reason_of

MAX_BYTES = 1_000_000
MAX_NODES = 50_000
MAX_DEPTH = 50
OVERRIDE = 120
"""Characters of an override that a message shows as its place."""
ENTRIES = 8
"""Entries of a list that a message names."""

Path = tuple[str | int, ...]
"""A value's path in the recipe: `("tune", 0, "learning_rate")`."""


@dataclass
class Located:
    """Plain values, and the `file:line:column` of each value and key by path."""

    value: Any
    values: dict[Path, str] = field(default_factory=dict)
    keys: dict[Path, str] = field(default_factory=dict)

    def where(self, path: Path, *, key: bool = False) -> str:
        """Returns the place of `path`, or of its nearest parent that the file contains."""
        if key and path in self.keys:
            return self.keys[path]
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path, "recipe")


class _Reader:
    """Builds plain values from a node tree; refuses tags, duplicate keys and oversized trees.

    `name` stands for the file in places. An `option` of the command line is its own place, without
    line and column.
    """

    def __init__(self, name: str, *, option: bool = False) -> None:
        self.name = name
        self.option = option
        self.nodes = 0
        self.problems: list[Problem] = []
        self.located = Located(None)

    def place(self, node: Any) -> str:
        return (
            self.name
            if self.option
            else f"{self.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
        )

    def read(self, node: Any, path: Path) -> Any:
        self.nodes += 1
        # An alias visits the same node again, so counting visits bounds the expansion of aliases.
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:
            limit = (
                f"more than {MAX_NODES:,} values once its aliases are expanded, or nested over "
                f"{MAX_DEPTH} deep"
            )
            raise RecipeError([Problem(self.place(node), f"{limit}; a recipe is never that large")])
        self.located.values[path] = self.place(node)
        kind = str(node.tag).rsplit(":", 1)[-1]
        if not str(node.tag).startswith("tag:yaml.org,2002:") or "python" in str(node.tag):
            self.problems.append(
                Problem(
                    self.place(node),
                    f"the tag {cut(str(node.tag))} is not allowed; recipes hold plain values",
                )
            )
            return None
        if node.id == "mapping":
            return self._mapping(node, path)
        if node.id == "sequence":
            return [self.read(child, (*path, index)) for index, child in enumerate(node.value)]
        return self._scalar(node, kind)

    def _mapping(self, node: Any, path: Path) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.id != "scalar":
                self.problems.append(Problem(self.place(key_node), "a key must be a plain name"))
                continue
            key = self._text(key_node)
            if key == "<<":
                self.problems.append(
                    Problem(
                        self.place(key_node), "merge keys (<<) are not YAML 1.2; write the keys out"
                    )
                )
                continue
            if key in mapping:
                first = self.located.keys[(*path, key)]
                self.problems.append(
                    Problem(
                        self.place(key_node), f"duplicate key '{cut(key)}', first given at {first}"
                    )
                )
                continue
            self.located.keys[(*path, key)] = self.place(key_node)
            mapping[key] = self.read(value_node, (*path, key))
        return mapping

    def _text(self, node: Any) -> str:
        """Returns a scalar's text; reports NUL and halves of surrogate pairs.

        Escapes may write these, but no name, path or prompt holds them.
        """
        text = str(node.value)
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
            self.problems.append(
                Problem(
                    self.place(node),
                    f"{quoted(text)} contains a NUL or half of a surrogate pair",
                )
            )
        return text

    def _scalar(self, node: Any, kind: str) -> Any:
        text = self._text(node)
        try:
            if kind == "null":
                return None
            if kind == "bool":  # a %YAML 1.1 header also makes bools of yes and no
                return text.lower() == "true" if text.lower() in ("true", "false") else text
            if kind == "int":
                return int(text.replace("_", ""), 0)
            if kind == "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            return text
        return text


def _compose(text: str, name: str, *, option: bool = False) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.reader import ReaderError

    def fault(line: int, column: int, message: str) -> RecipeError:
        return RecipeError(
            [Problem(name if option else f"{name}:{line}:{column}", f"not YAML: {message}")]
        )

    try:
        # Not "rt": the round-trip reader marks the folds of a `>` text with bell characters.
        return YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = escaped(error.problem or error.context or "it can't be read")
        raise fault(*((mark.line + 1, mark.column + 1) if mark else (1, 1)), message) from None
    except ReaderError as error:
        character = error.character if isinstance(error.character, int) else ord(error.character)
        raise fault(
            *_line_column(text[: error.position]),
            f"the character U+{character:04X} is not allowed in YAML",
        ) from None
    except RecursionError:
        raise fault(1, 1, "nested too deeply") from None
    except YAMLError as error:
        raise fault(1, 1, reason_of(error)) from None


def _line_column(before: str) -> tuple[int, int]:
    """Returns line and column, from 1 on, of the character after the text `before`."""
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def read_yaml(path: str | FilePath) -> Located:
    """Reads the values of a YAML file with their places.

    Raises:
        RecipeError: the file is missing, can't be read, is larger than 1 MB or is not UTF-8 YAML
            1.2, or it has duplicate keys, tags or merge keys (all of these at once).
    """
    name = shown_path(path)
    if is_folder(path):
        raise RecipeError([Problem(name or "recipe", "is a folder; a recipe is one YAML file")])
    if not is_file(path):
        raise RecipeError(
            [
                Problem(
                    name, "no such recipe file (`vlm-tune recipes` lists the ones that are shipped)"
                )
            ]
        )
    try:
        with FilePath(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError([Problem(name, f"the recipe can't be read: {reason(error)}")]) from error
    if len(data) > MAX_BYTES:
        raise RecipeError(
            [Problem(name, f"larger than {MAX_BYTES:,} bytes; a recipe is never that large")]
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _line_column(data[: error.start].decode("utf-8-sig", "replace"))
        message = (
            f"not UTF-8 text: {error.reason} (0x{data[error.start]:02x}); save the file as UTF-8"
        )
        raise RecipeError([Problem(f"{name}:{line}:{column}", message)]) from None
    return read_yaml_text(text, name)


def read_yaml_text(text: str, name: str) -> Located:
    """Reads values as `read_yaml`, from text; `name` stands for the file in messages."""
    node = _compose(text, name)
    reader = _Reader(name)
    if node is None or node.id != "mapping":
        kind = (
            {"sequence": "a list", "scalar": "a plain value"}[node.id]
            if node is not None
            else "nothing"
        )
        raise RecipeError(
            [
                Problem(
                    f"{name}:1:1",
                    f"a recipe is a mapping of keys to values, and this file holds {kind}",
                )
            ]
        )
    reader.located.value = reader.read(node, ())
    if reader.problems:
        raise RecipeError(reader.problems)
    return reader.located


def apply_override(located: Located, override: str, option: str = "--set") -> Path:
    """Sets `a.b.0.c=value` (the value is YAML) in place and returns its path.

    The value's place is the option and the override.

    Raises:
        RecipeError: the override lacks `=` or is not text, or its path leads through a plain value
            or to a list entry that does not exist.
    """
    name, equals, text = override.partition("=")
    where = f"{option} {cut(override, OVERRIDE)}"
    if not equals or not name:
        raise RecipeError([Problem(where, "an override is written key.key=value")])
    if not override.isascii() and any("\ud800" <= character <= "\udfff" for character in override):
        raise RecipeError([Problem(where, "an override is UTF-8 text; this one holds other bytes")])
    reader = _Reader(where, option=True)
    node = _compose(text, where, option=True)
    value = None if node is None else reader.read(node, ())
    if reader.problems:
        raise RecipeError(reader.problems)
    path: list[str | int] = []
    target = located.value
    parts = name.split(".")
    for depth, part in enumerate(parts):
        key = _key_of(target, part, path, where)
        path.append(key)
        if depth == len(parts) - 1:
            target[key] = value
            break
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
            located.values[tuple(path)] = where
        target = target[key]
    prefix = tuple(path)
    for known in [known for known in located.values if known[: len(prefix)] == prefix]:
        del located.values[known]
    for known in [known for known in located.keys if known[: len(prefix)] == prefix]:
        del located.keys[known]
    located.values[prefix] = where
    located.keys[prefix] = where
    return prefix


def _key_of(target: Any, part: str, path: list[str | int], where: str) -> str | int:
    """Returns the key or list index that `part` of an override names in the value at `path`.

    Raises `RecipeError` where there is none.
    """
    name = ".".join(map(str, path))
    if isinstance(target, dict):
        return part
    if not isinstance(target, list):
        message = f"{name} is a plain value, it has no key '{cut(part)}'"
    elif not target:
        message = f"{name} is an empty list; set it as a whole: --set {name}=[...]"
    elif part.isdecimal() and int(part) < len(target):
        return int(part)
    else:
        entries = ", ".join(
            f"{name}.{place}{_label(entry)}" for place, entry in enumerate(target[:ENTRIES])
        )
        more = f" and {len(target) - ENTRIES:,} more" if len(target) > ENTRIES else ""
        message = (
            f"{name} is a list of {len(target)}; '{cut(part)}' is not one of its places: "
            f"{entries}{more}"
        )
    raise RecipeError([Problem(where, message)])


def _label(entry: Any) -> str:
    """Describes a list entry in brackets.

    A stage is described by its name, a rule by its match and how, a source by its kind.
    """
    words = [
        str(entry[key])
        for key in ("name", "match", "how", "kind")
        if isinstance(entry, dict) and isinstance(entry.get(key), str)
    ]
    return f" ({cut(' '.join(words), 40)})" if words else ""


def value_at(raw: Any, *path: str) -> Any:
    for part in path:
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def dotted_name(path: Path) -> str:
    return ".".join(str(part) for part in path) or "recipe"
