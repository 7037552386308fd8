"""Rows of preferences about the tiny images, and tiny recipes and models that train on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.helpers.tiny_models import built, parsed, tuned_by, wake_adapters, with_tune
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.batch import Batch
from vlm_tune.data.prepare.run import conversations
from vlm_tune.data.types import Example
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.train.objective_registry import build_objective
from vlm_tune.train.objectives import Loss, Objective
from vlm_tune.train.references import AdapterOff

LORA = """
tune:
  - {match: "tower.*", how: frozen}
  - {match: "connector.*", how: frozen}
  - {match: "llm.*", how: lora, r: 4, lora_alpha: 8, target_modules: all-linear}
train:"""


def pairs_of(messages: Path) -> list[dict[str, Any]]:
    """The rows of a messages file as pairs: the answer, and one that is wrong."""
    pairs = []
    for line in messages.read_text().splitlines():
        row = json.loads(line)
        question, answer = row["messages"]
        wrong = "yes it is" if answer["content"] == "no" else "purple"
        pairs.append(
            {
                "prompt": [question],
                "chosen": [answer],
                "rejected": [{"role": "assistant", "content": wrong}],
                "images": row["images"],
            }
        )
    return pairs


def judged_of(messages: Path) -> list[dict[str, Any]]:
    """The rows of `pairs_of` as single answers, liked and disliked in turn."""
    return [
        {
            "prompt": pair["prompt"],
            "completion": pair["chosen" if number % 2 == 0 else "rejected"],
            "label": number % 2 == 0,
            "images": pair["images"],
        }
        for number, pair in enumerate(pairs_of(messages))
    ]


def write_rows_beside(messages: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes rows as a JSONL file beside the images of a messages file."""
    path = messages.with_name(name)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def preference_text(
    make: Callable[..., str], kind: str, objective: str, *, tune: str = LORA, judged: bool = False
) -> str:
    """A tiny recipe's text whose rows are preferences, with an objective and LoRA."""
    text = make(kind)
    messages = Path(parsed(text).data.train[0].path)  # type: ignore[attr-defined]
    rows = judged_of(messages) if judged else pairs_of(messages)
    path = write_rows_beside(messages, "preferences.jsonl", rows)
    text = with_tune(text, tune).replace(str(messages), str(path))
    return text.replace("\ntrain: {", f"\nobjective: {objective}\ntrain: {{")


def awake(recipe: Recipe) -> VisionLanguageModel:
    """The recipe's model with adapters that change its answers a little."""
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model, 0.05)
    return model


def examples_of(model: VisionLanguageModel, recipe: Recipe) -> list[Example]:
    """The recipe's training rows as examples."""
    rows = conversations(recipe.data, recipe.data.train, recipe.seed)
    return [example for row in rows for example in model.processor.examples(row)]


def objective_of(model: VisionLanguageModel, recipe: Recipe) -> Objective:
    """The recipe's objective in one process, with the adapters off as its reference."""
    device = torch.device("cpu")
    return build_objective(recipe.objective, AdapterOff(model), lambda figures: figures, device)


def step(
    model: VisionLanguageModel, recipe: Recipe, batches: Sequence[Batch]
) -> tuple[list[Loss], dict[str, torch.Tensor]]:
    """The losses of a step's micro-batches, and the gradients of the mean over the step."""
    objective = objective_of(model, recipe)
    counts = [objective.counts(batch) for batch in batches]
    totals = type(counts[0])(*(sum(column) for column in zip(*counts, strict=True)))
    model.zero_grad(set_to_none=True)
    objective.before(model, batches, totals)
    losses = []
    for batch in batches:
        loss = objective(model, batch, totals)
        (loss.sum / totals.items).backward()
        losses.append(loss)
    return losses, {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
