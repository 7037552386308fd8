"""The fuzzer's cases: recipes, rows, images, command lines, Python calls and damaged folders.

A case is plain data that says what to write and what to call, so that its repr reproduces it.
Hypothesis draws the cases.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from random import Random
from typing import Any

from hypothesis import strategies as st
from hypothesis.control import BuildContext
from hypothesis.internal.conjecture.data import ConjectureData

TINY = {
    "seq2seq": {
        "model_type": "t5",
        "vocab_size": 400,
        "config": {
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 64,
            "num_layers": 1,
            "num_decoder_layers": 1,
            "num_heads": 2,
            "dropout_rate": 0.0,
            "feed_forward_proj": "gated-gelu",
        },
    },
    "causal": {
        "model_type": "llama",
        "vocab_size": 400,
        "config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
        },
    },
}

WEIRD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 10**6, 4 * 10**11, 2**63, -(2**63), 10**30,
    0.5, -0.5, 1e-5, 1e-300, 1e308, math.nan, math.inf, -math.inf,
    "", " ", "0", "-1", "1e-5", "no", "null", "NaN", "\x00", "\x1b[31mred\x1b[0m", "\u202eabc",
    "\ufeff", "\u200b",
    "a" * 300, "../x", "/proc/x", "~", "nope", "nope.jsonl", "messages.jsonl", "messages.jsonl/x",
    ".", "x" * 5000,
    "é", "你好", "<image>", "</s>", "<|im_end|>", "{{ 1 }}", "[]", "{}", "file:///etc/hostname",
    "https://example.invalid/x",
    [], [None], [[]], [0], ["a", "b"], {}, {"a": 1}, {"kind": "nope"}, {"kind": None},
]  # fmt: skip
"""Values that belong nowhere in particular."""

weird = st.sampled_from(WEIRD)
text = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
    [each for each in WEIRD if isinstance(each, str)]
)


@dataclass
class Case:
    """One thing to try: `files` are written first, then `call` is made."""

    kind: str
    call: list[Any]
    recipe: dict[str, Any] | str | bytes | None = None
    files: dict[str, Any] = field(default_factory=dict)


def base_recipe(kind: str) -> dict[str, Any]:
    """A recipe that trains a tiny model for one step on the four images of `harness.write_rows`."""
    return {
        "name": "tiny",
        "output": "run",
        "model": {
            "tower": {
                "kind": "open_clip",
                "config": {
                    "layers": 1,
                    "width": 64,
                    "head_width": 32,
                    "patch_size": 16,
                    "image_size": 32,
                },
            },
            "connector": {"kind": "mlp", "norm": True},
            "llm": {"kind": kind, "scratch": copy.deepcopy(TINY[kind])},
        },
        "data": {
            "train": [{"kind": "file", "path": "messages.jsonl"}],
            "template": "flan" if kind == "seq2seq" else "chatml",
            "max_length": 128,
            "workers": 0,
        },
        "tune": [{"match": "tower.*", "how": "frozen"}, {"match": "*", "how": "full"}],
        "train": {
            "steps": 1,
            "batch_size": 4,
            "learning_rate": 0.003,
            "precision": "fp32",
            "log_every": 1,
            "schedule": {"warmup": 0},
        },
        "evaluate": {"max_new_tokens": 3, "samples": 0},
    }


# --- recipes -----------------------------------------------------------------------------------


@cache
def schema_paths() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Every place of a recipe with its JSON schema; items of lists stand at 0."""
    from vlm_tune.config.recipe import Recipe

    schema = Recipe.model_json_schema()
    places: dict[tuple[Any, ...], dict[str, Any]] = {}

    def walk(node: dict[str, Any], path: tuple[Any, ...]) -> None:
        if "$ref" in node:
            walk(schema["$defs"][node["$ref"].rpartition("/")[2]], path)
            return
        if path:
            places.setdefault(path, node)
        if len(path) > 6:
            return
        for each in (*node.get("anyOf", ()), *node.get("oneOf", ())):
            walk(each, path)
        for name, each in node.get("properties", {}).items():
            walk(each, (*path, name))
        if isinstance(node.get("items"), dict):
            walk(node["items"], (*path, 0))

    walk(schema, ())
    return sorted(places.items(), key=str)


def set_at(tree: Any, path: tuple[Any, ...], value: Any) -> None:
    """Sets a value in nested dicts and lists, making what is missing on the way.

    Gives up where something else stands.
    """
    for key, following in pairwise(path):
        missing: Any = [] if isinstance(following, int) else {}
        if isinstance(tree, dict) and isinstance(key, str):
            if not isinstance(tree.get(key), dict | list):
                tree[key] = missing
            tree = tree[key]
        elif isinstance(tree, list) and isinstance(key, int):
            if not tree:
                tree.append(missing)
            tree = tree[0]
        else:
            return
    if isinstance(tree, dict):
        tree[path[-1]] = value
    elif isinstance(tree, list) and isinstance(path[-1], int):
        tree[:1] = [value]


def chance(draw: st.DrawFn, of: int) -> bool:
    """True once in `of` draws; hypothesis repeats its simplest draws, which are False."""
    return draw(st.sampled_from([False] * (of - 1) + [True]))


@st.composite
def fitting(draw: st.DrawFn, node: dict[str, Any]) -> Any:
    """A value that a schema's node allows, near the edges of what it allows."""
    choices = [*node.get("anyOf", ()), *node.get("oneOf", ())]
    if choices:
        node = draw(st.sampled_from(choices))
    if "enum" in node:
        return draw(st.sampled_from(node["enum"]))
    if "const" in node:
        return node["const"]
    low = node.get("minimum", node.get("exclusiveMinimum"))
    high = node.get("maximum", node.get("exclusiveMaximum"))
    match node.get("type"):
        case "integer":
            last = int(high) if high is not None and high < 10**6 else None
            first = int(low) if low is not None else min(0, 0 if last is None else last - 5)
            return draw(st.integers(first, first + 9 if last is None else last))
        case "number":
            return draw(
                st.floats(float(low or 0), float(high if high is not None else 4), allow_nan=False)
            )
        case "boolean":
            return draw(st.booleans())
        case "string":
            return draw(text)
        case "array":
            return draw(st.lists(weird, max_size=3))
        case "null":
            return None
    return draw(weird)


@st.composite
def changed_recipe(draw: st.DrawFn, most: int = 3) -> dict[str, Any]:
    """A recipe with values set anywhere that the schema knows, removed, or under an unknown key."""
    recipe = base_recipe(draw(st.sampled_from(["causal", "seq2seq"])))
    for _ in range(draw(st.integers(1, most))):
        path, node = draw(st.sampled_from(schema_paths()))
        what = draw(st.integers(0, 9))
        if what == 0:
            set_at(recipe, (*path[:-1], draw(text | st.just("lr"))), draw(weird))
        elif what == 1:
            recipe.pop(draw(st.sampled_from(sorted(recipe))), None)
            if not recipe:
                break
        else:
            set_at(recipe, path, draw(fitting(node) if what < 5 else weird))
    return recipe


@st.composite
def recipe_text(draw: st.DrawFn) -> bytes:
    """A recipe's bytes with something done to the text."""
    lines = dump(base_recipe("causal")).encode().replace(b", ", b",\n ").split(b"\n")
    place = draw(st.integers(0, len(lines) - 1))
    noise = draw(
        st.binary(max_size=6)
        | st.sampled_from(
            [b"\t", b"\xff", b"\x00", b"&a *a", b"!!python/object:os.system ls", b"---", b"%YAML"]
        )
    )
    match draw(st.integers(0, 5)):
        case 0:
            lines.insert(place, lines[place])
        case 1:
            del lines[place]
        case 2:
            lines[place] = lines[place][: draw(st.integers(0, 20))] + noise + lines[place]
        case 3:
            return b"\n".join(lines)[: draw(st.integers(0, 1200))]
        case 4:
            return noise + b"\n".join(lines)
        case _:
            return draw(st.binary(max_size=60))
    return b"\n".join(lines)


def dump(recipe: dict[str, Any]) -> str:
    """A recipe as JSON, which YAML reads; numbers that JSON has not as YAML writes them."""
    return (
        json.dumps(recipe)
        .replace("NaN", ".nan")
        .replace("-Infinity", "-.inf")
        .replace("Infinity", ".inf")
    )


SETTINGS: dict[str, list[Any]] = {
    "train.batch_size": [1, 2, 3, 8, 64],
    "train.gradient_accumulation": [1, 2, 3],
    "train.steps": [1, 2],
    "train.learning_rate": [1e-6, 1e-3, 0.5],
    "train.weight_decay": [0.0, 0.1],
    "train.schedule": [
        {"kind": "cosine"},
        {"kind": "linear", "warmup": 0.5},
        {"kind": "constant", "warmup": 0.99},
    ],
    "train.max_grad_norm": [None, 1e-3, 10.0],
    "train.precision": ["fp32", "bf16"],
    "train.gradient_checkpointing": [True],
    "train.cache_features": [False],
    "train.compile": [False],
    "train.checkpoints": [{"every": 1, "keep": 1}, {"background": False}],
    "train.batch_tokens": [64, 200, 4096],
    "evaluate.every": [1],
    "evaluate.limit": [1, 3],
    "evaluate.num_beams": [1, 2],
    "evaluate.batch_size": [1, 5],
    "evaluate.samples": [1, 3],
    "data.validation": [[{"kind": "file", "path": "messages.jsonl", "limit": 3}]],
    "data.test": [[{"kind": "file", "path": "messages.jsonl", "limit": 2}]],
    "data.split": [
        {"validation": 0.3},
        {"test": 0.3},
        {"validation": 0.25, "test": 0.25, "stratify": True},
    ],
    "data.group": ["image"],
    "data.packing": [True],
    "data.row_length": [64, 128, 1024],
    "data.max_length": [256, 64, 24],
    "data.overlong": ["drop", "split", "trim"],
    "data.on_bad_row": ["skip", "quarantine"],
    "data.max_bad_rows": [0, 1, 1000],
    "data.streaming": [True],
    "data.shuffle_buffer": [1, 3],
    "data.system": ["Be brief.", "<image>"],
    "data.template": ["chatml", "vicuna", "llama3", "smollm2", "flan"],
    "data.clean": [
        {"duplicates": "bytes"},
        {"duplicates": "perceptual"},
        {"min_side": 64},
        {"max_chars": 10},
    ],
    "data.augment": [{"flip": 0.5, "crop": 0.5}, {"rand_augment": {"ops": 1}}],
    "model.connector": [
        {"kind": "linear"},
        {"kind": "mlp", "depth": 3},
        {"kind": "pixel_shuffle", "factor": 2},
        {"kind": "avg_pool", "grid": 1},
        {"kind": "resampler", "latents": 2, "depth": 1, "heads": 2},
        {"kind": "qformer", "queries": 2, "width": 32, "depth": 1, "heads": 2},
        {"kind": "cross_attention", "every": 1},
    ],
    "model.llm.quantize": ["nf4", "int8"],
    "model.tower.class_token": [True],
    "model.tower.resize": ["pad", "squash"],
    "model.tower.grid": [1],
    "seed": [1, 2**32 - 1],
    "tune": [
        [{"match": "*", "how": "full"}],
        [
            {
                "match": "llm.*",
                "how": "lora",
                "r": 2,
                "lora_alpha": 4,
                "target_modules": "all-linear",
            },
            {"match": "*", "how": "frozen"},
        ],
        [
            {"match": "connector.*", "how": "full"},
            {"match": "llm.*", "how": "norms"},
            {"match": "*", "how": "frozen"},
        ],
        [{"match": "llm.*", "how": "prompt", "tokens": 2}, {"match": "*", "how": "frozen"}],
        [{"match": "llm.*", "how": "last_layers", "layers": 1}, {"match": "*", "how": "frozen"}],
    ],
    "stages": [[{"name": "one"}, {"name": "two", "train": {"learning_rate": 0.001}}]],
}
"""Settings that make sense by themselves.

Together they may contradict each other, which an error must say.
"""


@st.composite
def sensible_recipe(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe that should train, or say why these settings do not go together."""
    recipe = base_recipe(draw(st.sampled_from(["causal", "seq2seq"])))
    for name in draw(st.lists(st.sampled_from(sorted(SETTINGS)), max_size=4, unique=True)):
        set_at(recipe, tuple(name.split(".")), draw(st.sampled_from(SETTINGS[name])))
    return recipe


# --- rows --------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "what color is it?"},
            {"role": "assistant", "content": "red"},
        ],
        "images": ["red.png"],
    },
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": "red.png"},
                    {"type": "text", "text": "what?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
            {"role": "user", "content": "sure?"},
            {"role": "assistant", "content": "yes"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "first <image> then <image>"},
            {"role": "assistant", "content": "no"},
        ],
        "images": ["red.png", "blue.png"],
    },
    {
        "conversations": [
            {"from": "human", "value": "<image>\nwhat color?"},
            {"from": "gpt", "value": "red"},
        ],
        "image": "red.png",
    },
    {"prompt": "what color?", "completion": "red", "image": "red.png"},
    {
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [{"role": "assistant", "content": "hello"}],
    },
    {"instruction": "Name the color.", "input": "", "output": "red", "image": "red.png"},
    {"image": "red.png", "question": "what color?", "answer": "red"},
    {"image": "red.png", "question": "which?", "choices": ["red", "blue"], "answer": 0},
    {"image": "red.png", "caption": "a red square"},
    {"image": "red.png", "label": "red"},
    {"texts": [{"user": "what color?", "assistant": "red"}], "images": ["red.png"]},
]


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """A JSON tree with one node replaced, removed, repeated, or a key added."""
    tree = copy.deepcopy(tree)
    node, path = tree, []
    while isinstance(node, dict | list) and node and (not path or draw(st.integers(0, 3))):
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        path.append((node, key))
        node = node[key]
    if not path:
        return draw(weird)
    parent, key = path[-1]
    match draw(st.integers(0, 6)):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, list):
            parent.insert(key, parent[key])
        case 2 if isinstance(parent, dict):
            parent[
                draw(
                    text
                    | st.sampled_from(
                        ["id", "category", "weight", "tools", "choices", "images", "role"]
                    )
                )
            ] = draw(weird)
        case 3 if isinstance(parent[key], str):
            parent[key] = draw(text)
        case 4 if isinstance(parent[key], str):
            parent[key] += draw(text)
        case _:
            parent[key] = draw(weird)
    return tree


@st.composite
def row(draw: st.DrawFn) -> Any:
    """A row of any form, most of them damaged."""
    base = draw(st.sampled_from(ROWS))
    for _ in range(draw(st.integers(0, 2))):
        base = draw(changed(base))
    return base


@st.composite
def rows_file(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file's name and bytes: rows among good ones, and sometimes bytes that are no rows."""
    count = draw(st.integers(1, 3))
    same = draw(st.booleans())
    first = draw(row())
    rows = [first if same else draw(row()) for _ in range(count)]
    good = ROWS[0] if not (same and isinstance(first, dict)) else first
    rows = [*rows, *[good] * 4]
    escape = draw(st.booleans())
    name = draw(
        st.sampled_from(
            ["rows.jsonl"] * 6
            + ["rows.json", "rows.csv", "rows.tsv", "rows.jsonl.gz", "rows.parquet"]
        )
    )
    if name.endswith(("json", "parquet")):
        content = json.dumps(rows, ensure_ascii=escape).encode("utf-8", "surrogatepass")
    else:
        content = "".join(json.dumps(each, ensure_ascii=escape) + "\n" for each in rows).encode(
            "utf-8", "surrogatepass"
        )
    if chance(draw, 6):
        place = draw(st.integers(0, len(content)))
        noise = draw(
            st.binary(max_size=5)
            | st.sampled_from([b"\xff\xfe", b"\x00", b"\xef\xbb\xbf", b"\n\n", b"{", b"\\ud83d"])
        )
        content = draw(
            st.sampled_from(
                [content[:place], content[:place] + noise + content[place:], noise + content]
            )
        )
    return name, content


@st.composite
def image_bytes(draw: st.DrawFn) -> tuple[str, Any]:
    """A change of red.png: ("cut", share), ("bytes", ...), ("save", format, mode, size)."""
    return draw(
        st.tuples(st.just("cut"), st.floats(0, 1))
        | st.tuples(
            st.just("bytes"),
            st.binary(max_size=40)
            | st.sampled_from([b"<html>", b"GIF89a", b"\x89PNG\r\n\x1a\n", b""]),
        )
        | st.tuples(
            st.just("save"),
            st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF"]),
            st.sampled_from(["RGB", "L", "P", "RGBA", "CMYK", "I;16", "1", "LA", "F"]),
            st.sampled_from([(32, 32), (1, 1), (1, 300), (300, 1), (17, 31)]),
        )
    )


# --- cases -------------------------------------------------------------------------------------


@st.composite
def recipe_cases(draw: st.DrawFn) -> Case:
    """Recipes that are wrong somewhere, given to a command."""
    recipe: Any = draw(changed_recipe() | changed_recipe(most=1) | recipe_text())
    command = draw(st.sampled_from(["sft", "sft", "check", "show", "plan"]))
    return Case("recipe", ["cli", command, "recipe.yaml"], recipe)


@st.composite
def override_cases(draw: st.DrawFn) -> Case:
    """`--set` of anything to anything."""
    overrides = []
    for _ in range(draw(st.integers(1, 2))):
        path = ".".join(map(str, draw(st.sampled_from(schema_paths()))[0]))
        name = draw(
            st.just(path)
            | st.sampled_from(["train.lr", "rank", "alpha", "tune.7.r", "a..b", ".", "", "model"])
            | text
        )
        value = draw(weird.map(lambda each: json.dumps(each)) | text)
        overrides.append(f"{name}={value}" if draw(st.integers(0, 9)) else name)
    command = draw(st.sampled_from(["sft", "check", "show", "plan"]))
    recipe = base_recipe(draw(st.sampled_from(["causal", "seq2seq"])))
    return Case(
        "override",
        ["cli", command, "recipe.yaml", *(f"--set={each}" for each in overrides)],
        recipe,
    )


@st.composite
def training_cases(draw: st.DrawFn) -> Case:
    """Settings that each make sense, trained from the command line, sometimes resumed."""
    recipe = draw(sensible_recipe())
    files = {"red.png": draw(image_bytes())} if chance(draw, 8) else {}
    call: list[Any] = ["cli", "sft", "recipe.yaml"]
    if chance(draw, 8):
        name = draw(st.sampled_from(sorted(SETTINGS)))
        value = json.dumps(draw(st.sampled_from(SETTINGS[name])))
        call = [
            "resumed",
            f"--set={name}={value}",
            *draw(st.sampled_from([[], ["--accept-changes"]])),
        ]
    return Case("training", call, recipe, files)


@st.composite
def row_cases(draw: st.DrawFn) -> Case:
    """Rows of all forms, damaged, checked, shown, or trained on."""
    name, content = draw(rows_file())
    recipe = base_recipe(draw(st.sampled_from(["causal", "seq2seq"])))
    part = draw(st.sampled_from(["train"] * 5 + ["validation", "test"]))
    recipe["data"][part] = [{"kind": "file", "path": name}]
    recipe["data"]["on_bad_row"] = draw(st.sampled_from(["fail", "skip", "quarantine"]))
    if chance(draw, 6):
        recipe["data"]["streaming"] = True
    files: dict[str, Any] = {name: ("rows", content)}
    if chance(draw, 5):
        files["red.png"] = draw(image_bytes())
    command = draw(st.sampled_from(["check", "sft", "sft", "show"]))
    return Case("row", ["cli", command, "recipe.yaml"], recipe, files)


ARGUMENTS = [
    "recipe.yaml", "run", "merged", "run/model", "messages.jsonl", "red.png", "nope", "", ".", "..",
    "/proc/x", "a" * 300, "x\x00y", "messages.jsonl/x", "demo", "--", "-1", "0", "1", "2", "nan",
    "inf", "1e99", "bf16", "int8", "half", "test", "validation", "x", "llava", "gguf", "adapter",
    "cpu", "cuda", "cuda:9", "24GB", "-1GB", "0GB", "\u202e", "\x1b[31m", "{}", "[1]",
]  # fmt: skip
"""Texts for arguments and options: some that are right somewhere, some that are right nowhere."""


@st.composite
def command_cases(draw: st.DrawFn) -> Case:
    """Any command with any options.

    The folders `run` and `merged` hold a trained and a merged model.
    """
    from typer.main import get_command

    from vlm_tune.cli import app

    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    name = draw(st.sampled_from(sorted(commands)))
    call: list[Any] = ["cli", name]
    likely = {
        "recipe": "recipe.yaml",
        "run": "run",
        "model": draw(st.sampled_from(["run", "merged"])),
        "image": "red.png",
        "data": "rows.jsonl",
    }
    for parameter in commands[name].params:
        if parameter.name in ("help", "processes"):
            continue  # several processes are started by tests of their own
        value = (
            likely.get(parameter.name, "new")
            if draw(st.integers(0, 2))
            else draw(st.sampled_from(ARGUMENTS))
        )
        if parameter.param_type_name == "argument":
            call += [value] if draw(st.integers(0, 15)) else []
        elif parameter.required or draw(st.integers(0, 3)) == 0:
            call += [parameter.opts[0]] if parameter.is_flag else [parameter.opts[0], value]
    return Case(
        "command",
        call,
        base_recipe("causal"),
        {"rows.jsonl": ("rows", json.dumps(ROWS[0]).encode())},
    )


part = (
    st.sampled_from(
        [
            {"type": "text", "text": "what?"},
            {"type": "image"},
            {"type": "image", "image": "red.png"},
            {"type": "nope"},
            "x",
            None,
        ]
    )
    | weird
)
message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool", None, 1]),
        "content": text | st.lists(part, max_size=3) | weird,
    }
)
IMAGES = [
    "red.png",
    "nope.png",
    b"",
    b"x",
    None,
    5,
    "array",
    "empty array",
    "float array",
    "nan array",
    "pil",
    "hsv",
    "bytesio",
    "path",
    "messages.jsonl",
]
request = st.fixed_dictionaries(
    {"prompt": text | st.lists(message, max_size=3) | weird},
    optional={
        "images": st.lists(st.sampled_from(IMAGES), max_size=3) | weird,
        "image": st.sampled_from(IMAGES),
        "system": weird,
        "x": weird,
    },
)
options = st.fixed_dictionaries(
    {},
    optional={
        "max_new_tokens": st.sampled_from([1, 2, 3]) | weird,
        "num_beams": st.sampled_from([1, 2]) | weird,
        "temperature": st.sampled_from([0, 0.7, 3]) | weird,
        "top_p": st.sampled_from([0, 0.5, 1]) | weird,
        "top_k": st.sampled_from([0, 3]) | weird,
        "seed": st.sampled_from([0, 10**20]) | weird,
        "repetition_penalty": st.sampled_from([1, 1.5]) | weird,
        "num_return_sequences": st.sampled_from([1, 2]) | weird,
        "stop_strings": st.sampled_from(["a", ["b", "\n"]]) | weird,
        "choices": st.sampled_from([["a", "b"], [["a", "b"]]]) | weird,
    },
)
bounded_options = options.filter(
    lambda each: (
        not any(
            _is_large(each.get(name))
            for name in ("max_new_tokens", "num_beams", "num_return_sequences")
        )
    )
)


def _is_large(value: Any) -> bool:
    """Whether a number is a valid count that generation would take very long for."""
    return isinstance(value, int) and not isinstance(value, bool) and 50 < value < 10**9


@st.composite
def python_cases(draw: st.DrawFn) -> Case:
    """Calls of the Python API with arguments of all kinds."""
    name = draw(
        st.sampled_from(
            ["chat"] * 4
            + ["chat_batch"] * 3
            + ["evaluate", "merge", "export", "from_pretrained", "sft", "check", "plan"]
        )
    )
    images = st.lists(st.sampled_from(IMAGES), max_size=3) | st.sampled_from(IMAGES) | weird
    if name == "chat":
        prompt = text | st.lists(message, max_size=4) | weird
        keywords = {
            **draw(bounded_options),
            **({"images": draw(images)} if draw(st.booleans()) else {}),
        }
        return Case("python", ["python", name, [draw(prompt)], keywords])
    if name == "chat_batch":
        requests = st.lists(request | text | weird, max_size=3) | weird
        return Case("python", ["python", name, [draw(requests)], draw(bounded_options)])
    place = (
        st.sampled_from(
            ["run", "merged", "nope", ".", "messages.jsonl", "recipe.yaml", "", "a" * 300]
        )
        | weird
    )
    keywords: dict[str, Any] = {}
    if name in ("evaluate", "merge", "export", "from_pretrained") and draw(st.booleans()):
        keywords["dtype"] = draw(st.sampled_from(["bf16", "fp32", "half", "int8"]) | weird)
    if name == "evaluate" and draw(st.booleans()):
        keywords |= {
            "split": draw(st.sampled_from(["test", "validation", "train"]) | weird),
            "limit": draw(st.just(2) | weird),
        }
    if name == "export":
        keywords["format"] = draw(st.sampled_from(["llava", "adapter", "gguf"]) | weird)
    arguments = [draw(place)]
    if name in ("merge", "export"):
        arguments.append(draw(st.just("new") | place))
    if name == "sft":
        arguments = [draw(st.just("recipe.yaml") | place)]
        keywords = {
            "overrides": draw(
                st.dictionaries(st.sampled_from(sorted(SETTINGS)) | text, weird, max_size=2) | weird
            )
        }
    return Case("python", ["python", name, arguments, keywords], base_recipe("causal"))


@st.composite
def folder_cases(draw: st.DrawFn) -> Case:
    """A run's folder or the cache with a file damaged, then used."""
    damage = draw(st.sampled_from(["cut", "empty", "flip", "remove", "text", "folder"]))
    use = draw(
        st.sampled_from(
            [
                ["cli", "sft", "recipe.yaml", "--resume"],
                ["cli", "eval", "run", "--split", "validation", "--limit", "1"],
                ["cli", "merge", "run", "--output", "new"],
                ["cli", "chat", "run", "--prompt", "hi"],
                ["cli", "verify-run", "run"],
                ["cli", "export", "run", "--format", "adapter", "--output", "new"],
                ["cli", "sft", "recipe.yaml", "--set=output=other"],
            ]
        )
    )
    return Case(
        "folder",
        use,
        None,
        {"damage": ("damage", damage, draw(st.integers(0, 10**6)), draw(st.booleans()))},
    )


KINDS = {
    "recipe": (recipe_cases(), 48),
    "override": (override_cases(), 17),
    "row": (row_cases(), 10),
    "training": (training_cases(), 11),
    "command": (command_cases(), 4),
    "python": (python_cases(), 8),
    "folder": (folder_cases(), 2),
}
"""The strategies, and of a hundred cases how many are drawn from each."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A case of any kind."""
    names = [name for name, (_, share) in KINDS.items() for _ in range(share)]
    return draw(KINDS[draw(st.sampled_from(names))][0])


def drawn(seed: str, kind: str | None = None) -> Case:
    """The case of a seed: of the kind, or of any.

    Hypothesis's own search repeats and varies what it drew before, to shrink failures; here each
    case stands alone, and its seed gives it again.
    """
    data = ConjectureData(random=Random(seed))
    with BuildContext(data, is_final=False, wrapped_test=lambda: None):
        return data.draw(KINDS[kind][0] if kind else cases())
