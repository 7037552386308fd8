"""Merges LoRA adapters into the base weights, and verifies that the merge equals the adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from vlm_tune.config.load import load_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.prepare.run import read_part
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError, ModelError, RecipeError, number_problems
from vlm_tune.evaluation.evaluate import score, score_options
from vlm_tune.exporting.card import described_parts, model_card
from vlm_tune.exporting.verify import TOLERANCE, largest_difference, observe, probe_rows
from vlm_tune.model.base_places import AS_SAVED, BaseArgument, BaseChoice, base_choice
from vlm_tune.model.checkpoint import find_single, load_model, save_model
from vlm_tune.model.lora import merge_adapter
from vlm_tune.model.restoring import read_config
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import cast_parameters
from vlm_tune.paths import check_path, check_writable, writing
from vlm_tune.precision import DTYPES, dtype_name
from vlm_tune.run_folder import recipe_above
from vlm_tune.version import __version__

SCORED = 256
"""Most validation rows that a quantised run and its merge are scored on."""


@dataclass(frozen=True)
class MergeReport:
    """How a merge compares with the adapter, the base and the run it was made from.

    Differences are the largest absolute difference of logits over `rows` rows, in fp32. "The
    adapter" is the adapter over the unquantised base, which the merge must equal within `allowed`.
    A quantised run was trained over other weights than those it is merged into:
    `difference_to_run` is the merge's difference to the run as trained, and both are scored on
    `scored` validation rows. `unscored` says why, if no validation rows can be read.
    """

    output: str
    parts: list[str]
    base: str
    difference_to_adapter: float
    difference_to_base: float
    same_text: bool
    rows: int
    allowed: float = TOLERANCE
    dtype: str = "bf16"
    why_dtype: str | None = None
    """Why the dtype is not bf16, if none was passed."""
    text_may_differ: bool = False
    """Whether other greedy text is accepted: true if a tolerance was passed."""
    quantized: str | None = None
    difference_to_run: float | None = None
    same_text_as_run: bool | None = None
    run_accuracy: float | None = None
    merged_accuracy: float | None = None
    scored: int = 0
    unscored: str | None = None


def merge(
    model: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    tolerance: float | None = None,
    task: str | None = None,
    base: BaseArgument = None,
    accept_other_base: bool = False,
) -> MergeReport:
    """Merges a run's or checkpoint's adapters into its base weights and writes a model folder.

    The merged weights are in 16 bit, or in fp32 if `dtype` says so. A 4- or 8-bit run is merged
    into its base loaded in `dtype`, never into quantised weights. Before anything is written, the
    merged logits must equal those of the adapter over that base within `tolerance`, and differ
    from the base's.

    Args:
        model: a run, a checkpoint or a model folder.
        output: the folder to write.
        dtype: bf16, fp16 or fp32, of the merged weights. By default bf16. If rounding to bf16 moves
            the logits further than allowed, fp16 (not for encoder-decoders, which overflow in it),
            or else fp32; the report says why.
        tolerance: how far logits may move. By default 2e-2, and then the greedy text must be the
            same too.
        task: the task whose adapter is merged, of a run whose tasks have adapters of their own.
        base: where the LLM's base is now, or `{"llm": ..., "tower": ...}`; its place of training
            by default.
        accept_other_base: merge into a base though its weights are not those of training.

    Raises:
        ModelError: there is nothing to merge, the base is not the one that was trained over, or
            verification fails; nothing is written.
        RecipeError: the output can't be written.
    """
    check_path("model", model)
    check_path("output", output)
    path = Path(model) if task is None else find_single(Path(model), task)
    output = Path(output)
    choice = base_choice(base, accept_other_base)
    dtype = dtype_name(dtype)
    if problems := number_problems("--tolerance", tolerance):
        raise RecipeError(problems)
    check_output(output, path)
    merged, report = merged_model(path, output, dtype, tolerance, choice)

    def extra(folder: Path) -> None:
        (folder / "merge.json").write_text(json.dumps(asdict(report), indent=1))
        (folder / "README.md").write_text(merged_card(merged, report))

    with writing(output, "the merged model"):
        save_model(merged, output, extra)
    return report


def check_output(output: Path, path: Path) -> None:
    """Raises `ModelError` or `RecipeError` for an output folder that can't be used.

    It must be empty or missing, writable, and not inside the model folder that `path` is read from.
    """
    source = find_single(path)
    if output.resolve() == source.resolve() or source.resolve() in output.resolve().parents:
        raise ModelError(
            f"{output}: the output lies in the model folder that is read, {source}; choose "
            "another place"
        )
    check_writable(output, "the output folder", folder=True)
    if output.is_dir() and any(output.iterdir()):
        raise ModelError(f"{output}: the output folder is not empty")


def merged_model(
    path: Path,
    output: Path,
    dtype: str | None,
    tolerance: float | None = None,
    base: BaseChoice = AS_SAVED,
) -> tuple[VisionLanguageNetwork, MergeReport]:
    """The model that `merge` writes, verified, and its report. Raises `ModelError` as `merge`."""
    source = find_single(path)
    config = read_config(source, base)
    quantized = config.llm.quantize
    as_trained = _as_trained(path, source, base) if quantized else None
    # A real LLM's logits, tens in size, can be off by more than the tolerance in fp16 too.
    choices = (
        [dtype]
        if dtype
        else ["bf16", "fp32"]
        if config.llm.kind == "seq2seq"
        else ["bf16", "fp16", "fp32"]
    )
    too_coarse: list[str] = []
    merging = _Merging(path, source, output, tolerance or TOLERANCE, tolerance is not None, base)
    model, report = merging.into(choices[0], quantized)
    for finer in choices[1:]:
        if passes(report):
            break
        precision = report.dtype
        moved = f"{precision} moves the logits by {report.difference_to_adapter:.2g}"
        too_coarse.append(
            moved
            if report.difference_to_adapter > report.allowed
            else f"{precision} changes the greedy text"
        )
        del model  # memory for one model may not be enough for two
        model, report = merging.into(finer, quantized)
    if too_coarse:
        why = f"{' and '.join(too_coarse)} ({report.allowed:g} is allowed; --tolerance allows more)"
        report = replace(report, why_dtype=why)
    check_merge(report)
    if as_trained is not None:
        report = _compared(model, report, as_trained)
    return model, report


@dataclass(frozen=True)
class _AsTrained:
    """Logits, answers and accuracy of a quantised run over its quantised base."""

    probes: list[Conversation]
    logits: torch.Tensor
    texts: list[str]
    accuracy: float | None
    validation: list[Conversation]
    recipe: Recipe | None
    unscored: str | None


def _as_trained(path: Path, source: Path, base: BaseChoice) -> _AsTrained:
    model = load_model(source, dtype=torch.float32, base=base)
    if not (model.adapters or model.beside):
        raise _nothing_to_merge(source)
    probes = probe_rows(path, model)
    logits, texts = observe(model, probes)
    recipe, rows, unscored = _validation(path, model)
    accuracy = _accuracy(model, rows, recipe) if recipe and rows else None
    return _AsTrained(probes, logits, texts, accuracy, rows, recipe, unscored)


def _validation(
    path: Path, model: VisionLanguageNetwork
) -> tuple[Recipe | None, list[Conversation], str | None]:
    """The recipe of a run's last stage and rows of its validation part, or why it has none."""
    file = recipe_above(path)
    if file is None:
        return None, [], "the folder is in no run with a recipe"
    recipe = load_recipe(file).last_stage
    try:
        rows = read_part(recipe.data, "validation", model.processor, recipe.seed)
    except DataError as error:
        return recipe, [], f"its validation part can't be read: {error}"
    return (
        recipe,
        rows[: min(recipe.evaluate.limit or SCORED, SCORED)],
        None if rows else "the recipe has no validation part",
    )


def _accuracy(model: VisionLanguageNetwork, rows: Sequence[Conversation], recipe: Recipe) -> float:
    options = score_options(recipe.evaluate, recipe.objective)
    return score(model, rows, **options, loss=False).accuracy


def _compared(model: VisionLanguageNetwork, report: MergeReport, run: _AsTrained) -> MergeReport:
    """Adds the comparison of the merged model with the run as it was trained to the report."""
    precision = DTYPES[report.dtype]
    cast_parameters(model, torch.float32)
    logits, texts = observe(model, run.probes)
    accuracy = (
        None
        if run.accuracy is None or run.recipe is None
        else _accuracy(model, run.validation, run.recipe)
    )
    cast_parameters(model, precision)
    return replace(
        report,
        difference_to_run=largest_difference(run.logits, logits),
        same_text_as_run=run.texts == texts,
        run_accuracy=run.accuracy,
        merged_accuracy=accuracy,
        scored=len(run.validation),
        unscored=run.unscored,
    )


def _nothing_to_merge(source: Path) -> ModelError:
    return ModelError(f"{source} has no adapter: nothing to merge, it can be used as it is")


@dataclass(frozen=True)
class _Merging:
    """The arguments of a merge, which is tried in one precision after another."""

    path: Path
    source: Path
    output: Path
    allowed: float
    text_may_differ: bool
    base: BaseChoice

    def into(self, dtype: str, quantized: str | None) -> tuple[VisionLanguageNetwork, MergeReport]:
        """Merges in one precision, without writing, and compares with the adapter and the base."""
        precision = DTYPES[dtype]
        model = load_model(self.source, dtype=precision, quantize=False, base=self.base)
        if not (model.adapters or model.beside):
            raise _nothing_to_merge(self.source)
        merged_parts = sorted(model.adapters)
        model.float()
        probes = probe_rows(self.path, model)
        adapter_logits, adapter_text = observe(model, probes)
        base_logits = (
            self._base_logits(precision, probes)
            if model.beside
            else _without_adapters(model, probes)
        )
        for part in merged_parts:
            merge_adapter(model, part)
        cast_parameters(model, precision)
        cast_parameters(model, torch.float32)
        merged_logits, merged_text = observe(model, probes)
        model.changed |= {"tower", "llm"}
        model.config = model.config.model_copy(update={"precision": dtype})
        cast_parameters(model, precision)
        return model, MergeReport(
            output=str(self.output),
            parts=merged_parts,
            base=f"{model.config.llm.name or 'the trained base'} in {dtype}"
            + (f" (the run was {quantized})" if quantized else ""),
            difference_to_adapter=largest_difference(adapter_logits, merged_logits),
            difference_to_base=largest_difference(base_logits, merged_logits),
            same_text=adapter_text == merged_text,
            rows=len(probes),
            allowed=self.allowed,
            dtype=dtype,
            text_may_differ=self.text_may_differ,
            quantized=quantized,
        )

    def _base_logits(self, precision: torch.dtype, probes: Sequence[Conversation]) -> torch.Tensor:
        model = load_model(
            self.source, dtype=precision, quantize=False, adapters=False, base=self.base
        )
        return observe(model.float(), probes)[0]


def passes(report: MergeReport) -> bool:
    """Whether a merge is near enough to the adapter."""
    return report.difference_to_adapter <= report.allowed and (
        report.same_text or report.text_may_differ
    )


def check_merge(report: MergeReport) -> None:
    """Raises `ModelError` for a merge that equals the base, or that differs from the adapter."""
    if not report.difference_to_base > 0:  # written so that it is true for NaN
        raise ModelError(
            "the merge had no effect: merged logits equal the base model's (the adapter is "
            "zero, or was never applied)"
        )
    if not report.difference_to_adapter <= report.allowed:
        raise ModelError(
            f"merged logits differ from the adapter's by {report.difference_to_adapter:.3g}, more "
            f"than {report.allowed:g}; nothing was written. Try --dtype fp32, or allow it with "
            "--tolerance"
        )
    if not passes(report):
        raise ModelError(
            "the merged model's greedy text differs from the adapter's; nothing was written. Try "
            "--dtype fp32, or allow it with --tolerance"
        )


def _without_adapters(model: VisionLanguageNetwork, probes: Sequence[Conversation]) -> torch.Tensor:
    for tuner in model.adapters.values():
        tuner.disable_adapter_layers()
    logits, _ = observe(model, probes)
    for tuner in model.adapters.values():
        tuner.enable_adapter_layers()
    return logits


EXAMPLE = """
from vlm_tune import VisionLanguageModel

folder = "{folder}"
vlm = VisionLanguageModel.from_pretrained(folder)
print(vlm.chat("What does the image show?", images=["image.png"]))
"""


def merged_card(model: VisionLanguageNetwork, report: MergeReport) -> str:
    """The README of a merged folder."""
    tower, connector, _ = described_parts(model.config.model)
    return model_card(
        {
            "library_name": "vlm_tune",
            "pipeline_tag": "image-text-to-text",
            "base_model": model.config.model.llm.name,
        },
        f"A vision-language model merged by vlm_tune {__version__}.",
        [
            f"tower: {tower}",
            f"connector: {connector}",
            f"language model: {report.base}",
            f"merged: LoRA on {', '.join(report.parts)}",
            *merge_lines(report),
        ],
        ("python", EXAMPLE.format(folder=report.output)),
        None,
    )


def merge_lines(report: MergeReport) -> list[str]:
    """The figures of a merge report as sentences."""
    lines = [
        (
            f"logits within {report.difference_to_adapter:.2g} of those with the adapter unmerged "
            f"({report.allowed:g} is allowed)"
        ),
        (
            f"logits up to {report.difference_to_base:.2g} from those of the base alone (0 would "
            "be no merge)"
        ),
        (
            f"greedy answers {'the same as' if report.same_text else 'other than'} with the "
            "adapter unmerged"
        ),
    ]
    if report.why_dtype:
        lines.append(f"merged in {report.dtype} because {report.why_dtype}")
    if report.difference_to_run is not None:
        same = "the same" if report.same_text_as_run else "other"
        lines.append(
            f"logits up to {report.difference_to_run:.2g} from those of the run as it was "
            f"trained, over its {report.quantized} base ({same} greedy answers)"
        )
        if report.run_accuracy is not None and report.merged_accuracy is not None:
            lines.append(
                f"exact match on {report.scored} validation rows: {report.run_accuracy:.4f} as "
                f"trained, {report.merged_accuracy:.4f} merged"
            )
        else:
            lines.append(f"not scored on validation rows: {report.unscored}")
    return lines
