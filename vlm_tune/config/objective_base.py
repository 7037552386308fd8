"""The base classes of a recipe's objectives."""

from __future__ import annotations

from pydantic import Field

from vlm_tune.config.base import Config, PositiveFloat


class ObjectiveTraits:
    """Properties of an objective or a mixture that decide how it is trained, with defaults."""

    @property
    def selects_by(self) -> str:
        """The figure of validation: the score of `answers`, the `loss`, or a mean that is logged.

        It selects the best checkpoint. Answers are generated, chosen or retrieved.
        """
        return "answers"

    @property
    def reference_model(self) -> str | None:
        """The kind of reference model that answers are compared with; None without one."""
        return None

    @property
    def mismatches(self) -> bool:
        """Whether the loss also reads each prompt with an answer of another row."""
        return False

    @property
    def updates(self) -> int:
        """Updates of the weights in a step."""
        return 1

    @property
    def uses_dropout(self) -> bool:
        """Whether dropout is on; its noise would change how likely a model finds an answer."""
        return True


class ObjectiveSection(ObjectiveTraits, Config):
    """Base of every objective."""

    weight: PositiveFloat | None = Field(
        default=None,
        description="among several objectives the factor of its mean loss; 1 by default",
    )
