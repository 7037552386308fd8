"""Builds a model from a recipe: the tower, the connector, the language model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vlm_tune.config.connectors import QFormerConnector
from vlm_tune.config.model import AnySection, NativeSection
from vlm_tune.config.native import OWN_TEMPLATE
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.towers import AnyTower, AudioTower, OpenClipTower, PairTower, TimmTower
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.chat.template import ChatTemplate, load_template
from vlm_tune.data.images.native import NativeImages
from vlm_tune.data.prepare.job import distinct_tasks
from vlm_tune.data.types import Conversation, InputSpec
from vlm_tune.errors import ModelError
from vlm_tune.model.acceleration.install import install
from vlm_tune.model.base_places import Base
from vlm_tune.model.base_weights import llm_base, tower_base
from vlm_tune.model.build_checks import check_memory, check_questions
from vlm_tune.model.connectors.instruction import Reader
from vlm_tune.model.connectors.projectors import Connector
from vlm_tune.model.connectors.registry import build_connector
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.native import NativeLLM
from vlm_tune.model.language.registry import wrapped_llm
from vlm_tune.model.media_tower import MediaTower
from vlm_tune.model.optimizer_groups import Tuned
from vlm_tune.model.precisions import load_dtype, trained_later
from vlm_tune.model.pretrained.connector_weights import load_words, start_connector
from vlm_tune.model.pretrained.language_model import (
    bare_llm,
    check_packed,
    llm_config,
    load_llm,
    make_room,
    scratch_config,
    scratch_llm,
)
from vlm_tune.model.pretrained.native import load_native_processor, reads_branches, recipe_template
from vlm_tune.model.pretrained.native_images import native_images
from vlm_tune.model.pretrained.native_template import fit_template
from vlm_tune.model.pretrained.tokenizer import SPECIALS, load_tokenizer, scratch_tokenizer
from vlm_tune.model.pretrained.vlm_checkpoints import model_section, own_folder, own_rebuild
from vlm_tune.model.pretrained.whole_logits import check_whole_logits
from vlm_tune.model.tuning import apply_rules
from vlm_tune.model.vision.registry import (
    architecture,
    build_tower,
    media_processor,
    meta_tower,
)
from vlm_tune.model.vlm import Network, VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.model.weights import CPU, load_into, read_safetensors, release_mapped
from vlm_tune.precision import DTYPES
from vlm_tune.quoting import quoted

CONNECTOR = "connector.safetensors"
TOWER = "tower.safetensors"
WORDS = "connector_tokenizer"
"""Names in a model folder: the connector's weights, the tower's, the connector's own tokenizer."""


def build(
    recipe: Recipe,
    conversations: Iterable[Conversation],
    *,
    bare: bool = False,
    device: torch.device = CPU,
    model_class: type[Network] = VisionLanguageNetwork,  # pyright: ignore[reportArgumentType]
) -> Network:
    """Builds the recipe's model before training.

    Args:
        recipe: its section `model` names the parts, or a model to start from.
        conversations: the text that the tokenizer of a language model from scratch is trained on.
        bare: leaves the language model on the meta device and the rest on the CPU, for a process
            that receives its shards of the weights from another one.
        device: where the model goes. The weights of a pretrained language model are loaded there.
        model_class: the class of the model that is returned.

    Raises:
        ModelError: weights can't be loaded completely, or a name does not exist.
    """
    torch.manual_seed(recipe.seed)
    section = model_section(recipe)
    template = recipe_template(recipe, section)
    start_folder = own_folder(recipe)
    own_tower = start_folder / TOWER if start_folder and (start_folder / TOWER).is_file() else None
    tower = restore_tower(section.tower, own_rebuild(recipe), own_tower)
    if section.llm.scratch:
        tokenizer = scratch_tokenizer(
            section, template, media_processor(section, tower), conversations
        )
        with torch.device("meta") if bare else nullcontext():
            language = scratch_llm(section.llm, section.llm.scratch, tokenizer, len(tokenizer))
    else:
        tokenizer = load_tokenizer(section.llm)
        language = (
            bare_llm(section.llm, load_dtype(recipe))
            if bare
            else load_llm(section.llm, dtype=load_dtype(recipe), device=device)
        )
    changed = {"tower"} if own_tower or _from_scratch(section.tower) else set()
    words = load_words(section.connector, start_folder / WORDS if start_folder else None)
    config = _config(recipe, section, tower, template)
    model = assemble(
        config, tower, tokenizer, language, words, changed=changed, model_class=model_class
    )
    if start_folder:
        load_into(
            model.connector, read_safetensors(start_folder / CONNECTOR), start_folder / CONNECTOR
        )
    else:
        start_connector(model.connector, section.connector)
    model.bases = bases_of(model, bare=bare)
    return model if bare else model.to(device)


def bases_of(model: VisionLanguageNetwork, *, bare: bool = False) -> dict[str, Base]:
    """The fingerprints of the parts whose weights are still those of their name in the recipe.

    A `bare` model's LLM has none.
    """
    bases = {}
    if "llm" not in model.changed and not bare:
        bases["llm"] = llm_base(model.config.llm)
    if "tower" not in model.changed:
        bases["tower"] = tower_base(model.config.model.tower, model.tower)
        release_mapped(model.tower)  # all weights were read
    return bases


def _config(
    recipe: Recipe, section: AnySection, tower: MediaTower, template: ChatTemplate | None
) -> VisionLanguageConfig:
    """The config of a recipe's model; the template is None for a checkpoint's own, not read."""
    return VisionLanguageConfig(
        model=section,
        tower_rebuild=tower.rebuild,
        template={} if template is None else template.model_dump(),
        system=recipe.data.system,
        max_length=recipe.data.max_length,
        precision=recipe.last_stage.train.precision,
    )


def _planned(recipe: Recipe, section: AnySection, tower: MediaTower) -> VisionLanguageConfig:
    """The config of a model that is only planned: a checkpoint's own template is not read."""
    name = recipe.data.template
    return _config(recipe, section, tower, None if name == OWN_TEMPLATE else load_template(name))


def _from_scratch(tower: AnyTower) -> bool:
    """Whether some of a tower's weights are random, so that they can't be reloaded by its name."""
    if isinstance(tower, PairTower):
        return any(_from_scratch(part) for part in tower.towers)
    if isinstance(tower, AudioTower):
        return tower.config is not None
    if isinstance(tower, OpenClipTower):
        has_weights = str(tower.name).startswith(("hf-hub:", "local-dir:"))
        return tower.config is not None or (tower.pretrained is None and not has_weights)
    return isinstance(tower, TimmTower) and tower.pretrained is False


def build_processor(
    recipe: Recipe, conversations: Iterable[Conversation], *, saved: Path | None = None
) -> Processor:
    """Builds the recipe's processor alone: tokenizer, template and tokens per image, no weights.

    The tokenizer is loaded from the model folder `saved` if there is one. Otherwise it is the
    LLM's, or for an LLM from scratch one trained on `conversations`.
    """
    section = model_section(recipe)
    template = recipe_template(recipe, section)
    tower = meta_tower(section.tower, own_rebuild(recipe))
    if section.llm.scratch and saved is None:
        tokenizer = scratch_tokenizer(
            section, template, media_processor(section, tower), conversations
        )
    else:
        tokenizer = load_tokenizer(section.llm, saved)
    tokens, width = tower.measure()
    with torch.device("meta"):
        # The number of slots of an image does not depend on the LLM's width: any multiple of the
        # connector's heads will do.
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
        folder=saved,
    )


def bare_tower(section: AnyTower, rebuild: dict[str, Any] | None = None) -> MediaTower:
    """The recipe's tower with random weights instead of pretrained ones; only configs are read.

    `rebuild` is its architecture, if already known.
    """
    return build_tower(section, rebuild or architecture(section))


def _processor(
    section: AnySection,
    tokenizer: Any,
    template: ChatTemplate,
    tokens: int,
    tower: MediaTower,
    system: str | None,
    max_length: int,
    *,
    folder: Path | None = None,
) -> Processor:
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {quoted(section.llm.name)} has no end token")
    check_questions(section, template)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    is_native = isinstance(section, NativeSection)
    # Another chat format takes the place of the checkpoint's own, whatever switch that has.
    mode = template.enable_thinking if template.name == OWN_TEMPLATE else None
    native = load_native_processor(section, folder, mode) if is_native else None
    name = None if folder else section.llm.name
    images = media_processor(section, tower) if native is None else native_images(native, name)
    joins = images.joins if isinstance(images, NativeImages) else ()
    special = (pad, tokenizer.eos_token_id, joins, reads_branches(section, folder))
    processor = Processor(
        tokenizer=tokenizer,
        template=template,
        spec=InputSpec(tokens, section.llm.kind, max_length, *special),
        images=images,
        system=system,
        words=tuple(section.llm.words),
        boxes=section.boxes,
    )
    if native is not None:
        fit_template(processor, native, saved=folder is not None)
    return processor


def assemble(
    config: VisionLanguageConfig,
    tower: MediaTower,
    tokenizer: Any,
    language: Any,
    words: Any = None,
    *,
    changed: set[str],
    folder: Path | None = None,
    model_class: type[Network] = VisionLanguageNetwork,  # pyright: ignore[reportArgumentType]
) -> Network:
    """Assembles a model from its parts, with a connector of random weights.

    Args:
        config: the model's config, saved with it.
        tower: the vision tower.
        tokenizer: the LLM's tokenizer.
        language: the transformers model of the LLM.
        words: the connector's own tokenizer; None if it has none.
        changed: the parts (tower, llm) whose weights are no longer those of their name.
        folder: the model folder that it is restored from.
        model_class: the class of the model that is returned.

    Raises:
        ModelError: a tokenizer has more tokens than its embedding has rows, or the language model's
            own forward pass gives other logits than the way it is called here.
    """
    _check_rows(config, tokenizer, language.get_input_embeddings().num_embeddings)
    if config.llm.words:
        make_room(language, len(tokenizer))
    measured = tower.measure()
    release_mapped(tower)  # measuring has read all weights
    llm, connector, tokens = _connected(config.model, measured, language)
    if words is not None:
        _connect_words(config, connector, tokenizer, words)
    template = ChatTemplate.model_validate(config.template)
    processor = _processor(
        config.model,
        tokenizer,
        template,
        tokens,
        tower,
        config.system,
        config.max_length,
        folder=folder,
    )
    if isinstance(llm, NativeLLM) and isinstance(processor.images, NativeImages):
        llm.takes(processor.images)
    model = model_class(config, tower, connector, llm, processor)
    if getattr(language, "is_quantized", False) and config.llm.quantize:
        check_packed(model)
    model.changed = changed | ({"llm"} if config.llm.scratch else set())
    return model


def _check_rows(config: VisionLanguageConfig, tokenizer: Any, rows: int) -> None:
    """Raises `ModelError` for tokens that an embedding of `rows` has none for."""
    without = [
        name
        for name, token in tokenizer.get_vocab().items()
        if token >= rows and name not in config.llm.words
    ]
    if without:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows: "
            f"none for {', '.join(sorted(without)[:4])}. Use the model's own tokenizer, or name "
            "these in model.llm.added_tokens: then they get rows, which are trained"
        )


def _connect_words(
    config: VisionLanguageConfig, connector: Connector, tokenizer: Any, words: Any
) -> None:
    """Gives a connector a reader of instructions with its own tokenizer, `words`.

    Raises `ModelError` if the tokenizer has more tokens than the connector's embedding.
    """
    section = config.model.connector
    assert isinstance(section, QFormerConnector)
    if len(words) > (section.vocab_size or 0):
        raise ModelError(
            f"the connector's tokenizer has {len(words)} tokens, "
            f"its embedding {section.vocab_size} (model.connector.vocab_size)"
        )
    connector.reader = Reader(tokenizer, words, section.max_text)


def _connected(
    section: AnySection, measured: tuple[int, int], language: Any
) -> tuple[LanguageModel, Connector, int]:
    """Wraps the language model and attaches a connector of random weights.

    Args:
        section: the recipe's section `model`.
        measured: tokens per image and width of the tower's features.
        language: the transformers model of the LLM.

    Returns:
        The wrapped language model, the connector, and the number of slots of an image.
    """
    llm = wrapped_llm(section.llm, language)
    check_whole_logits(section.llm, llm)
    install(llm, section.llm.attention)
    if language.device.type != "meta":
        # Before a connector's blocks are inserted into its layers: they may still be of another
        # dtype.
        llm.check()
        release_mapped(llm)  # the check has read all weights
    with torch.device("meta"):
        check_memory(build_connector(section.connector, measured[1], llm.width), "model.connector")
    connector = build_connector(section.connector, measured[1], llm.width)
    connector.attach(language)
    return llm, connector, connector.tokens(measured[0])


def bare_model(
    recipe: Recipe, tokenizer: Any = None, *, gpu: bool | None = None
) -> tuple[VisionLanguageNetwork, tuple[int, int]]:
    """Builds the recipe's model on the meta device; only configs are read.

    Args:
        recipe: its section `model` names the parts, or a model to start from.
        tokenizer: gives the special ids and the vocabulary's size, if there is one.
        gpu: whether it stands for a model on a GPU, for its attention; as on this machine if None.

    Returns:
        The model, whose processor has the layout and the special ids but no tokenizer, and the
        tower's tokens per image and width.

    Raises:
        ModelError: a name is unknown.
    """
    section = model_section(recipe)
    ids = tokenizer or SimpleNamespace(
        **{f"{name}_id": place for place, name in enumerate(SPECIALS)}
    )
    with torch.device("meta"):
        tower = bare_tower(section.tower, own_rebuild(recipe))
        if section.llm.scratch:
            size = len(tokenizer) if tokenizer else section.llm.scratch.vocab_size
            language = scratch_llm(section.llm, section.llm.scratch, ids, size, gpu)
        else:
            language = bare_llm(section.llm, load_dtype(recipe), gpu=gpu)
            if section.llm.words:
                rows = language.get_input_embeddings().num_embeddings
                make_room(language, len(tokenizer) if tokenizer else rows + len(section.llm.words))
        measured = tower.measure()
        llm, connector, tokens = _connected(section, measured, language)
    special = (ids.pad_token_id or 0, ids.eos_token_id, (), reads_branches(section))
    spec = InputSpec(tokens, section.llm.kind, recipe.data.max_length, *special)
    processor: Any = SimpleNamespace(spec=spec, stop_ids=[spec.eos_id])
    config = _planned(recipe, section, tower)
    return VisionLanguageNetwork(config, tower, connector, llm, processor), measured


def tune_bare_model(model: VisionLanguageNetwork, recipe: Recipe, number: int) -> Tuned:
    """Applies the tuning rules of a recipe's stage to its model on the meta device.

    Raises `ModelError` as `apply_rules` does.
    """
    _, stage = recipe.resolved_stages()[number]
    with torch.device("meta"):
        return apply_rules(
            model,
            stage.tune,
            learning_rate=stage.train.learning_rate,
            precision=DTYPES[stage.train.precision],
            exact=trained_later(recipe, number),
            tasks=distinct_tasks(stage.data.train),
        )


def planned_config(recipe: Recipe) -> tuple[VisionLanguageConfig, Any]:
    """The config of the recipe's model and transformers' config of its LLM; no weights are read.

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
    return _planned(recipe, section, tower), text


def restore_tower(
    section: AnyTower, rebuild: dict[str, Any] | None, weights: Path | None
) -> MediaTower:
    """Builds a tower from the file `weights` and its architecture `rebuild`; without, by name."""
    if weights is None:
        return build_tower(section)
    tower = build_tower(section, rebuild)
    load_into(tower, read_safetensors(weights), weights)
    return tower
