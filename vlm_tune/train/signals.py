"""SIGINT and SIGTERM as a request to stop: the loop asks for it after each step, and all processes agree."""

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
"""Seconds in which a launcher may hand on the signal that the terminal sent to all processes already."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether SIGINT or SIGTERM came; a second one ends the process at once, with exit code 130."""
    asked: float | None = None
    launched = "TORCHELASTIC_RUN_ID" in os.environ

    def note(number: int, frame: Any) -> None:
        nonlocal asked
        now = time.monotonic()
        if asked is not None:
            if not launched or now - asked > ECHO:
                os._exit(EXIT_INTERRUPTED)
            return
        asked = now
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2,
            b"stopping after this step (once more to leave at once)\n",
        )

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are the caller's
        before = {}
    try:
        yield lambda: asked is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
