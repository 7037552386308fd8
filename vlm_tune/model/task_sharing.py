"""The tasks that have adapters of their own, and how much of these they share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskSharing:
    """How tasks share the language model's LoRA adapter.

    Attributes:
        tasks: The tasks that have adapters of their own.
        shared_layers: The number of first blocks whose adapter is one for all tasks; 0 for none.
    """

    tasks: tuple[str, ...]
    shared_layers: int = 0
