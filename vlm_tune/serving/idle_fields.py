"""Fields of OpenAI's API and other servers that are accepted or refused, and change nothing."""

from __future__ import annotations

from typing import Any

IGNORED = (
    "user",
    "metadata",
    "store",
    "safety_identifier",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
"""Fields of OpenAI's API that are accepted and change nothing."""
NO_TEMPLATE = ": a conversation is laid out by the model's chat template, which no request changes"
NO_TOOLS = ": this server calls no tools"
REFUSED = {
    "chat_template": NO_TEMPLATE,
    "add_generation_prompt": NO_TEMPLATE,
    "continue_final_message": NO_TEMPLATE,
    "template": NO_TEMPLATE,
    "tools": NO_TOOLS,
    "tool_choice": NO_TOOLS,
    "functions": NO_TOOLS,
    "function_call": NO_TOOLS,
    "parallel_tool_calls": NO_TOOLS,
    "logit_bias": ": logits can't be changed by token",
    "modalities": ": answers are text",
    "audio": ": answers are text",
    "best_of": "; use n, or num_beams",
}
"""Fields of other servers that are refused unless they ask for nothing, each with the reason."""
EMPTY: tuple[Any, ...] = (None, [], {})
IDLE: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "best_of": (1,),
}
"""Settings of those fields that ask for what this server does anyway."""


def changes_nothing(name: str, field: Any) -> bool:
    """Whether a field of a request is accepted and has no effect."""
    return name in IGNORED or (name in REFUSED and field in (*EMPTY, *IDLE.get(name, ())))
