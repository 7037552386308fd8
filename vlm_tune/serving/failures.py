"""The log of unexpected errors: where they were raised, and nothing that a client sent."""

from __future__ import annotations

import logging
import traceback

log = logging.getLogger(__name__)

PLACES = 8
"""Most lines of code that the log names for an error: the last ones."""


def log_failure(error: BaseException, where: str) -> None:
    """Logs where an unexpected error was raised, without its message.

    The message may quote what a client sent.
    """
    places = "".join(traceback.format_tb(error.__traceback__, -PLACES))
    log.error("%s %s, raised at\n%s", type(error).__name__, where, places)
