"""Faults 1 to 8 of the list.

A bad recipe ends with exit code 2, names its places, and nothing is touched.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_tune.config.load import load_recipe, parse_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.schema_errors import OLD_NAMES
from vlm_tune.config.yaml_source import MAX_BYTES, read_yaml_text
from vlm_tune.errors import RecipeError

SMALL = """\
name: small
output: out
model:
  tower: {kind: transformers, name: clip}
  llm: {kind: causal, name: llama}
data:
  train: [{kind: file, path: rows.jsonl}]
  template: chatml
tune:
  - {match: "*", how: full}
train: {epochs: 1}
"""


def refused(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_fault_01_unknown_key_gives_place_and_nearest_names() -> None:
    text = SMALL.replace("epochs: 1", "epochs: 1, bach_size: 4").replace(
        "  template", "  maxlength: 5\n  template"
    )
    assert refused(text + "zebra: 1\n") == (
        "r.yaml:8:3: unknown key 'maxlength'; did you mean max_length?\n"
        "r.yaml:12:20: unknown key 'bach_size'; did you mean batch_size?\n"
        "r.yaml:13:1: unknown key 'zebra'; known here: name, output, seed, model, data, "
        "tune, objective, train, evaluate, engine, stages"
    )


FIVE = """\
name: five mistakes
output: {out}
model:
  tower: {{kind: transformer, name: clip}}
  llm: {{kind: causal, name: llama, load_in_4bit: true}}
data:
  train: [{{kind: file, path: rows.jsonl}}]
  template: chatml
  max_length: long
tune:
  - {{match: "*", how: lora}}
train: {{epochs: 1}}
"""


def test_fault_01_five_mistakes_are_told_at_once_and_nothing_is_written_or_loaded(
    tmp_path: Path,
) -> None:
    (tmp_path / "five.yaml").write_text(FIVE.format(out=tmp_path / "out"))
    code = (
        "import sys\nsys.argv = ['vlm-tune', 'sft', 'five.yaml']\nfrom vlm_tune.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    print('torch' in sys.modules, 'transformers' in sys.modules)\n    raise"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == "False False\n"
    lines = done.stderr.splitlines()
    assert lines[0] == "RecipeError" and len(lines) == 6
    for line, (place, words) in zip(
        lines[1:],
        [
            ("1:7", "name"),
            ("4:10", "did you mean transformers?"),
            ("5:36", "model.llm.quantize: nf4"),
            ("9:15", "integer"),
            ("11:13", "LoRA"),
        ],
        strict=True,
    ):
        assert line.startswith(f"five.yaml:{place}: ") and words in line
    assert [path.name for path in tmp_path.iterdir()] == ["five.yaml"]


def test_fault_02_duplicate_keys_are_refused_at_every_depth() -> None:
    assert (
        refused(SMALL + "name: other\n")
        == "r.yaml:12:1: duplicate key 'name', first given at r.yaml:1:1"
    )
    assert "r.yaml:11:20: duplicate key 'epochs', first given at r.yaml:11:9" in refused(
        SMALL.replace("epochs: 1", "epochs: 1, epochs: 2")
    )
    assert "duplicate key 'how'" in refused(SMALL.replace("how: full", "how: full, 'how': frozen"))


def test_fault_03_numbers_and_words_are_what_they_look_like_or_refused() -> None:
    def train(text: str) -> Any:
        return parse_recipe(SMALL.replace("epochs: 1", f"epochs: 1, {text}")).train

    for text in ("1e-5", "1.0e-5", "0.00001", "1E-5", "1e-05"):
        assert train(f"learning_rate: {text}").learning_rate == 1e-5
    assert train("gradient_checkpointing: true").gradient_checkpointing is True
    assert train("batch_size: 1_000").batch_size == 1000
    for text in ("no", "yes", "off", "'true'", "0", "1"):
        message = refused(SMALL.replace("epochs: 1", f"epochs: 1, gradient_checkpointing: {text}"))
        assert "train.gradient_checkpointing: expected true or false" in message
        assert "expected true or false" in refused(
            "%YAML 1.1\n---\n"
            + SMALL.replace("epochs: 1", f"epochs: 1, gradient_checkpointing: {text}")
        )
    for text in ("'1e-5'", "1e-5x", "ten", "true", "[1]", "null"):
        assert "r.yaml:11:35" in refused(
            SMALL.replace("epochs: 1", f"epochs: 1, learning_rate:{' ' * 0} {text}")
        )
    assert parse_recipe(SMALL.replace("name: small", "name: no")).name == "no"
    assert "expected an integer, got 2.0" in refused(
        SMALL.replace("epochs: 1", "epochs: 1, batch_size: 2.0")
    )


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.mkdir", "!mine", "!<x>"]
)
def test_fault_04_tags_that_could_run_code_are_refused(tmp_path: Path, tag: str) -> None:
    touched = tmp_path / "touched"
    assert "is not allowed" in refused(SMALL + f"seed: {tag} ['{touched}']\n")
    assert (
        "is not allowed" in refused(f"{tag}\n" + SMALL.replace("name:", "name:", 1))
        or not touched.exists()
    )
    assert not touched.exists()


def bomb(levels: int = 12) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.slow
def test_fault_05_alias_bombs_loops_and_huge_files_are_refused_in_little_memory(
    tmp_path: Path,
) -> None:
    (tmp_path / "bomb.yaml").write_text(bomb())
    (tmp_path / "huge.yaml").write_text("a: " + "x" * MAX_BYTES)
    (tmp_path / "deep.yaml").write_text("[" * 200_000)
    (tmp_path / "loop.yaml").write_text("a: &a [*a]\n")
    (tmp_path / "wide.yaml").write_text("a: [" + "1, " * 60_000 + "]\n")
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from vlm_tune.config.load import load_recipe
from vlm_tune.errors import RecipeError
import ruamel.yaml
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)
for name in ("bomb", "huge", "deep", "loop", "wide"):
    try:
        load_recipe(name + ".yaml")
    except RecipeError as error:
        print(name, str(error)[:60].replace("\\n", " "))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    messages = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert set(messages) == {"bomb", "huge", "deep", "loop", "wide"}
    assert (
        "larger than" in messages["huge"]
        and "more than 50,000" in messages["bomb"]
        and "more than 50,000" in messages["wide"]
    )


ranges = st.sampled_from(
    [
        ("epochs: 1", "epochs: {}", st.integers(max_value=0) | st.floats(max_value=0)),
        ("epochs: 1", "epochs: 1, batch_size: {}", st.integers(max_value=0)),
        ("epochs: 1", "epochs: 1, learning_rate: {}", st.floats(max_value=0, allow_infinity=False)),
        (
            "epochs: 1",
            "epochs: 1, schedule: {{warmup: {}}}",
            st.floats(min_value=1, max_value=9) | st.integers(1),
        ),
        (
            "name: small",
            "name: small\nseed: {}",
            st.integers(max_value=-1) | st.integers(min_value=2**32),
        ),
        ("how: full", "how: full, r: {}", st.integers(1, 1000)),
        (
            "kind: transformers, name: clip",
            "kind: transformers, name: clip, layer: {}",
            st.integers(0),
        ),
    ]
)


@given(st.data(), st.lists(ranges, min_size=1, max_size=4, unique_by=lambda case: case[0]))
@settings(max_examples=60, deadline=None)
def test_fault_06_values_out_of_range_and_contradictions_are_all_told(
    data: st.DataObject, cases: list[Any]
) -> None:
    text = SMALL
    marks = [(old, new, str(data.draw(values))) for old, new, values in cases]
    for old, new, value in marks:
        text = text.replace(old, new.format(value))
    lines = refused(text).splitlines()
    assert len(lines) == len(cases)
    for _, new, value in marks:
        before = text[: text.index(new.format(value)) + len(new.split("{}")[0].replace("{{", "{"))]
        line, column = before.count("\n") + 1, len(before.rsplit("\n", 1)[-1]) + 1
        assert any(message.startswith(f"r.yaml:{line}:{column}: ") for message in lines), (
            line,
            column,
            lines,
        )


@pytest.mark.parametrize("old", OLD_NAMES)
def test_fault_07_old_names_are_told_their_new_one(old: str) -> None:
    known = set(Recipe.model_fields)
    message = refused(SMALL + f"{old}: 1\n")
    assert (
        message.startswith(f"r.yaml:12:1: unknown key '{old}'; ") and len(message.splitlines()) == 1
    )
    new = OLD_NAMES[old]
    # A key of this very section that is spelled almost so may be named instead.
    assert f"here it is {new}" in message or any(
        f"did you mean {name}" in message for name in known
    )
    section = new.split(".")[0].split(":")[0].split(" ")[0]
    assert section in known


def test_fault_08_a_used_output_folder_is_refused_and_left_as_it_was(
    tmp_path: Path, tiny_recipe: Callable[..., str]
) -> None:
    from vlm_tune.config.load import dump_recipe
    from vlm_tune.run_folder import open_run

    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_recipe())
    recipe = load_recipe(path)
    run = Path(recipe.output)
    text = dump_recipe(recipe)
    # A user's own files, called as a run's.
    for name in (
        "sub/mine.txt",
        "recipe.yaml",
        "model/weights.bin",
        "stages/1-main/trace.jsonl",
        "result.json",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    owned = sorted(run.rglob("*"))
    for overwrite in (
        False,
        True,
    ):  # a folder that is no run is not deleted even when told to overwrite
        with pytest.raises(RecipeError, match="not empty; it was not written by a run"):
            open_run(run, recipe, text, resume=False, overwrite=overwrite, accept_changes=False)
    with pytest.raises(RecipeError, match="no run to resume"):
        open_run(run, recipe, text, resume=True, overwrite=False, accept_changes=False)
    assert sorted(run.rglob("*")) == owned and (run / "recipe.yaml").read_text() == "mine"
    shutil.rmtree(run)
    open_run(run, recipe, text, resume=False, overwrite=False, accept_changes=False)
    step = run / "stages" / "1-main" / "checkpoints" / "step-0000001"
    for name in ("connector.safetensors", "mine.txt"):
        step.mkdir(parents=True, exist_ok=True)
        (step / name).write_text("")
    (step / "manifest.json").write_text(json.dumps({"files": {"connector.safetensors": {}}}))
    for name in ("sub/mine.txt", "model/mine.bin", "stages/1-main/trace.jsonl", "result.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    with pytest.raises(RecipeError, match="--resume continues it"):
        open_run(run, recipe, text, resume=False, overwrite=False, accept_changes=False)
    open_run(run, recipe, text, resume=False, overwrite=True, accept_changes=False)
    left = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    user_files = [
        "model/mine.bin",
        "stages/1-main/checkpoints/step-0000001/mine.txt",
        "sub/mine.txt",
    ]
    assert left == sorted(
        [".vlm_tune-run", *user_files, "recipe.yaml"]
    )  # only what a run wrote is removed
    before = sorted(run.rglob("*"))
    code = f"""
import sys
sys.argv = ["vlm-tune", "sft", {str(path)!r}]
from vlm_tune.cli import main
try:
    main()
except SystemExit as end:
    assert end.code == 2, end.code
assert "torch" not in sys.modules, "torch was loaded"
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "--resume continues it, --overwrite starts over" in process.stderr
    assert sorted(run.rglob("*")) == before
    run.joinpath("recipe.yaml").unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="is a file, not a folder"):
        open_run(
            tmp_path / "file", recipe, text, resume=False, overwrite=True, accept_changes=False
        )


def test_a_reader_problem_names_line_and_column() -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml:2:4: not YAML"):
        read_yaml_text("a: 1\n  b: c: d\n", "r.yaml")
