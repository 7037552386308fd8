"""Runs on preferences: they learn, their reference is the start, and they resume bit for bit."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.helpers.preference_samples import (
    LORA,
    awake,
    examples_of,
    judged_of,
    objective_of,
    preference_text,
    step,
    write_rows_beside,
)
from tests.helpers.tiny_models import (
    assert_close,
    assert_same_bits,
    batch_of,
    interrupted,
    parsed,
)
from vlm_tune.api import dpo, kto, sft
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.packing import with_mismatched
from vlm_tune.data_check.check import check
from vlm_tune.errors import DataError, ModelError, RecipeError, TrainingError
from vlm_tune.events import Evaluation, Event, Note, TrainSteps
from vlm_tune.rendering.terminal import Display
from vlm_tune.train import preferences
from vlm_tune.train.objectives import Counts
from vlm_tune.train.references import START, StartCopy

ALL = """
tune:
  - {match: "tower.*", how: frozen}
  - {match: "*", how: full}
train:"""


def recipe_of(
    make: Callable[..., str], objective: str, kind: str = "causal", **changes: Any
) -> Recipe:
    tune = changes.pop("tune", LORA)
    output = changes.pop("output", "run")
    judged = "kto" in objective

    def named(kind: str) -> str:
        return make(kind, output=output)

    text = preference_text(named, kind, objective, tune=tune, judged=judged)
    settings = {"train__log_every": 1, "evaluate__samples": 0, "data__test": []}
    return parsed(text, **(settings | changes))


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == kind]


@pytest.mark.parametrize(
    ("objective", "share"), [("{kind: dpo, beta: 1.0}", 0.6), ("{kind: simpo, beta: 2.0}", 0.9)]
)
def test_a_run_raises_margin_and_accuracy(
    tiny_recipe: Callable[..., str], objective: str, share: float
) -> None:
    recipe = recipe_of(tiny_recipe, objective, train__steps=24, evaluate__every=12)
    shown: list[Event] = []
    run = dpo(recipe, show=shown.append)
    losses = [event.loss for event in shown if isinstance(event, TrainSteps)]
    scores = [event for event in shown if isinstance(event, Evaluation)]
    assert losses[-1] < share * losses[0]
    assert scores[-1].figures["rewards/accuracies"] == 1.0 and scores[-1].n == 8
    assert scores[-1].metrics is not None and scores[0].metrics is not None
    assert scores[-1].figures["rewards/margins"] > scores[0].figures["rewards/margins"] > 0
    written = events_of(run.folder, "evaluate")[-1]["metrics"]
    assert written == scores[-1].metrics
    assert "Margin of rewards" in (run.folder / "report.html").read_text()


def test_a_wrong_sign_of_the_gradient_is_noticed(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = preferences.dpo_losses

    def wrong(config: Any, policy: Any, reference: Any, lengths: Any) -> Any:
        return right(config, policy.flip(1), reference.flip(1), lengths)

    monkeypatch.setattr(preferences, "dpo_losses", wrong)
    recipe = recipe_of(tiny_recipe, "{kind: dpo, beta: 1.0}", train__steps=8, evaluate__every=8)
    shown: list[Event] = []
    dpo(recipe, show=shown.append)
    (scores,) = [event for event in shown if isinstance(event, Evaluation)]
    assert scores.metrics is not None
    assert scores.figures["rewards/margins"] < 0 and scores.figures["rewards/accuracies"] < 0.5


def test_every_reference_is_the_model_before_training(tiny_recipe: Callable[..., str]) -> None:
    losses = {}
    for reference in ("adapter_off", "copy", "precomputed"):
        recipe = recipe_of(
            tiny_recipe, f"{{kind: dpo, reference: {reference}}}", output=f"{reference}"
        )
        run = dpo(recipe)
        losses[reference] = [event["loss"] for event in events_of(run.folder, "train")]
        losses[reference] += [event["loss"] for event in events_of(run.folder, "evaluate")]
    assert losses["copy"] == pytest.approx(losses["adapter_off"], rel=1e-6)
    assert losses["precomputed"] == pytest.approx(losses["adapter_off"], rel=1e-5)


def test_a_copy_is_taken_of_all_that_trains(tiny_recipe: Callable[..., str]) -> None:
    recipe = recipe_of(tiny_recipe, "{kind: dpo, reference: copy}", tune=ALL)
    model = awake(recipe)
    batch = batch_of(model, examples_of(model, recipe))
    start = {
        f"connector.{name}": each.detach().clone()
        for name, each in model.connector.named_parameters()
    }
    reference = StartCopy(model, start)
    before = reference(model, batch)
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.mul_(3.0)
    now: Any = model(batch, by_answer=True)
    assert float((now.sums.detach() - before).abs().max()) > 1e-3
    assert torch.equal(reference(model, batch), before)
    again: Any = model(batch, by_answer=True)
    assert torch.equal(again.sums, now.sums)


@pytest.mark.parametrize(
    ("objective", "tune"),
    [
        ("{kind: dpo, reference: copy}", ALL),
        ("{kind: kto, reference: precomputed}", LORA),
        ("{kind: orpo}", LORA),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tiny_recipe: Callable[..., str], objective: str, tune: str
) -> None:
    train = kto if "kto" in objective else dpo
    changes: dict[str, Any] = {
        "tune": tune,
        "train__steps": 4,
        "evaluate__every": 2,
        "train__checkpoints": {"keep": 10},
    }
    whole = train(recipe_of(tiny_recipe, objective, output="whole", **changes))
    recipe = recipe_of(tiny_recipe, objective, output="cut", **changes)
    interrupted(lambda **options: train(recipe, **options), at=Evaluation, stage=0, step=2)
    resumed = train(recipe, resume=True)
    for kind in ("train", "evaluate"):
        logged = [
            [{key: event.get(key) for key in ("loss", "metrics", "step")} for event in events]
            for events in (events_of(run.folder, kind) for run in (whole, resumed))
        ]
        assert logged[0] == logged[1]
    last = "stages/1-main/checkpoints/step-0000004"
    assert_same_bits(whole.folder / last, resumed.folder / last)


def test_kto_pulls_liked_and_disliked_answers_apart(tiny_recipe: Callable[..., str]) -> None:
    recipe = recipe_of(tiny_recipe, "{kind: kto, beta: 1.0}", train__steps=16, evaluate__every=16)
    shown: list[Event] = []
    kto(recipe, show=shown.append)
    (scores,) = [event for event in shown if isinstance(event, Evaluation)]
    assert scores.figures["kl"] >= 0
    assert scores.figures["rewards/chosen"] > 0 > scores.figures["rewards/rejected"]


def test_validation_answers_that_are_all_liked_have_no_margin(
    tiny_recipe: Callable[..., str],
) -> None:
    recipe = recipe_of(tiny_recipe, "{kind: kto}", train__steps=1, evaluate__limit=1)
    screen = io.StringIO()
    shown: list[Event] = []
    display = Display(Console(file=screen, width=200))

    def show(event: Event) -> None:
        shown.append(event)
        display(event)

    kto(recipe, show=show)
    (scores,) = [event for event in shown if isinstance(event, Evaluation)]
    assert "rewards/chosen" in scores.figures and "rewards/margins" not in scores.figures
    assert "validation rewards/accuracies 100.00% of 1, loss" in screen.getvalue()
    assert "computing the loss of 0 of 1 validation rows" in screen.getvalue()
    assert "questions" not in screen.getvalue().partition("training")[2].partition("saving")[0]


@pytest.mark.parametrize(
    ("group", "labels", "message"),
    [
        ("none", [True] * 8, "all 8 answers are liked: kto learns by telling liked answers from"),
        ("image", [False] * 8, "all 8 answers are disliked: "),
        (
            "image",
            [True] * 2 + [False] * 6,
            "2 answers are liked and 6 disliked, which the weights do not balance: set "
            "desirable_weight to 3 to 4, or undesirable_weight to 0.25 to 0.333",
        ),
        ("image", [True, False] * 4, None),
    ],
)
def test_judgements_that_teach_little_are_told_before_training(
    tiny_recipe: Callable[..., str], group: str, labels: list[bool], message: str | None
) -> None:
    recipe = recipe_of(tiny_recipe, "{kind: kto}", train__steps=1, data__group=group)
    path = Path(recipe.data.train[0].path)  # type: ignore[attr-defined]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    judged = [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in judged))
    shown: list[Event] = []
    kto(recipe, show=shown.append)
    notes = [event.text for event in shown if isinstance(event, Note) and "liked" in event.text]
    findings = [each.message for each in check(recipe).warnings if each.kind == "judgements"]
    assert notes == findings and len(notes) == (message is not None)
    assert all((message or "") in note for note in notes)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_ktos_divergence_is_that_of_the_whole_step(
    kind: str, tiny_recipe: Callable[..., str]
) -> None:
    recipe = recipe_of(tiny_recipe, "{kind: kto, beta: 0.5}", kind)
    model = awake(recipe)
    plain = examples_of(model, recipe)
    units = [
        with_mismatched([example], [plain[place - 1]], kind)[0]
        for place, example in enumerate(plain)
    ]
    whole, gradients = step(model, recipe, [batch_of(model, units)])
    divided, same = step(model, recipe, [batch_of(model, [unit]) for unit in units])
    assert sum(float(loss.sum.detach()) for loss in divided) == pytest.approx(
        float(whole[0].sum.detach()), rel=1e-5
    )
    assert_close(same, gradients)
    objective = objective_of(model, recipe)
    assert objective.counts(batch_of(model, units)) == Counts(8)


@pytest.mark.parametrize(
    ("objective", "rows", "message"),
    [
        ("{kind: dpo}", "plain", "objective.kind: dpo trains on rows of the form preference"),
        ("{kind: dpo}", "judged", "trains on rows of the form preference"),
        ("{kind: language_modeling}", "pairs", "set objective.kind to one of dpo"),
    ],
)
def test_rows_of_another_form_are_refused(
    tiny_recipe: Callable[..., str], color_rows: Path, objective: str, rows: str, message: str
) -> None:
    recipe = recipe_of(tiny_recipe, objective)
    if rows != "pairs":
        other = judged_of(color_rows) if rows == "judged" else None
        path = color_rows if other is None else write_rows_beside(color_rows, "j.jsonl", other)
        recipe = recipe_of(
            tiny_recipe, objective, data__train=[{"kind": "file", "path": str(path)}]
        )
    train = sft if "language" in objective else dpo
    with pytest.raises(DataError, match=message):
        train(recipe)


def test_another_command_is_named(tiny_recipe: Callable[..., str]) -> None:
    recipe = recipe_of(tiny_recipe, "{kind: dpo}")
    for train in (sft, kto):
        with pytest.raises(RecipeError, match="is trained by `vlm-tune dpo`"):
            train(recipe)


def test_a_lost_start_is_an_error_of_the_resumed_run(tiny_recipe: Callable[..., str]) -> None:
    recipe = recipe_of(tiny_recipe, "{kind: dpo, reference: copy}", evaluate__every=2)
    interrupted(lambda **options: dpo(recipe, **options), at=Evaluation, stage=0, step=2)
    (Path(recipe.output) / "stages/1-main" / START).unlink()
    with pytest.raises(TrainingError, match="weights before this stage"):
        dpo(recipe, resume=True)


def test_stored_references_of_other_rows_are_refused(tiny_recipe: Callable[..., str]) -> None:
    objective = "{kind: dpo, reference: precomputed}"
    changes: dict[str, Any] = {"evaluate__every": 2, "evaluate__limit": 4}
    recipe = recipe_of(tiny_recipe, objective, **changes)
    interrupted(lambda **options: dpo(recipe, **options), at=Evaluation, stage=0, step=2)
    longer = recipe_of(tiny_recipe, objective, **changes | {"evaluate__limit": 8})
    with pytest.raises(TrainingError, match=r"other rows than data and evaluate\.limit give"):
        dpo(longer, resume=True, accept_changes=True)


def test_adapters_that_go_on_under_another_glob_are_not_switched_off(
    tiny_recipe: Callable[..., str],
) -> None:
    later = [
        {"match": "llm.model.*", "how": "lora", "r": 4, "lora_alpha": 8},
        {"match": "*", "how": "frozen"},
    ]
    stages = [{"name": "first"}, {"name": "second", "objective": {"kind": "dpo"}, "tune": later}]
    recipe = recipe_of(tiny_recipe, "{kind: simpo}", stages=stages, train__steps=1)
    with pytest.raises(ModelError, match="an earlier stage trains the adapters"):
        dpo(recipe)
