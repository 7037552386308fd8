"""Settings that a native model does not take are refused, each with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.native_models import save_native, with_native
from tests.helpers.tiny_models import parsed
from tests.helpers.tiny_recipes import tiny_text
from vlm_tune.config.engine import AutoEngine
from vlm_tune.errors import RecipeError
from vlm_tune.model.pretrained import native
from vlm_tune.model.pretrained.vlm_checkpoints import model_section
from vlm_tune.train.engines.registry import engine_of


def refused(text: str, **changes: object) -> str:
    with pytest.raises(RecipeError) as caught:
        parsed(text, **changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "place", "reason"),
    [
        ({"data__augment": {"flip": 0.5}}, "data.augment", "augments none"),
        ({"train__cache_features": True}, "train.cache_features", "no features of a cache"),
        ({"objective": {"kind": "contrastive"}}, "objective.kind", "needs image features"),
        ({"objective": {"kind": "matching"}}, "objective.kind", "needs image features"),
        ({"objective": {"kind": "span_corruption"}}, "objective", "needs an encoder-decoder"),
        (
            {"objective": [{"kind": "language_modeling"}, {"kind": "contrastive"}]},
            "objective",
            "needs image features",
        ),
        ({"objective": {"kind": "dpo"}, "tune__1__variant": "dora"}, "reference", "not DoRA"),
        ({"objective": {"kind": "grpo"}, "data__packing": True}, "data.packing", "samples"),
        ({"objective__image_noise": 0.1}, "objective.image_noise", "no noise"),
        ({"model__min_pixels": 9, "model__max_pixels": 8}, "model.max_pixels", "under min_pixels"),
        (
            {"model__video_min_pixels": 9, "model__video_max_pixels": 8},
            "model.video_max_pixels",
            "under video_min_pixels",
        ),
        ({"tune__1__how": "last_layers", "tune__1__layers": 1}, "tune.1.how", "not for a native"),
        ({"tune__1__layer_decay": 0.9}, "tune.1.layer_decay", "not for a native model"),
    ],
)
def test_each_is_refused(changes: dict[str, object], place: str, reason: str) -> None:
    text = with_native(tiny_text("causal", Path("rows.jsonl"), Path("run")), "vlm")
    message = refused(text, **changes)
    assert place in message and reason in message


def test_the_checkpoints_own_template_is_a_native_models() -> None:
    text = tiny_text("causal", Path("rows.jsonl"), Path("run"))
    assert "template: own needs model.kind: native" in refused(text, data__template="own")


@pytest.mark.parametrize("kind", ["dpo", "kto", "simpo", "orpo", "grpo"])
def test_preferences_and_rewards_are_taken(kind: str) -> None:
    text = with_native(tiny_text("causal", Path("rows.jsonl"), Path("run")), "vlm")
    rules = [{"match": "llm.*", "how": "lora"}, {"match": "*", "how": "frozen"}]
    objective = {"kind": kind} | ({"beta": 0.1} if kind == "grpo" else {})
    recipe = parsed(text, objective=objective, tune=rules)
    assert recipe.objective.kind == kind


@pytest.mark.parametrize("engine", [{"kind": "fsdp"}, {"kind": "deepspeed", "stage": 3}])
def test_a_model_that_runs_modules_by_image_is_not_sharded(
    engine: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the recipe's engine nor by that of an accelerate config."""
    monkeypatch.setattr(native, "SHARDED_TYPES", ("qwen3_vl",))
    text = tiny_text("causal", Path("rows.jsonl"), Path("run"))
    for kind in ("lfm2_vl", "qwen3_vl"):
        save_native(tmp_path / kind, kind)
    sharded, whole, other = (
        parsed(with_native(text, tmp_path / kind), engine=chosen)
        for kind, chosen in (
            ("lfm2_vl", engine),
            ("lfm2_vl", {"kind": "deepspeed", "stage": 2}),
            ("qwen3_vl", engine),
        )
    )
    for call in (model_section, engine_of):
        with pytest.raises(RecipeError, match="the weights of a lfm2_vl are not sharded"):
            call(sharded)
        call(whole)
        call(other)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    automatic = sharded.model_copy(update={"engine": AutoEngine()})
    with pytest.raises(RecipeError, match="are not sharded: ranks gather them together"):
        engine_of(automatic)
