"""ScienceQA: multiple choice, by subject, context and grade.

A copy is a folder as published (`problems.json`, `pid_splits.json` and `images/` or `<split>/` with
`<id>/image.png`), of which the test part is read, or a folder with the Parquet files of the Hub's
copy. Source: Lu et al. 2022, https://github.com/lupantech/ScienceQA; the letter is looked for in an
answer as in LLaVA's evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_tune.data.sources.fields import LETTERS
from vlm_tune.data.types import Conversation, Media, References
from vlm_tune.errors import DataError
from vlm_tune.evaluation.benchmarks.rows import (
    Benchmark,
    check_folder,
    field,
    find_image,
    lettered,
    list_field,
    of_form,
    question_row,
    read_json,
)
from vlm_tune.evaluation.metric import Metric, by_row
from vlm_tune.evaluation.metrics import Answer
from vlm_tune.quoting import quoted

SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
LOWER_GRADES = {f"grade{number}" for number in range(1, 7)}
GROUPS = {
    "NAT": "natural science",
    "SOC": "social science",
    "LAN": "language science",
    "TXT": "text context",
    "IMG": "image context",
    "NO": "no context",
    "G1-6": "grades 1 to 6",
    "G7-12": "grades 7 to 12",
}
"""The groups of the published tables; a row's category lists those that it is in."""
FORMS = tuple(
    re.compile(form)
    for form in (
        r"^\s*([A-E])\s*$",
        r"^([A-E])\. ",
        r"The answer is ([A-E])\.",
        r"The answer is ([A-E])",
    )
)
"""The forms in which an answer gives a letter; the first that is there counts."""


def read(folder: Path) -> list[Conversation]:
    """The rows of a copy's test part. Raises `DataError` for what can't be used."""
    check_folder(folder, "problems.json and pid_splits.json, or test-*.parquet")
    tables = sorted([*folder.glob("test*.parquet"), *folder.glob("data/test*.parquet")])
    if not (folder / "problems.json").is_file() and not tables:
        message = "has neither problems.json with pid_splits.json nor test-*.parquet"
        raise DataError(message, source=str(folder))
    entries = _parquet(tables) if tables else _published(folder)
    return [_row(*entry) for entry in entries]


def _published(folder: Path) -> Iterator[tuple[str, Any, Media | None, Path, int]]:
    """The id, problem, image, file and number of each row of the published folder."""
    path = folder / "problems.json"
    problems = read_json(path)
    splits = folder / "pid_splits.json"
    ids = list_field(read_json(splits), "test", splits, 1)
    for number, problem_id in enumerate(map(str, ids), 1):
        problem = field(problems, [problem_id], path, number)
        image = None
        if isinstance(problem, dict) and problem.get("image"):
            name = f"{problem_id}/{problem['image']}"
            image = find_image(folder, name, ("images/test", "test", "images"))
        yield problem_id, problem, image, path, number


def _parquet(tables: Sequence[Path]) -> Iterator[tuple[str, Any, Media | None, Path, int]]:
    """The same of each row of the Hub's Parquet files."""
    import pyarrow
    import pyarrow.parquet

    for path in tables:
        try:
            entries = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"can't be read as Parquet: {error}", source=str(path)) from None
        for number, entry in enumerate(entries, 1):
            row_id = f"{path.stem}:{number}"
            stored = entry.get("image")
            content = stored.get("bytes") if isinstance(stored, dict) else None
            image = Media(content, label=f"the image of {row_id}") if content else None
            yield row_id, entry, image, path, number


def _row(row_id: str, problem: Any, image: Media | None, path: Path, number: int) -> Conversation:
    question = str(field(problem, ["question"], path, number)).strip()
    choices = tuple(map(str, list_field(problem, "choices", path, number)))
    answer = field(problem, ["answer"], path, number)
    places = range(min(len(choices), len(LETTERS)))
    if isinstance(answer, bool) or not isinstance(answer, int) or answer not in places:
        message = f"`answer` must be the index of a choice, from 0, got {quoted(answer)}"
        raise DataError(message, source=str(path), row=number)
    hint = str(problem.get("hint") or "").strip()
    return question_row(
        image,
        lettered(f"Context: {hint}\n{question}" if hint else question, choices),
        LETTERS[answer],
        row_id=row_id,
        source=path,
        row=number,
        part="test",
        references=References("scienceqa", (), choices, answer),
        category=" ".join(_groups(problem, hint=bool(hint), image=image is not None)),
    )


def _groups(problem: Mapping[str, Any], *, hint: bool, image: bool) -> list[str]:
    context = [*(["TXT"] if hint else []), *(["IMG"] if image else [])]
    grade = "G1-6" if str(problem.get("grade")) in LOWER_GRADES else "G7-12"
    subject = SUBJECTS.get(str(problem.get("subject")))
    return [*([subject] if subject else []), *(context or ["NO"]), grade]


# --- rules ----------------------------------------------------------------------------------------


def chosen_place(text: str, count: int) -> int | None:
    """The place of the choice whose letter an answer gives: `B`, `B. ...` or `The answer is B`.

    None where it gives none in one of these ways, or a letter of no choice.
    """
    line = text.replace("\n", ". ")
    match = next(filter(None, (form.search(line) for form in FORMS)), None)
    if match is None:
        return None
    place = LETTERS.index(match[1])
    return place if place < count else None


def _right(answer: Answer) -> float:
    references = answer.references
    return float(chosen_place(answer.generated, len(references.choices)) == references.chosen)


def _in_group(group: str) -> Callable[[Answer], bool]:
    of_benchmark = of_form("scienceqa")
    return lambda answer: of_benchmark(answer) and group in answer.category.split()


SCIENCEQA = Benchmark(
    "scienceqa",
    read,
    (
        Metric(
            "scienceqa_accuracy",
            "ScienceQA accuracy",
            by_row(_right),
            applies=of_form("scienceqa"),
            needs="the form of ScienceQA's rows",
        ),
        *(
            Metric(
                f"scienceqa_{group.lower().replace('-', '_')}",
                f"ScienceQA {title}",
                by_row(_right),
                applies=_in_group(group),
                needs=f"the group {group} of ScienceQA",
            )
            for group, title in GROUPS.items()
        ),
    ),
)
