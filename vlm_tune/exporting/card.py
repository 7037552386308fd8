"""The model card: README.md of a merged model or an export."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from vlm_tune.config.model import AnySection
from vlm_tune.run_folder import recipe_above


def model_card(
    metadata: Mapping[str, str | None],
    about: str,
    facts: Sequence[str],
    example: tuple[str, str] | None,
    path: Path | None,
) -> str:
    """A card's text.

    Args:
        metadata: the entries of its header; None is written as none.
        about: what the folder holds.
        facts: the entries of the list below that.
        example: how it is used: the language of the code, and the code.
        path: the model that was read; the scores and the recipe of the run that it lies in are
            added. None adds nothing.
    """
    header = [f"{name}: {text or 'none'}" for name, text in metadata.items()]
    lines = ["---", *header, "---", "", about]
    lines += ["", *(f"- {fact}" for fact in facts)] if facts else []
    lines += ["", f"```{example[0]}", example[1].strip(), "```"] if example else []
    return "\n".join([*lines, *(_run_lines(path) if path else [])]) + "\n"


def described_parts(section: AnySection) -> tuple[str, str, str]:
    """The tower, the connector and the language model of a model in words."""
    tower = getattr(section.tower, "name", None) or "from scratch"
    return (
        f"{tower} ({section.tower.kind})",
        section.connector.kind,
        section.llm.name or "from scratch",
    )


def _run_lines(path: Path) -> list[str]:
    """The scores and the recipe of the run that a model lies in, as far as there are any."""
    recipe = recipe_above(path)
    if recipe is None:
        return []
    scores: list[str] = []
    with suppress(OSError, ValueError, KeyError, TypeError):
        result = json.loads((recipe.parent / "result.json").read_text())
        scores = [
            "",
            "## Scores",
            "",
            f"Exact match on {result['n']:,} test questions: {result['accuracy']:.4f}",
        ]
    return [*scores, "", "## Recipe", "", "```yaml", recipe.read_text().rstrip(), "```"]
