"""Initial virtual tokens for prompt and prefix tuning."""

from __future__ import annotations

from typing import Any

import torch

from vlm_tune.errors import ModelError
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.virtual_tokens import KeyValuePrefix, SoftPrompt, VirtualTokens


def new_prompt(llm: LanguageModel, how: str, tokens: int, name: str | None) -> VirtualTokens:
    """Virtual tokens, initialized from tokens that are drawn at random from the vocabulary.

    Args:
        llm: The language model.
        how: "prompt" takes the drawn tokens' embeddings, "prefix" their keys and values.
        tokens: The number of virtual tokens n.
        name: The base model's name or path in PEFT's config.

    Raises:
        ModelError: For a prefix, the LLM's layers have keys and values of several shapes.
    """
    from peft import PrefixTuningConfig, PromptTuningConfig

    table = llm.model.get_input_embeddings()
    drawn = torch.randint(table.num_embeddings, (1, tokens)).to(table.weight.device)
    task = "SEQ_2_SEQ_LM" if llm.layout == "seq2seq" else "CAUSAL_LM"
    text = llm.model.config.get_text_config()
    common: dict[str, Any] = {
        "task_type": task,
        "num_virtual_tokens": tokens,
        "num_layers": text.num_hidden_layers,
        "base_model_name_or_path": name,
    }
    with torch.no_grad():
        embeds = llm.embed(drawn)
        if how == "prompt":
            heads = {
                "num_transformer_submodules": 1,
                "num_attention_heads": text.num_attention_heads,
            }
            return SoftPrompt(PromptTuningConfig(**common, **heads, token_dim=llm.width), embeds[0])
        was = llm.training
        layers = llm.eval().prefill(drawn).layers
        llm.train(was)
    if (
        len({(layer.keys.shape, layer.values.shape) for layer in layers}) != 1
        or layers[0].keys.shape != layers[0].values.shape
    ):
        raise ModelError(
            f"the layers of {type(llm.model).__name__} keep keys and values of several shapes; "
            "use how: prompt"
        )
    heads = layers[0].keys.shape[1]
    width = layers[0].keys.shape[3]
    # [layers, 2, H, n, D]
    cache = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])
    both = 2 if llm.layout == "seq2seq" else 1
    shape = {
        "num_layers": both * len(layers),
        "num_transformer_submodules": both,
        "num_attention_heads": heads,
    }
    config = PrefixTuningConfig(**{**common, **shape}, token_dim=heads * width)
    return KeyValuePrefix(config, cache.permute(3, 0, 1, 2, 4).flatten(1))
