"""Private names of other libraries, differences between their versions, and workarounds.

A name that a library may change without notice is used here alone: one function each, and one test
each that calls the library (`tests/test_compat.py`). Libraries are imported in the functions.
"""

from __future__ import annotations

import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tarfile

    import torch
    from torch import nn
    from torch.distributed.distributed_c10d import Store

HARMLESS = ("transformers.configuration_utils", "bitsandbytes.backends.cpu.ops")
"""Loggers of harmless warnings: our own type in config.json, and a missing 4-bit kernel."""


@contextmanager
def without_harmless_warnings() -> Iterator[None]:
    """Context in which the loggers of `HARMLESS` report errors only; their levels are restored."""
    loggers = [logging.getLogger(name) for name in HARMLESS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- Python ---------------------------------------------------------------------------------------


def forget_members(archive: tarfile.TarFile) -> None:
    """Drops the headers that an open archive keeps of read members; 3.13 has `stream=True`."""
    vars(archive)["members"].clear()


# --- torch ----------------------------------------------------------------------------------------


def worker_processes(batches: Any) -> list[int]:
    """The process ids of the workers behind an iterator of torch's DataLoader."""
    return [worker.pid for worker in batches._workers]


def default_store() -> Store:
    """The store over which the processes of torch's default group met.

    Raises `ValueError` where there is no such group.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def shards_bytes() -> bool:
    """Whether FSDP2 shards parameters of integers.

    Before 2.12 torch wants gradients of them, and casts them to the type of mixed precision.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    return "is_floating_point" in inspect.getsource(_fsdp_param.FSDPParam.init_dtype_attrs)


def is_attention_projection(layer: nn.Module) -> bool:
    """Whether a layer is the output projection of `nn.MultiheadAttention`.

    Its weight is read by the attention, and the layer itself is never called.
    """
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

    return isinstance(layer, NonDynamicallyQuantizableLinear)


def recompute_operator_inputs() -> AbstractContextManager[Any]:
    """Context in which a compiled backward pass recomputes operators' inputs from saved tensors.

    It does so where elementwise work gives them. Otherwise torch saves them: both a norm's input
    and its output, which is a product of the input.
    """
    from torch._functorch import config

    return config.patch(ban_recompute_materialized_backward=False)


def default_compile_cache() -> str:
    """The folder in which torch.compile keeps its code by default."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return default_cache_dir()


@contextmanager
def deterministic_compiling() -> Iterator[None]:
    """Context in which inductor takes no choice by timing that changes what code computes.

    By default it tries several kernels for a reduction and takes the fastest, which may be another
    one in the next process. Code that is compiled within the context stays deterministic after it.
    """
    from torch._functorch import config as functorch
    from torch._inductor import config

    # A backward pass that is compiled when it first runs is so in a thread of autograd's, where
    # settings of this thread do not hold.
    with (
        config.patch(deterministic=True),
        functorch.patch(force_non_lazy_backward_lowering=True),
    ):
        yield


def share_compiled_code(tensor: torch.Tensor) -> None:
    """Lets torch.compile use code for a tensor of fixed address at other addresses too.

    A CUDA graph is recorded again for them.
    """
    import torch

    torch._dynamo.mark_static_address(tensor, guard=False)


def has_hooks(module: Any) -> bool:
    """Whether a module has forward hooks of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def submodules(module: Any) -> dict[str, Any]:
    """A module's children by name, empty places (None) included."""
    return module._modules


RECOMPILED = 64
"""How often a compiled FlexAttention is compiled for other shapes, masks and types of a process.

Beyond torch's own limit of 8 it would run uncompiled, with all scores in memory.
"""


_flex_switch_lock = threading.RLock()


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex_attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """torch's FlexAttention, compiled on a GPU.

    Elsewhere, and for tensors without data, it runs as plain torch code, without gradients.
    """
    from torch._dynamo import config
    from torch._subclasses import FakeTensor
    from torch.nn.attention import flex_attention as library

    if query.device.type == "cuda" and not isinstance(query, FakeTensor):
        # Where other code is to run eagerly, scores [L, L] would be in memory.
        with torch.compiler.set_stance("default"), config.patch(recompile_limit=RECOMPILED):
            return _compiled_flex_attention()(query, *args, **kwargs)
    with _flex_switch_lock:  # the switch is one for all threads
        before = library._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
        library._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
        try:
            return library.flex_attention(query, *args, **kwargs)
        finally:
            library._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before


@contextmanager
def all_true_on_meta(mask: torch.Tensor) -> Iterator[None]:
    """Context in which a mask on the meta device counts as all true, as its values are unknown.

    Without it torch refuses to index by it.
    """
    if not mask.is_meta:
        yield
        return
    from torch.fx.experimental import _config

    switches: Any = _config  # a module that torch turns into an object with methods
    with switches.patch(meta_nonzero_assume_all_nonzero=True):
        yield


def onednn_linear(rows: Any, weight: Any, bias: Any = None) -> Any:
    """`torch.nn.functional.linear` of fp32 on a CPU by oneDNN, and not by MKL."""
    import torch

    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


# --- transformers ---------------------------------------------------------------------------------


@cache
def cache_name() -> str:
    """Returns transformers' name of the KV cache, as an argument and in outputs.

    It is `cache` from 5.24 on and `past_key_values` before.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return (
        "cache"
        if "cache" in {field.name for field in fields(BaseModelOutputWithPast)}
        else "past_key_values"
    )


def fp32_layers(model: Any) -> set[str]:
    """The last parts of the names of layers that transformers keeps in fp32, also if quantised."""
    return set(model._keep_in_fp32_modules or ())


def omitted_cap(config: Any) -> float | None:
    """The cap of logits that a PaliGemma of this config omits, None where it caps them.

    transformers leaves out its LLM's `final_logit_softcapping` before 5.23.
    """
    from transformers import __version__

    release = tuple(int(part) for part in __version__.split(".")[:2])
    if config.model_type != "paligemma" or release >= (5, 23):
        return None
    return getattr(config.get_text_config(), "final_logit_softcapping", None)


def cap_logits(model: Any) -> None:
    """Makes a PaliGemma cap its logits, as its LLM's config says, where it omits that."""
    cap = omitted_cap(model.config)
    if cap is None:
        return

    def capped(_: Any, __: Any, output: Any) -> Any:
        output.logits = cap * (output.logits / cap).tanh()
        return output

    model.register_forward_hook(capped)


def beams_keep_images(model: Any) -> bool:
    """Whether a beam search of transformers repeats the images of a row in turn.

    Older releases repeat each for itself, unless a model has code of its own, so that a row of
    several images gets others.
    """
    from transformers import GenerationMixin

    usual: Any = GenerationMixin
    own_code = type(model)._expand_inputs_for_generation is not usual._expand_inputs_for_generation
    return own_code or "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters


def forget_checkpoint_names(model: Any) -> None:
    """Makes `save_pretrained` write tensors under the model's names, not under its checkpoint's."""
    del model._weight_conversions


def is_stateful(model: Any) -> bool:
    """Whether a transformers model carries a recurrent state from token to token."""
    return bool(model._is_stateful)


def attention_name(model: Any) -> str:
    """The name of the attention function of a transformers model."""
    return model.config._attn_implementation


def supports_attention_functions(model: Any) -> bool:
    """Whether a transformers model calls the attention function of its config's name."""
    return bool(model._supports_attention_backend)


def supports_flex(model: Any) -> bool:
    """Whether a transformers model calls FlexAttention, and so any function of that interface."""
    return bool(model._supports_flex_attn)


def set_attention(config: Any, name: str) -> None:
    """Sets the attention function of the transformers models that have this config."""
    config._attn_implementation = name


def register_attention(name: str, function: Callable[..., Any], *, masks_of: str) -> None:
    """Registers an attention function with transformers.

    Its masks are those of the function `masks_of` ("eager" or "sdpa").
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(name, function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masks_of])


def sdpa_attention(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """transformers' attention by torch's scaled dot product."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*args, **kwargs)


def eager_attention(module: Any) -> Callable[..., tuple[Any, Any]]:
    """transformers' attention by matrix products, which each model's file defines for itself."""
    return sys.modules[type(module).__module__].eager_attention_forward


def checkpointed_forward(block: Any) -> Callable[..., Any] | None:
    """The function [module, ...] that transformers runs again where it checkpoints a block.

    Newer releases wrap `forward` for that. None for a block whose `forward` is not wrapped: older
    ones checkpoint the whole call.
    """
    forward = type(block).forward
    code = getattr(forward, "__code__", None)
    wraps = code is not None and code.co_name == "forward_with_checkpointing"
    return forward.__wrapped__ if wraps else None


def checkpoint_function(block: Any) -> Callable[..., Any] | None:
    """The function by which a transformers block now checkpoints; None if it does not."""
    if getattr(block, "gradient_checkpointing", False) and block.training:
        return block._gradient_checkpointing_func
    return None


def is_kv_cache(value: Any) -> bool:
    """Whether a value is a KV cache of transformers."""
    from transformers import Cache

    return isinstance(value, Cache)


def supports_static_cache(model: Any) -> bool:
    """Whether a transformers model can be run with a KV cache of fixed size."""
    return bool(model._can_compile_fullgraph)


# --- PEFT -----------------------------------------------------------------------------------------


def set_lora_layer(config: Any, kind: type[nn.Module], layer: type[nn.Module]) -> None:
    """Makes PEFT wrap the layers of type `kind` in `layer` where it attaches this LoRA config."""
    config._register_custom_module({kind: layer})


def module_state(module: Any) -> list[Any]:
    """Facts of a module that change what it computes, by which a prepared form of it is checked.

    They are its mode, the numbers of its hooks, its parameters' addresses and whether they train,
    and for a LoRA layer of PEFT those of its base and of its adapters, their scales and switches.
    It is read from the instance's dictionaries, because that is done for every layer of every step.
    """
    instance = module.__dict__
    state = [
        instance["training"],
        len(instance["_forward_hooks"]),
        len(instance["_forward_pre_hooks"]),
    ]
    if "base_layer" in instance["_modules"]:
        state += (
            instance["_disable_adapters"],
            len(instance["merged_adapters"]),
            str(instance["_active_adapter"]),
            *instance["scaling"].values(),
            *map(id, instance["lora_variant"].values()),
        )
        for name in ("lora_A", "lora_B"):
            for adapter in instance["_modules"][name].__dict__["_modules"].values():
                state.append(adapter.__dict__["_parameters"]["weight"].data_ptr())
        instance = instance["_modules"]["base_layer"].__dict__
        state += len(instance["_forward_hooks"]), len(instance["_forward_pre_hooks"])
    for each in instance["_parameters"].values():
        if each is not None:
            # Of vectors, as biases, a prepared form may have a copy.
            written = each._version if each.dim() == 1 else 0
            state += each.requires_grad, each.data_ptr(), written
    return state


# --- datasets -------------------------------------------------------------------------------------


def dataset_fingerprint(dataset: Any) -> str:
    """The hash by which the datasets library tells a data set's files and changes."""
    return dataset._fingerprint


# --- bitsandbytes ---------------------------------------------------------------------------------


def keep_gradients_of_packed_layers(model: nn.Module) -> None:
    """Keeps 4-bit layers from packing their weights for a CPU kernel that has no gradient.

    Otherwise the first pass in eval mode packs them, and they stay so.
    """
    layers: Iterator[Any] = model.modules()
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


# --- sacrebleu ------------------------------------------------------------------------------------


def chrf_statistics(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[list[int]]:
    """The counts of each prediction from which sacrebleu computes chrF; counts of rows add up."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    return [
        metric._extract_corpus_statistics([prediction], [[text] for text in texts])[0]
        for prediction, texts in zip(predictions, references, strict=True)
    ]


def chrf_score(statistics: list[float]) -> float:
    """sacrebleu's chrF of summed counts, which need not be whole numbers."""
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()._compute_f_score(statistics)  # type: ignore[arg-type]
