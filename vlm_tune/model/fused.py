"""LoRA linear layers whose forward and backward are written out, and projections that share their input as one GEMM.

The layers are PEFT's own with another `forward`: names, files, merging and switching off stay PEFT's. What is computed
is y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T for one layer, or for several that read the same x (q, k and v).

Shapes: T tokens, I inputs, O_i outputs of a layer, O their sum, r_i ranks, R their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q", "k", "v"), ("wi_0", "wi_1"))
"""Names of layers that read the same input, as Llama's family and T5's call them."""

CROSS_ATTENTION = {"EncDecAttention", "encoder_attn", "crossattention"}
"""Modules whose first sibling, the query, reads another input than the other two."""


class LoraLinear(Linear):
    """PEFT's LoRA linear layer with a fused pass where that computes the same: plain LoRA on a frozen weight.

    DoRA and other variants, dropout in training, several adapters, merged or disabled ones, and weights that are
    trained, sharded or offloaded take PEFT's own path.
    """

    base_layer: Any
    siblings: Siblings | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not self._plain(x):
            return super().forward(x, *args, **kwargs)
        return _project(x, [self])[0] if self.siblings is None else self.siblings.output(self, x)

    @property
    def _name(self) -> str:
        return self.active_adapters[0]

    def _plain(self, x: torch.Tensor) -> bool:
        base, active = self.base_layer, self.active_adapters
        if self.disable_adapters or self.merged or self.lora_variant or len(active) != 1 or active[0] not in self.lora_A:
            return False
        weight, bias = base.weight, base.bias
        return (
            type(base) is nn.Linear
            and not (weight.requires_grad or (bias is not None and bias.requires_grad))
            and not (self.training and isinstance(self.lora_dropout[active[0]], nn.Dropout))
            and self.lora_B[active[0]].bias is None
            and weight.device == x.device
            and not hasattr(weight, "ds_id")  # ZeRO-3 gathers a sharded weight only for the module that owns it
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
        weights = [layer.base_layer.weight for layer in self.layers]
        ranks = sum(layer.r[layer._name] for layer in self.layers)
        rows, width = sum(len(weight) for weight in weights), weights[0].shape[1]
        # Rows of whole 16 bytes, which GPU kernels want; the columns between are zero.
        matrix: torch.Tensor = weights[0].new_zeros(rows, width + -(-ranks // 8) * 8)
        self.matrix: torch.Tensor | None = matrix
        for weight, place in zip(weights, matrix[:, :width].split([len(weight) for weight in weights]), strict=True):
            place.copy_(weight.data)
            weight.data = place

    def output(self, layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        """The layer's output [..., O_i] for x [..., I]."""
        place, held = self.layers.index(layer), self.held
        if held is None or held[0] is not x or held[1][place] is None:
            if not self._together(x):
                return _project(x, [layer])[0]
            outputs: list[Any] = list(_project(x, self.layers, self.matrix))
            held = self.held = (x, outputs)
        found, held[1][place] = held[1][place], None
        if not any(left is not None for left in held[1]):
            self.held = None
        return found

    def _together(self, x: torch.Tensor) -> bool:
        """Whether the weights still are views into the matrix (a move or cast of the model parts them) and all layers are plain."""
        if self.matrix is None or self.matrix.dtype != _compute_dtype(x) or not all(layer._plain(x) for layer in self.layers):
            return False
        if torch.compiler.is_compiling():
            return True
        start, stride = self.matrix.data_ptr(), self.matrix.stride(0) * self.matrix.element_size()
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
    for name, parent in model.named_modules():
        children = dict(parent.named_children())
        for names in SIBLINGS:
            wanted = names[1:] if name.rsplit(".", 1)[-1] in CROSS_ATTENTION else names
            layers = [layer for layer in map(children.get, wanted) if isinstance(layer, LoraLinear)]
            for layer in layers:
                layer.siblings = None
            if len(layers) > 1 and _alike(layers):
                group = Siblings(layers)
                found += 1
                for layer in layers:
                    layer.siblings = group
    return found


def _alike(layers: Sequence[LoraLinear]) -> bool:
    weights = [layer.base_layer.weight for layer in layers]
    kinds = {
        (weight.shape[1], weight.dtype, weight.device, layer.base_layer.bias is None) for weight, layer in zip(weights, layers, strict=True)
    }
    return len(kinds) == 1 and all(layer._plain(weight) for weight, layer in zip(weights, layers, strict=True))


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _project(x: torch.Tensor, layers: Sequence[LoraLinear], matrix: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    names = [layer._name for layer in layers]
    downs = [layer.lora_A[name].weight for layer, name in zip(layers, names, strict=True)]
    ups = [layer.lora_B[name].weight for layer, name in zip(layers, names, strict=True)]
    scales = [layer.scaling[name] for layer, name in zip(layers, names, strict=True)]
    bases = [layer.base_layer for layer in layers]
    weights = [base.weight for base in bases] if matrix is None else matrix[:, : x.shape[-1]].split([base.out_features for base in bases])
    return _Project.apply(x, weights, [base.bias for base in bases], matrix, scales, *downs, *ups)


def _parts(sizes: Sequence[int]) -> list[slice]:
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


class _Project(torch.autograd.Function):
    """Outputs [..., O_i] of LoRA layers that read x [..., I]; W [O_i, I] and b [O_i] are frozen.

    Saved for the backward pass: x, x A^T [T, R], and A and B in the type computed in.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        biases: list[torch.Tensor | None],
        matrix: torch.Tensor | None,
        scales: list[float],
        *factors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        dtype, width = _compute_dtype(x), x.shape[-1]
        rows = x.reshape(-1, width).to(dtype)
        count = len(weights)
        ups = [(factor * scale).to(dtype) for factor, scale in zip(factors[count:], scales, strict=True)]
        sizes, ranks = [len(weight) for weight in weights], [len(down) for down in factors[:count]]
        gap = 0 if matrix is None else matrix.shape[1] - width - sum(ranks)
        down = torch.cat([*factors[:count], factors[0].new_zeros(gap, width)]).to(dtype)
        low = rows @ down.t()
        bias = None if biases[0] is None else torch.cat([each.to(dtype) for each in biases if each is not None])
        if matrix is None:
            out = linear(rows, weights[0].to(dtype), bias).addmm_(low, ups[0].t())
        elif torch.compiler.is_compiling():
            # A compiled graph can't write into a matrix that is shared with the parameters.
            out = linear(rows, matrix[:, :width], bias)
            out = out + torch.cat([low[:, rank] @ up.t() for up, rank in zip(ups, _parts(ranks), strict=True)], 1)
        else:
            wide = torch.cat([rows, low], 1)
            rows, low = wide[:, :width], wide[:, width:]
            # Not in place as autograd counts it: the frozen columns stay what they were.
            tail = matrix.data[:, width:]
            for up, where, rank in zip(ups, _parts(sizes), _parts(ranks), strict=True):
                tail[where, rank].copy_(up)
            out = linear(wide, matrix, bias)
        ctx.save_for_backward(rows, low, down, *ups)
        ctx.weights, ctx.scales, ctx.ranks = weights, scales, ranks
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, *(factor.dtype for factor in factors))
        return tuple(part.view(*x.shape[:-1], size) for part, size in zip(out.split(sizes, 1), sizes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        rows, low, down, *ups = ctx.saved_tensors
        count, ranks = len(ups), _parts(ctx.ranks)
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        with torch.autocast(rows.device.type, enabled=False):
            flat = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
            gap = low.new_zeros(len(low), low.shape[1] - sum(ctx.ranks))
            low_gradient = torch.cat([*(gradient @ up for gradient, up in zip(flat, ups, strict=True)), gap], 1)
            x_gradient = None
            if needs_x:
                x_gradient = low_gradient @ down
                for gradient, weight in zip(flat, ctx.weights, strict=True):
                    x_gradient.addmm_(gradient, weight.to(gradient.dtype))
                x_gradient = x_gradient.to(ctx.dtypes[0]).view(ctx.shape)
            found: list[torch.Tensor | None] = [None] * (2 * count)
            if any(needs[:count]):
                down_gradient = (low_gradient.t() @ rows).to(ctx.dtypes[1])
                for place, rank in enumerate(ranks):
                    found[place] = down_gradient[rank]
            transposed = low.t().contiguous()
            for place, (gradient, rank) in enumerate(zip(flat, ranks, strict=True)):
                if needs[count + place]:
                    up_gradient = (transposed[rank] @ gradient).t()
                    kept = up_gradient.to(ctx.dtypes[1 + count + place], memory_format=torch.contiguous_format)
                    found[count + place] = kept.mul_(ctx.scales[place])
        return (x_gradient, None, None, None, None, *found)
