"""TextVQA: questions about text in images, by soft accuracy over ten answers.

A copy is a folder with `TextVQA_0.5.1_val.json` (or another version's) and `train_images/`. Source:
Singh et al. 2019, https://textvqa.org; answers are compared as M4C's evaluator does.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from vlm_tune.data.types import Conversation, References
from vlm_tune.errors import DataError
from vlm_tune.evaluation.benchmarks.rows import (
    SHORT,
    Benchmark,
    check_folder,
    field,
    find_image,
    list_field,
    of_form,
    question_row,
    read_json,
)
from vlm_tune.evaluation.metric import Metric, by_row
from vlm_tune.evaluation.metrics import Answer
from vlm_tune.evaluation.texts import soft_accuracy, vqa_normalise

PLACES = ("train_images", "train_val_images/train_images", "images", "")


def read(folder: Path) -> list[Conversation]:
    """The rows of a copy's validation part. Raises `DataError` for what can't be used."""
    check_folder(folder, "TextVQA_0.5.1_val.json and train_images/")
    files = sorted(folder.glob("TextVQA_*_val.json"))
    if not files:
        raise DataError("has no TextVQA_<version>_val.json", source=str(folder))
    path = files[-1]
    rows = []
    for number, entry in enumerate(list_field(read_json(path), "data", path, 1), 1):
        answers = tuple(map(str, list_field(entry, "answers", path, number)))
        name = f"{field(entry, ['image_id'], path, number)}.jpg"
        question = str(field(entry, ["question"], path, number)).strip()
        most_common = Counter(answers).most_common(1)[0][0]
        rows.append(
            question_row(
                find_image(folder, name, PLACES),
                f"{question}\n{SHORT}",
                most_common,
                row_id=str(entry.get("question_id", number)),
                source=path,
                row=number,
                part=path.stem,
                references=References("textvqa", answers),
            )
        )
    return rows


def normalise(text: str) -> str:
    """The text in the form that M4C's evaluator compares.

    Commas and question marks vanish and a possessive is a word by itself; then as VQA's.
    """
    plain = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqa_normalise(plain.strip())


def _accuracy(answer: Answer) -> float:
    references = [normalise(text) for text in answer.references.answers]
    return soft_accuracy(normalise(answer.generated), references)


TEXTVQA = Benchmark(
    "textvqa",
    read,
    (
        Metric(
            "textvqa_accuracy",
            "TextVQA accuracy",
            by_row(_accuracy),
            applies=of_form("textvqa"),
            needs="the form of TextVQA's rows",
        ),
    ),
)
