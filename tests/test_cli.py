"""The command line: what each command prints, and that errors end with their code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from vlm_tune import __version__, resources, run_folder
from vlm_tune.cli import app, main
from vlm_tune.cli.entry import report_bug
from vlm_tune.cli.options import use_device
from vlm_tune.config.load import load_recipe, recipe_schema
from vlm_tune.errors import DataError, Interrupted, ModelError, Problem, RecipeError, TrainingError

run = CliRunner()


def call_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vlm-tune", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert isinstance(end.value.code, int)
    return end.value.code


def test_help_lists_every_command() -> None:
    done = run.invoke(app, ["--help"])
    assert done.exit_code == 0
    for command in ("sft", "eval", "merge", "chat", "show", "schema", "recipes"):
        assert f" {command} " in done.output
        assert run.invoke(app, [command, "--help"]).exit_code == 0


def ctrl_c(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_interrupted_command_says_so(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resources, "resource_names", ctrl_c)
    assert call_main(monkeypatch, "recipes", *options) == 130
    printed = capsys.readouterr()
    if options:
        assert json.loads(printed.out)["error"] == "Interrupted"
    else:
        assert printed.err == "interrupted\n"


def test_an_interrupt_while_an_error_is_printed_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    echo = typer.echo

    def interrupted(text: str, **options: Any) -> None:
        if "RecipeError" in text:
            raise KeyboardInterrupt
        echo(text, **options)

    monkeypatch.setattr(typer, "echo", interrupted)
    assert call_main(monkeypatch, "recipes", "--copy", "no-such-recipe") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_schema_prints_the_recipes_schema() -> None:
    done = run.invoke(app, ["schema"])
    assert done.exit_code == 0 and json.loads(done.stdout) == recipe_schema()


def test_recipes_are_listed_with_what_they_are() -> None:
    rows = json.loads(run.invoke(app, ["recipes", "--json"]).stdout)
    assert [row["name"] for row in rows] == resources.resource_names("recipes")
    text = run.invoke(app, ["recipes"]).stdout
    assert all(row["name"] in text and row["about"] in text for row in rows)
    assert all(row["about"].endswith(".") for row in rows)


def test_a_recipe_is_copied_once_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.invoke(app, ["recipes", "--copy", "demo"]).stdout.strip() == "demo.yaml"
    shipped = resources.find_resource("recipes", "demo")
    assert shipped and load_recipe("demo.yaml") == load_recipe(shipped)
    Path("demo.yaml").write_text("mine")
    assert call_main(monkeypatch, "recipes", "--copy", "demo") == 2
    assert Path("demo.yaml").read_text() == "mine"


def test_a_recipe_of_a_subfolder_is_copied_into_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shipped" / "lora").mkdir(parents=True)
    (tmp_path / "shipped" / "lora" / "big.yaml").write_text("# 大 one\n")
    monkeypatch.setattr(resources, "resource_folder", lambda name: tmp_path / "shipped")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = run.invoke(app, ["recipes", "--copy", "lora/big"])
    assert done.exit_code == 0 and done.stdout.strip() == "big.yaml"
    assert (tmp_path / "here" / "big.yaml").read_text() == "# 大 one\n"


@pytest.mark.parametrize("name", ["nope", "../recipes/demo", "/etc/passwd"])
def test_copying_what_is_not_shipped_names_what_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call_main(monkeypatch, "recipes", "--copy", name) == 2
    assert "demo" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_errors_as_json_carry_every_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x\nnme: y\noutput: 5\n")
    assert call_main(monkeypatch, "sft", str(bad), "--json") == 2
    report = json.loads(capsys.readouterr().out)
    assert report["error"] == "RecipeError"
    assert {"where": f"{bad}:2:1", "message": "unknown key 'nme'; did you mean name?"} in report[
        "problems"
    ]
    assert {"where": f"{bad}:3:9", "message": "output: expected text, got 5"} in report["problems"]
    assert report["message"].count("\n") + 1 == len(report["problems"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError([Problem("r.yaml:1:1", "wrong")]), 2),
        (DataError("wrong", source="rows.jsonl", row=3), 3),
        (ModelError("wrong"), 4),
        (TrainingError("wrong"), 5),
        (Interrupted("wrong"), 130),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_each_error_ends_with_its_code_and_no_traceback(
    error: Exception,
    code: int,
    as_json: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("vlm_tune.cli.train.load", fail)
    assert call_main(monkeypatch, "sft", "x", *(["--json"] if as_json else [])) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err and "wrong" in (out if as_json else err)
    if as_json:
        assert json.loads(out)["error"] == type(error).__name__ and json.loads(out)[
            "message"
        ] == str(error)


def test_a_missing_recipe_and_bad_choices_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_main(monkeypatch, "sft", "no-such") == 2
    assert "no-such: no such recipe file" in capsys.readouterr().err
    assert call_main(monkeypatch, "eval", "x", "--split", "train") == 2
    assert "not one of test, validation" in capsys.readouterr().err
    assert call_main(monkeypatch, "sft", "demo", "--set", "seed=x") == 2
    assert "--set seed=x: seed: expected an integer" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_show_marks_the_trained_tokens_of_a_recipe(
    kind: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_recipe(kind))
    done = run.invoke(app, ["show", str(path), "-n", "2", "--json"])
    assert done.exit_code == 0, done.output
    samples = json.loads(done.stdout)
    assert [sample["stage"] for sample in samples] == ["main", "main"]
    learned = "trained" if kind == "causal" else "target"
    for sample, answer in zip(samples, ("red", "no"), strict=True):
        by_kind = {
            name: "".join(t["text"] for t in sample["tokens"] if t["kind"] == name)
            for name in ("prompt", "image", learned)
        }
        assert by_kind[learned].strip() == answer + ("<|im_end|>" if kind == "causal" else "</s>")
        assert "what color is it?" in by_kind["prompt"] or "is it blue?" in by_kind["prompt"]
        assert sum(t["kind"] == "image" for t in sample["tokens"]) == 4
        assert {t["kind"] for t in sample["tokens"]} == {"prompt", "image", learned}
    text = run.invoke(app, ["show", str(path), "-n", "1", "--ids"])
    assert (
        text.exit_code == 0
        and "[image x4]" in text.stdout
        and f"⟨{samples[0]['tokens'][-1]['id']}⟩" in text.stdout
    )
    assert not (tmp_path / "run").exists()


def test_show_of_bad_data_ends_with_the_data_code(
    tiny_recipe: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_recipe("seq2seq"))
    with (tmp_path / "messages.jsonl").open("a") as file:
        file.write('{"messages": [')
    assert call_main(monkeypatch, "show", str(path)) == 3
    assert "messages.jsonl, row 9: not JSON" in capsys.readouterr().err


# --- the command line as a whole ---------------------------------------------------------------


def test_version_is_told_and_as_json_with_libraries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith(f"vlm_tune {__version__} (Python 3.")
    assert call_main(monkeypatch, "--version", "--json") == 0
    known = json.loads(capsys.readouterr().out)
    assert known["vlm_tune"] == __version__ and known["torch"] == version("torch")
    assert known["transformers"] == version("transformers")


def test_version_loads_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['vlm-tune', '--version', '--json']\nfrom vlm_tune.cli "
        "import main\n"
    )
    code += "try:\n    main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft"], "Missing argument"),
        (["nope"], "nope"),
        (["sft", "demo", "--nope"], "--nope"),
        (["sft", "demo", "--processes", "0"], "--processes"),
        (["--json"], "goes after the command"),
        (["eval", "x", "--device", "tpu"], "'tpu' is not a device: expected cpu, cuda"),
        (
            ["export", "x", "--output", "y", "--device", "tpu"],
            "'tpu' is not a device: expected cpu, cuda",
        ),
        (["verify-run", "x", "--device", "tpu"], "'tpu' is not a device: expected cpu, cuda"),
        (["verify-run", "x", "--device", "cuda:1", "--processes", "2"], "CUDA_VISIBLE_DEVICES"),
        (["sft", "demo", "--device", "cuda:1", "--processes", "2"], "CUDA_VISIBLE_DEVICES"),
        (["chat", "x", "--max-new-tokens", "9999999999"], "--max-new-tokens"),
        (["show", "demo", "-n", "99999999999999999999"], "-n"),
    ],
)
def test_what_the_command_line_can_not_read_is_code_2_and_one_object_as_json(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--json" not in arguments:
        assert call_main(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err
        arguments = [*arguments, "--json"]
    assert call_main(monkeypatch, *arguments) == 2
    report = json.loads(capsys.readouterr().out)
    assert (
        report["error"] == "UsageError"
        and message in report["message"]
        and len(report["problems"]) == 1
    )


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="a GPU is there")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_told(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    assert call_main(monkeypatch, "chat", "x", "--device", device) == 2
    assert f"{device} is not there" in capsys.readouterr().err


def test_a_device_leaves_only_that_one_to_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "device_count", lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    use_device("cuda")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,5"
    use_device("cuda:1")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    use_device("cuda:3")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    use_device("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_an_unforeseen_error_keeps_its_traceback_and_asks_for_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = KeyError("odd")
    report_bug(type(error), error, None)
    stderr = capsys.readouterr().err
    assert "KeyError: 'odd'" in stderr and "fault of vlm_tune" in stderr and __version__ in stderr


@pytest.mark.parametrize(
    "name", ["n" * 300, "a\udcff", "a\0b", "", "/", "/dev/null", "/dev/null/x"]
)
@pytest.mark.parametrize(
    "command",
    [["sft"], ["check"], ["show"], ["eval"], ["chat", "--prompt", "hi"], ["verify-run"], ["plan"]],
)
def test_a_name_that_is_no_file_is_told_and_no_traceback(
    name: str,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call_main(monkeypatch, command[0], name, *command[1:]) in (2, 4)
    assert len(capsys.readouterr().err) < 600


@pytest.mark.parametrize("place", ["n" * 300, ".", "/dev/null/x"])
def test_an_output_that_can_not_be_written_is_told_before_the_work(
    place: str,
    tiny_recipe: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_recipe("causal"))
    # The names of these would be the first thing to go wrong in the work itself.
    for arguments in (
        ["check", str(path), "--html", place],
        ["eval", "no-model", "--answers", place],
    ):
        assert call_main(monkeypatch, *arguments) == 2
        assert "can't be written" in capsys.readouterr().err


def test_output_in_another_encoding_has_numbers_for_what_it_can_not_hold() -> None:
    code = "import sys; sys.argv = ['vlm-tune', '--version']\nfrom vlm_tune.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit:\n    print('\u5927')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.stdout.splitlines()[1] == b"\\u5927"


def test_commands_that_train_or_answer_import_no_package_that_they_do_without() -> None:
    code = """
import sys
from vlm_tune.cli.options import quiet_libraries
quiet_libraries()
import vlm_tune.api
loaded = {name.partition(".")[0] for name in sys.modules}
unused = {"scipy", "sklearn", "pandas", "matplotlib", "datasets", "deepspeed", "trl", "timm"}
assert not loaded & unused, loaded & unused
import torch
assert "triton" not in loaded or torch.cuda.is_available()
import scipy.optimize  # what needs it gets it
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_sft_output_is_the_recipes_output(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_recipe("causal"))
    outputs = []

    def check(run: Path, *_: Any, **__: Any) -> None:
        outputs.append(run)
        raise TrainingError("far enough")

    monkeypatch.setattr(run_folder, "check_run", check)
    assert call_main(monkeypatch, "sft", str(path), "--output", str(tmp_path / "it's: here")) == 5
    assert outputs == [tmp_path / "it's: here"]


def test_steps_set_beside_epochs_are_said(
    tiny_recipe: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_recipe("causal"))
    assert (
        call_main(monkeypatch, "sft", str(path), "--set", "train.epochs=2", "--output", "/dev/null")
        == 2
    )
    assert "note: train.epochs: 2 replaces train.steps: 4" in capsys.readouterr().err


def test_a_folder_with_control_characters_in_its_name_is_printed_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlm_tune.cli.train import _print_run
    from vlm_tune.train.run import Run

    folder = tmp_path / "a\x9bb\x7f"
    model: Any = None
    _print_run(Run(folder, {}, model), as_json=False)
    assert call_main(monkeypatch, "merge", str(folder), "--output", str(folder)) == 4
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert r"a\x9bb\x7f" in text
        assert not set("\x7f\x9b") & set(text)


def test_a_row_of_no_source_is_named_alone() -> None:
    assert str(DataError("no image", row=2)) == "row 2: no image"
    assert str(DataError("no image", source="rows.jsonl", row=2)) == "rows.jsonl, row 2: no image"
    assert str(DataError("no image")) == "no image"
