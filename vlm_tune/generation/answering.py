"""Answers to prompts by greedy or beam search; prompts about one image share its prefill.

Shapes: B rows, K branches of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from vlm_tune.data.batching.collate import Fetch, collate
from vlm_tune.data.packing import Tree, trees
from vlm_tune.data.types import Batch, Example
from vlm_tune.model.language.causal import CausalLLM
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.vlm import VisionLanguageNetwork

JOINED_PROMPTS = 1024
"""Most tokens of a row that joins prompts about one image."""


def answer_prompts(
    model: VisionLanguageNetwork,
    prompts: Sequence[Example],
    decoding: Decoding,
    *,
    fetch: Fetch,
    cached: bool = False,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Generates answers, in the order of the prompts.

    With a decoder and greedy search, prompts about one image are branches of one row, so the image
    is prefilled once.

    Args:
        model: the model, in eval mode.
        prompts: the output of `Processor.prompts`.
        decoding: the search, and the most new tokens.
        fetch: returns the pixels of a media item, or if `cached` the tower's features.
        cached: whether `fetch` returns features.
        batch_size: the approximate number of prompts in a batch.
        progress: called after each batch with the numbers of answered and of all prompts.
    """
    collated = {"fetch": fetch, "cached": cached}
    answers = [""] * len(prompts)
    done = 0
    for batch in _batches(prompt_rows(model, prompts, decoding), batch_size):
        rows = [tree.row for tree in batch]
        if any(row.visible_until is not None for row in rows):
            ids = _continued(model, rows, [tree.leaves for tree in batch], decoding, collated)
        else:
            left = model.llm.layout == "causal"
            plain = collate(rows, model.processor.spec, **collated, pad_left=left)
            ids = generate(model, plain.to(model.device), decoding)
        places = [place for tree in batch for place in tree.members]
        for place, answer_ids in zip(places, ids, strict=True):
            answers[place] = model.processor.decode(answer_ids)
        done += len(places)
        if progress:
            progress(done, len(prompts))
    return answers


@torch.inference_mode()
def generate(model: VisionLanguageNetwork, batch: Batch, decoding: Decoding) -> list[list[int]]:
    """Generates the new ids of each row, up to and excluding the first stop id.

    A decoder's rows must be padded on the left.
    """
    stops = model.processor.stop_ids
    pad = model.processor.spec.pad_id
    ids = model.llm.generate(model.embed(batch), batch.attention_mask, decoding, pad, stops)
    return [_up_to_stop(row, stops) for row in ids.tolist()]


def prompt_rows(
    model: VisionLanguageNetwork, prompts: Sequence[Example], decoding: Decoding
) -> list[Tree]:
    """Groups prompts into rows, sorted by length.

    Prompts that share an image are joined to one row if the model can continue its branches.
    """
    greedy = model.llm.layout == "causal" and decoding.num_beams == 1
    # Branches can't be continued with virtual tokens before every row, or with media that reach the
    # LLM other than in slots.
    joins = (
        greedy
        and model.llm.prompt is None
        and model.connector.fills_slots
        and not model.connector.needs_text
        and isinstance(model.llm, CausalLLM)
        and model.llm.unjoined is None
    )
    groups: dict[Any, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(prompt.media if joins and prompt.media else place, []).append(place)
    rows = [
        replace(tree, members=tuple(group[member] for member in tree.members))
        for group in groups.values()
        for tree in trees([prompts[place] for place in group], JOINED_PROMPTS)
    ]
    # Joined and plain rows need different functions, so they are not mixed in a batch.
    return sorted(
        rows,
        key=lambda tree: (tree.row.visible_until is None, len(tree.row.input_ids), tree.row.id),
    )


@torch.inference_mode()
def _continued(
    model: VisionLanguageNetwork,
    rows: Sequence[Example],
    leaves: Sequence[tuple[int, ...]],
    decoding: Decoding,
    collated: dict[str, Any],
) -> list[list[int]]:
    """Generates the new ids of every branch of joined rows, up to and excluding the first stop id.

    Args:
        model: the model.
        rows: joined rows.
        leaves: for each row the positions of the last tokens of its branches.
        decoding: the most new tokens.
        collated: further arguments of `collate`.
    """
    assert isinstance(model.llm, CausalLLM)
    batch = collate(rows, model.processor.spec, **collated).to(model.device)
    most = max(map(len, leaves))
    stops = model.processor.stop_ids
    padded = [[*row, *[row[-1]] * (most - len(row))] for row in leaves]
    ids = model.llm.continue_branches(
        model.embed(batch),
        batch,
        torch.tensor(padded, device=model.device),
        decoding.max_new_tokens,
        stops,
    ).tolist()
    return [
        _up_to_stop(branch, stops)
        for branches, row_leaves in zip(ids, leaves, strict=True)
        for branch in branches[: len(row_leaves)]
    ]


def _up_to_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """The ids before the first stop id."""
    return ids[: next((place for place, token in enumerate(ids) if token in stops), len(ids))]


def _batches(rows: Sequence[Tree], size: int) -> Iterator[list[Tree]]:
    """Yields batches of consecutive rows, all joined or all plain, with about `size` prompts."""
    batch: list[Tree] = []
    for tree in rows:
        full = sum(len(other.members) for other in batch) >= size
        if batch and (
            full or (batch[0].row.visible_until is None) != (tree.row.visible_until is None)
        ):
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch
