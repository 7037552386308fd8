"""The rows that models are compared by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.helpers.tiny_models import built, parsed, rows_of
from vlm_tune.exporting.verify import probe_rows


def test_probes_are_the_runs_own_rows_or_a_plain_image(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    text = tiny_recipe("causal")
    recipe = parsed(text)
    model = built(recipe)
    saved = tmp_path / "run" / "saved"
    saved.mkdir(parents=True)
    assert [row.id for row in probe_rows(saved, model)] == ["probe"]
    (tmp_path / "run" / "recipe.yaml").write_text(text)
    probes = [row.id for row in probe_rows(saved, model)]
    assert probes == [row.id for row in rows_of(recipe)][::2]
    (tmp_path / "messages.jsonl").unlink()
    assert [row.id for row in probe_rows(saved, model)] == ["probe"]
