"""The classes of language models by their kind in a recipe."""

from __future__ import annotations

from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.causal import CausalLLM
from vlm_tune.model.language.seq2seq import Seq2SeqLLM

LLMS: dict[str, type[LanguageModel]] = {"causal": CausalLLM, "seq2seq": Seq2SeqLLM}
