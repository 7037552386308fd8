"""Decoder layers of the Llama family that run by the operator `decoder_layer`.

It is for frozen weights with plain LoRA, in bf16 on a CPU. For whatever it does not compute, a
layer runs the forward pass of transformers.

Shapes: B rows, L tokens, E width, D head width.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from vlm_tune.compat import (
    attention_name,
    cache_name,
    has_hooks,
    module_state,
    set_attention,
)
from vlm_tune.kernels import devices, unsupported_reason
from vlm_tune.kernels.cpu import native
from vlm_tune.kernels.decoder import Operands, decoder_layer
from vlm_tune.kernels.lora import LARGE, TOGETHER
from vlm_tune.kernels.reference_decoder import rotated
from vlm_tune.model.acceleration.gated_modules import GatedModule, gated_operands
from vlm_tune.model.acceleration.interval_attention import CACHE, NAMES, is_interval_mask
from vlm_tune.model.acceleration.lora_layers import LoraLinear, compute_dtype, operands
from vlm_tune.resources import kernel_choice

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def is_decoder_layer(module: nn.Module) -> bool:
    """Whether a module has the parts of a decoder layer: attention and an MLP."""
    return {"self_attn", "mlp"} <= dict(module.named_children()).keys()


def structure_reason(layer: Any) -> str | None:
    """The reason why the operator does not compute layers of this class; None if it does."""
    if not set(NORMS) <= dict(layer.named_children()).keys():
        return "it has other norms than one before the attention and one before the MLP"
    if not isinstance(layer.mlp, GatedModule):
        return "its MLP is not of the form act(gate(x)) * up(x)"
    parts = {name for name, _ in layer.self_attn.named_children()}
    if parts != set(PROJECTIONS):
        more = ", ".join(sorted(parts - set(PROJECTIONS)))
        return (
            f"its attention has other parts ({more})" if more else "its attention has other parts"
        )
    return None if _is_formula(layer) else "it computes another formula"


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
    set_attention(config, "eager")
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
    query = rotated(query, cos, sin)
    key = rotated(key, cos, sin).repeat_interleave(heads // groups, 1)
    value = value.repeat_interleave(heads // groups, 1)
    context = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=attention.scaling
    )
    x = x + attention.o_proj(context.transpose(1, 2).flatten(2))
    return x + layer.mlp(rms_norm(x, x.shape[-1:], second.weight, second.variance_epsilon))


class DecoderLayer(nn.Module):
    """A decoder layer that runs by the operator for frozen weights with plain LoRA.

    In any other case it runs the forward pass of its original class.

    Attributes:
        only_traced: Whether the layer only gets tensors without values, in a memory plan: its
            weights are not merged then.
        prepared: The operands of `decoder_layer`, and the facts that they depend on.
    """

    self_attn: Any
    mlp: Any
    only_traced = False
    prepared: tuple[list[Any], Operands | None] | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states [B, L, E] after the layer, from those before it."""
        # A compiler gets the original forward pass: it would trace all conditions below.
        if torch.compiler.is_compiling() or args or not self._takes(hidden_states, kwargs):
            return super().forward(hidden_states, *args, **kwargs)
        of = self._prepared(hidden_states)
        if of is None:
            return super().forward(hidden_states, *args, **kwargs)
        x = hidden_states.contiguous()
        cos, sin = (
            table.to(x.dtype).expand(*x.shape[:2], -1).contiguous()
            for table in kwargs["position_embeddings"]
        )
        visible_until = kwargs["attention_mask"][:, 0, 0].contiguous()
        return decoder_layer(x, cos, sin, visible_until, of)

    def _takes(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether the operator computes what the layer does with these arguments."""
        tables = kwargs.get("position_embeddings")
        return (
            x.dtype == torch.bfloat16
            and devices.by_operator(x.device)
            and is_interval_mask(kwargs.get("attention_mask"))
            and tables is not None
            # Narrower tables rotate only a part of each head, which the kernel does not do.
            and tables[0].shape[-1] == self.self_attn.head_dim
            # In generation, keys and values go to a cache.
            and kwargs.get(CACHE) is None
            and kwargs.get(cache_name()) is None
            and not kwargs.get("output_attentions")
            and compute_dtype(x) == torch.bfloat16
        )

    def _prepared(self, x: Tensor) -> Operands | None:
        """The layer's operands; None where the operator does not compute what the layer does now.

        They are made again whenever a fact that they depend on has changed: checking all conditions
        takes longer than some kernels do. Two threads at worst make equal ones at once.
        """
        if self.only_traced:
            return self.operands(x) if self.reason(x) is None else None
        state = self._state()
        prepared = self.prepared
        if prepared is None or prepared[0] != state:
            prepared = self.prepared = (
                state,
                self.operands(x) if self.reason(x) is None else None,
            )
        return prepared[1]

    def _state(self) -> list[Any]:
        """All that can change what the layer computes: hooks, adapters, training, addresses."""
        attention = self.self_attn
        state: list[Any] = [attention_name(attention), torch.get_num_threads() > native.THREADS]
        state.append(kernel_choice())
        for module in (attention, self.mlp, *self.norms(), *self.projections()):
            state += module_state(module)
        for module in self.mlp.children():
            state += module_state(module)
        for layer in (*self.projections(), *self.mlp.layers()):
            if isinstance(layer, LoraLinear):
                state += id(layer.group), id(layer.packed)
        return state

    def operands(self, x: Tensor) -> Operands:
        """The layer's weights and settings, in the form that the operator takes."""
        *inner_layers, outer_layer = self.projections()
        group = inner_layers[0].group
        inner = operands(inner_layers, x.dtype, group and group.matrix)
        outer = operands([outer_layer], x.dtype)
        gated = gated_operands(self.mlp.layers())
        norms = self.norms()
        return Operands(
            [*inner.weights, *outer.weights, *gated.weights],
            inner.packing,
            inner.room,
            inner.bias,
            outer.bias,
            [norm.weight for norm in norms],
            [*inner.downs, *outer.downs, *gated.downs],
            [*inner.ups, *outer.ups, *gated.ups],
            [*inner.scales, *outer.scales, *gated.scales],
            self.self_attn.head_dim,
            self.mlp.activation,
            [norm.variance_epsilon for norm in norms],
            self.self_attn.scaling,
        )

    def projections(self) -> list[Any]:
        """The projections q, k, v and o."""
        return [getattr(self.self_attn, name) for name in PROJECTIONS]

    def norms(self) -> list[Any]:
        """The norms before the attention and before the MLP."""
        return [getattr(self, name) for name in NORMS]

    def built_reason(self) -> str | None:
        """The reason why the operator can't compute the layer as it is built; None if it can."""
        norms = self.norms()
        layers = self.projections()
        if attention_name(self.self_attn) not in NAMES.values():
            return "its attention does not use the interval operator"
        if any(has_hooks(module) for module in (self.self_attn, self.mlp, *norms, *layers)):
            return "it has hooks"
        if any(norm.weight.requires_grad for norm in norms):
            return "its norms are trained"
        if norms[0].weight.dtype != norms[1].weight.dtype:
            return "its norms are of two types"
        if not all(isinstance(layer, LoraLinear) for layer in layers):
            return "not all projections have LoRA"
        outputs = [layer.base_layer.out_features for layer in layers]
        if sum(outputs[:3]) > TOGETHER or max(outputs) > LARGE:
            return f"its projections have too many outputs ({sum(outputs[:3]):,} for q, k and v)"
        group = layers[0].group
        if not self.only_traced and (group is None or group.layers != layers[:3]):
            return "its projections are not merged"
        weight = norms[0].weight
        return unsupported_reason(
            "decoder_layer", weight.dtype, weight.device, self.self_attn.head_dim
        )

    def reason(self, x: Tensor) -> str | None:
        """The reason why the operator does not compute what the layer does now; None if it does.

        It computes frozen weights with plain fp32 LoRA.
        """
        reason = self.built_reason()
        if reason is not None:
            return reason
        if compute_dtype(x) != torch.bfloat16:
            return "it does not compute in bf16"
        gated = self.mlp.layers()
        projections = self.projections()
        if not self.mlp.is_quick(x, gated):
            return "its MLP does not use the kernel"
        group = projections[0].group
        if not all(layer.is_plain(x) for layer in projections) or not (
            group is None or group.is_merged(x)
        ):
            return "its projections are not all frozen with plain LoRA"
        # Of adapters of another type, fp32 copies would be made, which no optimizer updates.
        layers = [layer for layer in (*projections, *gated) if isinstance(layer, LoraLinear)]
        packings = {layer.packed.packing if layer.packed else "" for layer in layers}
        adapters: list[Any] = [
            part[layer.name].weight for layer in layers for part in (layer.lora_A, layer.lora_B)
        ]
        if len(packings) > 1:
            return "its weights are packed in different ways"
        if any(each.dtype != torch.float32 or not each.is_contiguous() for each in adapters):
            return "its adapters are not in fp32"
        return None


@functools.cache
def decoder_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a class of decoder layers that runs by the operator."""
    return type(kind.__name__, (DecoderLayer, kind), {"__module__": __name__})
