"""LoRA linear layers with fused forward and backward; projections of the same input are one GEMM.

The layers are PEFT's with another `forward`: names, files, merging and disabling stay PEFT's. They
compute y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T for one layer, or for several that read the same x
(q, k and v). On a CPU that is the operator `lora_linear`; elsewhere it is tensor code, around which
a compiler fuses (`kernels/traceable.py`).

Shapes: T tokens, I inputs, O_i outputs of a layer, O their sum, r_i ranks, R their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn

from vlm_tune.compat import has_hooks
from vlm_tune.kernels import devices
from vlm_tune.kernels.lora import by_kernel, lora_linear, wide_rank
from vlm_tune.kernels.traceable import traceable_lora
from vlm_tune.model.per_thread import PerThread

SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
)
"""Names of layers that read the same input, in models of the Llama and T5 families."""

CROSS_ATTENTION = {"EncDecAttention", "encoder_attn", "crossattention"}
"""Attention modules whose query projection reads another input than key and value."""


@dataclass(frozen=True)
class Packed:
    """A layer's weight in 4 bits: the codes, and a scale for each block of them.

    `packing` is the kind of codes and the block's size, as in `nf4:64`. Where the scales are
    quantized too, it ends with the size of their blocks, and `nested` has their code, their own
    block scales and their offset. Of a sharded layer codes and scales are None: what is gathered
    for a pass are its parameters.
    """

    codes: torch.Tensor | None
    scales: torch.Tensor | None
    packing: str
    nested: tuple[torch.Tensor, ...] = ()

    def tensors(self, base: Any) -> tuple[torch.Tensor, ...]:
        """The tensors that dequantise the weight of the layer `base`, as the operators take them.

        They are its codes and its block scales, followed by `nested`.
        """
        if self.codes is None or self.scales is None:
            return base.weight, base.scales
        return self.codes, self.scales, *self.nested


class LoraLinear(Linear):
    """PEFT's LoRA linear layer, fused where that computes the same: plain LoRA on a frozen weight.

    The weight may be packed in 4 bits, after a call of `merge_projections`, or of
    `replace_4bit_layers` if an engine shards it. DoRA and other variants, dropout in training,
    several adapters, merged or disabled ones, and weights that are trained, sharded by ZeRO-3 or
    offloaded run PEFT's forward pass.
    """

    base_layer: Any
    group: ProjectionGroup | None = None
    packed: Packed | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not self.is_plain(x) or self._only_reads(x):
            return super().forward(x, *args, **kwargs)
        return _project(x, [self])[0] if self.group is None else self.group.output(self, x)

    @property
    def name(self) -> str:
        """The name of the active adapter."""
        return self.active_adapters[0]

    def _holds_codes(self) -> bool:
        """Whether `packed` still is the layer's weight: a moved model has other codes."""
        packed = self.packed
        return packed is not None and (
            torch.compiler.is_compiling()
            or packed.codes is None
            or packed.codes.data_ptr() == self.base_layer.weight.data_ptr()
        )

    def _only_reads(self, x: torch.Tensor) -> bool:
        """Whether a 4-bit weight is used without a gradient, where its library is the quicker one.

        For the few rows of a decode step it multiplies by the codes, on devices other than a CPU.
        """
        return self.packed is not None and not (
            devices.by_operator(x.device) or torch.is_grad_enabled()
        )

    def is_plain(self, x: torch.Tensor) -> bool:
        """Whether the layer now applies a frozen weight with plain LoRA to x and nothing else."""
        base = self.base_layer
        active = self.active_adapters
        if (
            self.disable_adapters
            or self.merged
            or self.lora_variant
            or len(active) != 1
            or active[0] not in self.lora_A
        ):
            return False
        weight = base.weight
        bias = base.bias
        return (
            (type(base) is nn.Linear or self._holds_codes())
            and not (weight.requires_grad or (bias is not None and bias.requires_grad))
            and not (self.training and isinstance(self.lora_dropout[active[0]], nn.Dropout))
            and self.lora_B[active[0]].bias is None
            and weight.device == x.device
            # ZeRO-3 gathers a sharded weight only for the module that owns it.
            and not hasattr(weight, "ds_id")
            and not has_hooks(base)
        )


class ProjectionGroup:
    """Layers that read the same input: the first one called computes the outputs of all.

    The others then return theirs from `pending`: that input, and the outputs not yet returned.

    The frozen weights become views into one matrix [O, I]. For the operator it is [O, I + R], with
    the scaled B of each layer in its last columns, in that layer's rows and ranks: [x | x A^T]
    times it is all outputs in one GEMM.
    """

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers = list(layers)
        # Compiled code has no threads of its own, and a compiler can't trace a thread's value.
        self.pending = PerThread()
        self.traced: tuple[torch.Tensor, list[Any]] | None = None
        self.matrix: torch.Tensor | None = None
        if layers[0].packed is not None:
            return
        weights = [layer.base_layer.weight for layer in self.layers]
        ranks = sum(layer.r[layer.name] for layer in self.layers)
        rows = sum(len(weight) for weight in weights)
        width = weights[0].shape[1]
        room = wide_rank(ranks) if devices.by_operator(weights[0].device) else 0
        matrix: torch.Tensor = weights[0].new_zeros(rows, width + room)
        self.matrix = matrix
        for weight, place in zip(
            weights, matrix[:, :width].split([len(weight) for weight in weights]), strict=True
        ):
            place.copy_(weight.data)
            weight.data = place

    def output(self, layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        """The layer's output [..., O_i] for x [..., I]."""
        place = self.layers.index(layer)
        traced = torch.compiler.is_compiling()
        pending = self.traced if traced else self.pending.value
        if pending is None or pending[0] is not x or pending[1][place] is None:
            if not self.together(x):
                return _project(x, [layer])[0]
            outputs: list[Any] = list(_project(x, self.layers, self.matrix))
            pending = (x, outputs)
        output = pending[1][place]
        pending[1][place] = None
        left = pending if any(each is not None for each in pending[1]) else None
        if traced:
            self.traced = left
        else:
            self.pending.value = left
        return output

    def together(self, x: torch.Tensor) -> bool:
        """Whether all layers are plain and can be computed as one."""
        return all(layer.is_plain(x) for layer in self.layers) and self.is_merged(x)

    def is_merged(self, x: torch.Tensor) -> bool:
        """Whether the layers' weights still are views into the matrix, or are packed.

        A move or cast of the model gives them tensors of their own.
        """
        if self.layers[0].packed is not None:
            return True
        if self.matrix is None or self.matrix.dtype != compute_dtype(x):
            return False
        if torch.compiler.is_compiling():
            return True
        start = self.matrix.data_ptr()
        stride = self.matrix.stride(0) * self.matrix.element_size()
        for layer in self.layers:
            if layer.base_layer.weight.data_ptr() != start:
                self.matrix = None
                return False
            start += layer.base_layer.out_features * stride
        return True


def merge_projections(model: nn.Module) -> int:
    """Merges the projections of a model that read the same input, again at each call.

    Call it when the model is on its device and in its final types, before it is compiled, and not
    for sharded weights (ZeRO-3, FSDP). Without it each layer is fused by itself.

    Returns:
        The number of groups merged.
    """
    groups = 0
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.group, layer.packed = None, _packed(layer.base_layer)
    for name, parent in model.named_modules():
        children = dict(parent.named_children())
        for names in SAME_INPUT:
            shared = names[1:] if name.rsplit(".", 1)[-1] in CROSS_ATTENTION else names
            layers = [layer for layer in map(children.get, shared) if isinstance(layer, LoraLinear)]
            if len(layers) > 1 and _alike(layers):
                merged = ProjectionGroup(layers)
                groups += 1
                for layer in layers:
                    layer.group = merged
    return groups


def _packed(base: Any) -> Packed | None:
    """The 4-bit weight of a layer; None if it has none that the layer's device computes with.

    The CPU operator takes none whose block scales are quantized too.
    """
    state = getattr(base.weight, "quant_state", None)
    if state is None or state.quant_type not in ("nf4", "fp4"):
        return None
    codes = base.weight.data.as_subclass(torch.Tensor)
    packing = f"{state.quant_type}:{state.blocksize}"
    if not state.nested:
        return Packed(codes, state.absmax, packing)
    if devices.by_operator(codes.device):
        return None
    outer = state.state2
    nested = (outer.code, outer.absmax, state.offset)
    return Packed(codes, state.absmax, f"{packing}:{outer.blocksize}", nested)


def _alike(layers: Sequence[LoraLinear]) -> bool:
    """Whether layers are plain and agree in inputs, type, device, packing and having a bias."""
    kinds = {
        (
            layer.base_layer.in_features,
            layer.base_layer.weight.dtype,
            layer.base_layer.weight.device,
            layer.base_layer.bias is None,
            layer.packed.packing if layer.packed else None,
        )
        for layer in layers
    }
    return len(kinds) == 1 and all(layer.is_plain(layer.base_layer.weight) for layer in layers)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The type of matrix products with x: autocast's where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@dataclass(frozen=True)
class Operands:
    """The operands of layers that read the same x, as `lora_linear` takes them."""

    weights: list[torch.Tensor]
    packing: str
    room: int
    bias: torch.Tensor | None
    downs: list[torch.Tensor]
    ups: list[torch.Tensor]
    scales: list[float]


def operands(
    layers: Sequence[LoraLinear], dtype: torch.dtype, matrix: torch.Tensor | None = None
) -> Operands:
    """The operands of layers that read the same x.

    Args:
        layers: The layers, all plain.
        dtype: The type to compute in.
        matrix: The merged weights of several layers, for the operator with room for B.
    """
    names = [layer.name for layer in layers]
    bases = [layer.base_layer for layer in layers]
    biases = [base.bias.to(dtype) for base in bases if base.bias is not None]
    if layers[0].packed is not None:
        weights = [
            tensor
            for layer in layers
            if layer.packed
            for tensor in layer.packed.tensors(layer.base_layer)
        ]
    else:
        weights = [bases[0].weight.to(dtype) if matrix is None else matrix]
    return Operands(
        weights,
        layers[0].packed.packing if layers[0].packed else "",
        wide_rank(sum(layer.r[name] for layer, name in zip(layers, names, strict=True)))
        if len(layers) > 1
        else 0,
        (biases[0] if len(biases) == 1 else torch.cat(biases)) if biases else None,
        _weights([layer.lora_A[name] for layer, name in zip(layers, names, strict=True)]),
        _weights([layer.lora_B[name] for layer, name in zip(layers, names, strict=True)]),
        [layer.scaling[name] for layer, name in zip(layers, names, strict=True)],
    )


def _weights(layers: Sequence[Any]) -> list[torch.Tensor]:
    return [layer.weight for layer in layers]


def _project(
    x: torch.Tensor, layers: Sequence[LoraLinear], matrix: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """The outputs [..., O_i] of layers that read x [..., I].

    `matrix` is their merged weights, for the operator with room for B.
    """
    dtype = compute_dtype(x)
    outputs = [layer.base_layer.out_features for layer in layers]
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    of = operands(layers, dtype, matrix)
    if devices.by_operator(x.device):
        quick = by_kernel(rows, outputs)
        out, _ = lora_linear(
            rows, of.weights, of.packing, of.room, quick, of.bias, of.downs, of.ups, of.scales
        )
    else:
        out = traceable_lora(rows, of.weights, of.packing, of.bias, of.downs, of.ups, of.scales)
    # A 4-bit layer's output has the type of its input.
    out = out.to(x.dtype) if of.packing else out
    return out.view(*x.shape[:-1], out.shape[-1]).split(outputs, -1)
