"""Tokenizers: trained on a recipe's own text, or those of existing models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlm_tune.config.model import AnySection, Llm
from vlm_tune.data.chat.grounding import Grounding
from vlm_tune.data.chat.template import ChatTemplate
from vlm_tune.data.media_processor import MediaProcessor
from vlm_tune.data.types import Conversation
from vlm_tune.errors import ModelError
from vlm_tune.model.hub import check_base, load_reason
from vlm_tune.quoting import quoted

SPECIALS = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


def add_words(tokenizer: Any, llm: Llm) -> Any:
    """Adds a recipe's tokens to a tokenizer and returns it; those that it has keep their ids."""
    from tokenizers import AddedToken

    for words, special in ((llm.added_tokens, False), (llm.added_special_tokens, True)):
        present = tokenizer.added_tokens_encoder
        new: Any = [
            AddedToken(word, special=special, normalized=False)
            for word in words
            if word not in present
        ]
        tokenizer.add_tokens(new, special_tokens=special)
    return tokenizer


def train_tokenizer(
    conversations: Iterable[Conversation], vocab_size: int, template: ChatTemplate
) -> Any:
    """Trains a byte-level BPE tokenizer on the conversations' text.

    Its special tokens include the template's control tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(  # type: ignore[assignment]
        add_prefix_space=False
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS.values(), *template.control_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Distinct texts, sorted: the vocabulary must not depend on the order of rows.
    texts = sorted(
        {str(s.payload) for c in conversations for s in template.segments(c) if s.kind == "text"}
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIALS
    )


def scratch_tokenizer(
    section: AnySection,
    template: ChatTemplate,
    images: MediaProcessor,
    conversations: Iterable[Conversation],
) -> Any:
    """A tokenizer of the recipe's own, trained on rows whose boxes are as the model will read them.

    It has the tokens that the recipe adds.
    """
    assert section.llm.scratch is not None
    rows = map(Grounding(section.boxes, images).written, conversations)
    trained = train_tokenizer(rows, section.llm.scratch.vocab_size, template)
    return add_words(trained, section.llm)


def load_tokenizer(llm: Llm, folder: Path | None = None) -> Any:
    """Loads the tokenizer of a language model or a saved folder, with the recipe's tokens added.

    Its chat template is removed: it is a program by the author of the folder, and vlm_tune renders
    chats itself. Raises `ModelError` if the tokenizer can't be loaded.
    """
    from transformers import AutoTokenizer

    if folder is None:
        check_base(str(llm.name), "model.llm.name")
    options: dict[str, Any] = (
        {"gguf_file": llm.gguf_file} if llm.gguf_file and folder is None else {}
    )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(folder or llm.name), trust_remote_code=False, **options
        )
    except (OSError, ValueError) as error:
        name = str(folder or llm.name)
        raise ModelError(
            f"model.llm.name: no tokenizer in {quoted(name)}: {load_reason(name, error)}"
        ) from None
    tokenizer.chat_template = None
    return add_words(tokenizer, llm)


def pin_tokenizer(folder: Path) -> None:
    """Makes transformers load a saved folder's tokenizer.json unchanged.

    The tokenizer class of a model would rebuild it, and Llama's loses `legacy`.
    """
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(
            {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2
        )
    )
