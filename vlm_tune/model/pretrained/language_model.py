"""Language models of transformers: pretrained, quantised, from scratch, or without weights."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_tune.compat import (
    attention_name,
    forget_checkpoint_names,
    fp32_layers,
    keep_gradients_of_packed_layers,
    set_attention,
)
from vlm_tune.config.model import Llm, NativeLlm, Scratch
from vlm_tune.errors import ModelError
from vlm_tune.model.families.base import Vlm, language_names
from vlm_tune.model.families.registry import find_vlm
from vlm_tune.model.hub import check_base, config_source, load_reason
from vlm_tune.model.layer_index import block_names
from vlm_tune.model.quantized_stub import pack_linears
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import CPU, check_folder, check_loading, own_memory
from vlm_tune.paths import is_file, is_folder
from vlm_tune.quoting import quoted, reason_of


def make_room(language: Any, rows: int) -> None:
    """Enlarges an LLM's embedding and head to `rows` if they are smaller.

    New rows are the mean of the others.
    """
    before = language.get_input_embeddings().num_embeddings
    if rows <= before:
        return
    language.resize_token_embeddings(rows, mean_resizing=False)
    for layer in {language.get_input_embeddings(), language.get_output_embeddings()}:
        layer.weight.data[before:] = (
            layer.weight.data[:before].float().mean(0).to(layer.weight.dtype)
        )
        if getattr(layer, "bias", None) is not None:
            layer.bias.data[before:] = layer.bias.data[:before].float().mean().to(layer.bias.dtype)


def bare_llm(
    llm: Llm, dtype: torch.dtype, *, folder: Path | None = None, gpu: bool | None = None
) -> Any:
    """Builds a language model on the meta device from its config alone.

    Args:
        llm: the recipe's section `model.llm`.
        dtype: the dtype of its weights.
        folder: a saved folder to take the config from, instead of the section's name.
        gpu: whether it stands for a model on a GPU, for its attention; as on this machine if None.

    Returns:
        The transformers model, with stand-ins for quantised layers.

    Raises:
        ModelError: the config can't be read, or no model can be built from it.
    """
    config = llm_config(llm, folder)
    try:
        factory = _factory(llm)
        with torch.device("meta"):
            model = factory.from_config(config, dtype=dtype, **_attention(llm, gpu))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.llm.name: can't build the language model of {quoted(llm.name)}: "
            f"{load_reason(str(llm.name), error)}"
        ) from None
    _fit_attention(model, llm)
    if getattr(config, "scale_decoder_outputs", True) is False:
        # Flan-T5's head is untied; transformers ties it until it sees the weights.
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    if llm.quantize:
        pack_linears(_quantized(model, llm), llm.quantize, keep=model.get_output_embeddings())
    return model


def _factory(llm: Llm) -> Any:
    """The class of transformers that loads a section's language model."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
    )

    if isinstance(llm, NativeLlm):
        return AutoModelForImageTextToText
    return AutoModelForSeq2SeqLM if llm.kind == "seq2seq" else AutoModelForCausalLM


def _quantized(model: Any, llm: Llm) -> Any:
    """The module whose linear layers are quantised: of a native model, the LLM inside."""
    return model.get_decoder() if isinstance(llm, NativeLlm) else model


def _vlm_of(llm: Llm) -> Vlm | None:
    """The vision-language model that a language model is taken out of; None for a whole one."""
    return None if isinstance(llm, NativeLlm) else find_vlm(str(llm.name))


def llm_config(llm: Llm, folder: Path | None = None) -> Any:
    """transformers' config of a language model, by its name or from a saved folder.

    Raises `ModelError` if it can't be read.
    """
    from transformers import AutoConfig

    if folder is None:
        check_base(str(llm.name), "model.llm.name")
    vlm = _vlm_of(llm) if folder is None else None
    if vlm is not None:
        return vlm.family.language(vlm)
    options: dict[str, Any] = (
        {"gguf_file": llm.gguf_file} if llm.gguf_file and folder is None else {}
    )
    try:
        return AutoConfig.from_pretrained(
            str(folder or config_source(str(llm.name))), trust_remote_code=False, **options
        )
    except (OSError, ValueError, TypeError) as error:  # the last for JSON that is no object
        name = str(folder or llm.name)
        raise ModelError(
            f"can't read the config of the language model {quoted(name)}: "
            f"{load_reason(name, error)}"
        ) from None


def scratch_llm(
    llm: Llm, scratch: Scratch, tokenizer: Any, vocabulary: int, gpu: bool | None = None
) -> Any:
    """Builds a language model with random weights; `tokenizer` gives the ids of special tokens.

    `gpu` is as in `bare_llm`.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = scratch_config(llm, scratch, tokenizer, vocabulary)
    factory: Any = AutoModelForSeq2SeqLM if llm.kind == "seq2seq" else AutoModelForCausalLM
    try:
        model = factory.from_config(config, **_attention(llm, gpu))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model.llm.scratch: {reason_of(error)}") from None
    return _fit_attention(model, llm)


def scratch_config(llm: Llm, scratch: Scratch, tokenizer: Any, vocabulary: int) -> Any:
    """transformers' config of an LLM with random weights.

    Raises `ModelError` if the config rejects the recipe's values.
    """
    from transformers import AutoConfig

    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    if llm.kind == "seq2seq":
        ids["decoder_start_token_id"] = tokenizer.pad_token_id
    try:
        return AutoConfig.for_model(
            scratch.model_type, **{**ids, "vocab_size": vocabulary, **scratch.config}
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model.llm.scratch: {reason_of(error)}") from None


def _attention(llm: Llm, gpu: bool | None = None) -> dict[str, Any]:
    """transformers' option for the attention that the recipe names, or for the device.

    `gpu` says whether the model will run on a GPU; None: as on this machine.
    """
    if llm.attention == "eager":
        return {"attn_implementation": "eager"}
    on_gpu = torch.cuda.is_available() if gpu is None else gpu
    # On a CPU, plain attention on short rows is faster than the fused kernel's backward pass. None
    # is sdpa for the classes that support it, and eager for others.
    named = llm.attention == "sdpa"
    return {"attn_implementation": None if named or on_gpu else "eager"}


def _fit_attention(model: Any, llm: Llm) -> Any:
    """Makes a model whose scores are capped attend eagerly: sdpa would leave the cap out.

    Returns the model. Raises `ModelError` if the recipe demands sdpa and the model has none.
    """
    capped = [
        config
        for config in (model.config, model.config.get_text_config())
        if getattr(config, "attn_logit_softcapping", None)
    ]
    for config in capped:
        set_attention(config, "eager")
    if llm.attention == "sdpa" and (capped or attention_name(model) != "sdpa"):
        reason = "its scores are capped" if capped else "transformers has no sdpa for it"
        raise ModelError(
            f"model.llm.attention: sdpa is not for a {type(model).__name__}, {reason}: set auto or "
            "eager"
        )
    return model


def load_llm(
    llm: Llm,
    *,
    dtype: torch.dtype,
    device: torch.device = CPU,
    folder: Path | None = None,
    quantize: bool = True,
) -> Any:
    """Loads a language model with its weights.

    Args:
        llm: the recipe's section `model.llm`.
        dtype: the dtype of its weights.
        device: where its weights are loaded.
        folder: a saved folder to load, instead of the section's name.
        quantize: False ignores `llm.quantize`.

    Returns:
        The transformers model.

    Raises:
        ModelError: a name or file does not exist, a file is truncated, or tensors are missing,
            unexpected or misshapen.
    """
    if llm.kind == "seq2seq" and dtype == torch.float16:
        raise ModelError("dtype: T5's activations overflow in fp16; use bf16 or fp32")
    factory = _factory(llm)
    name = str(folder or llm.name)
    if folder is None:
        check_base(name, "model.llm.name")
    gguf = llm.gguf_file if folder is None else None
    if gguf and not is_file(Path(name) / gguf):
        raise ModelError(f"model.llm.gguf_file: no GGUF file {quoted(gguf)} in {quoted(name)}")
    if is_folder(name) and not gguf:
        check_folder(Path(name))
    options: dict[str, Any] = {"dtype": dtype, **_attention(llm)}
    packing: dict[str, Any] = {}
    if llm.quantize and quantize:
        packing["quantization_config"] = _bitsandbytes(llm, dtype)
    # Without a device bitsandbytes takes the GPU if there is one.
    placing = {"device_map": {"": str(device)}} if packing or device.type != "cpu" else {}
    if gguf:
        model = _loaded(factory, name, {**options, "gguf_file": gguf})
        forget_gguf(model)
        if not packing:
            return _fit_attention(model.to(device), llm)
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            model = _loaded(factory, scratch, {**options, **packing, **placing})
            return _fit_attention(model, llm)
    options |= {"use_safetensors": True, **packing, **placing}
    vlm = _vlm_of(llm) if folder is None else None
    if vlm is not None:
        config = vlm.family.language(vlm)
        options |= {"config": config, "key_mapping": language_names(vlm, config)}
    return _fit_attention(_loaded(factory, name, options, vlm), llm)


def _loaded(factory: Any, name: str, options: dict[str, Any], vlm: Vlm | None = None) -> Any:
    """Loads a language model, or the one inside the vision-language model `vlm`.

    Raises `ModelError` as `load_llm` does.
    """
    try:
        model, info = factory.from_pretrained(
            name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"can't load the language model {quoted(name)}: {load_reason(name, error)}"
        ) from None
    if hasattr(model, "peft_config"):
        raise ModelError(
            f"model.llm.name: {quoted(name)} is a PEFT adapter, not a whole model; "
            "merge it first and name the merged model"
        )
    if vlm is not None:
        info["unexpected_keys"] = [key for key in info["unexpected_keys"] if not vlm.foreign(key)]
        # Else it would be saved under the names of the vision-language model.
        forget_checkpoint_names(model)
    check_loading(info, f"the weights in {quoted(name)} do not fit the model")
    if "quantization_config" in options:
        own_memory(model)
    keep_gradients_of_packed_layers(model)
    return model


def forget_gguf(model: Any) -> None:
    """Marks a de-quantised GGUF model as not quantised: transformers would refuse to save it."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    if hasattr(model, "is_quantized"):
        model.is_quantized = False


def _bitsandbytes(llm: Llm, dtype: torch.dtype) -> Any:
    """transformers' config of bitsandbytes for `llm.quantize`; the head is not quantised."""
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    whole = _unquantized(llm)
    if llm.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=str(llm.quantize),
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=False,
        llm_int8_skip_modules=whole,
    )


def _unquantized(llm: Llm) -> list[str]:
    """The modules that are not quantised: the head, and those of a native model outside its LLM."""
    if not isinstance(llm, NativeLlm):
        return ["lm_head"]
    with torch.device("meta"):
        model = _factory(llm).from_config(llm_config(llm))
    inside = {id(module) for module in model.get_decoder().modules()}
    return ["lm_head"] + [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in inside and name != "lm_head"
    ]


def check_packed(model: VisionLanguageNetwork) -> None:
    """Checks that all linear layers of the LLM's blocks are quantised as configured, and no others.

    Raises `ModelError` with the layers that are quantised by mistake (tower, connector, head,
    embeddings) or were left out.
    """
    quantize = model.config.llm.quantize
    language = model.llm.model
    inside = _quantized(language, model.config.llm)
    (prefix,) = [name for name, module in language.named_modules() if module is inside]
    blocks = tuple(
        f"llm.model.{prefix}{'.' if prefix else ''}{block}." for block in block_names(inside)
    )
    fp32_names = fp32_layers(language)
    wrong: list[str] = []
    for name, layer in model.named_modules():
        kind = getattr(
            getattr(layer, "weight", None),
            "quant_type",
            "int8" if type(layer).__name__ == "Linear8bitLt" else None,
        )
        # T5 keeps `wo` in fp32 where transformers' own list says so; no other layer of a block may
        # be left out.
        stays_fp32 = name.rsplit(".", 1)[-1] in fp32_names
        wanted = (
            quantize
            if isinstance(layer, nn.Linear) and name.startswith(blocks) and not stays_fp32
            else None
        )
        if kind != wanted and not (stays_fp32 and kind == quantize):
            wrong.append(f"{name} is {kind or 'not packed'}, expected {wanted or 'not packed'}")
    if wrong:
        raise ModelError(
            f"model.llm.quantize: {quantize} did not pack what it should: {'; '.join(wrong[:5])}"
        )
