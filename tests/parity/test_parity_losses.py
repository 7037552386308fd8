"""Our loss is transformers' own, for every language model that it can build tiny.

Nothing that scales logits is left neutral.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.tiny_architectures import ODD, Layout, compare, mappings, tiny
from vlm_tune.errors import ModelError
from vlm_tune.model.language import loss as chunked
from vlm_tune.model.language.logits import HeadRule
from vlm_tune.model.language.registry import LLMS

CAUSAL = (
    "Bart Bert Cohere Cohere2 FalconH1 Gemma Gemma2 Gemma3Text GPT2 Granite GraniteMoe Llama MBart "
    "Mistral OPT Phi3 Qwen2\nQwen3 Starcoder2"
)
SEQ2SEQ = "Bart MBart M2M100 Marian MT5 Pegasus SwitchTransformers T5 UMT5"
SURE: list[tuple[Layout, str]] = [
    *(("causal", name) for name in CAUSAL.split()),
    *(("seq2seq", name) for name in SEQ2SEQ.split()),
]
"""Classes that must be there and the same, whatever else changes in transformers."""


def built(layout: Layout, name: str) -> Any:
    kind, model = next(
        (kind, model)
        for at, kind, model in mappings()
        if at == layout and kind.__name__ == f"{name}Config"
    )
    return tiny(kind, model, layout)


@pytest.mark.parametrize(("layout", "name"), SURE)
def test_the_loss_is_transformers_own(layout: Layout, name: str) -> None:
    assert compare(layout, built(layout, name)).same


@pytest.mark.slow
def test_the_loss_is_transformers_own_of_every_architecture(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines: list[str] = []
    same, other, refused, absent = [], [], [], []
    for layout, kind, model in mappings():
        name = f"{layout} {kind.__name__}"
        try:
            network = tiny(kind, model, layout)
        except (
            Exception
        ) as error:  # whatever a class raises that can't be made tiny by the sizes of its config
            absent.append(name)
            lines.append(
                f"{name}: not built, {type(error).__name__}: {' '.join(str(error).split())[:160]}"
            )
            continue
        try:
            compared = compare(layout, network)
        except ModelError as error:
            refused.append(name)
            lines.append(f"{name}: refused, {error}")
            continue
        (same if compared.same else other).append(name)
        if not compared.same:
            lines.append(f"{name}: {compared}")
    with capsys.disabled():
        print(
            f"\n{len(same)} the same, {len(refused)} refused, {len(absent)} not built, "
            f"{len(other)} others",
            *lines,
            sep="\n  ",
        )
    assert not other
    assert len(same) >= 35
    assert len(same) >= 0.85 * (len(same) + len(refused))
    assert {f"{layout} {name}Config" for layout, name in SURE} <= set(same)


@pytest.mark.parametrize(
    ("layout", "name"),
    [("causal", "Granite"), ("causal", "Gemma2"), ("causal", "Bert"), ("seq2seq", "MBart")],
)
def test_the_loss_in_chunks_is_that_of_all_at_once(
    layout: Layout, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 3 * 4 * 96)
    assert compare(layout, built(layout, name)).same


@pytest.mark.parametrize("name", ["Bert", "MBart"])
def test_what_stands_around_the_head_gets_its_gradient(name: str) -> None:
    """A model whose logits are more than a scaled head: all of it trains, chunk by chunk or not."""
    layout: Layout = "causal" if name == "Bert" else "seq2seq"
    llm = LLMS[layout](built(layout, name))
    assert llm.rule is None
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.arange(5)
    gradients = []
    for whole in (False, True):
        llm.zero_grad()
        hidden.grad = None
        chunked.token_loss(llm.logits, hidden, targets, llm.head_parts(), whole=whole).backward()
        gradients.append([hidden.grad, *(each.grad for each in llm.head_parts().parameters())])
    assert len(gradients[0]) >= 2
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None and torch.allclose(one, other, atol=1e-5)


def test_a_model_that_sees_ahead_is_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel

    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    llm = LLMS["causal"](BertLMHeadModel(BertConfig(vocab_size=96, **small)))
    with pytest.raises(ModelError, match=r"BertLMHeadModel is not configured as a decoder"):
        llm.check()


def test_a_model_that_is_called_otherwise_than_it_is_made_for_is_refused() -> None:
    llm = LLMS["causal"](built("causal", "Granite"))
    llm.rule = HeadRule()
    with pytest.raises(ModelError, match=r"GraniteForCausalLM can't be trained here"):
        llm.check()


def test_the_scale_is_read_off_the_model() -> None:
    rule = LLMS["causal"](built("causal", "Granite")).rule
    assert rule is not None and rule.scale == pytest.approx(1 / ODD)
    rule = LLMS["seq2seq"](built("seq2seq", "T5")).rule
    assert rule is not None and rule.scale == pytest.approx(32**-0.5)
