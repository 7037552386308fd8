"""Attention by intervals.

As near to the truth as plain products, for every shape, and taken where it computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import softmax
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.helpers.tiny_models import (
    LORA_TUNE,
    batch_of,
    built,
    examples_of,
    loss_and_gradients,
    parsed,
    tuned_by,
    wake_adapters,
    with_tune,
)
from vlm_tune.api import sft
from vlm_tune.data.batch import Batch
from vlm_tune.data.prepare.run import prepare
from vlm_tune.errors import ModelError
from vlm_tune.generation.continuing import Continuation
from vlm_tune.generation.picking import Picker
from vlm_tune.kernels import KVCache
from vlm_tune.kernels import interval_attention as attend
from vlm_tune.model.acceleration import interval_attention
from vlm_tune.model.acceleration.install import install, uninstall
from vlm_tune.model.acceleration.interval_attention import unsupported_reason
from vlm_tune.model.language.causal import CausalLLM
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.language.masks import additive, tree_mask

pytestmark = pytest.mark.usefixtures("either_path")

WIDE = "hidden_size: 64, head_dim: 32"


def ends_of(rows: int, length: int) -> torch.Tensor:
    """A trunk that all see, branches of some tokens, and in the second row padding."""
    generator = torch.Generator().manual_seed(length)
    ends = torch.full((rows, length), length, dtype=torch.int32)
    for row in ends:
        start = length // 3
        while start < length:
            stop = min(start + int(torch.randint(1, 20, (1,), generator=generator)), length)
            row[start:stop] = stop
            start = stop
    ends[1] = torch.where(torch.arange(length) < length - 3, ends[1].clamp(max=length - 3), 0)
    return ends


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """[B, L, H, D] by products and a softmax over the whole of [L, L]."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    weights = softmax(
        scores.masked_fill(~tree_mask(ends), -1e30),
        -1,
        dtype=torch.promote_types(query.dtype, torch.float32),
    )
    return (weights.to(query.dtype) @ value).transpose(1, 2)


@pytest.mark.parametrize(
    ("heads", "groups", "length", "width"),
    [
        (4, 2, 37, 64),
        (3, 3, 128, 32),
        (9, 3, 133, 64),
        (2, 1, 200, 96),
        (2, 2, 5, 128),
        (2, 2, 64, 256),
    ],
)
def test_outputs_and_gradients_are_as_near_as_plain_products(
    heads: int, groups: int, length: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = [
        torch.randn(2, length, count, width, generator=generator).bfloat16()
        for count in (heads, groups, groups, heads)
    ]
    ends = ends_of(2, length)
    by_form: dict[str, list[torch.Tensor]] = {}
    for name, dtype in (
        ("true", torch.float64),
        ("plain", torch.bfloat16),
        ("ours", torch.bfloat16),
    ):
        inputs = [each.to(dtype).transpose(1, 2).detach().requires_grad_() for each in drawn[:3]]
        query, key, value = inputs
        out = (
            attend(query, key, value, ends, width**-0.5)[0]
            if name == "ours"
            else plain(query, key, value, ends)
        )
        # What stands at padding is nobody's.
        real = (ends > 0)[:, :, None, None]
        (out * real).backward(drawn[3].to(dtype))
        by_form[name] = [
            (out * real).double(),
            *(each.grad.double() for each in inputs if each.grad is not None),
        ]
    for true, theirs, ours in zip(*by_form.values(), strict=True):
        assert (
            float((ours - true).norm())
            <= 1.4 * float((theirs - true).norm())
            < 0.02 * float(true.norm())
        )


@pytest.mark.parametrize(
    ("length", "width", "dtype"),
    [(40, 32, torch.float32), (133, 24, torch.float64), (300, 16, torch.float32)],
)
def test_in_fp32_it_is_what_plain_products_give(
    length: int, width: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = [
        torch.randn(2, length, count, width, generator=generator, dtype=dtype).transpose(1, 2)
        for count in (6, 2, 2)
    ]
    flow, ends = (
        torch.randn(2, length, 6, width, generator=generator, dtype=dtype),
        ends_of(2, length),
    )
    real, outputs = (ends > 0)[:, :, None, None], []
    for form in (plain, lambda *given: attend(*given, width**-0.5)[0]):
        inputs = [each.detach().clone().requires_grad_() for each in drawn]
        out = form(*inputs, ends) * real
        out.backward(flow)
        outputs.append([out, *(each.grad for each in inputs)])
    for wanted, ours in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_nothing_of_queries_times_keys_is_kept_for_the_backward_pass() -> None:
    saved: list[torch.Tensor] = []
    query, key, value = (torch.randn(2, count, 500, 16, requires_grad=True) for count in (4, 2, 2))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        out = attend(query, key, value, ends_of(2, 500), 0.25)[0]
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved
    }
    assert (
        sum(sizes.values()) <= sum(each.nbytes for each in (query, key, value, out)) + 2 * 500 * 8
    )


@pytest.mark.parametrize("branches", [4, 70])
def test_branches_that_grow_see_what_they_saw_and_their_own_tokens(branches: int) -> None:
    """Four tokens after each branch, against one attention over all keys with a mask.

    Half of the branches are kept from the third token on.
    """
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(torch.bfloat16)

    rows, heads, groups, length, width = 2, 6, 2, 11, 32
    cached = [
        (draw(rows, groups, length, width), draw(rows, groups, length, width)) for _ in range(2)
    ]
    seen = torch.rand(rows, branches, length, generator=generator) < 0.7
    seen[..., 0] = True
    grown, whole = KVCache(), [cached[0], cached[1]]
    for key, value in cached:
        grown.prefill(key, value)
    grown.branch(seen)
    nothing = torch.zeros(rows, branches, dtype=torch.int32)
    for token in range(4):
        if token == 2:
            places = torch.stack(
                [
                    torch.randperm(branches, generator=generator)[: branches // 2]
                    for _ in range(rows)
                ]
            )
            branches //= 2
            grown.select(places)
            seen = seen[torch.arange(rows)[:, None], places]
        seen = torch.cat([seen, torch.eye(branches, dtype=torch.bool).expand(rows, -1, -1)], -1)
        for layer in range(2):
            query, key, value = (
                draw(rows, heads, branches, width),
                *(draw(rows, groups, branches, width) for _ in range(2)),
            )
            attended, _ = attend(query, key, value, nothing, width**-0.5, grown.handle)
            whole[layer] = tuple(
                torch.cat([before, new], 2)
                for before, new in zip(whole[layer], (key, value), strict=True)
            )  # type: ignore[assignment]
            keys, values = (
                each.double().repeat_interleave(heads // groups, 1) for each in whole[layer]
            )
            scores = (query.double() @ keys.transpose(2, 3) * width**-0.5).masked_fill(
                ~seen[:, None], -torch.inf
            )
            wanted = (scores.softmax(-1) @ values).transpose(1, 2)
            assert float((attended - wanted).norm() / wanted.norm()) < 1e-2


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient() -> None:
    query, key, value = (
        torch.randn(1, 2, 40, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    ends = torch.full((1, 40), 40, dtype=torch.int32)
    ends[0, :] = torch.where(torch.arange(40) < 20, 20, 0)
    out = attend(query, key, value, ends, 1.0)[0]
    out.sum().backward()
    assert bool((out[:, 20:] == 0).all()) and bool(out[:, :20].any())
    for gradient in (query.grad, key.grad, value.grad):
        assert (
            gradient is not None
            and bool((gradient[:, :, 20:] == 0).all())
            and bool(gradient.isfinite().all())
        )


@pytest.mark.parametrize("group", ["none", "image"])
def test_a_decoder_gives_the_same_loss_and_gradients_by_it(
    group: str, tiny_recipe: Callable[..., str]
) -> None:
    text = with_tune(tiny_recipe("causal", precision="bf16"), LORA_TUNE).replace(
        "hidden_size: 32", WIDE
    )
    recipe = parsed(text, data__group=group)
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    examples = examples_of(prepare(recipe.data, recipe.data.train, model.processor, seed=0))
    batch = batch_of(model, examples)
    assert (batch.visible_until is not None) == (group == "image")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.llm.supports_intervals
        by_intervals = loss_and_gradients(model, [batch])
        uninstall(model.llm)
        assert not model.llm.supports_intervals
        expected, wanted = loss_and_gradients(model, [batch])
        loss, gradients = by_intervals
    assert abs(float(loss - expected)) <= 2e-2 * abs(float(expected))
    for name, gradient in wanted.items():
        assert float((gradients[name] - gradient).norm()) <= 0.1 * float(gradient.norm()) + 1e-4, (
            name
        )


def test_training_attends_by_it(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, ...]] = []
    real = interval_attention.interval_attention

    def seen(query: torch.Tensor, *rest: Any) -> Any:
        if query.requires_grad:
            taken.append(tuple(query.shape))
        return real(query, *rest)

    monkeypatch.setattr(interval_attention, "interval_attention", seen)
    text = tiny_recipe("causal", precision="bf16").replace("hidden_size: 32", WIDE)
    sft(parsed(text, train__gradient_checkpointing=True))
    # Two layers, four steps, in the forward pass and again in the backward pass of checkpointed
    # blocks.
    assert len(taken) == 2 * 4 * 2
    assert (tmp_path / "run" / "report.html").is_file()
    taken.clear()
    sft(parsed(text, output=str(tmp_path / "fp32"), train__precision="fp32"))
    assert len(taken) == 2 * 4


def test_what_it_does_not_compute_stays_with_transformers(tiny_recipe: Callable[..., str]) -> None:
    llm = built(parsed(tiny_recipe("causal").replace("hidden_size: 32", WIDE))).llm
    assert llm.supports_intervals
    for name, value in (
        ("sliding_window", 16),
        ("attention_dropout", 0.1),
        ("layer_types", ["sliding_attention"]),
    ):
        before = getattr(llm.model.config, name, None)
        setattr(llm.model.config, name, value)
        assert name.removesuffix("s") in str(unsupported_reason(llm.model)) or "layers" in str(
            unsupported_reason(llm.model)
        )
        setattr(llm.model.config, name, before)
    assert not built(parsed(tiny_recipe("seq2seq"))).llm.supports_intervals


def family(kind: str) -> Any:
    """A tiny decoder of a family, whose layers attend to all earlier tokens by plain products."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind in ("gpt2", "opt"):
        sizes |= {"attn_pdrop": 0.0, "word_embed_proj_dim": 64, "dropout": 0.0}
    else:
        sizes |= {"intermediate_size": 96, "num_key_value_heads": 1, "head_dim": 32}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CONFIG_MAPPING[kind](vocab_size=200, max_position_embeddings=256, **sizes, **ids)
    config.sliding_window = None
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "phi",
        "phi3",
        "gpt2",
        "opt",
        "gpt_neox",
        "olmo2",
        "granite",
        "cohere",
        "mixtral",
    ],
)
def test_decoders_of_many_families_attend_by_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family(kind)
    embeds, ends = torch.randn(2, 40, 64), torch.full((2, 40), 40)
    ends[:, 20:30] = 30
    positions = torch.arange(40) - 10 * (torch.arange(40) >= 30)

    def hidden(mask: torch.Tensor) -> torch.Tensor:
        given = embeds.to(model.dtype)
        with torch.no_grad():
            return model.base_model(
                inputs_embeds=given,
                attention_mask=mask,
                position_ids=positions[None].expand(2, -1),
                use_cache=False,
            ).last_hidden_state.float()

    true = hidden(additive(tree_mask(ends), torch.float32))
    model.bfloat16()
    theirs = hidden(additive(tree_mask(ends), torch.bfloat16))
    model.config._attn_implementation = "sdpa"
    llm = CausalLLM(model)
    install(llm)
    assert llm.supports_intervals
    calls: list[Any] = []
    real = interval_attention.interval_attention
    monkeypatch.setattr(
        interval_attention,
        "interval_attention",
        lambda *given: calls.append(given) or real(*given),
    )
    ours = hidden(ends.int()[:, None, None])
    assert len(calls) == 2
    assert (
        float((ours - true).norm())
        <= 1.2 * float((theirs - true).norm())
        < 0.02 * float(true.norm())
    )


def test_a_decoder_that_takes_another_attention_is_refused(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is built, before anything is trained."""
    real = interval_attention.attend

    def other(fallback: Any, module: Any, query: Any, *given: Any, **more: Any) -> Any:
        if interval_attention.is_interval_mask(given[2]):
            return query.transpose(1, 2), None
        return real(fallback, module, query, *given, **more)

    monkeypatch.setattr(interval_attention, "attend", other)
    with pytest.raises(ModelError, match="a LlamaForCausalLM can't be trained here"):
        built(parsed(tiny_recipe("causal")))


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "opt", "phi3", "nemotron"])
def test_branches_of_many_families_are_continued_as_by_masks(kind: str) -> None:
    """Nemotron's layers do not pass a cache on: it goes by masks by itself."""
    llm = CausalLLM(family(kind))
    ends = torch.full((2, 20), 20)
    ends[:, 10:15] = 15
    batch = Batch(
        ["a", "b"],
        torch.randint(3, 200, (2, 20)),
        torch.ones(2, 20, dtype=torch.bool),
        torch.zeros(2, 20, dtype=torch.bool),
        torch.zeros(2, 20, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        positions=(torch.arange(20) - 5 * (torch.arange(20) >= 15)).expand(2, -1),
        visible_until=ends,
    )
    leaves = torch.tensor([[14, 19], [14, 19]])

    def answer() -> torch.Tensor:
        with torch.inference_mode():
            branches = llm.branches(llm.embed(batch.input_ids), batch, leaves, 6)
            picker = Picker(llm, Decoding(6), [], None, torch.device("cpu"))
            continuation = Continuation(branches, picker, [2], 6)
            assert list(continuation.run(look_every=1))
            return continuation.ids

    wanted = answer()
    install(llm)
    assert llm.supports_intervals
    assert torch.equal(answer(), wanted)
