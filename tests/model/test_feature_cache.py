"""The cache of features, shared by processes, killed in the middle, and in the steps' precision."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import built, parsed, rows_of
from vlm_tune.data.types import Media, distinct_media
from vlm_tune.errors import RecipeError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model import feature_cache
from vlm_tune.model.feature_cache import tower_features
from vlm_tune.model.tower_pass import run_tower
from vlm_tune.resources import cache_folder


@pytest.fixture
def sample(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> tuple[VisionLanguageModel, list[Media]]:
    """A tiny model and four images, cached two a file."""
    monkeypatch.setattr(feature_cache, "PART", 2)
    monkeypatch.setattr(feature_cache, "PATIENCE", 0.01)
    recipe = parsed(tiny_recipe("causal"))
    media = distinct_media(rows_of(recipe))
    assert len(media) == 4
    return built(recipe), media


def expected(
    model: VisionLanguageModel, media: list[Media], autocast: torch.dtype = torch.float32
) -> torch.Tensor:
    """The tower's features in a step."""
    model.tower.eval()
    pixels = torch.stack([model.processor.images(item) for item in media])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast == torch.bfloat16):
        return model.tower(pixels).detach()


def names() -> list[str]:
    """The kinds of files in the cache."""
    return sorted(path.suffix for path in cache_folder("features").iterdir())


def test_two_runs_at_once_share_the_work(sample: tuple[VisionLanguageModel, list[Media]]) -> None:
    """One is held in its first file; the other computes the rest, and waits for that one."""
    model, media = sample
    begun, waited = threading.Event(), threading.Event()
    stores: list[Any] = []
    calls: list[list[int]] = [[], []]

    def first(done: int, of: int) -> None:
        calls[0].append(done)
        begun.set()
        assert waited.wait(60)

    def second(done: int, of: int) -> None:
        calls[1].append(done)
        if len(calls[1]) == 2:  # its own file is done, and only the other's is left
            waited.set()

    thread = threading.Thread(target=lambda: stores.append(tower_features(model, media, first)))
    thread.start()
    assert begun.wait(60)
    stores.append(tower_features(model, media, second))
    thread.join()
    # Images of the first run's file, then of the other's; the second run looks again while it
    # waits, and computes nothing twice.
    assert calls[0] == [2, 4]
    assert calls[1][0] == 2 and set(calls[1][1:-1]) == {2} and calls[1][-1] == 4
    for store in stores:
        assert torch.allclose(torch.stack([*map(store, media)]), expected(model, media), atol=1e-6)
    assert names() == [".npy", ".npy"]


def test_a_killed_process_leaves_nothing_half_used(
    sample: tuple[VisionLanguageModel, list[Media]],
) -> None:
    model, media = sample

    def kill(done: int, of: int) -> None:
        if done == 4:  # the second file is computed and not yet there
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        tower_features(model, media, kill)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert names() == [".lock", ".npy", ".npy"]
    assert len(list(cache_folder("features").glob("*.tmp-*"))) == 1
    computed: list[int] = []
    store = tower_features(model, media, lambda done, of: computed.append(done))
    assert computed == [4]  # the first file was whole
    assert torch.allclose(torch.stack([*map(store, media)]), expected(model, media), atol=1e-6)
    assert names() == [".npy", ".npy"]
    assert not list(cache_folder("features").glob("*.tmp-*"))


def test_without_locks_each_process_computes_for_itself(
    sample: tuple[VisionLanguageModel, list[Media]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems have none; a file that another process writes there stays."""
    model, media = sample

    def refused(self: Any) -> None:
        raise NotImplementedError("no flock")

    monkeypatch.setattr(feature_cache.FileLock, "acquire", refused)
    folder = cache_folder("features")
    folder.mkdir(parents=True)
    tower_features(model, media)
    (path, _) = sorted(folder.glob("*.npy"))
    other = folder / f"{path.name.partition('-')[0]}.tmp-elsewhere-1.npy"
    path.rename(other)
    store = tower_features(model, media)
    assert torch.allclose(torch.stack([*map(store, media)]), expected(model, media), atol=1e-6)
    assert other.exists() and path.exists()


def test_features_have_the_precision_of_the_steps(
    sample: tuple[VisionLanguageModel, list[Media]],
) -> None:
    """A tower in fp32, as before a stage that trains it, under bf16's autocast."""
    model, media = sample
    exact = tower_features(model, media)
    rounded = tower_features(model, media, autocast=torch.bfloat16)
    assert len(names()) == 4  # each has files of its own
    steps = expected(model, media, torch.bfloat16)
    assert rounded(media[0]).dtype == torch.bfloat16 and exact(media[0]).dtype == torch.float32
    assert torch.equal(torch.stack([*map(rounded, media)]), steps.bfloat16())
    assert not torch.equal(torch.stack([*map(exact, media)]), steps)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the caller's own does not count
        assert (
            run_tower(model.tower, torch.zeros(1, 3, 32, 32), torch.float32).dtype
            == exact(media[0]).dtype
        )


def test_names_of_files_say_device_and_precision(
    sample: tuple[VisionLanguageModel, list[Media]],
) -> None:
    model, _ = sample
    keys = {feature_cache._key(model, dtype) for dtype in (torch.float32, torch.bfloat16)}
    assert len(keys) == 2 and all(":cpu:" in key for key in keys)
    assert any(key.endswith("bfloat16") for key in keys)


def test_a_folder_in_place_of_features_is_an_error_that_names_it(
    sample: tuple[VisionLanguageModel, list[Media]],
) -> None:
    model, media = sample
    tower_features(model, media)
    file = next(cache_folder("features").glob("*.npy"))
    file.unlink()
    file.mkdir()
    with pytest.raises(RecipeError, match=r"can't be read: is a directory; remove") as error:
        tower_features(model, media)
    assert error.value.problems[0].where == str(file)
