"""Fields of rows: which a form reads, which must not be dropped, and when one is empty."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from vlm_tune.data.chat.reasoning import FIELDS as REASONING
from vlm_tune.errors import DataError
from vlm_tune.quoting import quoted

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
CHOICES = ("choices", "options", "candidates")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Letters of choices; columns of these names hold one choice each."""

BOX_FIELDS = ("box", "boxes", "bbox", "bboxes")
POINT_FIELDS = ("point", "points")
REGIONS = {*BOX_FIELDS, *POINT_FIELDS, "objects"}
"""Fields of boxes and points, which texts name by marks."""

PROMPTS = ("prompt", "question", "instruction")
"""Fields of prompts, of which a row has one; LLaMA-Factory's Alpaca form has `instruction`."""
COMPLETIONS = ("completion", "output")
LABELS = ("label", "kto_tag")
"""Fields of single answers and of their judgement; LLaMA-Factory's are `output` and `kto_tag`."""

EVERY_FORM = {"id", "category", "system", *MEDIA, *REGIONS}
USED: dict[str, set[str]] = {
    "llava": {"conversations"},
    "sharegpt": {"conversations"},
    "messages": {"messages"},
    "prompt_completion": {"prompt", "completion", *REASONING},
    "preference": {
        *("prompt", "question", "instruction", "chosen", "rejected"),
        *("messages", "conversations", "rejected_response", "rejected_messages"),
    },
    "unpaired_preference": {
        *("prompt", "question", "instruction", "completion", "output"),
        *("label", "kto_tag", "messages", "conversations"),
    },
    "alpaca": {"instruction", "input", "output", "history", *REASONING},
    "cauldron": {"texts"},
    "vqa": {"question", "answer", "answers", "context", *REASONING},
    "multiple_choice": {"question", "answer", "label", "context", *CHOICES, *LETTERS, *REASONING},
    "caption": {"caption"},
    "match": {"caption"},
    "classify": {"label", "choices"},
    "retrieval": {"candidates", "answer"},
    "ocr": {"text"},
    "translate": {"translation", "target_language", "source_language", "text"},
    "grounding": {"phrase"},
}
"""The fields that each form reads, in addition to those of every form."""

FIELDS = EVERY_FORM.union(*USED.values()) - set(LETTERS)
"""All fields that some form reads; the names that `columns` can map."""

MEANT = {
    *CHOICES,
    *("label", "labels", "kto_tag", "weight", "weights", "sample_weight", "loss_weight"),
    *("tools", "functions", "tool_calls", "function_call"),
    *REASONING,
    *("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images"),
    "documents",
}
"""Fields that change what a row teaches: a form that does not read one refuses the row."""

MEANT_IN_TASKS = {
    *(
        "question",
        "answer",
        "answers",
        "instruction",
        "prompt",
        "completion",
        "messages",
        "conversations",
    ),
    *("context", "passage", "hint", "history", "input", "output"),
}
"""More such fields, for rows of a task whose form was detected.

With `form` the recipe states that they are not meant.
"""

UNSUPPORTED = {"tools", "functions", "tool_calls", "function_call"}
"""Those of `MEANT` that no chat format and no model here supports."""


def judgement(label: Any) -> bool | None:
    """Whether a `label` is of a liked answer; None for what is no such label.

    CSV files have texts, and columns with gaps numbers with a fraction.
    """
    if isinstance(label, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower())
    return bool(label) if isinstance(label, int | float) and label in (0, 1) else None


def is_empty(value: Any) -> bool:
    """Whether a value is empty.

    Empty are null, false, NaN, white space, an empty list or object (as text too), and a list or
    object of empty values.
    """
    if value is None or value is False:
        return True
    if isinstance(value, float):
        return value != value
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    if isinstance(value, bytes | bytearray | list | tuple):
        return not len(value) or (isinstance(value, list | tuple) and all(map(is_empty, value)))
    return False


def lettered(row: Mapping[str, Any]) -> list[str]:
    """The row's non-empty choice columns A, B, ...; none unless both A and B are there."""
    if is_empty(row.get("A")) or is_empty(row.get("B")):
        return []
    return [letter for letter in LETTERS if not is_empty(row.get(letter))]


def has_choices(row: Mapping[str, Any]) -> bool:
    """Whether the row has choices, as a list or in lettered columns."""
    return any(not is_empty(row.get(name)) for name in CHOICES) or bool(lettered(row))


def refuse_unused(row: Mapping[str, Any], form: str, *, task: bool, detected: bool) -> None:
    """Raises `DataError` for a field that carries meaning and is not read by `form`.

    Metadata passes.

    Args:
        row: the row, by our field names.
        form: its form.
        task: whether the form is one of a task.
        detected: whether the form was detected rather than configured.
    """
    used = USED[form]
    meant = MEANT | MEANT_IN_TASKS if task and detected else MEANT
    for name, value in row.items():
        if name not in meant or name in used or is_empty(value):
            continue
        if name.endswith(("weight", "weights")) and value == 1:
            continue
        if name in UNSUPPORTED:
            message = f"`{name}` is not supported: no model or chat format here has a place for it"
            raise DataError(
                f"{message} (take it out, or name it in the source's `ignore`)", kind="unsupported"
            )
        raise DataError(_unused(name, value, form), kind="unused_field")
    letters = [] if "A" in used else lettered(row)
    if letters and task:
        raise DataError(_unused(", ".join(letters), row["A"], form), kind="unused_field")


def _unused(name: str, value: Any, form: str) -> str:
    choices = name in CHOICES or name.startswith("A, B")
    other = "`form: multiple_choice` reads it, or " if choices else ""
    return (
        f"`{name}` ({quoted(value)}) is not read by the {form} form: "
        f"{other}name it in the source's `ignore` where it is not meant"
    )


def without(row: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """The row without the ignored fields, which are removed from its turns too."""

    def plain(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [
            {key: inner for key, inner in turn.items() if key not in ignored}
            if isinstance(turn, dict)
            else turn
            for turn in value
        ]

    return {name: plain(value) for name, value in row.items() if name not in ignored}
