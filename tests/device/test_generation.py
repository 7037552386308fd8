"""Answers on a GPU: by a KV cache of fixed size, and without a wait in a decode step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.counted_device import CountedDevice, counted_device, to_counted_device
from tests.helpers.pretended_gpu import CUDA, pretended
from tests.helpers.tiny_models import built, parsed, rows_of
from vlm_tune.data.batch import Batch
from vlm_tune.data.types import Example
from vlm_tune.generation import continuing
from vlm_tune.generation.answering import prompt_answers
from vlm_tune.generation.answers import Answer
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.generation.continuing import Continuation
from vlm_tune.generation.picking import Picker
from vlm_tune.model.language import attention, kv_cache, seq2seq
from vlm_tune.model.language.attention import MaskedPrefill, StaticPrefill
from vlm_tune.model.language.causal import CausalLLM
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.language.kv_cache import is_static_cache

Recipes = Callable[..., str]
both_llms = pytest.mark.parametrize("llm", ["causal", "seq2seq"])
SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "seed": 3}
DECODINGS = {
    "greedy": Decoding(20),
    "drawn": Decoding(20, **SAMPLED, logprobs=True, repetition_penalty=1.2),
}


def sharp(recipe_text: str) -> VisionLanguageModel:
    """A model of random weights whose answers differ from prompt to prompt."""
    model = built(parsed(recipe_text)).eval()
    for parameter in model.llm.model.parameters():
        parameter.data *= 3
    return model


def prompts_of(model: VisionLanguageModel, recipe_text: str) -> list[Example]:
    """Three prompts, two of them about one image."""
    return model.processor.prompts(rows_of(parsed(recipe_text))[:3])


def answers(
    model: VisionLanguageModel, prompts: Sequence[Example], decoding: Decoding
) -> list[Answer]:
    return prompt_answers(model, prompts, decoding, fetch=model.processor.images)


@both_llms
@pytest.mark.parametrize("how", DECODINGS)
def test_answers_are_those_of_a_cpu(
    llm: str, how: str, tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with caches that grow, and with more decoder layers than encoder layers."""
    text = tiny_recipe(llm)
    if how == "drawn":
        monkeypatch.setattr(kv_cache, "ROOM", 3)
        text = text.replace("num_layers: 2, num_decoder_layers: 1", "num_decoder_layers: 3")
    model = sharp(text)
    prompts = prompts_of(model, text)
    expected = answers(model, prompts, DECODINGS[how])
    with pretended(model, CUDA):
        there = answers(model, prompts, DECODINGS[how])
    assert [answer.ids for answer in there] == [answer.ids for answer in expected]
    assert len({answer.ids for answer in there}) > 1
    for one, other in zip(there, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("room", [64, 1, 2])
@pytest.mark.parametrize("share", [0.0, 2.0], ids=["none-dropped", "dropped-at-once"])
def test_a_static_cache_gives_what_a_growing_one_gives(
    share: float, room: int, tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where branches that have ended are dropped, one after the other, and the cache grows."""
    monkeypatch.setattr(kv_cache, "ROOM", room)
    llm = sharp(tiny_recipe("causal")).llm
    assert isinstance(llm, CausalLLM)
    monkeypatch.setattr(continuing, "SPARED", share)
    ids = torch.arange(22).view(2, 11) * 7 % 90 + 3
    until = torch.full((2, 11), 11)
    until[:, 4:7], until[:, 7:9] = 7, 9
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 4, 5, 4, 5]).expand(2, -1)
    batch = _batch(ids, positions, until)
    leaves = torch.tensor([[6, 8, 10], [6, 8, 10]])
    monkeypatch.setattr(llm, "attention", _Chosen())
    outcomes = []
    for prefill in (MaskedPrefill, StaticPrefill):
        _Chosen.prefill_class = prefill
        with torch.inference_mode():
            branches = llm.branches(llm.embed(ids), batch, leaves, 8)
        picker = Picker(llm, Decoding(8, logprobs=True), [], None, torch.device("cpu"))
        # Many ids end an answer, so that answers end one after the other.
        continuation = Continuation(branches, picker, list(range(2, 400, 6)), 8)
        counts = list(continuation.run(look_every=1))
        assert continuation.logprobs is not None
        outcomes.append((counts, continuation.ids.tolist(), continuation.logprobs.chosen))
    (counts, grown, of_grown), (_, fixed, of_fixed) = outcomes
    assert len(counts) > 2 and (counts, grown) == (outcomes[1][0], fixed)
    torch.testing.assert_close(of_fixed, of_grown, rtol=1e-4, atol=1e-5)
    prefill: Any = branches.prefill
    assert is_static_cache(prefill.cache)
    assert prefill.cache.layers[1].keys.shape[-2] == len(prefill.columns) <= 11 + 3 * 7


@both_llms
def test_a_static_cache_has_no_room_for_tokens_that_never_come(
    llm: str, tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer of 5 tokens costs the same whatever `max_new_tokens` allows."""
    text = tiny_recipe(llm)
    model = sharp(text)
    rooms = []

    def noted(config: Any, length: int, device: torch.device) -> Any:
        rooms.append(length)
        return kv_cache.static_cache(config, length, device)

    monkeypatch.setattr(attention, "static_cache", noted)
    monkeypatch.setattr(seq2seq, "static_cache", noted)
    monkeypatch.setattr(continuing.Continuation, "_unfinished", lambda self, count: 0)
    (prompt,) = model.processor.prompts(rows_of(parsed(text))[:1])
    with pretended(model, CUDA):
        for allowed in (200, 10_000):
            answers(model, [prompt], Decoding(allowed))
    assert rooms[0] == rooms[1] <= len(prompt.input_ids) + 64


class _Chosen:
    """An attention whose prefill is of a chosen class."""

    prefill_class: Any

    def prefill(self, *args: Any) -> Any:
        *shared, steps, blocks = args
        own_steps = [steps] if self.prefill_class is StaticPrefill else []
        return self.prefill_class(*shared, *own_steps, blocks)


def _batch(ids: torch.Tensor, positions: torch.Tensor, until: torch.Tensor) -> Batch:
    whole = torch.ones_like(ids, dtype=torch.bool)
    return Batch(
        ["a", "b"], ids, whole, ~whole, ids, ids[:0, 0], positions=positions, visible_until=until
    )


# --- waits -------------------------------------------------------------------------------------


def counted_waits(
    text: str, decoding: Decoding, monkeypatch: pytest.MonkeyPatch
) -> tuple[CountedDevice, list[Answer]]:
    """Answers on the counted device."""
    model = sharp(text)
    prompts = prompts_of(model, text)
    # No id ends an answer, so that all have as many tokens as they may have.
    monkeypatch.setattr(type(model.processor), "stop_ids", [399])
    nothing: Any = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    nothing.param_groups[0]["params"] = []
    with counted_device(monkeypatch) as device:
        to_counted_device(model, nothing)
        there = answers(model, prompts, decoding)
    return device, there


@both_llms
@pytest.mark.parametrize("settings", [{}, {**SAMPLED, "logprobs": True}], ids=["greedy", "drawn"])
def test_no_decode_step_waits(
    llm: str, settings: dict[str, Any], tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host looks every 16 steps, and waits once then; for a larger cache it does not."""
    monkeypatch.setattr(kv_cache, "ROOM", 10)
    monkeypatch.setenv("VLM_TUNE_KERNELS", "reference")
    text = tiny_recipe(llm)
    waits = {}
    for tokens in (2, 5, 33):
        device, there = counted_waits(text, Decoding(tokens, **settings), monkeypatch)
        assert {len(answer.ids) for answer in there} == {tokens}
        waits[tokens] = device.waits
    assert len(waits[5]) == len(waits[2]), waits[5][-6:]
    batches = 2 if llm == "causal" else 1  # joined rows, and a plain one
    assert len(waits[33]) == len(waits[2]) + 2 * batches, waits[33]


@pytest.mark.gpu
@both_llms
@pytest.mark.parametrize("how", DECODINGS)
def test_answers_of_a_real_gpu_are_those_of_a_cpu(llm: str, how: str, tiny_recipe: Recipes) -> None:
    text = tiny_recipe(llm)
    model = sharp(text)
    prompts = prompts_of(model, text)
    expected = answers(model, prompts, DECODINGS[how])
    model.to("cuda")
    there = answers(model, prompts, DECODINGS[how])
    assert [answer.ids for answer in there] == [answer.ids for answer in expected]


@pytest.mark.gpu
@both_llms
def test_a_real_gpu_is_not_waited_for_in_a_decode_step(
    llm: str, tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch itself raises at each synchronisation but those in which the host looks."""
    text = tiny_recipe(llm)
    model = sharp(text).to("cuda")
    run, look = Continuation.run, Continuation._unfinished

    def watched(continuation: Continuation, look_every: int) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from run(continuation, look_every)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def allowed(continuation: Continuation, count: int) -> int:
        torch.cuda.set_sync_debug_mode("default")
        unfinished = look(continuation, count)
        torch.cuda.set_sync_debug_mode("error")
        return unfinished

    monkeypatch.setattr(Continuation, "run", watched)
    monkeypatch.setattr(Continuation, "_unfinished", allowed)
    assert len(answers(model, prompts_of(model, text), DECODINGS["drawn"])) == 3
