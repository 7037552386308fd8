"""Checks for settings of a recipe that contradict each other though each is valid by itself."""

from __future__ import annotations

import difflib
from typing import Any

from vlm_tune.config.boxes import Boxes
from vlm_tune.config.data_rules import data_contradictions
from vlm_tune.config.faults import Fault, broken
from vlm_tune.config.mixture_rules import lone_objective_contradictions, mixture_contradictions
from vlm_tune.config.model import ModelSection
from vlm_tune.config.native_rules import native_contradictions
from vlm_tune.config.objective_rules import objective_contradictions
from vlm_tune.config.objectives import LEAST_IMAGES
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.sharing_rules import sharing_contradictions
from vlm_tune.config.train import FUNCTION, LOSS, METRICS
from vlm_tune.config.tune import adds_dora, adds_virtual_tokens
from vlm_tune.config.tune_rules import tune_contradictions
from vlm_tune.config.yaml_source import Path, dotted_name, value_at
from vlm_tune.errors import Problem, RecipeError
from vlm_tune.quoting import quoted

LENGTHS = ("epochs", "steps")
"""Keys of a train section that set how long a stage trains; exactly one is given."""


def contradictions(raw: Any) -> list[Fault]:
    """Returns faults between keys that are each valid alone, as (path, message).

    It works on raw values, so it also runs on a recipe with schema errors. Of several objectives
    each has to suit the other keys.
    """
    objectives = value_at(raw, "objective")
    if not isinstance(objectives, list):
        return [*_contradictions(raw), *lone_objective_contradictions(raw)]
    faults = mixture_contradictions(raw, objectives)
    for place, objective in enumerate(objectives):
        faults += [
            (("objective", place, *path[1:]) if path[:1] == ("objective",) else path, message)
            for path, message in _contradictions({**raw, "objective": objective})
        ]
    return list(dict.fromkeys(faults))


def _contradictions(raw: Any) -> list[Fault]:
    """Returns the faults of a recipe of one objective."""
    return [
        *_length_contradictions(raw),
        *_llm_contradictions(raw),
        *_connector_contradictions(raw),
        *_tower_contradictions(raw),
        *_boxes_contradictions(raw),
        *data_contradictions(raw),
        *tune_contradictions(raw),
        *sharing_contradictions(raw),
        *_engine_contradictions(raw),
        *_metric_contradictions(raw),
        *_noise_contradictions(raw),
        *objective_contradictions(raw),
        *native_contradictions(raw),
    ]


def _length_contradictions(raw: Any) -> list[Fault]:
    """Returns the fault of a stage whose length is not given, or given twice."""
    epochs = value_at(raw, "train", "epochs")
    steps = value_at(raw, "train", "steps")
    return broken(
        (
            isinstance(value_at(raw, "train"), dict) and (epochs is None) == (steps is None),
            ("train",) if steps is None else ("train", "steps"),
            "give exactly one of train.epochs and train.steps",
        )
    )


def _llm_contradictions(raw: Any) -> list[Fault]:
    """Returns faults of an LLM that the recipe describes itself."""
    llm = value_at(raw, "model", "llm")
    if not isinstance(llm, dict) or value_at(raw, "model", "pretrained") is not None:
        return []
    unnamed = llm.get("name") is None
    scratch = llm.get("scratch") is not None
    return broken(
        (
            unnamed != scratch,
            ("model", "llm"),
            "give exactly one of model.llm.name and model.llm.scratch",
        ),
        (
            llm.get("gguf_file") is not None and unnamed,
            ("model", "llm", "gguf_file"),
            "model.llm.gguf_file needs model.llm.name, the folder it is in",
        ),
        (
            llm.get("quantize") is not None and scratch,
            ("model", "llm", "quantize"),
            "a scratch LLM has nothing to quantise: its random weights must train in full",
        ),
        (
            llm.get("kind") == "seq2seq" and value_at(raw, "train", "precision") == "fp16",
            ("train", "precision"),
            "T5's activations overflow in fp16; use bf16 or fp32",
        ),
        (
            llm.get("kind") == "seq2seq" and llm.get("bidirectional") is not None,
            ("model", "llm", "bidirectional"),
            "model.llm.bidirectional is for decoders: in an encoder all tokens see each other",
        ),
    )


def _connector_contradictions(raw: Any) -> list[Fault]:
    """Returns faults of a connector that reads instructions."""
    connector = value_at(raw, "model", "connector")
    if not isinstance(connector, dict):
        return []
    tokenizer = connector.get("tokenizer")
    return broken(
        (
            (tokenizer is None) != (connector.get("vocab_size") is None),
            ("model", "connector"),
            "give model.connector.tokenizer and model.connector.vocab_size together, or neither",
        ),
        (
            tokenizer is not None and connector.get("text") is not True,
            ("model", "connector", "tokenizer"),
            "a Q-Former reads no instruction without model.connector.text: true",
        ),
    )


JOINING = ("llava_next", "llava_onevision")
"""Kinds of `model.tower.split` that join tiles to one picture."""


def _tower_contradictions(raw: Any) -> list[Fault]:
    """Returns faults of the tower, or of the towers of a pair."""
    tower = value_at(raw, "model", "tower")
    connector = value_at(raw, "model", "connector")
    split = value_at(tower, "split")
    joins = value_at(split, "kind") in JOINING
    cuts = broken(
        (
            split and value_at(tower, "tiles"),
            ("model", "tower", "tiles"),
            "give at most one of model.tower.tiles and model.tower.split",
        ),
        (
            split
            and value_at(connector, "kind") == "cross_attention"
            and value_at(connector, "images") != "all",
            ("model", "connector", "images"),
            "the markers of model.tower.split stand between the tiles of an image, and text after "
            "them would see the last tile alone: set images: all",
        ),
        (
            joins != (value_at(connector, "newline") is True),
            ("model", "connector", "newline"),
            "the rows of the joined tiles of model.tower.split: {kind: llava_next} and {kind: "
            "llava_onevision} end with a learned token, those of no other image do: give both, or "
            "neither",
        ),
        (
            value_at(connector, "base", "newline"),
            ("model", "connector", "base", "newline"),
            "a base of another connector joins no tiles",
        ),
        (
            joins and value_at(tower, "class_token"),
            ("model", "tower", "class_token"),
            "tiles are joined by their patches: leave the class token out",
        ),
    )
    pair = value_at(tower, "towers")
    towers: list[tuple[Path, Any]] = [(("model", "tower"), tower)]
    towers += [
        (("model", "tower", "towers", place), part)
        for place, part in enumerate(pair if isinstance(pair, list) else [])
    ]
    return [
        *cuts,
        *_audio_contradictions(raw),
        *(
            (path, f"give exactly one of {dotted_name(path)}.name and {dotted_name(path)}.config")
            for path, part in towers
            if isinstance(part, dict)
            and part.get("kind") in ("open_clip", "audio")
            and (part.get("name") is None) == (part.get("config") is None)
        ),
    ]


def _audio_contradictions(raw: Any) -> list[Fault]:
    """Returns faults of what goes with a tower of audio."""
    hears = value_at(raw, "model", "tower", "kind") == "audio"
    connector = value_at(raw, "model", "connector")
    projects = value_at(connector, "base") or connector
    return broken(
        (
            hears and value_at(projects, "kind") in ("pixel_shuffle", "avg_pool"),
            ("model", "connector"),
            "this connector joins the cells of an image's grid, and audio has none; "
            "model.tower.pool joins adjacent tokens of audio",
        ),
        (
            hears and value_at(raw, "data", "augment"),
            ("data", "augment"),
            "augmentation is for images, and the tower takes audio",
        ),
    )


def _boxes_contradictions(raw: Any) -> list[Fault]:
    """Returns options of a convention of boxes that its unit does not have."""
    boxes = value_at(raw, "model", "boxes")
    if not isinstance(boxes, dict):
        return []
    unit = boxes.get("unit")
    return broken(
        (
            unit == "loc" and boxes.get("style") == "parentheses",
            ("model", "boxes", "style"),
            "the tokens of unit: loc stand in neither brackets nor parentheses; leave style out",
        ),
        (
            unit != "norm1" and boxes.get("decimals") not in (None, Boxes().decimals),
            ("model", "boxes", "decimals"),
            "only numbers of unit: norm1 have decimals",
        ),
    )


def _engine_contradictions(raw: Any) -> list[Fault]:
    """Returns settings that the engine can't train, with the reason."""
    engine = raw.get("engine") if isinstance(raw, dict) else None
    if not isinstance(engine, dict) or engine.get("kind") not in ("deepspeed", "fsdp"):
        return []
    deepspeed = engine["kind"] == "deepspeed"
    stage = engine.get("stage", 2)
    zero3 = deepspeed and stage == 3
    name = f"ZeRO-{stage}" if deepspeed else "fsdp"
    offload = engine.get("offload")
    offloaded = offload if deepspeed and isinstance(offload, list) else []
    virtual = adds_virtual_tokens(raw)
    return broken(
        (
            (zero3 or not deepspeed) and value_at(raw, "model", "llm", "quantize") == "int8",
            ("model", "llm", "quantize"),
            f"{name} shards weights, and bitsandbytes has an int8 weight in a state of its "
            "layer, where no engine gathers it; use nf4 or fp4, or deepspeed with stage 2, or ddp",
        ),
        (
            (zero3 or not deepspeed)
            and value_at(raw, "model", "llm", "quantize")
            and adds_dora(raw),
            ("engine",),
            f"{name} shards packed weights, whose norm DoRA computes from a whole one; use "
            "variant: lora or rslora, deepspeed with stage 2, or ddp",
        ),
        (
            value_at(raw, "train", "precision") == "fp16",
            ("train", "precision"),
            f"fp16 needs loss scaling, which engine {name} does not do; use bf16 or fp32",
        ),
        (
            zero3 and virtual,
            ("engine", "stage"),
            "ZeRO-3 gathers weights as their modules run, and virtual tokens are no module that "
            "runs; use stage 2 or fsdp",
        ),
        (
            "parameters" in offloaded and not zero3,
            ("engine", "offload"),
            "only stage 3 shards weights, so only there they can be offloaded",
        ),
        (
            "optimizer" in offloaded and stage == 0,
            ("engine", "offload"),
            "stage 0 shards nothing, so nothing can be offloaded; use stage 1, 2 or 3",
        ),
    )


def _noise_contradictions(raw: Any) -> list[Fault]:
    """Returns the fault of noise on images without others to take its directions from."""
    batch = value_at(raw, "train", "batch_size")
    return broken(
        (
            value_at(raw, "objective", "image_noise")
            and isinstance(batch, int)
            and batch < LEAST_IMAGES,
            ("objective", "image_noise"),
            f"image_noise compares the images of a batch, so it needs train.batch_size of "
            f"{LEAST_IMAGES} or more",
        )
    )


def _metric_contradictions(raw: Any) -> list[Fault]:
    """Returns faults of the metrics' names; functions are imported later."""
    names = value_at(raw, "evaluate", "metrics")
    rules = []
    for index, name in enumerate(names if isinstance(names, list) else []):
        unknown = isinstance(name, str) and name not in METRICS and not FUNCTION.fullmatch(name)
        near = difflib.get_close_matches(name, METRICS, n=1) if unknown else []
        hint = f"; did you mean {near[0]}?" if near else f": {', '.join(METRICS)}"
        place = ("evaluate", "metrics", index)
        message = f"{quoted(name)} is no metric, and no my_module:function{hint}"
        rules += [
            (unknown, place, message),
            (not unknown and name in names[:index], place, f"{quoted(name)} comes twice"),
        ]
    best = value_at(raw, "evaluate", "best")
    always = ("exact_match", LOSS)
    scored = [*names, LOSS] if isinstance(names, list) else always
    rules.append(
        (
            isinstance(best, str) and best not in scored,
            ("evaluate", "best"),
            f"{quoted(best)} is not one of {', '.join(map(str, scored))}: name it in "
            "evaluate.metrics",
        )
    )
    return broken(*rules)


def check_parts(recipe: Recipe, model: ModelSection) -> None:
    """Raises `RecipeError` where a recipe contradicts the parts of its `model.pretrained`."""
    problems = []
    for _, stage in recipe.resolved_stages():
        raw = {**stage.model_dump(), "model": model.model_dump()}
        problems += [
            Problem(
                dotted_name(path),
                f"{message} (model.pretrained: {model.llm.name} is {model.llm.kind} with a "
                f"{model.connector.kind})",
            )
            for path, message in contradictions(raw)
        ]
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
