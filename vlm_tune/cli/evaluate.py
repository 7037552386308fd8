"""Commands on what a trained model answers: eval, compare, report, predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vlm_tune.cli.options import (
    MOST_TOKENS,
    AcceptBaseOption,
    BaseOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    JsonSchemaOption,
    ModelArgument,
    SetOption,
    bases_by_part,
    check_choice,
    check_dtype,
    load,
    names_in,
    print_json,
    print_text,
    quiet_libraries,
    read_schema,
    use_device,
)
from vlm_tune.events import LoadedModel
from vlm_tune.paths import ANSWERS, check_writable, writing

DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="score on this file of rows (or a pattern, or tar shards) instead of the recipe's; "
        "again for more",
    ),
]
LimitOption = Annotated[int | None, typer.Option(help="score the first n rows only")]
MetricsOption = Annotated[
    str | None,
    typer.Option(
        help="names with commas between, as exact_match,anls or my_module:score; the recipe's, or "
        "what fits the rows, where not given"
    ),
]
PairedMetricsOption = Annotated[
    str | None,
    typer.Option(
        help="names with commas between, as exact_match,anls or my_module:score; what fits the "
        "rows where not given"
    ),
]
BaselinesOption = Annotated[
    str | None,
    typer.Option(
        help="auto (those that are cheap), none, or names with commas between; the recipe's where "
        "not given"
    ),
]
BenchmarkOption = Annotated[
    list[str] | None,
    typer.Option(
        help="score on a local copy of a public benchmark by its own rules, as pope=FOLDER; "
        "also mmbench=FILE, scienceqa, textvqa, chartqa; again for more"
    ),
]
AnsweringOption = Annotated[
    str | None,
    typer.Option(
        help="generate, or likelihood: rows with choices are answered by the likeliest; the "
        "recipe's where not given"
    ),
]
AnswersOption = Annotated[Path | None, typer.Option(help="write every answer to this JSONL file")]
SplitOption = Annotated[str, typer.Option(help="test or validation")]
RecipeOption = Annotated[
    str | None, typer.Option(help="whose data to score on; the run's own where not given")
]


def evaluate(
    model: ModelArgument,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    split: SplitOption = "test",
    data: DataOption = None,
    benchmark: BenchmarkOption = None,
    limit: LimitOption = None,
    metrics: MetricsOption = None,
    baselines: BaselinesOption = None,
    answering: AnsweringOption = None,
    answers: AnswersOption = None,
    dtype: DtypeOption = None,
    base: BaseOption = None,
    accept_other_base: AcceptBaseOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score MODEL's generated answers, with intervals and beside baselines."""
    check_choice("--split", split, ("test", "validation"))
    check_choice("--answering", answering or "generate", ("generate", "likelihood"))
    choices: dict[str, Any] = {"split": split, "answering": answering}
    check_dtype(dtype)
    loaded = load(recipe, set_) if recipe else None
    if answers:
        check_writable(answers, "the file of answers", mark=ANSWERS)
    use_device(device)
    quiet_libraries()
    from vlm_tune.api import evaluate as run
    from vlm_tune.evaluation.answer_files import save_answers
    from vlm_tune.rendering.terminal import Display, print_scores
    from vlm_tune.saved_models import which_model

    console = Console(stderr=as_json)
    which = which_model(model)
    with Display(console) as display:
        display(LoadedModel(which["folder"], which["about"]))
        scores = run(
            model,
            loaded,
            set_ or [],
            **choices,
            data=data,
            benchmark=benchmark or None,
            limit=limit,
            metrics=names_in(metrics),
            baselines="auto" if baselines == "auto" else names_in(baselines),
            dtype=dtype,
            base=bases_by_part(base),
            accept_other_base=accept_other_base,
            show=display,
        )
    if answers:
        with writing(answers, "the file of answers"):
            save_answers(answers, scores.answers)
    if as_json:
        print_json({"model": which, **scores.summary()})
    else:
        print_scores(console, scores.summary())


def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="a run, or with --data a model")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="the one compared with it")],
    data: DataOption = None,
    limit: LimitOption = None,
    metrics: PairedMetricsOption = None,
    flips: Annotated[
        int, typer.Option(min=0, help="how many rows to print whose answer became right or wrong")
    ] = 10,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the test answers of two runs row by row, and their recipes."""
    use_device(device)
    quiet_libraries()
    from vlm_tune.api import compare as run
    from vlm_tune.rendering.scores_text import print_comparison
    from vlm_tune.rendering.terminal import Display

    console = Console(stderr=as_json)
    with Display(console) as display:
        comparison = run(
            first, second, data=data, limit=limit, metrics=names_in(metrics), show=display
        )
    if as_json:
        print_json(comparison.summary())
    else:
        print_comparison(console, comparison, flips)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="a run, or several: the others are compared with the first"
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="the HTML file to write; report.html in the run's folder, or of several runs in "
            "the current folder, where not given"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the report of one RUN anew, or a page that overlays several."""
    quiet_libraries()
    from vlm_tune.api import report as run

    path = run(runs, output)
    if as_json:
        print_json({"report": str(path)})
    else:
        print_text(f"report: {path}")


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
    json_schema: JsonSchemaOption = None,
    dtype: DtypeOption = None,
    base: BaseOption = None,
    accept_other_base: AcceptBaseOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL's answers to the rows of a file, without scoring them."""
    check_dtype(dtype)
    schema = read_schema(json_schema)
    check_writable(output, "the file of answers", mark=ANSWERS)
    use_device(device)
    quiet_libraries()
    from vlm_tune.api import predict as run
    from vlm_tune.rendering.terminal import Display
    from vlm_tune.saved_models import which_model

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
            json_schema=schema,
            dtype=dtype,
            base=bases_by_part(base),
            accept_other_base=accept_other_base,
            show=display,
        )
    if as_json:
        print_json({"model": which, **written.summary()})
    else:
        print_text(f"{written.n:,} answers in {written.seconds:,.1f} s: {output}")
