"""From a recipe to a model: the tower, the language model and its tokenizer, quantised where asked."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from vlm_tune.config.model import AnyTower, Llm, ModelSection, OpenClipTower, PairTower, QFormerConnector, Scratch, TimmTower
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.chat.template import ChatTemplate, load_template
from vlm_tune.data.images.decode import ImageProcessor
from vlm_tune.data.types import Conversation, InputSpec
from vlm_tune.errors import ModelError
from vlm_tune.model.base_weights import Base, llm_base, tower_base
from vlm_tune.model.build_checks import check_memory
from vlm_tune.model.connectors.instruction import Reader
from vlm_tune.model.connectors.projectors import Connector
from vlm_tune.model.connectors.registry import build_connector
from vlm_tune.model.language.llm import LLMS, LanguageModel
from vlm_tune.model.layer_index import block_names
from vlm_tune.model.pretrained.connector_weights import load_words, start_connector
from vlm_tune.model.pretrained.hub import check_base, config_source, load_reason
from vlm_tune.model.pretrained.vlm_checkpoints import Vlm, find_vlm, language_config, language_names, model_section, own_folder, own_rebuild
from vlm_tune.model.quantized_stub import pack_linears
from vlm_tune.model.vision.towers import VisionTower, architecture, build_tower
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageModel
from vlm_tune.model.weights import check_folder, load_into, own_memory, read_safetensors
from vlm_tune.quoting import quoted

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CONNECTOR, TOWER, WORDS = "connector.safetensors", "tower.safetensors", "connector_tokenizer"
"""What a model folder calls the connector's weights, the tower's where it holds them, and the connector's own tokenizer."""


def dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """The name that recipes have for a precision, given by that name ("bf16"), by torch's ("bfloat16") or as torch's type.

    None for None; raises `ModelError` for what is none of bf16, fp16 and fp32.
    """
    if dtype is None:
        return None
    for name, known in DTYPES.items():
        if (isinstance(dtype, str) and dtype in (name, str(known).removeprefix("torch."))) or dtype is known:
            return name
    raise ModelError(f"dtype: there is no {quoted(dtype)}; there are {', '.join(DTYPES)}")


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The torch type of a precision that is given as in `dtype_name`."""
    name = dtype_name(dtype)
    return None if name is None else DTYPES[name]


SPECIALS = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


def build(recipe: Recipe, conversations: Iterable[Conversation], *, bare: bool = False) -> VisionLanguageModel:
    """The recipe's model before training; `conversations` are what a scratch tokenizer is trained on.

    A `bare` one has its language model on the meta device, for a process that is given its share of the weights by another.

    Raises `ModelError` for weights that can't be loaded whole and names that don't exist.
    """
    torch.manual_seed(recipe.seed)
    section, template = model_section(recipe), load_template(recipe.data.template)
    own = own_folder(recipe)
    own_tower = own / TOWER if own and (own / TOWER).is_file() else None
    tower = restore_tower(section.tower, own_rebuild(recipe), own_tower)
    if section.llm.scratch:
        tokenizer = add_words(train_tokenizer(conversations, section.llm.scratch.vocab_size, template), section.llm)
        with torch.device("meta") if bare else nullcontext():
            language = _scratch_llm(section.llm, section.llm.scratch, tokenizer, len(tokenizer))
    else:
        tokenizer = load_tokenizer(section.llm)
        language = bare_llm(section.llm, load_dtype(recipe)) if bare else load_llm(section.llm, dtype=load_dtype(recipe))
    changed = {"tower"} if own_tower or _from_scratch(section.tower) else set()
    words = load_words(section.connector, own / WORDS if own else None)
    model = assemble(_config(recipe, section, tower), tower, tokenizer, language, words, changed=changed)
    if own:
        load_into(model.connector, read_safetensors(own / CONNECTOR), own / CONNECTOR)
    else:
        start_connector(model.connector, section.connector)
    model.bases = bases_of(model, bare=bare)
    return model


def bases_of(model: VisionLanguageModel, *, bare: bool = False) -> dict[str, Base]:
    """The fingerprints of the parts whose weights are still those of their name; a `bare` model's LLM has none."""
    found = {}
    if "llm" not in model.changed and not bare:
        found["llm"] = llm_base(model.config.llm)
    if "tower" not in model.changed:
        found["tower"] = tower_base(model.config.model.tower, model.tower)
    return found


def _config(recipe: Recipe, section: ModelSection, tower: VisionTower) -> VisionLanguageConfig:
    return VisionLanguageConfig(
        model=section,
        tower_rebuild=tower.rebuild,
        template=load_template(recipe.data.template).model_dump(),
        system=recipe.data.system,
        max_length=recipe.data.max_length,
        precision=recipe.resolved_stages()[-1][1].train.precision,
    )


def _from_scratch(tower: AnyTower) -> bool:
    """Whether a tower's weights, or some of them, are random: then no name gives them again."""
    if isinstance(tower, PairTower):
        return any(_from_scratch(part) for part in tower.towers)
    if isinstance(tower, OpenClipTower):
        kept = str(tower.name).startswith(("hf-hub:", "local-dir:"))
        return tower.config is not None or (tower.pretrained is None and not kept)
    return isinstance(tower, TimmTower) and tower.pretrained is False


def build_processor(recipe: Recipe, conversations: Iterable[Conversation], *, saved: Path | None = None) -> Processor:
    """The recipe's processor alone: tokenizer, template and the image's token count, no weights loaded.

    The tokenizer is that of the model folder `saved` where one is given, else the LLM's, or one trained on `conversations`.
    """
    section, template = model_section(recipe), load_template(recipe.data.template)
    if section.llm.scratch and saved is None:
        tokenizer = add_words(train_tokenizer(conversations, section.llm.scratch.vocab_size, template), section.llm)
    else:
        tokenizer = load_tokenizer(section.llm, saved)
    with torch.device("meta"):
        tower = bare_tower(section.tower, own_rebuild(recipe))
        tokens, width = tower.measure()
        # An image's slots don't depend on the LLM's width: any will do that the connector's heads divide.
        connector = build_connector(section.connector, width, 8 * getattr(section.connector, "heads", 1))
    return _processor(section, tokenizer, template, connector.tokens(tokens), tower, recipe.data.system, recipe.data.max_length)


def bare_tower(section: AnyTower, rebuild: dict[str, Any] | None = None) -> VisionTower:
    """The recipe's tower with random weights in place of pretrained ones; of those only configs are read.

    `rebuild` is the architecture where it is known.
    """
    return build_tower(section, rebuild or architecture(section))


def _processor(
    section: ModelSection, tokenizer: Any, template: ChatTemplate, tokens: int, tower: VisionTower, system: str | None, max_length: int
) -> Processor:
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {quoted(section.llm.name)} has no end token")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Processor(
        tokenizer=tokenizer,
        template=template,
        spec=InputSpec(tokens, section.llm.kind, max_length, pad, tokenizer.eos_token_id),
        images=ImageProcessor(
            tower.image_size, section.tower.resize, tower.mean, tuple((columns, rows) for columns, rows in section.tower.tiles)
        ),
        system=system,
        words=tuple(section.llm.words),
    )


def add_words(tokenizer: Any, llm: Llm) -> Any:
    """The tokenizer with the tokens that a recipe adds to it; those that it has keep their ids."""
    from tokenizers import AddedToken

    for words, special in ((llm.added_tokens, False), (llm.added_special_tokens, True)):
        present = tokenizer.added_tokens_encoder
        new: Any = [AddedToken(word, special=special, normalized=False) for word in words if word not in present]
        tokenizer.add_tokens(new, special_tokens=special)
    return tokenizer


def make_room(language: Any, rows: int) -> None:
    """Gives an LLM's embedding and head as many rows as a vocabulary has; new ones are the mean of the others."""
    before = language.get_input_embeddings().num_embeddings
    if rows <= before:
        return
    language.resize_token_embeddings(rows, mean_resizing=False)
    for layer in {language.get_input_embeddings(), language.get_output_embeddings()}:
        layer.weight.data[before:] = layer.weight.data[:before].float().mean(0).to(layer.weight.dtype)
        if getattr(layer, "bias", None) is not None:
            layer.bias.data[before:] = layer.bias.data[:before].float().mean().to(layer.bias.dtype)


def assemble(
    config: VisionLanguageConfig, tower: VisionTower, tokenizer: Any, language: Any, words: Any = None, *, changed: set[str]
) -> VisionLanguageModel:
    """A model from its parts, with a connector of random weights; `words` is the connector's own tokenizer, where it has one.

    Raises `ModelError` for a tokenizer with more tokens than the embedding that it is for, and for a language model whose
    logits are not its own when it is called as it is here.
    """
    rows = language.get_input_embeddings().num_embeddings
    without = [name for name, token in tokenizer.get_vocab().items() if token >= rows and name not in config.llm.words]
    if without:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows: none for {', '.join(sorted(without)[:4])}. "
            "Use the tokenizer that the model was made with, or name these in model.llm.added_tokens: then they get rows, which are trained"
        )
    if config.llm.words:
        make_room(language, len(tokenizer))
    llm, connector, tokens = _connected(config.model, tower.measure(), language)
    if words is not None:
        _connect_words(config, connector, tokenizer, words)
    template = ChatTemplate.model_validate(config.template)
    processor = _processor(config.model, tokenizer, template, tokens, tower, config.system, config.max_length)
    model = VisionLanguageModel(config, tower, connector, llm, processor)
    if getattr(language, "is_quantized", False) and config.llm.quantize:
        check_packed(model)
    model.changed = changed | ({"llm"} if config.llm.scratch else set())
    return model


def _connect_words(config: VisionLanguageConfig, connector: Connector, tokenizer: Any, words: Any) -> None:
    section = config.model.connector
    assert isinstance(section, QFormerConnector)
    if len(words) > (section.vocab_size or 0):
        raise ModelError(
            f"the connector's tokenizer has {len(words)} tokens, its embedding {section.vocab_size} (model.connector.vocab_size)"
        )
    connector.reader = Reader(tokenizer, words, section.max_text)


def check_packed(model: VisionLanguageModel) -> None:
    """Asserts that every linear layer of the LLM's blocks is packed as the recipe says, and nothing else is.

    Raises `ModelError` naming layers that are packed by mistake (tower, connector, head, embeddings) or were left out.
    """
    quantize, language = model.config.llm.quantize, model.llm.model
    blocks = tuple(f"llm.model.{block}." for block in block_names(language))
    wrong: list[str] = []
    for name, layer in model.named_modules():
        kind = getattr(getattr(layer, "weight", None), "quant_type", "int8" if type(layer).__name__ == "Linear8bitLt" else None)
        # T5 keeps `wo` in fp32 where transformers' own list says so; no other layer of a block may be left out.
        kept = name.rsplit(".", 1)[-1] in (getattr(language, "_keep_in_fp32_modules", None) or ())
        wanted = quantize if isinstance(layer, nn.Linear) and name.startswith(blocks) and not kept else None
        if kind != wanted and not (kept and kind == quantize):
            wrong.append(f"{name} is {kind or 'not packed'}, expected {wanted or 'not packed'}")
    if wrong:
        raise ModelError(f"model.llm.quantize: {quantize} did not pack what it should: {'; '.join(wrong[:5])}")


def _connected(section: ModelSection, measured: tuple[int, int], language: Any) -> tuple[LanguageModel, Connector, int]:
    """The language model's adapter, a connector of random weights attached to it, and the slots an image takes.

    `measured` are the tokens and the width that the tower gives.
    """
    llm = LLMS[section.llm.kind](language)
    if language.device.type != "meta":
        # Before a connector's blocks go into its layers: those may be of another type yet.
        llm.check()
    with torch.device("meta"):
        check_memory(build_connector(section.connector, measured[1], llm.width), "model.connector")
    connector = build_connector(section.connector, measured[1], llm.width)
    connector.attach(llm)
    return llm, connector, connector.tokens(measured[0])


def bare_model(recipe: Recipe, tokenizer: Any = None, *, attention: str | None = None) -> tuple[VisionLanguageModel, tuple[int, int]]:
    """The recipe's model on the meta device, and its tower's tokens an image and width.

    Of the weights only configs are read, and a tokenizer is not needed. The model's processor knows the layout and the
    special ids, and nothing of words. Raises `ModelError` for unknown names.
    """
    section = model_section(recipe)
    ids = tokenizer or SimpleNamespace(**{f"{name}_id": place for place, name in enumerate(SPECIALS)})
    with torch.device("meta"):
        tower = bare_tower(section.tower, own_rebuild(recipe))
        if section.llm.scratch:
            size = len(tokenizer) if tokenizer else section.llm.scratch.vocab_size
            language = _scratch_llm(section.llm, section.llm.scratch, ids, size, attention)
        else:
            language = bare_llm(section.llm, load_dtype(recipe), attention=attention)
            if section.llm.words:
                rows = language.get_input_embeddings().num_embeddings
                make_room(language, len(tokenizer) if tokenizer else rows + len(section.llm.words))
        measured = tower.measure()
        llm, connector, tokens = _connected(section, measured, language)
    spec = InputSpec(tokens, section.llm.kind, recipe.data.max_length, ids.pad_token_id or 0, ids.eos_token_id)
    processor: Any = SimpleNamespace(spec=spec, stop_ids=[spec.eos_id])
    return VisionLanguageModel(_config(recipe, section, tower), tower, connector, llm, processor), measured


def bare_llm(llm: Llm, dtype: torch.dtype, *, folder: Path | None = None, attention: str | None = None) -> Any:
    """The language model of a name or folder by its config alone, on the meta device, with layers that stand for quantised ones."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = llm_config(llm, folder)
    try:
        factory: Any = AutoModelForSeq2SeqLM if llm.kind == "seq2seq" else AutoModelForCausalLM
        with torch.device("meta"):
            model = factory.from_config(config, dtype=dtype, **_attention(attention))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.llm.name: can't build the language model of {quoted(llm.name)}: {load_reason(str(llm.name), error)}"
        ) from None
    if getattr(config, "scale_decoder_outputs", True) is False:
        # Flan-T5's head is its own; transformers ties it until it sees the weights.
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    if llm.quantize:
        pack_linears(model, llm.quantize, keep=model.get_output_embeddings())
    return model


def llm_config(llm: Llm, folder: Path | None = None) -> Any:
    """transformers' config of a language model by its name, or of a saved folder. Raises `ModelError` if it can't be read."""
    from transformers import AutoConfig

    if folder is None:
        check_base(str(llm.name), "model.llm.name")
    vlm = find_vlm(str(llm.name)) if folder is None else None
    if vlm is not None:
        return language_config(vlm)
    options: dict[str, Any] = {"gguf_file": llm.gguf_file} if llm.gguf_file and folder is None else {}
    try:
        return AutoConfig.from_pretrained(str(folder or config_source(str(llm.name))), trust_remote_code=False, **options)
    except (OSError, ValueError, TypeError) as error:  # the last for JSON that is no object
        name = str(folder or llm.name)
        raise ModelError(f"can't read the config of the language model {quoted(name)}: {load_reason(name, error)}") from None


def trained_later(recipe: Recipe, stage: int) -> set[str]:
    """The parts whose own weights a stage after this one trains: rounding them meanwhile would lose digits."""
    rules = [rule for _, later in recipe.resolved_stages()[stage + 1 :] for rule in later.tune if rule.trains_base]
    return {part for part in ("tower", "llm") if any(rule.match.split(".")[0] in (part, "*") for rule in rules)}


def load_dtype(recipe: Recipe) -> torch.dtype:
    """Half precision to load frozen weights in; fp32 where any stage trains the LLM's own weights, so no digit is lost.

    What trains beside quantised weights is kept apart, in fp32.
    """
    full = recipe.model.llm.quantize is None and any(
        rule.trains_base and (rule.match.startswith("llm") or rule.match.startswith("*"))
        for _, stage in recipe.resolved_stages()
        for rule in stage.tune
    )
    return torch.float32 if full else DTYPES[recipe.train.precision]


def train_tokenizer(conversations: Iterable[Conversation], vocab_size: int, template: ChatTemplate) -> Any:
    """A byte-level BPE tokenizer trained on the conversations' text; the template's control tokens are in it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS.values(), *template.control_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The distinct texts, sorted: the vocabulary depends on what is said, not on the order of rows.
    texts = sorted({str(s.payload) for c in conversations for s in template.segments(c) if s.kind == "text"})
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIALS)


def planned_config(recipe: Recipe) -> tuple[VisionLanguageConfig, Any]:
    """The config of the model that a recipe trains, and transformers' config of its LLM; only configs are read.

    Raises `ModelError` for unknown names.
    """
    section = model_section(recipe)
    with torch.device("meta"):
        tower = bare_tower(section.tower, own_rebuild(recipe))
    if section.llm.scratch is None:
        text = llm_config(section.llm)
    else:
        ids: Any = SimpleNamespace(**{f"{name}_id": place for place, name in enumerate(SPECIALS)})
        text = _scratch_config(section.llm, section.llm.scratch, ids, section.llm.scratch.vocab_size)
    return _config(recipe, section, tower), text


def _scratch_llm(llm: Llm, scratch: Scratch, tokenizer: Any, vocabulary: int, attention: str | None = None) -> Any:
    """A language model of random weights; `tokenizer` is asked for the ids of its special tokens."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = _scratch_config(llm, scratch, tokenizer, vocabulary)
    factory: Any = AutoModelForSeq2SeqLM if llm.kind == "seq2seq" else AutoModelForCausalLM
    try:
        return factory.from_config(config, **_attention(attention))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model.llm.scratch: {error}") from None


def _scratch_config(llm: Llm, scratch: Scratch, tokenizer: Any, vocabulary: int) -> Any:
    """transformers' config of an LLM of random weights."""
    from transformers import AutoConfig

    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    if llm.kind == "seq2seq":
        ids["decoder_start_token_id"] = tokenizer.pad_token_id
    try:
        return AutoConfig.for_model(scratch.model_type, **{**ids, "vocab_size": vocabulary, **scratch.config})
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model.llm.scratch: {error}") from None


def _attention(kind: str | None = None) -> dict[str, Any]:
    # On a CPU, plain attention on short rows is faster than the fused kernel's backward pass.
    return {"attn_implementation": kind or ("sdpa" if torch.cuda.is_available() else "eager")}


def load_tokenizer(llm: Llm, folder: Path | None = None) -> Any:
    """The tokenizer of a language model, or of a saved folder. Raises `ModelError` if it can't be loaded.

    A chat template that comes with it is left out: it is a program of whoever made the folder, and ours renders.
    """
    from transformers import AutoTokenizer

    if folder is None:
        check_base(str(llm.name), "model.llm.name")
    options: dict[str, Any] = {"gguf_file": llm.gguf_file} if llm.gguf_file and folder is None else {}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder or llm.name), trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        name = str(folder or llm.name)
        raise ModelError(f"model.llm.name: no tokenizer in {quoted(name)}: {load_reason(name, error)}") from None
    tokenizer.chat_template = None
    return add_words(tokenizer, llm)


def pin_tokenizer(folder: Path) -> None:
    """Makes transformers read a folder's tokenizer.json as it is; a model's own class would make it anew, and Llama's loses `legacy`."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))


def load_llm(llm: Llm, *, dtype: torch.dtype, folder: Path | None = None, quantize: bool = True) -> Any:
    """The transformers model of a name or a folder, quantised as `llm.quantize` says unless told not to.

    Raises `ModelError` for names and files that don't exist, cut files, missing or unexpected tensors.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if llm.kind == "seq2seq" and dtype == torch.float16:
        raise ModelError("dtype: T5's activations overflow in fp16; use bf16 or fp32")
    factory: Any = AutoModelForSeq2SeqLM if llm.kind == "seq2seq" else AutoModelForCausalLM
    name = str(folder or llm.name)
    if folder is None:
        check_base(name, "model.llm.name")
    gguf = llm.gguf_file if folder is None else None
    if gguf and not (Path(name) / gguf).is_file():
        raise ModelError(f"model.llm.gguf_file: no GGUF file {quoted(gguf)} in {quoted(name)}")
    if Path(name).is_dir() and not gguf:
        check_folder(Path(name))
    options: dict[str, Any] = {"dtype": dtype, **_attention()}
    if gguf:
        model = _loaded(factory, name, {**options, "gguf_file": gguf})
        forget_gguf(model)
        if not (llm.quantize and quantize):
            return model
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            return _loaded(factory, scratch, {**options, "quantization_config": _bitsandbytes(llm, dtype)})
    options["use_safetensors"] = True
    vlm = find_vlm(name) if folder is None else None
    if vlm is not None:
        config = language_config(vlm)
        options |= {"config": config, "key_mapping": language_names(vlm, config)}
    if llm.quantize and quantize:
        options["quantization_config"] = _bitsandbytes(llm, dtype)
    return _loaded(factory, name, options, vlm)


def _loaded(factory: Any, name: str, options: dict[str, Any], vlm: Vlm | None = None) -> Any:
    """A whole language model, or the one inside a vision-language model."""
    try:
        model, info = factory.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"can't load the language model {quoted(name)}: {load_reason(name, error)}") from None
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"model.llm.name: {quoted(name)} is a PEFT adapter, not a whole model; merge it first and name the merged model")
    if vlm is not None:
        info["unexpected_keys"] = [key for key in info["unexpected_keys"] if not vlm.foreign(key)]
        # It is a language model now: saved under its own names, not under those it was found by.
        del model._weight_conversions
    faults = [
        f"{word} {', '.join(sorted(map(str, info[key]))[:8])}"
        for word, key in (("missing", "missing_keys"), ("unexpected", "unexpected_keys"), ("misshapen", "mismatched_keys"))
        if info.get(key)
    ]
    if faults:
        raise ModelError(f"the weights in {quoted(name)} do not fit the model: {'; '.join(faults)}")
    if "quantization_config" in options:
        own_memory(model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else the first pass in eval mode packs 4-bit weights for a CPU kernel that has no gradient, and they stay so.
            module.support_avx512bf16_for_cpu = False
    return model


def forget_gguf(model: Any) -> None:
    """A de-quantised GGUF model is a plain one; as long as it claims otherwise transformers won't save it."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    if hasattr(model, "is_quantized"):
        model.is_quantized = False


def _bitsandbytes(llm: Llm, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if llm.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=str(llm.quantize),
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=False,
        llm_int8_skip_modules=["lm_head"],
    )


def restore_tower(section: AnyTower, rebuild: dict[str, Any] | None, weights: Path | None) -> VisionTower:
    """A tower from its own weights where it has some, by its architecture `rebuild`, else from its name."""
    if weights is None:
        return build_tower(section)
    tower = build_tower(section, rebuild)
    load_into(tower, read_safetensors(weights), weights)
    return tower
