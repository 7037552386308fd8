"""Puts the operators of `vlm_tune.kernels` into a language model of transformers, and takes them
out again.

It is the only place that changes classes and attention of another library's modules. Names, weights
and files of the model stay what they are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlm_tune import kernels
from vlm_tune.compat import attention_name, set_attention
from vlm_tune.config.model import Attention
from vlm_tune.errors import ModelError
from vlm_tune.model.acceleration.decoder_layers import (
    DecoderLayer,
    decoder_class,
    is_decoder_layer,
    structure_reason,
)
from vlm_tune.model.acceleration.flex_attention import (
    LONG,
    CudaAttention,
    config_reason,
    head_width,
)
from vlm_tune.model.acceleration.gated_modules import GatedModule, gated_class
from vlm_tune.model.acceleration.head_loss import head_reason, operator_loss
from vlm_tune.model.acceleration.interval_attention import (
    NAMES,
    ON_CUDA,
    IntervalAttention,
    interface_reason,
    register,
    unsupported_reason,
)
from vlm_tune.model.acceleration.lora_layers import LoraLinear
from vlm_tune.model.acceleration.relative_attention import (
    RelativeAttention,
    leave_relative,
    passing_reason,
    relative_reason,
    use_relative,
)
from vlm_tune.model.language.attention import MaskedAttention
from vlm_tune.model.language.base import LanguageModel, chunked_loss
from vlm_tune.model.language.causal import CausalLLM
from vlm_tune.model.language.seq2seq import Seq2SeqLLM
from vlm_tune.model.language.seq2seq_attention import Seq2SeqAttention
from vlm_tune.model.language.virtual_tokens import KeyValuePrefix

ATTENTION = "attention"
MLP = "MLP"
LAYER = "decoder layer"
LORA = "LoRA layer"
LOSS = "loss"

BOTH_WAYS = "some of its tokens attend to each other in both directions (model.llm.bidirectional)"
"""The reason why neither the operator nor FlexAttention computes a decoder's attention."""

FLEX_REFUSED = "model.llm.attention: FlexAttention is not for"
CHOICES = "set auto, eager or sdpa"


@dataclass
class AccelerationReport:
    """The modules that go by operators of `vlm_tune.kernels`, and why the others do not.

    Attributes:
        replaced: The number of modules of each kind that go by an operator.
        skipped: For each kind, the number of modules that do not, by the reason.
        attention: How a decoder attends on CUDA; empty on other devices.
    """

    replaced: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, Counter[str]] = field(default_factory=dict)
    attention: str = ""

    def add(self, kind: str, reason: str | None) -> None:
        """Counts a module: one that goes by an operator, or one that does not for a reason."""
        if reason is None:
            self.replaced[kind] += 1
        else:
            self.skipped.setdefault(kind, Counter())[reason] += 1

    def lines(self) -> list[str]:
        """One line for each kind: how many of how many, and the reasons."""
        lines = [f"{ATTENTION}: {self.attention}"] if self.attention else []
        for kind in dict.fromkeys((*self.replaced, *self.skipped)):
            skipped = self.skipped.get(kind, Counter())
            reasons = "; ".join(
                reason if len(skipped) == 1 else f"{count}: {reason}"
                for reason, count in skipped.most_common()
            )
            count = self.replaced[kind]
            text = f"{kind}: {count} of {count + skipped.total()}"
            lines.append(f"{text} ({reasons})" if reasons else text)
        return lines

    def __str__(self) -> str:
        return ", ".join(self.lines())


def install(llm: LanguageModel, attention: Attention = "auto") -> AccelerationReport:
    """Puts the operators into a language model, wherever they compute the same.

    It may be called before LoRA layers are attached, on any device, and twice. Each module checks
    at every call whether the operator applies; `running` reports the present state.

    Args:
        llm: The language model.
        attention: The recipe's `model.llm.attention`.

    Returns:
        The modules that were replaced, and the reasons for those that were not.

    Raises:
        ModelError: FlexAttention is demanded and does not compute this model's attention.
    """
    report = AccelerationReport()
    model: Any = llm.model
    if llm.native:  # its forward pass stays transformers' own
        llm.loss = operator_loss
        return report
    if isinstance(llm, CausalLLM):
        report.add(ATTENTION, _install_attention(llm, attention))
    elif isinstance(llm, Seq2SeqLLM) and attention == "flex":
        reason = relative_reason(model)
        if reason is not None:
            raise ModelError(f"{FLEX_REFUSED} a {type(model).__name__}: {reason}; {CHOICES}")
        use_relative(model)
        llm.attention = RelativeAttention()
    replace_mlps(model, report)
    for module in model.modules():
        if is_decoder_layer(module):
            reason = None if isinstance(module, DecoderLayer) else structure_reason(module)
            report.add(LAYER, reason)
            if reason is None and not isinstance(module, DecoderLayer):
                _set_class(module, decoder_class(type(module)))
    llm.loss = operator_loss
    return report


def _install_attention(llm: CausalLLM, attention: Attention) -> str | None:
    """Gives a decoder the attention for its rows' device, unless the recipe names transformers'.

    Returns the reason why it does not go by the operator on a CPU, None if it does. Raises
    `ModelError` as `install` does.
    """
    if attention in ("eager", "sdpa"):
        return f"model.llm.attention is {attention}"
    model = llm.model
    interface = interface_reason(model)
    both_ways = BOTH_WAYS if llm.bidirectional else None
    flex = interface or llm.unjoined or both_ways or config_reason(model)
    if attention == "flex" and flex is not None:
        raise ModelError(f"{FLEX_REFUSED} a {type(model).__name__}: {flex}; {CHOICES}")
    reason = both_ways or unsupported_reason(model)
    # Some models choose by the attention's name what else their layers do: which tokens they see,
    # in what precision they compute.
    by_name = llm.unjoined or getattr(model.config, "reorder_and_upcast_attn", False)
    if interface is None and (reason is None or not by_name):
        register()
        name = attention_name(model)
        set_attention(model.config, (NAMES if reason is None else ON_CUDA).get(name, name))
        on_cuda = CudaAttention(flex, shortest=1 if attention == "flex" else LONG)
        llm.attention = IntervalAttention(on_cuda) if reason is None else on_cuda
    return reason


def replace_mlps(model: nn.Module, report: AccelerationReport) -> None:
    """Lets the gated MLPs of a transformers model run by the operator, and reports them."""
    for module in model.modules():
        replacement = None if isinstance(module, GatedModule) else gated_class(module)
        if isinstance(module, GatedModule) or replacement is not None:
            report.add(MLP, replacement if isinstance(replacement, str) else None)
        if isinstance(replacement, type):
            _set_class(module, replacement)


def _set_class(module: Any, kind: type[nn.Module]) -> None:
    """Replaces a module's class, so that its weights keep their names."""
    module.__class__ = kind


def uninstall(llm: LanguageModel) -> None:
    """Takes the operators out of a language model that no engine has wrapped.

    Its attention, MLPs, layers and loss are then those of transformers. LoRA layers stay fused.
    """
    if isinstance(llm, CausalLLM) and isinstance(llm.attention, IntervalAttention | CudaAttention):
        before = {name: original for names in (NAMES, ON_CUDA) for original, name in names.items()}
        name = attention_name(llm.model)
        set_attention(llm.model.config, before.get(name, name))
        llm.attention = MaskedAttention()
    if isinstance(llm, Seq2SeqLLM) and isinstance(llm.attention, RelativeAttention):
        leave_relative(llm.model)
        llm.attention = Seq2SeqAttention()
    for module in llm.model.modules():
        # A decoder layer's class is made of `DecoderLayer` and the original class.
        if isinstance(module, DecoderLayer | GatedModule):
            _set_class(module, type(module).__bases__[1])
    llm.loss = chunked_loss


def running(
    llm: LanguageModel, dtype: torch.dtype, device: torch.device | None = None
) -> AccelerationReport:
    """Reports the modules that go by kernels of `vlm_tune.kernels` in a training step.

    Args:
        llm: The language model as it is trained: on its device, with its LoRA layers, in training
            mode.
        dtype: The type of the hidden states.
        device: Where the step is computed; None: where the weights are, which may be offloaded.
    """
    report = AccelerationReport()
    place: torch.device = device or next(llm.model.parameters()).device
    if place.type == "cuda":
        # The other operators have kernels for CPUs alone.
        report.attention = _cuda_attention(llm, place)
        return report
    for module in llm.model.modules():
        if is_decoder_layer(module):
            stays = "a native model's forward pass is not changed" if llm.native else None
            report.add(LAYER, stays or _layer_reason(module, dtype, place))
        if isinstance(module, GatedModule):
            report.add(MLP, _mlp_reason(module, dtype, place))
        if isinstance(module, LoraLinear):
            report.add(LORA, _lora_reason(module, dtype, place))
    if isinstance(llm, CausalLLM):
        report.add(ATTENTION, _attention_reason(llm, dtype, place))
    report.add(LOSS, head_reason(llm))
    return report


def _layer_reason(module: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    if not isinstance(module, DecoderLayer):
        return structure_reason(module)
    return module.reason(torch.empty(1, 0, 0, dtype=dtype, device=device))


def _mlp_reason(module: GatedModule, dtype: torch.dtype, device: torch.device) -> str | None:
    layers = module.layers()
    first = layers[0].base_layer if isinstance(layers[0], LoraLinear) else layers[0]
    reason = kernels.unsupported_reason(
        "lora_gated_mlp", dtype, device, first.in_features, first.out_features
    )
    x = torch.empty(0, first.in_features, dtype=dtype, device=device)
    if reason is None and not module.is_quick(x, layers):
        return "its layers are not all frozen, with plain LoRA or none"
    return reason


def _lora_reason(layer: LoraLinear, dtype: torch.dtype, device: torch.device) -> str | None:
    base = layer.base_layer
    if not layer.is_plain(torch.empty(0, base.in_features, dtype=dtype, device=device)):
        return "it is more than a frozen weight with plain LoRA"
    return kernels.unsupported_reason(
        "lora_linear", dtype, device, base.in_features, [base.out_features]
    )


def _cuda_attention(llm: LanguageModel, device: torch.device) -> str:
    """How a language model attends on a CUDA device, and why not otherwise."""
    name = attention_name(llm.model)
    if isinstance(llm, Seq2SeqLLM) and isinstance(llm.attention, RelativeAttention):
        prefixed = isinstance(llm.prompt, KeyValuePrefix)
        reason = "it has a prefix" if prefixed else passing_reason(device)
        return "flex" if reason is None else f"{name.rsplit('_', 1)[-1]} by masks (flex: {reason})"
    if not isinstance(llm, CausalLLM):
        return f"{name} by masks"
    attention = llm.attention
    if isinstance(attention, IntervalAttention):
        attention = attention.elsewhere
    if isinstance(llm.prompt, KeyValuePrefix):
        return f"{name.rsplit('_', 1)[-1]} by masks (flex: it has a prefix of keys and values)"
    if isinstance(attention, CudaAttention):
        return attention.words(llm.model, device)
    both_ways = BOTH_WAYS if llm.bidirectional else None
    reason = interface_reason(llm.model) or llm.unjoined or both_ways or "the recipe names another"
    return f"{name} by masks (flex: {reason})"


def _attention_reason(llm: CausalLLM, dtype: torch.dtype, device: torch.device) -> str | None:
    reason = BOTH_WAYS if llm.bidirectional else unsupported_reason(llm.model)
    if reason is not None:
        return reason
    if not llm.supports_intervals:
        if attention_name(llm.model) not in NAMES.values():
            return f"model.llm.attention is {attention_name(llm.model)}"
        on_cpu = device.type == "cpu"
        return "it has a prefix of keys and values" if on_cpu else f"it is on {device.type}"
    width = head_width(llm.model.config)
    return kernels.unsupported_reason("interval_attention", dtype, device, width)
