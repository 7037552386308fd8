"""LoRA linear layers whose forward and backward are written out, and projections that share their input as one GEMM.

The layers are PEFT's own with another `forward`: names, files, merging and switching off stay PEFT's. What is computed
is y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T for one layer, or for several that read the same x (q, k and v).

Shapes: T tokens, I inputs, O_i outputs of a layer, O their sum, r_i ranks, R their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn

from vlm_tune.kernels.lora_linear import by_kernel, project, wide_rank

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
)
"""Names of layers that read the same input, as Llama's family and T5's call them."""

CROSS_ATTENTION = {"EncDecAttention", "encoder_attn", "crossattention"}
"""Modules whose first sibling, the query, reads another input than the other two."""


@dataclass(frozen=True)
class Packed:
    """A layer's 4-bit codes, a scale a block of them, and how they are packed: the kind and the block, as nf4:64."""

    codes: torch.Tensor
    scales: torch.Tensor
    packing: str


class LoraLinear(Linear):
    """PEFT's LoRA linear layer with a fused pass where that computes the same: plain LoRA on a frozen weight.

    The weight may be packed in 4 bits, once `fuse` has seen it. DoRA and other variants, dropout in training, several
    adapters, merged or disabled ones, and weights that are trained, sharded or offloaded take PEFT's own path.
    """

    base_layer: Any
    siblings: Siblings | None = None
    packed: Packed | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not self.is_plain(x):
            return super().forward(x, *args, **kwargs)
        return _project(x, [self])[0] if self.siblings is None else self.siblings.output(self, x)

    @property
    def name(self) -> str:
        """That of the adapter it runs with."""
        return self.active_adapters[0]

    def _holds_codes(self) -> bool:
        """Whether `packed` still is what the layer holds: a move of the model makes other codes."""
        packed = self.packed
        return packed is not None and (
            torch.compiler.is_compiling()
            or packed.codes.data_ptr() == self.base_layer.weight.data_ptr()
        )

    def is_plain(self, x: torch.Tensor) -> bool:
        """Whether what it computes of x now is a frozen weight with plain LoRA and nothing else."""
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
            and not hasattr(
                weight, "ds_id"
            )  # ZeRO-3 gathers a sharded weight only for the module that owns it
            and not (base._forward_hooks or base._forward_pre_hooks)
        )


class Siblings:
    """Layers that read the same input: the first one called computes all, the others take what is theirs.

    Their frozen weights become views into one matrix [O, I + R], whose last columns hold the scaled B of each layer
    in its own rows and ranks: [x | x A^T] times it is all outputs in one GEMM.
    """

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers = list(layers)
        self.held: tuple[torch.Tensor, list[Any]] | None = None
        self.matrix: torch.Tensor | None = None
        if layers[0].packed is not None:
            return
        weights = [layer.base_layer.weight for layer in self.layers]
        ranks = sum(layer.r[layer.name] for layer in self.layers)
        rows = sum(len(weight) for weight in weights)
        width = weights[0].shape[1]
        matrix: torch.Tensor = weights[0].new_zeros(rows, width + wide_rank(ranks))
        self.matrix = matrix
        for weight, place in zip(
            weights, matrix[:, :width].split([len(weight) for weight in weights]), strict=True
        ):
            place.copy_(weight.data)
            weight.data = place

    def output(self, layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        """The layer's output [..., O_i] for x [..., I]."""
        place = self.layers.index(layer)
        held = self.held
        if held is None or held[0] is not x or held[1][place] is None:
            if not self.together(x):
                return _project(x, [layer])[0]
            outputs: list[Any] = list(_project(x, self.layers, self.matrix))
            held = self.held = (x, outputs)
        found = held[1][place]
        held[1][place] = None
        if not any(left is not None for left in held[1]):
            self.held = None
        return found

    def together(self, x: torch.Tensor) -> bool:
        """Whether the weights still are views into the matrix (a move or cast of the model parts them) and all layers are plain."""
        if self.layers[0].packed is not None:
            return all(layer.is_plain(x) for layer in self.layers)
        if (
            self.matrix is None
            or self.matrix.dtype != compute_dtype(x)
            or not all(layer.is_plain(x) for layer in self.layers)
        ):
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


def fuse(model: nn.Module) -> int:
    """Merges the projections of a model that share their input, anew at each call; how many groups it found.

    To be called when the model is where it will run and in its final types, before it is compiled, and not for
    sharded weights (ZeRO-3, FSDP). Without it each layer is fused by itself.
    """
    found = 0
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.siblings, layer.packed = None, _packed(layer.base_layer)
    for name, parent in model.named_modules():
        children = dict(parent.named_children())
        for names in SIBLINGS:
            wanted = names[1:] if name.rsplit(".", 1)[-1] in CROSS_ATTENTION else names
            layers = [layer for layer in map(children.get, wanted) if isinstance(layer, LoraLinear)]
            if len(layers) > 1 and _alike(layers):
                group = Siblings(layers)
                found += 1
                for layer in layers:
                    layer.siblings = group
    return found


def _packed(base: Any) -> Packed | None:
    """The 4-bit codes of a layer whose block scales are not packed in turn; None for any other."""
    state = getattr(base.weight, "quant_state", None)
    if state is None or state.nested or state.quant_type not in ("nf4", "fp4"):
        return None
    return Packed(
        base.weight.data.as_subclass(torch.Tensor),
        state.absmax,
        f"{state.quant_type}:{state.blocksize}",
    )


def _alike(layers: Sequence[LoraLinear]) -> bool:
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
    """The type that matrix products with x are in now."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@dataclass(frozen=True)
class Operands:
    """What layers that read the same x compute with: as `project` takes it."""

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
    """Those of layers that compute in `dtype`; `matrix` holds the frozen weights of several and room for B."""
    names = [layer.name for layer in layers]
    bases = [layer.base_layer for layer in layers]
    biases = [base.bias.to(dtype) for base in bases if base.bias is not None]
    if layers[0].packed is not None:
        weights = [
            tensor
            for layer in layers
            if layer.packed
            for tensor in (layer.packed.codes, layer.packed.scales)
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
    """The outputs [..., O_i] of layers that read x [..., I]; `matrix` holds their frozen weights and room for B."""
    dtype = compute_dtype(x)
    outputs = [layer.base_layer.out_features for layer in layers]
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    of = operands(layers, dtype, matrix)
    quick = by_kernel(rows, outputs)
    out, _ = project(
        rows, of.weights, of.packing, of.room, quick, of.bias, of.downs, of.ups, of.scales
    )
    # A 4-bit layer answers in the type that it was asked in.
    out = out.to(x.dtype) if of.packing else out
    return out.view(*x.shape[:-1], out.shape[-1]).split(outputs, -1)
