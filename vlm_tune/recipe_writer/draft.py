"""A recipe under construction: its values, each with a reason that becomes a comment."""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass, field, replace
from typing import Any

from vlm_tune.config.load import parse_recipe, quoted_breaks
from vlm_tune.config.recipe import Recipe
from vlm_tune.quoting import escaped

WIDTH = 100
"""Columns of a comment."""
ORDER = (
    "name",
    "output",
    "seed",
    "model",
    "data",
    "objective",
    "train",
    "engine",
    "evaluate",
    "stages",
)
"""The order of a recipe's keys; `tune` comes behind `data`."""


@dataclass
class Draft:
    """Values by their dotted names, reasons by the same names, and the rules of `tune`."""

    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    rules: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    def set(self, name: str, value: Any, reason: str = "") -> None:
        """Sets the value with a dotted name, and the reason for it."""
        self.values[name] = value
        if reason:
            self.reasons[name] = reason
        else:
            self.reasons.pop(name, None)

    def rule(self, reason: str, **rule: Any) -> None:
        """Adds a rule to `tune`, and the reason for it."""
        self.rules.append((rule, reason))

    def copy(self) -> Draft:
        """A draft that can be changed without changing this one."""
        return replace(
            self, values=dict(self.values), reasons=dict(self.reasons), rules=list(self.rules)
        )

    def recipe(self, place: str) -> Recipe:
        """The checked recipe; `place` stands for its file in errors.

        Raises:
            RecipeError: values contradict each other.
        """
        return parse_recipe(self.text(""), place)

    def text(self, title: str) -> str:
        """The recipe as YAML with its comments, under `title`."""
        from ruamel.yaml import YAML
        from ruamel.yaml.comments import CommentedMap, CommentedSeq

        root = CommentedMap()
        for name, value in self._in_order():
            section, _, key = name.partition(".")
            target = root.setdefault(section, CommentedMap()) if key else root
            depth = 2 if key else 0
            shown = quoted_breaks(value)
            target[key or section] = _stages(shown) if name == "stages" else _one_line(shown)
            if name in self.reasons:
                target.yaml_set_comment_before_after_key(
                    key or section, before=_wrapped(self.reasons[name], depth), indent=depth
                )
        rules = CommentedSeq()
        for place, (rule, reason) in enumerate(self.rules):
            rules.append(_one_line(quoted_breaks(rule)))
            if reason:
                rules.yaml_set_comment_before_after_key(place, before=_wrapped(reason, 2), indent=2)
        if self.rules:
            root.insert(_place_of_tune(root), "tune", rules)
        if title:
            root.yaml_set_start_comment(_wrapped(title, 0) + "\n")
        yaml = YAML(typ="rt", pure=True)
        yaml.width = 4096  # a value on one line stays there
        yaml.indent(mapping=2, sequence=4, offset=2)
        stream = io.StringIO()
        yaml.dump(root, stream)
        return stream.getvalue()

    def _in_order(self) -> list[tuple[str, Any]]:
        """The values, section by section."""
        return sorted(self.values.items(), key=lambda item: ORDER.index(item[0].partition(".")[0]))


def _place_of_tune(root: Any) -> int:
    """The place of `tune` in a recipe: behind `data`."""
    return list(root).index("data") + 1 if "data" in root else len(root)


def _stages(stages: Any) -> Any:
    """The stages of a recipe, with a line for each of their keys and rules."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    return CommentedSeq(
        CommentedMap({key: _one_line(value) for key, value in stage.items()}) for stage in stages
    )


def _one_line(value: Any) -> Any:
    """A mapping or list that YAML writes on one line; a list of mappings gets a line for each."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    if isinstance(value, dict):
        mapping = CommentedMap({key: _one_line(child) for key, child in value.items()})
        mapping.fa.set_flow_style()
        return mapping
    if isinstance(value, list):
        sequence = CommentedSeq([_one_line(child) for child in value])
        if not any(isinstance(child, dict) for child in value):
            sequence.fa.set_flow_style()
        return sequence
    return value


def _wrapped(text: str, indent: int) -> str:
    """A comment's text in lines that fit beside its indentation."""
    lines: list[str] = []
    for paragraph in map(escaped, text.split("\n")):
        inner = "    " if paragraph.startswith(" ") else ""
        lines += textwrap.wrap(
            paragraph,
            WIDTH - indent - 2,
            subsequent_indent=inner,
            break_on_hyphens=False,
            break_long_words=False,
        )
    return "\n".join(lines)
