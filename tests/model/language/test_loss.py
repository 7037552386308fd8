"""The loss formed chunk by chunk is the plain one, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from vlm_tune.model.language import loss as module
from vlm_tune.model.language.loss import token_loss


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(0, 13),
    chunk=st.integers(1, 5),
    trained=st.booleans(),
    hidden_trained=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
)
def test_chunks_give_the_loss_and_gradients_of_the_whole(
    count: int, chunk: int, trained: bool, hidden_trained: bool, scale: float
) -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 11).double().requires_grad_(trained)
    hidden = torch.randn(count, 6).double().requires_grad_(hidden_trained)
    targets = torch.randint(0, 11, (count,))

    def gradients(loss: torch.Tensor) -> list[torch.Tensor | None]:
        for tensor in (hidden, *head.parameters()):
            tensor.grad = None
        if loss.requires_grad:
            (loss * scale).backward()
        return [
            None if tensor.grad is None else tensor.grad.clone()
            for tensor in (hidden, *head.parameters())
        ]

    plain = cross_entropy(head(hidden), targets, reduction="sum")
    wanted = gradients(plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk * 4 * 11)
        chunked = token_loss(head, hidden, targets, head)
    assert torch.allclose(chunked.double(), plain, rtol=1e-6)
    for one, other in zip(gradients(chunked), wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.allclose(one, other, rtol=1e-6, atol=1e-9)


def test_logits_of_one_chunk_live_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    head = nn.Linear(4, 16).requires_grad_(False)
    seen: list[int] = []

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return head(hidden).float()

    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 4 * 16)
    hidden = torch.randn(8, 4, requires_grad=True)
    token_loss(logits, hidden, torch.zeros(8, dtype=torch.long), head).backward()
    assert seen == [3, 3, 2]
