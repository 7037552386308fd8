"""Decoders as GGUF: which ones it can express, and their metadata and tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from vlm_tune.data.chat.processor import Processor
from vlm_tune.errors import ModelError
from vlm_tune.exporting.gguf.tokenizer import describe_tokenizer
from vlm_tune.quoting import applying

if TYPE_CHECKING:
    from gguf import GGUFWriter

FAMILIES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}
"""llama.cpp's architecture for each transformers model type that is exported."""
ROPES = ("default", "llama3")
GEMMA_ROPES = ("default", "linear")
"""Scalings of a Gemma 3's layers with full attention."""
ROTATED_IN_PAIRS = ("llama",)
"""Architectures whose rotary embedding rotates neighbouring pairs, not a head's two halves as in
transformers."""
ROPE_FACTORS = "rope_freqs.weight"


def decoder_reasons(text: Any) -> list[str]:
    """The reasons why llama.cpp can't hold a language model, from its transformers config."""
    if text.model_type not in FAMILIES:
        return [f"its language model is of type {text.model_type}, not {', '.join(FAMILIES)}"]
    if text.model_type == "gemma3_text":
        return _gemma_reasons(text)
    rope = text.rope_parameters["rope_type"]
    biases = [name for name in ("attention_bias", "mlp_bias") if getattr(text, name, None)]
    return applying(
        (
            text.hidden_act != "silu",
            f"its language model's activation is {text.hidden_act}, not silu",
        ),
        (
            rope not in ROPES,
            f"its language model's rotary embedding is scaled by {rope}, not {' or '.join(ROPES)}",
        ),
        (biases, f"its language model has biases ({', '.join(biases)})"),
    )


def _gemma_reasons(text: Any) -> list[str]:
    """Where a Gemma 3 differs from what llama.cpp hard-codes for every Gemma 3."""
    every_sixth = [
        "full_attention" if place % 6 == 5 else "sliding_attention"
        for place in range(text.num_hidden_layers)
    ]
    local = text.rope_parameters["sliding_attention"]
    full = text.rope_parameters["full_attention"]
    # The largest Gemma 3, with 62 layers, scales scores by another width than a head's.
    width = (
        text.hidden_size // text.num_attention_heads
        if text.num_hidden_layers == 62
        else _head_dim(text)
    )
    fixed = {
        "every sixth layer with full attention": text.layer_types == every_sixth,
        "no attention to what follows": not text.use_bidirectional_attention,
        "the activation gelu_pytorch_tanh": text.hidden_activation == "gelu_pytorch_tanh",
        "the rotary base 10000 in its windows": local["rope_theta"] == 10_000
        and local["rope_type"] == "default",
        "a rotary embedding that is scaled linearly or not at all": full["rope_type"]
        in GEMMA_ROPES,
        f"query_pre_attn_scalar {width}": text.query_pre_attn_scalar == width,
        "no soft caps": not (text.attn_logit_softcapping or text.final_logit_softcapping),
        "no biases": not text.attention_bias,
    }
    return [
        f"its language model is not a Gemma 3 with {name}"
        for name, holds in fixed.items()
        if not holds
    ]


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def describe_decoder(
    writer: GGUFWriter, text: Any, processor: Processor, rows: int, around: str
) -> None:
    """Adds all metadata of a language model file.

    Its embedding has `rows` rows, and the chat format has the text `around` before and after an
    image.
    """
    from gguf import RopeScalingType

    window = getattr(text, "sliding_window", None)
    gemma = text.model_type == "gemma3_text"
    writer.add_name(f"{text.model_type} in a vision-language model")
    writer.add_block_count(text.num_hidden_layers)
    # llama.cpp has no sliding window in the other architectures; up to one window's length it
    # computes the same, so that is the context length.
    writer.add_context_length(
        min(
            text.max_position_embeddings,
            window if window and not gemma else text.max_position_embeddings,
        )
    )
    if gemma:
        writer.add_sliding_window(text.sliding_window)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(_head_dim(text))
    writer.add_value_length(_head_dim(text))
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_dimension_count(_head_dim(text))
    rope = text.rope_parameters["full_attention"] if gemma else text.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_vocab_size(rows)
    describe_tokenizer(writer, processor, rows, around)


def decoder_tensors(language: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """A transformers decoder's tensors by llama.cpp's names.

    Raises `ModelError` for a tensor that has no name there.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    text = language.config
    name = FAMILIES[text.model_type]
    names = get_tensor_name_map(
        next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == name), text.num_hidden_layers
    )
    head = language.get_output_embeddings().weight
    embedding = language.get_input_embeddings().weight
    tied = head is embedding or torch.equal(head, embedding)
    factors = _rope_factors(language)
    if factors is not None:
        yield ROPE_FACTORS, factors
    for key, tensor in language.state_dict().items():
        stored_name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if stored_name is None:
            raise ModelError(f"llama.cpp's {name} has no place for the language model's {key}")
        if stored_name == "output.weight" and tied:
            continue  # llama.cpp uses the embedding if there is no head
        if name in ROTATED_IN_PAIRS and ".attn_q." in stored_name:
            tensor = paired(tensor, text.num_attention_heads)
        elif name in ROTATED_IN_PAIRS and ".attn_k." in stored_name:
            tensor = paired(tensor, text.num_key_value_heads)
        elif name == "gemma3" and stored_name.endswith("norm.weight"):
            tensor = tensor.float() + 1  # transformers adds 1 in every forward
        yield stored_name, tensor


def paired(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders a projection's rows [H * D, ...] for rotated pairs: i and i + D/2 side by side."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _rope_factors(language: Any) -> torch.Tensor | None:
    """The divisors [D / 2] of a Llama 3's rotary frequencies, None if they are not scaled."""
    rope = language.config.rope_parameters
    if rope.get("rope_type", "default") == "default":
        return None
    width = _head_dim(language.config)
    plain = rope["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return (plain / language.base_model.rotary_emb.inv_freq.double().cpu()).float()
