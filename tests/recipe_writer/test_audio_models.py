"""Which models `init` tries for rows with audio, and how much of a clip they take at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_models import parsed, rows_of, save_llm
from tests.recipe_writer.test_models import CPU, FACTS, GPU
from vlm_tune.config.towers import AudioTower
from vlm_tune.errors import RecipeError
from vlm_tune.recipe_writer.audio_models import audio_candidates
from vlm_tune.recipe_writer.models import ModelChoice

HEARD = replace(FACTS, width=0, height=0, seconds=4.2)


def tower_of(choice: ModelChoice) -> Any:
    """The choice's tower as a recipe takes it."""
    return AudioTower.model_validate(choice.draft.values["model.tower"])


@pytest.mark.parametrize(
    ("longest", "seconds", "windows", "pool", "tokens"),
    [(0.4, 1, 1, 5, 10), (4.2, 5, 1, 5, 50), (30.0, 30, 2, 5, 600), (300.0, 30, 11, 50, 330)],
)
def test_windows_hold_the_longest_clip_and_a_tenth_more(
    longest: float, seconds: int, windows: int, pool: int, tokens: int
) -> None:
    (choice,) = audio_candidates(CPU, replace(HEARD, seconds=longest), None, None)
    tower = tower_of(choice)
    assert (tower.seconds, tower.windows, tower.pool) == (seconds, windows, pool)
    assert choice.image_tokens == tokens == windows * seconds * 50 // pool
    assert tower.config["max_source_positions"] == 50 * seconds


def test_a_named_llm_goes_under_whisper(tiny_recipe: Callable[..., str], tmp_path: Path) -> None:
    save_llm(tmp_path / "llm", "causal", rows_of(parsed(tiny_recipe("causal"))))
    (usual,) = audio_candidates(GPU, HEARD, None, None)
    (named,) = audio_candidates(CPU, HEARD, str(tmp_path / "llm"), "openai/whisper-small")
    assert tower_of(usual).name == "openai/whisper-base"
    assert tower_of(named).name == "openai/whisper-small"
    assert named.draft.values["model.llm"]["name"] == str(tmp_path / "llm")
    assert "knows speech already" in str(named.draft.rules)


def test_a_model_that_sees_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava", "vision_config": {}}')
    with pytest.raises(RecipeError, match="sees images, and the rows have audio"):
        audio_candidates(CPU, HEARD, str(tmp_path), None)
