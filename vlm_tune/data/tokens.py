"""Segments become token ids; labels, masks and image slots are final when they leave this file.

`causal_layout` puts everything in the input and the trained segments in the labels; `seq2seq_layout` puts what comes
before a trained segment in the encoder and the segment in the labels; `branch_layout` joins rows that share an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example, InputSpec, Media, Segment
from vlm_tune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEMO = 100_000


class TextEncoder:
    """A tokenizer of which plain text can never make a control token.

    Text goes through a copy that splits special tokens into ordinary pieces; control tokens are looked up by name.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError("needs a fast tokenizer (tokenizer.json)", source=str(tokenizer.name_or_path))
        self.tokenizer = tokenizer
        self._plain = type(backend).from_str(backend.to_str())
        self._plain.encode_special_tokens = True
        self._plain.no_padding()
        self._plain.no_truncation()
        # SentencePiece-style tokenizers put a space before every text they are given; a segment that begins with
        # that same space must not carry it twice.
        tokens = self._plain.encode("a", add_special_tokens=False).tokens
        self._adds_space = bool(tokens) and tokens[0].startswith("\u2581")
        self._memo: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        """Ids of plain text; whatever it holds, none of them is a control token."""
        ids = self._memo.get(text)
        if ids is None:
            given = text[1:] if self._adds_space and text.startswith(" ") else text
            ids = self._plain.encode(given, add_special_tokens=False).ids if given else []
            if len(self._memo) < MEMO:
                self._memo[text] = ids
        return ids

    def control(self, name: str) -> int:
        """The id of a control token; `bos` and `eos` are the tokenizer's own. Raises `DataError` if it has none."""
        own = {"bos": self.tokenizer.bos_token, "eos": self.tokenizer.eos_token}
        token = own.get(name, name)
        found = self.tokenizer.get_vocab().get(str(token)) if token is not None else None
        if found is None:
            raise DataError(
                f"the template's control token {name!r} is not in the tokenizer {self.tokenizer.name_or_path!r}: "
                "choose the chat format the model was made with",
                source="data.template",
            )
        return found

    def segment(self, segment: Segment, spec: InputSpec) -> list[int]:
        """Ids of one segment; a media item takes its slots, filled with the padding id."""
        if segment.kind == "media":
            return [spec.pad_id] * spec.tokens_per_image
        payload = str(segment.payload)
        return [self.control(payload)] if segment.kind == "control" else self.text(payload)


def _example(conversation: Conversation, number: int, ids: list[int], labels: list[int], slots: list[bool], media: list[Media]) -> Example:
    return Example(
        id=conversation.id if number == 0 else f"{conversation.id}#{number}",
        input_ids=np.asarray(ids, dtype=np.int32),
        labels=np.asarray(labels, dtype=np.int32),
        image_mask=np.asarray(slots, dtype=bool),
        media=tuple(media),
        category=conversation.category,
    )


def causal_layout(conversation: Conversation, segments: Sequence[Segment], encoder: TextEncoder, spec: InputSpec) -> list[Example]:
    """One example: all segments in the input, the trained ones in the labels at their own places."""
    ids: list[int] = []
    labels: list[int] = []
    slots: list[bool] = []
    media: list[Media] = []
    turns = 0
    for index, segment in enumerate(segments):
        new = encoder.segment(segment, spec)
        ids += new
        labels += new if segment.trained else [IGNORE_INDEX] * len(new)
        slots += [segment.kind == "media"] * len(new)
        turns += segment.trained and (index == 0 or not segments[index - 1].trained)
        if isinstance(segment.payload, Media):
            media.append(segment.payload)
    return [replace(_example(conversation, 0, ids, labels, slots, media), questions=max(turns, 1))]


def seq2seq_layout(conversation: Conversation, segments: Sequence[Segment], encoder: TextEncoder, spec: InputSpec) -> list[Example]:
    """One example for each run of trained segments: all before it in the encoder, the run and the end token as labels.

    A conversation without a trained run (a prompt) gives one example with no labels.
    """
    ids: list[int] = []
    slots: list[bool] = []
    media: list[Media] = []
    out: list[Example] = []
    labels: list[int] = []

    def close() -> None:
        answer = labels if labels[-1] == spec.eos_id else [*labels, spec.eos_id]
        out.append(_example(conversation, len(out), list(ids), answer, list(slots), list(media)))
        ids.extend(labels)
        slots.extend([False] * len(labels))
        labels.clear()

    for segment in segments:
        new = encoder.segment(segment, spec)
        if segment.trained:
            labels += new
            continue
        if labels:
            close()
        ids += new
        slots += [segment.kind == "media"] * len(new)
        if isinstance(segment.payload, Media):
            media.append(segment.payload)
    if labels:
        close()
    return out or [_example(conversation, 0, ids, [], slots, media)]


def branch_layout(examples: Sequence[Example]) -> list[Example]:
    """Causal rows that share their media as one row: the common prefix once, then each row's rest as a branch.

    Positions restart after the prefix, so losses and gradients are those of the rows one by one. Rows that don't
    share all their media in a common prefix come back unchanged.
    """
    first = examples[0]
    if len(examples) < 2 or any(example.media != first.media for example in examples):
        return list(examples)
    shared = min(len(example.input_ids) for example in examples) - 1
    for example in examples:
        same = (example.input_ids[:shared] == first.input_ids[:shared]) & (example.labels[:shared] == IGNORE_INDEX)
        same &= example.image_mask[:shared] == first.image_mask[:shared]
        shared = min(shared, int(np.argmin(same)) if not same.all() else shared)
    # The first token of a branch is predicted by no token of the joined row, so it must carry no label.
    while shared and any(example.labels[shared] != IGNORE_INDEX for example in examples):
        shared -= 1
    if any(example.image_mask[shared:].any() for example in examples) or shared == 0:
        return list(examples)
    rests = [len(example.input_ids) - shared for example in examples]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(first, name)[:shared], *(getattr(example, name)[shared:] for example in examples)])

    return [
        replace(
            first,
            input_ids=joined("input_ids"),
            labels=joined("labels"),
            image_mask=joined("image_mask"),
            positions=np.concatenate([np.arange(shared), *(np.arange(shared, shared + rest) for rest in rests)]).astype(np.int32),
            branches=np.concatenate([np.zeros(shared), *(np.full(rest, k + 1) for k, rest in enumerate(rests))]).astype(np.int32),
            questions=sum(example.questions for example in examples),
        )
    ]


LAYOUTS = {"causal": causal_layout, "seq2seq": seq2seq_layout}
