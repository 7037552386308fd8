"""Tokenizers: trained on a recipe's own text, or those of existing models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlm_tune.config.model import Llm
from vlm_tune.data.chat.template import ChatTemplate
from vlm_tune.data.types import Conversation
from vlm_tune.errors import ModelError
from vlm_tune.model.hub import check_base, load_reason
from vlm_tune.quoting import quoted

SPECIALS = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


def add_words(tokenizer: Any, llm: Llm) -> Any:
    """The tokenizer with the tokens that a recipe adds to it; those that it has keep their ids."""
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
    """A byte-level BPE tokenizer trained on the conversations' text; the template's control tokens are in it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS.values(), *template.control_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The distinct texts, sorted: the vocabulary depends on what is said, not on the order of rows.
    texts = sorted(
        {str(s.payload) for c in conversations for s in template.segments(c) if s.kind == "text"}
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIALS
    )


def load_tokenizer(llm: Llm, folder: Path | None = None) -> Any:
    """The tokenizer of a language model, or of a saved folder. Raises `ModelError` if it can't be loaded.

    A chat template that comes with it is left out: it is a program of whoever made the folder, and ours renders.
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
    """Makes transformers read a folder's tokenizer.json as it is; a model's own class would make it anew, and Llama's loses `legacy`."""
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(
            {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2
        )
    )
