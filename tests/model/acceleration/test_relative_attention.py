"""T5's attention by FlexAttention, proven on a CPU in its forward pass.

FlexAttention has no backward pass on a CPU: its gradients are a test for GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
)

from vlm_tune.compat import attention_name
from vlm_tune.data.batch import Batch
from vlm_tune.errors import ModelError
from vlm_tune.model.acceleration import flex_attention
from vlm_tune.model.acceleration.install import install, running, uninstall
from vlm_tune.model.acceleration.relative_attention import FAMILY
from vlm_tune.model.language.seq2seq import Seq2SeqLLM
from vlm_tune.model.language.virtual_tokens import KeyValuePrefix

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 16,
    "num_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 40,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a CPU stand for the GPU, where FlexAttention runs as plain torch code."""
    monkeypatch.setattr(flex_attention, "device_reason", lambda device: None)


def tiny_t5(attention: str, kind: str = "t5", **changes: Any) -> Seq2SeqLLM:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SIZES | changes)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:  # so that distances matter
            torch.nn.init.normal_(parameter, std=2.0)
    return Seq2SeqLLM(model)


def batch_of(length: int, *, packed: bool) -> Batch:
    """Two rows of text with padding; packed, of three samples and of two."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 90, (2, length), generator=generator)
    labels = torch.randint(2, 90, (2, length // 2), generator=generator)
    mask = torch.arange(length) < torch.tensor([[length], [length - length // 4]])
    labelled = torch.arange(length // 2) < torch.tensor([[length // 2 - 1], [length // 3]])
    batch = Batch(
        ["a", "b"],
        ids,
        mask,
        torch.zeros_like(mask),
        labels.masked_fill(~labelled, -100),
        torch.zeros(0, dtype=torch.int64),
    )
    if packed:
        thirds = (3 * torch.arange(length) // length).expand(2, -1)
        halves = (3 * torch.arange(length // 2) // (length // 2)).expand(2, -1)
        batch.samples = thirds.masked_fill(~mask, -1)
        batch.label_samples = halves.masked_fill(~labelled, -1)
    return batch


def states(llm: Seq2SeqLLM, batch: Batch, embeds: torch.Tensor) -> torch.Tensor:
    """The hidden states of the supervised tokens."""
    return llm.supervised(embeds, batch)[0]


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("length", [9, 400])
@torch.no_grad()
def test_hidden_states_are_those_of_masks(
    attention: str, packed: bool, length: int, as_on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = tiny_t5(attention).eval()
    batch = batch_of(length, packed=packed)
    embeds = llm.embed(batch.input_ids)
    expected = states(llm, batch, embeds)
    calls: list[BlockMask] = []
    by_flex = flex_attention.flex_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["block_mask"])
        return by_flex(*args, **kwargs)

    monkeypatch.setattr(flex_attention, "flex_attention", counted)
    install(llm, "flex")
    flexed = states(llm, batch, embeds)
    assert len(calls) == 6  # of two encoder layers, and twice two of the decoder
    assert float((flexed - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    if length > 128 and packed:  # pairs of blocks in which nobody sees anybody
        blocks = calls[0].to_dense()
        assert 0 < int(blocks.sum()) < blocks.numel()
    uninstall(llm)
    assert attention_name(llm.model.encoder) == attention
    assert torch.equal(states(llm, batch, embeds), expected)
    assert len(calls) == 6


@pytest.mark.parametrize("kind", FAMILY)
@torch.no_grad()
def test_every_model_of_the_family_has_its_own_biases(kind: str, as_on_cuda: None) -> None:
    """UMT5 has a table in every layer."""
    llm = tiny_t5("sdpa", kind).eval()
    batch = batch_of(9, packed=True)
    embeds = llm.embed(batch.input_ids)
    expected = states(llm, batch, embeds)
    install(llm, "flex")
    flexed = states(llm, batch, embeds)
    assert float((flexed - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@torch.no_grad()
def test_answers_and_other_devices_go_by_masks() -> None:
    """A CPU that is none but itself, in training and in generation with its cache."""
    llm = tiny_t5("sdpa").eval()
    batch = batch_of(9, packed=False)
    embeds = llm.embed(batch.input_ids)
    expected = states(llm, batch, embeds)
    ids = llm.model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False)
    install(llm, "flex")
    assert torch.equal(states(llm, batch, embeds), expected)
    assert torch.equal(
        llm.model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False), ids
    )


@torch.no_grad()
def test_a_prefix_goes_by_masks(as_on_cuda: None) -> None:
    llm = tiny_t5("sdpa").eval()
    batch = batch_of(9, packed=False)
    heads = SimpleNamespace(num_attention_heads=2, token_dim=32)
    llm.prompt = KeyValuePrefix(heads, torch.randn(3, 2 * 2 * 32))
    expected = states(llm, batch, llm.embed(batch.input_ids))
    install(llm, "flex")
    assert torch.equal(states(llm, batch, llm.embed(batch.input_ids)), expected)
    report = running(llm, torch.bfloat16, torch.device("cuda"))
    assert report.attention == "sdpa by masks (flex: it has a prefix)"


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Torch as `train.deterministic` sets it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@torch.no_grad()
def test_it_goes_by_masks_where_bits_are_repeated(as_on_cuda: None, deterministic: None) -> None:
    """On a GPU FlexAttention adds up the gradient of the table of biases in any order."""
    llm = tiny_t5("sdpa").eval()
    batch = batch_of(9, packed=True)
    expected = states(llm, batch, llm.embed(batch.input_ids))
    install(llm, "flex")
    assert torch.equal(states(llm, batch, llm.embed(batch.input_ids)), expected)
    report = running(llm, torch.bfloat16, torch.device("cuda"))
    reason = "its gradient of the biases is not deterministic"
    assert report.attention == f"sdpa by masks (flex: {reason})"


def test_what_it_does_not_compute_is_refused() -> None:
    refused: list[tuple[Any, str]] = [
        (tiny_t5("sdpa", d_kv=8), "heads are 8 wide, and not 16 to 256"),
        (tiny_t5("sdpa", dropout_rate=0.1), r"drops weights \(dropout_rate: 0.1 in its config\)"),
        (
            Seq2SeqLLM(
                BartForConditionalGeneration(
                    BartConfig(
                        vocab_size=96,
                        d_model=16,
                        encoder_layers=1,
                        decoder_layers=1,
                        encoder_attention_heads=2,
                        decoder_attention_heads=2,
                        encoder_ffn_dim=16,
                        decoder_ffn_dim=16,
                    )
                )
            ),
            "its attention is not T5's",
        ),
    ]
    for llm, reason in refused:
        with pytest.raises(ModelError, match=rf"FlexAttention is not for a .*{reason}"):
            install(llm, "flex")
        install(llm)  # by itself it is not chosen
        assert attention_name(llm.model) == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_gradients_on_a_gpu_are_those_of_masks(packed: bool) -> None:
    """Of the input and of all weights, the table of biases too."""
    gradients = []
    for flex in (False, True):
        llm = tiny_t5("eager").cuda()
        if flex:
            install(llm, "flex")
        batch = batch_of(300, packed=packed).to(torch.device("cuda"))
        embeds = llm.embed(batch.input_ids).detach().requires_grad_()
        hidden = states(llm, batch, embeds)
        generator = torch.Generator().manual_seed(2)
        weights = torch.randn(hidden.shape, generator=generator).cuda()
        wanted = [embeds, *(each for each in llm.model.parameters() if each.requires_grad)]
        gradients.append(torch.autograd.grad((hidden * weights).sum(), wanted, allow_unused=True))
    for masks, flexed in zip(*gradients, strict=True):
        assert (masks is None) == (flexed is None)
        if masks is not None:
            assert float((flexed - masks).norm()) <= 1e-4 * float(masks.norm()) + 1e-6
