"""SIGINT and SIGTERM as a request to stop.

The training loop checks for it before each step, and all processes agree.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vlm_tune.errors import EXIT_INTERRUPTED

ECHO = 2.0
"""Seconds within which a launcher may forward a signal that the terminal already sent to all."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGINT or SIGTERM came.

    A second signal ends the process at once, with exit code 130.
    """
    requested_at: float | None = None
    launched = "TORCHELASTIC_RUN_ID" in os.environ

    def note(number: int, frame: Any) -> None:
        nonlocal requested_at
        now = time.monotonic()
        if requested_at is not None:
            if not launched or now - requested_at > ECHO:
                os._exit(EXIT_INTERRUPTED)
            return
        requested_at = now
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2,
            b"stopping after this step (once more to leave at once)\n",
        )

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are the caller's
        before = {}
    try:
        yield lambda: requested_at is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
