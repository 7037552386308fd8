"""The classes of language models by their section in a recipe."""

from __future__ import annotations

from typing import Any

from vlm_tune.config.model import Llm, NativeLlm
from vlm_tune.errors import ModelError
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.causal import CausalLLM
from vlm_tune.model.language.native import NativeLLM
from vlm_tune.model.language.seq2seq import Seq2SeqLLM

LLMS: dict[str, type[LanguageModel]] = {"causal": CausalLLM, "seq2seq": Seq2SeqLLM}
"""The classes by their kind in a recipe."""


def llm_class(section: Llm) -> type[LanguageModel]:
    """The class of a section's language model."""
    return NativeLLM if isinstance(section, NativeLlm) else LLMS[section.kind]


def wrapped_llm(section: Llm, language: Any) -> LanguageModel:
    """A model of transformers as the language model of a section.

    Raises `ModelError` for attention that the model can't compute.
    """
    llm = llm_class(section)(language)
    if isinstance(llm, CausalLLM):
        llm.bidirectional = section.bidirectional
        if llm.bidirectional and llm.unjoined:
            raise ModelError(
                f"model.llm.bidirectional: not for a {type(language).__name__}: {llm.unjoined}"
            )
    return llm
