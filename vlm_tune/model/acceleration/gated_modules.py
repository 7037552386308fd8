"""Gated MLPs of language models that run by the operator `lora_gated_mlp`.

Shapes: E width, F intermediate width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from vlm_tune.compat import has_hooks
from vlm_tune.kernels import devices
from vlm_tune.kernels.mlp import by_kernel, lora_gated_mlp
from vlm_tune.kernels.reference_mlp import ACTIVATIONS
from vlm_tune.model.acceleration.lora_layers import LoraLinear, Operands, compute_dtype

NAMES = (("gate_proj", "up_proj", "down_proj", "act_fn"), ("wi_0", "wi_1", "wo", "act"))
"""Names of the three layers and the activation in models of the Llama and T5 families."""


def gated_class(module: nn.Module) -> type[nn.Module] | str | None:
    """The subclass of a gated MLP's class that runs by the operator.

    Returns:
        The class; the reason why the operator does not compute the MLP; or None if the module is
        no gated MLP.
    """
    children = dict(module.named_children())
    for *names, act in NAMES:
        if all(name in children for name in (*names, act)):
            number = _activation(type(module), (*names, act), children[act])
            if number is None:
                return "it computes another formula, or with another activation"
            return _gated_class(type(module), tuple(names), number)
    return None


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

    The operator is for CPUs. On other devices, and in any other case, it runs the forward pass of
    its original class. Each original class gets one subclass (`_gated_class`), so that code that
    its modules share is compiled once.
    """

    layer_names: tuple[str, ...]
    activation: int

    def forward(self, x: Tensor) -> Tensor:
        """The outputs [..., E] for x [..., E]."""
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
        return lora_gated_mlp(
            rows, of.weights, of.packing, self.activation, of.downs, of.ups, of.scales, keep
        )[0].view(x.shape)

    def layers(self) -> list[Any]:
        """The linear layers gate, up and down."""
        return [getattr(self, name) for name in self.layer_names]

    def is_quick(self, x: Tensor, layers: Sequence[Any]) -> bool:
        """Whether the kernel computes what the module does with x now."""
        if not self.is_plain(x, layers):
            return False
        bases = [layer.base_layer if isinstance(layer, LoraLinear) else layer for layer in layers]
        together = (isinstance(layers[0], LoraLinear) and layers[0].packed) or bases[
            0
        ].weight.stride() == bases[1].weight.stride()
        return bool(together) and by_kernel(
            compute_dtype(x), x.device, bases[0].in_features, bases[0].out_features
        )

    def is_plain(self, x: Tensor, layers: Sequence[Any]) -> bool:
        """Whether the operator computes what the module does with x now."""
        if not devices.by_operator(x.device):
            return False
        dropout = getattr(self, "dropout", None)
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p:
            return False
        if not all(
            layer.is_plain(x) if isinstance(layer, LoraLinear) else _frozen(layer, x)
            for layer in layers
        ):
            return False
        if any(has_hooks(layer) for layer in layers):
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
    weights = [
        tensor
        for one, base in zip(packed, bases, strict=True)
        if one
        for tensor in one.tensors(base)
    ] or [base.weight for base in bases]
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
