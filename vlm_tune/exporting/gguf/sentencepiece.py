"""SentencePiece tokenizers as GGUF: pieces that are merged by score, with byte fallback.

A decoder's `tokenizer.json` holds ranked merges instead of scores (Llama 2, Vicuna, Mistral,
Gemma). llama.cpp merges any pair that makes a piece, the piece of the highest score first, as
SentencePiece does (arXiv:1808.06226).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Literal

from vlm_tune.quoting import applying

if TYPE_CHECKING:
    from gguf import GGUFWriter

SPACE = "\u2581"
"""The character that stands for a space in pieces."""
BYTES = [f"<0x{number:02X}>" for number in range(256)]
Opening = Literal["nothing", "string", "section"]


def is_pieces(described: dict[str, Any]) -> bool:
    """Whether a tokenizer.json's model consists of pieces with byte fallback."""
    return described["model"]["type"] == "BPE" and bool(described["model"].get("byte_fallback"))


def pieces_reasons(tokenizer: Any, opens_with_text: bool) -> list[str]:
    """The reasons why a tokenizer of pieces can't be written for llama.cpp.

    `opens_with_text` says that the chat format begins with text.
    """
    described = described_of(tokenizer)
    opening = opening_of(described)
    model = described["model"]
    return applying(
        (tokenizer.unk_token_id is None, "its tokenizer has no unknown token"),
        (
            opening is None,
            "its tokenizer changes texts, or splits them, otherwise than SentencePiece with "
            "spaces as they are",
        ),
        (
            opening == "string" and opens_with_text,
            "its tokenizer puts a space before a string's first text alone, and its chat format "
            "begins with text",
        ),
        (
            not model["vocab"].keys() >= {*BYTES},
            "its tokenizer has no piece for each of the 256 bytes",
        ),
        (
            model.get("ignore_merges") or merge_scores(described) is None,
            "its tokenizer's merges are not those that scores of pieces would make",
        ),
    )


def pieces_notes(described: dict[str, Any]) -> list[str]:
    """Where llama.cpp's handling of text deviates from the tokenizer's."""
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
    """Where a tokenizer puts a space in front of text.

    Before nothing, before the first text of the string, or before the first text of every section
    between control tokens. None for a tokenizer that does something else.
    """
    normal = _part(described, "normalizer")
    split = _part(described, "pre_tokenizer")
    spaces_replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if [step["type"] for step in split] == ["Metaspace"] and not normal:
        (step,) = split
        # Where words are split, pieces with a space inside are never used.
        if step["replacement"] != SPACE or (
            step.get("split", True)
            and any(SPACE in token[1:] for token in described["model"]["vocab"])
        ):
            return None
        openings: dict[str, Opening] = {"never": "nothing", "first": "string", "always": "section"}
        return openings[step["prepend_scheme"]]
    # With every space replaced, a split at spaces does nothing.
    if split and [(step["type"], step.get("pattern")) for step in split] != [
        ("Split", {"String": " "})
    ]:
        return None
    if normal == [spaces_replaced]:
        return "nothing"
    return "section" if normal == [{"type": "Prepend", "prepend": SPACE}, spaces_replaced] else None


def merge_scores(described: dict[str, Any]) -> dict[str, float] | None:
    """Scores of the merged pieces, from 0 down by one; None if they can't replace the ranks.

    Merging by score equals merging by rank if all merges that make the same piece are consecutive,
    and if every pair of pieces that makes a piece is a merge.
    """
    pairs = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        for merge in described["model"]["merges"]
    ]
    scores: dict[str, float] = {}
    last = ""
    for left, right in pairs:
        if left + right != last and left + right in scores:
            return None
        last = left + right
        scores.setdefault(last, -float(len(scores)))
    known = described["model"]["vocab"].keys() - {
        added["content"] for added in described["added_tokens"]
    }
    possible = ((token[:cut], token[cut:]) for token in known for cut in range(1, len(token)))
    merged = set(pairs)
    return (
        scores
        if all(pair in merged for pair in possible if pair[0] in known and pair[1] in known)
        else None
    )


def describe_pieces(
    writer: GGUFWriter, described: dict[str, Any], unknown: int, tokens: list[str], types: list[Any]
) -> None:
    """Adds the scores of `tokens`, and where spaces are put, to a file's metadata.

    The names and types of bytes and of the unknown token are set in `tokens` and `types` in place.
    """
    from gguf import TokenType

    scores = merge_scores(described)
    assert scores is not None
    vocab = described["model"]["vocab"]
    for token in BYTES:
        tokens[vocab[token]] = token
        types[vocab[token]] = TokenType.BYTE
    types[unknown] = TokenType.UNKNOWN
    for added in described["added_tokens"]:
        # llama.cpp looks for these in the raw text.
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
    """The tokenizer of a file of pieces, run by SentencePiece.

    Spaces are put where llama.cpp puts them.
    """

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
            # GGUF numbers types as SentencePiece does. llama.cpp finds user-defined pieces (4)
            # first and merges what is left.
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
        special_tokens: dict[str, Any] = {
            f"{name}_token": tokens[number] for name, number in named.items() if number is not None
        }
        self._shown = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE()),
            chat_template=fields["tokenizer.chat_template"],
            **special_tokens,
        )

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text. Control tokens that it spells are recognised, none is added."""
        assert not add_special_tokens
        ids: list[int] = []
        done = 0
        for match in [*self._names.finditer(text), None]:
            part = text[done : match.start() if match else len(text)]
            ids += self._pieces.encode(self._space + part) if part else []
            if match:
                done = match.end()
                ids.append(self._whole[match.group()])
        return ids

    def apply_chat_template(self, turns: list[dict[str, Any]], **options: Any) -> Any:
        """Renders turns by the file's chat template, as transformers' tokenizers do."""
        return self._shown.apply_chat_template(turns, **options)


def described_of(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer's tokenizer.json as a dict."""
    return json.loads(tokenizer.backend_tokenizer.to_str())
