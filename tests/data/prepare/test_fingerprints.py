"""Fingerprints of what is read.

The same for the same rows wherever they lie, and what differs is named.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.chat_samples import processor
from tests.helpers.tiny_models import parsed
from tests.helpers.tiny_recipes import write_color_rows
from vlm_tune.data.prepare.fingerprints import BLOCK, fingerprint_differences
from vlm_tune.train.stage_data import read_stage, stage_fingerprint

Change = Callable[[Path], None]


def fingerprint(recipe: Any) -> dict[str, Any]:
    chat_processor = processor("chatml", "bytes", "causal")
    rows = read_stage(
        recipe,
        chat_processor,
        last=True,
        report=lambda event: None,
        stop=lambda: False,
        quarantine=None,
    )
    return json.loads(json.dumps(stage_fingerprint(recipe, rows)))


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write(path.read_text().splitlines()[0] + "\n")


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"yellow"', '"Yellow"'))


def shorten(path: Path) -> None:
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


def repaint(path: Path) -> None:
    shutil.copy(path.parent / "red.png", path.parent / "blue.png")


def touch(path: Path) -> None:
    path.write_text(path.read_text())


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (append, "8 rows, now 9"),
        (edit, "of 8 rows some of 1 to 8 differ"),
        (shorten, "8 rows, now 7"),
        (repaint, "of 8 rows some of 1 to 8 differ"),
        (touch, None),
    ],
)
def test_changes_of_the_rows_are_told(
    change: Change, difference: str | None, tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    (color_rows.parent / "other").mkdir()
    other = write_color_rows(color_rows.parent / "other")
    recipe = parsed(tiny_recipe("causal"), data__test=[{"kind": "file", "path": str(other)}])
    before = fingerprint(recipe)
    assert (
        set(before) == {"train", "validation", "test"}
        and fingerprint_differences(before, before) == []
    )
    change(color_rows)
    expected = (
        [f"data.{part} {color_rows}: {difference}" for part in ("train", "validation")]
        if difference
        else []
    )
    assert fingerprint_differences(before, fingerprint(recipe)) == expected


def test_what_the_recipe_makes_of_rows_does_not_count_and_sources_do(
    tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    text = tiny_recipe("causal")
    before = fingerprint(parsed(text))
    other = parsed(
        text,
        data__max_length=60,
        data__overlong="drop",
        data__group="image",
        data__clean={"min_chars": 3},
    )
    assert fingerprint_differences(before, fingerprint(other)) == []
    two = parsed(text, data__train=[{"kind": "file", "path": str(color_rows)}] * 2)
    assert fingerprint_differences(before, fingerprint(two)) == [
        f"data.train: {color_rows} was not read before"
    ]
    stream = parsed(text, data__streaming=True)
    streamed = fingerprint(stream)
    assert fingerprint_differences(streamed, fingerprint(stream)) == []
    append(color_rows)
    assert "data.train" in fingerprint_differences(streamed, fingerprint(stream))[0]


def test_rows_that_are_the_same_up_to_a_block_are_told_so() -> None:
    old = {"train": [{"source": "a", "rows": 2500, "digest": "x", "blocks": ["1", "2", "3"]}]}
    new = {"train": [{"source": "a", "rows": 2600, "digest": "y", "blocks": ["1", "2", "4"]}]}
    assert BLOCK == 1000
    assert fingerprint_differences(old, new) == [
        "data.train a: 2,500 rows, now 2,600 (the first 2,000 are the same)"
    ]
