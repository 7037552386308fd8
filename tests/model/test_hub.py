"""A hub that can't be reached is tried once, briefly, and the error says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_tune.config.load import load_recipe
from vlm_tune.exporting import FORMATS, possible_exports
from vlm_tune.model.build import bare_model

RECIPES = Path(__file__).parent.parent.parent / "recipes"

CODE = """
from vlm_tune.config.model import Llm
from vlm_tune.errors import ModelError
from vlm_tune.model.build import llm_config, load_tokenizer, load_llm
import torch
for read in (llm_config, load_tokenizer, lambda llm: load_llm(llm, dtype=torch.float32)):
    try:
        read(Llm(kind="causal", name="nobody/nothing-of-this-name"))
    except ModelError as error:
        print(error)
"""


def test_a_hub_that_does_not_answer() -> None:
    # Nothing listens on that port, so that every request fails at once: tried again, they would
    # take minutes.
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    result = subprocess.run(
        [sys.executable, "-c", CODE],
        env=environment | {"HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and len(lines) == 3, result.stderr
    assert all(
        "http://127.0.0.1:9 can't be reached; name a local folder, or try again when the hub "
        "can be reached" in line
        for line in lines
    ), lines
    assert "Retrying" not in result.stderr, result.stderr


@pytest.mark.parametrize(
    "name",
    ["llava-1.5-style", "llava-1.5-7b-qlora", "instructblip-flan-t5-xl-lora", "flan-t5-clip-vqa"],
)
def test_shipped_recipes_bring_their_models_configs(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without hub and cache the models of shipped recipes are known by shape."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    model, _ = bare_model(recipe)
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert 3 < billions < 8
    assert set(possible_exports(recipe)) == set(FORMATS)
