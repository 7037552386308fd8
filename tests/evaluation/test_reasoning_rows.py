"""Scores of rows with reasoning, by a model that answers without it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.tiny_models import built, parsed, png, rows_of
from tests.helpers.tiny_recipes import tiny_text
from vlm_tune.evaluation.evaluate import score
from vlm_tune.model.language.decoding import Decoding


def test_sources_of_both_kinds_are_scored_without_reasoning(tmp_path: Path) -> None:
    """Its loss is that of the answers alone, whether rows have reasoning in a field or in text."""
    (tmp_path / "red.png").write_bytes(png().read())
    answers = {
        "plain": {"content": "yes"},
        "field": {"content": "yes", "reasoning_content": "It looks red."},
        "text": {"content": "<think>It looks red.</think>yes"},
    }
    for name, answer in answers.items():
        turns = [{"role": "user", "content": "Is it red?"}, {"role": "assistant", **answer}]
        row = json.dumps({"images": ["red.png"], "messages": turns})
        (tmp_path / f"{name}.jsonl").write_text(f"{row}\n" * 4)
    text = tiny_text("causal", tmp_path / "plain.jsonl", tmp_path / "run")
    model = built(
        parsed(text.replace("template: chatml", "template: qwen3\n  enable_thinking: false"))
    )
    scored = []
    for name in answers:
        other = text.replace("plain.jsonl", f"{name}.jsonl")
        rows = rows_of(parsed(other))
        result = score(model, rows, decoding=Decoding(4), batch_size=4)
        assert [answer.expected for answer in result.answers] == ["yes"] * len(rows)
        scored.append(result.loss)
    assert scored[0] == scored[1] == scored[2]
