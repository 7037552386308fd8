"""Every connector with both kinds of LLM learns eight questions about images in a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.connector_kinds import KINDS, Tiny, with_connector
from tests.helpers.tiny_models import parsed
from vlm_tune.api import sft

WITH_T5 = ("mlp", "qformer-text", "fusion-attention", "cross_attention")
"""One that gives tokens alone, and those that take something of the language model."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "llm"),
    [*((kind, "causal") for kind in KINDS), *((kind, "seq2seq") for kind in WITH_T5)],
)
def test_eight_image_questions_are_learnt_word_for_word(
    kind: str, llm: str, tiny_recipe: Tiny, color_rows: Path
) -> None:
    """Greedy answers, all right.

    The same question of four images has four answers, so they must be looked at.
    """
    recipe = parsed(
        with_connector(tiny_recipe(llm), kind),
        data__validation=[],
        data__test=[{"kind": "file", "path": str(color_rows)}],
        train__steps=100,
        train__batch_size=8,
        train__learning_rate=5e-3,
        train__checkpoints={"every": 100},  # not after each epoch, which is a step
        evaluate__samples=0,
    )
    run = sft(recipe)
    assert (run.result["n"], run.result["accuracy"]) == (8, 1.0)
