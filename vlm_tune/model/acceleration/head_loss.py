"""The loss under a frozen output head by the operator, where that computes what the model does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm_tune.compat import has_hooks
from vlm_tune.kernels import linear_cross_entropy, unsupported_reason
from vlm_tune.kernels.loss import losses
from vlm_tune.model.acceleration.lora_layers import compute_dtype
from vlm_tune.model.language.base import LanguageModel, chunked_loss
from vlm_tune.model.language.loss import Reduction


def head_reason(llm: LanguageModel, hidden: Tensor | None = None) -> str | None:
    """The reason why the loss does not go by the operator's kernel; None if it does.

    `hidden` are the hidden states [S, E]; without them, those of the head's own type are meant.
    """
    head: nn.Module = llm.head
    if llm.rule is None or llm.rule.scale is None:
        return "logits are more than a scaled product with the head"
    if llm.whole_head:
        return "the head's weight is sharded, and gathered for its own module"
    if type(head) is not nn.Linear or head.bias is not None:
        return "the head is no plain linear layer without bias"
    weight = head.weight
    if weight.requires_grad:
        return "the head is trained"
    # ZeRO-3 gathers a sharded weight only for the module that owns it.
    if hasattr(weight, "ds_id") or has_hooks(head) or weight.stride(1) != 1:
        return "the head's weight is sharded or has hooks"
    if hidden is not None and hidden.device != weight.device:
        return "the head is on another device"
    dtype = weight.dtype if hidden is None else compute_dtype(hidden)
    return unsupported_reason("linear_cross_entropy", dtype, weight)


def operator_loss(
    llm: LanguageModel,
    hidden: Tensor,
    targets: Tensor,
    reduction: Reduction = "sum",
    temperature: float = 1.0,
) -> Tensor:
    """Cross-entropy, fp32, of hidden states [S, E] and token ids int64[S]: a scalar, or [S].

    Logits are divided by `temperature`.
    """
    if head_reason(llm, hidden) is not None:
        return chunked_loss(llm, hidden, targets, reduction, temperature)
    assert llm.rule is not None and llm.rule.scale is not None
    weight = llm.head.get_parameter("weight")
    scale = llm.rule.scale / temperature
    scaled = hidden if scale == 1 else hidden * scale
    if reduction == "none":
        keep = torch.is_grad_enabled() and scaled.requires_grad
        return losses(scaled.to(weight.dtype), weight, targets, keep)[0]
    return linear_cross_entropy(scaled, weight, targets)
