"""Two processes over gloo train as one with batches of twice the size."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.forked_runs import ended, start
from tests.helpers.tiny_models import largest, parsed, tensors_of, with_tune
from vlm_tune.api import sft
from vlm_tune.resources import cache_folder

LORA_BOTH = """
tune:
  - {match: "tower.*", how: lora, r: 4}
  - {match: "connector.*", how: frozen}
  - {match: "llm.*", how: lora, r: 4, target_modules: all-linear}
train:"""
FULL = """
tune:
  - {match: "*", how: full}
train:"""


def losses(run: Path) -> list[float]:
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tune", "images", "accumulation"),
    [
        ("causal", FULL, "all", 2),
        ("seq2seq", FULL, "one", 1),
        ("causal", LORA_BOTH, "one", 1),
        ("seq2seq", None, "one", 2),
    ],
)
def test_two_ranks_train_as_one(
    kind: str,
    tune: str | None,
    images: str,
    accumulation: int,
    tiny_recipe: Callable[..., str],
    color_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With `images: one`, most batches of a rank hold no image at all.

    Nine rows leave the last batch uneven.
    """
    rows = [json.loads(line) for line in color_rows.read_text().splitlines()]
    rows.append(
        {
            "messages": [
                {"role": "user", "content": "and a long one?"},
                {"role": "assistant", "content": "a long answer it is"},
            ]
        }
    )
    for row in rows[1:] if images == "one" else []:
        row.pop("images", None)
    color_rows.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(output: str, size: int) -> Any:
        text = tiny_recipe(kind, output=output)
        changes: dict[str, Any] = {
            "train__steps": 5,
            "train__log_every": 1,
            "train__batch_size": size,
            "train__cache_features": tune is not FULL,
        }
        settings = {"train__gradient_accumulation": accumulation, "evaluate__every": 5}
        return parsed(
            with_tune(text, tune) if tune else text, **changes, **settings, evaluate__samples=0
        )

    one = sft(recipe("one", 4)).folder
    # The two find no features, and compute them once for both.
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "other cache"))
    assert ended(start(partial(sft, recipe("two", 2)), tmp_path / "output", ranks=2)) == [0, 0], (
        tmp_path / "output.0"
    ).read_text()
    features = sorted((tmp_path / "other cache" / "features").glob("*"))
    frozen = tune is None
    assert [path.suffix for path in features] == [".npy"] * len(features)
    assert (len(features) > 0) == frozen
    assert len({path.name.partition("-")[0] for path in features}) == len(features)
    two = tmp_path / "two"
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    first, second = tensors_of(one / "model"), tensors_of(two / "model")
    assert first.keys() == second.keys()
    # Adam makes steps of the learning rate's size (3e-3) out of gradients that are nothing but
    # rounding: a tenth of one is allowed.
    assert max(largest(value, second[name]) for name, value in first.items()) <= 3e-4
    scores = [
        json.loads((run / "stages" / "1-main" / "done.json").read_text())["history"]
        for run in (one, two)
    ]
    assert scores[0][0]["accuracy"] == scores[1][0]["accuracy"]
    assert scores[0][0]["n"] == scores[1][0]["n"] == 9
    assert scores[0][0]["loss"] == pytest.approx(scores[1][0]["loss"], rel=1e-4)


@pytest.mark.slow
def test_the_test_part_is_shared_among_ranks_and_scored_as_by_one(
    tiny_recipe: Callable[..., str], color_rows: Path, tmp_path: Path
) -> None:
    """Nine rows, in their order, and by one file of features."""
    from vlm_tune.train import final_scores

    part = tmp_path / "test.jsonl"
    lines = color_rows.read_text().splitlines(keepends=True)
    interleaved = [line for pair in zip(lines[:4], lines[4:], strict=True) for line in pair]
    part.write_text("".join([*interleaved, lines[0]]))

    def recipe(output: str) -> Any:
        changes: dict[str, Any] = {
            "train__steps": 1,
            "train__learning_rate": 1e-9,
            "evaluate__samples": 0,
            "data__validation": [],
        }
        test = [{"kind": "file", "path": str(part)}]
        return parsed(tiny_recipe("causal", output=output), data__test=test, **changes)

    def noted() -> None:
        score = final_scores.score

        def counted(model: Any, rows: Any, **settings: Any) -> Any:
            with (tmp_path / "shares").open("a") as file:
                file.write(f"{len(rows)}\n")
            return score(model, rows, **settings)

        final_scores.score = counted
        sft(recipe("two"))

    one = sft(recipe("one"))
    assert ended(start(noted, tmp_path / "output", ranks=2)) == [0, 0], (
        tmp_path / "output.0"
    ).read_text()
    assert sorted((tmp_path / "shares").read_text().split()) == ["4", "5"]
    answers = [(tmp_path / run / "answers.jsonl").read_text() for run in ("one", "two")]
    assert answers[0] == answers[1]
    assert len(answers[0].splitlines()) == 9
    # Each rank answers about two of the four images; the training rows show the same four.
    assert len(list(cache_folder("features").glob("*.npy"))) == 1
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    names = ("accuracy", "n", "by_category", "by_source")
    assert {name: two[name] for name in names} == {name: one.result[name] for name in names}
