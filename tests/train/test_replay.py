"""verify-run: a replay agrees with its run bit for bit, and changes in the run are named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import vlm_tune
from tests.helpers.tiny_models import parsed, with_tune
from vlm_tune import cli
from vlm_tune.api import sft
from vlm_tune.errors import RecipeError
from vlm_tune.model.committed_folders import commit_folder
from vlm_tune.train.checkpoint import step_folder
from vlm_tune.train.replay import ReplayReport
from vlm_tune.train.step_trace import NAME

DROPOUT = """
tune:
  - {match: "tower.*", how: full}
  - {match: "connector.*", how: full}
  - {match: "llm.*", how: lora, r: 4, lora_dropout: 0.2, target_modules: all-linear}
train:"""
STAGES = """
stages:
  - {name: one, train: {steps: 2}}
  - {name: two, data: {augment: {flip: 0.5}}}
"""


def a_run(tiny_recipe: Callable[..., str], **changes: Any) -> Path:
    settings = {
        "data__workers": 0,
        "train__steps": 6,
        "train__batch_size": 3,
        "train__gradient_accumulation": 2,
        "evaluate__samples": 0,
    }
    saves = {"train__checkpoints": {"every": 2, "keep": 9}, "evaluate__every": 3}
    return sft(
        parsed(with_tune(tiny_recipe("causal"), DROPOUT) + STAGES, **(settings | saves | changes))
    ).folder


def verified(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code of `vlm-tune verify-run` and what it prints."""
    before, sys.argv = sys.argv, ["vlm-tune", "verify-run", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0), capsys.readouterr().out
    finally:
        sys.argv = before
    raise AssertionError("it did not end")


@pytest.mark.slow
def test_a_replay_agrees_and_changes_of_the_run_are_named(
    tiny_recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tiny_recipe)
    stage = run / "stages" / "2-two"
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    report: ReplayReport = vlm_tune.verify_run(run)
    assert report.agrees
    assert (report.stage, report.start, report.end, report.checkpoints) == ("two", 4, 6, [6])
    report = vlm_tune.verify_run(run, steps=3)
    assert (report.agrees, report.start, report.end, report.checkpoints) == (True, 3, 6, [4, 6])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    capsys.readouterr()
    code, output = verified(capsys, str(run))
    assert code == 0
    assert (
        "sample ids: equal" in output
        and "checkpoint of step 6: equal, bit for bit" in output
        and output.endswith("the run agrees\n")
    )

    lines = [json.loads(line) for line in (stage / NAME).read_text().splitlines()]
    lines[5]["loss"] = lines[5]["loss"] * (1 + 1e-7)
    (stage / NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def nudged(folder: Path) -> None:
        for path in step_folder(stage, 6).rglob("*.safetensors"):
            (folder / path.relative_to(step_folder(stage, 6))).parent.mkdir(
                parents=True, exist_ok=True
            )
            tensors = load_file(path)
            if path.name == "connector.safetensors":
                next(iter(tensors.values())).view(-1)[0] += 1e-3
            save_file(tensors, folder / path.relative_to(step_folder(stage, 6)))

    commit_folder(step_folder(stage, 6), nudged)
    code, output = verified(capsys, str(run), "--json")
    summary = json.loads(output.splitlines()[-1])
    assert code == 5 and not summary["agrees"]
    assert [(one["what"], one["step"]) for one in summary["differences"]] == [("loss", 6)]
    assert [name.split("|")[0] for name in summary["tensors"]["6"]] == ["connector.safetensors"]
    code, output = verified(capsys, str(run))
    assert (
        code == 5
        and "losses: differ first at step 6" in output
        and "checkpoint of step 6: 1 tensors differ: connector" in output
    )


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no recipe\.yaml"):
        vlm_tune.verify_run(tmp_path)
