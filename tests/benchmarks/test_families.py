"""The model, the rows and the turns of the comparison of a published family."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import material, our_steps
from benchmarks.turns import Comparison, Sides
from tests.helpers.tiny_models import built, parsed, rows_of, save_llm
from tests.helpers.transformers_parity import ids_of, their_inputs

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 8,
}


def test_both_sides_read_the_same_ids_of_an_image_of_one_frame(tmp_path: Path) -> None:
    material.write_rows(tmp_path, 2, each=3)
    request = {
        "material": tmp_path,
        "rows": "single",
        "steps": 1,
        "batch": 2,
        "precision": "fp32",
        "learning_rate": 5e-5,
    }
    text = our_steps.lora_recipe({**request, "model": tmp_path / "smolvlm"}, tmp_path / "run")
    rows = rows_of(parsed(text))
    assert len(rows) == 6
    decoder = save_llm(tmp_path / "llm", "causal", rows)
    folder = material.write_smolvlm(tmp_path, decoder, TOWER)
    processor = built(parsed(text)).processor
    assert processor.spec.tokens_per_image == 4
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    for row in rows:
        (example,) = processor.examples(row)
        theirs = their_inputs(folder, row)
        assert theirs["pixel_values"].shape[:2] == (1, 1)
        # Ours ends before the last label.
        assert [*ids_of(example, image), example.labels[-1]] == theirs["input_ids"][0].tolist()


FAKE = """
import json, sys
seconds, request = float(sys.argv[1]), json.loads(sys.argv[2])
while sys.stdin.readline():
    line = {"seconds": seconds * request["slower"], "rows": request["rows"],
            "batch": request["batch"]}
    print(json.dumps(line), flush=True)
"""


def fake(seconds: int) -> list[str]:
    return [sys.executable, "-c", FAKE, str(seconds)]


@pytest.mark.parametrize("each", [5, 1])
def test_sides_take_their_best_settings_and_joined_rows_only_where_there_are_several(
    each: int, tmp_path: Path
) -> None:
    sides = Sides(
        commands={"ours": fake(1), "trl": fake(4), "trl_turns": fake(2)},
        tried={key: {"slower": (3, 1)} for key in ("ours", "trl", "trl_turns")},
        rows={"ours": "single", "trl": "single", "trl_turns": "multi"},
        unit="questions",
        write_model=lambda folder, decoder: folder / "model",
        write_rows=lambda folder, images, each: folder.mkdir(),
    )
    options = Namespace(
        cache=tmp_path, decoder=tmp_path, number=10, steps=2, trial_steps=1, threads=1
    )
    options.cpu_time = False
    figures = Comparison(sides, options, tmp_path).compare(each)
    assert figures["settings"]["trl"] == {"slower": 1}
    others = {"trl": 4, "trl_turns": 2} if each == 5 else {"trl": 4}
    assert figures["times_as_fast"] == others
    assert figures["questions_per_s"] == {
        name: 10 / seconds for name, seconds in {"ours": 1, **others}.items()
    }
    batches = {name: steps[0] for name, steps in figures["figures"].items()}
    assert batches["ours"] == {"rows": "single", "batch": 10 // each}
    assert batches["trl"] == {"rows": "single", "batch": 10}
    assert batches.get("trl_turns", {"rows": "multi", "batch": 2}) == {"rows": "multi", "batch": 2}
