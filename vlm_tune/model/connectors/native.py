"""Stands for the connector inside a native model, which is a part of its forward pass."""

from __future__ import annotations

from typing import Any

from vlm_tune.model.connectors.projectors import Connector


class NativeJoin(Connector):
    """A connector without weights: those are the native model's."""

    def __init__(self, config: Any, width: int, llm_width: int) -> None:
        super().__init__()
