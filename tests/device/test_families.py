"""Every family of models on a GPU: passes and answers are a CPU's, also under CUDA's autocast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.device.test_pretended_gpu import answers, assert_same_passes, examples_of, on
from tests.helpers.device_recipes import COMPOSED, SEEING, recipe_of
from tests.helpers.native_models import KINDS as NATIVE
from tests.helpers.pretended_gpu import CUDA, pretended
from tests.helpers.tiny_models import batch_of, built, parsed
from vlm_tune.data.batch import Batch
from vlm_tune.data.packing import pack_layout
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.memory_plan.cuda import cuda_autocast

pytestmark = pytest.mark.usefixtures("attention_of_a_gpu")
HALF = torch.bfloat16


@pytest.mark.parametrize("name", [*COMPOSED, *NATIVE, *SEEING])
def test_a_family_trains_and_answers(name: str, tmp_path: Path) -> None:
    """Rows and joined rows; in fp32, in bf16 by autocast, and as a model in bf16 answers."""
    torch.manual_seed(1)  # of other weights a linear attention's gradients may be mostly rounding
    recipe = parsed(recipe_of(name, tmp_path))
    model = built(recipe).eval()
    native = model.llm.native
    examples = examples_of(model, recipe)
    batches = [batch_of(model, examples)]
    if model.llm.unjoined is None:
        batches.append(batch_of(model, [pack_layout(examples, model.llm.layout)]))
    expected = answers(model, recipe)
    losses = [loss_of(model, batch) for batch in batches]
    with pretended(model, CUDA, copies_indices=native):
        there = [on(batch, CUDA) for batch in batches]
        assert [loss_of(model, batch) for batch in there] == pytest.approx(losses, rel=1e-5)
        assert answers(model, recipe) == expected
        with torch.autocast("cuda", HALF):
            by_autocast = [loss_of(model, batch) for batch in there]
            assert len(answers(model, recipe)) == len(expected)
    # A bias of keys has no gradient but rounding.
    assert_same_passes(model, batches, copies_indices=native, relative=5e-4)
    with cuda_autocast(HALF):
        halves = [loss_of(model, batch) for batch in batches]
    assert by_autocast == pytest.approx(halves, rel=1e-3)
    # After training the connector stays in fp32.
    model.tower.to(HALF)
    model.llm.to(HALF)
    with pretended(model, CUDA, copies_indices=native):
        assert len(answers(model, recipe)) == len(expected)
        with torch.autocast("cuda", HALF):
            assert [loss_of(model, batch) for batch in there] == pytest.approx(halves, rel=1e-2)


@torch.no_grad()
def loss_of(model: VisionLanguageModel, batch: Batch) -> float:
    outcome: Any = model(batch)
    return float(outcome.sum)
