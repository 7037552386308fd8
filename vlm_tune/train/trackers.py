"""Experiment trackers, by accelerate; their failures are reported and never stop the training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from vlm_tune.quoting import reason_of

PATIENCE = 5
"""Consecutive failures after which a tracker is no longer used."""


class Trackers:
    """The recipe's trackers; `tell` is called with a message about a failure."""

    def __init__(
        self,
        names: Sequence[str],
        project: str,
        run: Path,
        config: dict[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        self._tell = tell
        self._failures = Counter[str]()
        self._trackers: dict[str, GeneralTracker] = {}
        known = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
        for name in names:
            if name not in known:
                tell(
                    f"{name} is not installed (pip install 'vlm_tune[{name}]'); training "
                    "continues without it"
                )
                continue
            self._try(name, lambda name=name: self._start(name, project, run, config))

    def _start(self, name: str, project: str, run: Path, config: dict[str, Any]) -> None:
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        tracker = kind(project, str(run)) if kind.requires_logging_directory else kind(project)
        tracker.start()
        tracker.store_init_configuration(config)
        self._trackers[name] = tracker

    def log(self, figures: dict[str, Any], step: int) -> None:
        """Logs figures to all trackers."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, lambda tracker=tracker: tracker.log(figures, step=step))
            if self._failures[name] >= PATIENCE:
                del self._trackers[name]
                self._tell(f"{name} failed {PATIENCE} times in a row and is no longer used")

    def close(self) -> None:
        """Lets all trackers finish."""
        for name, tracker in self._trackers.items():
            self._try(name, tracker.finish)

    def _try(self, name: str, act: Callable[[], Any]) -> None:
        try:
            act()
            self._failures[name] = 0
        except Exception as error:  # whatever a tracker's library raises
            self._failures[name] += 1
            if self._failures[name] == 1:
                self._tell(
                    f"{name} failed ({type(error).__name__}: {reason_of(error)}); training "
                    "continues"
                )
