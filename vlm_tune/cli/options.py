"""Shared by the commands: options, loading a recipe, choosing a device, printing JSON."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import Problem, RecipeError
from vlm_tune.paths import shown_path
from vlm_tune.quoting import cut, escaped_lines, json_line, quoted, reason_of

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="a recipe file, or the name of a shipped one")
]
ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="a run, a checkpoint or a merged folder")
]
TaskOption = Annotated[
    str | None,
    typer.Option(help="the task, for a run with an adapter for each task", metavar="NAME"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="override a value: --set train.epochs=2 (repeatable)"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object")]
ProcessesOption = Annotated[
    int, typer.Option(min=1, help="number of processes on this machine, one per GPU")
]
BaseOption = Annotated[
    list[str] | None,
    typer.Option(
        "--base",
        metavar="PATH",
        help="new location of MODEL's base weights: PATH for the language model, tower=PATH "
        "for the tower",
    ),
]
AcceptBaseOption = Annotated[
    bool,
    typer.Option(
        "--accept-other-base",
        help="accept base weights that differ from those MODEL was trained on",
    ),
]
DtypeOption = Annotated[
    str | None, typer.Option(help="bf16, fp16 or fp32; the model's own by default")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, or one GPU as cuda:1 (an index into CUDA_VISIBLE_DEVICES); by default "
        "a GPU if there is one"
    ),
]
JsonSchemaOption = Annotated[
    Path | None, typer.Option(help="a file with a JSON schema that every answer follows")
]
MOST_TOKENS = 1_000_000
"""Largest answer length that an option accepts, in tokens."""


def load(name: str, overrides: list[str] | None, *, quiet: bool = False) -> Recipe:
    """Loads a recipe file, or a shipped recipe by its name, with overrides.

    Prints what the overrides replace besides their own values, unless `quiet`.
    """
    from vlm_tune.config.load import load_recipe
    from vlm_tune.resources import find_resource, resource_names

    path = name
    if not os.path.lexists(name):
        short = name.removesuffix(".yaml")
        shipped = find_resource("recipes", short)
        near = difflib.get_close_matches(short, resource_names("recipes"), n=1)
        if shipped is None and near:
            message = (
                f"no such recipe file, and no shipped recipe of that name; did you mean {near[0]}?"
            )
            raise RecipeError([Problem(cut(name), message)])
        path = str(shipped) if shipped else name
    note: Callable[[str], None] | None = (
        None if quiet else lambda text: typer.echo(f"note: {text}", err=True)
    )
    return load_recipe(path, overrides or [], note=note)


def read_schema(path: Path | None) -> dict[str, Any] | None:
    """Reads a JSON schema; None where there is no file of one.

    Raises `RecipeError` for a file that can't be read or holds no JSON object.
    """
    if path is None:
        return None
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable("--json-schema", path, error) from None
    if not isinstance(schema, dict):
        message = f"{shown_path(path)} is not a JSON object, which a schema must be"
        raise RecipeError([Problem("--json-schema", message)])
    return schema


def unreadable(option: str, path: Path, error: Exception) -> RecipeError:
    """The error for an option's file that can't be read."""
    return RecipeError([Problem(option, f"{shown_path(path)} can't be read: {reason_of(error)}")])


def use_device(device: str | None) -> None:
    """Restricts torch to the CPU or to one GPU, and checks that there is a GPU where one is named.

    torch must not have looked for GPUs yet. None changes nothing.
    """
    if device is None:
        return
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", device)
    if match is None:
        raise typer.BadParameter(
            f"{quoted(device)} is not a device: expected cpu, cuda, cuda:0, cuda:1, ...",
            param_hint="--device",
        )
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    if match[1] is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible is not None else []
        number = int(match[1])
        if visible is not None and number >= len(names):
            message = f"{device} is not there: CUDA_VISIBLE_DEVICES is {quoted(visible)}"
            raise typer.BadParameter(message, param_hint="--device")
        os.environ["CUDA_VISIBLE_DEVICES"] = names[number] if names else str(number)
    import torch

    # torch's first look at the GPUs; it does not read the variable again.
    if not torch.cuda.device_count():
        raise typer.BadParameter(
            f"{device} is not there: torch {torch.__version__} sees no such GPU",
            param_hint="--device",
        )


def quiet_libraries(*, model_code: bool = True) -> None:
    """Keeps libraries' progress bars, banners and warnings out of our output.

    Libraries report what matters by raising. With `model_code` it also imports the model code, as
    `import_without_unused` does.
    """
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in (
        "transformers",
        "bitsandbytes",
        "deepspeed",
        "DeepSpeed",
        "accelerate",
        "root",
        "torch.utils.cpp_extension",
        "torch.utils.flop_counter",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets up its logger again when it is imported; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if model_code:
        import_without_unused()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def import_without_unused() -> None:
    """Imports the model code without packages that libraries import wherever they are installed.

    These are SciPy, which transformers wants for the losses of object detection, scikit-learn,
    which needs SciPy and which older releases of transformers import for assisted generation, and
    Triton, by which torch compiles for GPUs alone. They take 110 MB and half a second of every
    process that trains or answers. What imports them later gets them.
    """
    import torch

    unused = ["scipy", "sklearn", *([] if torch.cuda.is_available() else ["triton"])]
    hidden = [name for name in unused if name not in sys.modules]
    # The import system's mark of a module that can't be imported.
    sys.modules.update(dict.fromkeys(hidden))  # pyright: ignore[reportArgumentType,reportCallIssue]
    try:
        importlib.import_module("vlm_tune.model.acceleration.install")
        # It imports bitsandbytes, which older releases of that do with Triton.
        importlib.import_module("vlm_tune.model.acceleration.sharded_4bit")
    finally:
        for name in hidden:
            del sys.modules[name]


def print_json(value: Any) -> None:
    typer.echo(json_line(value))


def print_text(text: str) -> None:
    """Prints lines that may hold names and paths of the user's, whose characters are escaped."""
    typer.echo(escaped_lines(text))


def bases_by_part(given: list[str] | None) -> dict[str, str]:
    """Returns new places of bases by part: `PATH` is for the LLM, `tower=PATH` for another part."""
    places: dict[str, str] = {}
    for text in given or []:
        part, equals, path = text.partition("=")
        known = equals and part in ("llm", "tower", "tower.0", "tower.1")
        places[part if known else "llm"] = path if known else text
    return places


def names_in(text: str | None) -> list[str] | None:
    """Returns the names of an option's text with commas between; `none` names none."""
    if text is None:
        return None
    return [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]


def launch_ranks(processes: int, *command: str) -> NoReturn:
    """Runs a command of this CLI as the ranks of one job; exits with the job's exit code."""
    from vlm_tune.launching import launch

    if "RANK" in os.environ:
        raise typer.BadParameter("this process is already one of several", param_hint="--processes")
    sys.exit(launch([sys.executable, "-m", "vlm_tune.cli", *command], processes))


def check_dtype(value: str | None) -> None:
    if value is not None:
        check_choice("--dtype", value, ("bf16", "fp16", "fp32"))


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}", param_hint=option)
