"""Commands that train and score: sft, eval, predict, verify-run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from vlm_tune.cli.options import (
    MOST_TOKENS,
    AcceptBaseOption,
    BaseOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    ProcessesOption,
    RecipeArgument,
    SetOption,
    bases_by_part,
    check_choice,
    check_dtype,
    launch_ranks,
    load,
    print_json,
    quiet_libraries,
    use_device,
)
from vlm_tune.errors import EXIT_TRAINING
from vlm_tune.events import LoadedModel
from vlm_tune.paths import ANSWERS, check_writable, writing

if TYPE_CHECKING:
    from vlm_tune.evaluation.metrics import Answer
    from vlm_tune.train.run import Run

ResumeOption = Annotated[
    bool, typer.Option("--resume", help="go on from the last checkpoint of this recipe's run")
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="start anew: delete what the run in the output folder wrote"),
]
AcceptChangesOption = Annotated[
    bool,
    typer.Option("--accept-changes", help="with --resume: go on though the recipe has changed"),
]
OutputOption = Annotated[
    str | None, typer.Option(help="the run's folder, in place of the recipe's `output`")
]
NoTestOption = Annotated[
    bool,
    typer.Option(
        "--no-test", help="do not score the test part at the end (it is read and checked)"
    ),
]


def sft(
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
    """Fine-tune what RECIPE says, score the result, and write a report."""
    from vlm_tune.run_folder import check_run

    changes = [*(set_ or []), *([f"output={json.dumps(output)}"] if output is not None else [])]
    first = int(os.environ.get("RANK", "0")) == 0
    loaded = load(recipe, changes, quiet=not first)
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
            "--no-test": no_test,
        }
        options = [
            *(f"--set={change}" for change in changes),
            *(name for name, is_set in flags.items() if is_set),
        ]
        _launch(processes, device, "sft", recipe, *options)
    use_device(device)
    quiet_libraries()
    from vlm_tune.api import sft as train
    from vlm_tune.rendering.terminal import Display

    display = Display(Console(stderr=as_json), beats=first)
    with display if first else nullcontext():
        run = train(
            loaded,
            resume=resume,
            overwrite=overwrite,
            accept_changes=accept_changes,
            test=not no_test,
            show=display,
        )
    if first:
        _print_run(run, as_json)


def _launch(processes: int, device: str | None, *command: str) -> NoReturn:
    """Runs a command of this CLI on its device as the ranks of one job; exits with their code."""
    if device not in (None, "cpu", "cuda"):
        raise typer.BadParameter(
            "several processes take a GPU each; choose them with CUDA_VISIBLE_DEVICES",
            param_hint="--device",
        )
    launch_ranks(processes, *command, *([f"--device={device}"] if device else []))


def _print_run(run: Run, as_json: bool) -> None:
    if as_json:
        print_json({"run": str(run.folder), **run.result})
    else:
        typer.echo(
            f"model: {run.folder / 'model'}\nreport: {run.folder / 'report.html'}\n"
            f"result: {run.folder / 'result.json'}"
        )


def evaluate(
    model: ModelArgument,
    recipe: Annotated[
        str | None, typer.Option(help="whose data to score on; the run's own where not given")
    ] = None,
    set_: SetOption = None,
    split: Annotated[str, typer.Option(help="test or validation")] = "test",
    data: Annotated[
        str | None,
        typer.Option(
            help="score on this file of rows (or a pattern, or tar shards) instead of the recipe's"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="score the first n rows only")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="write every answer to this JSONL file")
    ] = None,
    dtype: DtypeOption = None,
    base: BaseOption = None,
    accept_other_base: AcceptBaseOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score MODEL's generated answers by exact match."""
    check_choice("--split", split, ("test", "validation"))
    part: Any = split
    check_dtype(dtype)
    loaded = load(recipe, set_) if recipe else None
    if answers:
        check_writable(answers, "the file of answers", mark=ANSWERS)
    use_device(device)
    quiet_libraries()
    from vlm_tune.api import evaluate as run
    from vlm_tune.api import which_model
    from vlm_tune.rendering.terminal import Display, score_table

    console = Console(stderr=as_json)
    which = which_model(model)
    with Display(console) as display:
        display(LoadedModel(which["folder"], which["about"]))
        scores = run(
            model,
            loaded,
            set_ or [],
            split=part,
            data=data,
            limit=limit,
            dtype=dtype,
            base=bases_by_part(base),
            accept_other_base=accept_other_base,
            show=display,
        )
    if answers:
        _write_answers(answers, scores.answers)
    if as_json:
        print_json({"model": which, **scores.summary()})
    else:
        console.print(score_table(scores.accuracy, scores.n, scores.by_category, scores.by_source))


def _write_answers(file: Path, answers: Sequence[Answer]) -> None:
    """Writes scored answers as JSONL. Raises `RecipeError` if the file can't be written."""
    with writing(file, "the file of answers"):
        file.write_text(
            "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers),
            encoding="utf-8",
        )


def predict(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Option(
            help="a file of rows (or a pattern, or tar shards) of any form, with or without answers"
        ),
    ],
    output: Annotated[Path, typer.Option(help="the JSONL file to write")],
    limit: Annotated[int | None, typer.Option(min=1, help="answer the first n rows only")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_TOKENS, help="longest answer; the recipe's where not given"),
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option(min=1, max=1000, help="1 is greedy; the recipe's where not given")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_TOKENS, help="rows a batch; the recipe's where not given"),
    ] = None,
    dtype: DtypeOption = None,
    base: BaseOption = None,
    accept_other_base: AcceptBaseOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL's answers to the rows of a file, without scoring them."""
    check_dtype(dtype)
    check_writable(output, "the file of answers", mark=ANSWERS)
    use_device(device)
    quiet_libraries()
    from vlm_tune.api import predict as run
    from vlm_tune.api import which_model
    from vlm_tune.rendering.terminal import Display

    which = which_model(model)
    with Display(Console(stderr=True)) as display:
        display(LoadedModel(which["folder"], which["about"]))
        written = run(
            model,
            data,
            output,
            limit=limit,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            batch_size=batch_size,
            dtype=dtype,
            base=bases_by_part(base),
            accept_other_base=accept_other_base,
            show=display,
        )
    if as_json:
        print_json({"model": which, **written.summary()})
    else:
        typer.echo(f"{written.n:,} answers in {written.seconds:,.1f} s: {output}")


def verify_run(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")],
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="how many; up to the next kept checkpoint where not given"),
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
            typer.echo("\n".join(replay_lines(report)))
    if not report.agrees:
        sys.exit(EXIT_TRAINING)
