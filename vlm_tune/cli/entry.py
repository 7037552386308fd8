"""The command line; heavy modules are imported by the command that needs them."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Annotated, Any, NoReturn

import typer

from vlm_tune.cli.chat import chat
from vlm_tune.cli.data import check, init, plan, recipes, schema, show
from vlm_tune.cli.embed import embed
from vlm_tune.cli.evaluate import compare, evaluate, predict, report
from vlm_tune.cli.model import export, merge
from vlm_tune.cli.options import print_json
from vlm_tune.cli.serve import serve
from vlm_tune.cli.sweep import sweep
from vlm_tune.cli.system import env
from vlm_tune.cli.train import dpo, grpo, kto, sft, verify_run
from vlm_tune.errors import EXIT_INTERRUPTED, EXIT_RECIPE, RecipeError, VlmTuneError
from vlm_tune.resources import kernel_choice
from vlm_tune.version import __version__

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Instruction tuning for vision-language LLMs: train, evaluate, merge, export, serve.",
)
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed")
"""Libraries whose versions `--version --json` prints."""
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""typer's error for a command line that it can't parse; its module differs between releases."""


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="print the version (with --json, also those of libraries) and exit"
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="with --version", hidden=True)] = False,
) -> None:
    """Instruction tuning for vision-language LLMs: train, evaluate, merge, export, serve."""
    if version:
        print_json(_versions()) if as_json else typer.echo(_version_line())
        raise typer.Exit
    if as_json:
        raise typer.BadParameter(
            "goes after the command: `vlm-tune check recipe.yaml --json`",
            param_hint="--json",
        )
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(EXIT_RECIPE)


COMMANDS: dict[str, Callable[..., None]] = {
    "init": init,
    "sft": sft,
    "dpo": dpo,
    "kto": kto,
    "grpo": grpo,
    "sweep": sweep,
    "eval": evaluate,
    "compare": compare,
    "report": report,
    "predict": predict,
    "verify-run": verify_run,
    "merge": merge,
    "export": export,
    "chat": chat,
    "embed": embed,
    "serve": serve,
    "show": show,
    "check": check,
    "plan": plan,
    "schema": schema,
    "recipes": recipes,
    "env": env,
}
for _name, _function in COMMANDS.items():
    app.command(_name)(_function)


def _versions() -> dict[str, str | None]:
    """Returns the installed versions by name, without importing the libraries.

    None stands for a library that is not installed.
    """
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "vlm_tune": __version__,
        "python": platform.python_version(),
        **{name: installed(name) for name in LIBRARIES},
    }


def _version_line() -> str:
    known = _versions()
    return (
        f"vlm_tune {known['vlm_tune']} (Python {known['python']}, torch {known['torch']}, "
        f"transformers {known['transformers']})"
    )


def main() -> None:
    """Runs the command line; each error of the package ends with its exit code, no traceback."""
    # Libraries create millions of objects that stay: garbage collection among them takes a sixth of
    # the time of importing them.
    gc.set_threshold(50_000, 20, 50)
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe that can't encode a character gets its number; the command continues.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    sys.excepthook = report_bug
    try:
        with _terminated_as_interrupted():
            _run()
    # Also while an error is printed.
    except (KeyboardInterrupt, typer.Abort):
        if "--json" in sys.argv:
            print_json({"error": "Interrupted", "message": "interrupted", "problems": []})
        else:
            typer.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Context in which SIGTERM ends a command as Ctrl-C does.

    What it was writing is removed, where its default would leave that behind. Training and serving
    have handlers of their own meanwhile.
    """
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread: signals are the caller's
        yield
        return
    try:
        yield
    finally:
        # None is a handler that was not set from Python.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _run() -> NoReturn:
    """Runs the command line, and ends the process with its exit code."""
    try:
        kernel_choice()  # an invalid value ends every command before it does anything
        if any("\0" in argument for argument in sys.argv):  # possible for a caller in Python
            raise typer.BadParameter("an argument contains a NUL character")
        status = app(standalone_mode=False) or 0
        if status == EXIT_INTERRUPTED:  # typer's own for Ctrl-C, without a word
            raise KeyboardInterrupt
        sys.exit(status)
    except UsageError as error:
        _usage(error)
        sys.exit(EXIT_RECIPE)
    except VlmTuneError as error:
        if "--json" in sys.argv:
            problems = (
                [{"where": p.where, "message": p.message} for p in error.problems]
                if isinstance(error, RecipeError)
                else []
            )
            print_json({"error": type(error).__name__, "message": str(error), "problems": problems})
        else:
            typer.echo(
                f"{type(error).__name__}\n{error}"
                if isinstance(error, RecipeError)
                else f"{type(error).__name__}: {error}",
                err=True,
            )
        sys.exit(error.exit_code)


def _usage(error: Any) -> None:
    """Prints the error of a command line, with --json as JSON."""
    if "--json" not in sys.argv:
        error.show()
        return
    hint = (
        getattr(error, "param_hint", None)
        or getattr(getattr(error, "param", None), "opts", [""])[0]
    )
    message = error.format_message()
    print_json(
        {
            "error": "UsageError",
            "message": message,
            "problems": [{"where": str(hint), "message": message}],
        }
    )


def report_bug(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints the traceback of an unexpected exception, and how to report it."""
    sys.__excepthook__(kind, error, trace)
    typer.echo(
        f"\nThis is a fault of vlm_tune, not of your input. Please report it with the lines above, "
        f"the command, and: {_version_line()}",
        err=True,
    )
