"""Settings of a recipe that contradict each other, where each by itself is right."""

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
"""What families of LLMs call a linear layer of a block."""
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
"""The keys of a tuning rule that only some kinds of tuning have."""
LENGTHS = ("epochs", "steps")
"""The keys of a train section that say how long a stage trains; exactly one is given."""


def contradictions(raw: Any) -> list[tuple[Path, str]]:
    """Faults between keys that are each well-formed alone; looks at raw values, so it runs beside schema errors."""
    found: list[tuple[Path, str]] = []
    epochs = value_at(raw, "train", "epochs")
    steps = value_at(raw, "train", "steps")
    if isinstance(value_at(raw, "train"), dict) and (epochs is None) == (steps is None):
        found.append(
            (
                ("train",) if steps is None else ("train", "steps"),
                "give exactly one of train.epochs and train.steps",
            )
        )
    llm = value_at(raw, "model", "llm")
    if isinstance(llm, dict) and value_at(raw, "model", "pretrained") is None:
        if (llm.get("name") is None) == (llm.get("scratch") is None):
            found.append(
                (("model", "llm"), "give exactly one of model.llm.name and model.llm.scratch")
            )
        if llm.get("gguf_file") is not None and llm.get("name") is None:
            found.append(
                (
                    ("model", "llm", "gguf_file"),
                    "model.llm.gguf_file needs model.llm.name, the folder it is in",
                )
            )
        if llm.get("quantize") is not None and llm.get("scratch") is not None:
            found.append(
                (
                    ("model", "llm", "quantize"),
                    "a scratch LLM has nothing to quantise: its random weights must train in full",
                )
            )
        if llm.get("kind") == "seq2seq" and value_at(raw, "train", "precision") == "fp16":
            found.append(
                (("train", "precision"), "T5's activations overflow in fp16; use bf16 or fp32")
            )
    connector = value_at(raw, "model", "connector")
    if isinstance(connector, dict) and (connector.get("tokenizer") is None) != (
        connector.get("vocab_size") is None
    ):
        found.append(
            (
                ("model", "connector"),
                "give model.connector.tokenizer and model.connector.vocab_size together, or neither",
            )
        )
    if value_at(connector, "tokenizer") is not None and connector.get("text") is not True:
        found.append(
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
            found.append(
                (
                    path,
                    f"give exactly one of {dotted_name(path)}.name and {dotted_name(path)}.config",
                )
            )
    found += _data_contradictions(raw)
    found += _tune_contradictions(raw)
    found += _engine_contradictions(raw)
    return found


def _engine_contradictions(raw: Any) -> list[tuple[Path, str]]:
    """What an engine can't train, with the reason."""
    found: list[tuple[Path, str]] = []
    engine = raw.get("engine") if isinstance(raw, dict) else None
    if not isinstance(engine, dict) or engine.get("kind") not in ("deepspeed", "fsdp"):
        return found
    stage = engine.get("stage", 2)
    offload = engine.get("offload")
    zero3 = engine["kind"] == "deepspeed" and stage == 3
    name = "fsdp" if engine["kind"] == "fsdp" else f"ZeRO-{stage}"
    if (zero3 or engine["kind"] == "fsdp") and value_at(raw, "model", "llm", "quantize"):
        message = f"{name} shares out a weight's numbers, and packed 4- and 8-bit weights are none; use deepspeed with stage 2, or ddp"
        found.append((("model", "llm", "quantize"), message))
    if value_at(raw, "train", "precision") == "fp16":
        found.append(
            (
                ("train", "precision"),
                f"fp16 needs its loss scaled, which engine {name} is not told of; use bf16 or fp32",
            )
        )
    if zero3 and any(
        isinstance(rule, dict) and rule.get("how") in ("prompt", "prefix")
        for rule in raw.get("tune") or []
    ):
        message = "ZeRO-3 gathers weights as their modules run, and virtual tokens are no module that runs; use stage 2 or fsdp"
        found.append((("engine", "stage"), message))
    if engine["kind"] == "deepspeed" and isinstance(offload, list):
        if "parameters" in offload and not zero3:
            found.append(
                (
                    ("engine", "offload"),
                    "only stage 3 shares out weights, so only there they can lie in the CPU's memory",
                )
            )
        if "optimizer" in offload and stage == 0:
            found.append(
                (
                    ("engine", "offload"),
                    "stage 0 shares out nothing, so nothing can be offloaded; use stage 1, 2 or 3",
                )
            )
    return found


def _data_contradictions(raw: Any) -> list[tuple[Path, str]]:
    found: list[tuple[Path, str]] = []
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
        message = "tiles are cut first, so each would move by itself; with model.tower.tiles images take colour, hue and noise"
        found += [(("data", "augment", key), message) for key in moved]
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
        found.append(
            (
                ("data", "group"),
                "a text-conditioned connector reads an image once a question, so it needs data.group: none",
            )
        )
    if contrastive:
        if data.get("group") in (None, "none"):
            found.append(
                (
                    ("data", "group"),
                    "a contrastive objective compares images, so it needs data.group: image",
                )
            )
        if tiles:
            found.append(
                (
                    ("model", "tower", "tiles"),
                    "a contrastive objective takes one image a row, so no tiles",
                )
            )
        if data.get("packing"):
            found.append(
                (
                    ("data", "packing"),
                    "a contrastive objective takes one image a row, so no packing",
                )
            )
    for part in ("train", "validation", "test"):
        for index, source in enumerate(data[part] if isinstance(data.get(part), list) else []):
            given = [
                key
                for key in ("weight", "count")
                if isinstance(source, dict) and source.get(key) is not None
            ]
            if given and part != "train":
                found.append(
                    (
                        ("data", part, index, given[0]),
                        f"{given[0]} shares out an epoch of training; {part} reads every row",
                    )
                )
            elif len(given) == 2:
                found.append(
                    (("data", part, index, "count"), "give at most one of weight and count")
                )
    trained = data["train"] if isinstance(data.get("train"), list) else []
    weighted = any(isinstance(source, dict) and source.get("weight") for source in trained)
    if data.get("epoch_size") is not None and not weighted:
        found.append(
            (
                ("data", "epoch_size"),
                "epoch_size is shared out by the sources' weights, and none has one",
            )
        )
    shares = [value_at(data, "split", part) for part in ("validation", "test")]
    if sum(share for share in shares if isinstance(share, int | float)) >= 1:
        found.append((("data", "split"), "validation and test leave nothing to train on"))
    least = value_at(data, "clean", "min_chars")
    most = value_at(data, "clean", "max_chars")
    if isinstance(least, int) and isinstance(most, int) and least > most:
        found.append(
            (("data", "clean", "max_chars"), f"max_chars {most} is under min_chars {least}")
        )
    if data.get("own_shards") is True and data.get("streaming") is not True:
        found.append(
            (
                ("data", "own_shards"),
                "own_shards is of data.streaming: true; prepared rows are read by number",
            )
        )
    return found + (_streaming_contradictions(raw, data) if data.get("streaming") is True else [])


def _streaming_contradictions(raw: Any, data: Any) -> list[tuple[Path, str]]:
    """What a stream, which knows no row before it comes, can't do."""
    found: list[tuple[Path, str]] = []
    if value_at(raw, "train", "steps") is None:
        found.append((("train",), "a stream has no epochs: give train.steps"))
    if data.get("group") == "image":
        found.append(
            (
                ("data", "group"),
                "a stream can't bring the rows of an image together; prepare (streaming: false) or group: none",
            )
        )
    cleaned = data.get("clean") if isinstance(data.get("clean"), dict) else {}
    asked = {
        "split": data.get("split"),
        "clean": any(value not in (None, [], "keep") for value in cleaned.values()),
    }
    for key, given in {**asked, "epoch_size": data.get("epoch_size")}.items():
        if given:
            found.append(
                (("data", key), f"{key} needs all rows at hand; prepare them (streaming: false)")
            )
    for key in ("batch_tokens", "loader_workers"):
        if value_at(raw, "train", key):
            found.append((("train", key), f"{key} needs prepared rows (data.streaming: false)"))
    return found


def _tune_contradictions(raw: Any) -> list[tuple[Path, str]]:
    found: list[tuple[Path, str]] = []
    rules = raw.get("tune") if isinstance(raw, dict) else None
    rules = (
        [rule if isinstance(rule, dict) else {} for rule in rules]
        if isinstance(rules, list)
        else []
    )
    seen: list[str] = []
    for index, rule in enumerate(rules):
        match = rule.get("match")
        how = rule.get("how")
        found += [(("tune", index, key), message) for key, message in _rule_contradictions(rule)]
        if how == "frozen" and rule.get("learning_rate") is not None:
            found.append((("tune", index, "learning_rate"), "a frozen part has no learning rate"))
        if how == "lora" and isinstance(match, str) and match.split(".")[0] not in ("llm", "tower"):
            found.append(
                (
                    ("tune", index, "match"),
                    "LoRA goes on the llm or the tower; train the connector with how: full",
                )
            )
        if how in ("prompt", "prefix"):
            found += [
                (("tune", index, key), message)
                for key, message in _prompt_contradictions(raw, rule)
            ]
        if isinstance(match, str):
            covered = [earlier for earlier in seen if fnmatch.fnmatchcase(match, earlier)]
            if covered:
                found.append(
                    (
                        ("tune", index, "match"),
                        f"never reached: {quoted(covered[0])} above matches first",
                    )
                )
            seen.append(match)
        if (
            how in ("full", "last_layers")
            and value_at(raw, "model", "llm", "quantize")
            and _reaches_blocks(rules, index)
        ):
            message = (
                f"{quoted(match)} reaches the llm's layers, and quantised weights can't be trained; use how: lora for them, or drop "
                "model.llm.quantize (its embedding and head are not quantised: llm.model.embed_tokens.*, llm.lm_head.*)"
            )
            found.append((("tune", index, "how"), message))
        if (
            rule.get("init") == "pissa"
            and value_at(raw, "model", "llm", "quantize")
            and isinstance(match, str)
            and match.startswith("llm")
        ):
            message = "PiSSA takes the singular vectors of 16-bit weights; use init: default, or drop model.llm.quantize"
            found.append((("tune", index, "init"), message))
    if rules and all(rule.get("how") == "frozen" for rule in rules):
        found.append((("tune",), "every rule is frozen, nothing would train"))
    return found


def _reaches_blocks(rules: Sequence[Any], index: int) -> bool:
    """Whether a rule is the first to match the linear layers of an LLM's blocks, whatever family it is of."""
    matches = [str(rule.get("match")) for rule in rules]
    return any(
        next((n for n, match in enumerate(matches) if fnmatch.fnmatchcase(name, match)), None)
        == index
        for name in BLOCK_WEIGHTS
    )


def _prompt_contradictions(raw: Any, rule: Any) -> list[tuple[str, str]]:
    """What virtual tokens before an LLM's input don't go with."""
    found = []
    how = rule["how"]
    seq2seq = value_at(raw, "model", "llm", "kind") == "seq2seq"
    if isinstance(rule.get("match"), str) and rule["match"].split(".")[0] != "llm":
        found.append(
            (
                "match",
                f"virtual tokens stand before the llm's input, so how: {how} takes a rule for llm.*",
            )
        )
    if value_at(raw, "model", "connector", "kind") == "cross_attention":
        found.append(
            (
                "how",
                f"how: {how} puts tokens before the text that the cross_attention connector does not know; use another",
            )
        )
    if how == "prefix" and value_at(raw, "train", "gradient_checkpointing") is True:
        found.append(
            (
                "how",
                "transformers drops a prefix of keys and values where it checkpoints gradients; drop one of them",
            )
        )
    if seq2seq and value_at(raw, "data", "packing") is True:
        found.append(
            (
                "how",
                f"how: {how} puts tokens before one sample of an encoder-decoder: it takes no packed rows (data.packing)",
            )
        )
    return found


def _rule_contradictions(rule: Any) -> list[tuple[str, str]]:
    """Keys of one tuning rule that don't belong to its `how`, or not to each other."""
    how = rule.get("how")
    known = typing.get_args(TuneRule.model_fields["how"].annotation)
    found = [
        (key, f"{key} belongs to how: {' or '.join(owners)}, this rule is how: {how}")
        for key, owners in RULE_KEYS.items()
        if rule.get(key) is not None and how in known and how not in owners
    ]
    if how == "last_layers" and rule.get("layers") is None:
        found.append(("how", "how: last_layers needs layers, the number of blocks that train"))
    if rule.get("variant") == "dora" and rule.get("init") == "pissa":
        found.append(
            (
                "init",
                "PiSSA over DoRA can't be saved as an adapter of the unchanged base; drop one of them",
            )
        )
    return found


def check_parts(recipe: Recipe, model: ModelSection) -> None:
    """Raises `RecipeError` where a recipe contradicts the parts that its `model.pretrained` turned out to have."""
    problems = []
    for _, stage in recipe.resolved_stages():
        raw = {**stage.model_dump(), "model": model.model_dump()}
        problems += [
            Problem(
                dotted_name(path),
                f"{message} (model.pretrained: {model.llm.name} is {model.llm.kind} with a {model.connector.kind})",
            )
            for path, message in contradictions(raw)
        ]
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
