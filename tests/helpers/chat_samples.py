"""Chat templates, usual kinds of tokenizers and conversations, for tests of the data side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.chat.template import ChatTemplate, load_template
from vlm_tune.data.images.decode import ImageProcessor
from vlm_tune.data.types import Conversation, InputSpec, Media, Message
from vlm_tune.model.pretrained.tokenizer import SPECIALS, train_tokenizer
from vlm_tune.resources import resource_names

CHAT = resource_names("data_templates/chat")
LAYOUTS = [(name, layout) for name in CHAT for layout in load_template(name).layouts]
IMAGE = Media(b"image one")
IMAGE_SLOTS = 3
TEXTS = [
    "What color is the shape? It is red, and the circle is blue.",
    "Describe the image in one sentence: a small green triangle on white.",
    "A chat between a curious user and an assistant. USER: hello ASSISTANT: yes </s <p "
    "ad> <s im age|_end start>",
    "You are a helpful assistant; is there not a rectangle? no\nand a second line",
]
LLAMA3_SPLIT = (
    r"\s*[\r\n]+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
)

Kind = Literal[
    "bytes", "bpe", "llama3", "metaspace_first", "metaspace_always", "prepend", "unigram", "t5"
]
KINDS: tuple[Kind, ...] = (
    "bytes",
    "bpe",
    "metaspace_first",
    "metaspace_always",
    "prepend",
    "unigram",
    "t5",
)


@cache
def tokenizer(name: str, kind: Kind) -> Any:
    """A tokenizer with the control tokens of the chat format `name`.

    Its `kind` is one that a family of LLMs has.
    """
    template = load_template(name)
    if kind in ("bytes", "bpe"):
        rows = [Conversation("", turns(text, text)) for text in TEXTS]
        return train_tokenizer(rows, 0 if kind == "bytes" else 420, template)
    specials = [*SPECIALS.values(), *template.control_tokens]
    if kind == "llama3":
        inner = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
            [split, byte_level]
        )
        inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer: Any = trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind in ("unigram", "t5"):
        inner = Tokenizer(models.Unigram())
        metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
        # As transformers builds T5's: words are split at white space, each gets its prefix.
        words = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
        inner.pre_tokenizer = metaspace if kind == "unigram" else words  # type: ignore[assignment]
        inner.decoder = decoders.Metaspace(prepend_scheme="always")  # type: ignore[assignment]
        trainer = trainers.UnigramTrainer(
            vocab_size=160, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
    else:
        inner = Tokenizer(models.BPE(unk_token="<unk>"))
        scheme = "first" if kind == "metaspace_first" else "always"
        inner.pre_tokenizer = pre_tokenizers.Metaspace(  # type: ignore[assignment]
            prepend_scheme=scheme
        )
        inner.decoder = decoders.Metaspace(prepend_scheme=scheme)  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    inner.train_from_iterator(TEXTS * 3, trainer)
    if kind == "prepend":
        # As the first Llamas' files have it: no pre-tokenizer, a normalizer that puts the space
        # before every stretch of text.
        parts = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        inner.normalizer = normalizers.Sequence(parts)  # type: ignore[assignment]
        inner.pre_tokenizer = None  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, clean_up_tokenization_spaces=False, **SPECIALS
    )


@cache
def processor(
    name: str, kind: Kind, layout: Literal["causal", "seq2seq"], max_length: int = 4096
) -> Processor:
    """A processor of the chat format `name`; an image takes `IMAGE_SLOTS` tokens."""
    tokens = tokenizer(name, kind)
    spec = InputSpec(IMAGE_SLOTS, layout, max_length, tokens.pad_token_id, tokens.eos_token_id)
    return Processor(tokens, load_template(name), spec, ImageProcessor(16))


def fitting(name: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns that a format takes: for one that takes one question, those up to its answer.

    Those of a system are left out for one that has none, and texts that end answers in answers.
    """
    template = load_template(name)
    for end in template.end_texts:
        messages = tuple(
            replace(turn, parts=tuple(_without(end, part) for part in turn.parts))
            if turn.role == "assistant"
            else turn
            for turn in messages
        )
    if not template.system:
        messages = tuple(turn for turn in messages if turn.role != "system")
    if not template.one_question:
        return messages
    question = next(place for place, turn in enumerate(messages) if turn.role == "user")
    return messages[: question + 2]


def _without(end: str, part: str | Media) -> str | Media:
    return part.replace(end, "-") if isinstance(part, str) else part


def turns(*texts: str, system: str | None = None, image: bool = False) -> tuple[Message, ...]:
    """User and assistant in turn, the image first."""
    out = [Message("system", (system,))] if system is not None else []
    for number, text in enumerate(texts):
        out.append(
            Message(
                "assistant" if number % 2 else "user",
                (IMAGE, text) if image and number == 0 else (text,),
            )
        )
    return tuple(out)


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as dicts, which `apply_chat_template` takes."""
    return [{"role": message.role, "content": message.text} for message in messages]


def ends(template: ChatTemplate, tokens: Any) -> int:
    """The id of the format's end-of-answer token."""
    (name,) = [piece.control for piece in template.assistant if piece.control and piece.trained]
    return tokens.convert_tokens_to_ids(tokens.eos_token if name == "eos" else name)
