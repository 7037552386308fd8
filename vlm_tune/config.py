"""The recipe: typed, strict, and the one description of a run."""

from __future__ import annotations

import difflib
import fnmatch
import types
import typing
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from vlm_tune.errors import Problem, RecipeError
from vlm_tune.recipe_yaml import Located, Path, apply_override, read_yaml, read_yaml_text

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class Config(BaseModel):
    """Base of every part of a recipe: unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)


# --- model -----------------------------------------------------------------------------------------------------------


class Tower(Config):
    """What every vision tower can be told."""

    image_size: PositiveInt | None = Field(default=None, description="side in pixels; the tower's own where not given")
    resize: Literal["squash", "crop", "pad"] = Field(default="crop", description="how an image that is not square becomes square")
    grid: PositiveInt | None = Field(default=None, description="average-pool the patch features to grid x grid tokens")


class OpenClipTower(Tower):
    """A CLIP vision tower from open_clip: a name with a `pretrained` tag or file, or a `config` built from scratch."""

    kind: Literal["open_clip"]
    name: str | None = Field(default=None, description="an open_clip model, as ViT-B-32")
    pretrained: str | None = Field(default=None, description="an open_clip tag (openai, laion2b_s34b_b79k) or a safetensors file")
    config: dict[str, Any] | None = Field(default=None, description="an open_clip `vision_cfg`, randomly initialised")
    layer: int = Field(default=-1, le=-1, description="which block's output, counted from the end (LLaVA takes -2)")


class TransformersTower(Tower):
    """A CLIP vision tower from transformers: a hub name or a folder."""

    kind: Literal["transformers"]
    name: str
    layer: int = Field(default=-2, le=-1, description="which hidden state, counted from the end (LLaVA takes -2)")


class TimmTower(Tower):
    """Feature maps of a timm backbone, pooled to one grid and concatenated by channel."""

    kind: Literal["timm"]
    name: str
    pretrained: str | bool = Field(default=False, description="true for timm's own weights, or a safetensors file")
    stages: list[int] = Field(default=[-1], min_length=1, description="which feature maps, as timm's out_indices")
    grid: PositiveInt | None = Field(default=7, description="the grid every feature map is pooled to")


class Projector(Config):
    """What every connector can be told."""

    norm: bool = Field(default=False, description="a LayerNorm on the tower's features first; for towers that end without one")


class LinearConnector(Projector):
    """One linear projection from the tower's width to the LLM's."""

    kind: Literal["linear"]


class MlpConnector(Projector):
    """`depth` linear layers with GELU between them (LLaVA-1.5 takes 2)."""

    kind: Literal["mlp"]
    depth: Annotated[int, Field(ge=2, le=8)] = 2


class Scratch(Config):
    """An LLM that starts from random weights, with a tokenizer trained on the recipe's own text."""

    config: dict[str, Any] = Field(description="keys of the transformers config (d_model, num_layers, ...)")
    model_type: str = Field(description="transformers' model type: t5, llama, gpt2, ...")
    vocab_size: Annotated[int, Field(ge=300)] = Field(default=512, description="of the byte-level BPE tokenizer")


class Llm(Config):
    """The language model: an encoder-decoder (`seq2seq`: T5, Flan-T5) or a decoder (`causal`)."""

    kind: Literal["causal", "seq2seq"]
    name: str | None = Field(default=None, description="a hub name or a local folder")
    gguf_file: str | None = Field(default=None, description="a GGUF file in `name`, de-quantised at load")
    scratch: Scratch | None = None
    quantize: Literal["int8", "nf4"] | None = Field(default=None, description="load frozen linear layers in 8 or 4 bit")


class ModelSection(Config):
    """Tower, connector and LLM."""

    tower: Annotated[OpenClipTower | TransformersTower | TimmTower, Field(discriminator="kind")]
    connector: Annotated[LinearConnector | MlpConnector, Field(discriminator="kind")] = MlpConnector(kind="mlp")
    llm: Llm


# --- data ------------------------------------------------------------------------------------------------------------


class Source(Config):
    """What every source can be told."""

    limit: PositiveInt | None = Field(default=None, description="take the first n rows only")


class EasyVqaSource(Source):
    """The easy-VQA data set of the `easy-vqa` package; `validation` is the last images of its train part."""

    kind: Literal["easy_vqa"]
    split: Literal["train", "validation", "test"]
    validation_images: NonNegativeInt = Field(default=200, description="how many train images are held out as `validation`")
    task: Literal["vqa", "caption"] = Field(default="vqa", description="questions, or captions of what the questions reveal")
    instructions: str = Field(default="vqa", description="a prompt set of data_templates/instructions, or a file")


class LlavaSource(Source):
    """LLaVA JSON or JSONL: rows with `conversations` (from human | gpt) and `image`."""

    kind: Literal["llava"]
    path: str
    image_root: str | None = Field(default=None, description="where image paths start; the file's own folder where not given")


class MessagesSource(Source):
    """JSONL rows with `messages` (role, content) and `images`, as OpenAI and Hugging Face write them."""

    kind: Literal["messages"]
    path: str
    image_root: str | None = Field(default=None, description="where image paths start; the file's own folder where not given")


AnySource = Annotated[EasyVqaSource | LlavaSource | MessagesSource, Field(discriminator="kind")]


class Augment(Config):
    """Random changes of training images, drawn from (seed, epoch, sample id)."""

    flip: Fraction = Field(default=0.0, description="probability of a left-right mirror image")
    transpose: Fraction = Field(default=0.0, description="probability of exchanging height and width (square images only)")
    shift: Annotated[float, Field(ge=0, le=0.5)] = Field(default=0.0, description="largest shift, as a share of the side")


class DataSection(Config):
    """Where samples come from and how they become tokens."""

    train: list[AnySource] = Field(min_length=1)
    validation: list[AnySource] = Field(default=[], description="scored while training; chooses the best checkpoint")
    test: list[AnySource] = Field(default=[], description="scored once, by the finished model; never used to choose")
    template: str = Field(description="a chat format of data_templates/chat, or a file")
    system: str | None = Field(default=None, description="system text for conversations that bring none")
    max_length: PositiveInt = Field(default=2048, description="longest example in tokens, image slots included")
    overlong: Literal["fail", "drop"] = Field(default="fail", description="examples over max_length: stop, or drop and count")
    on_bad_row: Literal["fail", "skip"] = "fail"
    max_bad_rows: NonNegativeInt = Field(default=100, description="with skip: more than this many bad rows is an error")
    group: Literal["none", "image"] = Field(default="none", description="image: rows of one image are one unit of a batch")
    augment: Augment | None = None


# --- tuning ----------------------------------------------------------------------------------------------------------


class TuneRule(Config):
    """What happens to the parameters whose name matches; the first rule that matches wins."""

    match: str = Field(description="a glob over names: tower.*, connector.*, llm.*, llm.model.layers.0.*")
    how: Literal["frozen", "full", "lora"]
    learning_rate: PositiveFloat | None = Field(default=None, description="the train section's where not given")
    r: PositiveInt | None = Field(default=None, description="LoRA rank (lora only)")
    lora_alpha: PositiveFloat | None = Field(default=None, description="LoRA scale is lora_alpha / r (lora only)")
    lora_dropout: Fraction | None = Field(default=None, description="lora only")
    target_modules: list[str] | Literal["all-linear"] | None = Field(
        default=None, description="module names as in PEFT; all-linear leaves out the output head (lora only)"
    )


# --- training --------------------------------------------------------------------------------------------------------


class LanguageModeling(Config):
    """Cross-entropy of the supervised tokens."""

    kind: Literal["language_modeling"] = "language_modeling"


class Contrastive(Config):
    """Image against caption among the batch's distinct captions, in the LLM's embedding space."""

    kind: Literal["contrastive"]
    temperature: PositiveFloat = 0.07


class Schedule(Config):
    """The learning rate's course: linear warm-up, then this."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.03, description="share of all steps")


class Checkpoints(Config):
    """When checkpoints are written and how many are kept; the best and the last always are."""

    every: PositiveInt | None = Field(default=None, description="optimizer steps; at each evaluation and the end where not given")
    keep: PositiveInt = 2


class TrainSection(Config):
    """The training loop."""

    epochs: PositiveFloat | None = Field(default=None, description="passes over the data; give this or steps")
    steps: PositiveInt | None = Field(default=None, description="optimizer steps; give this or epochs")
    batch_size: PositiveInt = Field(default=8, description="units (rows, or images with group: image) a device and micro-batch")
    gradient_accumulation: PositiveInt = 1
    learning_rate: PositiveFloat = 2e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: list[Fraction] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    schedule: Schedule = Schedule()
    max_grad_norm: PositiveFloat | None = 1.0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    cache_features: bool = Field(default=True, description="compute a frozen tower's features once (not with augmentation)")
    log_every: PositiveInt = 10
    checkpoints: Checkpoints = Checkpoints()
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []


class EvaluateSection(Config):
    """Evaluation while training and after it."""

    every: PositiveInt | None = Field(default=None, description="optimizer steps; once an epoch where not given")
    limit: PositiveInt | None = Field(default=None, description="score the first n validation rows only")
    batch_size: PositiveInt = Field(default=64, description="rows")
    max_new_tokens: PositiveInt = 32
    num_beams: PositiveInt = 1
    samples: NonNegativeInt = Field(default=12, description="how many answers the report shows before and after training")


class Stage(Config):
    """One stage of several: the recipe's common part with these parts changed."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    data: dict[str, Any] = {}
    tune: Annotated[list[TuneRule], Field(min_length=1)] | None = None
    objective: Annotated[LanguageModeling | Contrastive, Field(discriminator="kind")] | None = None
    train: dict[str, Any] = {}
    evaluate: dict[str, Any] = {}


class Recipe(Config):
    """A whole run: what is trained, on what, how, and where it is written."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    output: str = Field(description="the run's folder")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: ModelSection
    data: DataSection
    tune: list[TuneRule] = Field(min_length=1)
    objective: Annotated[LanguageModeling | Contrastive, Field(discriminator="kind")] = LanguageModeling()
    train: TrainSection
    evaluate: EvaluateSection = EvaluateSection()
    stages: list[Stage] = []

    def resolved_stages(self) -> list[tuple[str, Recipe]]:
        """Each stage's name and complete recipe, in order; one stage named `main` where none are listed."""
        if not self.stages:
            return [("main", self)]
        common = self.model_dump(exclude={"stages"}, exclude_unset=True)
        return [
            (stage.name, Recipe.model_validate(_merge(common, _changes(stage.model_dump(exclude_unset=True))))) for stage in self.stages
        ]


# --- loading ---------------------------------------------------------------------------------------------------------

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
    "quantization_bit": "model.llm.quantize (int8 | nf4)",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "output_dir": "output",
    "model_name_or_path": "model.llm.name",
    "vision_tower": "model.tower.name",
    "mm_projector_type": "model.connector.kind",
    "finetuning_type": "tune: [{match: ..., how: frozen | full | lora}]",
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
    "max_grad_norm": "train.max_grad_norm",
    "learning_rate": "train.learning_rate",
}
"""Names that other trainers and older releases use, and what they are called here."""


def load_recipe(path: str | FilePath, overrides: Sequence[str] | dict[str, Any] = ()) -> Recipe:
    """Reads, overrides and checks a recipe; raises `RecipeError` with every problem and its `file:line:column`.

    `overrides` are `"a.b=c"` strings, or a mapping of dotted names to values.
    """
    located = read_yaml(path)
    if isinstance(overrides, dict):
        overrides = [f"{name}={_flow(value)}" for name, value in overrides.items()]
    for override in overrides:
        apply_override(located, override)
    return check_recipe(located)


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
    yaml.dump(data, stream)
    return stream.getvalue()


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
            merged = _merge({k: v for k, v in located.value.items() if k != "stages"}, _changes(stage))
            whole.append((prefix, merged))
            for section, schema in (("data", DataSection), ("train", TrainSection), ("evaluate", EvaluateSection)):
                if isinstance(stage.get(section), dict) and isinstance(merged.get(section), dict):
                    common = _faults(schema, located.value.get(section))
                    problems += _schema_problems(located, schema, merged[section], (*prefix, section), common)
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in stages]
    for index, name in enumerate(names):
        if isinstance(name, str) and name in names[:index]:
            problems.append(Problem(located.where(("stages", index, "name")), f"a stage before it is called {name!r} too"))
    common_faults = _contradictions(located.value)
    for prefix, merged in whole:
        for path, message in _contradictions(merged):
            staged = (*prefix, *path)
            inherited = staged not in located.values and (path, message) in common_faults
            problems.append(Problem(located.where(path if inherited else staged), message))
    unique = list(dict.fromkeys(problems))
    if unique:
        raise RecipeError(sorted(unique, key=lambda problem: _sort_key(problem.where)))
    return Recipe.model_validate(located.value)


def _sort_key(where: str) -> tuple[str, int, int]:
    parts = where.rsplit(":", 2)
    if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit():
        return parts[0], int(parts[1]), int(parts[2])
    return where, 0, 0


def _changes(stage: dict[str, Any]) -> dict[str, Any]:
    """What a stage changes in the common part; a part that is null is not given."""
    return {key: value for key, value in stage.items() if key != "name" and value is not None}


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
            problems.append(Problem(located.where(full, key=True), _unknown_key(str(path[-1]), parent)))
        elif item["type"] == "missing":
            problems.append(Problem(located.where(full[:-1]), f"{_dotted(full)} is required"))
        else:
            problems.append(Problem(located.where(full), f"{_dotted(full)}: {_wording(item)}"))
    return problems


def _wording(item: Any) -> str:
    message = item["msg"][0].lower() + item["msg"][1:]
    if item["type"] in ("union_tag_invalid", "literal_error"):
        context = item.get("ctx", {})
        given = str(context.get("tag", item.get("input")))
        expected = str(context.get("expected_tags", context.get("expected", "")))
        names = [name.strip(" '") for name in expected.replace(" or ", ",").split(",") if name.strip(" '")]
        near = difflib.get_close_matches(given, names, n=1)
        return f"{given!r} is none of {', '.join(names)}" + (f"; did you mean {near[0]}?" if near else "")
    if item["type"] == "union_tag_not_found":
        return "needs a `kind`"
    return f"{message}, got {item['input']!r}" if not isinstance(item["input"], dict) else message


def _dotted(path: Path) -> str:
    return ".".join(str(part) for part in path) or "recipe"


def _unknown_key(key: str, parent: type[BaseModel] | None) -> str:
    names = list(parent.model_fields) if parent else []
    near = difflib.get_close_matches(key, names, n=2, cutoff=0.6)
    message = f"unknown key {key!r}"
    if near:
        return f"{message}; did you mean {' or '.join(near)}?"
    if key in OLD_NAMES:
        return f"{message}; here it is {OLD_NAMES[key]}"
    return f"{message}; known here: {', '.join(names)}"


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
        tagged = [model for model in models if _kind_of(model) == part]
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


def _merge(common: Any, change: Any) -> Any:
    """Mappings merge key by key; a mapping with another `kind`, and anything else, replaces."""
    if isinstance(common, dict) and isinstance(change, dict) and common.get("kind") == change.get("kind", common.get("kind")):
        merged = dict(common)
        for key, value in change.items():
            merged[key] = _merge(common[key], value) if key in common else deepcopy(value)
        return merged
    return deepcopy(change)


def _flow(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


def _get(raw: Any, *path: str) -> Any:
    for part in path:
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def _contradictions(raw: Any) -> list[tuple[Path, str]]:
    """Faults between keys that are each well-formed alone; looks at raw values, so it runs beside schema errors."""
    found: list[tuple[Path, str]] = []
    epochs, steps = _get(raw, "train", "epochs"), _get(raw, "train", "steps")
    if isinstance(_get(raw, "train"), dict) and (epochs is None) == (steps is None):
        found.append((("train",), "give exactly one of train.epochs and train.steps"))
    llm = _get(raw, "model", "llm")
    if isinstance(llm, dict):
        if (llm.get("name") is None) == (llm.get("scratch") is None):
            found.append((("model", "llm"), "give exactly one of model.llm.name and model.llm.scratch"))
        if llm.get("gguf_file") is not None and llm.get("name") is None:
            found.append((("model", "llm", "gguf_file"), "model.llm.gguf_file needs model.llm.name, the folder it is in"))
        if llm.get("quantize") is not None and llm.get("scratch") is not None:
            found.append((("model", "llm", "quantize"), "a scratch LLM has nothing to quantise: its random weights must train in full"))
        if llm.get("kind") == "seq2seq" and _get(raw, "train", "precision") == "fp16":
            found.append((("train", "precision"), "T5's activations overflow in fp16; use bf16 or fp32"))
    tower = _get(raw, "model", "tower")
    if isinstance(tower, dict) and tower.get("kind") == "open_clip" and (tower.get("name") is None) == (tower.get("config") is None):
        found.append((("model", "tower"), "give exactly one of model.tower.name and model.tower.config"))
    found += _tune_contradictions(raw)
    if _get(raw, "data", "group") in (None, "none") and _get(raw, "objective", "kind") == "contrastive":
        found.append((("data", "group"), "a contrastive objective compares images, so it needs data.group: image"))
    return found


def _tune_contradictions(raw: Any) -> list[tuple[Path, str]]:
    found: list[tuple[Path, str]] = []
    rules = raw.get("tune") if isinstance(raw, dict) else None
    rules = [rule if isinstance(rule, dict) else {} for rule in rules] if isinstance(rules, list) else []
    lora_keys = ("r", "lora_alpha", "lora_dropout", "target_modules")
    seen: list[str] = []
    for index, rule in enumerate(rules):
        match, how = rule.get("match"), rule.get("how")
        for key in lora_keys:
            if rule.get(key) is not None and how in ("frozen", "full"):
                found.append((("tune", index, key), f"{key} belongs to how: lora, this rule is how: {how}"))
        if how == "frozen" and rule.get("learning_rate") is not None:
            found.append((("tune", index, "learning_rate"), "a frozen part has no learning rate"))
        if how == "lora" and isinstance(match, str) and match.split(".")[0] not in ("llm", "tower"):
            found.append((("tune", index, "match"), "LoRA goes on the llm or the tower; train the connector with how: full"))
        if isinstance(match, str):
            covered = [earlier for earlier in seen if fnmatch.fnmatchcase(match, earlier)]
            if covered:
                found.append((("tune", index, "match"), f"never reached: {covered[0]!r} above matches first"))
            seen.append(match)
        if how == "full" and isinstance(match, str) and match.startswith("llm") and _get(raw, "model", "llm", "quantize"):
            found.append((("tune", index, "how"), "quantised weights can't be trained in full; use how: lora, or drop model.llm.quantize"))
    if rules and all(rule.get("how") == "frozen" for rule in rules):
        found.append((("tune",), "every rule is frozen, nothing would train"))
    return found


def recipe_schema() -> dict[str, Any]:
    """The recipe's JSON Schema, for editors that complete and check YAML."""
    schema = TypeAdapter(Recipe).json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "vlm_tune recipe"
    return schema
