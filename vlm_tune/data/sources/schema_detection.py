"""Detection of the form of a source's rows, by its first rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from vlm_tune.data.sources.base import StoredRow
from vlm_tune.data.sources.chat_schemas import decoded_lists
from vlm_tune.data.sources.fields import (
    COMPLETIONS,
    FIELDS,
    LABELS,
    LETTERS,
    MEDIA,
    PROMPTS,
    REGIONS,
    has_choices,
    is_empty,
    judgement,
)
from vlm_tune.errors import DataError
from vlm_tune.quoting import name_list, quoted

LOOKED_AT = 16
"""Number of readable rows that are examined."""
PATIENCE = 1000
"""Maximum number of rows that are read to find readable ones."""

NEEDS = {
    "llava": "conversations (turns of from/value), image",
    "sharegpt": "conversations (turns of from/value), and images, videos or system",
    "messages": "messages (turns of role/content)",
    "prompt_completion": "prompt, completion",
    "preference": "chosen, rejected, perhaps prompt, question, instruction, messages or "
    "conversations; or messages and rejected_response or rejected_messages",
    "unpaired_preference": "label or kto_tag (true or false) with prompt, question or instruction "
    "and completion or output, or with messages",
    "alpaca": "instruction, output",
    "cauldron": "texts (turns of user/assistant), images",
    "vqa": "question, answer or answers, image",
    "multiple_choice": "question, choices or options (or columns A, B, ...), answer, image",
    "caption": "caption, image",
    "match": "caption, image (never detected: such rows are captions)",
    "classify": "label, choices, image",
    "retrieval": "candidates, answer, image",
    "ocr": "text, image",
    "translate": "translation, target_language, image",
    "grounding": "phrase, box or boxes or point or points, image",
}
"""Fields of a form's rows, as errors and the documentation list them.

`image` may be images, video or videos.
"""


def check_columns(columns: Mapping[str, str], name: str) -> None:
    """Raises `DataError` for a column mapped to a field that no form has."""
    for ours in columns:
        if ours not in FIELDS and ours not in set(LETTERS):
            near = get_close_matches(ours, FIELDS, 1)
            hint = (
                f"; did you mean {near[0]}?"
                if near
                else f"; expected one of {', '.join(sorted(FIELDS))}"
            )
            raise DataError(f"columns: no form has a field {quoted(ours)}{hint}", source=name)


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row by our field names; a missing column gives a missing field."""
    taken = set(columns.values())
    ours = {name: row[theirs] for name, theirs in columns.items() if theirs in row}
    return {name: value for name, value in row.items() if name not in taken} | ours


def detect_form(
    rows: Iterable[StoredRow], columns: Mapping[str, str], name: str
) -> tuple[str, dict[str, str]]:
    """The form of the first rows, and `columns` extended by the column of the form's turns.

    Raises `DataError` that lists the rows' fields where the rows fit no form, or more than one.
    """
    votes: Counter[tuple[str, str]] = Counter()
    fields_present: dict[str, None] = {}
    fault = None
    judged = 0
    for rows_read, stored in enumerate(rows, 1):
        try:
            row = decoded_lists(renamed(usable(stored.value), columns))
        except DataError as error:
            fault = fault or DataError(error.message, source=stored.source, row=stored.number)
        else:
            judged += 1
            votes.update(row_forms(row))
            fields_present |= {key: None for key, value in row.items() if value is not None}
        if judged == LOOKED_AT or rows_read == PATIENCE:
            break
    if not judged:
        raise fault or DataError("no rows", source=name)
    needs = "; ".join(f"{form}: {fields}" for form, fields in NEEDS.items())
    observed = (
        f"the rows have {name_list(fields_present) or 'no fields'}; "
        "set `form`, and map field names with `columns`"
    )
    if not votes:
        raise DataError(f"can't detect the rows' form: {observed} ({needs})", source=name)
    forms = {form for form, _ in votes}
    # A text-only row of a ShareGPT file looks like one of a LLaVA file; both are read alike.
    if ("sharegpt", "conversations") in votes:
        forms.discard("llava")
    # A row whose label is no judgement is a bad one among those whose label is.
    if ("unpaired_preference", "") in votes:
        forms -= {"prompt_completion", "classify", "messages", "llava", "sharegpt"}
    if len(forms) > 1:
        fitting = "; ".join(f"{form}: {NEEDS[form]}" for form in sorted(forms))
        raise DataError(
            f"the rows' form may be {' or '.join(sorted(forms))} ({fitting}): {observed}",
            source=name,
        )
    (form,) = forms
    field = "messages" if form == "messages" else "conversations"
    turns = next((column for voted, column in votes if voted == form and column), field)
    return form, {**columns, **({field: columns.get(turns, turns)} if turns != field else {})}


def usable(value: Any) -> dict[str, Any]:
    """A row's fields. Raises `DataError` for a row that is unreadable or not an object."""
    if isinstance(value, DataError):
        raise value
    if not isinstance(value, dict):
        raise DataError(f"a row is a JSON object, this is {type(value).__name__}", kind="not_json")
    return value


def row_forms(row: Mapping[str, Any]) -> set[tuple[str, str]]:
    """The forms that a row fits, each with the field of its turns ("" if it has none)."""
    has = {key for key, value in row.items() if value is not None}
    forms: set[tuple[str, str]] = set()
    turns = has & {"conversations", "messages"}
    rejected = has & {"rejected_response", "rejected_messages"}
    if {"chosen", "rejected"} <= has or (turns and rejected):
        return {("preference", "")}
    answered = turns or (has & {*COMPLETIONS} and has & {*PROMPTS})
    if answered and any(judgement(row.get(name)) is not None for name in LABELS):
        return {("unpaired_preference", "")}
    for field in ("conversations", "messages"):
        keys = _turn_keys(row.get(field))
        if {"from", "value"} <= keys:
            forms.add(
                (
                    "sharegpt"
                    if has & {"images", "videos", "video", "system", "tools"}
                    else "llava",
                    field,
                )
            )
        elif {"role", "content"} <= keys:
            forms.add(("messages", field))
    if {"user", "assistant"} <= _turn_keys(row.get("texts")):
        forms.add(("cauldron", ""))
    if forms:
        return forms
    has_media = any(not is_empty(row.get(name)) for name in MEDIA)
    has_question = "question" in has
    with_choices = has_choices(row)
    rules = {
        "prompt_completion": {"prompt", "completion"} <= has,
        "alpaca": {"instruction", "output"} <= has,
        "vqa": has_question and not with_choices and bool(has & {"answer", "answers"}),
        "multiple_choice": has_question and with_choices and bool(has & {"answer", "label"}),
        "retrieval": {"candidates", "answer"} <= has and not has_question,
        "caption": "caption" in has and has_media,
        "classify": "label" in has and has_media and not has_question,
        "translate": {"translation", "target_language"} <= has,
        "grounding": "phrase" in has and has_media and bool(has & REGIONS),
        "ocr": "text" in has and has_media and "translation" not in has,
    }
    return {(form, "") for form, fits in rules.items() if fits}


def _turn_keys(turns: Any) -> set[str]:
    """The keys of the first turn."""
    if isinstance(turns, Mapping):  # Arrow's object of lists
        return set(turns)
    first = turns[0] if isinstance(turns, list) and turns else None
    return set(first) if isinstance(first, Mapping) else set()
