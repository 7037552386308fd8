"""Answers to prompts; prompts about one image share its prefill.

Prompts are continued by `Continuation`. Where a model can't be, and in a beam search, transformers'
`generate` answers them.

Shapes: B rows, K branches of a row, N new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vlm_tune.data.batch import Batch
from vlm_tune.data.batching.collate import Fetch, collate
from vlm_tune.data.packing import Tree, trees
from vlm_tune.data.types import Example
from vlm_tune.generation.answers import Answer, AnswerReader
from vlm_tune.generation.constraints import JsonConstraint, json_constraint
from vlm_tune.generation.continuing import Continuation, look_interval
from vlm_tune.generation.generating import generated
from vlm_tune.generation.picking import Picker, draws, penalised_ids
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
    """The texts of `prompt_answers`."""
    answers = prompt_answers(
        model,
        prompts,
        decoding,
        fetch=fetch,
        cached=cached,
        batch_size=batch_size,
        progress=progress,
    )
    return [answer.text for answer in answers]


def prompt_answers(
    model: VisionLanguageNetwork,
    prompts: Sequence[Example],
    decoding: Decoding,
    *,
    fetch: Fetch,
    cached: bool = False,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Answer]:
    """Generates answers, in the order of the prompts.

    With a decoder, prompts about one image and the draws of one prompt are branches of one row, so
    that what they share is prefilled once.

    Args:
        model: the model, in eval mode.
        prompts: the output of `Processor.prompts`.
        decoding: how answers are generated.
        fetch: returns the pixels of a media item, or if `cached` the tower's features.
        cached: whether `fetch` returns features.
        batch_size: the approximate number of answers in a batch.
        progress: called after each batch with the numbers of answered and of all prompts.
        seeds: a seed for each prompt, in place of the decoding's.
    """
    # Draws are answers of their own, to the same prompt; beams come from one search.
    samples = decoding.num_return_sequences if decoding.samples else 1
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    reader = reader_of(model, decoding)
    constraint = json_constraint(model.processor, decoding, model.llm.vocabulary)
    job = _Job(model, repeated, decoding, reader, samples, fetch, cached, constraint, seeds)
    groups: list[list[Answer]] = [[] for _ in repeated]
    done = 0
    rows = prompt_rows(model, repeated, decoding)
    alone = [_is_crowded(model, repeated[tree.members[0]], decoding) for tree in rows]
    for batch in _batches(rows, alone, batch_size):
        places = [place for tree in batch for place in tree.members]
        answers = job.continued(batch) if continues(model, decoding) else job.generated(batch)
        for place, group in zip(places, answers, strict=True):
            groups[place] = group
        done += len(places)
        if progress:
            progress(done // samples, len(prompts))
    whole = [
        [answer for group in groups[start : start + samples] for answer in group]
        for start in range(0, len(groups), samples)
    ]
    return [replace(first, alternatives=tuple(others)) for first, *others in whole]


def reader_of(model: VisionLanguageNetwork, decoding: Decoding) -> AnswerReader:
    """Reads the answers to prompts of a model, in the decoding's mode of reasoning."""
    processor = model.processor.thinking(decoding.enable_thinking)
    return AnswerReader(processor, decoding.stop_strings)


def continues(model: VisionLanguageNetwork, decoding: Decoding) -> bool:
    """Whether prompts are continued by `Continuation`, and not by transformers' `generate`.

    Media have to reach the LLM in slots alone.
    """
    return decoding.num_beams == 1 and model.llm.uncontinued is None and model.connector.fills_slots


def shares_prefix(model: VisionLanguageNetwork, decoding: Decoding) -> bool:
    """Whether one prefill of a decoder serves prompts that continue differently, or later turns."""
    return model.llm.shares_beginnings and _branches(model, decoding)


def _branches(model: VisionLanguageNetwork, decoding: Decoding) -> bool:
    """Whether one prefill of a decoder serves several continuations of a prompt at least."""
    return (
        model.llm.layout == "causal"
        and continues(model, decoding)
        and not model.connector.needs_text
    )


def prompt_rows(
    model: VisionLanguageNetwork, prompts: Sequence[Example], decoding: Decoding
) -> list[Tree]:
    """Groups prompts into rows, sorted by length.

    Prompts that share an image, and equal prompts, are joined to one row if the model can continue
    its branches. A prompt that leaves too few positions for all new tokens gets a row of its own.
    """
    joins = _branches(model, decoding)
    by_media = shares_prefix(model, decoding)
    groups: dict[Any, list[int]] = {}
    for place, prompt in enumerate(prompts):
        whole = (prompt.media, prompt.input_ids.tobytes())
        shared = prompt.media or whole if by_media else whole
        joined = joins and not _is_crowded(model, prompt, decoding)
        groups.setdefault(shared if joined else place, []).append(place)
    rows = [
        replace(tree, members=tuple(group[member] for member in tree.members))
        for group in groups.values()
        for tree in trees([prompts[place] for place in group], JOINED_PROMPTS)
    ]
    # Plain rows would be filled up to as many branches as joined rows have.
    return sorted(
        rows,
        key=lambda tree: (tree.row.visible_until is None, len(tree.row.input_ids), tree.row.id),
    )


def _is_crowded(model: VisionLanguageNetwork, prompt: Example, decoding: Decoding) -> bool:
    """Whether a decoder has too few positions for all new tokens after a prompt.

    The answer may be as long as they allow. Beside longer rows it would end sooner, and beside
    shorter ones end theirs.
    """
    llm = model.llm
    if llm.layout != "causal" or llm.longest is None:
        return False
    # The last new token needs no position: it is not fed back.
    length = llm.virtual + len(prompt.input_ids) + decoding.max_new_tokens - 1
    return length > llm.longest


@dataclass(frozen=True)
class _Job:
    """A call for answers, which come in batches; `prompts` holds each prompt `samples` times."""

    model: VisionLanguageNetwork
    prompts: Sequence[Example]
    decoding: Decoding
    reader: AnswerReader
    samples: int
    fetch: Fetch
    cached: bool
    constraint: JsonConstraint | None
    seeds: Sequence[int] | None

    def batch(self, rows: Sequence[Tree], *, pad_left: bool = False) -> Batch:
        """The rows as a batch on the model's device."""
        batch = collate(
            [tree.row for tree in rows],
            self.model.processor.spec,
            fetch=self.fetch,
            cached=self.cached,
            pad_left=pad_left,
        )
        return batch.to(self.model.device)

    def picker(self, rows: Sequence[Tree]) -> Picker:
        """The picker of the branches; a row with fewer than others has its last one again."""
        members = filled([tree.members for tree in rows])
        numbers = [[self.draws(place) for place in row] for row in members]
        llm = self.model.llm
        return Picker(
            llm,
            self.decoding,
            [
                [penalised_ids(llm, self.prompts[place], self.decoding) for place in row]
                for row in members
            ],
            np.array(numbers) if self.decoding.samples else None,
            self.model.device,
            self.constraint,
        )

    def draws(self, place: int) -> np.ndarray | None:
        """The numbers by which the answer at a place is drawn."""
        prompt, sample = divmod(place, self.samples)
        return draws(self.decoding, sample, None if self.seeds is None else self.seeds[prompt])

    def continued(self, rows: Sequence[Tree]) -> list[list[Answer]]:
        """The answers of rows, in the order of their members."""
        continuation = continuation_of(
            self.model, self.batch(rows), rows, self.decoding, self.picker(rows), self.reader
        )
        for _ in continuation.run(look_interval(self.model.device)):
            pass
        ids = continuation.ids.tolist()
        logprobs = None if continuation.logprobs is None else continuation.logprobs.cpu()
        return [
            [self.reader.answer(ids[row][k], None if logprobs is None else logprobs[row, k])]
            for row, tree in enumerate(rows)
            for k in range(len(tree.members))
        ]

    def generated(self, rows: Sequence[Tree]) -> list[list[Answer]]:
        """As `continued`, by transformers; of a beam search all beams to return."""
        batch = self.batch(rows, pad_left=self.model.llm.layout == "causal")
        ids, logprobs = generated(self.model, batch, self.decoding, self.picker(rows), self.reader)
        answers = [
            self.reader.answer(row, None if logprobs is None else logprobs[place])
            for place, row in enumerate(ids)
        ]
        beams = len(ids) // len(rows)
        return [answers[start : start + beams] for start in range(0, len(answers), beams)]


@torch.inference_mode()
def continuation_of(
    model: VisionLanguageNetwork,
    batch: Batch,
    rows: Sequence[Tree],
    decoding: Decoding,
    picker: Picker,
    reader: AnswerReader,
    *,
    embeds: torch.Tensor | None = None,
    **options: Any,
) -> Continuation:
    """Prefills rows, joined or plain, whose branches are then continued.

    Args:
        model: the model.
        batch: the rows, padded on the right.
        rows: the rows with the last tokens of their branches.
        decoding: how answers are generated.
        picker: chooses the branches' tokens.
        reader: reads their texts.
        embeds: the embeddings of the batch, or of the tokens that a cache lacks; computed where
            not given.
        **options: further arguments of `CausalLLM.branches`.
    """
    leaves = filled([tree.leaves for tree in rows])
    left = model.llm.positions_left(batch)
    new_tokens = decoding.max_new_tokens if left is None else min(decoding.max_new_tokens, left)
    branches = model.llm.branches(
        model.embed(batch) if embeds is None else embeds,
        batch,
        torch.tensor(leaves, device=model.device),
        new_tokens,
        **options,
    )
    ends = reader.ends if decoding.stop_strings else None
    return Continuation(branches, picker, model.processor.stop_ids, new_tokens, ends)


def filled(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows, filled up with their last element to the length of the longest."""
    most = max(map(len, rows))
    return [[*row, *[row[-1]] * (most - len(row))] for row in rows]


def _batches(rows: Sequence[Tree], alone: Sequence[bool], size: int) -> Iterator[list[Tree]]:
    """Yields batches of consecutive rows, all joined or all plain, with about `size` prompts.

    Rows that are to be `alone` are batches by themselves.
    """
    batch: list[Tree] = []
    closed = False
    for tree, by_itself in zip(rows, alone, strict=True):
        full = sum(len(other.members) for other in batch) >= size
        joined = tree.row.visible_until is not None
        if batch and (
            full or closed or by_itself or joined != (batch[0].row.visible_until is not None)
        ):
            yield batch
            batch = []
        batch.append(tree)
        closed = by_itself
    if batch:
        yield batch
