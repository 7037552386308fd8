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
        help="score this data file (or a pattern, or tar shards) instead of the recipe's data; "
        "repeatable",
    ),
]
LimitOption = Annotated[int | None, typer.Option(help="score only the first n rows")]
MetricsOption = Annotated[
    str | None,
    typer.Option(
        help="comma-separated names, e.g. exact_match,anls or my_module:score; by default the "
        "recipe's, or those that fit the rows"
    ),
]
PairedMetricsOption = Annotated[
    str | None,
    typer.Option(
        help="comma-separated names, e.g. exact_match,anls or my_module:score; by default "
        "those that fit the rows"
    ),
]
BaselinesOption = Annotated[
    str | None,
    typer.Option(
        help="auto (the cheap ones), none, or comma-separated names; the recipe's by default"
    ),
]
BenchmarkOption = Annotated[
    list[str] | None,
    typer.Option(
        help="score a local copy of a public benchmark by its own rules, e.g. pope=FOLDER; "
        "also mmbench=FILE, scienceqa, textvqa, chartqa; repeatable"
    ),
]
AnsweringOption = Annotated[
    str | None,
    typer.Option(
        help="generate, or likelihood (answer rows with choices by the likeliest choice); the "
        "recipe's by default"
    ),
]
AnswersOption = Annotated[Path | None, typer.Option(help="write every answer to this JSONL file")]
SplitOption = Annotated[str, typer.Option(help="test or validation")]
LengthOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_TOKENS,
        help="maximum length of an answer in tokens; the recipe's by default",
    ),
]
BeamsOption = Annotated[
    int | None,
    typer.Option(min=1, max=1000, help="1 is greedy decoding; the recipe's by default"),
]
BatchOption = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_TOKENS, help="rows per batch; the recipe's by default"),
]
RecipeOption = Annotated[
    str | None, typer.Option(help="recipe whose data is scored; the run's by default")
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
    """Score MODEL's generated answers, with intervals and baselines."""
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
            # A recipe that is named has them already.
            [] if loaded else set_ or [],
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
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="a run, or with --data any model")],
    second: Annotated[
        Path, typer.Argument(metavar="RUN_B", help="the run or model to compare with it")
    ],
    data: DataOption = None,
    limit: LimitOption = None,
    metrics: PairedMetricsOption = None,
    flips: Annotated[
        int, typer.Option(min=0, help="number of rows to print whose answer became right or wrong")
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
        typer.Argument(metavar="RUN...", help="one run, or several to compare with the first"),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="HTML file to write; by default report.html in the run's folder, or for "
            "several runs in the current folder"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the report of one RUN again, or a page that overlays several."""
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
            help="a data file (or a pattern, or tar shards) in any row format, with or "
            "without answers"
        ),
    ],
    output: Annotated[Path, typer.Option(help="the JSONL file to write")],
    limit: Annotated[int | None, typer.Option(min=1, help="answer only the first n rows")] = None,
    max_new_tokens: LengthOption = None,
    num_beams: BeamsOption = None,
    batch_size: BatchOption = None,
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
