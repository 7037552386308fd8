"""The command `sweep`: trains a recipe with different values and ranks the trials."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from vlm_tune.cli.options import (
    DeviceOption,
    JsonOption,
    RecipeArgument,
    SetOption,
    load,
    print_json,
    print_text,
    quiet_libraries,
    use_device,
)
from vlm_tune.errors import Problem, RecipeError
from vlm_tune.events import Acceleration, Environment, Event, Tuning
from vlm_tune.quoting import cut

SAME = (Acceleration, Environment, Tuning)
"""Events that are much the same in every trial; its log has them."""


KeepOption = Annotated[
    str,
    typer.Option(
        metavar="best|all",
        help="whose models and checkpoints to keep: best (only the best trial's) or all",
    ),
]


def sweep(
    recipe: RecipeArgument,
    search: Annotated[
        list[str],
        typer.Option(
            "--search",
            metavar="KEY=VALUES",
            help="values to try: KEY=log:LOW..HIGH, LOW..HIGH, LOW..HIGH:STEP or A,B,C "
            "(repeatable)",
        ),
    ],
    trials: Annotated[
        int, typer.Option(min=1, help="number of trials, including those of an interrupted sweep")
    ] = 20,
    set_: SetOption = None,
    output: Annotated[
        str | None,
        typer.Option(help="the sweep's folder; the recipe's `output` with -sweep by default"),
    ] = None,
    no_prune: Annotated[
        bool,
        typer.Option("--no-prune", help="train every trial to its end, even if its scores are bad"),
    ] = False,
    keep: KeepOption = "best",
    resume: Annotated[
        bool, typer.Option("--resume", help="continue the sweep in the folder")
    ] = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train RECIPE with different values, and rank the trials by their validation scores."""
    loaded = load(recipe, set_)
    space = _search(search)
    use_device(device)
    quiet_libraries()
    from vlm_tune import api
    from vlm_tune.rendering.sweep_text import sweep_lines
    from vlm_tune.rendering.terminal import Display

    display = Display(Console(stderr=as_json))

    def show(event: Event) -> None:
        if not isinstance(event, SAME):
            display(event)

    with display:
        done = api.sweep(
            loaded,
            search=space,
            trials=trials,
            output=output,
            prune=not no_prune,
            keep=keep,
            resume=resume,
            show=show,
        )
    if as_json:
        print_json({"folder": str(done.folder), **done.summary()})
    else:
        print_text("\n".join(sweep_lines(done)))


def _search(options: list[str]) -> dict[str, str]:
    """The values of each `--search`, by key. Raises `RecipeError`."""
    space: dict[str, str] = {}
    for option in options:
        key, equals, values = option.partition("=")
        fault = None
        if not equals or not key:
            fault = "a search is written KEY=VALUES, e.g. train.learning_rate=log:1e-5..1e-3"
        elif key in space:
            fault = f"{cut(key)} is searched twice"
        if fault is not None:
            raise RecipeError([Problem(f"--search {cut(option)}", fault)])
        space[key] = values
    return space
