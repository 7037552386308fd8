"""Our training steps, by the loop that `vlm-tune sft` runs, up to the last measured one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.material import RANK, Shape, material, shape
from benchmarks.on_gpu.measuring import (
    TRIAL_STEPS,
    TRIAL_WARM,
    Steps,
    best_batch,
    memory_gb,
    note_gemm,
    or_out_of_memory,
    steps_of,
)
from benchmarks.on_gpu.profiling import Profile, compilations, graph_breaks
from benchmarks.on_gpu.report import Report
from benchmarks.on_gpu.work import Useful, batch_amount
from benchmarks.ours import Amount
from vlm_tune.config.load import parse_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.batch import Batch
from vlm_tune.events import Event, StageStart, TrainSteps
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.build import build
from vlm_tune.train.accelerator import accelerator_of
from vlm_tune.train.checkpoint import Progress
from vlm_tune.train.engines.registry import resolve_engine
from vlm_tune.train.stage import Context, StageRows, read_rows, stage_loop
from vlm_tune.train.watchdog import Watch

FORMS = {
    "branches": "group: image, row_length: 1024",
    "packed": "group: image, packing: true, row_length: 4096",
    "rows": "group: none",
}
"""Keys of `data`: an image with its questions as branches, these packed, a row a question."""

STARTS = {"branches": 2, "packed": 1, "rows": 8}
"""The batch that the search begins with."""

MOST = {"branches": 128, "packed": 32, "rows": 512}
MANY = 1000
"""Steps of the recipe, of which the first are run: `compile: auto` looks at their number."""


def ours(report: Report) -> None:
    """Finds the batch, measures the steps, and with `profile` looks into one."""
    options = report.options
    kind = shape(options["shape"], tiny=report.tiny)
    home = material(report.folder, options["shape"], tiny=report.tiny)
    note_gemm(report)
    trainer = Trainer(report, kind, home, options.get("quantize"))
    form = options["form"]
    name = f"{options['shape']} {options.get('quantize') or form}"

    def trial(batch: int) -> Any:
        # Not compiled: that would take longer than the search, and takes no more memory.
        return or_out_of_memory(
            lambda: trainer.measure(form, batch, (TRIAL_WARM, TRIAL_STEPS), compiles=False)
        )

    trials: dict[str, Any] = {}
    # Quantised, the batch of the run that is not: steps are compared.
    batch = batch_of(report, f"{options['shape']} {form}") if options.get("quantize") else None
    if batch is None:
        most = STARTS[form] if report.tiny else MOST[form]
        batch, trials = best_batch(trial, STARTS[form], most, memory_gb())
    compiles = not report.tiny
    steps = steps_of(report)
    figures = trainer.measure(form, batch, steps, compiles=compiles)
    report.row(name, **figures, trials=trials)
    if options.get("profile"):
        profile = Profile()
        trainer.measure(form, batch, steps, compiles=compiles, profile=profile)
        report.figure("profile", profile.summary())
        _compare_plan(report, trainer.recipe(form, batch, compiles=compiles), figures)


def batch_of(report: Report, name: str) -> int | None:
    """The batch of a run of an earlier phase; None if there is none."""
    rows = [row for phase in report.known.values() for row in phase.get("rows", ())]
    return next((row["batch"] for row in rows if row["name"] == name), None)


def recipe_text(kind: Shape, home: Path, run: Path, form: str, batch: int, **keys: Any) -> str:
    """A recipe that trains the same as the peers: LoRA, the connector in full, a frozen tower.

    Further `keys` are `compiles`, `quantize` and `data`, more lines of that section.
    """
    if kind.seq2seq:
        tower = f"{{kind: transformers, name: {home / 'tower'}, layer: -1}}"
        parts = f"{{tower: {tower}, llm: {{kind: seq2seq, name: {home / 't5'}}}}}"
    else:
        quantize = keys.get("quantize") or "null"
        parts = f"{{pretrained: {home / 'llava'}, llm: {{quantize: {quantize}}}}}"
    return f"""
name: gpu
output: {run}
model: {parts}
data:
  template: {"flan" if kind.seq2seq else "chatml"}
  max_length: 2048{keys.get("data", "")}
  {FORMS[form].replace(", ", chr(10) + "  ")}
  train: [{{kind: file, path: {home / "single.jsonl"}}}]
  test: [{{kind: file, path: {home / "test" / "single.jsonl"}}}]
tune:
  - {{match: "tower.*", how: frozen}}
  - {{match: "connector.*", how: full, learning_rate: 1.0e-3}}
  - {{match: "llm.*", how: lora, r: {RANK}, lora_alpha: 32, target_modules: all-linear}}
train: {{steps: {MANY}, batch_size: {batch}, precision: bf16, log_every: 1, cache_features: false, \
compile: {str(keys.get("compiles", False)).lower()}, checkpoints: {{every: 1000000}}}}
evaluate: {{samples: 0, max_new_tokens: 8, batch_size: 250, baselines: []}}
"""


class Enough(Exception):
    """Ends a training loop after the last step that is measured."""


class Meter:
    """Takes the loop's events and its batches, and ends it after so many steps.

    With a `profile` one more step is run, in it.
    """

    def __init__(
        self,
        steps: Steps,
        counted: tuple[int, int],
        *,
        seq2seq: bool,
        profile: Profile | None,
    ) -> None:
        self.steps = steps
        self.warm = counted[0]
        self.most = sum(counted)
        self.compiled = [compilations()]
        self.seq2seq = seq2seq
        self.profile = profile
        self.batches: list[list[tuple[Batch, int]]] = []
        """By step: micro-batches without their pixels, and their numbers of images."""

    def event(self, event: Event) -> None:
        """Notes the time after each step."""
        if isinstance(event, StageStart):
            self.steps.begin()
        elif isinstance(event, TrainSteps):
            self._after_step(event.step)

    def _after_step(self, step: int) -> None:
        if step <= self.most:
            self.steps.clock.mark()
        if step in (self.warm, self.most):
            self.compiled.append(compilations())
        if step == self.most:
            self.steps.end()
            if self.profile is None:
                raise Enough
            self.profile.start()
        elif step > self.most:
            assert self.profile is not None
            self.profile.stop()
            raise Enough

    def count(self) -> None:
        """Counts the content of the steps' batches, after them."""
        for batches in self.batches[: self.most]:
            amounts = [batch_amount(batch, seq2seq=self.seq2seq) for batch, _ in batches]
            self.steps.amounts.append(sum(amounts, Amount()))
            self.steps.images.append(sum(images for _, images in batches))
            self.steps.questions.append(sum(batch.questions for batch, _ in batches))
            self.steps.padded.append(sum(batch.attention_mask.numel() for batch, _ in batches))


class Noted:
    """A feed whose batches a meter keeps."""

    def __init__(self, feed: Any, meter: Meter) -> None:
        self._feed = feed
        self._meter = meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._feed, name)

    def windows(self, *arguments: Any, **named: Any) -> Iterator[Any]:
        """Yields the feed's windows."""
        for window in self._feed.windows(*arguments, **named):
            # The loop moves a batch to the device in place, and may do so steps ahead.
            self._meter.batches.append(
                [
                    (replace(batch, pixels=None), 0 if batch.pixels is None else len(batch.pixels))
                    for batch in window
                ]
            )
            yield window


class Trainer:
    """A model that is loaded once and trained in several settings."""

    def __init__(self, report: Report, kind: Shape, home: Path, quantize: str | None) -> None:
        self.kind = kind
        self.home = home
        self.run = report.folder / "training"
        self.run.mkdir(exist_ok=True)
        self.quantize = quantize
        # Processes would have to be started.
        self.data = "\n  workers: 1" if report.tiny else ""
        recipe = self.recipe("rows", 1, compiles=False)
        self.accelerator = accelerator_of(recipe)
        self.model: VisionLanguageModel = build(
            recipe, [], device=self.accelerator.device, model_class=VisionLanguageModel
        )
        self.rows: dict[str, StageRows] = {}
        text, vision = kind.configs()
        self.useful = Useful.of(text, vision, blocks=kind.blocks, rank=RANK, seq2seq=kind.seq2seq)

    def recipe(self, form: str, batch: int, *, compiles: bool) -> Recipe:
        """The recipe of a setting."""
        keys = {"compiles": compiles, "quantize": self.quantize, "data": self.data}
        return parse_recipe(recipe_text(self.kind, self.home, self.run, form, batch, **keys))

    def measure(
        self,
        form: str,
        batch: int,
        counted: tuple[int, int],
        *,
        compiles: bool,
        profile: Profile | None = None,
    ) -> dict[str, Any]:
        """The figures of some steps, of which the first don't count.

        Args:
            form: Of the rows, a name of `FORMS`.
            batch: Units a step.
            counted: Steps that don't count, and that do.
            compiles: Whether the blocks are compiled.
            profile: Looks into one more step.
        """
        recipe = self.recipe(form, batch, compiles=compiles)
        steps = Steps(batch)
        meter = Meter(steps, counted, seq2seq=self.kind.seq2seq, profile=profile)
        context = Context(
            recipe,
            self.run,
            self.accelerator,
            meter.event,
            lambda: False,
            "",
            Watch(self.accelerator, recipe.train.timeout),
            resolve_engine(recipe.engine),
        )
        if form not in self.rows:
            quiet = replace(context, report=lambda event: None)
            self.rows[form] = read_rows(quiet, 0, "main", recipe, self.model.processor)
        loop = stage_loop(
            context, self.model, "main", recipe, self.rows[form], Progress(ranks=1), None
        )
        loop.data.feed = Noted(loop.data.feed, meter)  # type: ignore[assignment]
        try:
            loop.run()
        except Enough:
            pass
        finally:
            loop.engine.release()
        meter.count()
        figures = steps.figures(self.useful, counted[0])
        before, warm, end = meter.compiled
        return {
            **figures,
            "graphs": warm - before,
            "recompiled": end - warm,
            "graph_breaks": graph_breaks(),
        }


def _compare_plan(report: Report, recipe: Recipe, figures: dict[str, Any]) -> None:
    """Compares what `vlm-tune plan` says with the memory that the run took."""
    from vlm_tune.memory_plan.plan import plan

    memory = memory_gb()
    planned = plan(recipe, gpu_memory=None if memory is None else int(memory * 1e9))
    needed = planned.needed / 1e9
    reserved = figures["reserved_gb"]
    share = needed / reserved if reserved else None
    report.figure("plan", {"gb": needed, "measured_gb": reserved, "ratio": share})
