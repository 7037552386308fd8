"""A step's micro-batches on their device; a GPU gets them while the step before is computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlm_tune.data.batch import Batch

Window = list[Batch]


def on_device(windows: Iterator[Window], device: torch.device) -> Iterator[Window]:
    """Yields the micro-batches of each step on the device.

    To a GPU those of the next step are copied before a step's are yielded, by a stream of their
    own. An error in reading them is raised when their step is due.
    """
    if device.type != "cuda":
        for window in windows:
            yield [batch.to(device) for batch in window]
        return
    copies = torch.cuda.Stream(device)
    ahead = _begun(windows, device, copies)
    while ahead is not None:
        if isinstance(ahead, Exception):
            raise ahead
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copies)
        for batch in ahead:
            batch.record_stream(computing)
        window = ahead
        ahead = _begun(windows, device, copies)
        yield window


def _begun(
    windows: Iterator[Window], device: torch.device, copies: torch.cuda.Stream
) -> Window | Exception | None:
    """The next window, its copy begun; the error in reading it; None if there is none."""
    try:
        window = next(windows, None)
    except Exception as error:
        return error
    if window is None:
        return None
    with torch.cuda.stream(copies):
        return [batch.pin_memory().to(device) for batch in window]
