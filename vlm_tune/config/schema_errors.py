"""Turns schema faults of a recipe into messages with the place in the file and nearest names."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, RootModel, ValidationError

from vlm_tune.config.recipe import Recipe
from vlm_tune.config.yaml_source import Located, Path, dotted_name, value_at
from vlm_tune.errors import Problem, RecipeError
from vlm_tune.quoting import cut, quoted, reason_of

OLD_NAMES = {
    "torch_dtype": "train.precision (bf16 | fp16 | fp32)",
    "dtype": "train.precision (bf16 | fp16 | fp32)",
    "bf16": "train.precision: bf16",
    "fp16": "train.precision: fp16",
    "warmup_ratio": "train.schedule.warmup (a share of all steps)",
    "warmup_steps": "train.schedule.warmup (a share of all steps)",
    "lr_scheduler_type": "train.schedule.kind",
    "load_in_4bit": "model.llm.quantize: nf4",
    "load_in_8bit": "model.llm.quantize: int8",
    "quantization_bit": "model.llm.quantize (nf4 | fp4 | int8)",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "output_dir": "output",
    "model_name_or_path": "model.llm.name",
    "vision_tower": "model.tower.name",
    "mm_projector_type": "model.connector.kind",
    "finetuning_type": "tune: [{match: ..., how: frozen | full | last_layers | lora | ...}]",
    "lora_r": "tune: [{how: lora, r: ...}]",
    "lora_rank": "tune: [{how: lora, r: ...}]",
    "lora_target": "tune: [{how: lora, target_modules: ...}]",
    "max_seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "dataset": "data.train",
    "report_to": "train.trackers",
    "logging_steps": "train.log_every",
    "save_steps": "train.checkpoints.every",
    "save_total_limit": "train.checkpoints.keep",
    "eval_steps": "evaluate.every",
    "deepspeed": "engine: {kind: deepspeed, stage: ...}",
    "fsdp": "engine: {kind: fsdp}",
    "max_grad_norm": "train.max_grad_norm",
    "learning_rate": "train.learning_rate",
    "lr": "train.learning_rate",
    "optimizer": "train (AdamW: learning_rate, weight_decay, betas)",
    "optim": "train (AdamW: learning_rate, weight_decay, betas)",
    "adam_beta1": "train.betas",
    "adam_beta2": "train.betas",
    "scheduler": "train.schedule",
    "warmup": "train.schedule.warmup (a share of all steps)",
    "batch": "train.batch_size",
    "bs": "train.batch_size",
    "per_device_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "evaluate.batch_size",
    "grad_accum": "train.gradient_accumulation",
    "accumulation": "train.gradient_accumulation",
    "epoch": "train.epochs",
    "num_epochs": "train.epochs",
    "step": "train.steps",
    "num_steps": "train.steps",
    "max_train_steps": "train.steps",
    "clip_grad": "train.max_grad_norm",
    "fp32": "train.precision: fp32",
    "mixed_precision": "train.precision (bf16 | fp16 | fp32)",
    "num_workers": "train.loader_workers",
    "dataloader_num_workers": "train.loader_workers",
    "workers": "data.workers (preparing) or train.loader_workers (training)",
    "lora": "tune: [{how: lora, r: ...}]",
    "peft": "tune: [{how: lora, r: ...}]",
    "rank": "tune.N.r of a rule with how: lora",
    "r": "tune.N.r of a rule with how: lora",
    "alpha": "tune.N.lora_alpha of a rule with how: lora",
    "lora_alpha": "tune.N.lora_alpha of a rule with how: lora",
    "dropout": "tune.N.lora_dropout of a rule with how: lora",
    "lora_dropout": "tune.N.lora_dropout of a rule with how: lora",
    "lora_target_modules": "tune.N.target_modules of a rule with how: lora",
    "target_modules": "tune.N.target_modules of a rule with how: lora",
    "use_dora": "tune.N.variant: dora of a rule with how: lora",
    "use_rslora": "tune.N.variant: rslora of a rule with how: lora",
    "freeze": "tune: [{match: ..., how: frozen}]",
    "freeze_vision_tower": "tune: [{match: tower.*, how: frozen}]",
    "quantization": "model.llm.quantize (nf4 | fp4 | int8)",
    "quantize": "model.llm.quantize (nf4 | fp4 | int8)",
    "max_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "model_max_length": "data.max_length",
    "template": "data.template",
    "system_prompt": "data.system",
    "train_data": "data.train",
    "train_file": "data.train",
    "data_path": "data.train",
    "dataset_path": "data.train",
    "validation": "data.validation",
    "eval_dataset": "data.validation",
    "val_size": "data.split.validation (a share of the rows)",
    "test": "data.test",
    "eval_batch_size": "evaluate.batch_size",
    "max_new_tokens": "evaluate.max_new_tokens",
    "num_beams": "evaluate.num_beams",
    "out": "output",
    "random_seed": "seed",
    "llm": "model.llm",
    "tower": "model.tower",
    "connector": "model.connector",
    "projector": "model.connector",
    "model.name": "model.pretrained",
}
"""Names of other trainers and older releases, and likely slips, with the names used here.

N is a rule's index in `tune`.
"""


def problem_order(where: str) -> tuple[str, int, int]:
    parts = where.rsplit(":", 2)
    if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit():
        return parts[0], int(parts[1]), int(parts[2])
    return where, 0, 0


def schema_faults(schema: type[BaseModel], value: Any) -> list[Any]:
    try:
        schema.model_validate(value)
        return []
    except ValidationError as error:
        return error.errors(include_url=False)


def schema_problems(
    located: Located, schema: type[BaseModel], value: Any, prefix: Path, common: Sequence[Any] = ()
) -> list[Problem]:
    """Returns the problems of `value`, which stands at `prefix`.

    `common` are faults that are reported already; they are left out where a stage repeats them.
    """
    problems = []
    reported = {(fault["loc"], fault["type"]) for fault in common}
    faults = schema_faults(schema, value)
    places = [_yaml_path(schema, fault["loc"]) for fault in faults]
    inside = {path[:-1] for path, _ in places if path}
    at_path: dict[Path, list[Any]] = {}
    for fault, (path, _) in zip(faults, places, strict=True):
        at_path.setdefault(path, []).append(fault)
    for fault, (path, parent) in zip(faults, places, strict=True):
        full = (*prefix, *path)
        if (fault["loc"], fault["type"]) in reported and full not in located.values:
            continue
        others = [each for each in at_path[path] if each is not fault]
        if fault["type"] in WRONG_TYPES and _tells_more(fault, others, path in inside):
            continue
        together = [each for each in at_path[path] if each["type"] in WRONG_TYPES]
        if len(together) > 1 and fault in together:
            if fault is together[0]:
                message = f"{dotted_name(full)}: {_alternatives_wording(together)}"
                problems.append(Problem(located.where(full), message))
        elif fault["type"] == "extra_forbidden":
            message = _unknown_key(full, parent, located.value)
            problems.append(Problem(located.where(full, key=True), message))
        elif fault["type"] == "missing":
            problems.append(Problem(located.where(full[:-1]), f"{dotted_name(full)} is required"))
        else:
            problems.append(Problem(located.where(full), f"{dotted_name(full)}: {_wording(fault)}"))
    return problems


WRONG_TYPES = {
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "literal_error": "",
}
"""pydantic's types of faults of values that are not what a key takes, with what it takes.

A key that takes several has one of these faults for each.
"""


def _tells_more(fault: Any, others: Sequence[Any], inside: bool) -> bool:
    """Whether the other alternatives' faults say what is wrong with a value, and this one does not.

    They do where the value is of their type, and out of range or, with faults `inside`, wrong in a
    part of it.
    """
    value = fault["input"]
    if isinstance(value, list):
        return inside or any(each["type"] in ("too_short", "too_long") for each in others)
    if isinstance(value, dict):
        return inside
    return any(each["type"] not in (*WRONG_TYPES, "missing", "extra_forbidden") for each in others)


def _alternatives_wording(faults: Sequence[Any]) -> str:
    """Returns one message for a value that is none of the alternatives of a key."""
    expected: list[str] = []
    hint = ""
    for fault in faults:
        if fault["type"] != "literal_error":
            expected.append(WRONG_TYPES[fault["type"]])
            continue
        names = _literal_names(fault)
        expected += names if len(names) < MANY else [f"one of {', '.join(names)}"]
        near = difflib.get_close_matches(str(fault["input"]), names, n=1)
        hint = hint or (f"; did you mean {near[0]}?" if near else "")
    return (
        f"expected {' or '.join(dict.fromkeys(expected))}, got {quoted(faults[0]['input'])}{hint}"
    )


MANY = 4
"""From so many names on, a list of them is one alternative of a message."""

WORDS = {
    "finite_number": "expected a finite number",
    "string_pattern_mismatch": "expected letters, digits, '.', '_' and '-' only",
    "none_required": "expected nothing (null)",
}
"""Plain messages for pydantic's error types whose own messages name Python classes."""


def _literal_names(item: Any) -> list[str]:
    """Returns the names of a fault's alternatives."""
    context = item.get("ctx", {})
    expected = str(context.get("expected_tags", context.get("expected", "")))
    parts = (name.strip(" '") for name in expected.replace(" or ", ",").split(","))
    return [name for name in parts if name]


def _wording(item: Any) -> str:
    """Returns a message with what was expected and what stands there."""
    context = item.get("ctx", {})
    if item["type"] in ("union_tag_invalid", "literal_error"):
        actual = context.get("tag", item.get("input"))
        names = _literal_names(item)
        near = difflib.get_close_matches(str(actual), names, n=1)
        return f"{quoted(actual)} is not one of {', '.join(names)}" + (
            f"; did you mean {near[0]}?" if near else ""
        )
    if item["type"] == "union_tag_not_found":
        return "needs a `kind`"
    if item["type"] == "too_short":
        return f"expected {context['min_length']} or more entries, got {context['actual_length']}"
    if item["type"] == "too_long":
        return f"expected {context['max_length']} or fewer entries, got {context['actual_length']}"
    expected = WRONG_TYPES.get(item["type"])
    if expected:
        return f"expected {expected}, got {quoted(item['input'])}"
    message = WORDS.get(item["type"]) or item["msg"][0].lower() + item["msg"][1:]
    return f"{message}, got {quoted(item['input'])}"


def _unknown_key(path: Path, parent: type[BaseModel] | None, raw: Any) -> str:
    """Returns the message for a path whose last key `parent` does not have.

    It names what the key is called here, or where such a key is.
    """
    key = str(path[-1])
    message = f"unknown key '{cut(key)}'"
    names = list(parent.model_fields) if parent else []
    near = difflib.get_close_matches(key, names, n=2, cutoff=0.7)
    if near:
        return f"{message}; did you mean {' or '.join(near)}?"
    dotted = ".".join(str(each) for each in path)
    name = OLD_NAMES.get(dotted) or OLD_NAMES.get(key)
    if name is not None and name != dotted:
        return f"{message}; here it is {_placed(name, raw)}"
    places = _key_places()
    elsewhere = places.get(key) or [
        path
        for name in difflib.get_close_matches(key, places, n=2, cutoff=0.8)
        for path in places[name]
    ]
    # Keys that other kinds have at this very place do not help.
    here = ".".join(str(part) if isinstance(part, str) else "N" for part in path[:-1])
    elsewhere = [place for place in elsewhere if place.rpartition(".")[0] != here]
    if 0 < len(elsewhere) <= NEAR:
        return f"{message}; did you mean {' or '.join(_placed(path, raw) for path in elsewhere)}?"
    return f"{message}; known here: {', '.join(names)}"


NEAR = 3
"""Most keys elsewhere that a message suggests; a name found in more places helps nobody."""


def _placed(name: str, raw: Any) -> str:
    """Replaces N in `name` by the indices of the recipe's LoRA rules, where it has any."""
    key, _, rest = name.removeprefix("tune.N.").partition(" of ")
    if not name.startswith("tune.N.") or not rest:
        return name
    stages = raw.get("stages") if isinstance(raw.get("stages"), list) else []
    lists = {"tune": raw.get("tune")} | {
        f"stages.{number}.tune": value_at(stage, "tune") for number, stage in enumerate(stages)
    }
    places = [
        f"{where}.{number}.{key}"
        for where, rules in lists.items()
        for number, rule in enumerate(rules if isinstance(rules, list) else [])
        if value_at(rule, "how") == "lora"
    ]
    return f"{' or '.join(places[:NEAR])} (of a LoRA rule)" if places else name


@cache
def _key_places() -> dict[str, list[str]]:
    """Returns the dotted places where each key of a recipe may stand; list indices are N."""
    places: dict[str, list[str]] = {}

    def walk(annotation: Any, prefix: tuple[str, ...]) -> None:
        for option in _alternatives(annotation):
            if typing.get_origin(option) is list:
                walk(typing.get_args(option)[0], (*prefix, "N"))
            elif isinstance(option, type) and issubclass(option, BaseModel):
                for key, field in option.model_fields.items():
                    dotted = ".".join((*prefix, key))
                    if dotted not in places.setdefault(key, []):
                        places[key].append(dotted)
                    walk(field.annotation, (*prefix, key))

    walk(Recipe, ())
    return places


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Yields the classes and list types that an annotation admits, through Annotated and unions."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _alternatives(part)
    elif isinstance(annotation, type) and issubclass(annotation, RootModel):
        yield from _alternatives(annotation.model_fields["root"].annotation)
    else:
        yield annotation


def _yaml_path(
    schema: type[BaseModel], loc: tuple[Any, ...]
) -> tuple[Path, type[BaseModel] | None]:
    """Drops pydantic's union tags from a location; also returns the class of its last key."""
    path: list[str | int] = []
    parent: type[BaseModel] | None = schema
    options: list[Any] = [schema]
    for part in loc:
        models = [
            option
            for option in options
            if isinstance(option, type) and issubclass(option, BaseModel)
        ]
        lists = [option for option in options if typing.get_origin(option) is list]
        if isinstance(part, int) and lists:
            path.append(part)
            options = list(_alternatives(typing.get_args(lists[0])[0]))
            parent = None
            continue
        tagged = [model for model in models if part == _kind_of(model) or part == model.__name__]
        if tagged and len(models) > 1:
            options = tagged
            continue
        if len(models) == 1 and len(options) > 1 and part == models[0].__name__:
            options = models
            continue
        if any(option not in models and part == _type_name(option) for option in options):
            options = []
            continue
        if len(models) == 1:
            parent = models[0]
            path.append(part)
            field = parent.model_fields.get(str(part))
            options = list(_alternatives(field.annotation)) if field else []
    return tuple(path), parent


def _type_name(option: Any) -> str | None:
    """Returns the name by which pydantic's locations call a builtin type of a union."""
    return option.__name__ if option in (str, int, float, bool) else None


def _kind_of(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return typing.get_args(field.annotation)[0] if field else None


def flow_value(name: str, value: Any) -> str:
    """Returns a value as one line of YAML. Raises `RecipeError` for one that no recipe can hold."""
    import json

    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        message = (
            f"expected a text, number, list or mapping, got {quoted(value)} ({reason_of(error)})"
        )
        raise RecipeError([Problem(f"overrides[{quoted(name)}]", message)]) from None
