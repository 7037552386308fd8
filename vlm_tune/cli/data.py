"""Commands that write or inspect a recipe and its data: init, show, check, plan, ..."""

from __future__ import annotations

import json
import os
import re
import sys
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vlm_tune.cli.options import (
    JsonOption,
    RecipeArgument,
    SetOption,
    check_choice,
    load,
    print_json,
    print_text,
    quiet_libraries,
)
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import EXIT_TRAINING, Problem, RecipeError
from vlm_tune.paths import PAGE, check_writable, shown_path, write_whole, writing
from vlm_tune.quoting import quoted, reason_of


def init(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH]...",
            help="data files, tar shards, a saved data set, or a folder of these or of class "
            "folders",
        ),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="convert a configuration of LLaMA-Factory, ms-swift, TRL or LLaVA (YAML, "
            "JSON, or a script), instead of PATH",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="the recipe to write")] = Path("recipe.yaml"),
    model: Annotated[
        str | None,
        typer.Option(
            help="folder or hub name of an LLM or of a whole model; by default the largest "
            "suitable one that fits this machine"
        ),
    ] = None,
    tower: Annotated[
        str | None,
        typer.Option(
            help="folder or hub name of a vision tower, an open_clip tower as NAME:TAG, or a "
            "Whisper model for rows with audio"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing recipe")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a recipe for your data and this machine, with the reason for each choice; exit code 3
    if rows can't be used.
    """
    quiet_libraries()
    from vlm_tune.recipe_writer.init import init as run
    from vlm_tune.rendering.init_text import show_written
    from vlm_tune.rendering.terminal import Display

    console = Console(stderr=as_json)
    with Display(console) as display:
        written = run(
            paths or (),
            configuration=from_,
            output=output,
            model=model,
            tower=tower,
            force=force,
            show=display,
        )
    print_json(written.summary()) if as_json else show_written(console, written)
    sys.exit(written.exit_code)


def show(
    recipe: RecipeArgument,
    n: Annotated[
        int, typer.Option("-n", min=1, max=10_000, help="samples to print from each stage")
    ] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="also print token ids")] = False,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print training samples as the model sees them: trained tokens, prompt tokens, image slots."""
    loaded = load(recipe, set_)
    quiet_libraries()
    from vlm_tune.rendering.samples import sample_tokens, show_samples

    samples = sample_tokens(loaded, n)
    if as_json:
        print_json(samples)
    else:
        show_samples(Console(), samples, ids=ids)


def check(
    recipe: RecipeArgument,
    set_: SetOption = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="read only the first n rows of each source")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="write the report as an HTML page, with images of odd rows, to this file"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read all rows that RECIPE trains and scores on, and report those that are bad, odd, too long
    or leaked.
    """
    loaded = load(recipe, set_)
    if html:
        check_writable(html, "the page", mark=PAGE)
    quiet_libraries()
    from vlm_tune.data_check.check import check as run
    from vlm_tune.rendering.check_text import show_check, show_exports
    from vlm_tune.rendering.terminal import Display

    console = Console(stderr=as_json)
    with Display(console) as display:
        report = run(loaded, sample=sample, show=display)
    if html:
        from vlm_tune.rendering.check_page import write_page

        with writing(html, "the page"):
            write_page(report, html)
    exports = _exports(loaded)
    if as_json:
        print_json({**report.summary(), "exports": exports})
    else:
        show_exports(console, exports)
        show_check(console, report)
        if html:
            print_text(f"page: {html}")
    sys.exit(report.exit_code)


def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            help="memory of one device, e.g. 24GB or 40GiB; by default this machine's device"
        ),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="number of processes, one per device")] = 1,
    zero: Annotated[int, typer.Option(min=0, max=3, help="DeepSpeed's ZeRO stage")] = 0,
    offload: Annotated[
        str,
        typer.Option(help="what to offload to CPU memory: none, optimizer, or all (also weights)"),
    ] = "none",
    tokens: Annotated[
        int | None,
        typer.Option(min=2, help="tokens per row; by default from the data, or max_length"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Report what RECIPE needs (parameters, memory by cause, FLOPs) without loading weights; exit
    code 5 if it does not fit.
    """
    check_choice("--offload", offload, ("none", "optimizer", "all"))
    loaded = load(recipe, set_)
    quiet_libraries()
    from vlm_tune.memory_plan.plan import plan as run
    from vlm_tune.rendering.check_text import show_exports
    from vlm_tune.rendering.plan_text import show_plan

    places: Any = {"processes": processes, "zero": zero, "offload": offload}
    report = run(loaded, gpu_memory=gpu_memory, **places, tokens=tokens)
    exports = _exports(loaded)
    if as_json:
        print_json({**report.summary(), "exports": exports})
    else:
        show_plan(Console(), report)
        show_exports(Console(), exports)
    if report.fits is False:
        sys.exit(EXIT_TRAINING)


def _exports(recipe: Recipe) -> dict[str, str | None] | str:
    """Returns by format why the trained model can't be exported to it, or None where it can.

    Returns the reason as text where this is unknown.
    """
    from vlm_tune.errors import ModelError
    from vlm_tune.exporting import possible_exports

    try:
        return possible_exports(recipe)
    except ModelError as error:
        # A config is not on this machine; the rest of the report does not need it.
        return reason_of(error)


def schema() -> None:
    """Print the recipe's JSON Schema, for editors."""
    from vlm_tune.config.load import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


def _first_sentence(recipe: str) -> str:
    """The first sentence of a recipe's opening comment."""
    comment = takewhile(lambda line: line.strip("# "), recipe.splitlines())
    return re.split(r"(?<=\.) (?=[A-Z0-9])", " ".join(line.lstrip("# ") for line in comment))[0]


def recipes(
    copy: Annotated[
        str | None, typer.Option(help="copy this recipe into the current folder")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the shipped recipes, or copy one."""
    from vlm_tune.resources import find_resource, resource_names

    if copy is not None:
        shipped = find_resource("recipes", copy)
        if shipped is None:
            raise RecipeError(
                [
                    Problem(
                        "--copy",
                        f"no recipe {quoted(copy)}; expected one of "
                        f"{', '.join(resource_names('recipes'))}",
                    )
                ]
            )
        target = Path(f"{Path(copy).name}.yaml")
        with writing(target, "the recipe's copy"):
            if os.path.lexists(target):
                raise RecipeError(
                    [Problem(shown_path(target), "already exists and was not changed")]
                )
            write_whole(target, shipped.read_text(encoding="utf-8"))
        print_json({"path": str(target)}) if as_json else print_text(str(target))
        return
    rows = []
    for name in resource_names("recipes"):
        path = find_resource("recipes", name)
        assert path is not None
        rows.append({"name": name, "about": _first_sentence(path.read_text(encoding="utf-8"))})
    if as_json:
        print_json(rows)
        return
    for row in rows:
        typer.echo(f"{row['name']:28} {row['about']}")
