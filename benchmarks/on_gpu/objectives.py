"""Steps of DPO and GRPO beside TRL's trainers, on the same weights, rows and answers' lengths."""

from __future__ import annotations

import contextlib
import gc
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.material import write_preferences
from benchmarks.on_gpu.material import EACH, RANK, material
from benchmarks.on_gpu.measuring import (
    TRIAL_STEPS,
    TRIAL_WARM,
    Steps,
    best_batch,
    device_type,
    memory_gb,
    or_out_of_memory,
    steps_of,
)
from benchmarks.on_gpu.peers import common_arguments, peer_script
from benchmarks.on_gpu.report import Report
from benchmarks.on_gpu.training import Enough
from benchmarks.peers import probe
from vlm_tune.api import dpo, grpo
from vlm_tune.config.load import parse_recipe
from vlm_tune.events import Event, StageStart, TrainSteps

GROUP = 8
"""Completions of a prompt."""

LENGTH = {"tiny": 4, "real": 64}
"""The maximum tokens of a completion. Random weights hardly ever end one before."""

IMAGES = {"tiny": 8, "real": 240}
"""Images with pairs of answers, ten each."""

OBJECTIVES = {
    "dpo": "objective: {kind: dpo, loss_type: [sigmoid, sft], loss_weights: [1.0, 0.2], beta: 0.1}",
    "grpo": "objective: {{kind: grpo, reward_funcs: ['benchmarks.peers.rewards:vowels'], "
    "num_generations: {group}, max_completion_length: {length}}}",
}
STARTS = {"dpo": (2, 8), "grpo": (4, 4)}
"""The batch that the search begins with: images of ten pairs or prompts of ours, and TRL's pairs or
prompts."""

MOST = {"dpo": (8, 64), "grpo": (16, 16)}


def rows_of(report: Report) -> Path:
    """The folder of pairs and questions, written if it is not there."""
    home = material(report.folder, report.options["shape"], tiny=report.tiny) / "pairs"
    if not (home / "preferences.jsonl").is_file():
        home.mkdir(exist_ok=True)
        write_preferences(home, IMAGES["tiny" if report.tiny else "real"], EACH)
    return home


def length_of(report: Report) -> int:
    """The maximum tokens of a completion."""
    return LENGTH["tiny" if report.tiny else "real"]


def search(
    report: Report,
    name: str,
    measure: Callable[[int, tuple[int, int]], dict[str, Any]],
    start: int,
    most: int,
) -> None:
    """Adds the row of the fastest batch."""

    def trial(batch: int) -> Any:
        return or_out_of_memory(lambda: measure(batch, (TRIAL_WARM, TRIAL_STEPS)))

    batch, trials = best_batch(trial, start, start if report.tiny else most, memory_gb())
    report.row(name, **measure(batch, steps_of(report)), trials=trials)


def figures(steps: Steps, units: int, warm: int) -> dict[str, Any]:
    """Pairs or prompts a second (as `questions_per_s`) after the first steps, memory in GB."""
    laps = steps.clock.laps()
    counted = laps[warm:]
    return {
        "batch": steps.batch,
        "steps": len(counted),
        "questions_per_s": 1000 * units * len(counted) / sum(counted),
        "questions_a_step": units,
        "ms": statistics.median(counted),
        "ms_each": [round(lap, 3) for lap in laps],
        "first_step_s": laps[0] / 1000,
        "weights_gb": steps.weights / 1e9,
        "peak_gb": steps.peak / 1e9,
        "above_weights_gb": (steps.peak - steps.weights) / 1e9,
    }


# --- ours ----------------------------------------------------------------------------------------


def recipe_text(report: Report, output: Path, batch: int) -> str:
    """A recipe that trains the same as TRL: LoRA on the LLM, the rest frozen."""
    kind, pairs = report.options["kind"], rows_of(report)
    home = material(report.folder, report.options["shape"], tiny=report.tiny)
    objective = OBJECTIVES[kind]
    if kind == "grpo":
        objective = objective.format(group=GROUP, length=length_of(report))
    file = "preferences.jsonl, form: preference" if kind == "dpo" else "single.jsonl"
    return f"""
name: gpu
output: {output}
model: {{pretrained: {home / "llava"}}}
data:
  template: chatml
  max_length: 2048
  group: {"image" if kind == "dpo" else "none"}{chr(10) + "  workers: 1" if report.tiny else ""}
  train: [{{kind: file, path: {pairs}/{file}}}]
tune:
  - {{match: "tower.*", how: frozen}}
  - {{match: "connector.*", how: frozen}}
  - {{match: "llm.*", how: lora, r: {RANK}, lora_alpha: 32, target_modules: all-linear}}
{objective}
train: {{steps: 1000, batch_size: {batch}, precision: bf16, log_every: 1, cache_features: false,
  compile: false, checkpoints: {{every: 1000000}}}}
evaluate: {{samples: 0}}
"""


def ours(report: Report) -> None:
    """Measures our steps; the option `kind` is dpo or grpo."""
    kind = report.options["kind"]
    train = {"dpo": dpo, "grpo": grpo}[kind]

    def measure(batch: int, counted: tuple[int, int]) -> dict[str, Any]:
        steps = Steps(batch)

        def show(event: Event) -> None:
            if isinstance(event, StageStart):
                steps.begin()
            elif isinstance(event, TrainSteps):
                steps.clock.mark()
                if event.step == sum(counted):
                    steps.end()
                    raise Enough

        with tempfile.TemporaryDirectory() as folder:
            text = recipe_text(report, Path(folder) / "run", batch)
            with contextlib.suppress(Enough):
                train(parse_recipe(text), test=False, show=show)
        gc.collect()
        return figures(steps, batch * (EACH if kind == "dpo" else 1), counted[0])

    start, most = STARTS[kind][0], MOST[kind][0]
    search(report, f"{report.options['shape']} {kind}", measure, start, most)


# --- TRL -----------------------------------------------------------------------------------------


class Marking(transformers.TrainerCallback):
    """Marks the clock after each step."""

    def __init__(self) -> None:
        self.steps = Steps(0)

    def on_train_begin(self, *unused: Any, **named: Any) -> None:
        self.steps.begin()

    def on_step_end(self, *unused: Any, **named: Any) -> None:
        self.steps.clock.mark()


def trl(report: Report) -> None:
    """Measures the steps of TRL's DPOTrainer or GRPOTrainer: bf16 weights, no checkpointing."""
    kind = report.options["kind"]
    home = material(report.folder, report.options["shape"], tiny=report.tiny)

    def measure(batch: int, counted: tuple[int, int]) -> dict[str, Any]:
        marking = Marking()
        marking.steps.batch = batch
        with tempfile.TemporaryDirectory() as output:
            arguments = {
                **common_arguments(output),
                "max_steps": sum(counted),
                "gradient_checkpointing": False,
                "per_device_train_batch_size": batch * (GROUP if kind == "grpo" else 1),
            }
            _trainer(report, home, arguments, marking).train()
        marking.steps.end()
        gc.collect()
        return figures(marking.steps, batch, counted[0])

    start, most = STARTS[kind][1], MOST[kind][1]
    search(report, f"{report.options['shape']} trl {kind}", measure, start, most)


def _trainer(report: Report, home: Path, arguments: dict[str, Any], marking: Marking) -> Any:
    """TRL's trainer of the phase's kind."""
    from datasets import Dataset, Image, Sequence
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    is_dpo = report.options["kind"] == "dpo"
    rows: Any = probe.read_rows(
        {"material": str(rows_of(report)), "rows": "preferences" if is_dpo else "single"}
    )
    settings: dict[str, Any]
    if is_dpo:
        options = peer_script("train_dpo").options({"batch": 0})
        settings = {
            name: options[name] for name in ("loss_type", "loss_weights", "beta", "max_length")
        }
    else:
        rows = [{"prompt": row["messages"][:1], "images": row["images"]} for row in rows]
        settings = {"num_generations": GROUP, "max_completion_length": length_of(report)}
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        home / "llava", dtype=torch.bfloat16
    )
    named = {} if is_dpo else {"reward_funcs": peer_script("rewards").vowels}
    trainer: Any = DPOTrainer if is_dpo else GRPOTrainer
    config: Any = DPOConfig if is_dpo else GRPOConfig
    return trainer(
        model=model,
        args=config(bf16=device_type() == "cuda", **arguments, **settings),
        train_dataset=Dataset.from_list(rows).cast_column("images", Sequence(Image())),
        processing_class=transformers.AutoProcessor.from_pretrained(home / "llava"),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=32, target_modules=peer_script("train_trl").TARGETS
        ),
        callbacks=[marking],
        **named,
    )
