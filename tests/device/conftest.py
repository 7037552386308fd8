"""Models as they are built for a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from vlm_tune.config.model import Llm
from vlm_tune.model.pretrained import language_model


@pytest.fixture
def attention_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Language models attend by torch's fused attention, as where there is a GPU."""
    chosen = language_model._attention

    def on_a_gpu(llm: Llm, gpu: bool | None = None) -> dict[str, Any]:
        return chosen(llm, True)

    monkeypatch.setattr(language_model, "_attention", on_a_gpu)
