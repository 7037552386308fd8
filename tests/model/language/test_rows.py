"""Rows that join, leave and are repeated give the hidden states that each gives by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from tests.helpers.tiny_architectures import LLMS, Layout, tiny
from vlm_tune.data.batch import Batch
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.row_buffers import order_after

# Learned positions, sliding windows, layers of several kinds, latent attention, many heads.
DECODERS = ("GPT2", "OPT", "Mistral", "Gemma3Text", "Qwen3", "DeepseekV3", "GPTNeoX")
ENCODER_DECODERS = ("T5", "UMT5", "LongT5")
LENGTHS = (7, 3, 12, 5)


def tiny_llm(name: str, layout: Layout) -> LanguageModel:
    """A tiny language model of a config class."""
    kind = getattr(transformers, f"{name}Config")
    mapping = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    }[layout]
    return LLMS[layout](tiny(kind, mapping[kind], layout)).eval()


def batch_of(ids: torch.Tensor) -> Batch:
    """Rows of text without padding."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    none = torch.zeros_like(mask)
    return Batch(["a"] * len(ids), ids, mask, none, ids, torch.zeros(0, dtype=torch.int64))


def by_itself(llm: LanguageModel, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states [steps + 1, E] of a prompt's last token and of the tokens after it."""
    leaves = torch.tensor([[len(prompt) - 1]])
    branches = llm.branches(llm.embed(prompt[None]), batch_of(prompt[None]), leaves, 99)
    steps = [branches.hidden, *(branches.step(token.view(1, 1)) for token in tokens)]
    return torch.stack([hidden[0, 0] for hidden in steps])


class Script:
    """Rows that are continued by the tokens of a script, and what they should give."""

    def __init__(self, llm: LanguageModel) -> None:
        generator = torch.Generator().manual_seed(0)

        def random_ids(count: int) -> torch.Tensor:
            return torch.randint(10, 90, (count,), generator=generator)

        self.llm = llm
        self.rows = llm.rows()
        self.prompts = [random_ids(length) for length in LENGTHS]
        # A table of positions may be short.
        self.most = 80 if llm.longest is None else llm.longest - max(LENGTHS)
        self.tokens = [random_ids(self.most) for _ in LENGTHS]
        self.expected = [
            by_itself(llm, *pair) for pair in zip(self.prompts, self.tokens, strict=True)
        ]
        # For each row its prompt, and the number of its tokens so far.
        self.state: list[list[int]] = []

    def join(self, prompts: list[int], shared: int = 0) -> None:
        """Prefills prompts; their first tokens are those of a row's prefix where `shared`."""
        prefix = self.rows.prefix(self.state[0][0], shared) if shared else None
        size = max(len(self.prompts[place]) for place in prompts) - shared
        ids = torch.zeros(len(prompts), size, dtype=torch.int64)
        for row, place in enumerate(prompts):
            ids[row, : len(self.prompts[place]) - shared] = self.prompts[place][shared:]
        lengths = [len(self.prompts[place]) - shared for place in prompts]
        hidden = self.rows.join(self.llm.embed(ids), lengths, [prefix] * len(prompts))
        self.state += [[place, 0] for place in prompts]
        self.assert_same(hidden, self.state[-len(prompts) :])

    def step(self, count: int = 1) -> None:
        """Decode steps."""
        for _ in range(count):
            tokens = torch.stack([self.tokens[place][n] for place, n in self.state])
            hidden = self.rows.step(tokens)
            for row in self.state:
                row[1] += 1
            self.assert_same(hidden, self.state)

    def repeat(self, row: int) -> None:
        """A row twice more."""
        self.rows.repeat(row, 2)
        self.state += [list(self.state[row]) for _ in range(2)]

    def drop(self, *rows: int) -> None:
        """Drops rows."""
        self.state = [self.state[row] for row in self.rows.drop(rows)]
        assert len(self.rows) == len(self.state)

    def assert_same(self, hidden: torch.Tensor, state: list[list[int]]) -> None:
        expected = torch.stack([self.expected[place][n] for place, n in state])
        assert float((hidden - expected).abs().max()) <= 2e-4 * float(expected.abs().max())


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
@torch.inference_mode()
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    layout: Any = "causal" if name in DECODERS else "seq2seq"
    llm = tiny_llm(name, layout)
    assert llm.unbatched is None
    script = Script(llm)
    script.join([0, 1])
    script.step(2)
    if script.rows.takes_prefixes:
        script.join([0], shared=4)
    script.join([2])
    script.step()
    script.repeat(1)
    script.step(2)
    script.drop(0, 2)
    script.step(2)
    script.join([3])
    # Buffers of 64 columns are full: a decoder's grow, and T5's move what is still seen.
    script.step(min(30, script.most - 20))
    script.join([0])
    script.drop(*range(len(script.state) - 1))
    script.step(min(40, script.most - script.state[0][1]))
    script.drop(0)
    script.join([1, 2])
    script.step(2)


def test_rows_whose_rotation_the_longest_one_chooses_are_not_together() -> None:
    llm = tiny_llm("Mistral", "causal")
    llm.model.config.rope_parameters["rope_type"] = "longrope"
    assert llm.unbatched == (
        "its rotary positions (longrope) are those of the longest row beside it"
    )


@pytest.mark.parametrize("name", ["Mistral", "T5"])
@torch.inference_mode()
def test_a_row_of_nan_reaches_no_later_one_in_its_place(name: str) -> None:
    llm = tiny_llm(name, "causal" if name in DECODERS else "seq2seq")
    rows = llm.rows()
    good = torch.ones(1, 12, llm.width)
    rows.join(good, [12], [None])
    rows.join(good[:, :9] * torch.nan, [9], [None])
    assert rows.step(torch.tensor([1, 2])).isnan().any()
    rows.drop([1])
    rows.join(good[:, :6], [6], [None])
    assert not rows.step(torch.tensor([1, 2])).isnan().any()


@pytest.mark.parametrize("name", ["Mistral", "T5"])
@torch.inference_mode()
def test_a_long_row_after_many_short_ones_gets_no_room_for_many(name: str) -> None:
    layout: Any = "causal" if name in DECODERS else "seq2seq"
    llm = tiny_llm(name, layout)
    rows: Any = llm.rows()
    rows.join(torch.zeros(32, 4, llm.width), [4] * 32, [None] * 32)
    rows.drop(range(1, 32))
    rows.join(torch.zeros(1, 500, llm.width), [500], [None])
    buffers = rows.buffers if layout == "causal" else rows.cross
    assert buffers.layers[0][0].shape[::2] == (4, 500)
    assert (buffers.room_of_rows, buffers.room_of_columns) == (4, 500)
    # Many short ones after it have no more room than they need either.
    rows.drop([1])
    rows.join(torch.zeros(31, 4, llm.width), [4] * 31, [None] * 31)
    assert (buffers.room_of_rows, buffers.room_of_columns) == (32, 128)


def test_the_last_rows_take_the_places_of_dropped_ones() -> None:
    assert order_after(6, [1, 4]) == [0, 5, 2, 3]
    assert order_after(3, [2]) == [0, 1]
    assert order_after(2, [0, 1]) == []
    assert order_after(4, [0, 1, 2]) == [3]
