"""Boxes and points in answer texts, and how well they agree with those of the reference."""

from __future__ import annotations

import numpy as np

from vlm_tune.data.regions import locations, mentions

LEAST_CLOSE = 0.05
"""The distance up to which a point counts as right, as a share of the image's diagonal."""


def boxes_in(text: str) -> np.ndarray:
    """The boxes in a text, float64[boxes, 4], each as x1, y1, x2, y2 in the text's own unit."""
    return _regions_in(text, 4)


def points_in(text: str) -> np.ndarray:
    """The points in a text, float64[points, 2], each as x, y in the text's own unit."""
    return _regions_in(text, 2)


def _regions_in(text: str, size: int) -> np.ndarray:
    """The regions of `size` coordinates in a text, in numbers and in PaliGemma's tokens."""
    listed = [each.coordinates for each in (*mentions(text), *locations(text))]
    regions = [coordinates for coordinates in listed if len(coordinates) == size]
    return np.array(regions, dtype=np.float64).reshape(-1, size)


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


def points_in_boxes(prediction: str, reference: str) -> float:
    """The share of the reference's boxes that an answer points into, from 0 to 1.

    An answer that gives boxes points to their centres. Each point counts for one box, and a point
    too many as a box that was missed.
    """
    boxes = boxes_in(reference)
    answered = boxes_in(prediction)
    points = np.concatenate([points_in(prediction), (answered[:, :2] + answered[:, 2:]) / 2])
    inside = (points[:, None] >= boxes[None, :, :2]) & (points[:, None] <= boxes[None, :, 2:])
    return _paired_share(np.asarray(inside.all(-1)))


def points_close(prediction: str, reference: str, size: tuple[int, int]) -> float:
    """The share of the reference's points that an answer's points are close to, from 0 to 1.

    Close is up to `LEAST_CLOSE` of the diagonal of the image, whose width and height are `size`.
    Points are paired as in `points_in_boxes`.
    """
    points = points_in(prediction)
    expected = points_in(reference)
    distances = np.linalg.norm(points[:, None] - expected[None], axis=-1)
    return _paired_share(distances <= LEAST_CLOSE * np.hypot(*size))


def _paired_share(fits: np.ndarray) -> float:
    """The largest number of pairs that fit, bool[N, M], as a share of the larger of N and M."""
    from scipy.optimize import linear_sum_assignment

    if not fits.size:
        return 0.0
    pairs = linear_sum_assignment(fits.astype(np.float64), maximize=True)
    return float(fits[pairs].sum() / max(fits.shape))
