"""The command line; heavy modules are imported by the command that needs them."""

from __future__ import annotations

import difflib
import gc
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import EXIT_INTERRUPTED, EXIT_RECIPE, EXIT_TRAINING, Problem, RecipeError, VlmTuneError
from vlm_tune.paths import check_writable, writing
from vlm_tune.quoting import cut, escaped, quoted
from vlm_tune.resources import kernel_choice

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Instruction tuning of vision-language LLMs: train a recipe, evaluate, merge, ask.",
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="a recipe file, or the name of a shipped one")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="override a value: --set train.epochs=2 (again for more)")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")]
ProcessesOption = Annotated[int, typer.Option(min=1, help="how many train together on this machine, one a GPU")]
BaseOption = Annotated[
    list[str] | None,
    typer.Option("--base", metavar="PATH", help="where MODEL's base is now: PATH of the language model, tower=PATH of the tower"),
]
AcceptBaseOption = Annotated[
    bool, typer.Option("--accept-other-base", help="take the base though its weights are not those that MODEL was trained over")
]
DtypeOption = Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; the model's own where not given")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, or one GPU as cuda:1 (the one that CUDA_VISIBLE_DEVICES names); a GPU where one is")
]
MOST_TOKENS = 1_000_000
"""Tokens that an answer may be asked to have."""
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed")
"""Libraries whose versions `--version --json` tells."""
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""What typer raises for a command line that it can't read; releases keep the class in other places."""


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version (with --json, also those of libraries) and end")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="with --version", hidden=True)] = False,
) -> None:
    """Instruction tuning of vision-language LLMs: train a recipe, evaluate, merge, ask."""
    if version:
        _print_json(_versions()) if as_json else typer.echo(_version_line())
        raise typer.Exit
    if as_json:
        raise typer.BadParameter("stands after the command, as in `vlm-tune check recipe.yaml --json`", param_hint="--json")
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(EXIT_RECIPE)


def _versions() -> dict[str, str | None]:
    """Versions by name, from what is installed: nothing is imported. None for a library that is not there."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from vlm_tune import __version__

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {"vlm_tune": __version__, "python": platform.python_version(), **{name: installed(name) for name in LIBRARIES}}


def _version_line() -> str:
    known = _versions()
    return f"vlm_tune {known['vlm_tune']} (Python {known['python']}, torch {known['torch']}, transformers {known['transformers']})"


def _load(name: str, overrides: list[str] | None, *, quiet: bool = False) -> Recipe:
    """A recipe file, or a shipped recipe by its name, with overrides; what these replace is said unless `quiet`."""
    from vlm_tune.config.load import load_recipe
    from vlm_tune.resources import find_resource, resource_names

    path = name
    if not os.path.lexists(name):
        short = name.removesuffix(".yaml")
        shipped = find_resource("recipes", short)
        near = difflib.get_close_matches(short, resource_names("recipes"), n=1)
        if shipped is None and near:
            message = f"no such recipe file, and no shipped recipe of that name; did you mean {near[0]}?"
            raise RecipeError([Problem(cut(name), message)])
        path = str(shipped) if shipped else name
    note: Callable[[str], None] | None = None if quiet else lambda text: typer.echo(f"note: {text}", err=True)
    return load_recipe(path, overrides or [], note=note)


def _use_device(device: str | None) -> None:
    """Leaves one kind of device, or one GPU, for torch to see, which must not have looked for GPUs yet."""
    if device is None:
        return
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", device)
    if match is None:
        raise typer.BadParameter(f"{quoted(device)} is none of cpu, cuda, cuda:0, cuda:1, ...", param_hint="--device")
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

    # The first look at the GPUs, after which the variable is read no more.
    if not torch.cuda.device_count():
        raise typer.BadParameter(f"{device} is not there: torch {torch.__version__} sees no such GPU", param_hint="--device")


def _quiet() -> None:
    """Libraries say what matters by raising; their progress bars and banners are left out of our output."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("transformers", "bitsandbytes", "deepspeed", "DeepSpeed", "accelerate", "root", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its logger up again when it is imported; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode())


def _bases(given: list[str] | None) -> dict[str, str]:
    """New places of bases by part: `PATH` is the language model's, `tower=PATH` another part's."""
    places: dict[str, str] = {}
    for text in given or []:
        part, equals, path = text.partition("=")
        known = equals and part in ("llm", "tower", "tower.0", "tower.1")
        places[part if known else "llm"] = path if known else text
    return places


def _launch(processes: int, *command: str) -> NoReturn:
    """Runs one of these commands as the ranks of one job and ends with the job's exit code."""
    from vlm_tune.launching import launch

    if "RANK" in os.environ:
        raise typer.BadParameter("this process was started as one of several already", param_hint="--processes")
    sys.exit(launch([sys.executable, "-m", "vlm_tune.cli", *command], processes))


@app.command()
def sft(
    recipe: RecipeArgument,
    set_: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint of this recipe's run")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="start anew: delete what the run in the output folder wrote")] = False,
    processes: ProcessesOption = 1,
    accept_changes: Annotated[bool, typer.Option("--accept-changes", help="with --resume: go on though the recipe has changed")] = False,
    output: Annotated[str | None, typer.Option(help="the run's folder, in place of the recipe's `output`")] = None,
    no_test: Annotated[bool, typer.Option("--no-test", help="do not score the test part at the end (it is read and checked)")] = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune what RECIPE says, score the result, and write a report."""
    from vlm_tune.run_folder import check_run

    changes = [*(set_ or []), *([f"output={json.dumps(output)}"] if output is not None else [])]
    first = int(os.environ.get("RANK", "0")) == 0
    loaded = _load(recipe, changes, quiet=not first)
    if first:
        check_run(Path(loaded.output), loaded, resume=resume, overwrite=overwrite, accept_changes=accept_changes)
    if processes > 1:
        if device not in (None, "cpu", "cuda"):
            raise typer.BadParameter("several processes take a GPU each; choose them with CUDA_VISIBLE_DEVICES", param_hint="--device")
        flags = {"--resume": resume, "--overwrite": overwrite, "--accept-changes": accept_changes, "--json": as_json}
        flags["--no-test"] = no_test
        options = [*(f"--set={change}" for change in changes), *(name for name, given in flags.items() if given)]
        _launch(processes, "sft", recipe, *options, *([f"--device={device}"] if device else []))
    _use_device(device)
    _quiet()
    from vlm_tune.api import sft as train
    from vlm_tune.rendering.terminal import Display

    display = Display(Console(stderr=as_json), beats=first)
    with display if first else nullcontext():
        run = train(loaded, resume=resume, overwrite=overwrite, accept_changes=accept_changes, test=not no_test, show=display)
    if first:
        if as_json:
            _print_json({"run": str(run.folder), **run.result})
        else:
            typer.echo(f"model: {run.folder / 'model'}\nreport: {run.folder / 'report.html'}\nresult: {run.folder / 'result.json'}")


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a run, a checkpoint or a merged folder")],
    recipe: Annotated[str | None, typer.Option(help="whose data to score on; the run's own where not given")] = None,
    set_: SetOption = None,
    split: Annotated[str, typer.Option(help="test or validation")] = "test",
    data: Annotated[
        str | None, typer.Option(help="score on this file of rows (or a pattern, or tar shards) instead of the recipe's")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="score the first n rows only")] = None,
    answers: Annotated[Path | None, typer.Option(help="write every answer to this JSONL file")] = None,
    dtype: DtypeOption = None,
    base: BaseOption = None,
    accept_other_base: AcceptBaseOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score MODEL's generated answers by exact match."""
    from dataclasses import asdict

    _choice("--split", split, ("test", "validation"))
    part: Any = split
    _dtype(dtype)
    loaded = _load(recipe, set_) if recipe else None
    if answers:
        check_writable(answers, "the file of answers")
    _use_device(device)
    _quiet()
    from vlm_tune.api import evaluate as run
    from vlm_tune.api import which_model
    from vlm_tune.rendering.terminal import Display, score_table

    console = Console(stderr=as_json)
    which = which_model(model)
    with Display(console) as display:
        display({"event": "model", **which})
        found = run(
            model,
            loaded,
            set_ or [],
            split=part,
            data=data,
            limit=limit,
            dtype=dtype,
            base=_bases(base),
            accept_other_base=accept_other_base,
            show=display,
        )
    if answers:
        with writing(answers, "the file of answers"):
            answers.write_text("".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in found.answers), encoding="utf-8")
    if as_json:
        _print_json({"model": which, **found.summary()})
    else:
        console.print(score_table(found.accuracy, found.n, found.by_category, found.by_source))


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a run, a checkpoint or a merged folder")],
    data: Annotated[str, typer.Option(help="a file of rows (or a pattern, or tar shards) of any form, with or without answers")],
    output: Annotated[Path, typer.Option(help="the JSONL file to write")],
    limit: Annotated[int | None, typer.Option(min=1, help="answer the first n rows only")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, max=MOST_TOKENS, help="longest answer; the recipe's where not given")] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, max=1000, help="1 is greedy; the recipe's where not given")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, max=MOST_TOKENS, help="rows a batch; the recipe's where not given")] = None,
    dtype: DtypeOption = None,
    base: BaseOption = None,
    accept_other_base: AcceptBaseOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL's answers to the rows of a file, without scoring them."""
    _dtype(dtype)
    check_writable(output, "the file of answers")
    _use_device(device)
    _quiet()
    from vlm_tune.api import predict as run
    from vlm_tune.api import which_model
    from vlm_tune.rendering.terminal import Display

    which = which_model(model)
    with Display(Console(stderr=True)) as display:
        display({"event": "model", **which})
        written = run(
            model,
            data,
            output,
            limit=limit,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            batch_size=batch_size,
            dtype=dtype,
            base=_bases(base),
            accept_other_base=accept_other_base,
            show=display,
        )
    if as_json:
        _print_json({"model": which, **written.summary()})
    else:
        typer.echo(f"{written.n:,} answers in {written.seconds:,.1f} s: {output}")


@app.command("verify-run")
def verify_run(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")],
    steps: Annotated[int | None, typer.Option(min=1, help="how many; up to the next kept checkpoint where not given")] = None,
    processes: ProcessesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Replay steps of RUN from a checkpoint and compare with it bit for bit; exit code 5 if anything differs."""
    if processes > 1:
        options = [*(["--steps", str(steps)] if steps else []), *(["--json"] if as_json else [])]
        _launch(processes, "verify-run", str(run), *options)
    _quiet()
    from vlm_tune.api import verify_run as replay
    from vlm_tune.rendering.terminal import replay_lines

    found = replay(run, steps=steps)
    if int(os.environ.get("RANK", "0")) == 0:
        if as_json:
            _print_json(found.summary())
        else:
            typer.echo("\n".join(replay_lines(found)))
    if not found.agrees:
        sys.exit(EXIT_TRAINING)


@app.command()
def merge(
    model: Annotated[Path, typer.Argument(metavar="RUN", help="a run or a checkpoint")],
    output: Annotated[Path, typer.Option(help="the folder to write")],
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; bf16, or where that is too coarse fp16")] = None,
    tolerance: Annotated[float | None, typer.Option(help="how far rounding may move logits; 0.02 where not given")] = None,
    base: BaseOption = None,
    accept_other_base: AcceptBaseOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge LoRA weights into the 16-bit base, verify, and write a self-contained folder."""
    from dataclasses import asdict

    _dtype(dtype)
    _use_device(device)
    _quiet()
    from vlm_tune.api import merge as run
    from vlm_tune.rendering.terminal import Display

    with Display(Console(stderr=True)):
        report = run(model, output, dtype=dtype, tolerance=tolerance, base=_bases(base), accept_other_base=accept_other_base)
    if as_json:
        _print_json(asdict(report))
    else:
        from vlm_tune.rendering.terminal import merge_proof

        typer.echo(f"merged LoRA on {', '.join(report.parts)} into {report.base}\n{merge_proof(report)}\nmodel: {output}")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a run, a checkpoint or a merged folder")],
    output: Annotated[Path, typer.Option(help="the folder to write")],
    format_: Annotated[
        str, typer.Option("--format", help="llava: for transformers, adapters merged; adapter: a PEFT folder; gguf: for llama.cpp, merged")
    ] = "llava",
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32 (gguf: or q8_0); the merge's or the model's own where not given")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="largest weights file of a llava")] = "5GB",
    verify: Annotated[bool, typer.Option(help="open what was written and compare it with MODEL")] = True,
    base: BaseOption = None,
    accept_other_base: AcceptBaseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL in another library's layout and verify it there."""
    from dataclasses import asdict

    _choice("--format", format_, ("llava", "adapter", "gguf"))
    if dtype is not None:
        _choice("--dtype", dtype, ("bf16", "fp16", "fp32", *(("q8_0",) if format_ == "gguf" else ())))
    _quiet()
    from vlm_tune.api import export as run
    from vlm_tune.rendering.terminal import Display

    with Display(Console(stderr=True)):
        report = run(
            model,
            output,
            format=format_,
            dtype=dtype,
            max_shard_size=max_shard_size,
            verify=verify,
            base=_bases(base),
            accept_other_base=accept_other_base,
        )
    if as_json:
        _print_json(asdict(report))
    else:
        from vlm_tune.rendering.terminal import export_proof

        typer.echo(f"{report.format} of {report.parameters:,} parameters in {report.dtype}\n{export_proof(report)}")
        for note in report.notes:
            typer.echo(f"note: {note}")
        typer.echo(f"model: {output}")


@app.command()
def chat(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a run, a checkpoint or a merged folder")],
    image: Annotated[list[Path] | None, typer.Option(help="an image (again for more)")] = None,
    prompt: Annotated[str | None, typer.Option(help="the question; without it, ask in the terminal")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="longest answer in tokens")] = 128,
    dtype: DtypeOption = None,
    base: BaseOption = None,
    accept_other_base: AcceptBaseOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask MODEL about images: one --prompt, or a conversation in the terminal."""
    _dtype(dtype)
    _use_device(device)
    _quiet()
    from vlm_tune.model.vlm import VisionLanguageModel

    vlm = VisionLanguageModel.from_pretrained(model, dtype=dtype, base=_bases(base), accept_other_base=accept_other_base)
    images = image or []
    if prompt is not None:
        answer = vlm.chat(prompt, images=images, max_new_tokens=max_new_tokens)
        _print_json({"answer": answer}) if as_json else typer.echo(_lines(answer))
        return
    turns: list[dict[str, str]] = []
    if sys.stdin.isatty():
        typer.echo("Ask about the image; an empty line or Ctrl-D ends.", err=True)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        if not line:
            break
        turns.append({"role": "user", "content": line})
        answer = vlm.chat(turns, images=images, max_new_tokens=max_new_tokens)
        turns.append({"role": "assistant", "content": answer})
        _print_json({"answer": answer}) if as_json else typer.echo(_lines(answer))


def _lines(text: str) -> str:
    """Text whose line breaks and tabs a terminal may act on, and nothing else of it."""
    return "\n".join("\t".join(escaped(part) for part in line.split("\t")) for line in text.split("\n"))


@app.command()
def show(
    recipe: RecipeArgument,
    n: Annotated[int, typer.Option("-n", min=1, max=10_000, help="how many samples of each stage")] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="print token ids as well")] = False,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print training samples as the model sees them: trained tokens, prompt tokens, image slots."""
    loaded = _load(recipe, set_)
    _quiet()
    from vlm_tune.rendering.samples import sample_tokens, show_samples

    samples = sample_tokens(loaded, n)
    if as_json:
        _print_json(samples)
    else:
        show_samples(Console(), samples, ids=ids)


@app.command()
def check(
    recipe: RecipeArgument,
    set_: SetOption = None,
    sample: Annotated[int | None, typer.Option(min=1, help="read the first n rows of each source only")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with figures and a look at the odd rows to this file")] = None,
    as_json: JsonOption = False,
) -> None:
    """Read all that RECIPE would train and score on, and name the rows that are bad, odd, too long or leaked."""
    loaded = _load(recipe, set_)
    if html:
        check_writable(html, "the page")
    _quiet()
    from vlm_tune.data_check.check import check as run
    from vlm_tune.rendering.terminal import Display, show_check, show_exports

    console = Console(stderr=as_json)
    with Display(console) as display:
        report = run(loaded, sample=sample, show=display)
    if html:
        from vlm_tune.rendering.check_page import write_page

        with writing(html, "the page"):
            write_page(report, html)
    exports = _exports(loaded)
    if as_json:
        _print_json({**report.summary(), "exports": exports})
    else:
        show_exports(console, exports)
        show_check(console, report)
        if html:
            typer.echo(f"page: {html}")
    sys.exit(report.exit_code)


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpu_memory: Annotated[str | None, typer.Option(help="of one device, as 24GB or 40GiB; without it, this machine's kind")] = None,
    processes: Annotated[int, typer.Option(min=1, help="how many train together, one a device")] = 1,
    zero: Annotated[int, typer.Option(min=0, max=3, help="DeepSpeed's ZeRO stage")] = 0,
    offload: Annotated[str, typer.Option(help="to the machine's memory: none, optimizer, or all (weights too)")] = "none",
    nodes: Annotated[int, typer.Option(min=1, help="machines that the processes are on")] = 1,
    bandwidth: Annotated[float, typer.Option(help="Gbit/s of a node's link; on one node, of a device's")] = 100.0,
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s that a device reaches, for the expected efficiency")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="length of a row; from the data, or max_length, where not given")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what RECIPE needs (parameters, memory by cause, FLOPs, traffic) without its weights; exit code 5 if it does not fit."""
    _choice("--offload", offload, ("none", "optimizer", "all"))
    loaded = _load(recipe, set_)
    _quiet()
    from vlm_tune.memory_plan.plan import plan as run
    from vlm_tune.rendering.terminal import show_exports, show_plan

    places: Any = {"processes": processes, "zero": zero, "offload": offload, "nodes": nodes}
    found = run(loaded, gpu_memory=gpu_memory, **places, bandwidth=bandwidth, tflops=tflops, tokens=tokens)
    exports = _exports(loaded)
    if as_json:
        _print_json({**found.summary(), "exports": exports})
    else:
        show_plan(Console(), found)
        show_exports(Console(), exports)
    if found.fits is False:
        sys.exit(EXIT_TRAINING)


def _exports(recipe: Recipe) -> dict[str, str | None] | str:
    """By format why the trained model can't be exported so, None where it can; or why that is not known."""
    from vlm_tune.errors import ModelError
    from vlm_tune.exporting import possible_exports

    try:
        return possible_exports(recipe)
    except ModelError as error:  # a config that is not on this machine: the rest of what is told does not need it
        return str(error).splitlines()[0]


@app.command()
def schema() -> None:
    """Print the recipe's JSON Schema, for editors."""
    from vlm_tune.config.load import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


@app.command()
def recipes(
    copy: Annotated[str | None, typer.Option(help="copy this recipe into the current folder")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the shipped recipes, or copy one."""
    from vlm_tune.resources import find_resource, resource_names

    if copy is not None:
        shipped = find_resource("recipes", copy)
        if shipped is None:
            raise RecipeError([Problem("--copy", f"no recipe {quoted(copy)}; there are {', '.join(resource_names('recipes'))}")])
        target = Path(f"{Path(copy).name}.yaml")
        with writing(target, "the recipe's copy"):
            if os.path.lexists(target):
                raise RecipeError([Problem(str(target), "is there already; it is left as it is")])
            target.write_text(shipped.read_text(encoding="utf-8"), encoding="utf-8")
        _print_json({"path": str(target)}) if as_json else typer.echo(str(target))
        return
    rows = []
    for name in resource_names("recipes"):
        path = find_resource("recipes", name)
        assert path is not None
        first = path.read_text().splitlines()[0].lstrip("# ")
        rows.append({"name": name, "about": first})
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        typer.echo(f"{row['name']:28} {row['about']}")


def _dtype(value: str | None) -> None:
    if value is not None:
        _choice("--dtype", value, ("bf16", "fp16", "fp32"))


def _choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(choices)}", param_hint=option)


def main() -> None:
    """Runs the command line; every error of ours ends with its own exit code and no traceback."""
    # Libraries make millions of objects that stay: looking for garbage among them takes a sixth of the time of importing them.
    gc.set_threshold(50_000, 20, 50)
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe that can't encode a character gets its number, and the command goes on.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    sys.excepthook = _report_bug
    try:
        kernel_choice()  # a value that is none ends every command before it does anything
        if any("\0" in argument for argument in sys.argv):  # as a caller in Python may give it
            raise typer.BadParameter("an argument holds a NUL character")
        sys.exit(app(standalone_mode=False) or 0)
    except UsageError as error:
        _usage(error)
        sys.exit(EXIT_RECIPE)
    except VlmTuneError as error:
        if "--json" in sys.argv:
            problems = [{"where": p.where, "message": p.message} for p in error.problems] if isinstance(error, RecipeError) else []
            _print_json({"error": type(error).__name__, "message": str(error), "problems": problems})
        else:
            typer.echo(
                f"{type(error).__name__}\n{error}" if isinstance(error, RecipeError) else f"{type(error).__name__}: {error}", err=True
            )
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)


def _usage(error: Any) -> None:
    """Prints what is wrong with a command line."""
    if "--json" not in sys.argv:
        error.show()
        return
    hint = getattr(error, "param_hint", None) or getattr(getattr(error, "param", None), "opts", [""])[0]
    message = error.format_message()
    _print_json({"error": "UsageError", "message": message, "problems": [{"where": str(hint), "message": message}]})


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints the traceback of what no part of the package has foreseen."""
    sys.__excepthook__(kind, error, trace)
    typer.echo(
        f"\nThis is a fault of vlm_tune, not of your input. Please report it with the lines above, the command, and: {_version_line()}",
        err=True,
    )


if __name__ == "__main__":
    main()
