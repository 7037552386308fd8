"""Means of cells are those of torch's adaptive pooling, and no operator of it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.connector_kinds import KINDS, Tiny, with_connector
from tests.helpers.tiny_models import batch_of, built, largest, loss_and_gradients, parsed, rows_of
from vlm_tune.model.pooling import grid_means

REFUSED = (
    "adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "histc",
    "kthvalue",
    "max_unpool2d",
    "median",
    "nll_loss2d",
    "put_",
    "reflection_pad",
    "replication_pad",
    "upsample",
)
"""Parts of the names of operators that torch refuses on a GPU in its deterministic mode."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "grid"), [((4, 4), 2), ((7, 7), 3), ((3, 5), 3), ((2, 2), 1), ((3, 3), 3), ((2, 3), 4)]
)
def test_means_and_gradients_are_those_of_adaptive_pooling(
    size: tuple[int, int], grid: int, dtype: torch.dtype
) -> None:
    features = torch.randn(2, size[0] * size[1], 6).to(dtype).requires_grad_()
    means = grid_means(features, size, grid)
    pooled = adaptive_avg_pool2d(features.float().transpose(1, 2).unflatten(2, size), grid)
    expected = pooled.flatten(2).transpose(1, 2).to(dtype)
    weights = torch.randn(expected.shape).to(dtype)
    ours, theirs = (
        torch.autograd.grad((each * weights).sum(), features)[0] for each in (means, expected)
    )
    assert means.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    assert largest(means.detach(), expected.detach()) <= tolerance * float(
        expected.detach().abs().max()
    )
    assert largest(ours, theirs) <= tolerance * float(theirs.abs().max())


def test_the_cells_of_a_side_are_averaged_before_those_of_the_other() -> None:
    """A product with all cells of the grid at once would take grid² x h x w for each channel."""
    features = torch.ones(2, 24 * 20, 8)
    with FlopCounterMode(display=False) as counter:
        grid_means(features, (24, 20), 12)
    one_side_first = 2 * 2 * 8 * max(12 * 24 * 20 + 12 * 12 * 20, 12 * 24 * 20 + 12 * 12 * 24)
    assert 0 < counter.get_total_flops() <= one_side_first
    square = features[:, :400]
    assert grid_means(square, (20, 20), 20) is square


class _Noted(TorchDispatchMode):
    """Notes the names of all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_connectors_and_pooled_towers_have_a_deterministic_backward_pass(
    kind: str, tiny_recipe: Tiny
) -> None:
    """As far as names of operators show it; the tower trains too, and is pooled."""
    text = with_connector(tiny_recipe("causal"), kind)
    recipe = parsed(text, model__tower__grid=2 if kind != "avg_pool" else 4)
    model = built(recipe).train()
    model.requires_grad_(True)
    batch = batch_of(model, [e for row in rows_of(recipe) for e in model.processor.examples(row)])
    with _Noted() as noted:
        gradients = loss_and_gradients(model, [batch])[1]
    assert any(name.startswith("tower.") for name in gradients)
    assert not [name for name in noted.names for refused in REFUSED if refused in name]
