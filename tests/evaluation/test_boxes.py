"""Boxes are read from the forms that models write, and compared by their overlap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from vlm_tune.evaluation.boxes import (
    box_overlap,
    boxes_in,
    intersection_over_union,
    points_close,
    points_in_boxes,
)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[10, 20, 30, 40]", [[10, 20, 30, 40]]),
        ("the dog <|box_start|>(10,20),(30,40)<|box_end|>", [[10, 20, 30, 40]]),
        ("(30, 40), (10, 20)", [[10, 20, 30, 40]]),
        ("[0.1,0.2,0.3,0.45] and [1,2,3,4]", [[0.1, 0.2, 0.3, 0.45], [1, 2, 3, 4]]),
        ("<loc0020><loc0010><loc0040><loc0030> dog", [[10, 20, 30, 40]]),
        ("at 3, 4 of [1, 2]", []),
    ],
)
def test_boxes_are_read(text: str, boxes: list[list[float]]) -> None:
    assert boxes_in(text).tolist() == boxes


def test_overlaps_are_torchvisions() -> None:
    corners = np.random.default_rng(0).uniform(0, 100, (12, 4))
    boxes = boxes_in(" ".join(str(box.tolist()) for box in corners))
    expected = box_iou(torch.tensor(boxes[:5]), torch.tensor(boxes[5:])).numpy()
    np.testing.assert_allclose(intersection_over_union(boxes[:5], boxes[5:]), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("prediction", "reference", "overlap"),
    [
        ("[0, 0, 2, 2]", "[0, 0, 2, 1]", 0.5),
        ("[0, 0, 1, 1] [5, 5, 6, 6]", "[5, 5, 6, 6] [0, 0, 1, 1]", 1.0),
        ("[0, 0, 1, 1] [5, 5, 6, 6]", "[0, 0, 1, 1]", 0.5),
        ("nowhere", "[0, 0, 1, 1]", 0.0),
        ("[1, 1, 1, 1]", "[1, 1, 1, 1]", 0.0),
    ],
)
def test_several_boxes_are_paired(prediction: str, reference: str, overlap: float) -> None:
    assert box_overlap(prediction, reference) == pytest.approx(overlap)


@pytest.mark.parametrize(
    ("prediction", "share"),
    [
        ("[5, 5]", 0.5),
        ("(5,5) and (25,25)", 1.0),
        ("[0, 0, 8, 8] [20, 20, 30, 30]", 1.0),
        ("[5, 5] [6, 6]", 0.5),
        ("[5, 5] [25, 25] [90, 90]", 2 / 3),
        ("[15, 15]", 0.0),
        ("nowhere", 0.0),
    ],
)
def test_points_are_in_boxes(prediction: str, share: float) -> None:
    assert points_in_boxes(prediction, "[0, 0, 10, 10] [20, 20, 30, 30]") == pytest.approx(share)


@pytest.mark.parametrize(
    ("prediction", "share"),
    [("[53, 54]", 1.0), ("[54, 54]", 0.0), ("[50, 50] [50, 50]", 0.5), ("[1, 2, 3, 4]", 0.0)],
)
def test_points_are_close_by_the_diagonal(prediction: str, share: float) -> None:
    """Of 60 x 80 pixels the diagonal is 100, so a point may be 5 pixels away."""
    assert points_close(prediction, "[50, 50]", (60, 80)) == share
