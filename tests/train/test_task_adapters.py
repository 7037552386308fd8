"""Adapters of tasks: each learns from its own rows, and is a model of its own afterwards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.task_recipes import LAYERED, SOFT, task_sources, with_sharing
from tests.helpers.tiny_models import (
    assert_close,
    assert_same_bits,
    batch_of,
    built,
    cli,
    interrupted,
    loss_and_gradients,
    one_step,
    parsed,
    rows_of,
    save_llm,
    tensors_of,
    tuned_by,
    with_llm,
)
from tests.helpers.tiny_recipes import tiny_text, write_color_rows
from vlm_tune import VisionLanguageModel, check, evaluate, export, merge, plan, sft
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import DataError, ModelError, RecipeError
from vlm_tune.model.checkpoint import find_single, load_model
from vlm_tune.model.lora import adapter_name, is_adapter
from vlm_tune.model.task_adapters import activate
from vlm_tune.serving.run import _named_folders


def spread(model: VisionLanguageModel) -> None:
    """Gives every adapter other values, as training does."""
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def short(name: str) -> str:
    """A parameter's name without that of its adapter."""
    return name.replace(f".{adapter_name(name)}.", ".")


@pytest.mark.parametrize(("kind", "sharing"), [("causal", SOFT), ("seq2seq", LAYERED)])
def test_each_task_has_the_gradient_of_its_rows_and_of_its_tie(
    kind: str, sharing: str, color_rows: Path, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "data__train": task_sources(color_rows),
        "data__validation": [],
        "train__steps": 1,
        "train__max_grad_norm": None,
        "train__log_every": 1,
    }
    text = with_sharing(tiny_recipe(kind), sharing)
    steps = [
        one_step(
            parsed(
                text,
                **settings,
                train__batch_size=size,
                train__gradient_accumulation=accumulation,
            ),
            tmp_path / str(size),
            prepare_model=spread,
        )
        for size, accumulation in ((8, 1), (2, 4))
    ]
    recipe = parsed(text, **settings)
    model = built(recipe)
    tuned_by(model, recipe)
    spread(model)
    rows = rows_of(recipe)
    total = 0
    losses = 0.0
    wanted: dict[str, torch.Tensor] = {}
    for task, of_task in (("color", rows[:4]), ("other", rows[4:])):
        activate(model, task)
        batch = batch_of(model, [e for row in of_task for e in model.processor.examples(row)])
        loss, gradients = loss_and_gradients(model, [batch])
        # Nothing of the task reaches the adapters of the other one.
        assert {adapter_name(name) for name in gradients if is_adapter(name)} <= {task, "default"}
        total += batch.supervised
        losses += float(loss)
        for name, value in gradients.items():
            wanted[name] = wanted.get(name, torch.zeros(())) + value
    values = {name: p.detach() for name, p in model.named_parameters() if is_adapter(name)}
    for name in wanted:
        wanted[name] = wanted[name] / total
        if sharing == SOFT and is_adapter(name):
            alike = [value for other, value in values.items() if short(other) == short(name)]
            assert len(alike) == 2
            wanted[name] = wanted[name] + 0.5 * (values[name] - torch.stack(alike).mean(0))
    owners = {adapter_name(name) for name in wanted if is_adapter(name)}
    assert owners == {"color", "other"} | ({"default"} if sharing == LAYERED else set())
    for logged, gradients in steps:
        assert logged == pytest.approx(losses / total, rel=1e-5)
        assert_close(wanted, gradients)


def test_tasks_begin_alike_and_a_layer_has_either_one_adapter_or_one_for_each(
    color_rows: Path, tiny_recipe: Callable[..., str]
) -> None:
    sources: dict[str, Any] = {"data__train": task_sources(color_rows), "data__validation": []}
    recipe = parsed(with_sharing(tiny_recipe("causal"), LAYERED), **sources)
    model = built(recipe)
    tuned = tuned_by(model, recipe)
    adapters = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    owners: dict[str, set[str]] = {}
    for name in adapters:
        layer = name.partition(".lora_")[0]
        owners.setdefault(layer, set()).add(adapter_name(name))
        assert torch.equal(
            adapters[name],
            next(value for other, value in adapters.items() if short(other) == short(name)),
        )
    assert {layer: ".layers.0." in layer for layer in owners} == {
        layer: names == {"default"} for layer, names in owners.items()
    }
    assert all(names in ({"default"}, {"color", "other"}) for names in owners.values())
    assert "one for each task above 1 layers" in tuned.table[-1].detail
    both = parsed(
        with_sharing(tiny_recipe("causal"), "sharing: layered, shared_layers: 2"), **sources
    )
    with pytest.raises(ModelError, match="leaves the tasks none of their own"):
        tuned_by(built(both), both)
    # Both can't be merged into one base for a stage that shares in another way.
    with pytest.raises(ModelError, match="the same LoRA rule and tasks"):
        tuned_by(model, parsed(with_sharing(tiny_recipe("causal"), "sharing: hard")))


# --- a run ----------------------------------------------------------------------------------------


def run_recipe(folder: Path, name: str, sharing: str, base: Path, **changes: Any) -> Recipe:
    """A run over a saved decoder, whose tasks differ soon."""
    rows = folder / "messages.jsonl"
    sources = task_sources(rows)
    text = with_llm(tiny_text("causal", rows, folder / name), base, "causal")
    settings: dict[str, Any] = {
        "data__train": sources,
        "data__validation": sources,
        "data__test": sources,
        "train__learning_rate": 0.02,
        "train__steps": 6,
        "train__batch_size": 3,
        "train__log_every": 1,
        "evaluate__samples": 0,
        "evaluate__baselines": [],
    }
    return parsed(with_sharing(text, sharing), **{**settings, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows and a saved decoder in `base`."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = write_color_rows(folder)
    save_llm(folder / "base", "causal", rows_of(parsed(tiny_text("causal", rows, folder / "rows"))))
    return folder


@pytest.fixture(scope="module")
def run(base: Path) -> Path:
    """A run of two tasks that share the first layer."""
    return sft(run_recipe(base, "run", LAYERED, base / "base")).folder


def answered(model: VisionLanguageModel) -> list[float]:
    """The probabilities of two answers, by which models are told apart."""
    answer = model.answer("what color is it?", choices=["red", "no"])
    assert answer.probabilities
    return list(answer.probabilities.values())


def test_a_run_is_scored_by_task_and_each_task_is_a_model_of_its_own(run: Path) -> None:
    scores = evaluate(run)
    assert {name: entry["n"] for name, entry in scores.by_source.items()} == {
        "color": 4,
        "other": 4,
    }
    folders = {task: find_single(run, task) for task in ("color", "other")}
    models = {task: VisionLanguageModel.from_pretrained(run, task=task) for task in folders}
    assert answered(models["color"]) != answered(models["other"])
    together = load_model(run, model_class=VisionLanguageModel)
    for task, model in models.items():
        activate(together, task)
        assert answered(together) == pytest.approx(answered(model), abs=1e-4)
        by_name = models["color"].load_adapter(folders[task], task)
        assert answered(by_name) == pytest.approx(answered(model), abs=1e-4)
        # Of a task's rows alone, its model gives the run's answers.
        alone = evaluate(folders[task])
        mine = {each.id: each.generated for each in scores.answers if each.source == task}
        assert mine == {e.id: e.generated for e in alone.answers if e.source == task}
    first, second = (tensors_of(folder / "adapter") for folder in folders.values())
    differing = {
        name.split(".layers.")[1][0] for name in first if (first[name] != second[name]).any()
    }
    assert differing == {"1"} and first.keys() == second.keys()


def test_tasks_are_merged_exported_and_served_by_name(run: Path, tmp_path: Path) -> None:
    report = merge(run, tmp_path / "merged", dtype="fp32", task="other")
    assert report.parts == ["llm"]
    merged = VisionLanguageModel.from_pretrained(tmp_path / "merged")
    theirs = VisionLanguageModel.from_pretrained(run, task="other")
    assert answered(merged) == pytest.approx(answered(theirs), abs=1e-4)
    exported = export(run, tmp_path / "adapter", format="adapter", task="color")
    assert exported.difference is not None and exported.rows  # opened by plain PEFT
    folders = {task: find_single(run, task) for task in ("color", "other")}
    assert _named_folders(run, None, {}) == folders
    assert list(_named_folders(run, None, {"more": tmp_path / "merged"})) == [*folders, "more"]
    with pytest.raises(RecipeError, match="served by their own names: color, other"):
        _named_folders(run, "mine", {})


def test_commands_take_a_task_by_name_and_check_and_plan_take_the_recipe(
    run: Path, base: Path, tmp_path: Path
) -> None:
    choices = ("--prompt", "what color is it?", "--choices", "red,no")
    answer = VisionLanguageModel.from_pretrained(run, task="color").chat(
        "what color is it?", choices=["red", "no"]
    )
    assert cli("chat", str(run), "--task", "color", *choices).splitlines()[0] == answer
    for command in ("merge", "export"):
        arguments = (str(run), "--task", "shape", "--output", str(tmp_path / "x"), "--json")
        assert "has no task 'shape'" in cli(command, *arguments, code=4)
    settings: dict[str, Any] = {"data__validation": [], "data__test": []}
    recipe = run_recipe(base, "checked", LAYERED, base / "base", **settings)
    report = check(recipe)
    assert not report.errors and report.parts[0].steps == 6
    planned = plan(recipe)
    (row,) = [row for row in planned.stages[0].tuning if row.how == "lora"]
    trained = sum(
        value.numel()
        for name, value in tensors_of(find_single(run, "color") / "adapter").items()
        for _ in range(1 if ".layers.0." in name else 2)
    )
    assert row.trained == trained


def test_a_task_has_to_be_named_and_rows_have_to_be_of_one(
    run: Path, base: Path, tmp_path: Path
) -> None:
    for call in (
        partial(VisionLanguageModel.from_pretrained, run),
        partial(merge, run, tmp_path / "merged"),
        partial(export, run, tmp_path / "exported"),
    ):
        with pytest.raises(ModelError, match=r"for each task \(color, other\): name one"):
            call()
    with pytest.raises(ModelError, match="has no task 'shape'; it has color, other"):
        find_single(run, "shape")
    with pytest.raises(ModelError, match="leave out the task"):
        find_single(find_single(run, "color"), "color")
    with pytest.raises(DataError, match="not one of the model's tasks: color, other"):
        evaluate(run, data=base / "messages.jsonl")


@pytest.mark.slow
def test_a_run_of_tasks_resumes_bit_for_bit(base: Path) -> None:
    settings: dict[str, Any] = {
        "train__gradient_accumulation": 2,
        "data__mixture": {"temperature": 3},
    }
    sft(run_recipe(base, "whole", SOFT, base / "base", **settings))
    recipe = run_recipe(base, "parts", SOFT, base / "base", **settings)
    interrupted(partial(sft, recipe), stage=0, step=4)
    sft(recipe, resume=True)
    assert_same_bits(base / "whole" / "model", base / "parts" / "model")
