"""A run of a model that scales its logits ends with the loss by transformers.

transformers computes it from the saved weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import batch_of, parsed, rows_of, unshifted
from vlm_tune.api import sft
from vlm_tune.events import Event, TrainSteps

GRANITE = (
    "{model_type: granite, vocab_size: 400, config: {hidden_size: 32, intermediate_size: "
    "64, num_hidden_layers: 2, "
    "num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 256, "
    "logits_scaling: 8.0, embedding_multiplier: 3.0}}"
)


@pytest.mark.slow
def test_granite_trained_through_sft_has_transformers_loss(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    text = tiny_recipe("causal").splitlines()
    lines = [
        f"  llm: {{kind: causal, scratch: {GRANITE}}}" if line.startswith("  llm:") else line
        for line in text
    ]
    recipe = parsed(
        "\n".join(lines) + "\n",
        train__steps=40,
        train__checkpoints={"every": 40},  # not after each epoch, which is two steps
        evaluate__every=40,
    )
    events: list[Event] = []
    model = sft(recipe, show=events.append).model.eval()
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model" / "llm", dtype=torch.float32
    ).eval()
    assert theirs.config.logits_scaling == 8
    examples = [example for row in rows_of(recipe) for example in model.processor.examples(row)]
    batch = batch_of(model, examples)
    with torch.no_grad():
        our_loss: Any = model(batch)
        embeds = torch.nn.functional.pad(model.embed(batch), (0, 0, 0, 1)).float()
        mask = torch.nn.functional.pad(batch.attention_mask, (0, 1)).long()
        loss = theirs(
            inputs_embeds=embeds, attention_mask=mask, labels=unshifted(batch.labels)
        ).loss
    assert float(our_loss.sum) / our_loss.count == pytest.approx(float(loss), rel=1e-4)
    losses = [event.loss for event in events if isinstance(event, TrainSteps)]
    assert losses[-1] < losses[0]
