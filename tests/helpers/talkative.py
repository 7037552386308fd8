"""Tiny models of random weights whose answers differ from prompt to prompt."""

from __future__ import annotations

from typing import Any

from tests.helpers.tiny_models import built, parsed
from vlm_tune.generation.chat import VisionLanguageModel


def talkative(recipe_text: str, **changes: Any) -> VisionLanguageModel:
    """A recipe's model in eval mode, with sharper logits than at initialisation."""
    model = built(parsed(recipe_text, **changes)).eval()
    for parameter in model.llm.model.parameters():
        parameter.data *= 3
    return model
