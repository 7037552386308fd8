"""Prompt sets: plain task data (question and answer, caption, label) becomes conversations."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlm_tune.data.types import Conversation, Media, Message
from vlm_tune.errors import DataError, RecipeError
from vlm_tune.recipe_yaml import read_yaml
from vlm_tune.resources import find_resource, resource_names

FIELDS = {"vqa": {"question", "answer"}, "caption": {"caption"}, "classify": {"choices", "label"}}


class Instructions(BaseModel):
    """A prompt set of `data_templates/instructions`: several phrasings of one task in one language."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    task: Literal["vqa", "caption", "classify"]
    language: str
    prompts: Annotated[list[str], Field(min_length=1)]
    answer: str
    system: str | None = None

    def conversation(self, row_id: str, media: Media, values: Mapping[str, str], *, seed: int, category: str = "") -> Conversation:
        """The row as a user turn with its image first and an assistant turn; the phrasing is drawn from (seed, row id)."""
        draw = hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=8).digest()
        prompt = self.prompts[int.from_bytes(draw, "big") % len(self.prompts)]
        # format_map reads each field once, so braces inside a question are left as they are.
        messages = [Message("user", (media, prompt.format_map(values))), Message("assistant", (self.answer.format_map(values),))]
        if self.system:
            messages.insert(0, Message("system", (self.system,)))
        return Conversation(row_id, tuple(messages), category)


def load_instructions(name: str, task: str) -> Instructions:
    """A shipped prompt set by name, or one from a YAML file.

    Raises `DataError` for an unknown name, a malformed file, a set for another task, or one with unknown fields.
    """
    path = find_resource("data_templates/instructions", name)
    if path is None:
        names = ", ".join(resource_names("data_templates/instructions"))
        raise DataError(f"no prompt set {name!r}; there are {names}", source="instructions")
    try:
        found = Instructions.model_validate(read_yaml(path).value)
    except RecipeError as error:
        raise DataError(str(error), source="instructions") from None
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise DataError(faults, source=str(path)) from None
    if found.task != task:
        raise DataError(f"is a prompt set for {found.task}, the source gives {task} rows", source=str(path))
    for text in [*found.prompts, found.answer]:
        try:
            unknown = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None} - FIELDS[task]
        except ValueError as error:
            raise DataError(f"{text!r}: {error} (a brace of the text itself is written twice)", source=str(path)) from None
        if unknown:
            raise DataError(f"{text!r} uses {sorted(unknown)}; a {task} row has {sorted(FIELDS[task])}", source=str(path))
    return found
