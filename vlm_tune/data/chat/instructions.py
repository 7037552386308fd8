"""Prompt sets turn plain task data (question and answer, caption, label) into conversations."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlm_tune.config.yaml_source import read_yaml
from vlm_tune.data.chat.draws import draw
from vlm_tune.data.types import Media, Message
from vlm_tune.errors import DataError, RecipeError
from vlm_tune.quoting import quoted, reason_of
from vlm_tune.resources import find_resource, resource_names

FIELDS = {
    "vqa": {"question", "answer"},
    "multiple_choice": {"question", "choices", "letter", "answer"},
    "caption": {"caption"},
    "match": {"caption", "answer"},
    "classify": {"choices", "label"},
    "retrieval": {"candidates", "answer"},
    "ocr": {"text"},
    "translate": {"text", "source_language", "target_language", "translation"},
    "grounding": {"phrase", "region"},
}
OPTIONAL = {"translate": {"text", "source_language"}}
"""Fields that a row may lack.

Prompts are drawn from those whose optional fields the row has, and of these from those that use the
most optional fields.
"""

WORDED_BY_MEDIUM = ("caption", "classify", "match", "retrieval", "ocr", "translate")
"""Tasks whose prompts name the medium: their sets for others than images end in its kind."""

Task = Literal[
    "vqa",
    "multiple_choice",
    "caption",
    "match",
    "classify",
    "retrieval",
    "ocr",
    "translate",
    "grounding",
]


class Instructions(BaseModel):
    """An instruction set of `data_templates/instructions`: phrasings of a task in a language."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    task: Task
    language: str
    prompts: Annotated[list[str], Field(min_length=1)]
    answer: str
    system: str | None = None

    def texts(self, row_id: str, values: Mapping[str, str], *, seed: int) -> tuple[str, str]:
        """The row as a question and its answer; the phrasing is drawn by (seed, row id).

        Raises `DataError` if every phrasing needs a field that the row lacks.
        """
        prompts = self._fitting(values)
        prompt = prompts[draw(seed, row_id) % len(prompts)]
        # format_map does not format the values, so braces inside a question are left unchanged.
        return prompt.format_map(values), self.answer.format_map(values)

    def messages(
        self, row_id: str, media: Sequence[str | Media], values: Mapping[str, str], *, seed: int
    ) -> list[Message]:
        """The row as a user turn, media first, and an assistant turn. Raises as `texts`."""
        question, answer = self.texts(row_id, values, seed=seed)
        return self.turns((*media, question), answer)

    def turns(self, question: tuple[str | Media, ...], answer: str) -> list[Message]:
        """A question and its answer as turns, after a system turn if the set has a system text."""
        messages = [Message("user", question), Message("assistant", (answer,))]
        return [Message("system", (self.system,)), *messages] if self.system else messages

    def _fitting(self, values: Mapping[str, str]) -> list[str]:
        """The phrasings to draw from for a row with the fields `values`."""
        optional = OPTIONAL.get(self.task, set())
        used = [fields_of(prompt) & optional for prompt in self.prompts]
        most = max((len(fields) for fields in used if fields <= values.keys()), default=None)
        if most is None:
            raise DataError(
                "every prompt of the instruction set uses "
                f"{', '.join(sorted(optional - values.keys()))}"
            )
        return [
            prompt
            for prompt, fields in zip(self.prompts, used, strict=True)
            if fields <= values.keys() and len(fields) == most
        ]


def fields_of(text: str) -> set[str]:
    """The field names in braces. Raises `ValueError` for an unmatched brace."""
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def load_instructions(name: str, task: str) -> Instructions:
    """Loads a shipped instruction set by name, or one from a YAML file.

    Raises `DataError` for an unknown name, a malformed file, a set for another task, or one with
    unknown fields.
    """
    path = find_resource("data_templates/instructions", name)
    if path is None:
        names = ", ".join(resource_names("data_templates/instructions"))
        raise DataError(
            f"no instruction set {quoted(name)}; expected one of {names}", source="instructions"
        )
    try:
        instructions = Instructions.model_validate(read_yaml(path).value)
    except RecipeError as error:
        raise DataError(str(error), source="instructions") from None
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise DataError(faults, source=str(path)) from None
    if instructions.task != task:
        raise DataError(
            f"is an instruction set for {instructions.task}, the source gives {task} rows",
            source=str(path),
        )
    for text in [*instructions.prompts, instructions.answer]:
        try:
            unknown = fields_of(text) - FIELDS[task]
        except ValueError as error:
            raise DataError(
                f"{quoted(text)}: {reason_of(error)} (a brace of the text itself is written twice)",
                source=str(path),
            ) from None
        if unknown:
            raise DataError(
                f"{quoted(text)} uses {sorted(unknown)}; a {task} row has {sorted(FIELDS[task])}",
                source=str(path),
            )
    return instructions
