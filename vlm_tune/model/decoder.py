"""Decoder layers as one operator: x + attention of x normed, and that + the feed-forward part of it normed.

They are for a CPU with AMX, in bf16, and for frozen weights with plain LoRA: between the kernels of projections, attention
and the feed-forward part nothing is left to compute, so nothing is written to memory that a later pass does not read, and
nothing has to be compiled. Elsewhere, and for whatever the kernels do not compute, a layer runs as transformers wrote it.

Shapes: B rows, L tokens, T = B L, E width, H query heads, G key heads, D head width, O = (H + 2G) D.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from vlm_tune.model.feedforward import GatedModule, gated_backward_kernel, gated_kernel, gated_operands, gated_weights
from vlm_tune.model.fused import LoraLinear, Operands, compute_dtype, operands
from vlm_tune.model.projection import LARGE, TOGETHER, Adapters, by_layer, has_kernel, joined_weights, low_rank, low_rank_backward
from vlm_tune.model.tree_attention import NAME, attend_merged, attend_merged_backward, turned

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def join(model: nn.Module) -> int:
    """Lets the decoder layers of a language model run by the kernels where they can; how many there are."""
    known: dict[type[nn.Module], bool] = {}
    found = 0
    for module in list(model.modules()):
        kind = type(module)
        if isinstance(module, DecoderLayer) or not {"self_attn", "mlp", *NORMS} <= module._modules.keys():
            continue
        if not isinstance(module.mlp, GatedModule) or set(module.self_attn._modules) != set(PROJECTIONS):
            continue
        if kind not in known:
            known[kind] = _is_plain(module)
        if known[kind]:
            module.__class__ = _joined_class(kind)
            found += 1
    return found


def _is_plain(layer: Any) -> bool:
    """Whether layers of this class compute the formula of the two operators, by what a small one answers."""
    config = copy.deepcopy(getattr(layer.self_attn, "config", None))
    heads, groups, width, length = 4, 2, 32, 6
    if config is None:
        return False
    config.hidden_size, config.intermediate_size, config.head_dim = heads * width, 96, width
    config.num_attention_heads, config.num_key_value_heads = heads, groups
    config._attn_implementation = "eager"
    try:
        with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small: Any = type(layer)(config, 0).float()
            for parameter in small.parameters():
                parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 1.0))
            x, cos, sin = torch.randn(2, length, heads * width), torch.randn(2, length, width), torch.randn(2, length, width)
            mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
            answer = small(x, attention_mask=mask, position_embeddings=(cos, sin), use_cache=False)
            return isinstance(answer, Tensor) and torch.allclose(answer, _formula(small, x, cos, sin, heads, groups), rtol=1e-3, atol=1e-3)
    except (AttributeError, TypeError, RuntimeError, ValueError, KeyError):
        return False


def _formula(layer: Any, x: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int) -> Tensor:
    attention, (first, second) = layer.self_attn, (getattr(layer, name) for name in NORMS)
    normed = rms_norm(x, x.shape[-1:], first.weight, first.variance_epsilon)
    query, key, value = (getattr(attention, name)(normed).unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2) for name in PROJECTIONS[:3])
    query, key = turned(query, cos, sin), turned(key, cos, sin).repeat_interleave(heads // groups, 1)
    value = value.repeat_interleave(heads // groups, 1)
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=attention.scaling)
    x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
    return x + layer.mlp(rms_norm(x, x.shape[-1:], second.weight, second.variance_epsilon))


@dataclass(frozen=True)
class Prepared:
    """What a layer computes with, ready for the kernels: `adapted` are A of all seven layers, then B of all."""

    inner: Operands
    outer: Operands
    gated: Operands
    norms: tuple[tuple[Tensor, float], tuple[Tensor, float]]
    activation: int
    scale: float
    adapters: tuple[Adapters, Adapters, Adapters]

    @property
    def adapted(self) -> list[Tensor]:
        parts = (self.inner, self.outer, self.gated)
        return [*(down for of in parts for down in of.downs), *(up for of in parts for up in of.ups)]

    def attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weights [O, E] of q, k and v in one, and [E, H D] of o: as they lie, or unpacked for this pass."""
        inner, outer = self.inner, self.outer
        heads = outer.downs[0].shape[1]
        return (
            joined_weights(inner.weights, inner.packing, inner.room, inner.ups, x, x.shape[-1]),
            joined_weights(outer.weights, outer.packing, outer.room, outer.ups, x, heads),
        )

    def feed_forward(self, x: Tensor) -> list[Tensor]:
        """The weights of gate, up and down."""
        return gated_weights(self.gated.weights, self.gated.packing, self.gated.ups, self.gated.downs, x)


class DecoderLayer(nn.Module):
    """A decoder layer that runs by the kernels for frozen weights with plain LoRA; else as its class does."""

    self_attn: Any
    mlp: Any
    # Asking all layers of all that could have changed takes longer than some kernels do.
    prepared: tuple[tuple[Any, ...], Prepared | None] | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states [B, L, E] after the layer, of those before it."""
        tables, mask = kwargs.get("position_embeddings"), kwargs.get("attention_mask")
        if args or tables is None or mask is None or kwargs.get("past_key_values") is not None or hidden_states.dtype != torch.bfloat16:
            return super().forward(hidden_states, *args, **kwargs)
        prepared = self._prepare(hidden_states)
        # Tables of some of a head's numbers turn only those.
        if prepared is None or tables[0].shape[-1] != self.self_attn.head_dim or kwargs.get("output_attentions"):
            return super().forward(hidden_states, *args, **kwargs)
        x = hidden_states.contiguous()
        cos, sin = (table.to(x.dtype).expand(*x.shape[:2], -1).contiguous() for table in tables)
        found: Any = _Layer.apply(x, cos, sin, mask[:, 0, 0].contiguous(), prepared, *prepared.adapted)
        return found

    def is_ready(self) -> bool:
        """Whether what the layer is made of is what the kernels compute."""
        norms: list[Any] = [self._modules[name] for name in NORMS]
        layers = [self.self_attn._modules[name] for name in PROJECTIONS]
        if any(module._forward_hooks or module._forward_pre_hooks for module in (self.self_attn, self.mlp, *norms, *layers)):
            return False
        if any(norm.weight.requires_grad or norm.weight.dtype != torch.bfloat16 for norm in norms):
            return False
        if not all(isinstance(layer, LoraLinear) for layer in layers) or not has_kernel():
            return False
        merged, outputs = layers[0].siblings, [layer.base_layer.out_features for layer in layers]
        return merged is not None and merged.layers == layers[:3] and sum(outputs[:3]) <= TOGETHER and max(outputs) <= LARGE

    def _prepare(self, x: Tensor) -> Prepared | None:
        """What the kernels take; None where they do not compute what the layer does now."""
        state = self._state(x)
        if self.prepared is None or self.prepared[0] != state:
            self.prepared = state, self._operands(x)
        return self.prepared[1]

    def _state(self, x: Tensor) -> tuple[Any, ...]:
        """All that can change what the layer computes: hooks, adapters, what trains, and where weights lie."""
        attention, mlp = self.self_attn, self.mlp
        modules = [attention, mlp, *(self._modules[name] for name in NORMS), *attention._modules.values(), *mlp._modules.values()]
        found: list[Any] = [attention.config._attn_implementation, x.device, compute_dtype(x)]
        for module in modules:
            own = module.__dict__
            found += bool(own["_forward_hooks"] or own["_forward_pre_hooks"]), own["training"]
            if isinstance(module, LoraLinear):
                found += own.get("siblings"), own.get("packed"), own["_disable_adapters"], len(own["merged_adapters"]), str(own["_active_adapter"])
                parts = own["_modules"]
                base = parts["base_layer"].__dict__
                found.append(bool(base["_forward_hooks"] or base["_forward_pre_hooks"]))
                held = [*base["_parameters"].values()]
                for group in (parts["lora_A"], parts["lora_B"]):
                    held += (each.__dict__["_parameters"]["weight"] for each in group.__dict__["_modules"].values())
            else:
                held = [*own["_parameters"].values()]
            for each in held:
                if each is not None:
                    found += id(each), each.requires_grad, each.dtype, None if isinstance(each, FakeTensor) else each.data_ptr()
        return tuple(found)

    def _operands(self, x: Tensor) -> Prepared | None:
        attention, gated = self.self_attn, self.mlp.layers()
        if attention.config._attn_implementation != NAME or x.device.type != "cpu" or compute_dtype(x) != torch.bfloat16:
            return None
        if not self.is_ready() or not self.mlp.is_quick(x, gated) or self.mlp._forward_hooks:
            return None
        if not attention.q_proj.siblings.together(x) or not attention.o_proj.is_plain(x):
            return None
        merged, norms = attention.q_proj.siblings, [self._modules[name] for name in NORMS]
        parts = operands(merged.layers, x.dtype, merged.matrix), operands([attention.o_proj], x.dtype), gated_operands(gated)
        first, second = ((norm.weight, norm.variance_epsilon) for norm in norms)
        inner, outer, last = (Adapters(of.downs, of.ups, of.scales) for of in parts)
        return Prepared(*parts, (first, second), self.mlp.activation, attention.scaling, (inner, outer, last))


@functools.cache
def _joined_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (DecoderLayer, kind), {"__module__": __name__})


class _Layer(torch.autograd.Function):
    """Both halves of a layer: x + attention of x normed, and upon that the feed-forward part of it normed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, ends: Tensor, of: Prepared, *_: Tensor) -> Tensor:
        inner, outer = of.attention(x)
        (norm, epsilon), (norm_of_middle, epsilon_of_middle) = of.norms
        adapters, rows = of.adapters, x.view(-1, x.shape[-1])
        merged, low = low_rank(rows, inner, of.inner.bias, adapters[0], norm=norm, epsilon=epsilon)
        merged = merged.view(*x.shape[:2], -1)
        heads, logs = attend_merged(merged, len(of.inner.ups[0]) // cos.shape[-1], cos, sin, ends, of.scale)
        middle, low_out = low_rank(heads.view(len(rows), -1), outer, of.outer.bias, adapters[1], residual=rows)
        keep = any(ctx.needs_input_grad)
        weights = of.feed_forward(x)
        out, *kept = gated_kernel(middle, weights, of.activation, adapters[2], keep, norm_of_middle, epsilon_of_middle)
        if keep:
            ctx.of = of
            ctx.save_for_backward(x, cos, sin, ends, merged, heads, logs, low, low_out, middle, *kept)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, cos, sin, ends, merged, heads, logs, low, low_out, middle, *kept = ctx.saved_tensors
        of: Prepared = ctx.of
        (norm, epsilon), (norm_of_middle, epsilon_of_middle) = of.norms
        adapters, rows, flow = of.adapters, x.view(-1, x.shape[-1]), gradients[0].contiguous().view(-1, x.shape[-1])
        flow, *of_gated = gated_backward_kernel(
            flow, middle, kept, of.feed_forward(x), of.activation, adapters[2], True, norm_of_middle, epsilon_of_middle
        )
        inner, outer = of.attention(x)
        of_heads, *of_outer = low_rank_backward(flow, heads.view(len(rows), -1), low_out, outer, adapters[1], True)
        of_merged = attend_merged_backward(of_heads.view(heads.shape), merged, cos, sin, heads, logs, ends, of.scale)
        needs_x = ctx.needs_input_grad[0]
        of_x, *of_inner = low_rank_backward(
            of_merged.view(len(rows), -1), rows, low, inner, adapters[0], needs_x, norm=norm, epsilon=epsilon, extra=flow
        )
        found = [
            each
            for kind, named in enumerate(("downs", "ups"))
            for flat, part in zip((of_inner, of_outer, of_gated), (of.inner, of.outer, of.gated), strict=True)
            for each in by_layer(flat[kind].flatten(), getattr(part, named))
        ]
        return of_x.view(x.shape) if needs_x else None, None, None, None, None, *found
