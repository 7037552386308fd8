"""Tokenizers as GGUF: which ones llama.cpp has, how they are written, and how they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.chat.processor_jinja import processor_jinja
from vlm_tune.data.chat.template import ChatTemplate
from vlm_tune.exporting.gguf.sentencepiece import (
    PieceTokenizer,
    describe_pieces,
    described_of,
    is_pieces,
    pieces_reasons,
)
from vlm_tune.quoting import applying

if TYPE_CHECKING:
    from gguf import GGUFWriter

MARKER = "<__media__>"
"""The text that llama.cpp replaces with an image."""
MARKER_BEGINS = "<__media"
"""The beginning of that text: newer servers draw what follows, so that no question spells it."""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ASCII_CASES = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
    r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""llama.cpp's pattern for `TEKKEN`, in which only ASCII letters have cases, and marks are none."""
SPLITS: dict[str, tuple[tuple[tuple[str, Any], ...], bool]] = {
    "gpt-2": ((("bytes", True),), False),
    "smollm": ((("digits", True), ("bytes", True)), False),
    "llama-bpe": ((("split", LLAMA3), ("bytes", False)), True),
    "dbrx": ((("split", LLAMA3), ("bytes", False)), False),
    "qwen2": ((("split", QWEN2), ("bytes", False)), False),
    "tekken": ((("split", TEKKEN), ("bytes", False)), True),
}
"""llama.cpp's pre-tokenizers by name: the steps that split a text before merging, and whether a
piece that is in the vocabulary as a whole is not merged (`ignore_merges`)."""
NORMALIZERS = (None, "NFC")
"""Normalizers that are accepted. llama.cpp composes no characters; for a text in NFC, as nearly all
are, that is the same."""


def _steps(part: dict[str, Any] | None) -> tuple[tuple[str, Any], ...] | None:
    """A tokenizer.json's pre-tokenizer as steps of `SPLITS`, None if it can't be expressed so."""
    if part is None:
        return None
    if part["type"] == "Sequence":
        steps = [_steps(one) for one in part["pretokenizers"]]
        return None if None in steps else tuple(step for one in steps for step in one or ())
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return (("bytes", part.get("use_regex", True)),)
    if part["type"] == "Digits":
        return (("digits", part["individual_digits"]),)
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return (("split", part["pattern"].get("Regex")),)
    return None


def _name(described: dict[str, Any]) -> str | None:
    key = _steps(described["pre_tokenizer"]), described["model"].get("ignore_merges", False)
    return next((name for name, known in SPLITS.items() if known == key), None)


def split_notes(described: dict[str, Any]) -> list[str]:
    """Where llama.cpp splits texts otherwise than a tokenizer.json's pre-tokenizer."""
    return applying(
        (
            not is_pieces(described) and _name(described) == "tekken",
            "llama.cpp splits words otherwise whose accents are characters of their own, and those "
            "in which a capital that is not A to Z follows a small letter",
        )
    )


def tokenizer_reasons(tokenizer: Any, rows: int, template: ChatTemplate) -> list[str]:
    """The reasons why a tokenizer can't be written for llama.cpp.

    `rows` is the number of rows of the embedding, `template` the chat format.
    """
    described = described_of(tokenizer)
    kind = described["model"]["type"]
    if is_pieces(described):
        first = template.start[:1] or [*template.system[:1], *template.user[:1]]
        reasons = pieces_reasons(
            tokenizer, opens_with_text=any(piece.control is None for piece in first)
        )
    elif (
        kind == "BPE"
        and _name(described) is not None
        and (described["normalizer"] or {}).get("type") in NORMALIZERS
    ):
        reasons = []
    else:
        known = f"the byte-level BPE that llama.cpp splits as it does ({', '.join(SPLITS)})"
        reasons = [f"its tokenizer ({kind}) is neither SentencePiece's BPE with bytes nor {known}"]
    most = max(tokenizer.get_vocab().values()) + 1
    return (
        [*reasons, f"its tokenizer has {most} tokens, the embedding {rows} rows"]
        if most > rows
        else reasons
    )


def describe_tokenizer(writer: GGUFWriter, processor: Processor, rows: int, around: str) -> None:
    """Adds a processor's tokenizer, special ids and chat template to a file's metadata.

    Embedding rows without a token are marked unused. `around` is text before and after an image.
    """
    from gguf import TokenType

    tokenizer: Any = processor.tokenizer
    described = described_of(tokenizer)
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [TokenType.UNUSED] * rows
    for token, number in described["model"]["vocab"].items():
        tokens[number] = token
        types[number] = TokenType.NORMAL
    for added in described["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    for number in {
        *map(processor.encoder.control, processor.template.control_tokens),
        *processor.stop_ids,
    }:
        types[number] = TokenType.CONTROL
    if is_pieces(described):
        describe_pieces(writer, described, tokenizer.unk_token_id, tokens, types)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(str(_name(described)))
        writer.add_token_merges(
            [
                merge if isinstance(merge, str) else " ".join(merge)
                for merge in described["model"]["merges"]
            ]
        )
        writer.add_add_space_prefix(False)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # llama.cpp stops an answer at each of these three.
    for add, number in zip(
        (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id),
        processor.stop_ids,
        strict=False,
    ):
        add(number)
    writer.add_pad_token_id(processor.spec.pad_id)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(any(piece.control == "bos" for piece in processor.template.start))
    writer.add_add_eos_token(False)
    writer.add_chat_template(
        processor_jinja(processor.template, processor.system, MARKER, MARKER_BEGINS, around)
    )


def read_tokenizer(fields: dict[str, Any]) -> Any:
    """A tokenizer with a chat template, built from nothing but a file's metadata.

    It splits texts as llama.cpp does for the pre-tokenizer that the file names.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if fields["tokenizer.ggml.model"] == "llama":
        return PieceTokenizer(fields)
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    steps, whole = SPLITS[fields["tokenizer.ggml.pre"]]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(tokens)}, merges, ignore_merges=whole
        )
    )
    builders = {
        "bytes": lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex),
        "digits": lambda single: pre_tokenizers.Digits(individual_digits=single),
        "split": lambda pattern: pre_tokenizers.Split(
            Regex(ASCII_CASES if pattern == TEKKEN else pattern), "isolated"
        ),
    }
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [builders[kind](value) for kind, value in steps]
    )
    for kind, special in ((3, True), (4, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, one in zip(tokens, types, strict=True)
            if one == kind
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    named = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    special_tokens: dict[str, Any] = {
        f"{name}_token": tokens[number] for name, number in named.items() if number is not None
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=fields["tokenizer.chat_template"], **special_tokens
    )
