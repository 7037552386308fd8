"""Loader processes that start from a clean process load what forked ones and none do."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import select
import signal
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import built, parsed
from vlm_tune.data.batch import Batch
from vlm_tune.data.batching import loader
from vlm_tune.data.batching.loader import Position, PreparedFeed
from vlm_tune.data.batching.sampler import Plan, Sizes
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.prepare.run import prepare
from vlm_tune.data.types import Media
from vlm_tune.errors import TrainingError
from vlm_tune.model.feature_cache import tower_features
from vlm_tune.resources import cache_folder

SIGNALS = {signal.SIGINT, signal.SIGTERM}


class Worker:
    """Fetches nothing but the process that fetches: its id, and how it takes SIGINT and SIGTERM."""

    def __call__(self, media: Media) -> torch.Tensor:
        ignored = [int(signal.getsignal(number) == signal.SIG_IGN) for number in SIGNALS]
        # Those of the server too, which this process was forked from.
        ignored.append(int(signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= SIGNALS))
        return torch.tensor([[os.getpid(), os.getppid(), *ignored]], dtype=torch.float64)


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches are equal, bit for bit."""
    for field in fields(Batch):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(ours, torch.Tensor):
            if not torch.equal(ours, theirs):
                return False
        elif field.name != "on_host" and ours != theirs:
            return False
    return True


@pytest.mark.slow
def test_a_clean_process_loads_the_same_batches(tiny_recipe: Callable[..., str]) -> None:
    """Features that are mapped again, pixels that are augmented, and rows that are packed."""
    augment: dict[str, Any] = {"flip": 0.5, "crop": 0.7}
    recipe = parsed(tiny_recipe("causal", precision="bf16"), data__augment=augment)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": True})})
    model = built(recipe)
    prepared = prepare(recipe.data, recipe.data.train, model.processor, seed=0)
    plan = Plan(prepared, recipe.data, Sizes.of(recipe.train), recipe.seed)
    features = tower_features(model, prepared.media)

    def loaded(fetch: Any, *, cached: bool, **how: Any) -> list[Batch]:
        feed = PreparedFeed(
            prepared,
            plan,
            model.processor.spec,
            fetch,
            cached=cached,
            augment=None if cached else recipe.data.augment,
            **how,
        )
        return [batch for window in feed.windows(Position()) for batch in window]

    for fetch, cached in ((features, True), (PixelCache(model.processor.images), False)):
        here = loaded(fetch, cached=cached)
        there = loaded(fetch, cached=cached, workers=1, start="forkserver")
        assert len(here) == len(there) > 0
        assert all(map(same, here, there))
    (batch, *_) = loaded(Worker(), cached=True, workers=1, start="forkserver")
    assert batch.features is not None
    pid, parent, *ignored = batch.features[0, 0].int().tolist()
    assert os.getpid() not in (pid, parent)  # a child of the server, not of this process
    assert ignored == [1, 1, 1]
    assert not SIGNALS & signal.pthread_sigmask(signal.SIG_BLOCK, ())


def _begun(pids: Any) -> None:
    """A worker that waits for a batch to make, once it has noted its id."""
    loader._begin_worker(0)
    pids.send(os.getpid())
    signal.pause()


def _training(pids: Any) -> None:
    """A training process, which waits for its worker."""
    multiprocessing.get_context("fork").Process(target=_begun, args=(pids,)).start()
    signal.pause()


def test_a_worker_ends_with_the_training_process() -> None:
    """Even where that is killed, and the worker is another process's child."""
    fork = multiprocessing.get_context("fork")
    there, here = fork.Pipe(duplex=False)
    training = fork.Process(target=_training, args=(here,))
    training.start()
    worker = there.recv()
    descriptor = os.pidfd_open(worker)
    ended = select.poll()
    ended.register(descriptor, select.POLLIN)
    training.kill()
    training.join()
    try:
        assert ended.poll(30_000)
    finally:
        os.close(descriptor)
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def test_features_that_were_removed_are_named_before_workers_start(
    tiny_recipe: Callable[..., str],
) -> None:
    """Those that are there count as used by each epoch's workers, and are trimmed last."""
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe)
    prepared = prepare(recipe.data, recipe.data.train, model.processor, seed=0)
    features = tower_features(model, prepared.media)
    (path,) = cache_folder("features").glob("*.npy")
    os.utime(path, (1, 1))
    pickle.dumps(features)
    assert path.stat().st_mtime > 1
    path.unlink()
    plan = Plan(prepared, recipe.data, Sizes.of(recipe.train), recipe.seed)
    how: dict[str, Any] = {"cached": True, "workers": 1, "start": "forkserver"}
    feed = PreparedFeed(prepared, plan, model.processor.spec, features, **how)
    with pytest.raises(TrainingError, match=rf"{path}: .* was removed.*--resume"):
        next(feed.windows(Position()))


def test_what_a_worker_gets_holds_no_data(tiny_recipe: Callable[..., str]) -> None:
    """Files are opened again by their names, and decoded pixels are left out."""
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe)
    prepared = prepare(recipe.data, recipe.data.train, model.processor, seed=0)
    features = tower_features(model, prepared.media)
    media = prepared.media[0]
    again = pickle.loads(pickle.dumps(features))
    assert torch.equal(again(media), features(media))
    assert len(pickle.dumps(features)) < 4 * 500 + 1_000 < 4 * features(media).nbytes
    pixels = PixelCache(model.processor.images)
    pixels(media)
    assert len(pickle.dumps(pixels)) < 2_000 < 2 * pixels(media).nbytes
    assert torch.equal(pickle.loads(pickle.dumps(pixels))(media), pixels(media))
    rows = pickle.loads(pickle.dumps(prepared))
    assert [each.id for each in rows.unit(3)] == [each.id for each in prepared.unit(3)]
    assert rows.media_rows == prepared.media_rows


def test_no_more_processes_start_than_there_are_batches(tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe)
    prepared = prepare(recipe.data, recipe.data.train, model.processor, seed=0)
    plan = Plan(prepared, recipe.data, Sizes.of(recipe.train), recipe.seed)
    fetch = PixelCache(model.processor.images)
    feed = PreparedFeed(prepared, plan, model.processor.spec, fetch, workers=400)
    batches = [batch for window in feed.windows(Position()) for batch in window]
    assert feed.loading is not None
    assert 0 < len(feed.loading.pids) == len(batches) < 20
