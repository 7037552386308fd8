"""Noise on images' tokens: its directions, its size, and that training alone has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.helpers.tiny_models import batch_of, built, parsed, rows_of
from vlm_tune.config.objectives import LanguageModeling
from vlm_tune.errors import RecipeError
from vlm_tune.model.image_noise import noised
from vlm_tune.train.objectives import LanguageModelingObjective


def test_noise_keeps_lengths_and_lies_where_images_differ() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(5, 2, 32, dtype=torch.float64)
    tokens[:, :, 20:] = 1.5  # in these directions the images are alike
    noisy = noised(tokens, 2.0)
    assert noisy.dtype == tokens.dtype and noisy.shape == tokens.shape
    lengths = tokens.flatten(1).norm(dim=1)
    torch.testing.assert_close(noisy.flatten(1).norm(dim=1), lengths, rtol=1e-5, atol=0)
    # But for the scale, those directions are unchanged.
    shared = noisy[:, :, 20:]
    torch.testing.assert_close(shared, shared[:, :1, :1].expand_as(shared), rtol=1e-5, atol=0)


def test_the_sizes_of_noise_go_from_none_to_the_largest() -> None:
    torch.manual_seed(0)
    tokens = torch.nn.functional.normalize(torch.randn(40, 64), dim=1)[:, None]
    angles = [
        torch.nn.functional.cosine_similarity(noised(tokens, 1.0)[:, 0], tokens[:, 0])
        for _ in range(10)
    ]
    cosines = torch.cat(angles)
    # Noise as long as an image, at a right angle to it, turns it by 45 degrees.
    assert cosines.max() > 0.99 and 0.55 < cosines.min() < 0.8


def test_few_images_and_no_noise_are_left_as_they_are() -> None:
    tokens = torch.randn(2, 3, 4)
    assert noised(tokens, 1.0) is tokens
    assert noised(torch.cat([tokens, tokens]), 0.0).equal(torch.cat([tokens, tokens]))


def test_gradients_pass_through_noise() -> None:
    tokens = torch.randn(4, 1, 8, requires_grad=True)
    weights = torch.randn(4, 1, 8)
    (noised(tokens, 1.0) * weights).sum().backward()
    assert tokens.grad is not None and tokens.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_training_alone_has_noise(kind: str, tiny_recipe: Callable[..., str]) -> None:
    model = built(parsed(tiny_recipe(kind))).train()
    rows = rows_of(parsed(tiny_recipe(kind)))
    batch = batch_of(model, [model.processor.examples(row)[0] for row in rows])

    def loss(noise: float) -> float:
        torch.manual_seed(3)
        objective = LanguageModelingObjective(LanguageModeling(image_noise=noise))
        with torch.no_grad():
            return float(objective(model, batch).sum)

    assert loss(1.0) == loss(1.0) != loss(0.0)
    model.eval()
    assert loss(1.0) == loss(0.0)


def test_noise_needs_images_to_compare(tiny_recipe: Callable[..., str]) -> None:
    changes = {"objective__image_noise": 1.0, "train__batch_size": 2}
    with pytest.raises(RecipeError, match="image_noise compares the images of a batch"):
        parsed(tiny_recipe("causal"), **changes)
