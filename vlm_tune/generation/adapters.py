"""Models by name over the base weights of one: what `VisionLanguageModel.load_adapter` loads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Generic

from vlm_tune.errors import ArgumentError
from vlm_tune.model.shared_base import SharedBase, load_over
from vlm_tune.model.vlm import Network
from vlm_tune.quoting import name_list, quoted


class Adapters(Generic[Network]):
    """Models over one base, by name. Several threads may use it at once."""

    def __init__(self, base: SharedBase) -> None:
        """Begins with none.

        Args:
            base: The weights that the models share.
        """
        self._base = base
        self._models: dict[str, Network] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a model has other weights, over which nothing is loaded."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order in which they were loaded."""
        return tuple(self._models)

    def load(self, path: Path, name: str, model_class: type[Network]) -> Network:
        """Loads a model under a new name.

        Raises:
            ArgumentError: The name is no text, or is taken.
            ModelError: As `load_over`.
        """
        if not isinstance(name, str) or not name.strip():
            raise ArgumentError(f"an adapter's name must be a string, got {quoted(name)}")
        self._check_free(name)
        model = load_over(self._base, path, model_class)
        with self._lock:
            self._check_free(name)
            self._models[name] = model
        return model

    def _check_free(self, name: str) -> None:
        if name in self._models:
            raise ArgumentError(
                f"an adapter {quoted(name)} is loaded already: choose another name, or call "
                "delete_adapter first"
            )

    def get(self, name: str) -> Network:
        """The model of that name. Raises `ArgumentError` if there is none."""
        model = self._models.get(name)
        if model is None:
            raise self._unknown(name)
        return model

    def delete(self, name: str) -> None:
        """Forgets the model of that name. Raises `ArgumentError` if there is none."""
        with self._lock:
            if self._models.pop(name, None) is None:
                raise self._unknown(name)

    def _unknown(self, name: str) -> ArgumentError:
        loaded = f"loaded are {name_list(self.names)}" if self._models else "none is loaded"
        return ArgumentError(f"there is no adapter {quoted(name)}; {loaded}")
