"""Connectors that read text or look from inside the LLM train on two processes as on one.

Also where a rank has no image.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.connector_kinds import Tiny, with_connector
from tests.helpers.forked_runs import ended, start
from tests.helpers.tiny_models import largest, parsed, tensors_of
from vlm_tune.api import sft


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "llm"),
    [("qformer-text", "causal"), ("fusion-attention", "seq2seq"), ("cross_attention", "causal")],
)
def test_two_ranks_train_as_one(
    kind: str, llm: str, tiny_recipe: Tiny, color_rows: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in color_rows.read_text().splitlines()]
    for row in rows[1:]:
        row.pop("images")
    color_rows.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(output: str, size: int) -> Any:
        text = with_connector(tiny_recipe(llm, output=output), kind)
        return parsed(
            text,
            train__steps=4,
            train__log_every=1,
            train__batch_size=size,
            evaluate__samples=0,
            evaluate__every=4,
        )

    one = sft(recipe("one", 4)).folder
    assert ended(start(partial(sft, recipe("two", 2)), tmp_path / "output", ranks=2)) == [0, 0], (
        tmp_path / "output.0"
    ).read_text()
    first, second = tensors_of(one / "model"), tensors_of(tmp_path / "two" / "model")
    assert first.keys() == second.keys()
    assert any(name.startswith("connector") for name in first)
    # Adam makes steps of the learning rate's size (3e-3) out of gradients that are nothing but
    # rounding.
    differences = sorted(
        ((largest(value, second[name]), name) for name, value in first.items()), reverse=True
    )
    assert differences[0][0] <= 2e-5, differences[:4]
