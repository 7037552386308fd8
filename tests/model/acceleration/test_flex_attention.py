"""Attention for CUDA, proven on a CPU: FlexAttention and its masks, and which attention is chosen.

FlexAttention has no backward pass on a CPU: its gradients are a test for GPUs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.helpers.tiny_architectures import mappings, tiny
from vlm_tune.compat import attention_name, set_attention
from vlm_tune.config.model import Llm, Scratch
from vlm_tune.data.batch import Batch
from vlm_tune.errors import ModelError
from vlm_tune.model.acceleration import flex_attention
from vlm_tune.model.acceleration.flex_attention import (
    BLOCK,
    CudaAttention,
    attend_by_flex,
    interval_block_mask,
)
from vlm_tune.model.acceleration.install import install, running, uninstall
from vlm_tune.model.acceleration.interval_attention import IntervalAttention
from vlm_tune.model.language.attention import MaskedAttention
from vlm_tune.model.language.causal import CausalLLM
from vlm_tune.model.language.masks import tree_mask
from vlm_tune.model.language.registry import LLMS
from vlm_tune.model.pretrained.language_model import scratch_llm


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a CPU stand for the GPU, where FlexAttention runs as plain torch code."""
    monkeypatch.setattr(flex_attention, "DEVICE", "cpu")
    monkeypatch.setattr(flex_attention, "device_reason", lambda device: None)
    monkeypatch.setattr(flex_attention, "WIDTHS", (1, 256))


def random_rows(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`visible_until` and positions of two random joined rows: branches, packing and padding."""
    generator = torch.Generator().manual_seed(seed)

    def below(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    ends, places = torch.zeros(2, 2, length, dtype=torch.int64).unbind()
    for row in range(2):
        begin, filled = 0, length if row == 0 else max(1, length - below(max(length // 2, 1)))
        while begin < filled:
            end = min(filled, begin + below(max(filled // 2, 1)))
            fork = begin + below(end - begin)
            ends[row, begin:fork] = end
            places[row, begin:fork] = torch.arange(fork - begin)
            at = fork
            while at < end:
                stop = min(end, at + below(max((end - fork) // 3, 1)))
                ends[row, at:stop] = stop
                places[row, at:stop] = torch.arange(stop - at) + fork - begin
                at = stop
            begin = end
    return ends, places


@pytest.mark.parametrize("length", [1, 127, 128, 300, 640])
@pytest.mark.parametrize("kind", ["all", "sliding", "chunked"])
def test_a_block_mask_is_the_mask_of_the_tree(length: int, kind: str) -> None:
    """Pair by pair, and block by block as torch finds them in a mask of [L, L]."""
    for seed in range(4):
        ends, positions = random_rows(length, seed)
        wanted = tree_mask(ends)
        first = None
        if kind == "sliding":
            first = positions - 100 + 1
            wanted &= (positions[:, :, None] - positions[:, None] < 100)[:, None]
        elif kind == "chunked":
            first = positions // 90 * 90
            wanted &= (positions[:, :, None] // 90 == positions[:, None] // 90)[:, None]
        ours = interval_block_mask(ends, positions, first)
        assert torch.equal(create_mask(ours.mask_mod, 2, 1, length, length, "cpu"), wanted)
        theirs = create_block_mask(ours.mask_mod, 2, 1, length, length, "cpu", BLOCK)
        # No block is left out that has a pair, none is called full that lacks one.
        assert not bool(((theirs.to_dense() > 0) & (ours.to_dense() == 0)).any())
        assert bool((ours.full_kv_num_blocks <= theirs.full_kv_num_blocks).all())
        assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
        if kind == "all":
            for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_blocks_that_no_token_sees_are_skipped() -> None:
    """Each of ten branches of two blocks computes its own and the prefix of two."""
    ends = torch.full((1, 22 * BLOCK), 22 * BLOCK)
    for branch in range(10):
        begin = (2 + 2 * branch) * BLOCK
        ends[:, begin : begin + 2 * BLOCK] = begin + 2 * BLOCK
    assert int((interval_block_mask(ends).to_dense() > 0).sum()) == 3 + 10 * (2 * 2 + 3)
    plain = torch.arange(22 * BLOCK)[None]
    windowed = interval_block_mask(torch.full_like(ends, 22 * BLOCK), plain, plain - BLOCK + 1)
    assert int((windowed.to_dense() > 0).sum()) == 22 + 21


def rows_of(joined: bool) -> Batch:
    """Two rows of text: branches, packing and padding, or one sample each and padding."""
    ids = torch.randint(10, 90, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 9:] = False
    batch = Batch(
        ["a", "b"],
        ids,
        mask,
        torch.zeros_like(mask),
        ids.masked_fill(~mask, -100),
        torch.zeros(0, dtype=torch.int64),
    )
    if joined:
        batch.visible_until = torch.tensor(
            [[12] * 4 + [8] * 4 + [12] * 4, [5] * 5 + [9] * 4 + [0] * 3]
        )
        batch.positions = torch.tensor(
            [[0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7], [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]
        )
    return batch


def tiny_decoder(name: str) -> Any:
    """A tiny decoder by its config's name; its windows and chunks are three tokens."""
    kind, model = next(
        (kind, model)
        for layout, kind, model in mappings()
        if layout == "causal" and kind.__name__ == f"{name}Config"
    )
    network = tiny(kind, model, "causal")
    for size in ("sliding_window", "attention_chunk_size"):
        if getattr(network.config, size, None):
            setattr(network.config, size, 3)
    return network


def hidden(llm: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return llm.supervised(llm.embed(batch.input_ids), batch)[0]


@pytest.mark.parametrize(
    "name",
    ["Llama", "Gemma2", "Gemma3Text", "Llama4Text", "Mistral", "OPT", "Phi3", "GPTNeoX", "Granite"],
)
def test_decoders_attend_as_by_masks(
    name: str, as_on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Branches, packing, padding, windows, chunks, groups of heads, caps and other scales."""
    llm = LLMS["causal"](tiny_decoder(name))
    assert isinstance(llm, CausalLLM)
    wanted = {joined: hidden(llm, rows_of(joined)) for joined in (False, True)}
    capped = getattr(llm.model.config, "attn_logit_softcapping", None)
    if not capped:
        set_attention(llm.model.config, "sdpa")
    install(llm)
    attention = llm.attention
    if isinstance(attention, IntervalAttention):
        attention = attention.elsewhere
    assert isinstance(attention, CudaAttention) and attention.reason is None
    llm.attention = attention
    masks: list[Any] = []
    real = attention.mask

    def noted(*given: Any, **named: Any) -> Any:
        masks.append(real(*given, **named))
        return masks[-1]

    monkeypatch.setattr(attention, "mask", noted)
    for shortest, joined in ((1, True), (1, False), (13, True), (13, False)):
        attention.shortest = shortest
        ours = hidden(llm, rows_of(joined))
        assert float((ours - wanted[joined]).abs().max()) <= 1e-5 * float(ours.abs().max())
    kinds = [type(next(iter(m.values())) if isinstance(m, dict) else m).__name__ for m in masks]
    windowed = capped or name in ("Gemma3Text", "Llama4Text", "Mistral")
    # Rows of one sample need no mask where no window and no cap is in the way.
    assert kinds == ["BlockMask", "BlockMask" if windowed else "Tensor", "Tensor", "Tensor"]
    if not windowed:
        assert masks[1].shape == masks[3].shape == (1, 1, 1, 1)
    uninstall(llm)
    assert attention_name(llm.model) == ("eager" if capped else "sdpa")
    assert type(llm.attention) is MaskedAttention


def test_padding_is_seen_by_no_gradient(as_on_cuda: None) -> None:
    """A plain causal attention over rows padded on the right gives the gradients of masks."""
    torch.manual_seed(0)
    llm = LLMS["causal"](tiny_decoder("Llama"))
    assert isinstance(llm, CausalLLM)
    batch = rows_of(joined=False)

    def gradient() -> torch.Tensor:
        embeds = llm.embed(batch.input_ids).detach().requires_grad_()
        states = llm.supervised(embeds, batch)[0]
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
        (wanted,) = torch.autograd.grad((states * weights).sum(), embeds)
        return wanted

    by_masks = gradient()
    set_attention(llm.model.config, "sdpa")
    install(llm)
    llm.attention = CudaAttention(None)
    ours = gradient()
    assert torch.allclose(ours, by_masks, atol=1e-5) and not bool(ours[1, 9:].any())


def test_a_batch_has_one_mask_for_each_kind_of_layer(as_on_cuda: None) -> None:
    llm = LLMS["causal"](tiny_decoder("Gemma2"))
    # Longer than two blocks, with a window of three tokens.
    ends, positions = torch.full((1, 600), 600), torch.arange(600)[None]
    masks = CudaAttention(None).mask(
        llm.model, ends > 0, ends, positions, torch.float32, 600, joinable=True
    )
    blocks = {kind: int((mask.to_dense() > 0).sum()) for kind, mask in masks.items()}
    assert blocks == {"full_attention": 15, "sliding_attention": 9}


def test_it_is_traced_for_cuda_without_a_gpu() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        query, key = (
            torch.empty(2, 4, 300, 16, device="cuda"),
            torch.empty(2, 2, 300, 16, device="cuda"),
        )
        ends = torch.full((2, 300), 300, device="cuda")
        positions = torch.arange(300, device="cuda").expand(2, -1)
        masks = interval_block_mask(ends), interval_block_mask(ends, positions, positions - 7)
        for mask in masks:
            for cap in (None, 3.0):
                out = attend_by_flex(query, key, key, mask, None, cap)
                assert out.device.type == "cuda" and out.shape == (2, 300, 4, 16)


@pytest.mark.slow
def test_compiled_blocks_take_other_batches_without_being_compiled_again(as_on_cuda: None) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    llm = LLMS["causal"](tiny_decoder("Gemma2"))
    assert isinstance(llm, CausalLLM)
    install(llm)
    layer: Any = llm.model.model.layers[0]
    counter = CompileCounterWithBackend("eager")
    layer.compile(dynamic=True, backend=counter)
    rotary: Any = llm.model.model.rotary_emb
    counts = []
    for length in (140, 300, 400):
        ends, positions = random_rows(length, length)
        masks = CudaAttention(None, 1).mask(
            llm.model, ends > 0, ends, positions, torch.float32, length, joinable=True
        )
        states = torch.randn(2, length, 32)
        given = {
            "attention_mask": masks["sliding_attention"],
            "position_embeddings": rotary(states, positions),
            "position_ids": positions,
        }
        with torch.no_grad():
            compiled = layer(states, **given)
            with torch.compiler.set_stance("force_eager"):
                plain = layer(states, **given)
        assert torch.allclose(compiled, plain, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Llama4Text"])
def test_gradients_on_a_gpu_are_those_of_masks(name: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4}
    ends, positions = (each.cuda() for each in random_rows(300, 1))
    gradients = []
    for flex in (False, True):
        torch.manual_seed(0)
        kind = {"Llama": "llama", "Gemma2": "gemma2", "Llama4Text": "llama4_text"}[name]
        config = CONFIG_MAPPING[kind](
            vocab_size=96,
            num_hidden_layers=2,
            num_key_value_heads=2,
            intermediate_size=96,
            **sizes,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").cuda()
        llm = CausalLLM(model)
        if flex:
            install(llm, "flex")
        mask = llm.attention.mask(
            model, ends > 0, ends, positions, torch.float32, 300, joinable=True
        )
        embeds = torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(1))
        embeds = embeds.cuda().requires_grad_()
        states = model.base_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(2)).cuda()
        weights *= (ends > 0)[..., None]
        gradients.append(torch.autograd.grad((states * weights).sum(), embeds)[0])
    assert float((gradients[1] - gradients[0]).norm()) <= 1e-4 * float(gradients[0].norm())


# --- the choice -------------------------------------------------------------------------------


def built(model_type: str, attention: str = "auto", **sizes: Any) -> Any:
    """A tiny model from scratch, by the recipe's `attention`."""
    kind = "seq2seq" if model_type in ("t5", "bart") else "causal"
    scratch = Scratch(model_type=model_type, config=sizes)
    llm = Llm(kind=kind, scratch=scratch, attention=attention)  # type: ignore[arg-type]

    class Ids:
        pad_token_id, eos_token_id, bos_token_id = 0, 1, 2

    return scratch_llm(llm, scratch, Ids(), 96)


WIDTH = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA2 = {**WIDTH, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32}


NEO = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}


@pytest.mark.parametrize(
    ("model_type", "sizes", "wanted"),
    [
        ("llama", {**WIDTH, "intermediate_size": 32}, "sdpa"),
        ("gemma2", GEMMA2, "eager"),
        ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2}, "eager"),
        ("mpt", {"d_model": 32, "n_layers": 1, "n_heads": 2}, "eager"),
        ("gpt_neo", NEO, "eager"),
        ("t5", {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 32}, "sdpa"),
    ],
)
def test_a_gpu_gets_the_attention_that_the_model_supports(
    model_type: str, sizes: dict[str, Any], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attention_name(built(model_type, **sizes)) == "eager"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert attention_name(built(model_type, **sizes)) == wanted
    assert attention_name(built(model_type, "eager", **sizes)) == "eager"
    if wanted == "sdpa":
        assert attention_name(built(model_type, "sdpa", **sizes)) == "sdpa"
    else:
        with pytest.raises(ModelError, match=r"attention: sdpa is not for a .*: set auto or eager"):
            built(model_type, "sdpa", **sizes)


def test_the_recipe_names_the_attention() -> None:
    sizes = {**WIDTH, "intermediate_size": 32}
    for name in ("eager", "sdpa"):
        llm = CausalLLM(built("llama", name, **sizes))
        install(llm, name)  # type: ignore[arg-type]
        assert type(llm.attention) is MaskedAttention and not llm.supports_intervals
        assert attention_name(llm.model) == name
        assert f"model.llm.attention is {name}" in str(running(llm, torch.bfloat16))
    llm = CausalLLM(built("llama", "flex", **sizes))
    install(llm, "flex")
    assert isinstance(llm.attention, IntervalAttention)
    assert isinstance(llm.attention.elsewhere, CudaAttention)
    assert llm.attention.elsewhere.shortest == 1
    for model_type, more, reason in (
        ("llama", {**sizes, "attention_dropout": 0.1}, "its config has attention_dropout"),
        ("llama", {**sizes, "head_dim": 8}, "heads are 8 wide, and not 16 to 256"),
        ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2}, "not one of transformers'"),
    ):
        with pytest.raises(ModelError, match=f"FlexAttention is not for a .*{reason}"):
            install(CausalLLM(built(model_type, **more)), "flex")
    t5 = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 32}
    with pytest.raises(ModelError, match=r"FlexAttention is not for a T5.*drops weights"):
        install(LLMS["seq2seq"](built("t5", **t5)), "flex")


def test_the_log_says_how_a_gpu_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    llm = CausalLLM(built("llama", "sdpa", **WIDTH, intermediate_size=32))
    install(llm)
    attention = CudaAttention(None)
    monkeypatch.setattr(flex_attention.importlib.util, "find_spec", lambda name: None)
    assert attention.words(llm.model, device) == (
        "sdpa, causal without a mask; joined rows by masks (flex: Triton is not installed)"
    )
    monkeypatch.setattr(flex_attention.importlib.util, "find_spec", lambda name: object())
    assert attention.words(llm.model, device) == (
        "flex in joined rows of 512 tokens or more, else sdpa, causal without a mask"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "(flex: the GPU's compute capability is below 8.0)" in attention.words(llm.model, device)


@pytest.mark.parametrize("layout", ["causal", "seq2seq"])
def test_sdpa_gives_the_hidden_states_and_gradients_of_eager(layout: Any) -> None:
    """Over the masks of joined and padded rows, and T5's relative bias."""
    names = ["Llama", "Gemma3Text", "Llama4Text", "GPT2"] if layout == "causal" else ["T5", "Bart"]
    for name in names:
        kind, model = next(
            (kind, model)
            for at, kind, model in mappings()
            if at == layout and kind.__name__ == f"{name}Config"
        )
        llm = LLMS[layout](tiny(kind, model, layout))
        for joined in (False, True) if llm.unjoined is None else (False,):
            batch = rows_of(joined)
            if layout == "seq2seq":
                batch.labels = batch.input_ids.flip(1)
            if joined and layout == "seq2seq":
                batch.visible_until = batch.positions = None
                batch.samples = torch.tensor([[0] * 5 + [1] * 7, [0] * 4 + [1] * 5 + [2] * 3])
                batch.label_samples = torch.tensor([[0] * 6 + [1] * 6, [0] * 3 + [1] * 9])
            both = []
            for attention in ("eager", "sdpa"):
                for module in llm.model.modules():
                    if hasattr(module, "config"):
                        set_attention(module.config, attention)
                embeds = llm.embed(batch.input_ids).detach().requires_grad_()
                states = llm.supervised(embeds, batch)[0]
                weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
                (gradient,) = torch.autograd.grad((states * weights).sum(), embeds)
                both.append((states.detach(), gradient))
            for one, other in zip(*both, strict=True):
                assert float((one - other).abs().max()) <= 1e-5 * float(one.abs().max()), name
