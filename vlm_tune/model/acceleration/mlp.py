"""The operator of gated MLPs: y = (f(x Wg^T) * x Wu^T) Wd^T, each layer with LoRA or without.

In bf16 each pass is one kernel call (`gated.cpp`) where the kernel is available. Else a training
step on a CPU goes through torch's matrix products, some rows at a time (`gated_rows`): of the
intermediate tensors only the outputs of gate and up are saved. For whatever the operator does not
compute, a module runs the forward pass of transformers.

Shapes: T tokens, H inputs and outputs, F intermediate width, R the ranks of gate and up together,
D the rank of down.
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

# A compiler's cache identifies an operator by its name alone, so the name has a hash of its code.
PARTS = (Path(__file__), Path(gated_mlp.__file__))
SOURCE = hashlib.sha256(
    b"".join(part.read_bytes() for part in PARTS) + native.code(native.KERNELS)
).hexdigest()[:8]

NAMES = (("gate_proj", "up_proj", "down_proj", "act_fn"), ("wi_0", "wi_1", "wo", "act"))
"""Names of the three layers and the activation in models of the Llama and T5 families."""

LARGE = 6144
"""H + 2F above which too few rows fit a core's cache beside the weights streamed through it."""

FEW = 32
"""Rows per thread below which the kernel's blocks are not full."""


def gate(model: nn.Module) -> int:
    """Lets the gated MLPs of a language model run by the operator where it computes the same.

    The class of each such module is replaced in place by a subclass of `GatedModule`.

    Returns:
        The number of modules replaced.
    """
    replaced = 0
    for module in model.modules():
        for *names, act in NAMES:
            if isinstance(module, GatedModule) or not all(
                name in module._modules for name in (*names, act)
            ):
                continue
            number = _activation(type(module), (*names, act), module._modules[act])
            if number is not None:
                module.__class__ = _gated_class(type(module), tuple(names), number)
                replaced += 1
    return replaced


def _activation(kind: type[nn.Module], names: Sequence[str], act: Any) -> int | None:
    """The index in `ACTIVATIONS` of the activation that a class of modules uses.

    A small module of the class is run and compared; None if its output fits none of them.
    """
    with torch.device("cpu"), torch.no_grad():
        # No random numbers are drawn, so a recipe's seed gives the same model with this as without.
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
        # T5's module has a dropout, which the formula leaves out.
        small.dropout = nn.Identity()
        try:
            output = kind.forward(small, x)
            candidates = [layers[2](f(layers[0](x)) * layers[1](x)) for f in ACTIVATIONS]
        except (AttributeError, TypeError, RuntimeError):
            return None
        return next(
            (
                number
                for number, candidate in enumerate(candidates)
                if torch.allclose(output, candidate, rtol=1e-5, atol=1e-5)
            ),
            None,
        )


class GatedModule(nn.Module):
    """A gated MLP that runs by the operator for frozen weights, with plain LoRA or none.

    In any other case it runs the forward pass of its original class. Each original class gets one
    subclass (`_gated_class`), so that code that its modules share is compiled once.
    """

    layer_names: tuple[str, ...]
    activation: int

    def forward(self, x: Tensor) -> Tensor:
        """The outputs [..., H] for x [..., H]."""
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
        """The linear layers gate, up and down."""
        return [self._modules[name] for name in self.layer_names]

    def is_quick(self, x: Tensor, layers: Sequence[Any]) -> bool:
        """Whether the kernel computes what the module does with x now."""
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
        """Whether the operator computes what the module does with x now."""
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
    """Whether the kernel computes MLPs of these widths H and F in this type."""
    return (
        dtype == torch.bfloat16
        and not (inner % 32 or width % 32)
        and width + 2 * inner <= LARGE
        and native.has_kernels()
    )


def gated_operands(layers: Sequence[Any]) -> Operands:
    """The operands of gate, up and down. A layer without LoRA has an A and a B of rank 0."""
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
    """Whether a layer without LoRA is a plain frozen linear layer, on the device of x."""
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
    """The weights of gate and up [F, H] and down [H, F], unpacked for this pass if in 4 bits."""
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
    """A gated MLP's outputs, and with `keep` the tensors that its backward pass needs.

    Args:
        rows: The inputs [T, H].
        weights: Gate and up [F, H] and down [H, F], or with a `packing` the codes and block scales
            of each.
        packing: The kind and block size of 4-bit codes, as in `nf4:64`, or an empty string.
        activation: The index in `ACTIVATIONS`.
        downs: LoRA A of each layer, of rank 0 where it has none.
        ups: LoRA B of each layer.
        scales: What each B is scaled by.
        keep: Whether a backward pass follows; without it the saved tensors have no rows.

    Returns:
        The outputs [T, H] and three saved tensors: the outputs of gate and up, in the kernel's
        block layout [32 ceil(T / 32), 2F] or all of gate before all of up; the outputs of A of gate
        and up [T, R]; and those of A of down [T, D].
    """
    matrices = gated_weights(weights, packing, ups, downs, rows)
    rows = rows_of(rows)
    saved = _saved(rows, downs, ups, keep)
    few = not keep and len(rows) < FEW * torch.get_num_threads()
    if few or not _by_kernel(rows.dtype, rows.shape[1], len(ups[0])):
        return gated_rows(
            rows, matrices, activation, downs, ups, scales, saved if keep else None
        ), *saved
    adapters = Adapters(downs, ups, scales)
    out = rows.new_empty(rows.shape)
    saved_or_none = saved if keep else (None,) * 3
    shape = _shape(rows, matrices, activation)
    native.kernels().gated(
        shape,
        adapters.array,
        *native.pointers(rows, None),
        NO_NORM,
        *native.pointers(None, *matrices, out, *saved_or_none),
    )
    return out, *saved


def _saved(
    rows: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor], keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for what `gated` saves for the backward pass, without rows unless `keep`."""
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
    return rows.new_empty(rows.shape), *_saved(rows, downs, ups, keep)


@torch.library.custom_op(f"vlm_tune::gated_backward_{SOURCE}", mutates_args=())
def gated_backward(
    gradient: Tensor,
    rows: Tensor,
    saved: Sequence[Tensor],
    weights: Sequence[Tensor],
    packing: str,
    activation: int,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a gated MLP, given that of its outputs, `gradient` [T, H].

    `saved` are the three tensors that `gated` saved; the other operands are those of `gated`.

    Returns:
        The gradient of x [T, H], or [0, H] if not needed; and in fp32 those of all A and of all B,
        flattened one after another.
    """
    matrices = gated_weights(weights, packing, ups, downs, rows)
    rows = rows_of(rows)
    gradient = rows_of(gradient)
    gradients = _gradients(gradient, downs, ups, needs_x)
    if not _by_kernel(rows.dtype, rows.shape[1], len(ups[0])):
        gated_rows_backward(
            gradient, rows, saved, matrices, activation, downs, ups, scales, gradients
        )
        return gradients
    adapters = Adapters(downs, ups, scales)
    native.kernels().gated_backward(
        _shape(rows, matrices, activation, gradient.stride(0)),
        adapters.array,
        *native.pointers(
            gradient,
            rows,
            None,
            None,
            *matrices,
            *saved,
            gradients[0] if needs_x else None,
            *gradients[1:],
        ),
    )
    return gradients


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
    saved: Any,
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
    ctx.set_materialize_grads(False)  # zeros for the saved outputs would be as large as they are
    ctx.save_for_backward(rows, *output[1:], *weights, *downs, *ups)


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
    rows, *rest = ctx.saved_tensors
    saved = rest[:3]
    weights = rest[3 : 3 + ctx.count]
    downs = rest[3 + ctx.count : 6 + ctx.count]
    ups = rest[6 + ctx.count :]
    needs_x = ctx.needs_input_grad[0]
    x, *flat_gradients = gated_backward(
        gradient, rows, saved, weights, ctx.packing, ctx.activation, downs, ups, ctx.scales, needs_x
    )
    of_downs, of_ups = (
        by_layer(flat, layers) for flat, layers in zip(flat_gradients, (downs, ups), strict=True)
    )
    return x if needs_x else None, [None] * ctx.count, None, None, of_downs, of_ups, None, None


gated.register_autograd(_backward, setup_context=_save)
