"""Converts segments to examples with final token ids, labels, masks and image slots.

`causal_layout` puts everything in the input and the trained segments in the labels.
`seq2seq_layout` puts what comes before a trained segment in the encoder and the segment in the
labels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_tune.data.media_slots import slot_mask, slots_of
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example, InputSpec, Media, Segment
from vlm_tune.errors import DataError
from vlm_tune.quoting import quoted

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

MEMO = 10_000
"""Texts whose ids are kept, so that a template's and a question's are encoded once."""
MEMO_LENGTH = 200
"""Characters of the longest of them: long texts seldom repeat, and a server would keep them all."""
MEDIA_MARKS = ("<image>", "<video>", "<audio>")
"""Placeholders for media in some row formats; one that remains in a text is plain text."""


def _byte_tokens(described: dict[str, Any], tokenizer: Any) -> dict[int, int]:
    """The byte of each token that stands for one, in a tokenizer that falls back to bytes."""
    decoder = described.get("decoder") or {}
    kinds = [part["type"] for part in (decoder, *decoder.get("decoders", ())) if "type" in part]
    if "ByteFallback" not in kinds:
        return {}
    ids = {tokenizer.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
    return {token: byte for token, byte in ids.items() if token is not None}


class TextEncoder:
    """A tokenizer for which plain text never yields a control token.

    Text is encoded by a copy that splits special tokens into ordinary pieces; control tokens are
    looked up by name. Special tokens named in `words` are ordinary: a text may contain them, each
    as one id.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, words: Sequence[str] = ()) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                "needs a fast tokenizer (tokenizer.json)", source=str(tokenizer.name_or_path)
            )
        described = json.loads(backend.to_str())
        for token in described["added_tokens"]:
            token["special"] &= token["content"] not in words
        self._opening = _plain(type(backend), described)
        without = {
            **described,
            **{
                part: _without_prefix(described.get(part))
                for part in ("normalizer", "pre_tokenizer")
            },
        }
        self._inner = self._opening if without == described else _plain(type(backend), without)
        # Some tokenizers put a space before every text, some only before the first of the string. A
        # text after a control token shows which.
        opened, inner = (
            plain.encode("a", add_special_tokens=False).ids
            for plain in (self._opening, self._inner)
        )
        probe = backend.encode(f"{tokenizer.eos_token or ''}a", add_special_tokens=False).ids
        self._prefix_after_control = opened != inner and probe[-len(opened) :] == opened
        # T5's tokenizer splits at white space first, so its spaces are only the prefixes of words.
        self._spaces_are_prefixes = (
            self._inner.encode("a a", add_special_tokens=False).ids == inner + inner
        )
        special: set[Any] = {token["id"] for token in described["added_tokens"] if token["special"]}
        ordinary = [tokenizer.unk_token_id, *map(tokenizer.convert_tokens_to_ids, words)]
        self._controls = special.union(tokenizer.all_special_ids).difference(ordinary)
        self._bytes = _byte_tokens(described, self._opening)
        self._unknown: Any = tokenizer.unk_token_id
        self._own = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
        self._memo: dict[tuple[bool, str], list[int]] = {}
        self._names: re.Pattern[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": {}}

    def text(self, text: str, after: str | None = None) -> list[int]:
        """Ids of plain text; none of them is a control token, whatever the text contains.

        `after` is the kind of the previous segment (None: the text opens the string). A tokenizer
        that begins a string with a space does so where its own chat template would, and never
        inside a text.
        """
        opening = after is None or (after != "text" and self._prefix_after_control)
        ids = self._memo.get((opening, text))
        if ids is None:
            ids = self._encode(text, opening)
            if len(self._memo) < MEMO and len(text) <= MEMO_LENGTH:
                self._memo[opening, text] = ids
        return ids

    def first_tokens(self, text: str, count: int) -> str:
        """The beginning of a text, of at most `count` tokens.

        It is cut between tokens, and never inside a character.
        """
        offsets = self._opening.encode(text, add_special_tokens=False).offsets
        return text if len(offsets) <= count else text[: offsets[count][0]]

    def answer(self, text: str) -> list[int]:
        """Ids of a text that opens the decoder: a leading space replaces the tokenizer's prefix."""
        return self.text(text, "text" if text.startswith(" ") else None)

    def _encode(self, text: str, opening: bool) -> list[int]:
        if self._spaces_are_prefixes and not opening and (space := re.search(r"\s", text)):
            head = text[: space.start()]
            rest = text[space.start() :]
            return (self._encode(head, False) if head else []) + self._encode(rest, True)
        encoding = (self._opening if opening else self._inner).encode(
            text, add_special_tokens=False
        )
        controls = [
            place
            for token, place in zip(encoding.ids, encoding.offsets, strict=True)
            if token in self._controls
        ]
        if not controls:
            return encoding.ids
        # A vocabulary that lists its control tokens among the pieces (Unigram: T5) matches them in
        # plain text. Cut after their first character they become ordinary pieces.
        if len(text) == 1:
            return [] if self._unknown is None else [self._unknown]
        cuts = {
            cut
            for start, end in controls
            for cut in ((start + 1,) if end - start > 1 else (start, end))
            if 0 < cut < len(text)
        }
        pieces = pairwise([0, *sorted(cuts), len(text)])
        return [token for a, b in pieces for token in self._encode(text[a:b], opening and a == 0)]

    def is_control(self, token: int) -> bool:
        """Whether an id is that of a control token, which no text contains."""
        return token in self._controls

    def trailing_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that the last ids stand for, where a tokenizer has a token for each byte.

        Such a tokenizer decodes a run of them as a whole: if it is not UTF-8, then each of its
        bytes becomes U+FFFD.
        """
        backwards = (self._bytes.get(token) for token in reversed(ids))
        run = list(takewhile(lambda byte: byte is not None, backwards))
        return bytes(byte for byte in reversed(run) if byte is not None)

    def described(self) -> str:
        """Everything that the ids depend on, as text: the tokenizer and its BOS and EOS tokens."""
        return f"{self._opening.to_str()}{self._own}"

    def has(self, name: str) -> bool:
        """Whether the tokenizer has a token of this text."""
        return self._opening.token_to_id(name) is not None

    def control(self, name: str) -> int:
        """The id of a control token; `bos` and `eos` are the tokenizer's own.

        Raises `DataError` if the tokenizer has no such token.
        """
        token = self._own.get(name, name)
        token_id = self._opening.token_to_id(str(token)) if token is not None else None
        if token_id is None:
            raise DataError(
                f"the template's control token {quoted(name)} is not in the model's tokenizer: "
                "choose the chat format the model was trained with",
                source="data.template",
            )
        if token_id not in self._controls:
            self._controls.add(token_id)
            self._memo.clear()
            self._names = None
        return token_id

    def controls_in(self, text: str) -> list[str]:
        """Control tokens and media marks whose text occurs in a text, where they are plain text."""
        if self._names is None:
            names = {
                name for token in self._controls if (name := self._opening.id_to_token(token))
            } | set(MEDIA_MARKS)
            self._names = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
        return list(dict.fromkeys(self._names.findall(text)))

    def segment(self, segment: Segment, spec: InputSpec, after: str | None = None) -> list[int]:
        """Ids of one segment that follows one of kind `after`.

        A media item gives its slots, filled with the padding id, and what ends their rows, or its
        own ids.
        """
        if segment.ids is not None:
            return list(segment.ids)
        if isinstance(segment.payload, Media):
            slots = [spec.pad_id] * slots_of(segment.payload, spec.tokens_per_image)
            return self._with_row_ends(segment, slots) if segment.row_ends else slots
        payload = str(segment.payload)
        return [self.control(payload)] if segment.kind == "control" else self.text(payload, after)

    def _with_row_ends(self, segment: Segment, slots: Sequence[int]) -> list[int]:
        """An image's slots with the token behind each of their rows."""
        assert segment.row_ends is not None
        between, last = map(self.control, segment.row_ends)
        mask = slot_mask(segment, len(slots))
        left = iter(slots)
        ids = [next(left) if is_slot else between for is_slot in mask]
        return [*ids[:-1], last]


def _plain(kind: type[Tokenizer], described: dict[str, Any]) -> Tokenizer:
    plain = kind.from_str(json.dumps(described))
    plain.encode_special_tokens = True
    plain.no_padding()
    plain.no_truncation()
    return plain


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer of `tokenizer.json`, changed to put no space before a text."""
    if not isinstance(part, dict):
        return part
    part = dict(part)
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            part[name] = [inner for inner in map(_without_prefix, part[name]) if inner is not None]
    if part["type"] == "Metaspace":
        part["prepend_scheme"] = "never"
    elif part["type"] == "ByteLevel":
        part["add_prefix_space"] = False
    return None if part["type"] == "Prepend" else part


def _example(
    conversation: Conversation,
    number: int,
    ids: list[int],
    labels: list[int],
    slots: list[bool],
    media: list[Media],
) -> Example:
    return Example(
        id=conversation.id if number == 0 else f"{conversation.id}#{number}",
        input_ids=np.asarray(ids, dtype=np.int32),
        labels=np.asarray(labels, dtype=np.int32),
        image_mask=np.asarray(slots, dtype=bool),
        media=tuple(media),
        category=conversation.category,
    )


def causal_layout(
    conversation: Conversation, segments: Sequence[Segment], encoder: TextEncoder, spec: InputSpec
) -> list[Example]:
    """Lays a conversation out as one decoder example.

    The label of a token is the token that follows it, if that is trained. Labels are shifted
    here and nowhere else. Tokens after the last position that predicts a trained token are left
    out, as they have no effect. A prompt keeps all of its tokens.
    """
    ids: list[int] = []
    trained: list[bool] = []
    slots: list[bool] = []
    media: list[Media] = []
    turns = 0
    for index, segment in enumerate(segments):
        new = encoder.segment(segment, spec, segments[index - 1].kind if index else None)
        ids += new
        trained += [segment.trained] * len(new)
        slots += slot_mask(segment, len(new))
        turns += segment.trained and (index == 0 or not segments[index - 1].trained)
        if isinstance(segment.payload, Media):
            media.append(segment.payload)
    labels = [
        token if is_trained else IGNORE_INDEX
        for token, is_trained in zip(ids[1:], trained[1:], strict=True)
    ]
    while labels and labels[-1] == IGNORE_INDEX and turns:
        labels.pop()
    length = len(labels) if labels and turns else len(ids)
    labels += [IGNORE_INDEX] * (length - len(labels))
    return [
        replace(
            _example(conversation, 0, ids[:length], labels, slots[:length], media),
            questions=max(turns, 1),
        )
    ]


def seq2seq_layout(
    conversation: Conversation, segments: Sequence[Segment], encoder: TextEncoder, spec: InputSpec
) -> list[Example]:
    """Lays a conversation out as one encoder-decoder example for each run of trained segments.

    Everything before the run goes to the encoder; the run and the end token are the labels. A
    conversation without a trained run (a prompt) gives one example with no labels.
    """
    ids: list[int] = []
    slots: list[bool] = []
    media: list[Media] = []
    examples: list[Example] = []
    labels: list[int] = []
    answer_ids: list[int] = []

    def close() -> None:
        answer = labels if labels[-1] == spec.eos_id else [*labels, spec.eos_id]
        examples.append(
            _example(conversation, len(examples), list(ids), answer, list(slots), list(media))
        )
        ids.extend(answer_ids)
        slots.extend([False] * len(answer_ids))
        labels.clear()
        answer_ids.clear()

    for index, segment in enumerate(segments):
        new = encoder.segment(segment, spec, segments[index - 1].kind if index else None)
        if segment.trained:
            # The decoder's first text opens a string of its own.
            labels += (
                encoder.answer(str(segment.payload))
                if not labels and segment.kind == "text"
                else new
            )
            answer_ids += new
            continue
        if labels:
            close()
        ids += new
        slots += slot_mask(segment, len(new))
        if isinstance(segment.payload, Media):
            media.append(segment.payload)
    if labels:
        close()
    return examples or [_example(conversation, 0, ids, [], slots, media)]


LAYOUTS = {"causal": causal_layout, "seq2seq": seq2seq_layout}
