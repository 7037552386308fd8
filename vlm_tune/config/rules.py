"""Checks for settings of a recipe that contradict each other though each is valid by itself."""

from __future__ import annotations

from typing import Any

from vlm_tune.config.data_rules import data_contradictions
from vlm_tune.config.model import ModelSection
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.tune_rules import tune_contradictions
from vlm_tune.config.yaml_source import Path, dotted_name, value_at
from vlm_tune.errors import Problem, RecipeError

LENGTHS = ("epochs", "steps")
"""Keys of a train section that set how long a stage trains; exactly one is given."""


def contradictions(raw: Any) -> list[tuple[Path, str]]:
    """Returns faults between keys that are each valid alone, as (path, message).

    It works on raw values, so it also runs on a recipe with schema errors.
    """
    return [
        *_length_contradictions(raw),
        *_llm_contradictions(raw),
        *_connector_contradictions(raw),
        *_tower_contradictions(raw),
        *data_contradictions(raw),
        *tune_contradictions(raw),
        *_engine_contradictions(raw),
    ]


def _length_contradictions(raw: Any) -> list[tuple[Path, str]]:
    """Returns the fault of a stage whose length is not given, or given twice."""
    faults: list[tuple[Path, str]] = []
    epochs = value_at(raw, "train", "epochs")
    steps = value_at(raw, "train", "steps")
    if isinstance(value_at(raw, "train"), dict) and (epochs is None) == (steps is None):
        faults.append(
            (
                ("train",) if steps is None else ("train", "steps"),
                "give exactly one of train.epochs and train.steps",
            )
        )
    return faults


def _llm_contradictions(raw: Any) -> list[tuple[Path, str]]:
    """Returns faults of an LLM that the recipe describes itself."""
    faults: list[tuple[Path, str]] = []
    llm = value_at(raw, "model", "llm")
    if isinstance(llm, dict) and value_at(raw, "model", "pretrained") is None:
        if (llm.get("name") is None) == (llm.get("scratch") is None):
            faults.append(
                (("model", "llm"), "give exactly one of model.llm.name and model.llm.scratch")
            )
        if llm.get("gguf_file") is not None and llm.get("name") is None:
            faults.append(
                (
                    ("model", "llm", "gguf_file"),
                    "model.llm.gguf_file needs model.llm.name, the folder it is in",
                )
            )
        if llm.get("quantize") is not None and llm.get("scratch") is not None:
            faults.append(
                (
                    ("model", "llm", "quantize"),
                    "a scratch LLM has nothing to quantise: its random weights must train in full",
                )
            )
        if llm.get("kind") == "seq2seq" and value_at(raw, "train", "precision") == "fp16":
            faults.append(
                (("train", "precision"), "T5's activations overflow in fp16; use bf16 or fp32")
            )
    return faults


def _connector_contradictions(raw: Any) -> list[tuple[Path, str]]:
    """Returns faults of a connector that reads instructions."""
    faults: list[tuple[Path, str]] = []
    connector = value_at(raw, "model", "connector")
    if isinstance(connector, dict) and (connector.get("tokenizer") is None) != (
        connector.get("vocab_size") is None
    ):
        faults.append(
            (
                ("model", "connector"),
                "give model.connector.tokenizer and model.connector.vocab_size together, or "
                "neither",
            )
        )
    if value_at(connector, "tokenizer") is not None and connector.get("text") is not True:
        faults.append(
            (
                ("model", "connector", "tokenizer"),
                "a Q-Former reads no instruction without model.connector.text: true",
            )
        )
    return faults


def _tower_contradictions(raw: Any) -> list[tuple[Path, str]]:
    """Returns faults of the tower, or of the towers of a pair."""
    faults: list[tuple[Path, str]] = []
    tower = value_at(raw, "model", "tower")
    pair = value_at(tower, "towers")
    towers: list[tuple[Path, Any]] = [(("model", "tower"), tower)]
    towers += [
        (("model", "tower", "towers", place), part)
        for place, part in enumerate(pair if isinstance(pair, list) else [])
    ]
    for path, part in towers:
        if (
            isinstance(part, dict)
            and part.get("kind") == "open_clip"
            and (part.get("name") is None) == (part.get("config") is None)
        ):
            faults.append(
                (
                    path,
                    f"give exactly one of {dotted_name(path)}.name and {dotted_name(path)}.config",
                )
            )
    return faults


def _engine_contradictions(raw: Any) -> list[tuple[Path, str]]:
    """Returns settings that the engine can't train, with the reason."""
    faults: list[tuple[Path, str]] = []
    engine = raw.get("engine") if isinstance(raw, dict) else None
    if not isinstance(engine, dict) or engine.get("kind") not in ("deepspeed", "fsdp"):
        return faults
    stage = engine.get("stage", 2)
    offload = engine.get("offload")
    zero3 = engine["kind"] == "deepspeed" and stage == 3
    name = "fsdp" if engine["kind"] == "fsdp" else f"ZeRO-{stage}"
    if (zero3 or engine["kind"] == "fsdp") and value_at(raw, "model", "llm", "quantize"):
        message = (
            f"{name} shards weights, and packed 4- and 8-bit weights can't be sharded; use "
            f"deepspeed with stage 2, or ddp"
        )
        faults.append((("model", "llm", "quantize"), message))
    if value_at(raw, "train", "precision") == "fp16":
        faults.append(
            (
                ("train", "precision"),
                f"fp16 needs loss scaling, which engine {name} does not do; use bf16 or fp32",
            )
        )
    if zero3 and any(
        isinstance(rule, dict) and rule.get("how") in ("prompt", "prefix")
        for rule in raw.get("tune") or []
    ):
        message = (
            "ZeRO-3 gathers weights as their modules run, and virtual tokens are no module that "
            "runs; use stage 2 or fsdp"
        )
        faults.append((("engine", "stage"), message))
    if engine["kind"] == "deepspeed" and isinstance(offload, list):
        if "parameters" in offload and not zero3:
            faults.append(
                (
                    ("engine", "offload"),
                    "only stage 3 shards weights, so only there they can be offloaded",
                )
            )
        if "optimizer" in offload and stage == 0:
            faults.append(
                (
                    ("engine", "offload"),
                    "stage 0 shards nothing, so nothing can be offloaded; use stage 1, 2 or 3",
                )
            )
    return faults


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
