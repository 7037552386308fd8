"""Runs on sampled completions: they learn what is rewarded, and resume bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.policy_samples import policy_recipe, prompt_batches, sampler_of
from tests.helpers.preference_samples import awake, objective_of
from tests.helpers.tiny_models import assert_same_bits, interrupted
from vlm_tune.api import grpo, sft
from vlm_tune.config.recipe import Recipe
from vlm_tune.data_check.check import check
from vlm_tune.errors import DataError, RecipeError
from vlm_tune.events import Evaluation, Event, TrainSteps
from vlm_tune.train import policy

LOW = "tests.helpers.policy_samples:low_share"
ALL = """
tune:
  - {match: "tower.*", how: frozen}
  - {match: "*", how: full}
train:"""


def rewards_of(recipe: Recipe) -> list[float]:
    """The mean reward of each step of a run."""
    shown: list[Event] = []
    grpo(recipe, show=shown.append)
    metrics = [event.metrics for event in shown if isinstance(event, TrainSteps)]
    return [figures["reward"] for figures in metrics if figures is not None]


def learning(make: Callable[..., str], kind: str) -> Recipe:
    return policy_recipe(
        make,
        kind,
        tune=ALL,
        objective={"reward_funcs": [LOW], "num_generations": 8},
        train__steps=7,
        train__learning_rate=5e-2,
        train__schedule={"kind": "constant", "warmup": 0.0},
        data__validation=[],
    )


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_rewarded_completions_become_likelier(kind: str, tiny_recipe: Callable[..., str]) -> None:
    recipe = learning(tiny_recipe, kind)
    rewards = rewards_of(recipe)
    assert sum(rewards[-2:]) > sum(rewards[:2]) + 0.3
    assert "Mean reward of sampled answers" in (Path(recipe.output) / "report.html").read_text()


def test_a_wrong_sign_of_the_gradient_is_noticed(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = policy.advantages_of
    monkeypatch.setattr(policy, "advantages_of", lambda *figures: -right(*figures))
    rewards = rewards_of(learning(tiny_recipe, "causal"))
    assert sum(rewards[-2:]) < sum(rewards[:2]) - 0.1


@pytest.mark.parametrize(
    ("objective", "tune"),
    [
        ({"beta": 0.1, "num_iterations": 2, "loss_type": "dr_grpo"}, {}),
        (
            {"beta": 0.1, "reference": "copy", "importance_sampling_level": "sequence"},
            {"tune": ALL},
        ),
    ],
    ids=["adapter off", "copy"],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tiny_recipe: Callable[..., str], objective: dict[str, Any], tune: dict[str, Any]
) -> None:
    changes: dict[str, Any] = {
        "objective": {"reward_funcs": [LOW], **objective},
        "train__steps": 4,
        "evaluate__every": 2,
        "train__checkpoints": {"keep": 10},
        **tune,
    }
    whole = grpo(policy_recipe(tiny_recipe, "causal", output="whole", **changes))
    recipe = policy_recipe(tiny_recipe, "causal", output="cut", **changes)
    interrupted(lambda **options: grpo(recipe, **options), at=Evaluation, stage=0, step=2)
    resumed = grpo(recipe, resume=True)
    last = "stages/1-main/checkpoints/step-0000004"
    assert_same_bits(whole.folder / last, resumed.folder / last)
    traces = [(run.folder / "stages/1-main/trace.jsonl").read_text() for run in (whole, resumed)]
    assert traces[0] == traces[1] and traces[0].count("\n") == 4


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_truncated_completions_train_nothing_where_masked(
    kind: str, tiny_recipe: Callable[..., str]
) -> None:
    objective = {
        "mask_truncated_completions": True,
        "loss_type": "grpo",
        "max_completion_length": 4 if kind == "causal" else 40,
    }
    recipe = policy_recipe(tiny_recipe, kind, objective=objective, data__group="image")
    model = awake(recipe)
    batches = prompt_batches(model, recipe)
    (batch,) = sampler_of(model, recipe)(batches, 1, compiled=False)
    completions = batch.completions
    assert completions is not None
    truncated = (~completions.ended).sum()
    assert 0 < truncated < len(completions.ended)
    assert torch.equal(completions.trained, completions.ended)
    assert batch.supervised == int(completions.lengths[completions.ended].sum())
    objective_built = objective_of(model, recipe)
    assert objective_built.counts(batch).items == len(completions.ended)  # as in TRL
    objective_built.before(model, [batch], objective_built.counts(batch))
    loss = objective_built(model, batch)
    total, number = loss.metrics["completions/clipped_ratio"]
    assert int(total) == int(truncated) and int(number) == len(completions.ended)
    loss.sum.backward()


def test_a_process_without_rows_takes_part(tiny_recipe: Callable[..., str]) -> None:
    recipe = policy_recipe(tiny_recipe, "causal")
    model = awake(recipe)
    batch = prompt_batches(model, recipe)[0]
    batch.prompts = []
    (idle,) = sampler_of(model, recipe)([batch], 1, compiled=False)
    objective = objective_of(model, recipe)
    assert objective.counts(idle).items == 0
    objective.before(model, [idle], objective.counts(idle))
    loss = objective(model, idle)
    loss.sum.backward()
    assert float(loss.sum.detach()) == 0
    assert all(int(number) == 0 for _, number in loss.metrics.values())


def no_reward(completions: list[Any], **_: object) -> list[None]:
    """A reward function that judges no completion."""
    return [None] * len(completions)


def test_a_step_without_any_reward_is_reported_once(tiny_recipe: Callable[..., str]) -> None:
    functions = [f"{__name__}:no_reward"]
    recipe = policy_recipe(tiny_recipe, "causal", objective={"reward_funcs": functions})
    model = awake(recipe)
    notes: list[Any] = []
    sampler = sampler_of(model, recipe, notes.append)
    for step in (1, 2):
        sampler(prompt_batches(model, recipe)[:1], step, compiled=False)
    (note,) = notes
    assert note.step == 1
    assert "no_reward gave none of this process's 16 completions one" in note.text


def test_check_takes_the_objective(tiny_recipe: Callable[..., str]) -> None:
    assert not check(policy_recipe(tiny_recipe, "causal", data__validation=[])).errors
    missing = policy_recipe(tiny_recipe, "causal", objective={"reward_funcs": ["no_module:score"]})
    with pytest.raises(RecipeError, match="no_module"):
        check(missing)


def test_check_refuses_a_model_whose_answers_can_not_be_branches(
    tiny_recipe: Callable[..., str],
) -> None:
    """An LFM2's convolutions carry a state from one completion to the next."""

    def make(kind: str, output: str) -> str:
        lfm2 = "model_type: lfm2, vocab_size: 400, config: {layer_types: [conv, full_attention], "
        llama = "model_type: llama, vocab_size: 400, config: {"
        return tiny_recipe(kind, output=output).replace(llama, lfm2)

    (error,) = check(policy_recipe(make, "causal", data__validation=[])).errors
    assert error.kind == "unfit" and "for preferences and rewards, another model" in error.message


def test_another_command_is_named(tiny_recipe: Callable[..., str]) -> None:
    with pytest.raises(RecipeError, match="is trained by `vlm-tune grpo`"):
        sft(policy_recipe(tiny_recipe, "causal"))


def test_rows_of_preferences_are_refused(tiny_recipe: Callable[..., str], color_rows: Path) -> None:
    path = color_rows.with_name("pairs.jsonl")
    path.write_text('{"question": "a", "chosen": "b", "rejected": "c"}\n')
    recipe = policy_recipe(tiny_recipe, "causal", data__train=[{"kind": "file", "path": str(path)}])
    with pytest.raises(DataError, match="have answers that are not to be learned"):
        grpo(recipe)
