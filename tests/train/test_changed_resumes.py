"""Runs that are resumed with another recipe: what they do, and their messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_models import assert_same_bits, interrupted, parsed, with_tune
from vlm_tune.api import sft, verify_run
from vlm_tune.config.load import load_recipe
from vlm_tune.errors import DataError, ModelError, RecipeError
from vlm_tune.train.step_trace import DIGESTS, read_trace

QUICK: dict[str, Any] = {
    "data__validation": [],
    "evaluate__samples": 0,
    "train__log_every": 1,
    "train__batch_size": 4,
    "train__steps": None,
    "train__epochs": 2,
    "train__checkpoints": {"every": 1, "keep": 3},
}


@pytest.fixture
def forty(color_rows: Path) -> Path:
    """Forty rows of unlike length."""
    rows = []
    for number, line in enumerate(5 * color_rows.read_text().splitlines()):
        row = json.loads(line)
        row["messages"][0]["content"] += f" {number}" * (number % 7 + 1)
        rows.append(json.dumps(row) + "\n")
    color_rows.write_text("".join(rows))
    return color_rows


def events(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [
        event
        for event in map(json.loads, (run / "log.jsonl").read_text().splitlines())
        if event["event"] == kind
    ]


def seen(run: Path, first: int, last: int) -> int:
    """The digest of all samples of the steps `first` to `last`."""
    steps = read_trace(run / "stages" / "1-main")
    return sum(int(step.samples, 16) for step in steps if first <= step.step <= last) % DIGESTS


@pytest.mark.parametrize(
    "changes",
    [
        {"train__batch_size": 8},
        {"train__batch_tokens": 200, "data__packing": True, "data__row_length": 96},
    ],
)
def test_another_batch_size_goes_on_with_the_rows_that_are_left(
    changes: dict[str, Any], tiny_recipe: Callable[..., str], forty: Path, tmp_path: Path
) -> None:
    whole = sft(parsed(tiny_recipe("causal", output="whole"), **QUICK)).folder
    assert [event["epoch"] for event in events(whole)] == pytest.approx(
        [step / 10 for step in range(1, 21)]
    )
    rows = seen(whole, 1, 10)
    assert seen(whole, 11, 20) == rows
    recipe = parsed(tiny_recipe("causal"), **QUICK)
    interrupted(lambda show: sft(recipe, show=show), stage=0, step=4)
    changed = parsed(tiny_recipe("causal"), **QUICK | changes)
    # Stopped once more: what is left of the epoch is the same after another resume.
    interrupted(
        lambda show: sft(changed, show=show, resume=True, accept_changes=True), stage=0, step=6
    )
    run = sft(changed, resume=True).folder
    trained = events(run)
    epochs = [event["epoch"] for event in trained]
    assert epochs[3] == pytest.approx(0.4) and epochs == sorted(epochs) and epochs[-1] == 2
    first = epochs.index(1.0) + 1
    if "train__batch_size" in changes:
        assert first == 4 + 24 // 8 and len(trained) == first + 40 // 8
        assert seen(run, 1, first) == seen(run, first + 1, len(trained)) == rows
    # The schedule goes on from where it was, to its end.
    rates = [event["learning_rate"] for event in trained]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.15 * rates[0]
    assert abs(rates[4] - rates[3]) < 2 * abs(rates[3] - rates[1])
    assert verify_run(run).agrees


# --- data --------------------------------------------------------------------------------------


def stopped(tiny_recipe: Callable[..., str], **changes: Any) -> Any:
    """The recipe of a run that was stopped after its second step, by its changes."""
    recipe = parsed(tiny_recipe("causal"), **{**QUICK, **changes})
    interrupted(lambda show: sft(recipe, show=show), stage=0, step=2)
    return recipe


def edit(path: Path, how: str) -> None:
    lines = path.read_text().splitlines(keepends=True)
    edited = {
        "appended": [*lines, lines[0].replace("it", "that")],
        "cut": lines[:-1],
        "replaced": lines[::-1],
    }
    edited["edited"] = [lines[0].replace('"red"', '"pink"'), *lines[1:]]
    path.write_text("".join(edited[how]))


@pytest.mark.parametrize("how", ["appended", "edited", "cut", "replaced"])
def test_changed_data_is_refused_by_file_and_taken_when_accepted(
    how: str, tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    """The tokenizer is the checkpoint's, though a scratch one would be another on the new text."""
    recipe = stopped(tiny_recipe)
    run = Path(recipe.output)
    tokenizer = next(run.glob("stages/*/checkpoints/step-*/tokenizer.json")).read_text()
    saved = run.joinpath("recipe.yaml").read_text(), run.joinpath("data.json").read_text()
    edit(color_rows, how)
    with pytest.raises(
        DataError,
        match=r"(?s)started with.*data\.train .*messages\.jsonl.*8 rows.*--accept-changes",
    ) as error:
        sft(recipe, resume=True)
    assert error.value.exit_code == 3
    assert saved == (run.joinpath("recipe.yaml").read_text(), run.joinpath("data.json").read_text())
    sft(recipe, resume=True, accept_changes=True)
    assert any("resumed with changed data" in event["text"] for event in events(run, "note"))
    assert (run / "model" / "tokenizer.json").read_text() == tokenizer
    assert run.joinpath("data.json").read_text() != saved[1]
    # What is accepted is what the run has now.
    sft(recipe, resume=True)


@pytest.mark.parametrize("part", ["validation", "test", "image"])
def test_other_parts_and_images_count_too(
    part: str, tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    other = color_rows.with_name("other.jsonl")
    other.write_text(color_rows.read_text())
    source = [{"kind": "file", "path": str(other)}]
    recipe = stopped(tiny_recipe, data__validation=source, data__test=source)
    if part == "image":
        (color_rows.parent / "red.png").write_bytes((color_rows.parent / "green.png").read_bytes())
        wanted = r"data\.train .*messages\.jsonl"
    else:
        edit(other, "appended")
        wanted = rf"data\.{part} .*other\.jsonl: 8 rows, now 9"
    with pytest.raises(DataError, match=f"(?s){wanted}"):
        sft(recipe, resume=True)
    with pytest.raises(DataError, match=f"(?s){wanted}"):
        verify_run(Path(recipe.output))


def test_a_touched_copy_and_a_cache_that_is_gone_change_nothing(
    tiny_recipe: Callable[..., str],
    color_rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    recipe = stopped(tiny_recipe)
    whole = sft(parsed(tiny_recipe("causal", output="whole"), **QUICK)).folder
    for path in color_rows.parent.glob("*.png"):
        path.write_bytes(path.read_bytes())
    color_rows.write_text(color_rows.read_text())
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "another-cache"))
    assert_same_bits(sft(recipe, resume=True).folder / "model", whole / "model")


# --- recipes -----------------------------------------------------------------------------------

LORA = """
tune:
  - {match: "tower.*", how: frozen}
  - {match: "connector.*", how: full}
  - {match: "llm.*", how: lora, r: 4, target_modules: [q_proj, v_proj]}
train:"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("r: 4", "r: 8", r"tune\.2\.r: 4 -> 8"),
        (
            "[q_proj, v_proj]",
            "[q_proj, k_proj, o_proj]",
            r"(?s)tune\.2\.target_modules\.1: v_proj -> k_proj.*s\.2: nothing -> o_proj",
        ),
        ("kind: mlp, norm: true", "kind: resampler", r"model\.connector\.kind: mlp -> resampler"),
        ("precision: fp32", "precision: bf16", r"train\.precision: fp32 -> bf16"),
        ("width: 64", "width: 128", r"model\.tower\.config\.width: 64 -> 128"),
        ("max_length: 128", "max_length: 100", r"data\.max_length: 128 -> 100"),
    ],
)
def test_what_a_checkpoint_holds_can_not_be_changed(
    old: str, new: str, message: str, tiny_recipe: Callable[..., str]
) -> None:
    text = with_tune(tiny_recipe("causal"), LORA)
    assert old in text
    recipe = parsed(text, **QUICK)
    interrupted(lambda show: sft(recipe, show=show), stage=0, step=1)
    saved = (Path(recipe.output) / "recipe.yaml").read_text()
    changed = parsed(text.replace(old, new), **QUICK)
    for accept in (True, False):
        with pytest.raises(RecipeError, match=message):
            sft(changed, resume=True, accept_changes=accept)
    assert (Path(recipe.output) / "recipe.yaml").read_text() == saved


def test_what_can_be_changed_is_taken_and_told(
    tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    text = with_tune(tiny_recipe("causal"), LORA)
    interrupted(lambda show: sft(parsed(text, **QUICK), show=show), stage=0, step=1)
    validation = [{"kind": "file", "path": str(color_rows)}]
    changes = {
        "train__learning_rate": 1e-3,
        "train__epochs": 3,
        "evaluate__every": 2,
        "data__validation": validation,
        "train__weight_decay": 0.1,
    }
    run = sft(parsed(text, **{**QUICK, **changes}), resume=True, accept_changes=True).folder
    notes = "\n".join(event["text"] for event in events(run, "note"))
    assert "train.learning_rate: 0.003 -> 0.001" in notes and "evaluate.every: null -> 2" in notes
    assert "data.validation.0: nothing -> " in notes and len(events(run)) == 6
    assert load_recipe(run / "recipe.yaml").train.epochs == 3


def test_a_recipe_that_fails_to_load_leaves_the_runs_own(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = stopped(tiny_recipe)
    saved = (Path(recipe.output) / "recipe.yaml").read_text()

    def fail(*arguments: object, **named: object) -> None:
        raise ModelError("weights are gone")

    monkeypatch.setattr("vlm_tune.train.stage.restore_model", fail)
    with pytest.raises(ModelError):
        sft(
            parsed(tiny_recipe("causal"), **{**QUICK, "train__epochs": 3}),
            resume=True,
            accept_changes=True,
        )
    assert (Path(recipe.output) / "recipe.yaml").read_text() == saved


def test_a_run_that_is_extended_puts_its_old_result_aside(tiny_recipe: Callable[..., str]) -> None:
    run = sft(parsed(tiny_recipe("causal"), **QUICK)).folder
    before = json.loads((run / "result.json").read_text())
    longer = parsed(tiny_recipe("causal"), **{**QUICK, "train__epochs": 4})
    interrupted(
        lambda show: sft(longer, show=show, resume=True, accept_changes=True), stage=0, step=5
    )
    assert not (run / "result.json").exists() and not (run / "report.html").exists()
    assert json.loads((run / "earlier_result.json").read_text()) == before
    assert any(
        "continues: its earlier result is in earlier_result.json" in event["text"]
        for event in events(run, "note")
    )
    sft(longer, resume=True)
    assert (run / "result.json").exists() and (run / "report.html").exists()
    # One that has nothing left to do keeps its result.
    sft(longer, resume=True)
    assert json.loads((run / "earlier_result.json").read_text()) == before
