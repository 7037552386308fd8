"""Decoder layers as one kernel call per pass: h = x + attention(norm(x)), y = h + mlp(norm(h)).

They are for a CPU with AMX, in bf16, and for frozen weights with plain LoRA. Between the kernels of
projections, attention and the MLP nothing is left to compute, so nothing is written to memory that
a later pass does not read, and nothing has to be compiled. On other devices, and for whatever the
kernels do not compute, a layer runs the forward pass of transformers.

Shapes: B rows, L tokens, T = B L, E width, H query heads, G key heads, D head width,
O = (H + 2G) D.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._utils import _unflatten_dense_tensors
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from vlm_tune.compat import cache_name
from vlm_tune.kernels.cpu import native
from vlm_tune.kernels.lora_linear import LARGE, TOGETHER
from vlm_tune.model.acceleration.decoder_operands import NORMS, Prepared
from vlm_tune.model.acceleration.interval_attention import NAME, count_run, is_generating
from vlm_tune.model.acceleration.lora_layers import LoraLinear, compute_dtype
from vlm_tune.model.acceleration.mlp import GatedModule

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def join(model: nn.Module) -> int:
    """Makes decoder layers of a language model `DecoderLayer`s where possible; returns how many."""
    joined = 0
    for module in list(model.modules()):
        if (
            isinstance(module, DecoderLayer)
            or not {"self_attn", "mlp", *NORMS} <= module._modules.keys()
        ):
            continue
        layer: Any = module
        if (
            isinstance(layer.mlp, GatedModule)
            and set(layer.self_attn._modules) == set(PROJECTIONS)
            and _is_formula(layer)
        ):
            module.__class__ = _joined_class(type(module))
            joined += 1
    return joined


def _is_formula(layer: Any) -> bool:
    """Whether a layer computes `_formula`.

    A small layer of its class, config and index is run and compared: some layers of a model differ
    from their neighbours.
    """
    config = copy.deepcopy(getattr(layer.self_attn, "config", None))
    heads = 4
    groups = 2
    width = 32
    length = 6
    if config is None:
        return False
    config.hidden_size = heads * width
    config.intermediate_size = 96
    config.head_dim = width
    config.num_attention_heads = heads
    config.num_key_value_heads = groups
    config._attn_implementation = "eager"
    try:
        with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small: Any = type(layer)(config, layer.self_attn.layer_idx).float()
            for parameter in small.parameters():
                parameter.copy_(
                    torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 1.0)
                )
            x = torch.randn(2, length, heads * width)
            cos = torch.randn(2, length, width)
            sin = torch.randn(2, length, width)
            mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
            output = small(x, attention_mask=mask, position_embeddings=(cos, sin), use_cache=False)
            return isinstance(output, Tensor) and torch.allclose(
                output, _formula(small, x, cos, sin, heads, groups), rtol=1e-3, atol=1e-3
            )
    except Exception:
        # A class that fails with so small a config, whatever the reason, is none of these layers.
        return False


def _formula(layer: Any, x: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int) -> Tensor:
    """The output [B, L, E] of a decoder layer of Llama's kind, by torch's operators."""
    attention = layer.self_attn
    first, second = (getattr(layer, name) for name in NORMS)
    normed = rms_norm(x, x.shape[-1:], first.weight, first.variance_epsilon)
    query, key, value = (
        getattr(attention, name)(normed).unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2)
        for name in PROJECTIONS[:3]
    )
    query = turned(query, cos, sin)
    key = turned(key, cos, sin).repeat_interleave(heads // groups, 1)
    value = value.repeat_interleave(heads // groups, 1)
    context = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=attention.scaling
    )
    x = x + attention.o_proj(context.transpose(1, 2).flatten(2))
    return x + layer.mlp(rms_norm(x, x.shape[-1:], second.weight, second.variance_epsilon))


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary tables [B, L, D] to queries or keys [B, H, L, D]."""
    one, other = heads.chunk(2, -1)
    return heads * cos[:, None] + torch.cat([-other, one], -1) * sin[:, None]


class DecoderLayer(nn.Module):
    """A decoder layer that runs by the kernels for frozen weights with plain LoRA.

    In any other case it runs the forward pass of its original class.
    """

    self_attn: Any
    mlp: Any
    # By `_state()`: checking all conditions anew takes longer than some kernels do.
    prepared: tuple[list[Any], Prepared | None] | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states [B, L, E] after the layer, from those before it."""
        # A compiler gets the original forward pass: it would trace all conditions below.
        if torch.compiler.is_compiling():
            return super().forward(hidden_states, *args, **kwargs)
        tables = kwargs.get("position_embeddings")
        mask = kwargs.get("attention_mask")
        if (
            args
            or tables is None
            or mask is None
            or kwargs.get(cache_name()) is not None
            or kwargs.get("output_attentions")
        ):
            return super().forward(hidden_states, *args, **kwargs)
        # Narrower tables rotate only a part of each head, which the kernel does not do.
        prepared = (
            self._prepare(hidden_states) if tables[0].shape[-1] == self.self_attn.head_dim else None
        )
        if prepared is None:
            return super().forward(hidden_states, *args, **kwargs)
        x = hidden_states.contiguous()
        hidden: Any = _Layer.apply(x, *_tables(x, tables, mask), prepared, *prepared.adapted)
        return hidden

    def projections(self) -> list[Any]:
        """The projections q, k, v and o."""
        return [self.self_attn._modules[name] for name in PROJECTIONS]

    def is_ready(self) -> bool:
        """Whether the kernels can compute the layer as it is built, whatever its input."""
        norms: list[Any] = [self._modules[name] for name in NORMS]
        layers = self.projections()
        if any(
            module._forward_hooks or module._forward_pre_hooks
            for module in (self.self_attn, self.mlp, *norms, *layers)
        ):
            return False
        if any(norm.weight.requires_grad or norm.weight.dtype != torch.bfloat16 for norm in norms):
            return False
        # Attention with other head widths runs in blocks of queries, outside of the kernels.
        if (
            self.self_attn.head_dim % 32
            or not all(isinstance(layer, LoraLinear) for layer in layers)
            or not native.has_kernels()
        ):
            return False
        merged = layers[0].siblings
        outputs = [layer.base_layer.out_features for layer in layers]
        # The weights of a memory plan have shapes alone, and are not merged.
        whole = isinstance(layers[0].base_layer.weight, FakeTensor) or (
            merged is not None and merged.layers == layers[:3]
        )
        return whole and sum(outputs[:3]) <= TOGETHER and max(outputs) <= LARGE

    def _prepare(self, x: Tensor) -> Prepared | None:
        """The kernel's operands; None where it does not compute what the layer does now."""
        attention = self.self_attn
        if (
            attention.config._attn_implementation != NAME
            or x.dtype != torch.bfloat16
            or x.device.type != "cpu"
            or is_generating()
        ):
            return None
        if compute_dtype(x) != torch.bfloat16:
            return None
        if isinstance(x, FakeTensor):
            return Prepared(self, x) if self._is_plain(x) else None
        state = self._state()
        cached = self.prepared
        if cached is None or cached[0] != state:
            cached = self.prepared = state, Prepared(self, x) if self._is_plain(x) else None
        return cached[1]

    def _is_plain(self, x: Tensor) -> bool:
        """Whether the kernels compute what the layer does: frozen weights with plain fp32 LoRA."""
        attention = self.self_attn
        gated = self.mlp.layers()
        mlp: Any = self.mlp
        if not self.is_ready() or not mlp.is_quick(x, gated):
            return False
        merged = attention.q_proj.siblings
        if not all(layer.is_plain(x) for layer in self.projections()) or not (
            merged is None or merged.together(x)
        ):
            return False
        # Of adapters of another type, fp32 copies would be kept, which no optimizer updates.
        layers: list[Any] = [
            layer
            for layer in (*attention._modules.values(), *gated)
            if isinstance(layer, LoraLinear)
        ]
        packings = {layer.packed.packing if layer.packed else "" for layer in layers}
        adapters = [
            part[layer.name].weight for layer in layers for part in (layer.lora_A, layer.lora_B)
        ]
        return len(packings) == 1 and all(
            each.dtype == torch.float32 and each.is_contiguous() for each in adapters
        )

    def _state(self) -> list[Any]:
        """All that can change what the layer computes: hooks, adapters, training, addresses."""
        attention = self.self_attn._modules
        mlp = self.mlp._modules
        state: list[Any] = []
        for module in (
            self.self_attn,
            self.mlp,
            *(self._modules[name] for name in NORMS),
            *attention.values(),
            *mlp.values(),
        ):
            fields: Any = module.__dict__
            state += (
                fields["training"],
                len(fields["_forward_hooks"]),
                len(fields["_forward_pre_hooks"]),
            )
            if "base_layer" in fields["_modules"]:
                state += (
                    id(fields.get("siblings")),
                    id(fields.get("packed")),
                    fields["_disable_adapters"],
                    len(fields["merged_adapters"]),
                    str(fields["_active_adapter"]),
                )
                fields = fields["_modules"]["base_layer"].__dict__
                state += len(fields["_forward_hooks"]), len(fields["_forward_pre_hooks"])
            for each in fields["_parameters"].values():
                if each is not None:
                    state += each.requires_grad, each.data_ptr()
        # Adapters move where their layers do: one stands for all.
        query = attention["q_proj"]
        if "lora_A" in query._modules:
            state += (each.weight.data_ptr() for each in query._modules["lora_A"]._modules.values())
        return state


_shared: tuple[Tensor, Tensor, list[Tensor]] | None = None
"""Arguments and results of the last call of `_tables`."""


def _tables(x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor) -> list[Tensor]:
    """Rotary tables cos and sin [B, L, D], and `ends` int32[B, L], where tokens stop being seen.

    They are computed once for all layers that take the same tables and mask.
    """
    global _shared
    if _shared is None or _shared[0] is not tables[0] or _shared[1] is not mask:
        rotary = [table.to(x.dtype).expand(*x.shape[:2], -1).contiguous() for table in tables]
        _shared = tables[0], mask, [*rotary, mask[:, 0, 0].contiguous()]
    return _shared[2]


@functools.cache
def _joined_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (DecoderLayer, kind), {"__module__": __name__})


class _Layer(torch.autograd.Function):
    """A layer's output [B, L, E] for bf16 x [B, L, E].

    `cos` and `sin` are rotary tables [B, L, D], `ends` int32[B, L] where tokens stop being seen.
    The last arguments are all LoRA A and B of the layer.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, ends: Tensor, of: Prepared, *_: Tensor
    ) -> Tensor:
        rows, length = x.shape[:2]
        kernels = native.kernels()
        keep = any(ctx.needs_input_grad)
        with of.placed(x):
            out = torch.empty_like(x)
            saved = x.new_empty(
                kernels.decoder_room(of.address, rows, length, keep), dtype=torch.uint8
            )
            if not isinstance(x, FakeTensor):
                kernels.decoder(
                    of.address, rows, length, keep, *native.pointers(x, cos, sin, ends, out, saved)
                )
        if keep:
            ctx.of = of
            ctx.save_for_backward(x, cos, sin, ends, saved)
        count_run()
        return out

    @staticmethod
    def backward(ctx: Any, *flows: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, cos, sin, ends, saved = ctx.saved_tensors
        of: Prepared = ctx.of
        rows, length = x.shape[:2]
        flow = flows[0].contiguous()
        kernels = native.kernels()
        with of.placed(x):
            out = torch.empty_like(x) if ctx.needs_input_grad[0] else None
            gradients = x.new_empty(of.numbers, dtype=torch.float32)
            scratch = x.new_empty(
                kernels.decoder_scratch(of.address, rows, length), dtype=torch.uint8
            )
            if not isinstance(x, FakeTensor):
                kernels.decoder_backward(
                    of.address,
                    rows,
                    length,
                    TOGETHER,
                    *native.pointers(flow, x, cos, sin, ends, saved, scratch, out, gradients),
                )
        return out, None, None, None, None, *_unflatten_dense_tensors(gradients, of.adapted)
