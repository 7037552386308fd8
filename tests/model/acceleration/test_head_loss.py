"""The kernel of the loss under a frozen head against the formula in double precision.

Also language models with it and without.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, one_hot
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from vlm_tune.data.batch import Batch
from vlm_tune.data.types import IGNORE_INDEX
from vlm_tune.kernels.loss import linear_cross_entropy, losses, reference_losses
from vlm_tune.model.acceleration.head_loss import head_reason
from vlm_tune.model.acceleration.install import install
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.causal import CausalLLM
from vlm_tune.model.language.logits import HeadRule
from vlm_tune.model.language.loss import token_loss
from vlm_tune.model.language.seq2seq import Seq2SeqLLM

needs_kernel = pytest.mark.usefixtures("kernels")

BF16 = 2**-8


def by_kernel(hidden: Tensor, head: nn.Module) -> bool:
    """Whether the kernel computes the loss of hidden states under a head."""
    llm: Any = SimpleNamespace(rule=HeadRule(), whole_head=False, head=head)
    return head_reason(llm, hidden) is None


def given(
    positions: int, width: int, vocabulary: int, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a weight with logits about as large as `scale`, and targets.

    Some targets are nearly sure.
    """
    torch.manual_seed(positions + width)
    hidden = torch.randn(positions, width).bfloat16()
    weight = (torch.randn(vocabulary, width) * scale / width**0.5).bfloat16()
    targets = torch.randint(0, vocabulary, (positions,))
    weight[targets[:3]] += hidden[:3] * (12 / width)
    return hidden, weight, targets


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and gradients by position, in double precision.

    Without cancelling where the target is sure.
    """
    logits = hidden.double() @ weight.double().t()
    is_target = one_hot(targets, len(weight)).bool()
    others = logits.masked_fill(is_target, -torch.inf).logsumexp(1)
    odds = others - logits[is_target]
    shares = log_softmax(logits, 1).exp().masked_fill(is_target, 0)
    gradient = shares @ weight.double() - odds.sigmoid()[:, None] * weight[targets].double()
    return torch.logaddexp(odds, torch.zeros(())), gradient


def off(actual: Tensor, wanted: Tensor) -> float:
    """The largest relative error of a position's gradient."""
    return float(((actual - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-12)).max())


@needs_kernel
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("positions", "width", "vocabulary", "scale"),
    [
        (1, 32, 40, 1),
        (3, 64, 33, 2),
        (70, 96, 1000, 4),
        (169, 576, 2005, 2),
        (700, 576, 1500, 1),
        (65, 1024, 900, 3),
        (100, 2048, 333, 1),
        (33, 64, 31, 1),
        (5, 32, 5000, 8),
    ],
)
def test_losses_and_gradients_are_those_of_the_formula(
    positions: int, width: int, vocabulary: int, scale: float, threads: int
) -> None:
    hidden, weight, targets = given(positions, width, vocabulary, scale)
    wanted, of_hidden = exact(hidden, weight, targets)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        loss, gradient = losses(hidden, weight, targets, True)
        alone, none = losses(hidden, weight, targets, False)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-6, atol=1e-8)
    assert off(gradient, of_hidden) < BF16
    assert none.shape == (0, width)
    torch.testing.assert_close(alone, loss, rtol=1e-6, atol=1e-8)


@needs_kernel
@pytest.mark.parametrize("rising", [True, False])
def test_logits_of_any_size_and_order_neither_overflow_nor_vanish(rising: bool) -> None:
    """Logits up to 3e4 and down to -3e4 that rise or fall along the vocabulary.

    What is summed already must then be rescaled.
    """
    width, vocabulary, positions = 64, 1700, 40
    weight = torch.zeros(vocabulary, width)
    weight[:, 0] = torch.linspace(-1, 1, vocabulary) * (1 if rising else -1)
    weight[:, 1:] = torch.randn(vocabulary, width - 1, generator=torch.Generator().manual_seed(0))
    hidden = torch.zeros(positions, width)
    hidden[:, 0] = torch.logspace(0, 4.5, positions)
    hidden[:, 5] = 1
    rows, weight, targets = hidden.bfloat16(), weight.bfloat16(), torch.arange(positions) * 40
    wanted, of_hidden = exact(rows, weight, targets)
    loss, gradient = losses(rows, weight, targets, True)
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-6, atol=1e-2)
    assert off(gradient, of_hidden) < BF16


@needs_kernel
def test_a_target_that_is_all_but_certain_has_the_loss_and_gradient_of_what_is_left() -> None:
    """Losses down to 1e-20, which 1 - p in fp32 would give as none."""
    weight = torch.randn(100, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden = (weight[:8].float() * torch.linspace(0.2, 5, 8)[:, None]).bfloat16()
    wanted, of_hidden = exact(hidden, weight, torch.arange(8))
    assert wanted.min() < 1e-20
    loss, gradient = losses(hidden, weight, torch.arange(8), True)
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-5, atol=0)
    assert off(gradient * 1e20, of_hidden * 1e20) < BF16


@needs_kernel
def test_numbers_that_are_none_stay_none_and_stay_where_they_are() -> None:
    hidden, weight, targets = given(40, 64, 100)
    whole = losses(hidden, weight, targets, True)
    hidden[7, 3], hidden[9, 0] = torch.nan, torch.inf
    for actual, wanted in zip(losses(hidden, weight, targets, True), whole, strict=True):
        assert not actual[7].isfinite().any() and not actual[9].isfinite().any()
        rest = [i for i in range(40) if i not in (7, 9)]
        assert torch.equal(actual[rest], wanted[rest])


@needs_kernel
def test_no_positions_a_vocabulary_of_one_and_targets_out_of_it() -> None:
    hidden, weight, targets = given(4, 64, 100)
    leaf = hidden[:0].float().requires_grad_()
    nothing = linear_cross_entropy(leaf, weight, targets[:0])
    nothing.backward()
    assert nothing == 0 and leaf.grad is not None and leaf.grad.shape == (0, 64)
    loss, gradient = losses(hidden, weight[:1], torch.zeros(4, dtype=torch.long), True)
    assert not loss.any() and not gradient.any()
    for wrong in (-1, 100):
        with pytest.raises(IndexError, match="vocabulary of 100"):
            losses(hidden, weight, torch.full((4,), wrong), True)


@needs_kernel
def test_the_summed_loss_flows_back_as_that_of_the_layers() -> None:
    hidden, weight, targets = given(50, 64, 300, 3)
    head = nn.Linear(64, 300, bias=False).bfloat16().requires_grad_(False)
    head.weight.copy_(weight)
    wanted, of_hidden = exact(hidden, weight, targets)
    for kind in (torch.float32, torch.bfloat16):
        leaves = [hidden.to(kind, copy=True).requires_grad_() for _ in range(2)]
        with torch.autocast("cpu", torch.bfloat16):
            assert by_kernel(leaves[0], head)
            loss = linear_cross_entropy(leaves[0], head.weight, targets)
            layers = token_loss(lambda rows: head(rows).float(), leaves[1], targets, head)
        (loss / 50).backward()
        (layers / 50).backward()
        assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(
            float(wanted.sum()), rel=1e-5
        )
        errors = [
            off(leaf.grad.double() * 50, of_hidden)
            for leaf in leaves
            if leaf.grad is not None and leaf.grad.dtype == kind
        ]
        assert len(errors) == 2 and errors[0] < max(errors[1], 2 * BF16)


@needs_kernel
def test_only_a_frozen_head_that_is_nothing_else_is_the_kernel_s() -> None:
    hidden = torch.zeros(3, 64, dtype=torch.bfloat16)

    def head(width: int = 64, bias: bool = False) -> nn.Linear:
        return nn.Linear(width, 40, bias=bias).bfloat16().requires_grad_(False)

    hooked, other = head(), nn.Sequential(head())
    hooked.register_forward_hook(lambda *_: None)
    assert by_kernel(hidden, head())
    assert not by_kernel(hidden.float(), head())
    for wrong in (
        head().requires_grad_(),
        head(48),
        head(4096),
        head(bias=True),
        head().float(),
        hooked,
        other,
    ):
        assert not by_kernel(hidden, wrong)


def batch() -> Batch:
    """Two rows of twelve tokens, some of them supervised."""
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (2, 12))
    return Batch(
        ids=["a", "b"],
        input_ids=ids,
        attention_mask=torch.ones(2, 12, dtype=torch.bool),
        image_mask=torch.zeros(2, 12, dtype=torch.bool),
        labels=torch.where(torch.rand(2, 12) < 0.4, ids, IGNORE_INDEX),
        media_index=torch.zeros(0, dtype=torch.long),
    )


def decoder(config: Any, **more: Any) -> LanguageModel:
    sizes = {
        "vocab_size": 60,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    llm = CausalLLM(AutoModelForCausalLM.from_config(config(**sizes | more)))
    install(llm)
    return llm


def t5(tied: bool) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {
        "d_model": 64,
        "d_ff": 96,
        "d_kv": 32,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "vocab_size": 60,
    }
    more: dict[str, Any] = {
        "dropout_rate": 0,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": tied,
    }
    llm = Seq2SeqLLM(T5ForConditionalGeneration(T5Config(**sizes, **more)))
    install(llm)
    return llm


@needs_kernel
@pytest.mark.parametrize("kind", ["llama", "tied llama", "t5", "tied t5"])
def test_a_language_model_has_the_same_loss_and_gradient_with_it_and_without(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = (
        t5(kind.startswith("tied"))
        if kind.endswith("t5")
        else decoder(LlamaConfig, tie_word_embeddings=kind.startswith("tied"))
    )
    llm.requires_grad_(False)
    fast, plain = copy.deepcopy(llm).bfloat16(), llm
    rows, losses_of, gradients = batch(), [], []
    calls: list[int] = []

    def counted(*given: Any) -> Tensor:
        calls.append(len(given[0]))
        return linear_cross_entropy(*given)

    monkeypatch.setattr("vlm_tune.model.acceleration.head_loss.linear_cross_entropy", counted)
    for model in (fast, plain):
        embeds = model.embed(rows.input_ids).detach().requires_grad_()
        loss = model(embeds, rows)
        loss.sum.backward()
        with torch.no_grad():
            assert float(model(embeds, rows).sum) == pytest.approx(
                float(loss.sum.detach()), rel=BF16
            )
        assert embeds.grad is not None and loss.count == int((rows.labels != IGNORE_INDEX).sum())
        losses_of.append(float(loss.sum.detach()))
        gradients.append(embeds.grad.double())
    # The second, in fp32, never runs by it.
    assert calls == [int((rows.labels != IGNORE_INDEX).sum())] * 2
    assert losses_of[0] == pytest.approx(losses_of[1], rel=2 * BF16)
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 8 * BF16


@needs_kernel
def test_soft_caps_trained_heads_and_whole_ones_are_not_the_kernel_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any) -> Tensor:
        raise AssertionError

    monkeypatch.setattr("vlm_tune.model.acceleration.head_loss.linear_cross_entropy", never)
    capped = decoder(Gemma2Config, num_key_value_heads=1, head_dim=32)
    whole, trained = decoder(LlamaConfig), decoder(LlamaConfig)
    assert capped.rule is not None and capped.rule.scale is None
    whole.whole_head = True
    for model in (capped, whole, trained):
        model.bfloat16().requires_grad_(model is trained)
        rows = batch()
        assert model(model.embed(rows.input_ids).detach().requires_grad_(), rows).sum.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_body_gives_losses_and_gradients_of_the_formula(dtype: torch.dtype) -> None:
    hidden, weight, targets = given(1500, 64, 100)
    wanted, of_hidden = exact(hidden, weight, targets)
    outputs = reference_losses(hidden.to(dtype), weight.to(dtype), targets, True)
    leaf = hidden.to(dtype).requires_grad_()
    linear_cross_entropy(leaf, weight.to(dtype), targets).backward()
    assert leaf.grad is not None
    for actual, truth in zip((*outputs, leaf.grad), (wanted, of_hidden, of_hidden), strict=True):
        assert torch.allclose(actual.double(), truth, rtol=1e-4, atol=1e-5)
