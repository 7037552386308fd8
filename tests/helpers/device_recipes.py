"""Recipes over a tiny model of every family, and of every kind of medium."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.helpers.audio_samples import hearing_recipe, write_tone_rows
from tests.helpers.family_samples import FAMILIES
from tests.helpers.native_models import save_native, with_native, write_questions
from tests.helpers.native_videos import video_recipe
from tests.helpers.tiny_models import CLIP, parsed, rows_of, with_tower
from tests.helpers.tiny_recipes import tiny_text, write_color_rows
from tests.helpers.transformers_parity import write_rows
from tests.helpers.vlm_samples import Blip, save_blip, with_pretrained
from tests.parity.test_parity_naflex import save_naflex


def _save_clip(folder: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(folder)


BLIP: tuple[Blip, ...] = ("blip-2", "instructblip")
TOWERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "naflex": (save_naflex, "layer: -1, max_num_patches: 20"),
    "layers": (_save_clip, "layer: [-2, -1]"),
}
"""Towers beside those of families, and their options."""
HEARING = {"hears": "causal", "hears-t5": "seq2seq"}
SEEING = {f"videos-{kind}": kind for kind in ("qwen2_5_vl", "qwen3_vl")}
"""Native models over rows with videos."""
COMPOSED = (*FAMILIES, *BLIP, *TOWERS, *HEARING)


def recipe_of(name: str, folder: Path) -> str:
    """A recipe's text that trains in full a tiny model of the family, which is written there."""
    rows = folder / "rows.jsonl"
    vlm = folder / "vlm"
    run = folder / "run"
    if name in SEEING:
        return video_recipe(folder, SEEING[name])
    if name in HEARING:
        return hearing_recipe(HEARING[name], write_tone_rows(folder), run)
    if name in BLIP:
        text = tiny_text("seq2seq", write_color_rows(folder), run)
        save_blip(vlm, rows_of(parsed(text)), name)
        return with_pretrained(text, vlm, "flan")
    text = tiny_text("causal", rows, run).replace("max_length: 128", "max_length: 512")
    if name in TOWERS:
        write_rows(rows)
        save, options = TOWERS[name]
        save(vlm)
        tower = f"{{kind: transformers, name: {vlm}, {options}}}"
        return with_tower(text, tower).replace('  - {match: "tower.*", how: frozen}\n', "")
    if name in FAMILIES:
        write_rows(rows)
        FAMILIES[name].save(vlm)
        return with_pretrained(text, vlm, FAMILIES[name].template)
    write_questions(rows)
    save_native(vlm, name)
    return with_native(text, vlm)
