"""Compares how an LLM and the vision-language model that it is taken out of make logits."""

from __future__ import annotations

import torch

from vlm_tune.compat import cap_logits
from vlm_tune.config.model import Llm, NativeLlm
from vlm_tune.errors import ModelError
from vlm_tune.model.families.base import whole_config
from vlm_tune.model.families.registry import find_vlm
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.logits import HeadRule, head_rule
from vlm_tune.quoting import quoted


def check_whole_logits(llm: Llm | NativeLlm, language: LanguageModel) -> None:
    """Checks that an LLM by itself makes the logits that it makes inside the whole model.

    The LLM's own class may scale or cap logits, or scale embeddings of ids, where the class of the
    whole model does not: Granite's does, LLaVA's does not. No weights are read. A scale of the
    LLM's own is right where the model was trained with it (`Family.scaled`).

    Args:
        llm: the recipe's section `model.llm`.
        language: the LLM, as `wrapped_llm` gives it.

    Raises:
        ModelError: they differ.
    """
    plain = language.rule == HeadRule() and language.factor == 1
    # An encoder-decoder and a native model are called as they are.
    called = language.layout == "seq2seq" or isinstance(llm, NativeLlm)
    vlm = None if plain or called or llm.scratch else find_vlm(str(llm.name))
    if vlm is None:
        return
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(whole_config(vlm))
    cap_logits(whole)
    # BLIP-2 has the LLM with its head inside, and its logits are the LLM's own.
    rule = (
        head_rule(whole, [whole.model], whole.get_output_embeddings())
        if hasattr(whole, "model")
        else language.rule
    )
    scaled = language.model.config.model_type in vlm.family.scaled
    if scaled and language.rule is not None and language.rule.scale and language.factor == 1:
        return
    if language.rule is None or language.rule != rule or language.factor != 1:
        raise ModelError(
            f"model.pretrained: {quoted(vlm.name)} has a {type(language.model).__name__} inside, "
            f"which scales, caps or shifts its logits or embeddings by itself, and in a "
            f"{type(whole).__name__} otherwise; model.kind: native takes the whole as it is"
        )
