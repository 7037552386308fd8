"""Affine maps of places in images.

Places are in pixels and continuous: (0, 0) is the upper left corner of the first pixel, and (W, H)
the lower right one of the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Corners = tuple[float, float, float, float]
"""A box: left, top, right, bottom."""


@dataclass(frozen=True)
class Affine:
    """An affine map of places in one picture to places in another, as float64[3, 3]."""

    matrix: np.ndarray

    @classmethod
    def of(cls, across: tuple[float, float, float], down: tuple[float, float, float]) -> Affine:
        """The map of (x, y) to (across . (x, y, 1), down . (x, y, 1))."""
        return cls(np.array([across, down, (0.0, 0.0, 1.0)]))

    @classmethod
    def scale(cls, across: float, down: float) -> Affine:
        """The map that multiplies x and y."""
        return cls.of((across, 0.0, 0.0), (0.0, down, 0.0))

    @classmethod
    def shift(cls, right: float, down: float) -> Affine:
        """The map that adds to x and y."""
        return cls.of((1.0, 0.0, right), (0.0, 1.0, down))

    def then(self, other: Affine) -> Affine:
        """This map, and the other after it."""
        return Affine(other.matrix @ self.matrix)

    def inverse(self) -> Affine:
        """The map back."""
        return Affine(np.linalg.inv(self.matrix))

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Where a place goes."""
        across, down, _ = (self.matrix @ (x, y, 1.0)).tolist()
        return across, down

    def box(self, corners: Corners) -> Corners:
        """The smallest upright box around where a box goes."""
        left, top, right, bottom = corners
        places = [self.point(x, y) for x in (left, right) for y in (top, bottom)]
        across = [x for x, _ in places]
        down = [y for _, y in places]
        return min(across), min(down), max(across), max(down)
