"""Values that belong to a module and to a thread: each thread reads what it wrote itself."""

from __future__ import annotations

import threading
from typing import Any


class PerThread(threading.local):
    """A value of a module for each thread, None at first.

    It is dropped when its thread ends. A copy of the module begins with None.

    Attributes:
        value: The value.
        is_set: Whether this thread has set one, which may be None.
    """

    value: Any = None
    is_set = False

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread:
        return PerThread()

    def __reduce__(self) -> tuple[Any, ...]:
        return PerThread, ()
