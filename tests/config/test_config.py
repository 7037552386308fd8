"""The recipe: what it admits, how its errors are placed, and that it reads back equal."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlm_tune.config.load import (
    changed_recipe,
    check_recipe,
    dump_recipe,
    load_recipe,
    parse_recipe,
    recipe_schema,
)
from vlm_tune.config.model import ModelSection, PretrainedModel
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.schema_errors import OLD_NAMES
from vlm_tune.config.yaml_source import Located, apply_override, read_yaml, read_yaml_text
from vlm_tune.errors import RecipeError
from vlm_tune.resources import resource_folder

RECIPES = sorted(resource_folder("recipes").rglob("*.yaml"))
SMALL = """\
name: small
output: runs/small
model:
  tower: {kind: transformers, name: clip}
  llm: {kind: causal, name: llama}
data:
  train: [{kind: file, path: rows.jsonl}]
  template: chatml
tune:
  - {match: "tower.*", how: frozen}
  - {match: "connector.*", how: full}
  - {match: "llm.*", how: lora, r: 8, lora_alpha: 16, target_modules: [q_proj]}
train: {epochs: 1}
"""
STAGED = (
    SMALL
    + """\
stages:
  - name: align
    data: {max_length: 64}
    tune: [{match: "connector.*", how: full}, {match: "*", how: frozen}]
    train: {epochs: null, steps: 5}
  - name: instruct
    objective: {kind: language_modeling}
"""
)


def problems(text: str, *overrides: str) -> list[tuple[str, str]]:
    with pytest.raises(RecipeError) as caught:
        located = read_yaml_text(text, "r.yaml")
        for override in overrides:
            apply_override(located, override)
        check_recipe(located)
    assert caught.value.exit_code == 2
    return [(problem.where, problem.message) for problem in caught.value.problems]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_reads_back_equal(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(dump_recipe(recipe)) == recipe
    stages = recipe.resolved_stages()
    assert [name for name, _ in stages] == ([stage.name for stage in recipe.stages] or ["main"])
    # A stage alone is a whole recipe as well.
    for _, stage in stages:
        assert parse_recipe(dump_recipe(stage)) == stage and not stage.stages


def test_there_are_shipped_recipes() -> None:
    assert RECIPES


def test_stages_change_only_what_they_name() -> None:
    recipe = parse_recipe(STAGED)
    assert parse_recipe(dump_recipe(recipe)) == recipe
    (_, align), (_, instruct) = recipe.resolved_stages()
    assert (align.data.max_length, instruct.data.max_length) == (64, 2048)
    assert (align.train.steps, align.train.epochs, instruct.train.epochs) == (5, None, 1)
    assert [rule.how for rule in align.tune] == ["full", "frozen"] and instruct.tune == recipe.tune
    assert align.data.train == recipe.data.train and align.model == recipe.model


def test_a_stages_part_of_another_kind_replaces_the_common_one() -> None:
    text = STAGED.replace(
        "train: {epochs: 1}\n",
        "train: {epochs: 1}\nobjective: {kind: contrastive, temperature: 0.5}\n",
    )
    text = text.replace("template: chatml\n", "template: chatml\n  group: image\n")
    (_, align), (_, instruct) = parse_recipe(text).resolved_stages()
    assert align.objective.kind == "contrastive" and align.objective.temperature == 0.5
    assert instruct.objective.kind == "language_modeling"
    text = text.replace("{kind: language_modeling}", "{kind: contrastive}")
    merged = parse_recipe(text).resolved_stages()[1][1].objective
    assert merged.kind == "contrastive" and merged.temperature == 0.5


@pytest.mark.parametrize("part", ["tune", "objective"])
def test_a_null_part_of_a_stage_is_the_common_one(part: str) -> None:
    recipe = parse_recipe(
        STAGED.replace(
            "  - name: instruct\n    objective: {kind: language_modeling}\n",
            f"  - {{name: b, {part}: null}}\n",
        )
    )
    stage = recipe.resolved_stages()[1][1]
    assert getattr(stage, part) == getattr(recipe, part)
    assert parse_recipe(dump_recipe(recipe)) == recipe


# --- places ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        (
            "max_length: 64",
            "max_length: -1",
            "16:24",
            "stages.0.data.max_length: input should be greater than 0, got -1",
        ),
        (
            "max_length: 64",
            "maxlength: 64",
            "16:12",
            "unknown key 'maxlength'; did you mean max_length?",
        ),
        ("steps: 5", "epochs: 2", "18:27", "duplicate key 'epochs', first given at r.yaml:18:13"),
        (
            "steps: 5",
            "learning_rate: 1",
            "18:12",
            "give exactly one of train.epochs and train.steps",
        ),
        (
            "epochs: null, steps",
            "steps",
            "18:20",
            "give exactly one of train.epochs and train.steps",
        ),
        (
            '{match: "*", how: frozen}',
            '{match: "connector.proj", how: full}',
            "17:55",
            "never reached: 'connector.*' above matches first",
        ),
        (
            '"connector.*", how: full}, {',
            '"connector.*", how: frozen}, {',
            "17:11",
            "every rule is frozen, nothing would train",
        ),
        ("{kind: language_modeling}", "{kind: contrastiv}", "20:16", "did you mean contrastive?"),
        (
            "{kind: language_modeling}",
            "{kind: contrastive}",
            "19:5",
            "a contrastive objective compares images",
        ),
        (
            "{kind: language_modeling}",
            "{kind: contrastive, loss: clip}\n    data: {group: image}\n"
            "    train: {epochs: 1, batch_size: 1}",
            "22:36",
            "one row has no negatives",
        ),
        (
            "{kind: language_modeling}",
            "{kind: contrastive, loss: clip, bias: -5}\n    data: {group: image}",
            "20:54",
            "bias needs loss: siglip",
        ),
        ("name: instruct", "name: align", "19:11", "a stage before it is called 'align' too"),
        ("name: instruct", "name: a/b", "19:11", "expected letters, digits"),
        (
            "max_length: 64",
            "test: [{kind: file, path: t}]",
            "16:18",
            "only the last stage's test part is scored",
        ),
    ],
)
def test_a_stages_errors_are_placed_at_the_stage(
    old: str, new: str, place: str, message: str
) -> None:
    assert old in STAGED
    errors = problems(STAGED.replace(old, new, 1))
    assert len(errors) == 1, errors
    assert message in errors[0][1]
    assert errors[0][0] == f"r.yaml:{place}"


def test_a_fault_of_the_common_part_is_told_once_and_where_it_is() -> None:
    errors = problems(
        STAGED.replace("template: chatml", "template: chatml\n  max_length: 0\n  bogus: 1")
    )
    assert [where for where, _ in errors] == ["r.yaml:9:15", "r.yaml:10:3"]
    errors = problems(STAGED.replace("{epochs: 1}", "{epochs: 1}\nobjective: {kind: contrastive}"))
    assert [where for where, _ in errors] == ["r.yaml:7:3"]
    errors = problems(STAGED.replace("  template: chatml\n", ""))
    assert errors == [("r.yaml:7:3", "data.template is required")]


def test_a_missing_key_is_placed_at_its_parent_and_unions_hide_nothing() -> None:
    assert problems(SMALL.replace("{kind: file, path: rows.jsonl}", "{kind: file}")) == [
        ("r.yaml:7:11", "data.train.0.path is required")
    ]
    (error,) = problems(SMALL.replace("kind: transformers, ", ""))
    assert error == ("r.yaml:4:10", "model.tower: needs a `kind`")
    (error,) = problems(SMALL.replace("kind: file", "kind: fil"))
    assert error[0] == "r.yaml:7:11" and "did you mean file?" in error[1]
    errors = problems(SMALL.replace("[q_proj]", "[q_proj, 5]"))
    assert "r.yaml:12:80" in [where for where, _ in errors]
    assert not [message for _, message in errors if "list[" in message or "literal[" in message]


def test_folded_and_quoted_texts_are_what_yaml_says() -> None:
    text = SMALL.replace(
        "template: chatml", "template: chatml\n  system: >-\n    one two\n    three\n\n    four"
    )
    assert parse_recipe(text).data.system == "one two three\nfour"


# --- overrides ---------------------------------------------------------------------------------


def test_overrides_reach_keys_list_places_and_parts_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    recipe = load_recipe(
        path,
        [
            "train.epochs=null",
            "train.steps=7",
            "tune.2.r=4",
            "data.train.0.path=other",
            "evaluate.limit=3",
            "tune.2.target_modules=[a, b]",
        ],
    )
    assert (
        recipe.train.steps,
        recipe.tune[2].r,
        recipe.evaluate.limit,
        recipe.tune[2].target_modules,
    ) == (7, 4, 3, ["a", "b"])
    assert getattr(recipe.data.train[0], "path") == "other"  # noqa: B009
    assert load_recipe(path, ["train={steps: 1}"]).train.steps == 1
    assert load_recipe(path, ["data.system=a=b: c"[:14]]).data.system == "a="
    assert (
        load_recipe(path, {"data.system": "蓝 😀 \n: #", "train.batch_size": 3}).data.system
        == "蓝 😀 \n: #"
    )
    assert path.read_text() == SMALL


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.compile=maybe", "train.compile: expected auto or true or false, got 'maybe'"),
        ("train.loader_workers=many", "train.loader_workers: expected auto or an integer, got"),
        ("train.loader_workers=-1", "train.loader_workers: input should be greater than or equal"),
        ("evaluate.baselines=[x]", "evaluate.baselines.0: 'x' is not one of majority"),
        ("data.train.0.form=vqaa", "retrieval, ocr, translate, grounding or auto, got 'vqaa'"),
        (
            "objective={kind: grpo, reward_funcs: [{function: format}]}",
            "objective.reward_funcs.0.arguments is required",
        ),
        (
            "objective={kind: grpo, reward_funcs: [{function: format, arguments: 3}]}",
            "objective.reward_funcs.0.arguments: expected keys and values, got 3",
        ),
        (
            "objective={kind: grpo, reward_funcs: [3]}",
            "objective.reward_funcs.0: expected text or keys and values, got 3",
        ),
        ("model.quantise=nf4", "unknown key 'quantise'; did you mean model.llm.quantize?"),
        ("model.name=x", "unknown key 'name'; here it is model.pretrained"),
    ],
)
def test_a_value_that_fits_no_alternative_is_one_problem(override: str, message: str) -> None:
    located = read_yaml_text(SMALL, "r.yaml")
    apply_override(located, override)
    with pytest.raises(RecipeError) as caught:
        check_recipe(located)
    about = [each for each in caught.value.problems if message.partition(":")[0] in each.message]
    assert [message in problem.message for problem in about] == [True]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "written key.key=value"),
        ("=5", "written key.key=value"),
        ("tune.7.r=4", "tune is a list of 3; '7' is not one of its places"),
        ("tune.-1.r=4", "'-1' is not one of its places"),
        ("tune.x.r=4", "'x' is not one of its places"),
        ("tune.².r=4", "'²' is not one of its places"),
        ("name.first=x", "name is a plain value, it has no key 'first'"),
        ("tune.0.match.x=1", "tune.0.match is a plain value, it has no key 'x'"),
        ("train.epoch=2", "unknown key 'epoch'; did you mean epochs"),
        ("train.epochs=many", "train.epochs: expected a number"),
        ("train.epochs=[", "not YAML"),
        ("train.epochs=!!python/name:os.system ''", "is not allowed"),
        ("tune.0={match: x, how: full, how: lora}", "duplicate key 'how'"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        located = read_yaml_text(SMALL, "r.yaml")
        apply_override(located, override)
        check_recipe(located)
    assert message in str(caught.value)
    assert all(problem.where.startswith(f"--set {override}") for problem in caught.value.problems)


def test_a_fault_in_a_replaced_part_is_the_overrides() -> None:
    text = SMALL.replace("{epochs: 1}", "{epochs: 1, bogus: 1}")
    assert problems(text, "train={epochs: 1, bogus: 1}")[0][0].startswith("--set train=")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=1", "here it is train.learning_rate"),
        ("lr=1", "here it is train.learning_rate"),
        ("rank=8", "here it is tune.2.r (of a LoRA rule)"),
        ("tune.0.rank=8", "here it is tune.2.r (of a LoRA rule)"),
        ("alpha=16", "here it is tune.2.lora_alpha (of a LoRA rule)"),
        ("batch=3", "here it is train.batch_size"),
        ("epoch=2", "here it is train.epochs"),
        ("epochs=2", "did you mean train.epochs?"),
        ("keep=3", "did you mean train.checkpoints.keep?"),
        ("max_new_token=3", "did you mean evaluate.max_new_tokens?"),
        ("data.train.0.pth=x", "did you mean path?"),
        ("tune.7.r=4", "tune.0 (tower.* frozen), tune.1 (connector.* full), tune.2 (llm.* lora)"),
        ("output='a\udcff'", "UTF-8 text"),
        ("a\udcff=1", "UTF-8 text"),
        ('output="a\\0b"', "contains a NUL"),
        ('output="\\ud83d"', "half of a surrogate pair"),
        (f"name={'x/' * 300}", "(600 characters)"),
        ("train=", "expected keys and values, got nothing (null)"),
    ],
)
def test_an_override_that_is_no_key_is_told_the_right_name(
    override: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [override])
    assert message in str(caught.value)
    assert all(
        problem.where.startswith("--set ") and problem.where.isprintable()
        for problem in caught.value.problems
    )
    assert len(str(caught.value)) < 700


def test_a_length_set_by_an_override_replaces_the_other_kind(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    notes: list[str] = []
    recipe = load_recipe(path, ["train.steps=3"], note=notes.append)
    assert (recipe.train.steps, recipe.train.epochs) == (3, None)
    assert notes == ["train.steps: 3 replaces train.epochs: 1"]
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["train.steps=3", "train.epochs=2"])
    assert [problem.where for problem in caught.value.problems] == ["--set train.steps=3"]


def test_a_length_set_by_an_override_holds_in_every_stage(tmp_path: Path) -> None:
    notes: list[str] = []
    path = tmp_path / "staged.yaml"
    path.write_text(STAGED)
    assert "{epochs: null, steps: 5}" in STAGED
    stages = [
        stage.train
        for _, stage in load_recipe(path, ["train.epochs=0.5"], note=notes.append).resolved_stages()
    ]
    assert [(train.epochs, train.steps) for train in stages] == [(0.5, None), (0.5, None)]
    assert notes == ["train.epochs: 0.5 replaces stages.0.train.steps: 5"]
    first, second = load_recipe(
        path, {"stages.1.train.steps": 7}, note=notes.append
    ).resolved_stages()
    assert (first[1].train.steps, second[1].train.steps, second[1].train.epochs) == (5, 7, None)
    assert notes[1:] == ["stages.1.train.steps: 7 replaces train.epochs: 1 for this stage"]


def test_a_loaded_recipe_is_changed_as_by_overrides_and_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "staged.yaml"
    path.write_text(STAGED)
    recipe = load_recipe(path, ["seed=3"])
    before = dump_recipe(recipe)
    values = {"stages.1.train.steps": 7, "train.learning_rate": 1e-05}
    assert changed_recipe(recipe, values) == load_recipe(path, {"seed": 3, **values})
    assert dump_recipe(recipe) == before
    built = Recipe.model_validate(recipe.model_dump(exclude_unset=True))
    assert changed_recipe(built, values) == changed_recipe(recipe, values)
    with pytest.raises(RecipeError) as caught:
        changed_recipe(recipe, {"seed": -1}, option="--search")
    assert [problem.where for problem in caught.value.problems] == ["--search seed=-1"]


@pytest.mark.parametrize(
    ("content", "place", "message"),
    [
        (b"name: caf\xe9\n", ":1:10", "not UTF-8 text"),
        (b"name: a\noutput: b\x00\n", ":2:10", "the character U+0000 is not allowed"),
        (b"", ":1:1", "this file holds nothing"),
        (b"- a\n", ":1:1", "this file holds a list"),
        (b"5\n", ":1:1", "this file holds a plain value"),
        (b"a: [1,\n", ":2:1", "not YAML"),
        (b"[" * 100_000, ":1:1", "nested too deeply"),
        (b"a: 1\n" * 300_000, "", "larger than 1,000,000 bytes"),
    ],
)
def test_a_file_that_is_no_recipe_is_told_where(
    content: bytes, place: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    (problem,) = caught.value.problems
    assert problem.where == f"{path}{place}" and message in problem.message


def test_a_path_that_is_no_file_is_told(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "is a folder"),
        ("n" * 300, "no such recipe file"),
        ("a\0b", "no such recipe file"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)


@pytest.mark.parametrize(
    "overrides",
    ["train.epochs=2", [5], 5, {"train.epochs": {1}}, {"train.epochs": object()}, {5: 1}],
)
def test_overrides_of_another_type_are_refused(overrides: Any, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    with pytest.raises(RecipeError):
        load_recipe(path, overrides)


# --- round trips and fuzz ----------------------------------------------------------------------

printable = st.text(
    st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs"))
    | st.sampled_from("\n\t#:'\"\\- "),
    max_size=120,
)


@given(
    printable
    | st.sampled_from(
        [
            "no",
            "1e-5",
            "null",
            "~",
            "0x10",
            "1_000",
            ".inf",
            "2020-01-01",
            " a",
            "a ",
            "- a",
            "{a}",
            "&a",
            "<<",
            "%",
        ]
    )
)
@settings(max_examples=50, deadline=None)
def test_a_dumped_text_reads_back_as_it_was(text: str) -> None:
    recipe = parse_recipe(SMALL)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"system": text})})
    assert parse_recipe(dump_recipe(recipe)) == recipe


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else []
    )
    return [prefix, *(inner for key, child in children for inner in paths(child, (*prefix, key)))]


DEMO = read_yaml(resource_folder("recipes") / "demo.yaml").value
BASES = [DEMO, read_yaml_text(SMALL, "r").value, read_yaml_text(STAGED, "r").value]
PLACES = [(base, path) for base in range(len(BASES)) for path in paths(BASES[base]) if path]
keys = st.sampled_from([*OLD_NAMES, "kind", "match", "how", "r", "name", "train", "", "a b", "0"])
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 10**30)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["lora", "frozen", "*", "llm"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=5,
)


@example([((0, ("data", "train")), True)])
@example([((0, ("output",)), "a\x85b\u2028")])
@given(st.lists(st.tuples(st.sampled_from(PLACES), values | st.just(...)), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_whatever_a_recipe_holds_it_runs_or_is_a_recipe_error(
    changes: list[tuple[tuple[int, tuple[Any, ...]], Any]],
) -> None:
    value = copy.deepcopy(BASES[changes[0][0][0]])
    for (_, path), new in changes:
        target = value
        try:
            for part in path[:-1]:
                target = target[part]
            if new is ...:
                del target[path[-1]]
            else:
                target[path[-1]] = new
        except (KeyError, IndexError, TypeError):
            continue
    try:
        recipe = check_recipe(Located(value))
    except RecipeError as error:
        assert error.problems and all(
            problem.where and problem.message for problem in error.problems
        )
        return
    for _, stage in recipe.resolved_stages():
        assert isinstance(stage, Recipe)
    assert parse_recipe(dump_recipe(recipe)) == recipe


@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(
            [
                "a",
                ":",
                " ",
                "\n",
                "- ",
                "&x ",
                "*x",
                "!!int ",
                "! ",
                "[",
                "]",
                "{",
                "}",
                "? ",
                "'",
                "|",
                "%",
                "---",
            ]
        )
    ).map("".join)
)
@settings(max_examples=150, deadline=None)
def test_whatever_a_file_holds_it_is_a_recipe_error(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    assert all(problem.where.startswith("r.yaml") for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("old", "new", "count"),
    [
        ("{epochs: 1}", "{epochs: 1, steps: 1}", 1),
        ("{epochs: 1}", "{}", 1),
        ("name: llama", "name: llama, scratch: {model_type: x, config: {}}", 1),
        (", name: llama", "", 1),
        (", name: llama", ", gguf_file: x", 2),
        ("{kind: causal, name: llama}", "{kind: seq2seq, name: t5}\ntrain_: 1", 1),
        ("how: frozen}", "how: frozen, learning_rate: 1.0}", 1),
        ("how: frozen}", "how: frozen, r: 1, lora_dropout: 0.1}", 2),
        ('"connector.*", how: full', '"c*", how: lora', 1),
        (
            '"connector.*", how: full',
            '"connector.*", how: full, layers: 2, variant: dora, lora_plus_ratio: 4, tokens: 3',
            4,
        ),
        ('"connector.*", how: full', '"connector.*", how: norms, layer_decay: 0.5', 1),
        ('"connector.*", how: full', '"connector.*", how: full, layer_decay: 1.5', 1),
        ("how: lora, r: 8, lora_alpha: 16, target_modules: [q_proj]", "how: last_layers", 1),
        ("how: lora, r: 8,", "how: lora, r: 8, variant: dora, init: pissa,", 1),
        ("how: lora, r: 8,", "how: lora, r: 8, layer_decay: 0.9,", 1),
        (
            '"llm.*", how: lora, r: 8, lora_alpha: 16, target_modules: [q_proj]',
            '"tower.x", how: full',
            1,
        ),
        ("\ndata:", "\n  boxes: {unit: loc, style: parentheses}\ndata:", 1),
        ("\ndata:", "\n  boxes: {unit: pixels, decimals: 2}\ndata:", 1),
        ("{epochs: 1}", "{epochs: .inf}", 1),
        ("{epochs: 1}", "{epochs: .nan}", 1),
        ("{epochs: 1}", "{epochs: 1, betas: [0.9]}", 1),
        ("{epochs: 1}", "{epochs: 1}\nseed: 4294967296", 1),
        ("{epochs: 1}", "{epochs: 1, schedule: {warmup: 1}}", 1),
    ],
)
def test_contradictions_and_ranges(old: str, new: str, count: int) -> None:
    assert old in SMALL
    assert len(problems(SMALL.replace(old, new, 1))) == count


MIXED = SMALL.replace(
    "train: [{kind: file, path: rows.jsonl}]",
    "train: [{kind: file, path: a.jsonl}, {kind: file, path: b.jsonl, loss_weight: 2}]\n"
    "  mixture: {temperature: 2}\n  epoch_size: 9",
)


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ("temperature: 2", "temperature: 0.5", "data.mixture.temperature", "greater than or equal"),
        ("a.jsonl", "a.jsonl, weight: 2", "data.train.0.weight", "shares by size"),
        ("\n  mixture: {temperature: 2}", "", "data.epoch_size", "and there are none"),
        ("loss_weight: 2", "loss_weight: 0", "data.train.1.loss_weight", "greater than 0"),
        ("loss_weight: 2", "task_name: a b", "data.train.1.task_name", "letters, digits"),
        (
            "  template",
            "  validation: [{kind: file, path: a.jsonl, loss_weight: 2}]\n  template",
            "data.validation.0.loss_weight",
            "scored row by row",
        ),
        (
            "tune:",
            "  group: image\nobjective: {kind: contrastive}\ntune:",
            "data.train",
            "loss_weight must be equal",
        ),
    ],
)
def test_faults_of_mixtures(old: str, new: str, place: str, message: str) -> None:
    assert parse_recipe(MIXED).data.mixture
    ((_, text),) = problems(MIXED.replace(old, new, 1))
    assert message in text
    located = read_yaml_text(MIXED.replace(old, new, 1), "r.yaml")
    with pytest.raises(RecipeError) as caught:
        check_recipe(located)
    keys = tuple(int(key) if key.isdigit() else key for key in place.split("."))
    assert caught.value.problems[0].where == located.where(keys)


def test_a_mixture_needs_sources_without_a_count_and_rows_at_hand() -> None:
    counted = MIXED.replace("a.jsonl", "a.jsonl, count: 3").replace("b.jsonl", "b.jsonl, count: 3")
    assert ["every source has one" in message for _, message in problems(counted)] == [True]
    stream = ["data.streaming=true", "data.own_shards=true", "train={steps: 3}"]
    messages = [message.split()[0] for _, message in problems(MIXED, *stream)]
    assert sorted(messages) == ["a", "epoch_size", "mixture"]


SHARED = SMALL.replace(
    "train: [{kind: file, path: rows.jsonl}]",
    "train: [{kind: file, path: a.jsonl, task_name: a}, {kind: file, path: b.jsonl, task_name: b}]"
    "\n  test: [{kind: file, path: c.jsonl, task_name: b}]",
).replace("[q_proj]", "[q_proj], sharing: soft, tie: 0.1")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (", tie: 0.1", "", "sharing: soft needs tie"),
        ("soft, tie: 0.1", "layered", "sharing: layered needs shared_layers"),
        ("soft, tie: 0.1", "hard, tie: 1", "tie belongs to sharing: soft"),
        ("tie: 0.1", "tie: 1, shared_layers: 1", "shared_layers belongs to sharing: layered"),
        ("tie: 0.1", "tie: 1, init: pissa", "PiSSA's frozen adapter is one"),
        (
            '"tower.*", how: frozen',
            '"tower.*", how: lora, sharing: soft, tie: 1',
            "on the llm alone",
        ),
        ('"tower.*", how: frozen', '"tower.*", how: full, tie: 1', "tie belongs to how: lora"),
        ("a.jsonl, task_name: a", "a.jsonl", "sharing: soft needs a task_name"),
        ("task_name: a}", "task_name: b}", "sharing: soft needs two tasks or more"),
        ("task_name: a}", "task_name: a.b}", "is named by letters, digits, _ and -"),
        ("task_name: a}", "task_name: default}", "and not default or initial"),
        ("c.jsonl, task_name: b", "c.jsonl, task_name: c", "no source of data.train has the task"),
        ("{epochs: 1}", "{epochs: 1}\nengine: {kind: fsdp}", "use ddp, or deepspeed with stage 2"),
        ("{epochs: 1}", "{epochs: 1}\nengine: {kind: deepspeed, stage: 3}", "sharded weights"),
        ("{epochs: 1}", "{epochs: 1}\nobjective: {kind: simpo}", "is for objective.kind: language"),
        ("{epochs: 1}", "{epochs: 1}\nevaluate: {also: {x: x.jsonl}}", "have no adapter with"),
        (
            "  template",
            "  streaming: true\n  own_shards: true\n  template",
            "a micro-batch is of one task on all processes",
        ),
    ],
)
def test_faults_of_adapters_of_tasks(old: str, new: str, message: str) -> None:
    assert parse_recipe(SHARED).tune[2].by_task
    assert old in SHARED
    assert any(message in text for _, text in problems(SHARED.replace(old, new, 1)))


def test_names_of_metrics_and_baselines_are_checked() -> None:
    good = SMALL + "\nevaluate: {metrics: [exact_match, my.module:score], baselines: [blind]}"
    assert parse_recipe(good).evaluate.metrics == ["exact_match", "my.module:score"]
    (error,) = problems(good.replace("exact_match", "exact_mach"))
    assert "'exact_mach' is no metric" in error[1] and "did you mean exact_match?" in error[1]
    (error,) = problems(good.replace("my.module:score", "exact_match"))
    assert "'exact_match' comes twice" in error[1]
    assert len(problems(good.replace("my.module:score", "my module:score"))) == 1
    messages = [message for _, message in problems(good.replace("[blind]", "[deaf]"))]
    assert any("'deaf' is not one of majority, same_question" in message for message in messages)
    for value in ("[]", "[[1], 5]", "exact_match"):
        assert problems(good.replace("[exact_match, my.module:score]", value))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("{metrics: [anls, bleu], best: bleu}", None),
        ("{metrics: [anls], best: loss}", None),
        ("{best: exact_match}", None),
        ("{metrics: [anls], best: exact_match}", "'exact_match' is not one of anls, loss"),
        ("{best: anls}", "'anls' is not one of exact_match, loss: name it in evaluate.metrics"),
    ],
)
def test_the_best_checkpoint_goes_by_a_metric_that_is_computed(
    settings: str, expected: str | None
) -> None:
    text = f"{SMALL}\nevaluate: {settings}"
    if expected is None:
        assert parse_recipe(text).evaluate.best is not None
    else:
        ((_, message),) = problems(text)
        assert expected in message


def test_a_quantised_llm_is_not_trained_in_full_and_t5_not_in_fp16() -> None:
    quantised = SMALL.replace("name: llama", "name: llama, quantize: nf4")
    assert parse_recipe(quantised).model.llm.quantize == "nf4"
    (error,) = problems(
        quantised.replace("how: lora, r: 8, lora_alpha: 16, target_modules: [q_proj]", "how: full")
    )
    assert "quantised weights can't be trained" in error[1] and error[0].startswith("r.yaml:12:")
    (error,) = problems(
        quantised.replace(
            "how: lora, r: 8, lora_alpha: 16, target_modules: [q_proj]",
            "how: last_layers, layers: 1",
        )
    )
    assert "quantised weights can't be trained" in error[1]
    parse_recipe(
        quantised.replace("how: lora, r: 8, lora_alpha: 16, target_modules: [q_proj]", "how: norms")
    )
    (error,) = problems(quantised.replace("how: lora, r: 8,", "how: lora, r: 8, init: pissa,"))
    assert "PiSSA takes the singular vectors of 16-bit weights" in error[1]
    seq2seq = SMALL.replace("kind: causal", "kind: seq2seq").replace(
        "{epochs: 1}", "{epochs: 1, precision: fp16}"
    )
    assert problems(seq2seq) == [
        ("r.yaml:13:31", "T5's activations overflow in fp16; use bf16 or fp32")
    ]
    (error,) = problems(
        SMALL.replace("name: llama", "quantize: int8, scratch: {model_type: llama, config: {}}")
    )
    assert "nothing to quantise" in error[1]


# --- the schema --------------------------------------------------------------------------------


def schema_faults(
    value: Any, schema: dict[str, Any], root: dict[str, Any], place: str = "recipe"
) -> list[str]:
    """Errors of `value` under JSON Schema 2020-12, for the keywords that pydantic writes.

    An unknown keyword is an error.
    """
    types = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
        "number": (int, float),
    }
    faults: list[str] = []
    for word, rule in schema.items():
        if word == "$ref":
            target = root
            for part in rule.removeprefix("#/").split("/"):
                target = target[part]
            faults += schema_faults(value, target, root, place)
        elif word in ("anyOf", "oneOf"):
            fits = [option for option in rule if not schema_faults(value, option, root, place)]
            if not fits or (word == "oneOf" and len(fits) > 1):
                faults.append(f"{place}: fits {len(fits)} of {word}")
        elif word == "type":
            is_number = rule in ("integer", "number") and isinstance(value, bool)
            if is_number or not isinstance(value, types[rule]):
                faults.append(f"{place}: not of type {rule}")
        elif word == "properties":
            for name, inner in rule.items():
                if isinstance(value, dict) and name in value:
                    faults += schema_faults(value[name], inner, root, f"{place}.{name}")
        elif word == "required":
            faults += [
                f"{place}.{name} is missing"
                for name in rule
                if isinstance(value, dict) and name not in value
            ]
        elif word == "additionalProperties":
            if rule is False and isinstance(value, dict):
                faults += [
                    f"{place}.{name} is unknown"
                    for name in value
                    if name not in schema.get("properties", {})
                ]
        elif word == "items":
            faults += [
                fault
                for n, item in enumerate(value if isinstance(value, list) else [])
                for fault in schema_faults(item, rule, root, f"{place}.{n}")
            ]
        elif word in ("enum", "const"):
            if value not in (rule if word == "enum" else [rule]):
                faults.append(f"{place}: {value!r} is not {rule}")
        elif word in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if (
                isinstance(value, int | float)
                and not {
                    "minimum": value >= rule,
                    "maximum": value <= rule,
                    "exclusiveMinimum": value > rule,
                    "exclusiveMaximum": value < rule,
                }[word]
            ):
                faults.append(f"{place}: {value} against {word} {rule}")
        elif word == "minLength":
            if isinstance(value, str) and len(value) < rule:
                faults.append(f"{place}: shorter than {rule}")
        elif word in ("minItems", "maxItems"):
            if isinstance(value, list) and (
                len(value) < rule if word == "minItems" else len(value) > rule
            ):
                faults.append(f"{place}: {word}")
        elif word == "pattern":
            if isinstance(value, str) and not re.search(rule, value):
                faults.append(f"{place}: {value!r} against {rule}")
        else:
            assert word in (
                "title",
                "description",
                "default",
                "$defs",
                "$schema",
                "discriminator",
            ), word
    return faults


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_schema_admits_every_shipped_recipe(path: Path) -> None:
    schema = json.loads(json.dumps(recipe_schema()))
    assert schema_faults(read_yaml(path).value, schema, schema) == []
    assert schema_faults(json.loads(load_recipe(path).model_dump_json()), schema, schema) == []


@pytest.mark.parametrize(
    "override",
    [
        "nme=x",
        "train.epochs=-1",
        "tune=[]",
        "model.llm.kind=decoder",
        "name=a b",
        "model.tower.kind=vit",
        "seed=0.5",
    ],
)
def test_the_schema_refuses_what_the_recipe_refuses(override: str) -> None:
    schema, located = recipe_schema(), read_yaml_text(SMALL, "r")
    assert schema_faults(located.value, schema, schema) == []
    apply_override(located, override)
    assert schema_faults(located.value, schema, schema) and problems(SMALL, override)


@pytest.mark.parametrize(
    ("engine", "changes", "message"),
    [
        (
            "{kind: deepspeed, stage: 3}",
            {"model.llm.quantize": "int8"},
            "ZeRO-3 shards weights",
        ),
        ("{kind: fsdp}", {"model.llm.quantize": "int8"}, "fsdp shards weights"),
        (
            "{kind: deepspeed}",
            {"train.precision": "fp16"},
            "fp16 needs loss scaling, which engine ZeRO-2",
        ),
        (
            "{kind: deepspeed, stage: 2, offload: [parameters]}",
            {},
            "only stage 3 shards weights",
        ),
        ("{kind: deepspeed, stage: 0, offload: [optimizer]}", {}, "stage 0 shards nothing"),
        (
            "{kind: deepspeed, stage: 3}",
            {"tune": [{"match": "llm.*", "how": "prompt"}, {"match": "*", "how": "full"}]},
            "virtual tokens",
        ),
        (
            "{kind: fsdp}",
            {
                "model.llm.quantize": "nf4",
                "tune": [
                    {"match": "llm.*", "how": "lora", "variant": "dora"},
                    {"match": "*", "how": "full"},
                ],
            },
            "fsdp shards packed weights, whose norm DoRA computes",
        ),
        ("{kind: deepspeed, stage: 3}", {"tune": 3}, "tune: expected a list, got 3"),
        ("{kind: deepspeed, stage: 4}", {}, "less than or equal to 3"),
        ("{kind: horovod}", {}, "'horovod' is not one of auto, ddp, deepspeed, fsdp"),
    ],
)
def test_engines_refuse_what_they_cant_train(
    engine: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"{SMALL}engine: {engine}\n")
    with pytest.raises(RecipeError) as refused:
        load_recipe(path, changes)
    assert message in str(refused.value)
    assert len(refused.value.problems) == 1


def test_a_tilde_is_the_home_folder_wherever_a_recipe_has_a_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = (
        SMALL.replace("runs/small", "~/runs")
        .replace("name: llama", "name: ~/llama")
        .replace("template: chatml", "template: ~/t.jinja")
    )
    recipe = parse_recipe(text.replace("name: clip", "name: ~/clip"))
    assert isinstance(recipe.model, ModelSection)
    places = [
        recipe.output,
        recipe.model.llm.name,
        recipe.data.template,
        getattr(recipe.model.tower, "name", None),
    ]
    assert places == [f"{tmp_path}/{name}" for name in ("runs", "llama", "t.jinja", "clip")]
    assert (
        parse_recipe(SMALL.replace("runs/small", "~nobody-of-this-name/runs")).output
        == "~nobody-of-this-name/runs"
    )


def test_other_tasks_have_names_that_files_can_have() -> None:
    good = f"{SMALL}\nevaluate: {{also: {{words.v1: words.jsonl}}}}"
    assert parse_recipe(good).evaluate.also == {"words.v1": "words.jsonl"}
    ((_, message),) = problems(good.replace("words.v1", "'../words'"))
    assert "a name may only contain letters, digits, _, . and -" in message


def test_a_written_recipe_overrides_nothing_of_a_checkpoint_that_it_did_not_before() -> None:
    """Options of the tower that are set override the checkpoint's: defaults are not written."""
    head, _, rest = SMALL.partition("model:")
    rest = rest[rest.index("data:") :]
    for extra, options in (("", set()), (", tower: {resize: pad}", {"resize"})):
        recipe = parse_recipe(f"{head}model: {{pretrained: vlm{extra}}}\n{rest}")
        again = parse_recipe(dump_recipe(recipe)).model
        assert isinstance(again, PretrainedModel)
        assert again == recipe.model and again.tower.model_fields_set == options


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("0", "model.tower.layer: input should be less than or equal to -1, got 0"),
        ("[-2, 5]", "model.tower.layer.1: input should be less than or equal to -1, got 5"),
        ("[-2]", "model.tower.layer: expected 2 or more entries, got 1"),
    ],
)
def test_a_value_of_one_kind_is_no_fault_of_the_other(
    layer: str, message: str, tmp_path: Path
) -> None:
    """Where a number or a list may stand."""
    path = tmp_path / "r.yaml"
    path.write_text(SMALL.replace("name: clip}", f"name: clip, layer: {layer}}}"))
    with pytest.raises(RecipeError) as refused:
        load_recipe(path)
    (problem,) = refused.value.problems
    assert message in problem.message


def test_a_text_where_a_list_may_stand_names_both(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"{SMALL}evaluate: {{baselines: probe}}\n")
    with pytest.raises(RecipeError) as refused:
        load_recipe(path)
    (problem,) = refused.value.problems
    assert "expected auto or a list, got 'probe'" in problem.message
