"""Types of recipe values, and the base class of recipe sections."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from vlm_tune.config.yaml_source import Located, Path
from vlm_tune.paths import home

Fraction = Annotated[float, Field(ge=0, le=1)]
LARGEST = 2**31 - 1
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9)]
Side = Annotated[int, Field(ge=1, le=16_384)]
"""The side of an image or a grid, in pixels or tokens."""
Width = Annotated[int, Field(ge=1, le=131_072)]
"""The width of a layer, a LoRA rank, or a number of heads or learned vectors."""
Layers = Annotated[int, Field(ge=1, le=1024)]
Processes = Annotated[int, Field(ge=0, le=512)]
"""Worker processes beside a rank; more than a machine has cores only wait for each other."""
HomePath = Annotated[str, AfterValidator(home)]
"""A path, in which `~` is the user's home folder, or a name."""
LearningRate = Annotated[float, Field(gt=0, le=100)]
Decay = Annotated[float, Field(ge=0, lt=1)]
"""The share of a running mean that stays at each step; at 1 nothing new would enter it."""


class Places:
    """Places of a recipe's values in its file; not part of its content, so any two are equal."""

    def __init__(self, located: Located | None = None) -> None:
        self._located = located

    def where(self, path: Path) -> str:
        """Returns `file:line:column` of a value that was read from a file, else its dotted name."""
        return (
            ".".join(map(str, path))
            if self._located is None
            else self._located.where(path, key=True)
        )

    def located(self) -> Located | None:
        """Returns a copy of the file's values, before defaults, with their places.

        None if the recipe was not read.
        """
        return deepcopy(self._located)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places)

    __hash__ = None  # type: ignore[assignment]


class Config(BaseModel):
    """Base of every section of a recipe: unknown keys and values of another type are refused."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False
    )
