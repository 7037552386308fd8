"""Products by oneDNN: where they are taken, and that they are torch's own."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from vlm_tune.model.acceleration import onednn_products
from vlm_tune.model.acceleration.onednn_products import OneDnnProducts


@pytest.mark.parametrize(
    ("rows", "dtype", "inference", "taken"),
    [
        (8, torch.float32, True, True),
        (7, torch.float32, True, False),
        (8, torch.bfloat16, True, False),
        (8, torch.float32, False, False),
    ],
)
def test_fp32_rows_in_inference_go_by_onednn(
    rows: int, dtype: torch.dtype, inference: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    product = onednn_products.onednn_linear

    def counted(*args: Any, **named: Any) -> torch.Tensor:
        calls.append(len(args[0]))
        return product(*args, **named)

    monkeypatch.setattr(onednn_products, "onednn_linear", counted)
    torch.manual_seed(0)
    layer = nn.Linear(16, 24, dtype=dtype)
    given = torch.randn(rows, 16, dtype=dtype)
    with torch.inference_mode(inference):
        expected = layer(given)
        with OneDnnProducts():
            computed = layer(given)
        torch.testing.assert_close(computed, expected)
        layer(given)
    assert bool(calls) == taken
    assert computed.requires_grad != inference


@torch.inference_mode()
def test_a_product_is_computed_each_time_and_leaves_no_tensor_in_memory() -> None:
    layer = nn.Linear(16, 24, bias=False)
    rows = torch.ones(8, 16)
    with OneDnnProducts():
        assert layer(rows).any()
        layer.weight.zero_()
        assert not layer(rows).any()
    alive = weakref.ref(rows)
    del rows
    assert alive() is None
