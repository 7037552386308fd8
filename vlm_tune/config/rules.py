"""Checks for settings of a recipe that contradict each other though each is valid by itself."""

from __future__ import annotations

import fnmatch
import typing
from collections.abc import Sequence
from typing import Any

from vlm_tune.config.model import ModelSection
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.tune import TuneRule
from vlm_tune.config.yaml_source import Path, dotted_name, value_at
from vlm_tune.errors import Problem, RecipeError
from vlm_tune.quoting import quoted

BLOCK_WEIGHTS = (
    "llm.model.layers.0.self_attn.q_proj.weight",
    "llm.model.decoder.layers.0.self_attn.q_proj.weight",
    "llm.transformer.h.0.attn.c_attn.weight",
    "llm.encoder.block.0.layer.0.SelfAttention.q.weight",
)
"""Names of a linear layer of a block in different families of LLMs."""
LORA = ("lora",)
RULE_KEYS = {
    "r": LORA,
    "lora_alpha": LORA,
    "lora_dropout": LORA,
    "target_modules": LORA,
    "variant": LORA,
    "init": LORA,
    "lora_plus_ratio": LORA,
    "layers": ("last_layers",),
    "layer_decay": ("full", "last_layers"),
    "tokens": ("prompt", "prefix"),
}
"""Keys of a tuning rule that belong to some kinds of tuning only."""
LENGTHS = ("epochs", "steps")
"""Keys of a train section that set how long a stage trains; exactly one is given."""


def contradictions(raw: Any) -> list[tuple[Path, str]]:
    """Returns faults between keys that are each valid alone, as (path, message).

    It works on raw values, so it also runs on a recipe with schema errors.
    """
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
    faults += _data_contradictions(raw)
    faults += _tune_contradictions(raw)
    faults += _engine_contradictions(raw)
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
            f"{name} shares out a weight's numbers, and packed 4- and 8-bit weights are none; use "
            f"deepspeed with stage 2, or ddp"
        )
        faults.append((("model", "llm", "quantize"), message))
    if value_at(raw, "train", "precision") == "fp16":
        faults.append(
            (
                ("train", "precision"),
                f"fp16 needs its loss scaled, which engine {name} is not told of; use bf16 or fp32",
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
                    "only stage 3 shares out weights, so only there they can lie in the CPU's "
                    "memory",
                )
            )
        if "optimizer" in offload and stage == 0:
            faults.append(
                (
                    ("engine", "offload"),
                    "stage 0 shares out nothing, so nothing can be offloaded; use stage 1, 2 or 3",
                )
            )
    return faults


def _data_contradictions(raw: Any) -> list[tuple[Path, str]]:
    faults: list[tuple[Path, str]] = []
    data = value_at(raw, "data") if isinstance(value_at(raw, "data"), dict) else {}
    tiles = value_at(raw, "model", "tower", "tiles")
    contrastive = value_at(raw, "objective", "kind") == "contrastive"
    augment = data.get("augment")
    if tiles and isinstance(augment, dict):
        still = {
            "crop": 1,
            "flip": 0,
            "transpose": 0,
            "shift": 0,
            "rotation": 0,
            "rand_augment": None,
        }
        moved = [key for key, value in still.items() if augment.get(key) not in (None, value)]
        message = (
            "tiles are cut first, so each would move by itself; with model.tower.tiles images take "
            "colour, hue and noise"
        )
        faults += [(("data", "augment", key), message) for key in moved]
    reads = (
        value_at(raw, "model", "connector", "text") is True
        or value_at(raw, "model", "connector", "kind") == "fusion"
    )
    if (
        data.get("group") == "image"
        and not contrastive
        and reads
        and value_at(raw, "model", "llm", "kind") == "causal"
    ):
        faults.append(
            (
                ("data", "group"),
                "a text-conditioned connector reads an image once a question, so it needs "
                "data.group: none",
            )
        )
    if contrastive:
        if data.get("group") in (None, "none"):
            faults.append(
                (
                    ("data", "group"),
                    "a contrastive objective compares images, so it needs data.group: image",
                )
            )
        if tiles:
            faults.append(
                (
                    ("model", "tower", "tiles"),
                    "a contrastive objective takes one image a row, so no tiles",
                )
            )
        if data.get("packing"):
            faults.append(
                (
                    ("data", "packing"),
                    "a contrastive objective takes one image a row, so no packing",
                )
            )
    for part in ("train", "validation", "test"):
        for index, source in enumerate(data[part] if isinstance(data.get(part), list) else []):
            share_keys = [
                key
                for key in ("weight", "count")
                if isinstance(source, dict) and source.get(key) is not None
            ]
            if share_keys and part != "train":
                faults.append(
                    (
                        ("data", part, index, share_keys[0]),
                        f"{share_keys[0]} shares out an epoch of training; {part} reads every row",
                    )
                )
            elif len(share_keys) == 2:
                faults.append(
                    (("data", part, index, "count"), "give at most one of weight and count")
                )
    trained = data["train"] if isinstance(data.get("train"), list) else []
    weighted = any(isinstance(source, dict) and source.get("weight") for source in trained)
    if data.get("epoch_size") is not None and not weighted:
        faults.append(
            (
                ("data", "epoch_size"),
                "epoch_size is shared out by the sources' weights, and none has one",
            )
        )
    shares = [value_at(data, "split", part) for part in ("validation", "test")]
    if sum(share for share in shares if isinstance(share, int | float)) >= 1:
        faults.append((("data", "split"), "validation and test leave nothing to train on"))
    least = value_at(data, "clean", "min_chars")
    most = value_at(data, "clean", "max_chars")
    if isinstance(least, int) and isinstance(most, int) and least > most:
        faults.append(
            (("data", "clean", "max_chars"), f"max_chars {most} is under min_chars {least}")
        )
    if data.get("own_shards") is True and data.get("streaming") is not True:
        faults.append(
            (
                ("data", "own_shards"),
                "own_shards is of data.streaming: true; prepared rows are read by number",
            )
        )
    return faults + (_streaming_contradictions(raw, data) if data.get("streaming") is True else [])


def _streaming_contradictions(raw: Any, data: Any) -> list[tuple[Path, str]]:
    """Returns settings that need rows in advance, which a stream does not have."""
    faults: list[tuple[Path, str]] = []
    if value_at(raw, "train", "steps") is None:
        faults.append((("train",), "a stream has no epochs: give train.steps"))
    if data.get("group") == "image":
        faults.append(
            (
                ("data", "group"),
                "a stream can't bring the rows of an image together; prepare (streaming: false) or "
                "group: none",
            )
        )
    cleaned = data.get("clean") if isinstance(data.get("clean"), dict) else {}
    need_all_rows = {
        "split": data.get("split"),
        "clean": any(value not in (None, [], "keep") for value in cleaned.values()),
    }
    for key, setting in {**need_all_rows, "epoch_size": data.get("epoch_size")}.items():
        if setting:
            faults.append(
                (("data", key), f"{key} needs all rows at hand; prepare them (streaming: false)")
            )
    for key in ("batch_tokens", "loader_workers"):
        if value_at(raw, "train", key):
            faults.append((("train", key), f"{key} needs prepared rows (data.streaming: false)"))
    return faults


def _tune_contradictions(raw: Any) -> list[tuple[Path, str]]:
    faults: list[tuple[Path, str]] = []
    rules = raw.get("tune") if isinstance(raw, dict) else None
    rules = (
        [rule if isinstance(rule, dict) else {} for rule in rules]
        if isinstance(rules, list)
        else []
    )
    earlier_matches: list[str] = []
    for index, rule in enumerate(rules):
        match = rule.get("match")
        how = rule.get("how")
        faults += [(("tune", index, key), message) for key, message in _rule_contradictions(rule)]
        if how == "frozen" and rule.get("learning_rate") is not None:
            faults.append((("tune", index, "learning_rate"), "a frozen part has no learning rate"))
        if how == "lora" and isinstance(match, str) and match.split(".")[0] not in ("llm", "tower"):
            faults.append(
                (
                    ("tune", index, "match"),
                    "LoRA goes on the llm or the tower; train the connector with how: full",
                )
            )
        if how in ("prompt", "prefix"):
            faults += [
                (("tune", index, key), message)
                for key, message in _prompt_contradictions(raw, rule)
            ]
        if isinstance(match, str):
            covered = [
                earlier for earlier in earlier_matches if fnmatch.fnmatchcase(match, earlier)
            ]
            if covered:
                faults.append(
                    (
                        ("tune", index, "match"),
                        f"never reached: {quoted(covered[0])} above matches first",
                    )
                )
            earlier_matches.append(match)
        if (
            how in ("full", "last_layers")
            and value_at(raw, "model", "llm", "quantize")
            and _reaches_blocks(rules, index)
        ):
            message = (
                f"{quoted(match)} reaches the llm's layers, and quantised weights can't be "
                "trained; use how: lora for them, or drop model.llm.quantize (its embedding and "
                "head are not quantised: llm.model.embed_tokens.*, llm.lm_head.*)"
            )
            faults.append((("tune", index, "how"), message))
        if (
            rule.get("init") == "pissa"
            and value_at(raw, "model", "llm", "quantize")
            and isinstance(match, str)
            and match.startswith("llm")
        ):
            message = (
                "PiSSA takes the singular vectors of 16-bit weights; use init: default, or drop "
                "model.llm.quantize"
            )
            faults.append((("tune", index, "init"), message))
    if rules and all(rule.get("how") == "frozen" for rule in rules):
        faults.append((("tune",), "every rule is frozen, nothing would train"))
    return faults


def _reaches_blocks(rules: Sequence[Any], index: int) -> bool:
    """Whether a rule is the first to match the linear layers of the blocks of any LLM family."""
    matches = [str(rule.get("match")) for rule in rules]
    return any(
        next((n for n, match in enumerate(matches) if fnmatch.fnmatchcase(name, match)), None)
        == index
        for name in BLOCK_WEIGHTS
    )


def _prompt_contradictions(raw: Any, rule: Any) -> list[tuple[str, str]]:
    """Returns faults of virtual tokens before the LLM's input, as (key of the rule, message)."""
    faults = []
    how = rule["how"]
    seq2seq = value_at(raw, "model", "llm", "kind") == "seq2seq"
    if isinstance(rule.get("match"), str) and rule["match"].split(".")[0] != "llm":
        faults.append(
            (
                "match",
                f"virtual tokens stand before the llm's input, so how: {how} takes a rule for "
                f"llm.*",
            )
        )
    if value_at(raw, "model", "connector", "kind") == "cross_attention":
        faults.append(
            (
                "how",
                f"how: {how} puts tokens before the text that the cross_attention connector does "
                f"not know; use another",
            )
        )
    if how == "prefix" and value_at(raw, "train", "gradient_checkpointing") is True:
        faults.append(
            (
                "how",
                "transformers drops a prefix of keys and values where it checkpoints gradients; "
                "drop one of them",
            )
        )
    if seq2seq and value_at(raw, "data", "packing") is True:
        faults.append(
            (
                "how",
                f"how: {how} puts tokens before one sample of an encoder-decoder: it takes no "
                f"packed rows (data.packing)",
            )
        )
    return faults


def _rule_contradictions(rule: Any) -> list[tuple[str, str]]:
    """Returns faults of one rule: keys that don't belong to its `how`, or not to each other."""
    how = rule.get("how")
    known = typing.get_args(TuneRule.model_fields["how"].annotation)
    faults = [
        (key, f"{key} belongs to how: {' or '.join(owners)}, this rule is how: {how}")
        for key, owners in RULE_KEYS.items()
        if rule.get(key) is not None and how in known and how not in owners
    ]
    if how == "last_layers" and rule.get("layers") is None:
        faults.append(("how", "how: last_layers needs layers, the number of blocks that train"))
    if rule.get("variant") == "dora" and rule.get("init") == "pissa":
        faults.append(
            (
                "init",
                "PiSSA over DoRA can't be saved as an adapter of the unchanged base; drop one of "
                "them",
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
