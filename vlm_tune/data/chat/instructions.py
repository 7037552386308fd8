"""Prompt sets: plain task data (question and answer, caption, label) becomes conversations."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlm_tune.config.yaml_source import read_yaml
from vlm_tune.data.types import Media, Message
from vlm_tune.errors import DataError, RecipeError
from vlm_tune.quoting import quoted
from vlm_tune.resources import find_resource, resource_names

FIELDS = {
    "vqa": {"question", "answer"},
    "multiple_choice": {"question", "choices", "letter", "answer"},
    "caption": {"caption"},
    "classify": {"choices", "label"},
    "retrieval": {"candidates", "answer"},
    "ocr": {"text"},
    "translate": {"text", "source_language", "target_language", "translation"},
}
OPTIONAL = {"translate": {"text", "source_language"}}
"""Fields that a row may lack: a prompt is drawn from those that use what the row has, and as much of it as any does."""

Task = Literal["vqa", "multiple_choice", "caption", "classify", "retrieval", "ocr", "translate"]


class Instructions(BaseModel):
    """A prompt set of `data_templates/instructions`: several phrasings of one task in one language."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    task: Task
    language: str
    prompts: Annotated[list[str], Field(min_length=1)]
    answer: str
    system: str | None = None

    def texts(self, row_id: str, values: Mapping[str, str], *, seed: int) -> tuple[str, str]:
        """The row as a question and its answer; the phrasing is drawn from (seed, row id).

        Raises `DataError` if no phrasing does with the fields that the row has.
        """
        prompts = self._fitting(values)
        draw = hashlib.blake2b(
            f"{seed}:{row_id}".encode("utf-8", "surrogatepass"), digest_size=8
        ).digest()
        prompt = prompts[int.from_bytes(draw, "big") % len(prompts)]
        # format_map reads each field once, so braces inside a question are left as they are.
        return prompt.format_map(values), self.answer.format_map(values)

    def messages(
        self, row_id: str, media: Sequence[str | Media], values: Mapping[str, str], *, seed: int
    ) -> list[Message]:
        """The row as a user turn, its media first, and an assistant turn; raises as `texts`."""
        question, answer = self.texts(row_id, values, seed=seed)
        return self.turns((*media, question), answer)

    def turns(self, question: tuple[str | Media, ...], answer: str) -> list[Message]:
        """A question and its answer as turns, after the set's system text."""
        messages = [Message("user", question), Message("assistant", (answer,))]
        return [Message("system", (self.system,)), *messages] if self.system else messages

    def _fitting(self, values: Mapping[str, str]) -> list[str]:
        """The phrasings for rows with these fields."""
        optional = OPTIONAL.get(self.task, set())
        used = [fields_of(prompt) & optional for prompt in self.prompts]
        most = max((len(fields) for fields in used if fields <= values.keys()), default=None)
        if most is None:
            raise DataError(
                f"no prompt of the set does without {', '.join(sorted(optional - values.keys()))}"
            )
        return [
            prompt
            for prompt, fields in zip(self.prompts, used, strict=True)
            if fields <= values.keys() and len(fields) == most
        ]


def fields_of(text: str) -> set[str]:
    """The names in braces. Raises `ValueError` for a lone brace."""
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def load_instructions(name: str, task: str) -> Instructions:
    """A shipped prompt set by name, or one from a YAML file.

    Raises `DataError` for an unknown name, a malformed file, a set for another task, or one with unknown fields.
    """
    path = find_resource("data_templates/instructions", name)
    if path is None:
        names = ", ".join(resource_names("data_templates/instructions"))
        raise DataError(f"no prompt set {quoted(name)}; there are {names}", source="instructions")
    try:
        found = Instructions.model_validate(read_yaml(path).value)
    except RecipeError as error:
        raise DataError(str(error), source="instructions") from None
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise DataError(faults, source=str(path)) from None
    if found.task != task:
        raise DataError(
            f"is a prompt set for {found.task}, the source gives {task} rows", source=str(path)
        )
    for text in [*found.prompts, found.answer]:
        try:
            unknown = fields_of(text) - FIELDS[task]
        except ValueError as error:
            raise DataError(
                f"{quoted(text)}: {error} (a brace of the text itself is written twice)",
                source=str(path),
            ) from None
        if unknown:
            raise DataError(
                f"{quoted(text)} uses {sorted(unknown)}; a {task} row has {sorted(FIELDS[task])}",
                source=str(path),
            )
    return found
