"""Reads, checks and writes recipes: every fault at once, with its place and the nearest names."""

from __future__ import annotations

import difflib
import fnmatch
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path as FilePath
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from vlm_tune.config.data import DataSection
from vlm_tune.config.model import ModelSection
from vlm_tune.config.recipe import Recipe, merge_parts, stage_changes
from vlm_tune.config.train import EvaluateSection, TrainSection
from vlm_tune.config.tune import TuneRule
from vlm_tune.config.yaml_source import Located, Path, apply_override, read_yaml, read_yaml_text
from vlm_tune.errors import Problem, RecipeError
from vlm_tune.quoting import cut, quoted

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
}
"""Names that other trainers, older releases and haste use, and what they are called here; N is a rule's place in `tune`."""

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


def load_recipe(
    path: str | FilePath,
    overrides: Sequence[str] | dict[str, Any] = (),
    *,
    note: Callable[[str], None] | None = None,
) -> Recipe:
    """Reads, overrides and checks a recipe.

    An override of train.steps replaces the recipe's train.epochs, and the other way round, also in its stages.

    Args:
        path: a YAML file.
        overrides: `"a.b=c"` strings, or a mapping of dotted names to values.
        note: is told in words what an override replaced besides the value it names.

    Raises:
        RecipeError: with every problem and its `file:line:column`, or the override it is in.
    """
    if not isinstance(path, str | FilePath):
        raise RecipeError([Problem("recipe", f"expected the path of a recipe file, got {quoted(path)}")])
    located = read_yaml(path)
    changed = [apply_override(located, override) for override in _override_texts(overrides)]
    for line in _replace_lengths(located.value, changed):
        if note:
            note(line)
    return check_recipe(located)


def _override_texts(overrides: Sequence[str] | dict[str, Any]) -> list[str]:
    """Overrides as `a.b=c` texts. Raises `RecipeError` for what is none."""
    if isinstance(overrides, dict):
        return [f"{name}={_flow(str(name), value)}" for name, value in overrides.items()]
    if isinstance(overrides, str) or not isinstance(overrides, Sequence):
        message = f"expected a list of 'key.key=value' texts, or a mapping of dotted names to values, got {quoted(overrides)}"
        raise RecipeError([Problem("overrides", message)])
    for override in overrides:
        if not isinstance(override, str):
            raise RecipeError([Problem("overrides", f"expected a text as 'train.epochs=2', got {quoted(override)}")])
    return list(overrides)


def _replace_lengths(raw: Any, changed: Sequence[Path]) -> list[str]:
    """Removes the epochs that steps set by an override stand in for, and steps for epochs; what was replaced, in words."""
    notes = []
    for path in changed:
        if path[-2:-1] != ("train",) or path[-1] not in LENGTHS or _at(raw, path) is None:
            continue
        other = "epochs" if path[-1] == "steps" else "steps"
        replaced = []
        stages = raw.get("stages") if isinstance(raw.get("stages"), list) else []
        places: list[Path] = [("train",)] if len(path) == 2 else [path[:-1]]
        if len(path) == 2:
            places += [("stages", number, "train") for number, _ in enumerate(stages)]
        for place in places:
            section = _at(raw, place)
            if isinstance(section, dict) and section.get(other) is not None and (*place, other) not in changed:
                replaced.append(f"{_dotted((*place, other))}: {section.pop(other)}")
                if section.get(path[-1], ...) is None:
                    # A stage's null says "not the common one", which is the one that is set now.
                    del section[path[-1]]
        if len(path) == 4 and (common := _at(raw, ("train", other))) is not None and (*path[:-1], other) not in changed:
            _at(raw, path[:-1])[other] = None
            replaced.append(f"train.{other}: {common} for this stage")
        if replaced:
            notes.append(f"{_dotted(path)}: {_at(raw, path)} replaces {' and '.join(replaced)}")
    return notes


def _at(raw: Any, path: Path) -> Any:
    """The value at a path; None where there is none."""
    for key in path:
        if isinstance(raw, dict):
            raw = raw.get(key)
        elif isinstance(raw, list) and isinstance(key, int) and key < len(raw):
            raw = raw[key]
        else:
            return None
    return raw


def as_recipe(recipe: str | FilePath | Recipe, overrides: Sequence[str] | dict[str, Any] = ()) -> Recipe:
    """A recipe as functions take it: a file with overrides, or one that was loaded, which takes none.

    Raises `RecipeError` as `load_recipe`.
    """
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides)
    if overrides:
        raise RecipeError([Problem("overrides", "a recipe that is loaded takes none; give them to load_recipe")])
    return recipe


def parse_recipe(text: str, name: str = "recipe") -> Recipe:
    """As `load_recipe`, from text."""
    return check_recipe(read_yaml_text(text, name))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; `load_recipe` reads it back to an equal recipe."""
    import io

    from ruamel.yaml import YAML

    stream = io.StringIO()
    yaml = YAML(typ="rt", pure=True)
    yaml.width = 120
    data = recipe.model_dump()
    data["stages"] = recipe.model_dump(exclude_unset=True).get("stages", [])
    yaml.dump(_quoted(data), stream)
    return stream.getvalue()


def _quoted(value: Any) -> Any:
    """A value whose texts with unusual line breaks are double-quoted: elsewhere YAML folds those into blanks."""
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    if isinstance(value, str):
        return DoubleQuotedScalarString(value) if set(value) & {"\x85", "\u2028", "\u2029"} else value
    if isinstance(value, dict):
        return {_quoted(key): _quoted(held) for key, held in value.items()}
    return [_quoted(held) for held in value] if isinstance(value, list) else value


def check_recipe(located: Located) -> Recipe:
    """A typed recipe from located values; raises `RecipeError` with all problems at once."""
    problems = _schema_problems(located, Recipe, located.value, ())
    raw_stages = located.value.get("stages")
    stages = raw_stages if isinstance(raw_stages, list) else []
    whole: list[tuple[Path, Any]] = []
    if not stages:
        whole.append(((), located.value))
    for index, stage in enumerate(stages):
        if isinstance(stage, dict):
            prefix: Path = ("stages", index)
            merged = merge_parts({k: v for k, v in located.value.items() if k != "stages"}, stage_changes(stage))
            whole.append((prefix, merged))
            for section, schema in (("data", DataSection), ("train", TrainSection), ("evaluate", EvaluateSection)):
                if isinstance(stage.get(section), dict) and isinstance(merged.get(section), dict):
                    common = _faults(schema, located.value.get(section))
                    problems += _schema_problems(located, schema, merged[section], (*prefix, section), common)
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in stages]
    for index, name in enumerate(names):
        if isinstance(name, str) and name in names[:index]:
            problems.append(Problem(located.where(("stages", index, "name")), f"a stage before it is called {quoted(name)} too"))
    for index, stage in enumerate(stages[:-1]):
        if _get(stage, "data", "test"):
            message = "only the last stage's test part is scored, by the finished model; move it there"
            problems.append(Problem(located.where(("stages", index, "data", "test")), message))
    common_faults = _contradictions(located.value)
    for prefix, merged in whole:
        for path, message in _contradictions(merged):
            staged = (*prefix, *path)
            inherited = staged not in located.values and (path, message) in common_faults
            problems.append(Problem(located.where(path if inherited else staged), message))
    unique = list(dict.fromkeys(problems))
    if unique:
        raise RecipeError(sorted(unique, key=lambda problem: _sort_key(problem.where)))
    return Recipe.model_validate(located.value).read_from(located)


def _sort_key(where: str) -> tuple[str, int, int]:
    parts = where.rsplit(":", 2)
    if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit():
        return parts[0], int(parts[1]), int(parts[2])
    return where, 0, 0


def _faults(schema: type[BaseModel], value: Any) -> list[Any]:
    try:
        schema.model_validate(value)
        return []
    except ValidationError as error:
        return error.errors(include_url=False)


def _schema_problems(located: Located, schema: type[BaseModel], value: Any, prefix: Path, common: Sequence[Any] = ()) -> list[Problem]:
    """The problems of `value`, which stands at `prefix`; `common` are faults told of already where a stage repeats them."""
    problems = []
    told = {(item["loc"], item["type"]) for item in common}
    for item in _faults(schema, value):
        path, parent = _yaml_path(schema, item["loc"])
        full = (*prefix, *path)
        if (item["loc"], item["type"]) in told and full not in located.values:
            continue
        if item["type"] == "extra_forbidden":
            message = _unknown_key(full, parent, located.value)
            problems.append(Problem(located.where(full, key=True), message))
        elif item["type"] == "missing":
            problems.append(Problem(located.where(full[:-1]), f"{_dotted(full)} is required"))
        else:
            problems.append(Problem(located.where(full), f"{_dotted(full)}: {_wording(item)}"))
    return problems


WORDS = {
    "string_type": "expected text",
    "list_type": "expected a list",
    "dict_type": "expected keys and values",
    "model_type": "expected keys and values",
    "model_attributes_type": "expected keys and values",
    "bool_type": "expected true or false",
    "finite_number": "expected a finite number",
    "string_pattern_mismatch": "expected letters, digits, '.', '_' and '-' only",
    "none_required": "expected nothing (null)",
}
"""pydantic's error types whose own messages name its classes, in plain words."""


def _wording(item: Any) -> str:
    """A schema fault in words: what was expected, and what stands there."""
    context = item.get("ctx", {})
    if item["type"] in ("union_tag_invalid", "literal_error"):
        given = context.get("tag", item.get("input"))
        expected = str(context.get("expected_tags", context.get("expected", "")))
        names = [name.strip(" '") for name in expected.replace(" or ", ",").split(",") if name.strip(" '")]
        near = difflib.get_close_matches(str(given), names, n=1)
        return f"{quoted(given)} is none of {', '.join(names)}" + (f"; did you mean {near[0]}?" if near else "")
    if item["type"] == "union_tag_not_found":
        return "needs a `kind`"
    if item["type"] == "too_short":
        return f"expected {context['min_length']} or more entries, got {context['actual_length']}"
    if item["type"] == "too_long":
        return f"expected {context['max_length']} or fewer entries, got {context['actual_length']}"
    message = WORDS.get(item["type"]) or item["msg"][0].lower() + item["msg"][1:]
    return f"{message}, got {quoted(item['input'])}"


def _dotted(path: Path) -> str:
    return ".".join(str(part) for part in path) or "recipe"


def _unknown_key(path: Path, parent: type[BaseModel] | None, raw: Any) -> str:
    """What to say of a path whose last key `parent` does not have: what it is called here, or where such a key is."""
    key = str(path[-1])
    message = f"unknown key '{cut(key)}'"
    names = list(parent.model_fields) if parent else []
    near = difflib.get_close_matches(key, names, n=2, cutoff=0.7)
    if near:
        return f"{message}; did you mean {' or '.join(near)}?"
    if key in OLD_NAMES:
        return f"{message}; here it is {_placed(OLD_NAMES[key], raw)}"
    places = _key_places()
    elsewhere = places.get(key) or [path for name in difflib.get_close_matches(key, places, n=2, cutoff=0.8) for path in places[name]]
    # What other kinds have at this very place does not help.
    here = ".".join(str(part) if isinstance(part, str) else "N" for part in path[:-1])
    elsewhere = [place for place in elsewhere if not here or not place.startswith(f"{here}.")]
    if 0 < len(elsewhere) <= NEAR:
        return f"{message}; did you mean {' or '.join(_placed(path, raw) for path in elsewhere)}?"
    return f"{message}; known here: {', '.join(names)}"


NEAR = 3
"""Keys elsewhere in the recipe that a message suggests; a name that more places have says nothing."""


def _placed(name: str, raw: Any) -> str:
    """`name` with N as the places of the recipe's own LoRA rules, where it has some."""
    key, _, rest = name.removeprefix("tune.N.").partition(" of ")
    if not name.startswith("tune.N.") or not rest:
        return name
    stages = raw.get("stages") if isinstance(raw.get("stages"), list) else []
    lists = {"tune": raw.get("tune")} | {f"stages.{number}.tune": _get(stage, "tune") for number, stage in enumerate(stages)}
    places = [
        f"{where}.{number}.{key}"
        for where, rules in lists.items()
        for number, rule in enumerate(rules if isinstance(rules, list) else [])
        if _get(rule, "how") == "lora"
    ]
    return f"{' or '.join(places[:NEAR])} (of a LoRA rule)" if places else name


@cache
def _key_places() -> dict[str, list[str]]:
    """Every key of a recipe, with the dotted places where it may stand; list places are N."""
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
    """The model classes and list types an annotation admits, through Annotated, unions and Optional."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _alternatives(part)
    else:
        yield annotation


def _yaml_path(schema: type[BaseModel], loc: tuple[Any, ...]) -> tuple[Path, type[BaseModel] | None]:
    """Drops pydantic's union tags from a location; also gives the class whose key the last part is."""
    path: list[str | int] = []
    parent: type[BaseModel] | None = schema
    options: list[Any] = [schema]
    for part in loc:
        models = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
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
        if len(models) == 1:
            parent = models[0]
            path.append(part)
            field = parent.model_fields.get(str(part))
            options = list(_alternatives(field.annotation)) if field else []
    return tuple(path), parent


def _kind_of(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return typing.get_args(field.annotation)[0] if field else None


def _flow(name: str, value: Any) -> str:
    """A value as YAML in one line. Raises `RecipeError` for one that no recipe can hold."""
    import json

    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        message = f"expected a text, number, list or mapping, got {quoted(value)} ({error})"
        raise RecipeError([Problem(f"overrides[{quoted(name)}]", message)]) from None


def _get(raw: Any, *path: str) -> Any:
    for part in path:
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def _contradictions(raw: Any) -> list[tuple[Path, str]]:
    """Faults between keys that are each well-formed alone; looks at raw values, so it runs beside schema errors."""
    found: list[tuple[Path, str]] = []
    epochs, steps = _get(raw, "train", "epochs"), _get(raw, "train", "steps")
    if isinstance(_get(raw, "train"), dict) and (epochs is None) == (steps is None):
        found.append((("train",) if steps is None else ("train", "steps"), "give exactly one of train.epochs and train.steps"))
    llm = _get(raw, "model", "llm")
    if isinstance(llm, dict) and _get(raw, "model", "pretrained") is None:
        if (llm.get("name") is None) == (llm.get("scratch") is None):
            found.append((("model", "llm"), "give exactly one of model.llm.name and model.llm.scratch"))
        if llm.get("gguf_file") is not None and llm.get("name") is None:
            found.append((("model", "llm", "gguf_file"), "model.llm.gguf_file needs model.llm.name, the folder it is in"))
        if llm.get("quantize") is not None and llm.get("scratch") is not None:
            found.append((("model", "llm", "quantize"), "a scratch LLM has nothing to quantise: its random weights must train in full"))
        if llm.get("kind") == "seq2seq" and _get(raw, "train", "precision") == "fp16":
            found.append((("train", "precision"), "T5's activations overflow in fp16; use bf16 or fp32"))
    connector = _get(raw, "model", "connector")
    if isinstance(connector, dict) and (connector.get("tokenizer") is None) != (connector.get("vocab_size") is None):
        found.append((("model", "connector"), "give model.connector.tokenizer and model.connector.vocab_size together, or neither"))
    if _get(connector, "tokenizer") is not None and connector.get("text") is not True:
        found.append((("model", "connector", "tokenizer"), "a Q-Former reads no instruction without model.connector.text: true"))
    tower = _get(raw, "model", "tower")
    pair = _get(tower, "towers")
    towers: list[tuple[Path, Any]] = [(("model", "tower"), tower)]
    towers += [(("model", "tower", "towers", place), part) for place, part in enumerate(pair if isinstance(pair, list) else [])]
    for path, part in towers:
        if isinstance(part, dict) and part.get("kind") == "open_clip" and (part.get("name") is None) == (part.get("config") is None):
            found.append((path, f"give exactly one of {_dotted(path)}.name and {_dotted(path)}.config"))
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
    stage, offload = engine.get("stage", 2), engine.get("offload")
    zero3 = engine["kind"] == "deepspeed" and stage == 3
    name = "fsdp" if engine["kind"] == "fsdp" else f"ZeRO-{stage}"
    if (zero3 or engine["kind"] == "fsdp") and _get(raw, "model", "llm", "quantize"):
        message = f"{name} shares out a weight's numbers, and packed 4- and 8-bit weights are none; use deepspeed with stage 2, or ddp"
        found.append((("model", "llm", "quantize"), message))
    if _get(raw, "train", "precision") == "fp16":
        found.append((("train", "precision"), f"fp16 needs its loss scaled, which engine {name} is not told of; use bf16 or fp32"))
    if zero3 and any(isinstance(rule, dict) and rule.get("how") in ("prompt", "prefix") for rule in raw.get("tune") or []):
        message = "ZeRO-3 gathers weights as their modules run, and virtual tokens are no module that runs; use stage 2 or fsdp"
        found.append((("engine", "stage"), message))
    if engine["kind"] == "deepspeed" and isinstance(offload, list):
        if "parameters" in offload and not zero3:
            found.append((("engine", "offload"), "only stage 3 shares out weights, so only there they can lie in the CPU's memory"))
        if "optimizer" in offload and stage == 0:
            found.append((("engine", "offload"), "stage 0 shares out nothing, so nothing can be offloaded; use stage 1, 2 or 3"))
    return found


def _data_contradictions(raw: Any) -> list[tuple[Path, str]]:
    found: list[tuple[Path, str]] = []
    data = _get(raw, "data") if isinstance(_get(raw, "data"), dict) else {}
    tiles, contrastive = _get(raw, "model", "tower", "tiles"), _get(raw, "objective", "kind") == "contrastive"
    augment = data.get("augment")
    if tiles and isinstance(augment, dict):
        still = {"crop": 1, "flip": 0, "transpose": 0, "shift": 0, "rotation": 0, "rand_augment": None}
        moved = [key for key, value in still.items() if augment.get(key) not in (None, value)]
        message = "tiles are cut first, so each would move by itself; with model.tower.tiles images take colour, hue and noise"
        found += [(("data", "augment", key), message) for key in moved]
    reads = _get(raw, "model", "connector", "text") is True or _get(raw, "model", "connector", "kind") == "fusion"
    if data.get("group") == "image" and not contrastive and reads and _get(raw, "model", "llm", "kind") == "causal":
        found.append((("data", "group"), "a text-conditioned connector reads an image once a question, so it needs data.group: none"))
    if contrastive:
        if data.get("group") in (None, "none"):
            found.append((("data", "group"), "a contrastive objective compares images, so it needs data.group: image"))
        if tiles:
            found.append((("model", "tower", "tiles"), "a contrastive objective takes one image a row, so no tiles"))
        if data.get("packing"):
            found.append((("data", "packing"), "a contrastive objective takes one image a row, so no packing"))
    for part in ("train", "validation", "test"):
        for index, source in enumerate(data[part] if isinstance(data.get(part), list) else []):
            given = [key for key in ("weight", "count") if isinstance(source, dict) and source.get(key) is not None]
            if given and part != "train":
                found.append((("data", part, index, given[0]), f"{given[0]} shares out an epoch of training; {part} reads every row"))
            elif len(given) == 2:
                found.append((("data", part, index, "count"), "give at most one of weight and count"))
    trained = data["train"] if isinstance(data.get("train"), list) else []
    weighted = any(isinstance(source, dict) and source.get("weight") for source in trained)
    if data.get("epoch_size") is not None and not weighted:
        found.append((("data", "epoch_size"), "epoch_size is shared out by the sources' weights, and none has one"))
    shares = [_get(data, "split", part) for part in ("validation", "test")]
    if sum(share for share in shares if isinstance(share, int | float)) >= 1:
        found.append((("data", "split"), "validation and test leave nothing to train on"))
    least, most = _get(data, "clean", "min_chars"), _get(data, "clean", "max_chars")
    if isinstance(least, int) and isinstance(most, int) and least > most:
        found.append((("data", "clean", "max_chars"), f"max_chars {most} is under min_chars {least}"))
    if data.get("own_shards") is True and data.get("streaming") is not True:
        found.append((("data", "own_shards"), "own_shards is of data.streaming: true; prepared rows are read by number"))
    return found + (_streaming_contradictions(raw, data) if data.get("streaming") is True else [])


def _streaming_contradictions(raw: Any, data: Any) -> list[tuple[Path, str]]:
    """What a stream, which knows no row before it comes, can't do."""
    found: list[tuple[Path, str]] = []
    if _get(raw, "train", "steps") is None:
        found.append((("train",), "a stream has no epochs: give train.steps"))
    if data.get("group") == "image":
        found.append((("data", "group"), "a stream can't bring the rows of an image together; prepare (streaming: false) or group: none"))
    cleaned = data.get("clean") if isinstance(data.get("clean"), dict) else {}
    asked = {"split": data.get("split"), "clean": any(value not in (None, [], "keep") for value in cleaned.values())}
    for key, given in {**asked, "epoch_size": data.get("epoch_size")}.items():
        if given:
            found.append((("data", key), f"{key} needs all rows at hand; prepare them (streaming: false)"))
    for key in ("batch_tokens", "loader_workers"):
        if _get(raw, "train", key):
            found.append((("train", key), f"{key} needs prepared rows (data.streaming: false)"))
    return found


def _tune_contradictions(raw: Any) -> list[tuple[Path, str]]:
    found: list[tuple[Path, str]] = []
    rules = raw.get("tune") if isinstance(raw, dict) else None
    rules = [rule if isinstance(rule, dict) else {} for rule in rules] if isinstance(rules, list) else []
    seen: list[str] = []
    for index, rule in enumerate(rules):
        match, how = rule.get("match"), rule.get("how")
        found += [(("tune", index, key), message) for key, message in _rule_contradictions(rule)]
        if how == "frozen" and rule.get("learning_rate") is not None:
            found.append((("tune", index, "learning_rate"), "a frozen part has no learning rate"))
        if how == "lora" and isinstance(match, str) and match.split(".")[0] not in ("llm", "tower"):
            found.append((("tune", index, "match"), "LoRA goes on the llm or the tower; train the connector with how: full"))
        if how in ("prompt", "prefix"):
            found += [(("tune", index, key), message) for key, message in _prompt_contradictions(raw, rule)]
        if isinstance(match, str):
            covered = [earlier for earlier in seen if fnmatch.fnmatchcase(match, earlier)]
            if covered:
                found.append((("tune", index, "match"), f"never reached: {quoted(covered[0])} above matches first"))
            seen.append(match)
        if how in ("full", "last_layers") and _get(raw, "model", "llm", "quantize") and _reaches_blocks(rules, index):
            message = (
                f"{quoted(match)} reaches the llm's layers, and quantised weights can't be trained; use how: lora for them, or drop "
                "model.llm.quantize (its embedding and head are not quantised: llm.model.embed_tokens.*, llm.lm_head.*)"
            )
            found.append((("tune", index, "how"), message))
        if rule.get("init") == "pissa" and _get(raw, "model", "llm", "quantize") and isinstance(match, str) and match.startswith("llm"):
            message = "PiSSA takes the singular vectors of 16-bit weights; use init: default, or drop model.llm.quantize"
            found.append((("tune", index, "init"), message))
    if rules and all(rule.get("how") == "frozen" for rule in rules):
        found.append((("tune",), "every rule is frozen, nothing would train"))
    return found


def _reaches_blocks(rules: Sequence[Any], index: int) -> bool:
    """Whether a rule is the first to match the linear layers of an LLM's blocks, whatever family it is of."""
    matches = [str(rule.get("match")) for rule in rules]
    return any(next((n for n, match in enumerate(matches) if fnmatch.fnmatchcase(name, match)), None) == index for name in BLOCK_WEIGHTS)


def _prompt_contradictions(raw: Any, rule: Any) -> list[tuple[str, str]]:
    """What virtual tokens before an LLM's input don't go with."""
    found, how, seq2seq = [], rule["how"], _get(raw, "model", "llm", "kind") == "seq2seq"
    if isinstance(rule.get("match"), str) and rule["match"].split(".")[0] != "llm":
        found.append(("match", f"virtual tokens stand before the llm's input, so how: {how} takes a rule for llm.*"))
    if _get(raw, "model", "connector", "kind") == "cross_attention":
        found.append(("how", f"how: {how} puts tokens before the text that the cross_attention connector does not know; use another"))
    if how == "prefix" and _get(raw, "train", "gradient_checkpointing") is True:
        found.append(("how", "transformers drops a prefix of keys and values where it checkpoints gradients; drop one of them"))
    if seq2seq and _get(raw, "data", "packing") is True:
        found.append(("how", f"how: {how} puts tokens before one sample of an encoder-decoder: it takes no packed rows (data.packing)"))
    return found


def _rule_contradictions(rule: Any) -> list[tuple[str, str]]:
    """Keys of one tuning rule that don't belong to its `how`, or not to each other."""
    how, known = rule.get("how"), typing.get_args(TuneRule.model_fields["how"].annotation)
    found = [
        (key, f"{key} belongs to how: {' or '.join(owners)}, this rule is how: {how}")
        for key, owners in RULE_KEYS.items()
        if rule.get(key) is not None and how in known and how not in owners
    ]
    if how == "last_layers" and rule.get("layers") is None:
        found.append(("how", "how: last_layers needs layers, the number of blocks that train"))
    if rule.get("variant") == "dora" and rule.get("init") == "pissa":
        found.append(("init", "PiSSA over DoRA can't be saved as an adapter of the unchanged base; drop one of them"))
    return found


def check_parts(recipe: Recipe, model: ModelSection) -> None:
    """Raises `RecipeError` where a recipe contradicts the parts that its `model.pretrained` turned out to have."""
    problems = []
    for _, stage in recipe.resolved_stages():
        raw = {**stage.model_dump(), "model": model.model_dump()}
        problems += [
            Problem(_dotted(path), f"{message} (model.pretrained: {model.llm.name} is {model.llm.kind} with a {model.connector.kind})")
            for path, message in _contradictions(raw)
        ]
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))


def recipe_schema() -> dict[str, Any]:
    """The recipe's JSON Schema, for editors that complete and check YAML."""
    schema = TypeAdapter(Recipe).json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "vlm_tune recipe"
    return schema
