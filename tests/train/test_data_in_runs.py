"""Settings of the data section, in whole runs.

Bad rows, streams, packing, token batches, workers, held-out parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_models import (
    assert_close,
    assert_same_bits,
    interrupted,
    parsed,
    tensors_of,
)
from vlm_tune.api import evaluate, sft
from vlm_tune.errors import DataError, ModelError
from vlm_tune.run_folder import MARK

QUICK: dict[str, Any] = {"evaluate__samples": 0, "train__log_every": 1}


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [
        event
        for event in map(json.loads, (run / "log.jsonl").read_text().splitlines())
        if event["event"] == kind
    ]


def spoil(path: Path) -> None:
    """Puts three bad rows among the good ones.

    One without turns, one that is not JSON, and one whose image is cut.
    """
    lines = path.read_text().splitlines()
    (path.parent / "cut.png").write_bytes((path.parent / "red.png").read_bytes()[:200])
    cut = lines[0].replace("red.png", "cut.png")
    path.write_text(
        "\n".join([lines[0], '{"messages": []}', *lines[1:4], "{not json", *lines[4:], cut]) + "\n"
    )


def test_fault_21_bad_rows_stop_a_run_before_the_model_or_are_quarantined(
    tiny_recipe: Callable[..., str], color_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(color_rows)
    changes = QUICK | {"data__validation": [], "train__batch_size": 8, "train__steps": 1}
    run = color_rows.parent / "run"
    text = tiny_recipe("causal")
    with monkeypatch.context() as patched:
        patched.setattr(
            "vlm_tune.train.run.build", lambda *arguments: pytest.fail("the model was built")
        )
        with pytest.raises(DataError, match=r"messages\.jsonl, row 2: "):
            sft(parsed(text, **changes), overwrite=True)
    with pytest.raises(DataError, match="3 bad rows, more than 2"):
        sft(
            parsed(text, **changes, data__on_bad_row="quarantine", data__max_bad_rows=2),
            overwrite=True,
        )
    sft(parsed(text, **changes, data__on_bad_row="quarantine"), overwrite=True)
    rows = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == [2, 6, 11] and all(
        row["message"] and row["source"] == str(color_rows) for row in rows
    )
    assert json.loads(rows[0]["content"]) == {"messages": []}
    (stage,) = events(run, "stage")
    # Eight good rows were trained on, none twice in place of a bad one.
    assert stage["questions"] == 8 and sum(stage["left_out"].values()) == 3
    notes = [event["text"] for event in events(run, "note")]
    assert sum(note.startswith("left out: ") for note in notes) == 3


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_worker_processes_change_nothing(kind: str, tiny_recipe: Callable[..., str]) -> None:
    augment = {"flip": 0.5, "colour": 0.3, "crop": 0.7}
    runs = [
        sft(
            parsed(
                tiny_recipe(kind, output=f"run{workers}"),
                **QUICK,
                data__augment=augment,
                train__loader_workers=workers,
            )
        ).folder
        for workers in (0, 2)
    ]
    assert_same_bits(runs[0] / "model", runs[1] / "model")


def test_packed_token_batches_learn_what_padded_rows_do(tiny_recipe: Callable[..., str]) -> None:
    """With every row in each step, how they are laid out makes no difference."""
    changes = QUICK | {"train__steps": 3, "train__max_grad_norm": None}
    padded = sft(parsed(tiny_recipe("causal", output="padded"), **changes, train__batch_size=8))
    packed = sft(
        parsed(
            tiny_recipe("causal", output="packed"),
            **changes,
            data__packing=True,
            data__row_length=128,
            train__batch_tokens=4096,
        )
    )
    assert_close(
        tensors_of(packed.folder / "model"), tensors_of(padded.folder / "model"), relative=1e-4
    )
    one, other = (events(run.folder, "train")[0] for run in (padded, packed))
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_epochs_of_token_batches_count_their_own_steps(tiny_recipe: Callable[..., str]) -> None:
    changes = QUICK | {
        "train__steps": None,
        "train__epochs": 2,
        "train__batch_tokens": 100,
        "evaluate__every": 100,
    }
    run = sft(parsed(tiny_recipe("causal"), **changes)).folder
    (stage,) = events(run, "stage")
    trained = events(run, "train")
    assert stage["steps"] == len(trained) and len(trained) >= 4


def test_a_stream_trains_and_resumes_bit_for_bit(tiny_recipe: Callable[..., str]) -> None:
    changes = QUICK | {
        "data__streaming": True,
        "data__shuffle_buffer": 4,
        "train__steps": 7,
        "train__gradient_accumulation": 2,
    }
    changes |= {"train__batch_size": 3, "evaluate__every": 100}

    def recipe(output: str) -> Any:
        return parsed(tiny_recipe("causal", output=output), **changes)

    whole = sft(recipe("whole"))
    interrupted(lambda show: sft(recipe("part"), show=show), stage=0, step=3)
    part = sft(recipe("part"), resume=True)
    assert_same_bits(whole.folder / "model", part.folder / "model")
    assert [event["loss"] for event in events(part.folder, "train")] == [
        event["loss"] for event in events(whole.folder, "train")
    ]


def test_held_out_rows_are_scored_and_never_trained_on(
    tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    changes = QUICK | {
        "data__validation": [],
        "data__split": {"validation": 0.25, "test": 0.25},
        "train__steps": 2,
    }
    run = sft(parsed(tiny_recipe("causal"), **changes))
    (stage,) = events(run.folder, "stage")
    assert stage["questions"] == 4 and stage["images"] == 2
    assert run.result["n"] == 2 and events(run.folder, "evaluate")[0]["n"] == 2
    again = {split: evaluate(run.folder, split=split) for split in ("validation", "test")}
    assert {split: scores.n for split, scores in again.items()} == {"validation": 2, "test": 2}
    shown = [{answer.image for answer in scores.answers} for scores in again.values()]
    assert len(shown[0] | shown[1]) == 2


def test_sources_share_an_epoch_by_their_weights(
    tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    sources = [{"kind": "file", "path": str(color_rows), "weight": weight} for weight in (3.0, 1.0)]
    changes = QUICK | {
        "data__train": sources,
        "data__epoch_size": 8,
        "train__steps": None,
        "train__epochs": 1,
        "train__batch_size": 4,
    }
    run = sft(parsed(tiny_recipe("causal"), **changes)).folder
    assert events(run, "stage")[0]["steps"] == 2


GONE = {"kind": "file", "path": "gone.jsonl"}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"data__train": [GONE]}, DataError),
        ({"stages": [{"name": "one", "data": {"test": [GONE]}}]}, DataError),
        ({"model__llm": {"kind": "causal", "name": "gone"}}, ModelError),
    ],
)
def test_a_mistaken_name_deletes_no_run(
    changes: dict[str, Any], error: type[Exception], tiny_recipe: Callable[..., str]
) -> None:
    """`--overwrite` deletes what is there once it is known what comes in its place."""
    recipe = parsed(tiny_recipe("causal"), **changes)
    run = Path(recipe.output)
    run.mkdir()
    for name in (MARK, "result.json"):
        (run / name).write_text("{}")
    with pytest.raises(error, match="gone"):
        sft(recipe, overwrite=True)
    assert (run / "result.json").is_file()
