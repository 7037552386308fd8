"""Checkpoints: which are kept, which are trusted, and what is said when one is damaged."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import assert_same_bits, built, parsed, stage_loop, tensors_of
from vlm_tune.api import sft
from vlm_tune.errors import ModelError, RecipeError, TrainingError
from vlm_tune.events import Evaluation, Event, Note, TrainSteps
from vlm_tune.model.checkpoint import find_model, load_model
from vlm_tune.model.committed_folders import commit_folder, is_whole, verify_folder
from vlm_tune.train.checkpoint import (
    Progress,
    best_checkpoint,
    last_checkpoint,
    read_optimizer,
    rotate,
    step_folder,
)
from vlm_tune.train.checkpoint_policy import CheckpointPolicy


def put(stage: Path, *steps: int) -> None:
    """Whole checkpoints of some steps."""
    for step in steps:
        commit_folder(
            step_folder(stage, step), lambda folder: (folder / "a").write_text("a") and None
        )


def steps_of(stage: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (stage / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, None, [40]),
        (2, None, [30, 40]),
        (1, 10, [10, 40]),
        (2, 10, [10, 30, 40]),
        (2, 40, [30, 40]),
        (9, 20, [10, 20, 30, 40]),
    ],
)
def test_rotation_keeps_the_last_and_the_best(
    keep: int, best: int | None, left: list[int], tmp_path: Path
) -> None:
    put(tmp_path, 10, 20, 30, 40)
    rotate(tmp_path, keep, best, 40)
    assert steps_of(tmp_path) == left


def test_rotation_never_removes_the_last_whole_one(tmp_path: Path) -> None:
    put(tmp_path, 10, 20)
    (step_folder(tmp_path, 20) / "a").write_text("b")
    rotate(tmp_path, 1, None, 10_000_000)
    assert is_whole(step_folder(tmp_path, 10))


def test_rotation_counts_by_step_and_not_by_name(tmp_path: Path) -> None:
    put(tmp_path, 9_999_999, 10_000_000)
    rotate(tmp_path, 1, None, 10_000_000)
    assert steps_of(tmp_path) == [10_000_000]


def test_a_flipped_byte_a_cut_and_a_missing_file_are_noticed(tmp_path: Path) -> None:
    def spoil(change: Callable[[Path], Any]) -> str:
        folder = tmp_path / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        commit_folder(
            folder,
            lambda target: (
                (target / "sub").mkdir() or ((target / "sub" / "a").write_bytes(b"abcdef") and None)
            ),
        )
        verify_folder(folder)
        change(folder / "sub" / "a")
        assert not is_whole(folder)
        with pytest.raises(ModelError) as error:
            verify_folder(folder)
        return str(error.value)

    assert "sub/a is not what was written" in spoil(lambda path: path.write_bytes(b"abcdeg"))
    assert "sub/a is missing or truncated" in spoil(lambda path: path.write_bytes(b"abcde"))
    assert "sub/a is missing or truncated" in spoil(lambda path: path.unlink())
    assert "no complete model" in spoil(lambda path: (path.parents[1] / "manifest.json").unlink())
    assert "no complete model" in spoil(
        lambda path: (path.parents[1] / "manifest.json").write_text("[]")
    )
    assert "no complete model" in spoil(
        lambda path: (path.parents[1] / "manifest.json").write_text('{"files": []}')
    )


def test_the_furthest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    first, second = tmp_path / "stages" / "1-one", tmp_path / "stages" / "2-two"
    assert last_checkpoint(tmp_path, ["one", "two"]) is None
    put(first, 5, 9)
    put(second, 1, 3)
    assert last_checkpoint(tmp_path, ["one", "two"]) == (step_folder(second, 3), [])
    (step_folder(second, 3) / "a").write_text("b")
    assert last_checkpoint(tmp_path, ["one", "two"]) == (
        step_folder(second, 1),
        [step_folder(second, 3)],
    )
    (step_folder(second, 1) / "a").unlink()
    assert last_checkpoint(tmp_path, ["one", "two"]) == (
        step_folder(first, 9),
        [step_folder(second, 3), step_folder(second, 1)],
    )


def test_optimizer_state_of_other_parameters_is_refused(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    recipe = parsed(tiny_recipe("causal"), train__steps=1)
    loop = stage_loop(built(recipe), recipe, tmp_path / "run")
    loop.run()
    checkpoint = step_folder(tmp_path / "run", 1)
    other = parsed(tiny_recipe("seq2seq"), train__steps=1)
    stranger = stage_loop(built(other), other, tmp_path / "other")
    with pytest.raises(ModelError, match="its optimizer state is of other parameters"):
        read_optimizer(checkpoint, stranger.tuned.names)


def test_optimizer_state_lies_in_memory_as_its_parameter_does(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """The fused step walks parameter and state in memory order: another order is another state."""
    text = tiny_recipe("causal").replace('"tower.*", how: frozen', '"tower.*", how: full')
    recipe = parsed(text, train__steps=1)
    models = [built(recipe) for _ in range(2)]
    for model in models:
        model.tower.to(memory_format=torch.channels_last)
    loops = [stage_loop(model, recipe, tmp_path / str(place)) for place, model in enumerate(models)]
    loops[0].run()
    inner: list[Any] = [loop.engine.optimizer.optimizer for loop in loops]
    loops[1].engine.load_optimizer_state(
        read_optimizer(step_folder(tmp_path / "0", 1), loops[1].tuned.names)
    )
    for one, other in zip(
        inner[0].param_groups[0]["params"], inner[1].param_groups[0]["params"], strict=True
    ):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(inner[0].state[one][key], inner[1].state[other][key])
            assert inner[1].state[other][key].stride() == other.stride()


def runs(tiny_recipe: Callable[..., str], output: str, **changes: Any) -> Any:
    settings = {
        "train__steps": 4,
        "train__log_every": 1,
        "evaluate__samples": 0,
        "train__checkpoints": {"every": 1, "keep": 4},
    }
    return parsed(tiny_recipe("causal", output=output), **(settings | changes))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_named(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    whole = sft(runs(tiny_recipe, "whole")).folder
    run = sft(runs(tiny_recipe, "damaged")).folder
    for step in (3, 4):
        path = (
            run / "stages" / "1-main" / "checkpoints" / f"step-{step:07d}" / "connector.safetensors"
        )
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert find_model(run) == run / "model"
    shutil.rmtree(run / "model")
    assert find_model(run).name == "step-0000002"
    events: list[Event] = []
    sft(runs(tiny_recipe, "damaged"), resume=True, show=events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes[:2] == [
        f"step-000000{step} of 1-main is damaged; continuing from step-0000002" for step in (4, 3)
    ]
    assert [event.step for event in events if isinstance(event, TrainSteps)] == [3, 4]
    assert_same_bits(whole / "model", run / "model")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in log if event["event"] == "train"] == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_best_checkpoint_is_what_the_run_ends_with(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_tune.train.evaluator import Evaluator

    scores = iter([0.1, 0.9, 0.9, 0.2])

    def scored(self: Any, step: int) -> Evaluation:
        return Evaluation(step=step, accuracy=next(scores), loss=1.0, n=8)

    monkeypatch.setattr(Evaluator, "_scored", scored)
    recipe = runs(
        tiny_recipe, "run", evaluate__every=1, train__checkpoints={"every": 10, "keep": 1}
    )
    run = sft(recipe)
    stage = run.folder / "stages" / "1-main"
    assert steps_of(stage) == [3, 4]
    progress = json.loads((stage / "done.json").read_text())
    assert (progress["best_step"], progress["best_score"], progress["step"]) == (3, 0.9, 4)
    best, ended = tensors_of(step_folder(stage, 3)), tensors_of(run.folder / "model")
    assert all(torch.equal(value, best[name]) for name, value in ended.items())
    last = tensors_of(step_folder(stage, 4))
    assert not all(torch.equal(value, last[name]) for name, value in ended.items())


@pytest.mark.slow
def test_best_checkpoints_of_a_lora_stage_are_found_again(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.helpers.tiny_models import with_tune
    from vlm_tune.train.evaluator import Evaluator

    scores = iter([0.9, 0.1])
    monkeypatch.setattr(
        Evaluator,
        "_scored",
        lambda self, step: Evaluation(step=step, accuracy=next(scores), loss=1.0, n=8),
    )
    text = with_tune(tiny_recipe("seq2seq"))
    run = sft(parsed(text, train__steps=2, evaluate__every=1, evaluate__samples=0))
    stage = run.folder / "stages" / "1-main"
    best = tensors_of(step_folder(stage, 1))
    assert all(
        torch.equal(value, best[name]) for name, value in tensors_of(run.folder / "model").items()
    )
    assert list(run.model.adapters) == ["llm"]
    assert load_model(run.folder).adapters


@pytest.mark.slow
def test_resume_and_folders_that_are_not_free(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="there is no run to resume"):
        sft(runs(tiny_recipe, "run"), resume=True)
    recipe = runs(tiny_recipe, "run", train__steps=1)
    sft(recipe)
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(RecipeError, match="--resume continues it, --overwrite starts over"):
        sft(recipe)
    with pytest.raises(
        RecipeError,
        match=r"the recipe differs from the run's: train\.learning_rate: 0\.003 -> 0\.1",
    ):
        sft(runs(tiny_recipe, "run", train__steps=1, train__learning_rate=0.1), resume=True)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
    sft(recipe, overwrite=True)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_names_the_rows(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    recipe = runs(tiny_recipe, "run", train__max_grad_norm=None)
    # A rate that no recipe may have, so that the loss overflows at once.
    recipe = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"learning_rate": 1e30})}
    )
    with pytest.raises(
        TrainingError, match=r"the loss is (nan|inf) at step \d; the batch holds messages:\d"
    ) as error:
        sft(recipe)
    assert error.value.exit_code == 5
    assert not (tmp_path / "run" / "model").exists()


def recorded(evaluations: list[Evaluation]) -> Progress:
    """The progress of a stage with these evaluations."""
    progress = Progress(step=evaluations[-1].step)
    position: Any = None
    nonfinite: Any = SimpleNamespace(in_a_row=0)
    recipe: Any = SimpleNamespace(
        evaluate=SimpleNamespace(every=1),
        train=SimpleNamespace(checkpoints=SimpleNamespace(every=None)),
    )
    policy = CheckpointPolicy(recipe, progress, position, nonfinite, validates=True)
    for evaluation in evaluations:
        policy.record(evaluation)
    return progress


def evaluated(step: int, best_by: str, score: float | None, loss: float = 1.0) -> Evaluation:
    metrics = {} if best_by == "loss" else {best_by: {"value": score}}
    return Evaluation(step=step, accuracy=0.0, n=8, loss=loss, best_by=best_by, metrics=metrics)


@pytest.mark.parametrize(
    ("best_by", "scores", "best"),
    [
        ("anls", [0.2, 0.9, 0.9, 0.5], 3),
        ("anls", [0.2, None, 0.1], 1),
        ("perplexity", [9.0, 3.0, 3.0, 4.0], 3),
        ("my_metrics:score", [0.2, 0.1], 1),
    ],
)
def test_the_best_step_goes_by_the_chosen_metric_and_its_direction(
    best_by: str, scores: list[float | None], best: int, tmp_path: Path
) -> None:
    steps = range(1, len(scores) + 1)
    progress = recorded([evaluated(step, best_by, scores[step - 1]) for step in steps])
    put(tmp_path, *steps)
    expected = ((step_folder(tmp_path, best), scores[best - 1]), [])
    assert progress.best_step == best
    assert best_checkpoint(tmp_path, progress) == expected


def test_the_best_step_may_go_by_loss(tmp_path: Path) -> None:
    losses = [2.0, 0.5, math.inf, 0.7]
    steps = range(1, 5)
    progress = recorded([evaluated(step, "loss", None, losses[step - 1]) for step in steps])
    put(tmp_path, *steps)
    assert (progress.best_step, progress.best_score) == (2, 0.5)
    assert best_checkpoint(tmp_path, progress) == ((step_folder(tmp_path, 2), 0.5), [])


def test_scores_by_another_metric_do_not_compete_after_a_resume(tmp_path: Path) -> None:
    progress = recorded([evaluated(1, "anls", 0.9), evaluated(2, "rouge_l", 0.2)])
    put(tmp_path, 1, 2)
    assert (progress.best_step, progress.best_score) == (2, 0.2)
    assert best_checkpoint(tmp_path, progress) == ((step_folder(tmp_path, 2), 0.2), [])
