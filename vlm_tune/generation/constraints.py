"""Answers that have to be JSON of a schema: which tokens they may continue with.

Shapes: B rows, K branches of a row, n tokens so far, R = B x K, V vocabulary.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from vlm_tune.data.chat.processor import Processor
from vlm_tune.errors import ArgumentError
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.language.json_schema import Mark, json_grammar
from vlm_tune.quoting import quoted, reason_of

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

SPACES = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
"""Llama's decoder, for llguidance, which does not know the one of T5's tokenizers.

Both decode a token alone to the same text, but for the space that an answer begins with.
"""

_tokenizers: WeakKeyDictionary[Any, dict[tuple[int, ...], LLTokenizer]] = WeakKeyDictionary()
_lock = threading.Lock()


class JsonConstraint:
    """A schema and a tokenizer: which tokens each of many answers may continue with."""

    def __init__(self, processor: Processor, decoding: Decoding, vocabulary: int) -> None:
        """Makes the constraint of a call; answers begin with no token.

        Args:
            processor: The model's processor.
            decoding: The settings, with a `json_schema`.
            vocabulary: V, the number of rows of the model's embedding.

        Raises:
            ArgumentError: The tokenizer has no token that an answer could begin with.
        """
        marks = _reasoning_marks(processor)
        self.grammar = json_grammar(decoding.json_schema, marks)
        self.stop_ids = processor.stop_ids
        # For a text that a tokenizer can't write, llguidance lets the unknown token follow.
        ids = set(processor.tokenizer.all_special_ids)
        self.special_ids = sorted(ids.difference(*marks) if marks else ids)
        self.tokenizer = _tokenizer(processor, vocabulary)
        self.first = _matcher(self.tokenizer, self.grammar)
        beginnings = self.allowed(self.first, [], vocabulary).nonzero()[0].tolist()
        # The grammar lets any answer begin with a space: then what follows it is checked.
        if all(self.tokenizer.decode_str([token]) == " " for token in beginnings):
            matcher = self.first.deep_copy()
            matcher.consume_token(beginnings[0])
            self.allowed(matcher, beginnings[:1], vocabulary)

    def allowed(self, matcher: LLMatcher | None, ids: Sequence[int], vocabulary: int) -> np.ndarray:
        """A mask bool[V] of the tokens that may follow the answer `ids`, whose state a matcher has.

        Without a matcher the answer has ended. Raises `ArgumentError` if there is no such token.
        """
        if matcher is None:
            mask = np.zeros(vocabulary, bool)
            mask[self.stop_ids] = True
            return mask
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, bitorder="little")[:vocabulary].astype(bool)
        mask = np.pad(mask, (0, vocabulary - len(mask)))
        mask[self.special_ids] = False
        mask[self.stop_ids] = matcher.is_accepting() or matcher.is_stopped()
        fault = matcher.get_error()
        if fault or not mask.any():
            raise ArgumentError(f"json_schema: {self._dead_end(ids, fault)}")
        return mask

    def _dead_end(self, ids: Sequence[int], fault: str) -> str:
        """The reason why nothing can follow an answer, of which a matcher may have said `fault`."""
        written = self.tokenizer.decode_str(list(ids))
        matcher = _matcher(_byte_tokenizer(), self.grammar)
        matcher.consume_tokens(list(written.encode()))
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        # A space alone leads no further.
        characters = {chr(byte) for byte in bits[:128].nonzero()[0]} - {" "}
        tokens = range(self.tokenizer.vocab_size)
        known = {self.tokenizer.decode_str([token])[:1] for token in tokens}
        if matcher.is_error() or characters & known:
            return f"no answer can follow it: {fault.partition(chr(10))[0]}"
        return (
            f"after {quoted(written.strip())} an answer continues with one of "
            f"{' '.join(sorted(characters))}, and the model's tokenizer has none of these "
            "characters"
        )


class JsonBranches:
    """Answers of B x K branches while they grow, each at its own place in the schema."""

    def __init__(self, constraint: JsonConstraint, rows: int, branches: int) -> None:
        """Begins with no token in any answer."""
        self.constraint = constraint
        self.count = 0
        # None where the answer has ended.
        self.matchers: list[list[LLMatcher | None]] = [
            [constraint.first.deep_copy() for _ in range(branches)] for _ in range(rows)
        ]

    def masked(self, scores: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        """Scores [R, V] with -inf for what can't follow the answers int64[B, K, n]."""
        masks: list[np.ndarray] = []
        for matchers, answers in zip(self.matchers, written.tolist(), strict=True):
            for place, ids in enumerate(answers):
                matcher = _after(matchers[place], ids[self.count :])
                matchers[place] = matcher
                masks.append(self.constraint.allowed(matcher, ids, scores.shape[-1]))
        self.count = written.shape[-1]
        allowed = torch.from_numpy(np.stack(masks)).to(scores.device)
        return scores.masked_fill(~allowed, -torch.inf)

    def select(self, places: torch.Tensor) -> None:
        """Drops all branches but those at `places` int64[B, K']."""
        self.matchers = [
            [matchers[place] for place in row]
            for matchers, row in zip(self.matchers, places.tolist(), strict=True)
        ]


def _after(matcher: LLMatcher | None, tokens: Sequence[int]) -> LLMatcher | None:
    """A matcher after further tokens; None where the answer has ended."""
    for token in tokens:
        # What can't follow fills up an answer that a stop string ended.
        if matcher is None or matcher.is_stopped() or not matcher.validate_tokens([token]):
            return None
        matcher.consume_token(token)
    return matcher


def _matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """The state of an answer without tokens; its errors do not quote the grammar."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False)
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def _reasoning_marks(processor: Processor) -> tuple[Mark, Mark] | None:
    """The marks around the reasoning that an answer begins with; None if it has none."""
    reasoning = processor.template.reasoning
    if reasoning is None:
        return None
    # Tokens that were added to a vocabulary are no text for llguidance.
    tokenizer: Any = processor.tokenizer
    added: dict[str, int] = tokenizer.get_added_vocab()
    names = sorted(added, key=len, reverse=True)
    cuts = re.compile(f"({'|'.join(map(re.escape, names))})")

    def mark(text: str) -> Mark:
        return [added.get(part, part) for part in cuts.split(text) if part]

    opening = "" if processor.template.opens_reasoning else reasoning.opening
    return mark(opening), mark(reasoning.closing)


def json_constraint(
    processor: Processor, decoding: Decoding, vocabulary: int
) -> JsonConstraint | None:
    """The constraint of `JsonConstraint`'s arguments; None where the decoding has no schema."""
    if decoding.json_schema is None:
        return None
    return JsonConstraint(processor.thinking(decoding.enable_thinking), decoding, vocabulary)


def _tokenizer(processor: Processor, vocabulary: int) -> LLTokenizer:
    """A model's tokenizer for llguidance, made once: that takes about a second."""
    from llguidance import LLTokenizer

    with _lock:
        known = _tokenizers.setdefault(processor.tokenizer, {})
        key = (vocabulary, *processor.stop_ids)
        if key not in known:
            tokenizer: Any = processor.tokenizer
            description = json.loads(tokenizer.backend_tokenizer.to_str())
            description |= {"padding": None, "truncation": None}
            if (description["decoder"] or {}).get("type") == "Metaspace":
                description["decoder"] = SPACES
            try:
                known[key] = LLTokenizer(
                    json.dumps(description), n_vocab=vocabulary, eos_token=processor.stop_ids
                )
            except ValueError as error:
                raise ArgumentError(
                    f"json_schema: llguidance can't use this model's tokenizer: {reason_of(error)}"
                ) from None
        return known[key]


@functools.cache
def _byte_tokenizer() -> LLTokenizer:
    """A tokenizer that has a token for each byte and nothing else but an end."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()))


class _Bytes:
    """A tokenizer as llguidance takes it: a token is a byte."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"</s>")
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)
