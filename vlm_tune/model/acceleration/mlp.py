"""The operator behind gated feed-forward parts: y = (f(x Wg^T) * x Wu^T) Wd^T, each with LoRA or without.

In bf16 each pass is one kernel (`gated.cpp`) where there is one. Elsewhere on a CPU a training step goes through torch's
matrix products, some rows at a time (`gated_rows.py`): of what lies between, only the outputs of gate and up are kept. For
whatever the operator does not compute, a module runs as transformers wrote it.

Shapes: T tokens, H inputs and outputs, F numbers between, R the ranks of gate and up together, D that of down.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from vlm_tune.kernels import gated_mlp
from vlm_tune.kernels.cpu import native
from vlm_tune.kernels.gated_mlp import ACTIVATIONS, gated_rows, gated_rows_backward
from vlm_tune.kernels.lora_linear import NO_NORM, Adapters, by_layer, rows_of, sizes, unpacked
from vlm_tune.model.acceleration.lora_layers import LoraLinear, Operands, compute_dtype

# A compiler's cache knows an operator by its name alone, so what it does is part of that.
PARTS = (Path(__file__), Path(gated_mlp.__file__))
SOURCE = hashlib.sha256(
    b"".join(part.read_bytes() for part in PARTS) + native.code(native.KERNELS)
).hexdigest()[:8]

NAMES = (("gate_proj", "up_proj", "down_proj", "act_fn"), ("wi_0", "wi_1", "wo", "act"))
"""What Llama's family and T5's call the three layers and the activation."""

LARGE = 6144
"""H + 2F above which too few rows fit a core's cache beside the weights that pass."""

FEW = 32
"""Rows a thread below which the kernel's blocks are not filled."""


def gate(model: nn.Module) -> int:
    """Lets the gated feed-forward parts of a language model run by the operator where they can; how many there are."""
    found = 0
    for module in model.modules():
        for *names, act in NAMES:
            if isinstance(module, GatedModule) or not all(
                name in module._modules for name in (*names, act)
            ):
                continue
            number = _activation(type(module), (*names, act), module._modules[act])
            if number is not None:
                module.__class__ = _gated_class(type(module), tuple(names), number)
                found += 1
    return found


def _activation(kind: type[nn.Module], names: Sequence[str], act: Any) -> int | None:
    """The number of the activation by which a class of modules computes, by what a small one answers; None where it does anything else."""
    with torch.device("cpu"), torch.no_grad():
        # No numbers are drawn: a recipe's seed gives the same model with it as without.
        layers: list[Any] = [
            skip_init(nn.Linear, *shape, bias=False, device="cpu", dtype=torch.float32)
            for shape in ((3, 5), (3, 5), (5, 3))
        ]
        x = torch.linspace(-4, 4, 12, dtype=torch.float32).view(4, 3)
        for layer in layers:
            layer.weight.copy_(torch.linspace(-1.5, 2, 15).view(layer.weight.shape))
        small = kind.__new__(kind)
        nn.Module.__init__(small)
        for name, layer in zip(names, (*layers, act), strict=True):
            setattr(small, name, layer)
        # What T5's drops in training is none of the formula's business.
        small.dropout = nn.Identity()
        try:
            answer = kind.forward(small, x)
            wanted = [layers[2](f(layers[0](x)) * layers[1](x)) for f in ACTIVATIONS]
        except (AttributeError, TypeError, RuntimeError):
            return None
        return next(
            (
                number
                for number, found in enumerate(wanted)
                if torch.allclose(answer, found, rtol=1e-5, atol=1e-5)
            ),
            None,
        )


class GatedModule(nn.Module):
    """A gated feed-forward module that runs by the operator for frozen weights, with plain LoRA or none; else as its class does.

    A subclass is made of each class of modules: code that all modules share is compiled once.
    """

    layer_names: tuple[str, ...]
    activation: int

    def forward(self, x: Tensor) -> Tensor:
        """The outputs [..., H] of x [..., H]."""
        layers = self.layers()
        if not self.is_plain(x, layers):
            return super().forward(x)
        of = gated_operands(layers)
        keep = torch.is_grad_enabled() and (
            x.requires_grad or any(tensor.requires_grad for tensor in (*of.downs, *of.ups))
        )
        if not (keep or self.is_quick(x, layers)):
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
        return gated(
            rows, of.weights, of.packing, self.activation, of.downs, of.ups, of.scales, keep
        )[0].view(x.shape)

    def layers(self) -> list[Any]:
        """Gate, up and down."""
        return [self._modules[name] for name in self.layer_names]

    def is_quick(self, x: Tensor, layers: Sequence[Any]) -> bool:
        """Whether the kernel computes what the module does of x now."""
        if not self.is_plain(x, layers):
            return False
        bases = [layer.base_layer if isinstance(layer, LoraLinear) else layer for layer in layers]
        together = (isinstance(layers[0], LoraLinear) and layers[0].packed) or bases[
            0
        ].weight.stride() == bases[1].weight.stride()
        return bool(together) and _by_kernel(
            compute_dtype(x), bases[0].in_features, bases[0].out_features
        )

    def is_plain(self, x: Tensor, layers: Sequence[Any]) -> bool:
        """Whether the operator computes what the module does of x now."""
        if x.device.type != "cpu":
            return False
        dropout = self._modules.get("dropout")
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p:
            return False
        if not all(
            layer.is_plain(x) if isinstance(layer, LoraLinear) else _frozen(layer, x)
            for layer in layers
        ):
            return False
        if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
            return False
        bases = [layer.base_layer if isinstance(layer, LoraLinear) else layer for layer in layers]
        packings = {
            layer.packed.packing if isinstance(layer, LoraLinear) and layer.packed else ""
            for layer in layers
        }
        return (
            len(packings) == 1
            and (packings != {""} or {base.weight.dtype for base in bases} == {compute_dtype(x)})
            and all(base.bias is None for base in bases)
        )


def _by_kernel(dtype: torch.dtype, width: int, inner: int) -> bool:
    """Whether gated parts of these sizes are the kernel's to compute in this type."""
    return (
        dtype == torch.bfloat16
        and not (inner % 32 or width % 32)
        and width + 2 * inner <= LARGE
        and native.has_kernels()
    )


def gated_operands(layers: Sequence[Any]) -> Operands:
    """What gate, up and down compute with, each with LoRA or without, then of no ranks."""
    lora = [isinstance(layer, LoraLinear) for layer in layers]
    bases = [
        layer.base_layer if with_lora else layer
        for layer, with_lora in zip(layers, lora, strict=True)
    ]
    packed = [
        layer.packed if with_lora else None for layer, with_lora in zip(layers, lora, strict=True)
    ]
    packing = packed[0].packing if packed[0] else ""
    weights = [tensor for one in packed if one for tensor in (one.codes, one.scales)] or [
        base.weight for base in bases
    ]
    downs = []
    ups = []
    scales = []
    for layer, base, with_lora in zip(layers, bases, lora, strict=True):
        name = layer.name if with_lora else ""
        downs.append(layer.lora_A[name].weight if name else torch.empty(0, base.in_features))
        ups.append(layer.lora_B[name].weight if name else torch.empty(base.out_features, 0))
        scales.append(layer.scaling[name] if name else 0.0)
    return Operands(weights, packing, 0, None, downs, ups, scales)


@functools.cache
def _gated_class(kind: type[nn.Module], names: tuple[str, ...], activation: int) -> type[nn.Module]:
    return type(
        kind.__name__,
        (GatedModule, kind),
        {"layer_names": names, "activation": activation, "__module__": __name__},
    )


def _frozen(layer: Any, x: Tensor) -> bool:
    """Whether a layer without LoRA is a frozen weight and nothing else."""
    return (
        type(layer) is nn.Linear
        and not layer.weight.requires_grad
        and layer.weight.device == x.device
        and not hasattr(layer.weight, "ds_id")
    )


def gated_weights(
    weights: Sequence[Tensor],
    packing: str,
    ups: Sequence[Tensor],
    downs: Sequence[Tensor],
    like: Tensor,
) -> list[Tensor]:
    """Gate and up [F, H] and down [H, F]: as they are given, or unpacked for this pass."""
    if not packing:
        return list(weights)
    shapes = [(len(up), down.shape[1]) for up, down in zip(ups, downs, strict=True)]
    return [
        unpacked(codes, scales, packing, shape, like.dtype)
        for codes, scales, shape in zip(weights[::2], weights[1::2], shapes, strict=True)
    ]


def _shape(rows: Tensor, weights: Sequence[Tensor], activation: int, *strides: int) -> Any:
    return sizes(
        *rows.shape,
        len(weights[0]),
        activation,
        rows.stride(0),
        *(weight.stride(0) for weight in weights),
        *strides,
    )


@torch.library.custom_op(f"vlm_tune::gated_{SOURCE}", mutates_args=())
def gated(
    rows: Tensor,
    weights: Sequence[Tensor],
    packing: str,
    activation: int,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs [T, H] of rows [T, H], and with `keep` what the backward pass wants beside its inputs.

    `weights` are gate and up [F, H] and down [H, F], or with a `packing` (as nf4:64) the codes and block scales of each. `downs` and
    `ups` are A and B of each, of no ranks where it has none. Kept are the outputs of gate and up, by blocks of the kernel's own
    [32 ceil(T / 32), 2F] or one after the other, and those of the A: [T, R] and [T, D].
    """
    matrices = gated_weights(weights, packing, ups, downs, rows)
    rows = rows_of(rows)
    kept = _kept(rows, downs, ups, keep)
    few = not keep and len(rows) < FEW * torch.get_num_threads()
    if few or not _by_kernel(rows.dtype, rows.shape[1], len(ups[0])):
        return gated_rows(
            rows, matrices, activation, downs, ups, scales, kept if keep else None
        ), *kept
    adapters = Adapters(downs, ups, scales)
    out = rows.new_empty(rows.shape)
    held = kept if keep else (None,) * 3
    shape = _shape(rows, matrices, activation)
    native.kernels().gated(
        shape,
        adapters.array,
        *native.pointers(rows, None),
        NO_NORM,
        *native.pointers(None, *matrices, out, *held),
    )
    return out, *kept


def _kept(
    rows: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor], keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    count = rows.shape[0] if keep else 0
    # Only the kernel, which computes in bf16, writes blocks of 32 rows.
    blocks = (count + 31) // 32 * 32 if rows.dtype == torch.bfloat16 else count
    return (
        rows.new_empty(blocks, 2 * ups[0].shape[0]),
        rows.new_empty(count, downs[0].shape[0] + downs[1].shape[0]),
        rows.new_empty(count, downs[2].shape[0]),
    )


@gated.register_fake
def _(
    rows: Tensor,
    weights: Any,
    packing: str,
    activation: int,
    downs: Any,
    ups: Any,
    scales: Any,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return rows.new_empty(rows.shape), *_kept(rows, downs, ups, keep)


@torch.library.custom_op(f"vlm_tune::gated_backward_{SOURCE}", mutates_args=())
def gated_backward(
    gradient: Tensor,
    rows: Tensor,
    kept: Sequence[Tensor],
    weights: Sequence[Tensor],
    packing: str,
    activation: int,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x [T, H] (of no rows unless needed) and fp32 ones of every A and of every B, one after another, given [T, H]."""
    matrices = gated_weights(weights, packing, ups, downs, rows)
    rows = rows_of(rows)
    gradient = rows_of(gradient)
    found = _gradients(gradient, downs, ups, needs_x)
    if not _by_kernel(rows.dtype, rows.shape[1], len(ups[0])):
        gated_rows_backward(gradient, rows, kept, matrices, activation, downs, ups, scales, found)
        return found
    adapters = Adapters(downs, ups, scales)
    native.kernels().gated_backward(
        _shape(rows, matrices, activation, gradient.stride(0)),
        adapters.array,
        *native.pointers(
            gradient, rows, None, None, *matrices, *kept, found[0] if needs_x else None, *found[1:]
        ),
    )
    return found


def _gradients(
    gradient: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor], needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (
        gradient.new_empty(gradient.shape[0] if needs_x else 0, gradient.shape[1]),
        gradient.new_empty(sum(down.numel() for down in downs), dtype=wide),
        gradient.new_empty(sum(up.numel() for up in ups), dtype=wide),
    )


@gated_backward.register_fake
def _(
    gradient: Tensor,
    rows: Tensor,
    kept: Any,
    weights: Any,
    packing: str,
    activation: int,
    downs: Any,
    ups: Any,
    scales: Any,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(gradient, downs, ups, needs_x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, weights, ctx.packing, ctx.activation, downs, ups, ctx.scales, _ = inputs
    ctx.count = len(weights)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for what is kept would be as large as it
    ctx.save_for_backward(rows, *output[1:], *weights, *downs, *ups)


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
    rows, *rest = ctx.saved_tensors
    kept = rest[:3]
    weights = rest[3 : 3 + ctx.count]
    downs = rest[3 + ctx.count : 6 + ctx.count]
    ups = rest[6 + ctx.count :]
    needs_x = ctx.needs_input_grad[0]
    x, *found = gated_backward(
        gradient, rows, kept, weights, ctx.packing, ctx.activation, downs, ups, ctx.scales, needs_x
    )
    of_downs, of_ups = (
        by_layer(flat, layers) for flat, layers in zip(found, (downs, ups), strict=True)
    )
    return x if needs_x else None, [None] * ctx.count, None, None, of_downs, of_ups, None, None


gated.register_autograd(_backward, setup_context=_save)
