"""Commands that train: sft, dpo, kto, grpo, verify-run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from rich.console import Console

from vlm_tune.cli.options import (
    DeviceOption,
    JsonOption,
    ProcessesOption,
    RecipeArgument,
    SetOption,
    launch_ranks,
    load,
    print_json,
    print_text,
    quiet_libraries,
    use_device,
)
from vlm_tune.errors import EXIT_TRAINING

if TYPE_CHECKING:
    from vlm_tune.train.run import Run

ResumeOption = Annotated[
    bool, typer.Option("--resume", help="continue from the last checkpoint of this recipe's run")
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="start over: delete what an earlier run wrote to the output folder"
    ),
]
AcceptChangesOption = Annotated[
    bool,
    typer.Option(
        "--accept-changes", help="with --resume: continue although recipe or data have changed"
    ),
]
OutputOption = Annotated[
    str | None, typer.Option(help="the run's folder, in place of the recipe's `output`")
]
NoTestOption = Annotated[
    bool,
    typer.Option(
        "--no-test", help="do not score the test part at the end (it is still read and checked)"
    ),
]


def _command(name: Literal["sft", "dpo", "kto", "grpo"], about: str) -> Callable[..., None]:
    """A command that trains by the function of its name in the API."""

    def train(
        recipe: RecipeArgument,
        set_: SetOption = None,
        resume: ResumeOption = False,
        overwrite: OverwriteOption = False,
        processes: ProcessesOption = 1,
        accept_changes: AcceptChangesOption = False,
        output: OutputOption = None,
        no_test: NoTestOption = False,
        device: DeviceOption = None,
        as_json: JsonOption = False,
    ) -> None:
        _train(
            name,
            recipe,
            [*(set_ or []), *([f"output={json.dumps(output)}"] if output is not None else [])],
            resume=resume,
            overwrite=overwrite,
            processes=processes,
            accept_changes=accept_changes,
            test=not no_test,
            device=device,
            as_json=as_json,
        )

    train.__name__ = name
    train.__doc__ = about
    return train


sft = _command("sft", "Fine-tune the model of RECIPE, score it, and write a report.")
dpo = _command(
    "dpo", "Train RECIPE on pairs of preferred and rejected answers (objective dpo, simpo or orpo)."
)
kto = _command(
    "kto", "Train RECIPE on answers labelled as desirable or undesirable (objective kto)."
)

grpo = _command("grpo", "Train RECIPE on sampled completions and their rewards (objective grpo).")


def _train(
    command: Literal["sft", "dpo", "kto", "grpo"],
    recipe: str,
    changes: list[str],
    *,
    resume: bool,
    overwrite: bool,
    processes: int,
    accept_changes: bool,
    test: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """Trains a recipe by the function of a command's name."""
    from vlm_tune.config.load import check_command
    from vlm_tune.run_folder import check_run

    first = int(os.environ.get("RANK", "0")) == 0
    loaded = load(recipe, changes, quiet=not first)
    check_command(loaded, command)
    if first:
        check_run(
            Path(loaded.output),
            loaded,
            resume=resume,
            overwrite=overwrite,
            accept_changes=accept_changes,
        )
    if processes > 1:
        flags = {
            "--resume": resume,
            "--overwrite": overwrite,
            "--accept-changes": accept_changes,
            "--json": as_json,
            "--no-test": not test,
        }
        options = [
            *(f"--set={change}" for change in changes),
            *(name for name, is_set in flags.items() if is_set),
        ]
        _launch(processes, device, command, recipe, *options)
    use_device(device)
    quiet_libraries()
    from vlm_tune import api
    from vlm_tune.rendering.terminal import Display

    display = Display(Console(stderr=as_json), beats=first)
    with display if first else nullcontext():
        run = getattr(api, command)(
            loaded,
            resume=resume,
            overwrite=overwrite,
            accept_changes=accept_changes,
            test=test,
            show=display,
        )
    if first:
        _print_run(run, as_json)


def _launch(processes: int, device: str | None, *command: str) -> NoReturn:
    """Runs a command of this CLI on its device as the ranks of one job; exits with their code."""
    if device not in (None, "cpu", "cuda"):
        raise typer.BadParameter(
            "several processes use one GPU each; choose them with CUDA_VISIBLE_DEVICES",
            param_hint="--device",
        )
    launch_ranks(processes, *command, *([f"--device={device}"] if device else []))


def _print_run(run: Run, as_json: bool) -> None:
    if as_json:
        print_json({"run": str(run.folder), **run.result})
    else:
        print_text(
            f"model: {run.folder / 'model'}\nreport: {run.folder / 'report.html'}\n"
            f"result: {run.folder / 'result.json'}"
        )


def verify_run(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")],
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="number of steps; by default up to the next checkpoint that was kept"
        ),
    ] = None,
    processes: ProcessesOption = 1,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replay steps of RUN from a checkpoint and compare with it bit for bit; exit code 5 if
    anything differs.
    """
    if processes > 1:
        options = [*(["--steps", str(steps)] if steps else []), *(["--json"] if as_json else [])]
        _launch(processes, device, "verify-run", str(run), *options)
    use_device(device)
    quiet_libraries()
    from vlm_tune.rendering.proofs import replay_lines
    from vlm_tune.train.replay import verify_run as replay

    report = replay(run, steps=steps)
    if int(os.environ.get("RANK", "0")) == 0:
        if as_json:
            print_json(report.summary())
        else:
            print_text("\n".join(replay_lines(report)))
    if not report.agrees:
        sys.exit(EXIT_TRAINING)
