"""Whether features are cached: the estimate at realistic figures, and what a stage reads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.tiny_models import built, parsed
from vlm_tune.data.prepare.run import prepare
from vlm_tune.model import feature_choice
from vlm_tune.model.feature_choice import Usage, cache_choice, estimate, stage_usage
from vlm_tune.resources import cache_folder
from vlm_tune.train.checkpoint import Progress
from vlm_tune.train.stage_data import decide_features

ROOM = 50e9
BASE_32 = {"image_bytes": 50 * 768 * 2, "tower_flops": 2 * 50 * 87e6}
LARGE_336 = {"image_bytes": 577 * 1024 * 2, "tower_flops": 2 * 577 * 304e6}
"""CLIP's ViT-B/32 of 224 pixels and ViT-L/14 of 336."""


@pytest.mark.parametrize(
    ("tower", "llm", "epochs", "text", "gpu", "cached", "reason"),
    [
        (BASE_32, 135e6, 3, 50, True, True, "3 times"),  # SmolLM2-135M
        (BASE_32, 135e6, 1, 50, True, False, "nothing would be saved"),
        (BASE_32, 135e6, 1, 50, False, True, "no step runs the tower"),
        (LARGE_336, 7e9, 1, 200, True, False, "nothing would be saved"),
        (LARGE_336, 7e9, 3, 200, True, False, "less than 3%"),
        (LARGE_336, 135e6, 3, 200, True, True, "3 times"),
    ],
)
def test_features_are_cached_where_that_pays(
    tower: dict[str, Any],
    llm: float,
    epochs: int,
    text: int,
    gpu: bool,
    cached: bool,
    reason: str,
) -> None:
    """20,000 images, a row each, with LoRA: four FLOPs a weight and token."""
    images = 20_000
    tokens = tower["image_bytes"] // 2 // (768 if tower is BASE_32 else 1024) + text
    usage = Usage(images, epochs * images, epochs * images * tokens)
    choice = estimate(usage, **tower, token_flops=4 * llm, room=ROOM, gpu=gpu)
    assert choice.cached is cached and reason in choice.reason


def test_features_that_do_not_fit_or_take_longer_to_write_are_not_cached() -> None:
    usage = Usage(1_000_000, 5e6, 1e8)
    for gpu in (True, False):
        choice = estimate(usage, **LARGE_336, token_flops=1e6, room=1.2e12, gpu=gpu)
        assert choice.cached
        choice = estimate(usage, **LARGE_336, token_flops=1e6, room=1e11, gpu=gpu)
        assert not choice.cached and "room for 100.00 GB" in choice.reason
    cheap = {"image_bytes": 2_000_000, "tower_flops": 1e9}
    choice = estimate(usage, **cheap, token_flops=1e6, room=1e13, gpu=True)
    assert not choice.cached and "takes longer" in choice.reason


def test_room_is_half_of_the_free_disk_and_features_that_are_there_count_as_free(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a resumed run, whose features took the room, decides as it did at first."""
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe).requires_grad_(False)
    bytes_of = [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=bytes_of[0]))
    usage = Usage(10, 10.0, 100.0)
    tokens, width = model.tower.measure()
    size = 10 * tokens * width * 4
    for free, cached in ((2 * size, True), (2 * size - 2, False)):
        bytes_of[0] = free
        assert cache_choice(recipe, model, usage, gpu=False).cached is cached
    folder = cache_folder("features")
    folder.mkdir(parents=True)
    (folder / "a-b.npy").write_bytes(bytes(size))
    bytes_of[0] = size
    assert cache_choice(recipe, model, usage, gpu=False).cached
    monkeypatch.setenv("VLM_TUNE_CACHE_GB", "0")
    assert not cache_choice(recipe, model, usage, gpu=False).cached


def test_a_recipe_that_says_so_is_followed_and_a_trained_tower_is_never_cached(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_choice, "_room", lambda: 0.0)
    model = built(parsed(tiny_recipe("causal"))).requires_grad_(False)
    usage = Usage(10, 10.0, 100.0)
    for setting in (True, False):
        recipe = parsed(tiny_recipe("causal"), train__cache_features=setting)
        choice = cache_choice(recipe, model, usage, gpu=True)
        assert (choice.cached, choice.reason) == (
            setting,
            f"train.cache_features: {str(setting).lower()}",
        )
    model.tower.requires_grad_(True)
    recipe = parsed(tiny_recipe("causal"), train__cache_features=True)
    assert not cache_choice(recipe, model, usage, gpu=False).cached


def test_what_the_steps_read(tiny_recipe: Callable[..., str]) -> None:
    """Eight rows, each with one of four images."""
    recipe = parsed(tiny_recipe("causal"), train__batch_size=4)
    prepared = prepare(recipe.data, recipe.data.train, built(recipe).processor, seed=0)
    once = float(prepared.unit_lengths[:, 1].sum())
    for changes, ranks, passes in (
        ({"epochs": 3.0, "steps": None}, 1, 3),
        ({"epochs": None, "steps": 6}, 1, 3),
        ({"epochs": None, "steps": 6}, 2, 6),
        ({"epochs": None, "steps": 6, "batch_tokens": round(once)}, 1, 6),
    ):
        train = recipe.train.model_copy(update=changes)
        usage = stage_usage(prepared, train, ranks)
        assert usage.images == 4
        assert usage.views == pytest.approx(8 * passes)
        assert usage.tokens == pytest.approx(once * passes)


def test_a_stage_decides_once_and_not_for_augmented_images(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe).requires_grad_(False)
    train = prepare(recipe.data, recipe.data.train, model.processor, seed=0)
    rows: Any = SimpleNamespace(train=train, validation=[])
    accelerator: Any = SimpleNamespace(device=model.device)
    progress = Progress(ranks=1)
    notes: list[dict[str, Any]] = []

    def decide(stage: Any = recipe) -> bool:
        return decide_features(stage, model, rows, accelerator, progress, notes.append)

    assert decide() and progress.cached is True and len(notes) == 1
    # A disk that is fuller when the run is resumed changes no step.
    monkeypatch.setattr(feature_choice, "_room", lambda: 0.0)
    assert decide() and len(notes) == 1
    progress.cached = None
    assert not decide() and progress.cached is False and len(notes) == 2
    augmented = parsed(tiny_recipe("causal"), data__augment={"flip": 0.5})
    assert not decide(augmented) and len(notes) == 2
    rows.validation = [object()]
    assert decide(augmented)
    # What another recipe says is not remembered when the first one is resumed.
    assert not decide() and len(notes) == 2
    progress.cached = None
    model.tower.requires_grad_(True)
    assert not decide()
    model.tower.requires_grad_(False)
    assert not decide(parsed(tiny_recipe("causal"), train__cache_features=False))
    monkeypatch.undo()
    assert decide() and len(notes) == 3
