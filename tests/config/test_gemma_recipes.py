"""The shipped recipes over Gemma checkpoints, at their real shapes on the meta device."""

from __future__ import annotations

from pathlib import Path

from tests.config.test_recipes import RECIPES, trained, tuned
from tests.helpers.gemma_samples import write_gemma3_4b, write_paligemma2_3b
from vlm_tune.config.load import load_recipe
from vlm_tune.model.build import bare_model


def test_gemma_3_4b_builds_and_tunes_at_its_real_shape(tmp_path: Path) -> None:
    """SigLIP So400m/14 at 896 pixels, and in each layer 16 rows of LoRA on 7 matrices."""
    write_gemma3_4b(tmp_path)
    recipe = load_recipe(RECIPES / "gemma-3-4b-qlora.yaml", {"model.pretrained": str(tmp_path)})
    model, measured = bare_model(recipe)
    assert (measured, model.processor.spec.tokens_per_image) == ((4096, 1152), 256)
    layer = 2 * (2560 + 2048) + 2 * (2560 + 1024) + 3 * (2560 + 10240)
    assert trained(tuned(model, recipe)) == {
        "tower.*": 0,
        "connector.*": 1152 * 2560 + 1152,
        "llm.*": 34 * 16 * layer,
    }


def test_paligemma_2_3b_builds_and_tunes_at_its_real_shape(tmp_path: Path) -> None:
    """SigLIP So400m/14 at 224 pixels and Gemma 2 2B."""
    write_paligemma2_3b(tmp_path)
    recipe = load_recipe(RECIPES / "paligemma2-3b-lora.yaml", {"model.pretrained": str(tmp_path)})
    model, measured = bare_model(recipe)
    assert (measured, model.processor.spec.tokens_per_image) == ((256, 1152), 256)
    layer = 2 * (2304 + 2048) + 2 * (2304 + 1024) + 3 * (2304 + 9216)
    assert trained(tuned(model, recipe)) == {
        "tower.*": 0,
        "connector.*": (1152 + 1) * 2304,
        "llm.*": 26 * 16 * layer,
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 3.0e9 < total - 26 * 16 * layer < 3.1e9
