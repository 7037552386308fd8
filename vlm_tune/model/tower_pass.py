"""Runs a tower over many images, with decoding and copies to and from the device beside it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from vlm_tune.data.images.patches import patch_places, stacked
from vlm_tune.data.media_processor import MediaProcessor
from vlm_tune.data.types import Media
from vlm_tune.model.media_tower import MediaTower
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.resources import rank_cores

CPU_BATCH = 64
"""Images of a batch on a CPU."""
SHAPED_BATCH = 8
"""Images of a batch whose shapes differ: all are padded to the largest."""
GPU_PIXELS = 256 * 224**2
"""Pixels of a batch on a GPU: 256 images of 224 x 224, 113 of 336 x 336."""
AHEAD = 2
"""Batches whose images are decoded while the tower runs on another."""
MOST_THREADS = 16


def tower_batches(
    model: VisionLanguageNetwork, media: Sequence[Media], autocast: torch.dtype
) -> Iterator[torch.Tensor]:
    """Yields the features [B, N, D] of consecutive images, on the CPU in `stored_dtype`.

    Those of images that keep their shape are padded to the longest of the batch.

    Threads decode the batches ahead. On a GPU pixels come from pinned memory, and a batch's
    features are copied back while the next one is computed.

    Args:
        model: the model whose tower, in its present mode, and preprocessing are used.
        media: images and tiles.
        autocast: the dtype of the run's autocast; float32 for none.

    Raises:
        DataError: an image can't be decoded.
    """
    device = model.device
    dtype = stored_dtype(model.tower, autocast)
    size = batch_size(model.processor.images.shape, device)
    if model.tower.keeps_shape:
        size = min(size, SHAPED_BATCH)
    starts = deque(range(0, len(media), size))
    decoding: deque[tuple[torch.Tensor, torch.Tensor | None, list[Future[None]]]] = deque()
    waiting: Callable[[], torch.Tensor] | None = None
    threads = decoding_threads()
    with ThreadPoolExecutor(threads, "decode") as pool:
        while starts or decoding:
            while starts and len(decoding) <= AHEAD:
                start = starts.popleft()
                batch = media[start : start + size]
                decoded = _decoded(pool, threads, model.processor.images, batch, device)
                decoding.append((decoded[0], patch_places(batch), decoded[1]))
            pixels, places, slices = decoding.popleft()
            for one in slices:
                one.result()
            features = run_tower(
                model.tower,
                pixels.to(device, non_blocking=True),
                autocast,
                None if places is None else places.to(device),
            )
            copied = _to_host(features, dtype)
            if waiting is not None:
                yield waiting()
            waiting = copied
        if waiting is not None:
            yield waiting()


def run_tower(
    tower: MediaTower,
    pixels: torch.Tensor,
    autocast: torch.dtype,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Features [B, N, D] of pixels on the tower's device, as a step under `autocast` has them.

    `places` are those of patches, for a tower that keeps images' shapes. The caller's own autocast
    does not count. A batch that the device's memory does not hold is halved.
    """
    enabled = autocast != torch.float32
    with (
        torch.inference_mode(),
        torch.autocast(pixels.device.type, dtype=autocast if enabled else None, enabled=enabled),
    ):
        return _halved_if_needed(tower, (pixels,) if places is None else (pixels, places))


def _halved_if_needed(tower: MediaTower, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    try:
        return tower(*inputs)
    except torch.OutOfMemoryError:
        if len(inputs[0]) == 1:
            raise
    # Out of the except clause, which holds the failed pass's tensors.
    torch.cuda.empty_cache()
    halves = zip(*(each.tensor_split(2) for each in inputs), strict=True)
    return torch.cat([_halved_if_needed(tower, half) for half in halves])


def stored_dtype(tower: MediaTower, autocast: torch.dtype) -> torch.dtype:
    """The dtype of cached features: autocast's, or else the tower's.

    On a GPU autocast computes norms in fp32, so a tower's output may be wider. The first product
    with it rounds it anyway.
    """
    first = next(tower.parameters(), None)
    return first.dtype if autocast == torch.float32 and first is not None else autocast


def batch_size(shape: Sequence[int], device: torch.device) -> int:
    """The number of inputs of a shape [..., H, W] that the tower takes at once on a device."""
    return CPU_BATCH if device.type == "cpu" else max(GPU_PIXELS // (shape[-2] * shape[-1]), 8)


def decoding_threads() -> int:
    """Threads that decode images in this process: its share of the cores of its node."""
    return min(rank_cores(), MOST_THREADS)


def _decoded(
    pool: ThreadPoolExecutor,
    threads: int,
    images: MediaProcessor,
    media: Sequence[Media],
    device: torch.device,
) -> tuple[torch.Tensor, list[Future[None]]]:
    """Starts decoding a batch: the tower's input [B, ...], whole once all futures are done."""
    longest = max((item.grid.patches for item in media if item.grid), default=0)
    # Images that keep their shape are padded with zeros.
    shape = (longest, images.shape[-1]) if longest else images.shape
    pixels = torch.zeros((len(media), *shape), dtype=images.dtype, pin_memory=device.type == "cuda")
    array = pixels.numpy()  # written without torch's threads

    def decode(places: np.ndarray) -> None:
        # The processor remembers the last image for its tiles: each thread has its own.
        processor = images.fresh()
        for place in places.tolist():
            item = stacked([processor(media[place])], [media[place]])[0].numpy()
            array[place, : len(item)] = item

    slices = np.array_split(np.arange(len(media)), threads)
    return pixels, [pool.submit(decode, places) for places in slices if len(places)]


def _to_host(features: torch.Tensor, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Starts the copy of features to the CPU; the function returned waits for it."""
    features = features.to(dtype)
    if features.device.type != "cuda":
        return features.cpu
    host = torch.empty(features.shape, dtype=dtype, pin_memory=True)
    host.copy_(features, non_blocking=True)
    done = torch.cuda.Event()
    # The current device may be another one.
    done.record(torch.cuda.current_stream(features.device))

    def wait() -> torch.Tensor:
        done.synchronize()
        return host

    return wait
