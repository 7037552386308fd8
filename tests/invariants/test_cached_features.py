"""Features from the cache train as features computed at every step do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.helpers.tiny_models import (
    assert_close,
    assert_same_outputs,
    built,
    one_step,
    parsed,
    rows_of,
    tensors_of,
    with_tower,
)
from vlm_tune.api import evaluate, sft
from vlm_tune.model.feature_cache import tower_features
from vlm_tune.resources import cache_folder, trim_cache


def media_of(recipe: Any) -> list[Any]:
    return list(dict.fromkeys(item for row in rows_of(recipe) for item in row.media))


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_a_step_is_the_same(kind: str, tiny_recipe: Callable[..., str], tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "train__steps": 1,
        "train__log_every": 1,
        "train__max_grad_norm": None,
    }
    recipe = parsed(tiny_recipe(kind), **changes)
    loss, gradients = one_step(recipe, tmp_path / "plain")
    cached_loss, cached_gradients = one_step(recipe, tmp_path / "cached", cached=True)
    assert cached_loss == pytest.approx(loss, rel=1e-6)
    assert_close(cached_gradients, gradients)


def test_a_run_is_the_same(tiny_recipe: Callable[..., str]) -> None:
    runs = [
        sft(
            parsed(
                tiny_recipe("causal", output=f"run{on}"),
                train__cache_features=on,
                evaluate__samples=0,
            )
        )
        for on in (True, False)
    ]
    cached, plain = (tensors_of(run.folder / "model") for run in runs)
    assert list(cache_folder("features").glob("*.npy"))
    assert_close(cached, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_read_back_is_what_was_computed(
    dtype: torch.dtype, tiny_recipe: Callable[..., str]
) -> None:
    recipe = parsed(tiny_recipe("seq2seq"))
    model = built(recipe)
    model.tower.to(dtype)
    model.tower.eval()
    media = media_of(recipe)
    first = tower_features(model, media)
    again = tower_features(model, list(reversed(media)))
    with torch.no_grad():
        pixels = torch.stack(
            [model.processor.images(item) for item in sorted(media, key=lambda item: item.name)]
        )
        expected = dict(
            zip(sorted(media, key=lambda item: item.name), model.tower(pixels), strict=True)
        )
    for item in media:
        assert first(item).dtype == dtype
        assert_same_outputs(first(item), again(item))
        assert torch.allclose(
            first(item), expected[item], atol=1e-6 if dtype == torch.float32 else 2e-2
        )
    assert len({float(first(item).float().sum()) for item in media}) == 4
    assert len(list(cache_folder("features").glob("*.npy"))) == 1


def test_other_weights_images_or_grids_have_their_own_cache(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    recipe = parsed(tiny_recipe("seq2seq"))
    model = built(recipe)
    media = media_of(recipe)
    before = tower_features(model, media)(media[0]).clone()
    Image.new("RGB", (32, 32), (1, 2, 3)).save(str(media[0].source))
    changed = tower_features(model, media)(media[0]).clone()
    assert not torch.equal(before, changed)
    next(model.tower.parameters()).data.mul_(1.5)
    assert not torch.equal(changed, tower_features(model, media)(media[0]))
    pooled = built(parsed(tiny_recipe("seq2seq"), model__tower__grid=1))
    assert tower_features(pooled, media)(media[0]).shape == (1, 64)


def test_other_feature_maps_of_one_backbone_have_their_own_cache(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """The same weights, and only the choice of feature maps differs."""
    features = []
    for stages in ([0, 2], [1, 2]):
        text = with_tower(
            tiny_recipe("seq2seq"),
            f"{{kind: timm, name: resnet18, image_size: 32, grid: 2, stages: "
            f"{json.dumps(stages)}}}",
        )
        recipe = parsed(text)
        model = built(recipe)
        media = media_of(recipe)
        model.tower.eval()
        with torch.no_grad():
            expected = model.tower(model.processor.images(media[0])[None])[0]
        assert torch.allclose(tower_features(model, media)(media[0]), expected, atol=1e-5)
        features.append(expected)
    assert features[0].shape == features[1].shape


@pytest.mark.slow
def test_a_tower_that_trained_in_bf16_is_scored_on_the_test_part(
    tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    text = tiny_recipe("seq2seq", precision="bf16").replace(
        '"tower.*", how: frozen', '"tower.*", how: full'
    )
    run = sft(parsed(text, data__test=[{"kind": "file", "path": str(color_rows)}]))
    assert run.result["n"] == 8


@pytest.mark.slow
def test_scores_follow_the_decision_and_eval_finds_the_runs_features(
    tiny_recipe: Callable[..., str], color_rows: Path, tmp_path: Path
) -> None:
    """In bf16, where a run's features are those under autocast; and for a model without a run."""

    def files() -> set[Path]:
        return set(cache_folder("features").glob("*"))

    def trained(output: str, setting: Any) -> Path:
        test = [{"kind": "file", "path": str(color_rows)}]
        text = tiny_recipe("causal", output=output, precision="bf16")
        changes: dict[str, Any] = {"train__steps": 1, "evaluate__samples": 0}
        return sft(parsed(text, data__test=test, train__cache_features=setting, **changes)).folder

    run = trained("off", False)
    evaluate(run)
    assert not files()
    run = trained("auto", "auto")
    computed = files()
    assert computed
    scores = evaluate(run)
    assert files() == computed
    assert scores.n == 8
    for path in computed:
        path.unlink()
    # A disk that was full when the run decided.
    done = run / "stages" / "1-main" / "done.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"cached": False}))
    assert evaluate(run).summary() == scores.summary()
    assert not files()
    done.unlink()
    assert evaluate(run).summary() == scores.summary()
    assert files() == computed


def test_the_cache_stays_within_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate(
        ("new.npy", "new.json", "older.npy", "oldest.npy", "oldest.tmp-7.npy")
    ):
        (tmp_path / name).write_bytes(bytes(1_000))
        os.utime(tmp_path / name, (1_000_000 - age, 1_000_000 - age))
    monkeypatch.setenv("VLM_TUNE_CACHE_GB", str(3_500 / 1e9))
    assert [path.name for path in trim_cache(tmp_path, tmp_path / "new.npy")] == ["oldest.npy"]
    monkeypatch.setenv("VLM_TUNE_CACHE_GB", "0")
    trim_cache(tmp_path, tmp_path / "new.npy")
    assert {path.name for path in tmp_path.iterdir()} == {"new.npy", "new.json", "oldest.tmp-7.npy"}
