"""The operators that models are accelerated by, and nothing that knows a model.

Each is an operator of `torch.library` with a body in plain torch, shapes for tracing (`fake`), a
gradient, and a kernel for CPUs in `cpu/`:

- `interval_attention`: attention in which every key is visible to an interval of queries;
- `lora_linear`: linear layers with LoRA, one or several that read the same input (q, k and v);
- `lora_gated_mlp`: gated MLPs with LoRA;
- `linear_cross_entropy`: the loss under a frozen output head;
- `decoder_layer`: a whole decoder layer, on a CPU alone.

Operators hold no state between calls: a KV cache is an argument. On devices other than a CPU LoRA
layers are tensor code that a compiler traces (`traceable`), and MLPs and decoder layers are
transformers' own.
"""

from __future__ import annotations

from typing import Any

from vlm_tune.kernels import attention, decoder, lora, loss, mlp
from vlm_tune.kernels.attention import interval_attention
from vlm_tune.kernels.decoder import decoder_layer
from vlm_tune.kernels.kv_cache import KVCache
from vlm_tune.kernels.lora import lora_linear
from vlm_tune.kernels.loss import linear_cross_entropy
from vlm_tune.kernels.mlp import lora_gated_mlp

__all__ = [
    "KVCache",
    "decoder_layer",
    "interval_attention",
    "linear_cross_entropy",
    "lora_gated_mlp",
    "lora_linear",
    "unsupported_reason",
]

REASONS = {
    "interval_attention": attention.unsupported_reason,
    "lora_linear": lora.unsupported_reason,
    "lora_gated_mlp": mlp.unsupported_reason,
    "linear_cross_entropy": loss.unsupported_reason,
    "decoder_layer": decoder.unsupported_reason,
}


def unsupported_reason(operator: str, *facts: Any) -> str | None:
    """The reason why an operator goes by its body in plain torch; None if it goes by a kernel.

    Args:
        operator: The operator's name.
        *facts: The arguments of `unsupported_reason` of the operator's module.
    """
    return REASONS[operator](*facts)
