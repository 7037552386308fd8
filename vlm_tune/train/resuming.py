"""Checks of a resumed run's folder.

Files that were cut short are reported, and data that has changed is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vlm_tune.data.prepare.fingerprints import fingerprint_differences
from vlm_tune.errors import DataError
from vlm_tune.paths import write_whole
from vlm_tune.quoting import reason_of
from vlm_tune.train.checkpoint import Progress, checkpoints, stage_folder

DATA = "data.json"
"""File with the fingerprints of the data of every stage."""

SHOWN = 8
"""Number of differences that a message shows."""

T = TypeVar("T", list[Any], dict[str, Any])

Note = Callable[[str], None]
"""Shows the user a message."""


def read_json(path: Path, kind: type[T], note: Note, lost: str) -> T | None:
    """The content of a JSON file that an earlier start of the run wrote.

    Returns None where it is missing or can't be read; in the second case a note names the reason
    and what is `lost`.
    """
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text())
        if isinstance(value, kind):
            return value
        fault = f"it holds no {'list' if kind is list else 'mapping'}"
    except (OSError, ValueError) as error:
        fault = reason_of(error)
    note(f"{path.name} can't be read ({fault}): {lost}")
    return None


def data_differences(run: Path, now: Mapping[int, dict[str, Any]], note: Note) -> list[str]:
    """Lines on the data that has changed since the run began.

    `now` holds fingerprints by the number of their stage. A stage that is not in `now` is not
    compared.
    """
    before = read_json(run / DATA, list, note, "whether the data has changed is unknown")
    if before is None or not all(isinstance(stage, dict) for stage in before):
        return []
    try:
        return [
            f"stage {number + 1}: {line}" if len(before) > 1 else line
            for number, stage in enumerate(before)
            if number in now
            for line in fingerprint_differences(stage, now[number])
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        note(f"{DATA} is damaged: whether the data has changed is unknown")
        return []


def changed_data(differences: Sequence[str], advice: str) -> DataError:
    """The error for data that is not what the run began with."""
    lines = [f"  {line}" for line in differences[:SHOWN]]
    if len(differences) > SHOWN:
        lines.append(f"  and {len(differences) - SHOWN:,} more")
    return DataError(
        "\n".join(["the data differs from what the run started with:", *lines, advice])
    )


def write_data(run: Path, now: Sequence[dict[str, Any]]) -> None:
    """Writes the fingerprints of the stages' data to the run's folder."""
    write_whole(run / DATA, json.dumps(now))


def earlier_seconds(run: Path, names: Sequence[str], note: Note) -> float:
    """The seconds that the earlier stages took."""
    total = 0.0
    for number, name in enumerate(names):
        done = read_json(
            stage_folder(run, number, name) / "done.json",
            dict,
            note,
            f"how long stage {name} took is lost",
        )
        seconds = (done or {}).get("seconds")
        total += seconds if isinstance(seconds, int | float) else 0.0
    return total


def damaged_only(run: Path, names: Sequence[str]) -> list[str]:
    """The names of all checkpoints of a run in which none is whole."""
    return [
        folder.name
        for number, name in enumerate(names)
        for folder in checkpoints(stage_folder(run, number, name))
    ]


def forget_after(run: Path, progress: Progress) -> None:
    """Removes the events from the log that a resumed run will repeat, and unreadable lines."""
    path = run / "log.jsonl"
    if not path.is_file():
        return
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            event = json.loads(line)
            where = (int(event.get("stage", 0)), int(event.get("step", 0)))
        except (ValueError, TypeError, AttributeError):
            continue
        if where <= (progress.stage, progress.step):
            lines.append(line + "\n")
    write_whole(path, "".join(lines))
