"""The models that `init` may put into a recipe, the best for the machine first."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from vlm_tune.config.model import Llm
from vlm_tune.config.native import JOINED_TYPES, OWN_TEMPLATE
from vlm_tune.data.chat.template import load_template
from vlm_tune.data.images.split import LlavaOnevisionFrames, split_of
from vlm_tune.errors import ModelError, Problem, RecipeError
from vlm_tune.model.connectors.registry import build_connector
from vlm_tune.model.families.base import Vlm
from vlm_tune.model.families.registry import family_names, stored_config, vlm_of
from vlm_tune.model.hub import is_ours, read_json
from vlm_tune.model.pretrained.language_model import llm_config
from vlm_tune.model.pretrained.native import native_types, takes_pixel_bounds
from vlm_tune.model.pretrained.tokenizer import load_tokenizer
from vlm_tune.model.vision.base import VisionTower
from vlm_tune.model.vision.registry import meta_tower
from vlm_tune.paths import is_file, is_folder
from vlm_tune.quoting import quoted
from vlm_tune.recipe_writer.draft import Draft
from vlm_tune.recipe_writer.look import Facts
from vlm_tune.recipe_writer.machine import Machine

LLAVA = "llava-hf/llava-1.5-7b-hf"
FLAN_T5 = "google/flan-t5-xl"
CLIP_LARGE = "openai/clip-vit-large-patch14-336"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
CLIP_SMALL = "openai/clip-vit-base-patch32"
LOCAL_LLM = "models/smollm2-135m-instruct"
LOCAL_TOWER = "models/efficientnet_lite0.safetensors"
"""What `make models` writes."""
LARGE_WIDTH = 1536
"""Width of a language model from which on it counts as large: about a billion parameters."""
SMALL_TOKENS = 49
LARGE_TOKENS = 576
SCRATCH_TOKENS = 16
MOST_TOKENS = 1024
"""Tokens of an image: of the small towers, of CLIP ViT-L/14 at 336 pixels, of the tower from random
weights, and at most of one that the user names."""
MOST_PIXELS = 28 * 28 * MOST_TOKENS
"""Pixels of an image of a native model: Qwen2-VL makes a token of 28 x 28, others of as many or
more."""
NATIVE_REASON = "a model of transformers, called as it is (docs/model.md)"
OWN_REASON = "the checkpoint's own chat template"
NOTHING_PRETRAINED = (
    "there are no pretrained weights on this machine and the model hub can't be reached, so "
    "tower and LLM start from random weights: good for a first run"
)
MARKERS = 3
"""Tokens that mark a tile where a tokenizer has tokens for rows and columns."""
SCRATCH_SIDES = (64, 128)
"""Sides of images that the tower from random weights reads; the larger for larger images."""

Size = Literal["scratch", "small", "aligned", "large"]
"""Random weights; under a billion parameters, or that after a stage that aligns images; above."""


@dataclass(frozen=True)
class ModelChoice:
    """A model in words, its size and kind, and a draft with what the recipe says about it.

    `image_tokens` is the most that an image takes, `among_tokens` the most of one among several of
    a row, where that is less. With `splits` the model cuts images in its way, or keeps their shape.
    With `shares` an image's questions can share it in a row. `native_type` is that of a native one.
    """

    name: str
    size: Size
    causal: bool
    draft: Draft
    image_tokens: int
    splits: bool = False
    shares: bool = True
    native_type: str | None = None
    among_tokens: int | None = None

    def tokens_of(self, images: int) -> int:
        """The most tokens that the images of a row take, of which it has at most `images`."""
        if images < 2 or self.among_tokens is None:
            return images * self.image_tokens
        return max(self.image_tokens, images * self.among_tokens)


def candidates(
    machine: Machine, facts: Facts, model: str | None, tower: str | None
) -> list[ModelChoice]:
    """The models to try on a machine, the best first; the last is the smallest.

    Args:
        machine: where the recipe trains.
        facts: what the data is like.
        model: a folder or hub name of the user's choice, of an LLM or of a whole model.
        tower: likewise of the vision tower; an open_clip one as NAME:TAG.

    Raises:
        ModelError: the config of `model` can't be read.
        RecipeError: `tower` is given for a whole model, which has its own.
    """
    if model is not None:
        choice = named_model(model, tower)
        return [choice, _packed(choice)] if machine.gpu and choice.size == "large" else [choice]
    if machine.gpu:
        llava = _llava(tower)
        return [llava, _packed(llava), _packed(_flan_t5(tower))]
    if is_folder(LOCAL_LLM):
        return [_small(LOCAL_LLM, tower, f"{LOCAL_LLM} is in this folder; it trains on a CPU")]
    if machine.hub:
        return [_small(SMOLLM2, tower, "the smallest instruction-tuned LLM: it trains on a CPU")]
    return [_scratch(facts)]


# --- whole models ---------------------------------------------------------------------------------


def _llava(tower: str | None) -> ModelChoice:
    _refuse_tower(LLAVA, tower)
    return _whole(LLAVA, "vicuna", True, "LLaVA-1.5-7B knows images and text already")


def _refuse_tower(model: str, tower: str | None) -> None:
    if tower is not None:
        message = f"{quoted(model)} has a vision tower; give --model an LLM, or leave --tower out"
        raise RecipeError([Problem("--tower", message)])


def _whole(name: str, template: str, causal: bool, reason: str) -> ModelChoice:
    """A vision-language model with tower, connector and LLM, tuned by LoRA."""
    draft = Draft()
    draft.set("model.pretrained", name, reason)
    draft.set("data.template", template, "the chat format that this model was tuned with")
    _frozen_tower(draft)
    draft.rule(
        "the connector has learned already, so it moves slowly",
        match="connector.*",
        how="full",
        learning_rate=2.0e-5,
    )
    targets = "all-linear" if causal else ["q", "v"]
    _lora(draft, 32, targets, 2.0e-4)
    return ModelChoice(name, "large", causal, draft, LARGE_TOKENS)


def named_model(model: str, tower: str | None) -> ModelChoice:
    """The model that a user names: a whole one, or an LLM under the user's or the usual tower."""
    folder = Path(model)
    if is_folder(model) and is_ours(folder):
        _refuse_tower(model, tower)
        config = read_json(folder / "config.json")
        if config.get("model", {}).get("tower", {}).get("kind") == "native":
            whole = stored_config(str(folder / "llm")) or {}
            return _native(model, str(whole.get("model_type")))
        template = config.get("template", {}).get("name", "chatml")
        causal = config.get("model", {}).get("llm", {}).get("kind") == "causal"
        whole = _whole(model, template, causal, "named by --model")
        cuts = config.get("model", {}).get("tower", {}).get("split") is not None
        connector = config.get("model", {}).get("connector", {})
        reads = connector.get("kind") == "fusion" or bool(connector.get("text"))
        reads |= config.get("model", {}).get("llm", {}).get("bidirectional") == "prompt"
        return replace(whole, size="small", splits=cuts, shares=not reads)
    stored = stored_config(model) or {}
    vlm = vlm_of(model, stored)
    if vlm is not None:
        _refuse_tower(model, tower)
        _, connector, kind = vlm.family.parts(vlm)
        whole = _whole(model, whole_template(vlm), kind == "causal", "named by --model")
        # InstructBLIP's connector reads the question; PaliGemma's image sees it.
        reads = getattr(connector, "text", False) or vlm.family.bidirectional == "prompt"
        whole = replace(whole, shares=not reads)
        tokens = _own_tokens(vlm)
        return whole if tokens is None else replace(whole, **tokens, splits=True)
    if stored.get("model_type") in native_types():
        _refuse_tower(model, tower)
        return _native(model, stored["model_type"])
    config = llm_config(Llm(kind="causal", name=model))
    if getattr(config, "vision_config", None) is not None:
        raise ModelError(
            f"--model: {quoted(model)} is a vision-language model of the kind {config.model_type}, "
            f"which can't be taken; {family_names()} can, and others of which transformers has an "
            "image-text-to-text model: name one of these, or an LLM (and --tower)"
        )
    seen = usual_tower(tower, language_width(config) >= LARGE_WIDTH)
    return named_llm(model, config, seen)


def named_llm(model: str, config: Any, tower: Tower) -> ModelChoice:
    """The LLM that a user names, of this config, under a tower."""
    width = language_width(config)
    if config.is_encoder_decoder:
        return under_tower(model, "seq2seq", "flan", tower, width, "named by --model")
    template = causal_template(model)
    return under_tower(model, "causal", template, tower, width, "named by --model")


def _native(name: str, model_type: str) -> ModelChoice:
    """A model of transformers that is called as it is, its LLM tuned by LoRA."""
    draft = Draft()
    draft.set("model.kind", "native", NATIVE_REASON)
    draft.set("model.pretrained", name, "named by --model")
    if takes_pixel_bounds(model_type):
        reason = f"larger images are shrunk to these, so that each takes up to {MOST_TOKENS} tokens"
        draft.set("model.max_pixels", MOST_PIXELS, reason)
    draft.set("data.template", OWN_TEMPLATE, OWN_REASON)
    _frozen_tower(draft)
    draft.rule("the connector has learned already", match="connector.*", how="frozen")
    _lora(draft, 32, "all-linear", 2.0e-4)
    return ModelChoice(
        name,
        "large",
        True,
        draft,
        MOST_TOKENS,
        splits=True,
        shares=model_type in JOINED_TYPES,
        native_type=model_type,
    )


def whole_template(vlm: Vlm) -> str:
    """The chat format of a vision-language model, by its LLM or its tokenizer's control tokens."""
    by_language = vlm.family.by_language
    language = vlm.config.get("text_config", {}).get("model_type")
    if language in by_language:
        return by_language[language]
    *others, last = vlm.family.templates
    if not others:
        return last
    vocabulary = load_tokenizer(Llm(kind="causal", name=vlm.name)).get_vocab()
    for name in others:
        if vocabulary.keys() >= set(load_template(name).control_tokens):
            return name
    return last


def _own_tokens(vlm: Vlm) -> dict[str, int] | None:
    """The fields of `ModelChoice` for the tokens of an image that a model cuts or does not square.

    None for a model that makes images square.
    """
    section, projector, _ = vlm.family.parts(vlm)
    split = split_of(section.split)
    if split is None and not section.row_ends:
        return None
    tower = meta_tower(section)
    assert isinstance(tower, VisionTower)
    tokens, width = tower.measure()
    with torch.device("meta"):
        connector = build_connector(projector, width, width)
    slots = connector.tokens(tokens)
    if split is None:
        # Each row of the largest image has an end.
        return {"image_tokens": slots + math.isqrt(slots)}
    frame = slots + MARKERS
    if isinstance(split, LlavaOnevisionFrames):
        return {"image_tokens": split.most_joined(tower.image_size) * frame, "among_tokens": frame}
    return {"image_tokens": split.most(tower.image_size) * frame}


def language_width(config: Any) -> int:
    """The width of an LLM's embeddings, by its config."""
    return getattr(config, "hidden_size", None) or getattr(config, "d_model", 0)


def causal_template(name: str) -> str:
    """The chat format of a decoder, by the control tokens that its tokenizer has."""
    tokenizer = load_tokenizer(Llm(kind="causal", name=name))
    vocabulary = tokenizer.get_vocab()
    if "<|start_header_id|>" in vocabulary:
        return "llama3"
    if "<|im_start|>" in vocabulary:
        return "chatml"
    return "vicuna" if tokenizer.bos_token_id is not None else "flan"


# --- an LLM under a tower -------------------------------------------------------------------------


def _flan_t5(tower: str | None) -> ModelChoice:
    reason = "a larger model does not fit this GPU"
    return under_tower(FLAN_T5, "seq2seq", "flan", usual_tower(tower, True), LARGE_WIDTH, reason)


def _small(name: str, tower: str | None, reason: str) -> ModelChoice:
    return under_tower(name, "causal", "chatml", usual_tower(tower, False), 0, reason)


@dataclass(frozen=True)
class Tower:
    """A frozen tower: a recipe's section, why it is that, and the most tokens of an image."""

    section: dict[str, Any]
    reason: str
    tokens: int


def usual_tower(name: str | None, large: bool) -> Tower:
    """The tower of images that a user names, or the usual one for an LLM of this size."""
    section, reason = tower_section(name, large)
    tokens = MOST_TOKENS if name is not None else LARGE_TOKENS if large else SMALL_TOKENS
    return Tower(section, reason, tokens)


def under_tower(
    name: str,
    kind: Literal["causal", "seq2seq"],
    template: str,
    tower: Tower,
    width: int,
    reason: str,
) -> ModelChoice:
    """An LLM with a new connector from a frozen tower, tuned by LoRA."""
    large = width >= LARGE_WIDTH
    draft = Draft()
    draft.set("model.tower", tower.section, tower.reason)
    draft.set(
        "model.connector",
        {"kind": "mlp", "depth": 2},
        "two layers from the tower's width to the LLM's, as in LLaVA-1.5",
    )
    draft.set("model.llm", {"kind": kind, "name": name}, reason)
    draft.set("data.template", template, "the chat format of this language model")
    _frozen_tower(draft)
    draft.rule(
        "the connector starts from random weights, so it learns fast",
        match="connector.*",
        how="full",
        learning_rate=1.0e-3 if large else 1.5e-3,
    )
    targets = "all-linear" if kind == "causal" else ["q", "v"]
    _lora(draft, 16, targets, 2.0e-4 if large else 6.0e-4)
    size: Size = "large" if large else "small"
    return ModelChoice(name, size, kind == "causal", draft, tower.tokens)


def _frozen_tower(draft: Draft) -> None:
    heard = draft.values.get("model.tower", {}).get("kind") == "audio"
    known = "speech" if heard else "images"
    draft.rule(f"the tower knows {known} already", match="tower.*", how="frozen")


def _lora(draft: Draft, r: int, target_modules: str | list[str], rate: float) -> None:
    draft.rule(
        "LoRA keeps what the LLM knows, and needs memory for a hundredth of the weights",
        match="llm.*",
        how="lora",
        r=r,
        lora_alpha=2 * r,
        target_modules=target_modules,
        learning_rate=rate,
    )


def tower_section(tower: str | None, large: bool) -> tuple[dict[str, Any], str]:
    """The tower that a user names, or the usual one for an LLM of this size; and the reason."""
    if tower is not None:
        name, colon, tag = tower.partition(":")
        if colon and not is_folder(tower):
            return {"kind": "open_clip", "name": name, "pretrained": tag}, "named by --tower"
        return {"kind": "transformers", "name": tower, "layer": -2}, "named by --tower"
    if large:
        reason = "the tower of LLaVA-1.5: 576 tokens an image, from the last layer but one"
        return {"kind": "transformers", "name": CLIP_LARGE, "layer": -2}, reason
    if is_file(LOCAL_TOWER):
        section = {
            "kind": "timm",
            "name": "efficientnet_lite0",
            "pretrained": LOCAL_TOWER,
            "stages": [2, 3],
            "image_size": 112,
            "grid": 7,
        }
        return section, f"{LOCAL_TOWER} is in this folder; 7 x 7 tokens an image, fast on a CPU"
    reason = "a small CLIP: 7 x 7 tokens an image"
    return {"kind": "transformers", "name": CLIP_SMALL, "layer": -2}, reason


# --- random weights -------------------------------------------------------------------------------


def _scratch(facts: Facts) -> ModelChoice:
    """A small CLIP tower and a small T5 from random weights, as `recipes/demo.yaml` has them."""
    side = SCRATCH_SIDES[min(facts.width, facts.height) > 1.5 * SCRATCH_SIDES[0]]
    draft = Draft()
    draft.set(
        "model.tower",
        {"kind": "open_clip", "config": {"layers": [1, 1, 1, 1], "width": 16, "image_size": side}},
        f"{NOTHING_PRETRAINED}, and for simple images. Name pretrained ones with --model and "
        "--tower for more.",
    )
    set_scratch_llm(draft)
    return ModelChoice("a small T5 from random weights", "scratch", False, draft, SCRATCH_TOKENS)


def set_scratch_llm(draft: Draft) -> None:
    """Sets a connector and a small T5 from random weights."""
    draft.set("model.connector", {"kind": "mlp", "depth": 2, "norm": True})
    draft.set(
        "model.llm",
        {
            "kind": "seq2seq",
            "scratch": {
                "model_type": "t5",
                "vocab_size": 512,
                "config": {
                    "d_model": 64,
                    "d_kv": 16,
                    "d_ff": 256,
                    "num_layers": 2,
                    "num_decoder_layers": 1,
                    "num_heads": 4,
                    "dropout_rate": 0.0,
                    "feed_forward_proj": "gated-gelu",
                },
            },
        },
        "a T5 that two cores train in minutes; its tokenizer is trained on the rows' text",
    )
    draft.set("data.template", "flan", "no roles: questions go in, answers come out")
    draft.rule("nothing is pretrained, so everything trains", match="*", how="full")


# --- changes of a choice --------------------------------------------------------------------------


def _packed(choice: ModelChoice) -> ModelChoice:
    """The choice with the LLM in 4 bit: QLoRA."""
    draft = choice.draft.copy()
    reason = "in 16 bit it does not fit this GPU, so its frozen weights are packed in 4 bit (QLoRA)"
    llm = {**draft.values.get("model.llm", {}), "quantize": "nf4"}
    draft.set("model.llm", llm, reason)
    return replace(choice, name=f"{choice.name} in 4 bit", draft=draft)
