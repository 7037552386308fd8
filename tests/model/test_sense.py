"""Numbers that no model can be made of are the recipe's fault, with their place.

They are found before data and weights are read.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_models import built, parsed
from vlm_tune.api import sft
from vlm_tune.config.load import load_recipe
from vlm_tune.errors import ModelError, RecipeError
from vlm_tune.model.build import bare_model, build_processor

Tiny = Callable[..., str]

SCRATCH = [
    (
        "hidden_size: 32",
        "hiden_size: 32",
        r"a llama's config has no key 'hiden_size'; did you mean hidden_size",
    ),
    ("hidden_size: 32", "hidden_size: 33", "33"),
    ("hidden_size: 32", f"hidden_size: 1{'0' * 400}", "hidden_size: expected a finite number"),
    ("hidden_size: 32", "hidden_size: '32'", "hidden_size: expected an integer, got '32'"),
    ("hidden_size: 32", "hidden_size: 32.0", "hidden_size: expected an integer"),
    ("hidden_size: 32", "hidden_size: 400000000000", "hidden_size: expected at most 2,147,483,647"),
    (
        "hidden_size: 32",
        "hidden_size: 1073741824",
        r"has [\d,]+ parameters, [\d,.]+ GB in fp32, and [\d.]+ GB are free",
    ),
    (
        "hidden_size: 32",
        "hidden_size: 32, vocab_size: 400000000000",
        "vocab_size: expected at most",
    ),
    ("num_attention_heads: 2, ", "", "32 heads of width 1 can't be rotated"),
    (
        "num_hidden_layers: 2",
        "num_hidden_layers: -1",
        "num_hidden_layers: expected integers from 1",
    ),
    (
        "num_hidden_layers: 2",
        "num_hidden_layers: 0",
        "num_hidden_layers: expected integers from 1",
    ),
    (
        "num_hidden_layers: 2",
        "num_hidden_layers: 1000000",
        "num_hidden_layers: expected integers from 1 to 2,048",
    ),
    (
        "num_attention_heads: 2",
        "num_attention_heads: 0",
        "num_attention_heads: expected integers",
    ),
    ("num_attention_heads: 2", "num_attention_heads: 4, head_dim: 8", None),
    ("num_key_value_heads: 1", "num_key_value_heads: 0", "num_key_value_heads"),
    (
        "num_attention_heads: 2, num_key_value_heads: 1",
        "num_attention_heads: 4, num_key_value_heads: 3",
        "no multiple of num_key_value_heads 3",
    ),
    (
        "max_position_embeddings: 256",
        "max_position_embeddings: 256, rope_theta: .nan",
        "rope_theta: expected a finite number",
    ),
    ("max_position_embeddings: 256", "max_position_embeddings: 256, rope_theta: 5000.0", None),
    (
        "max_position_embeddings: 256",
        "max_position_embeddings: 256, hidden_act: nope",
        "no llama can be built from it: .*nope",
    ),
    ("model_type: llama", "model_type: lama", "no model type 'lama'; did you mean"),
    (
        "model_type: llama",
        "model_type: t5",
        "no language model of kind causal and type 't5'; it has one of kind seq2seq",
    ),
    (
        "model_type: llama",
        "model_type: clip",
        "no language model of kind causal and type 'clip'$",
    ),
    (
        "layers: 2, width",
        "layrs: 2, width",
        "an open_clip vision_cfg has no key 'layrs'; did you mean layers",
    ),
    ("patch_size: 16", "patch_size: 0", "patch_size: expected integers from 1"),
    (
        "image_size: 32",
        "image_size: 40",
        "image_size 40 is no multiple of the patch_size 16; 32 or 48 is",
    ),
    ("image_size: 32", "image_size: 8", "image_size 8 is no multiple of the patch_size 16; 16 is"),
    (
        "width: 64, head_width: 32",
        "width: 64, head_width: 24",
        "width 64 is no multiple of the head_width 24",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), SCRATCH, ids=[new for _, new, _ in SCRATCH])
def test_numbers_that_make_no_model(
    old: str, new: str, message: str | None, tiny_recipe: Tiny
) -> None:
    text = tiny_recipe("causal")
    assert old in text
    recipe = parsed(text.replace(old, new, 1))
    if message is None:
        bare_model(recipe)
        return
    line = next(n for n, line in enumerate(text.splitlines(), 1) if old in line)
    for read in (bare_model, lambda recipe: build_processor(recipe, [])):
        with pytest.raises(RecipeError, match=rf"^recipe:{line}:\d+: .*(?:{message})") as error:
            read(recipe)
        assert error.value.exit_code == 2


def test_a_connector_that_no_memory_holds(tiny_recipe: Tiny) -> None:
    text = tiny_recipe("causal").replace(
        "{kind: mlp, norm: true}",
        "{kind: resampler, latents: 131072, heads: 131072, head_width: 131072}",
    )
    with pytest.raises(
        ModelError,
        match=r"model.connector has [\d,]+ parameters, [\d,.]+ GB in fp32, and [\d.]+ GB are free",
    ):
        built(parsed(text))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.betas", "[1, 1]"),
        ("train.betas", "[0.9, 1.0]"),
        ("train.betas", "[-0.1, 0.9]"),
        ("train.learning_rate", "1e30"),
        ("train.learning_rate", ".nan"),
        ("train.weight_decay", ".inf"),
        ("train.weight_decay", "-1"),
        ("train.max_grad_norm", "0"),
        ("train.timeout", "1e300"),
        ("train.batch_size", "10000000000000000000000"),
        ("train.steps", "1e3"),
        ("train.loader_workers", "1000000"),
        ("train.schedule.warmup", "1.0"),
        ("evaluate.max_new_tokens", "4294967296"),
        ("evaluate.num_beams", "-1"),
        ("data.max_length", "99999999999"),
        ("tune.1.learning_rate", "-1"),
        ("model.tower.image_size", "-32"),
        ("model.tower.image_size", "1000000"),
        ("model.tower.layer", "-100000"),
    ],
)
def test_ranges(key: str, value: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(tiny_recipe("causal"))
    with pytest.raises(RecipeError, match=f"--set {key}=".replace("[", r"\[")):
        load_recipe(tmp_path / "r.yaml", [f"{key}={value}"])


def test_where_values_stand_is_no_part_of_a_recipe(tiny_recipe: Tiny) -> None:
    recipe: Any = parsed(tiny_recipe("causal"))
    other = type(recipe).model_validate(recipe.model_dump())
    assert other == recipe
    assert (
        recipe.where(("model", "llm")).startswith("recipe:")
        and other.where(("model", "llm")) == "model.llm"
    )
    for same in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        assert same == recipe and same.where(("train",)) == recipe.where(("train",))


def test_nothing_is_written_for_such_a_recipe(tiny_recipe: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="hiden_size"):
        sft(parsed(tiny_recipe("causal").replace("hidden_size", "hiden_size")))
    assert not (tmp_path / "run").exists()
