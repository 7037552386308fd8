"""Boxes in answer texts, and how well they cover those of the reference."""

from __future__ import annotations

import re

import numpy as np

NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
CORNERS = re.compile(rf"[\[(]{NUMBER},{NUMBER}(?:,|[\])]\s*,?\s*[\[(]){NUMBER},{NUMBER}[\])]")
"""`[x1, y1, x2, y2]` and `(x1,y1),(x2,y2)`."""
LOCATIONS = re.compile(r"<loc(\d{4})>" * 4)
"""PaliGemma's tokens, in the order y1, x1, y2, x2."""


def boxes_in(text: str) -> np.ndarray:
    """The boxes in a text, float64[boxes, 4], each as x1, y1, x2, y2 in the text's own unit."""
    corners = [[float(number) for number in match.groups()] for match in CORNERS.finditer(text)]
    for match in LOCATIONS.finditer(text):
        y1, x1, y2, x2 = (float(number) for number in match.groups())
        corners.append([x1, y1, x2, y2])
    boxes = np.array(corners, dtype=np.float64).reshape(-1, 4)
    low = np.minimum(boxes[:, :2], boxes[:, 2:])
    high = np.maximum(boxes[:, :2], boxes[:, 2:])
    return np.concatenate([low, high], axis=1)


def intersection_over_union(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The intersection over union of each box [N, 4] with each of the others [M, 4]: [N, M]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)[:, None]
    union = areas + (others[:, 2:] - others[:, :2]).prod(-1)[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def box_overlap(prediction: str, reference: str) -> float:
    """The intersection over union of an answer's boxes with the reference's, from 0 to 1.

    Where there are several, boxes are paired so that the sum is largest, and the sum is divided by
    the larger number of boxes: a missing box and one too many both count as 0.
    """
    from scipy.optimize import linear_sum_assignment

    predicted = boxes_in(prediction)
    expected = boxes_in(reference)
    if not len(predicted) or not len(expected):
        return 0.0
    overlaps = intersection_over_union(predicted, expected)
    pairs = linear_sum_assignment(overlaps, maximize=True)
    return float(overlaps[pairs].sum() / max(len(predicted), len(expected)))
