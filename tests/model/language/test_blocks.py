"""Tokens that see each other both ways, drawn: images, and prompts whose answers are branches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from vlm_tune.data.batch import Batch
from vlm_tune.data.types import IGNORE_INDEX
from vlm_tune.model.language.masks import image_blocks, layer_masks, prompt_blocks, tree_mask

KINDS = ["sliding_attention", "full_attention"]


def row(slots: list[int], labels: list[int], positions: list[int], seen: list[int]) -> Batch:
    ids = torch.arange(len(slots))[None]
    targets = torch.tensor([labels])
    return Batch(
        ["a"],
        ids,
        torch.tensor([seen]) > 0,
        torch.tensor([slots]).bool(),
        torch.where(targets > 0, targets, IGNORE_INDEX),
        torch.zeros(0, dtype=torch.int64),
        positions=torch.tensor([positions]),
        visible_until=torch.tensor([seen]),
    )


def drawn(batch: Batch, blocks: Any, window: int) -> dict[str, list[str]]:
    """What each token sees, for layers with a window and without."""
    config: Any = SimpleNamespace(layer_types=KINDS, sliding_window=window)
    config.get_text_config = lambda: config
    assert batch.visible_until is not None and batch.positions is not None
    tree = tree_mask(batch.visible_until)
    positions = batch.positions
    masks: Any = layer_masks(config, tree, positions, positions, torch.float32, blocks)
    return {
        kind: ["".join("1" if see == 0 else "." for see in query) for query in masks[kind][0, 0]]
        for kind in KINDS
    }


def test_images_see_themselves_as_far_as_a_window_goes() -> None:
    """Two images of two and three tokens; a window of two tokens."""
    batch = row([0, 1, 1, 0, 1, 1, 1], [0] * 7, [*range(7)], [7] * 7)
    blocks = image_blocks(batch)
    assert blocks.queries.tolist() == [[0, 1, 1, 0, 2, 2, 2]]
    assert drawn(batch, blocks, 2) == {
        "full_attention": [
            "1......",
            "111....",
            "111....",
            "1111...",
            "1111111",
            "1111111",
            "1111111",
        ],
        "sliding_attention": [
            "1......",
            "111....",
            ".11....",
            "..11...",
            "...1111",
            "....111",
            ".....11",
        ],
    }


def test_prompts_see_themselves_whatever_the_window_and_answers_do_not() -> None:
    """A prompt of three tokens with two answers, then a packed one with an answer of one token.

    The prompt's last token stands at the beginning of both answers.
    """
    labels = [0, 0, 5, 6, 7, 8, 0, 9, 0]
    positions = [0, 1, 2, 3, 2, 3, 0, 1, 0]
    batch = row([0] * 9, labels, positions, [6, 6, 4, 4, 6, 6, 8, 8, 0])
    blocks = prompt_blocks(batch)
    assert blocks.keys.tolist() == [[1, 1, 1, 0, 0, 0, 2, 2, 0]]
    assert drawn(batch, blocks, 2) == {
        "full_attention": [
            "111......",
            "111......",
            "111......",
            "1111.....",
            "11..1....",
            "11..11...",
            "......11.",
            "......11.",
            "........1",
        ],
        "sliding_attention": [
            "111......",
            "111......",
            "111......",
            "..11.....",
            "11..1....",
            "....11...",
            "......11.",
            "......11.",
            "........1",
        ],
    }


def test_equal_prompts_whose_answers_are_still_to_come_see_one_last_token() -> None:
    batch = row([0] * 4, [0] * 4, [0, 1, 2, 2], [4, 4, 3, 4])
    assert drawn(batch, prompt_blocks(batch), 2)["sliding_attention"] == [
        "111.",
        "111.",
        "111.",
        "11.1",
    ]
