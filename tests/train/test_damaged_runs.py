"""Run folders that were cut, spoiled or deleted: an error in words, or made anew with a note."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_models import interrupted, parsed
from vlm_tune.api import sft, verify_run
from vlm_tune.errors import ModelError, RecipeError, TrainingError, VlmTuneError
from vlm_tune.events import Event, Note, TrainSteps
from vlm_tune.rendering.report import write_report
from vlm_tune.saved_models import which_model

QUICK: dict[str, Any] = {"data__validation": [], "evaluate__samples": 1, "train__log_every": 1}
QUICK |= {"train__checkpoints": {"every": 1, "keep": 3}}
GARBAGE = (b"", b'[{"cut', b"\xff\xfe\x00", b"null", b"5", b'{"a": 1}', b'["x"]')
NAMES = (
    "tuning.json",
    "samples.json",
    "data.json",
    "log.jsonl",
    "run.lock",
    "run.lock.json",
    "quarantine.jsonl",
    "stages/1-main/trace.jsonl",
)


@pytest.mark.parametrize("spoiled", GARBAGE)
def test_spoiled_files_are_made_anew_and_told(
    spoiled: bytes, tiny_recipe: Callable[..., str]
) -> None:
    recipe = parsed(tiny_recipe("causal"), **QUICK)
    interrupted(lambda show: sft(recipe, show=show), stage=0, step=3)
    run = Path(recipe.output)
    for name in NAMES:
        (run / name).write_bytes(spoiled)
    notes: list[str] = []
    sft(
        recipe,
        resume=True,
        show=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    if spoiled in GARBAGE[:3]:
        text = "\n".join(notes)
        assert all(name in text for name in ("tuning.json", "samples.json", "data.json"))
    assert json.loads((run / "tuning.json").read_text())[0]["stage"] == "main"
    assert json.loads((run / "samples.json").read_text())[0]["after"] is not None
    write_report(run)
    verify_run(run, steps=1)


@pytest.mark.parametrize("key", ["digest", "blocks", "rows", "source"])
def test_a_flipped_byte_in_the_fingerprints_of_data_is_no_traceback(
    key: str, tiny_recipe: Callable[..., str]
) -> None:
    """The fingerprints may then contradict themselves, or say that the data is another."""
    recipe = parsed(tiny_recipe("causal"), **QUICK)
    interrupted(lambda show: sft(recipe, show=show), stage=0, step=2)
    path = Path(recipe.output) / "data.json"
    text = path.read_text()
    at = text.index(f'"{key}": ') + len(f'"{key}": ') + 2
    path.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    try:
        sft(recipe, resume=True)
    except VlmTuneError as error:
        assert "data" in str(error)


def test_what_a_stage_wrote_at_its_end_is_named_if_it_is_spoiled(
    tiny_recipe: Callable[..., str],
) -> None:
    recipe = parsed(tiny_recipe("causal"), **QUICK)
    sft(recipe)
    done = Path(recipe.output) / "stages/1-main/done.json"
    for spoiled in (done.read_bytes()[:-2] + b"\x00}", b"[1]", b""):
        done.write_bytes(spoiled)
        with pytest.raises(ModelError, match=r"done\.json: (can't be read|expected)"):
            which_model(recipe.output)


def test_no_whole_checkpoint_begins_anew_and_says_so(tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(tiny_recipe("causal"), **QUICK)
    interrupted(lambda show: sft(recipe, show=show), stage=0, step=2)
    for path in Path(recipe.output).glob("stages/*/checkpoints/*/manifest.json"):
        path.write_bytes(b"{")
    events: list[Event] = []
    sft(recipe, resume=True, show=events.append)
    assert any(
        "no complete checkpoint (damaged: step-0000001, step-0000002)" in event.text
        for event in events
        if isinstance(event, Note)
    )
    assert [event.step for event in events if isinstance(event, TrainSteps)] == [1, 2, 3, 4]


def test_a_folder_deleted_while_it_runs_ends_the_run_in_words(
    tiny_recipe: Callable[..., str],
) -> None:
    recipe = parsed(tiny_recipe("causal"), **QUICK)

    def show(event: Event) -> None:
        if isinstance(event, TrainSteps) and event.step == 2:
            shutil.rmtree(recipe.output)

    with pytest.raises(
        TrainingError, match=r"deleted or moved while it ran|could not be written"
    ) as error:
        sft(recipe, show=show)
    assert error.value.exit_code == 5


@pytest.mark.parametrize("output", ["file/run", "n" * 300, "a\0b", "/proc/run"])
def test_an_output_that_can_not_be_written_is_refused_before_any_work(
    output: str, tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    recipe = parsed(tiny_recipe("causal"), **QUICK).model_copy(
        update={"output": str(tmp_path / output)}
    )
    monkeypatch.setattr(
        "vlm_tune.train.run.read_rows", lambda *arguments: pytest.fail("work was begun")
    )
    with pytest.raises(RecipeError, match="the output folder can't be written"):
        sft(recipe)


def test_files_of_others_stay_when_a_model_folder_is_replaced(
    tiny_recipe: Callable[..., str],
) -> None:
    recipe = parsed(tiny_recipe("causal"), **QUICK)
    run = sft(recipe).folder
    (run / "model" / "notes.txt").write_text("mine")
    sft(recipe, resume=True)
    assert (run / "model" / "notes.txt").read_text() == "mine"
    sft(recipe, overwrite=True)
    assert (run / "model" / "notes.txt").read_text() == "mine" and (
        run / "model" / "config.json"
    ).is_file()
