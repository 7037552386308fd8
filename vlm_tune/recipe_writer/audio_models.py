"""The models that `init` may put into a recipe for rows with audio."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vlm_tune.config.model import Llm
from vlm_tune.errors import Problem, RecipeError
from vlm_tune.model.families.registry import stored_config, vlm_of
from vlm_tune.model.hub import is_ours
from vlm_tune.model.pretrained.language_model import llm_config
from vlm_tune.model.pretrained.native import native_types
from vlm_tune.paths import is_folder
from vlm_tune.quoting import quoted
from vlm_tune.recipe_writer.draft import Draft
from vlm_tune.recipe_writer.look import Facts
from vlm_tune.recipe_writer.machine import Machine
from vlm_tune.recipe_writer.models import (
    NOTHING_PRETRAINED,
    SMOLLM2,
    ModelChoice,
    Tower,
    named_llm,
    named_model,
    set_scratch_llm,
    under_tower,
)

WHISPER = "openai/whisper-base"
WINDOW = 30
"""Seconds that a Whisper encoder takes at once."""
TOKENS = 50
"""Tokens of a second of audio."""
POOLS = (5, 10, 25, 50)
"""Tokens that are averaged into one; each divides those of a second."""
FEW_TOKENS = 600
"""Tokens of the longest clip under which no more are averaged."""
MARGIN = 1.1
"""Share by which a clip that was not read may be longer than those that were."""


def audio_candidates(
    machine: Machine, facts: Facts, model: str | None, tower: str | None
) -> list[ModelChoice]:
    """The models to try for rows with audio; the arguments are those of `candidates`.

    Raises:
        ModelError: the config of `model` can't be read.
        RecipeError: `model` sees images, or `tower` is given for a whole model.
    """
    if model is not None:
        return [_named(facts, model, tower)]
    if machine.hub:
        reason = "the smallest instruction-tuned LLM: it trains on a CPU"
        heard = _whisper(facts, tower or WHISPER)
        return [under_tower(SMOLLM2, "causal", "chatml", heard, 0, reason)]
    return [_scratch(facts)]


def _named(facts: Facts, model: str, tower: str | None) -> ModelChoice:
    """The LLM that a user names under a Whisper encoder, or a whole model that hears."""
    if is_folder(model) and is_ours(Path(model)):
        return named_model(model, tower)
    stored = stored_config(model) or {}
    if vlm_of(model, stored) is not None or stored.get("model_type") in native_types():
        message = f"{quoted(model)} sees images, and the rows have audio; name an LLM"
        raise RecipeError([Problem("--model", message)])
    config = llm_config(Llm(kind="causal", name=model))
    return named_llm(model, config, _whisper(facts, tower or WHISPER))


def _whisper(facts: Facts, name: str) -> Tower:
    """A Whisper encoder that takes the longest clip."""
    section, tokens, reason = _windows(facts)
    return Tower({"kind": "audio", "name": name, **section}, reason, tokens)


def _windows(facts: Facts) -> tuple[dict[str, Any], int, str]:
    """The windows for the longest clip as options of a tower, their tokens, and the reason."""
    longest = MARGIN * facts.seconds
    seconds = min(math.ceil(longest), WINDOW)
    windows = math.ceil(longest / seconds)
    whole = windows * seconds * TOKENS
    pool = next((pool for pool in POOLS if whole // pool <= FEW_TOKENS), POOLS[-1])
    section = {"seconds": seconds, "pool": pool} | ({"windows": windows} if windows > 1 else {})
    reason = (
        f"the longest clip that was read lasts {facts.seconds:.1f} seconds, and a tenth more has "
        f"room; {pool} tokens of 20 ms become one"
    )
    return section, whole // pool, reason


def _scratch(facts: Facts) -> ModelChoice:
    """A small Whisper encoder and a small T5, as `recipes/spoken-digits.yaml` has them."""
    section, tokens, reason = _windows(facts)
    draft = Draft()
    config = {
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 256,
        "max_source_positions": TOKENS * section["seconds"],
    }
    draft.set(
        "model.tower",
        {"kind": "audio", **section, "config": config},
        f"{NOTHING_PRETRAINED}, and for simple sounds. Name pretrained ones with --model and "
        f"--tower (a Whisper) for more.\n{reason}",
    )
    set_scratch_llm(draft)
    name = "a small Whisper encoder and T5 from random weights"
    return ModelChoice(name, "scratch", False, draft, tokens)
