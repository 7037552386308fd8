"""Compares models by their logits and greedy answers on a few rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vlm_tune.config.load import load_recipe
from vlm_tune.data.batching.collate import collate
from vlm_tune.data.prepare.run import conversations
from vlm_tune.data.types import Conversation, Message
from vlm_tune.errors import DataError
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.run_folder import recipe_above

TOLERANCE = 2e-2
"""Allowed difference of logits where weights are rounded to 16 bit."""
PROBED = 10_000
"""The first rows of a run's data, over which the probes are spread."""
PROBES = 4
"""Most rows that models are compared by."""


def probe_rows(path: Path, model: VisionLanguageNetwork) -> list[Conversation]:
    """Up to `PROBES` rows to compare models by.

    They are from the run's own data, or a question about a blank image if that can't be read.
    Raises `RecipeError` for a run whose recipe can't be read.
    """
    file = recipe_above(path)
    if file is None:
        return [plain_probe(model)]
    recipe = load_recipe(file).last_stage
    try:
        rows = list(
            islice(
                conversations(
                    recipe.data, recipe.data.validation or recipe.data.train, recipe.seed
                ),
                PROBED,
            )
        )
    except DataError:  # the data may have moved since training; a merge does not need it
        rows = []
    chosen = rows[:: max(len(rows) // PROBES, 1)][:PROBES] or [plain_probe(model)]
    # Where earlier answers of a row are samples of their own, its last one is compared.
    return [model.processor.template.samples(row)[-1] for row in chosen]


def plain_probe(model: VisionLanguageNetwork) -> Conversation:
    """A question about an image of one colour, or about silence."""
    question = Message("user", (model.processor.images.plain(), "What does the image show?"))
    return Conversation("probe", (question, Message("assistant", ("a red square",))))


@torch.inference_mode()
def observe(
    model: VisionLanguageNetwork, rows: Sequence[Conversation]
) -> tuple[torch.Tensor, list[str]]:
    """A model's logits for the supervised tokens of rows (fp32, flat), and its greedy answers."""
    model.eval()
    examples = [example for row in rows for example in model.processor.examples(row)]
    logits: list[torch.Tensor] = []
    for example in examples:
        batch = collate([example], model.processor.spec, fetch=model.processor.images.inputs).to(
            model.device
        )
        embeds: Any = model.embed(batch)
        logits.append(model.llm.supervised_logits(embeds, batch).float().flatten())
    prompts = model.processor.prompts(rows)
    texts = answer_prompts(model, prompts, Decoding(16), fetch=model.processor.images.inputs)
    return torch.cat(logits), texts


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest absolute difference of two tensors' numbers."""
    return float((one - other).abs().max())
