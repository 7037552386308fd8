"""SentencePiece's tokenizers in GGUF's form: pieces that are merged by their scores, and bytes for what has no piece.

A decoder's `tokenizer.json` holds ranked merges in place of scores (Llama 2, Vicuna, Mistral, Gemma). llama.cpp merges
whatever makes a piece, the piece of the highest score first, as SentencePiece does (arXiv:1808.06226).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from gguf import GGUFWriter

SPACE = "\u2581"
"""What stands for a space in pieces."""
BYTES = [f"<0x{number:02X}>" for number in range(256)]
Opening = Literal["nothing", "string", "section"]


def is_pieces(described: dict[str, Any]) -> bool:
    """Whether a tokenizer.json's model is one of pieces that falls back to bytes."""
    return described["model"]["type"] == "BPE" and bool(described["model"].get("byte_fallback"))


def pieces_reasons(tokenizer: Any, opens_with_text: bool) -> list[str]:
    """Why such a tokenizer can't be written for llama.cpp; `opens_with_text` is of the chat format."""
    described = described_of(tokenizer)
    opening = opening_of(described)
    model = described["model"]
    reasons = [] if tokenizer.unk_token_id is not None else ["its tokenizer has no unknown token"]
    if opening is None:
        reasons.append(
            "its tokenizer changes texts, or splits them, otherwise than SentencePiece with "
            "spaces as they are"
        )
    if opening == "string" and opens_with_text:
        reasons.append(
            "its tokenizer puts a space before a string's first text alone, and its chat format "
            "begins with text"
        )
    if not model["vocab"].keys() >= {*BYTES}:
        reasons.append("its tokenizer has no piece for each of the 256 bytes")
    if model.get("ignore_merges") or merge_scores(described) is None:
        reasons.append("its tokenizer's merges are not those that scores of pieces would make")
    return reasons


def pieces_notes(described: dict[str, Any]) -> list[str]:
    """What llama.cpp does otherwise with a text."""
    if (
        is_pieces(described)
        and _part(described, "normalizer") == []
        and opening_of(described) == "section"
    ):
        return [
            "llama.cpp puts a space also before a text that begins with one, right after an image "
            "or a control token"
        ]
    return []


def _part(described: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The steps of a tokenizer.json's normalizer or pre-tokenizer."""
    part = described[name]
    if part is None:
        return []
    return (
        part.get("normalizers", part.get("pretokenizers")) if part["type"] == "Sequence" else [part]
    )


def opening_of(described: dict[str, Any]) -> Opening | None:
    """Before what a space is put: the string's first text, or that of every section between control tokens; None for other tokenizers."""
    normal = _part(described, "normalizer")
    split = _part(described, "pre_tokenizer")
    written = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if [step["type"] for step in split] == ["Metaspace"] and not normal:
        (step,) = split
        # Pieces with a space inside are not found where words are split.
        if step["replacement"] != SPACE or (
            step.get("split", True)
            and any(SPACE in token[1:] for token in described["model"]["vocab"])
        ):
            return None
        found: dict[str, Opening] = {"never": "nothing", "first": "string", "always": "section"}
        return found[step["prepend_scheme"]]
    # With every space replaced, a split at spaces does nothing.
    if split and [(step["type"], step.get("pattern")) for step in split] != [
        ("Split", {"String": " "})
    ]:
        return None
    if normal == [written]:
        return "nothing"
    return "section" if normal == [{"type": "Prepend", "prepend": SPACE}, written] else None


def merge_scores(described: dict[str, Any]) -> dict[str, float] | None:
    """The scores of the pieces that merges make, from 0 down by one; None where merging by score is not merging by rank.

    It is where all merges that make a piece stand together, and none is missing of those that pieces allow.
    """
    pairs = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        for merge in described["model"]["merges"]
    ]
    found: dict[str, float] = {}
    last = ""
    for left, right in pairs:
        if left + right != last and left + right in found:
            return None
        last = left + right
        found.setdefault(last, -float(len(found)))
    known = described["model"]["vocab"].keys() - {
        added["content"] for added in described["added_tokens"]
    }
    possible = ((token[:cut], token[cut:]) for token in known for cut in range(1, len(token)))
    merged = set(pairs)
    return (
        found
        if all(pair in merged for pair in possible if pair[0] in known and pair[1] in known)
        else None
    )


def describe_pieces(
    writer: GGUFWriter, described: dict[str, Any], unknown: int, tokens: list[str], types: list[Any]
) -> None:
    """Adds the scores of `tokens`, and where spaces are put; bytes and the unknown token get their names and `types`, in place."""
    from gguf import TokenType

    scores = merge_scores(described)
    assert scores is not None
    vocab = described["model"]["vocab"]
    for token in BYTES:
        tokens[vocab[token]] = token
        types[vocab[token]] = TokenType.BYTE
    types[unknown] = TokenType.UNKNOWN
    for added in described["added_tokens"]:
        # llama.cpp looks for these in the text as it was written.
        if types[added["id"]] == TokenType.USER_DEFINED and added["normalized"]:
            tokens[added["id"]] = added["content"].replace(SPACE, " ")
    alone = [
        token
        for token, kind in zip(tokens, types, strict=True)
        if kind == TokenType.NORMAL and token not in scores
    ]
    scores |= {token: -float(len(scores) + place) for place, token in enumerate(alone)}
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([scores.get(token, 0.0) for token in tokens])
    writer.add_add_space_prefix(opening_of(described) == "section")


class PieceTokenizer:
    """The tokenizer of a file of pieces, by SentencePiece itself, with spaces put where llama.cpp puts them."""

    def __init__(self, fields: dict[str, Any]) -> None:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        tokens = fields["tokenizer.ggml.tokens"]
        types = fields["tokenizer.ggml.token_type"]
        model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        model.trainer_spec.model_type = 2
        model.trainer_spec.byte_fallback = True
        model.normalizer_spec.name = "identity"
        model.normalizer_spec.add_dummy_prefix = False
        model.normalizer_spec.remove_extra_whitespaces = False
        for token, kind, score in zip(tokens, types, fields["tokenizer.ggml.scores"], strict=True):
            # GGUF numbers types as SentencePiece does. What a user defined llama.cpp finds first, and merges what is left.
            model.pieces.add(
                piece=token.replace(" ", SPACE), type=1 if kind == 4 else kind, score=score
            )
        self._pieces: Any = SentencePieceProcessor(model_proto=model.SerializeToString())
        self._whole = {
            token: number
            for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (2, 3, 4)
        }
        self._names = re.compile(
            "|".join(map(re.escape, sorted(self._whole, key=len, reverse=True)))
        )
        self._space = " " if fields["tokenizer.ggml.add_space_prefix"] else ""
        named = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        own: dict[str, Any] = {
            f"{name}_token": tokens[number] for name, number in named.items() if number is not None
        }
        self._shown = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE()),
            chat_template=fields["tokenizer.chat_template"],
            **own,
        )

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; control tokens are found in it, none is added."""
        assert not add_special_tokens
        found: list[int] = []
        done = 0
        for match in [*self._names.finditer(text), None]:
            part = text[done : match.start() if match else len(text)]
            found += self._pieces.encode(self._space + part) if part else []
            if match:
                done = match.end()
                found.append(self._whole[match.group()])
        return found

    def apply_chat_template(self, turns: list[dict[str, Any]], **options: Any) -> Any:
        """As transformers' tokenizers do."""
        return self._shown.apply_chat_template(turns, **options)


def described_of(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer's tokenizer.json."""
    return json.loads(tokenizer.backend_tokenizer.to_str())
