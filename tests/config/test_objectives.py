"""Objectives of preferences: settings that contradict each other, and their commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.tiny_models import parsed, with_tune
from vlm_tune.config.load import check_command, dump_recipe, parse_recipe
from vlm_tune.config.objectives import parts_of
from vlm_tune.errors import RecipeError

LORA = """
tune:
  - {match: "tower.*", how: frozen}
  - {match: "connector.*", how: frozen}
  - {match: "llm.*", how: lora, r: 4}
train:"""
FROZEN = {"match": "*", "how": "frozen"}
WITH_CONNECTOR = LORA.replace('"connector.*", how: frozen', '"connector.*", how: full')
DORA = LORA.replace("r: 4", "r: 4, variant: dora")


def recipe(make: Callable[..., str], objective: Any, tune: str = LORA, **changes: Any) -> Any:
    kind = changes.pop("kind", "causal")
    return parsed(with_tune(make(kind), tune), objective=objective, **changes)


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, {}, "differ in length"),
        ({"loss_type": "sft"}, {}, "sft alone has no preferences"),
        ({"loss_type": "exo_pair"}, {}, "exo_pair needs label_smoothing"),
        ({"label_smoothing": 0.1}, {}, "label_smoothing needs loss_type"),
        ({}, {"tune": WITH_CONNECTOR}, "adapter_off gives the model before training only where"),
        ({}, {"tune": DORA}, "variant: dora for llm"),
        ({}, {"kind": "seq2seq", "data__packing": True}, "so preferences can't be packed"),
        (
            {"reference": "copy"},
            {"engine": {"kind": "fsdp"}},
            "the engine shards the weights",
        ),
        (
            {"reference": "precomputed"},
            {"data__augment": {"flip": 0.5}},
            "precomputed needs unchanged images",
        ),
        (
            {"kind": "kto"},
            {"data__streaming": True, "data__validation": []},
            "compares answers with those of other rows",
        ),
        (
            {},
            {"model__connector": {"kind": "fusion", "how": "gate"}},
            "reads an image once per answer",
        ),
    ],
)
def test_settings_that_contradict_each_other(
    tiny_recipe: Callable[..., str],
    objective: dict[str, Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tiny_recipe, {"kind": "dpo"} | objective, **changes)


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ({"reward_weights": [1.0, 2.0]}, {}, "reward_funcs and reward_weights differ in length"),
        ({}, {"data__packing": True}, "packed rows have several"),
        ({}, {"data__streaming": True, "data__validation": []}, "samples completions of prepared"),
        ({}, {"data__augment": {"flip": 0.5}}, "samples completions of unchanged images"),
        ({}, {"data__overlong": "trim"}, "samples the last answer of a whole row"),
        ({}, {"engine": {"kind": "fsdp"}}, "samples completions with whole ones"),
        ({}, {"engine": {"kind": "deepspeed", "stage": 3}}, "samples completions with whole ones"),
        ({"beta": 0.1}, {"tune": WITH_CONNECTOR}, "adapter_off gives the model before training"),
        (
            {},
            {"model__connector": {"kind": "fusion", "how": "gate"}},
            "reads an image once per answer",
        ),
    ],
)
def test_settings_that_samples_are_not_for(
    tiny_recipe: Callable[..., str],
    objective: dict[str, Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tiny_recipe, {"kind": "grpo"} | objective, **changes)


MATCH = {"kind": "matching"}
LANGUAGE = {"kind": "language_modeling"}
CAPTIONS = {"kind": "contrastive"}


@pytest.mark.parametrize(
    ("objectives", "changes", "message"),
    [
        ([LANGUAGE, {"kind": "dpo"}], {}, "dpo adds losses by its own settings"),
        ([{"kind": "kto"}], {}, "a stage of its own, without a list"),
        ([LANGUAGE, {"kind": "grpo"}], {}, "grpo trains on answers that it samples"),
        ([LANGUAGE, {"kind": "span_corruption"}], {"kind": "seq2seq"}, "masks all rows of a stage"),
        ([LANGUAGE, LANGUAGE], {}, "objective.1.kind|language_modeling is in the list twice"),
        ([CAPTIONS, MATCH], {}, "train them in stages one after the other"),
        ([LANGUAGE, MATCH], {}, "each source names the objective that it trains"),
        ([LANGUAGE, CAPTIONS], {}, "a contrastive objective compares images"),
        ([LANGUAGE], {"data__train.0.objective": "language_modeling"}, "all rows train all"),
        (LANGUAGE, {"data__train.0.objective": "language_modeling"}, "has one objective"),
        (LANGUAGE | {"weight": 2.0}, {}, "weight is for an objective in a list"),
        ([LANGUAGE | {"weight": 0}], {}, "objective.0.weight: .*greater than 0"),
        ([{"kind": "contrast"}], {}, "did you mean contrastive"),
        ([], {}, "objective: expected 1 or more entries"),
        ([{"kind": "language_modeling", "temperature": 1}], {}, "unknown key 'temperature'"),
    ],
)
def test_objectives_that_a_list_does_not_take(
    tiny_recipe: Callable[..., str], objectives: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tiny_recipe, objectives, **changes)


def test_a_list_of_objectives_is_written_and_read_as_a_list(
    tiny_recipe: Callable[..., str],
) -> None:
    mixed = recipe(tiny_recipe, [LANGUAGE, CAPTIONS | {"weight": 0.1}], data__group="image")
    again = parse_recipe(dump_recipe(mixed))
    assert again.objective == mixed.objective and again == mixed
    assert [part.kind for part in parts_of(again.objective)] == ["language_modeling", "contrastive"]
    check_command(again, "sft")


def test_rewards_without_a_divergence_need_no_reference(tiny_recipe: Callable[..., str]) -> None:
    sampled = recipe(tiny_recipe, {"kind": "grpo"}, WITH_CONNECTOR)
    assert sampled.objective.reference_model is None
    compared = recipe(tiny_recipe, {"kind": "grpo", "beta": 0.1, "reference": "copy"}, DORA)
    assert compared.objective.reference_model == "copy"


@pytest.mark.parametrize("reference", ["copy", "precomputed"])
def test_other_references_go_with_any_tuning(
    tiny_recipe: Callable[..., str], reference: str
) -> None:
    for tune in (WITH_CONNECTOR, DORA):
        recipe(tiny_recipe, {"kind": "dpo", "reference": reference}, tune)


def test_adapters_of_an_earlier_stage_are_not_switched_off(
    tiny_recipe: Callable[..., str],
) -> None:
    stages: Any = [{"name": "sft"}, {"name": "dpo", "objective": {"kind": "dpo"}}]
    with pytest.raises(RecipeError, match="an earlier stage trains the adapters"):
        parsed(with_tune(tiny_recipe("causal"), LORA), stages=stages)
    # The same adapters, with their defaults written out.
    stages[1]["tune"] = [
        {"match": "llm.*", "how": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        FROZEN,
    ]
    with pytest.raises(RecipeError, match="an earlier stage trains the adapters"):
        parsed(with_tune(tiny_recipe("causal"), LORA), stages=stages)
    # A stage between them that trains others has these merged.
    merged = [stages[0], {"name": "r8", "tune": [{**stages[1]["tune"][0], "r": 8}, FROZEN]}]
    parsed(with_tune(tiny_recipe("causal"), LORA), stages=[*merged, stages[1]])
    stages[1]["objective"]["reference"] = "copy"
    staged = parsed(with_tune(tiny_recipe("causal"), LORA), stages=stages)
    check_command(staged, "dpo")


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("language_modeling", "sft"),
        ("simpo", "dpo"),
        ("orpo", "dpo"),
        ("kto", "kto"),
        ("grpo", "grpo"),
    ],
)
def test_each_objective_has_its_command(
    tiny_recipe: Callable[..., str], kind: str, command: str
) -> None:
    of_kind = recipe(tiny_recipe, {"kind": kind})
    check_command(of_kind, command)
    for other in {"sft", "dpo", "kto", "grpo"} - {command}:
        with pytest.raises(RecipeError, match=f"is trained by `vlm-tune {command}`"):
            check_command(of_kind, other)


def test_a_stages_own_objective_is_pointed_at(tiny_recipe: Callable[..., str]) -> None:
    text = with_tune(tiny_recipe("causal"), LORA).rstrip()
    text += "\nstages:\n  - {name: sft}\n  - name: dpo\n    objective: {kind: simpo}\n"
    with pytest.raises(RecipeError, match=rf"recipe:{len(text.splitlines())}:5: objective\.kind"):
        check_command(parsed(text), "sft")
