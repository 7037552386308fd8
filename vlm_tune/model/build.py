"""From a recipe to a model: the tower, the language model and its tokenizer, quantised where asked."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from vlm_tune.config.model import (
    AnyTower,
    ModelSection,
    OpenClipTower,
    PairTower,
    QFormerConnector,
    TimmTower,
)
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.chat.template import ChatTemplate, load_template
from vlm_tune.data.images.decode import ImageProcessor
from vlm_tune.data.types import Conversation, InputSpec
from vlm_tune.errors import ModelError
from vlm_tune.model.base_places import Base
from vlm_tune.model.base_weights import llm_base, tower_base
from vlm_tune.model.build_checks import check_memory
from vlm_tune.model.connectors.instruction import Reader
from vlm_tune.model.connectors.projectors import Connector
from vlm_tune.model.connectors.registry import build_connector
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.registry import LLMS
from vlm_tune.model.layer_index import block_names
from vlm_tune.model.pretrained.connector_weights import load_words, start_connector
from vlm_tune.model.pretrained.language_model import (
    bare_llm,
    llm_config,
    load_llm,
    make_room,
    scratch_config,
    scratch_llm,
)
from vlm_tune.model.pretrained.tokenizer import SPECIALS, add_words, load_tokenizer, train_tokenizer
from vlm_tune.model.pretrained.vlm_checkpoints import model_section, own_folder, own_rebuild
from vlm_tune.model.vision.base import VisionTower
from vlm_tune.model.vision.registry import architecture, build_tower
from vlm_tune.model.vlm import Network, VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.model.weights import load_into, read_safetensors
from vlm_tune.precision import DTYPES
from vlm_tune.quoting import quoted

CONNECTOR = "connector.safetensors"
TOWER = "tower.safetensors"
WORDS = "connector_tokenizer"
"""What a model folder calls the connector's weights, the tower's where it holds them, and the connector's own tokenizer."""


def build(
    recipe: Recipe,
    conversations: Iterable[Conversation],
    *,
    bare: bool = False,
    model_class: type[Network] = VisionLanguageNetwork,  # pyright: ignore[reportArgumentType]
) -> Network:
    """The recipe's model before training, an instance of `model_class`.

    `conversations` are what a scratch tokenizer is trained on. A `bare` one has its language model on the meta device, for a process that is given its share of the weights by another.

    Raises `ModelError` for weights that can't be loaded whole and names that don't exist.
    """
    torch.manual_seed(recipe.seed)
    section = model_section(recipe)
    template = load_template(recipe.data.template)
    own = own_folder(recipe)
    own_tower = own / TOWER if own and (own / TOWER).is_file() else None
    tower = restore_tower(section.tower, own_rebuild(recipe), own_tower)
    if section.llm.scratch:
        tokenizer = add_words(
            train_tokenizer(conversations, section.llm.scratch.vocab_size, template), section.llm
        )
        with torch.device("meta") if bare else nullcontext():
            language = scratch_llm(section.llm, section.llm.scratch, tokenizer, len(tokenizer))
    else:
        tokenizer = load_tokenizer(section.llm)
        language = (
            bare_llm(section.llm, load_dtype(recipe))
            if bare
            else load_llm(section.llm, dtype=load_dtype(recipe))
        )
    changed = {"tower"} if own_tower or _from_scratch(section.tower) else set()
    words = load_words(section.connector, own / WORDS if own else None)
    config = _config(recipe, section, tower)
    model = assemble(
        config, tower, tokenizer, language, words, changed=changed, model_class=model_class
    )
    if own:
        load_into(model.connector, read_safetensors(own / CONNECTOR), own / CONNECTOR)
    else:
        start_connector(model.connector, section.connector)
    model.bases = bases_of(model, bare=bare)
    return model


def bases_of(model: VisionLanguageNetwork, *, bare: bool = False) -> dict[str, Base]:
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


def build_processor(
    recipe: Recipe, conversations: Iterable[Conversation], *, saved: Path | None = None
) -> Processor:
    """The recipe's processor alone: tokenizer, template and the image's token count, no weights loaded.

    The tokenizer is that of the model folder `saved` where one is given, else the LLM's, or one trained on `conversations`.
    """
    section = model_section(recipe)
    template = load_template(recipe.data.template)
    if section.llm.scratch and saved is None:
        tokenizer = add_words(
            train_tokenizer(conversations, section.llm.scratch.vocab_size, template), section.llm
        )
    else:
        tokenizer = load_tokenizer(section.llm, saved)
    with torch.device("meta"):
        tower = bare_tower(section.tower, own_rebuild(recipe))
        tokens, width = tower.measure()
        # An image's slots don't depend on the LLM's width: any will do that the connector's heads divide.
        connector = build_connector(
            section.connector, width, 8 * getattr(section.connector, "heads", 1)
        )
    return _processor(
        section,
        tokenizer,
        template,
        connector.tokens(tokens),
        tower,
        recipe.data.system,
        recipe.data.max_length,
    )


def bare_tower(section: AnyTower, rebuild: dict[str, Any] | None = None) -> VisionTower:
    """The recipe's tower with random weights in place of pretrained ones; of those only configs are read.

    `rebuild` is the architecture where it is known.
    """
    return build_tower(section, rebuild or architecture(section))


def _processor(
    section: ModelSection,
    tokenizer: Any,
    template: ChatTemplate,
    tokens: int,
    tower: VisionTower,
    system: str | None,
    max_length: int,
) -> Processor:
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {quoted(section.llm.name)} has no end token")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Processor(
        tokenizer=tokenizer,
        template=template,
        spec=InputSpec(tokens, section.llm.kind, max_length, pad, tokenizer.eos_token_id),
        images=ImageProcessor(
            tower.image_size,
            section.tower.resize,
            tower.mean,
            tuple((columns, rows) for columns, rows in section.tower.tiles),
        ),
        system=system,
        words=tuple(section.llm.words),
    )


def assemble(
    config: VisionLanguageConfig,
    tower: VisionTower,
    tokenizer: Any,
    language: Any,
    words: Any = None,
    *,
    changed: set[str],
    model_class: type[Network] = VisionLanguageNetwork,  # pyright: ignore[reportArgumentType]
) -> Network:
    """A model from its parts, with a connector of random weights; `words` is the connector's own tokenizer, where it has one.

    Raises `ModelError` for a tokenizer with more tokens than the embedding that it is for, and for a language model whose
    logits are not its own when it is called as it is here.
    """
    rows = language.get_input_embeddings().num_embeddings
    without = [
        name
        for name, token in tokenizer.get_vocab().items()
        if token >= rows and name not in config.llm.words
    ]
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
    processor = _processor(
        config.model, tokenizer, template, tokens, tower, config.system, config.max_length
    )
    model = model_class(config, tower, connector, llm, processor)
    if getattr(language, "is_quantized", False) and config.llm.quantize:
        check_packed(model)
    model.changed = changed | ({"llm"} if config.llm.scratch else set())
    return model


def _connect_words(
    config: VisionLanguageConfig, connector: Connector, tokenizer: Any, words: Any
) -> None:
    section = config.model.connector
    assert isinstance(section, QFormerConnector)
    if len(words) > (section.vocab_size or 0):
        raise ModelError(
            f"the connector's tokenizer has {len(words)} tokens, its embedding {section.vocab_size} (model.connector.vocab_size)"
        )
    connector.reader = Reader(tokenizer, words, section.max_text)


def check_packed(model: VisionLanguageNetwork) -> None:
    """Asserts that every linear layer of the LLM's blocks is packed as the recipe says, and nothing else is.

    Raises `ModelError` naming layers that are packed by mistake (tower, connector, head, embeddings) or were left out.
    """
    quantize = model.config.llm.quantize
    language = model.llm.model
    blocks = tuple(f"llm.model.{block}." for block in block_names(language))
    wrong: list[str] = []
    for name, layer in model.named_modules():
        kind = getattr(
            getattr(layer, "weight", None),
            "quant_type",
            "int8" if type(layer).__name__ == "Linear8bitLt" else None,
        )
        # T5 keeps `wo` in fp32 where transformers' own list says so; no other layer of a block may be left out.
        kept = name.rsplit(".", 1)[-1] in (getattr(language, "_keep_in_fp32_modules", None) or ())
        wanted = (
            quantize
            if isinstance(layer, nn.Linear) and name.startswith(blocks) and not kept
            else None
        )
        if kind != wanted and not (kept and kind == quantize):
            wrong.append(f"{name} is {kind or 'not packed'}, expected {wanted or 'not packed'}")
    if wrong:
        raise ModelError(
            f"model.llm.quantize: {quantize} did not pack what it should: {'; '.join(wrong[:5])}"
        )


def _connected(
    section: ModelSection, measured: tuple[int, int], language: Any
) -> tuple[LanguageModel, Connector, int]:
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
    connector.attach(language)
    return llm, connector, connector.tokens(measured[0])


def bare_model(
    recipe: Recipe, tokenizer: Any = None, *, attention: str | None = None
) -> tuple[VisionLanguageNetwork, tuple[int, int]]:
    """The recipe's model on the meta device, and its tower's tokens an image and width.

    Of the weights only configs are read, and a tokenizer is not needed. The model's processor knows the layout and the
    special ids, and nothing of words. Raises `ModelError` for unknown names.
    """
    section = model_section(recipe)
    ids = tokenizer or SimpleNamespace(
        **{f"{name}_id": place for place, name in enumerate(SPECIALS)}
    )
    with torch.device("meta"):
        tower = bare_tower(section.tower, own_rebuild(recipe))
        if section.llm.scratch:
            size = len(tokenizer) if tokenizer else section.llm.scratch.vocab_size
            language = scratch_llm(section.llm, section.llm.scratch, ids, size, attention)
        else:
            language = bare_llm(section.llm, load_dtype(recipe), attention=attention)
            if section.llm.words:
                rows = language.get_input_embeddings().num_embeddings
                make_room(language, len(tokenizer) if tokenizer else rows + len(section.llm.words))
        measured = tower.measure()
        llm, connector, tokens = _connected(section, measured, language)
    spec = InputSpec(
        tokens, section.llm.kind, recipe.data.max_length, ids.pad_token_id or 0, ids.eos_token_id
    )
    processor: Any = SimpleNamespace(spec=spec, stop_ids=[spec.eos_id])
    return VisionLanguageNetwork(
        _config(recipe, section, tower), tower, connector, llm, processor
    ), measured


def trained_later(recipe: Recipe, stage: int) -> set[str]:
    """The parts whose own weights a stage after this one trains: rounding them meanwhile would lose digits."""
    rules = [
        rule
        for _, later in recipe.resolved_stages()[stage + 1 :]
        for rule in later.tune
        if rule.trains_base
    ]
    return {
        part
        for part in ("tower", "llm")
        if any(rule.match.split(".")[0] in (part, "*") for rule in rules)
    }


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
        text = scratch_config(section.llm, section.llm.scratch, ids, section.llm.scratch.vocab_size)
    return _config(recipe, section, tower), text


def restore_tower(
    section: AnyTower, rebuild: dict[str, Any] | None, weights: Path | None
) -> VisionTower:
    """A tower from its own weights where it has some, by its architecture `rebuild`, else from its name."""
    if weights is None:
        return build_tower(section)
    tower = build_tower(section, rebuild)
    load_into(tower, read_safetensors(weights), weights)
    return tower
