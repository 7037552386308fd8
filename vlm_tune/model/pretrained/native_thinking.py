"""The switch `enable_thinking` of chat templates: whether a model reasons before its answers."""

from __future__ import annotations

from typing import Any

from vlm_tune.data.chat.own_template import untrained_opening
from vlm_tune.data.chat.reasoning import SET, SWITCH, with_default
from vlm_tune.errors import DataError, ModelError


def has_switch(processor: Any) -> bool:
    """Whether a processor's chat template has the switch."""
    return SWITCH in processor.chat_template


def set_thinking(processor: Any, renderer: Any, enable: bool | None) -> None:
    """Sets the mode of a processor's template; a caller's own `enable_thinking` still counts.

    Without a mode, answers have no reasoning: of the two the template takes the one in which it
    opens answers as it writes them.

    Args:
        processor: transformers' processor, changed in place.
        renderer: returns the function that runs a processor's template.
        enable: the mode.

    Raises:
        ModelError: a mode is wanted and the template has no switch.
    """
    text = processor.chat_template
    if text.startswith(SET):
        # A model that was saved has its mode there.
        text = text.partition("-%}")[2]
        processor.chat_template = text
    if not has_switch(processor):
        if enable is not None:
            raise ModelError(
                f"data.enable_thinking: the checkpoint's own chat template has no {SWITCH}: "
                "leave it out. Its answers have reasoning where the rows have some, if it writes "
                "reasoning"
            )
        return
    by_default = _untrained(renderer(processor))
    processor.chat_template = with_default(text, bool(enable))
    if enable is None:
        without = _untrained(renderer(processor))
        if without is None or (by_default is not None and by_default <= without):
            processor.chat_template = text
    processor.tokenizer.chat_template = processor.chat_template


def _untrained(render: Any) -> int | None:
    """`untrained_opening`; None as well for a template that can't be taken apart."""
    try:
        return untrained_opening(render)
    except DataError:
        return None
