"""Recipes that start from models whose tower keeps an image's shape: tuned, planned, exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.family_samples import SHAPED, Sample
from tests.helpers.policy_samples import (
    assert_equally_likely,
    drawn_answers,
    prompt_batches,
    sampler_of,
)
from tests.helpers.preference_samples import awake
from tests.helpers.shaped_samples import LONGEST, SLOT, save_mistral3, save_pixtral
from tests.helpers.tiny_models import (
    LORA_TUNE,
    batch_of,
    built,
    largest,
    parsed,
    rows_of,
    with_tune,
)
from tests.helpers.transformers_parity import write_rows
from tests.helpers.vlm_samples import with_pretrained
from tests.model.pretrained.test_tiled import (  # noqa: F401
    assert_plain_equals,
    test_a_batch_without_images_gives_every_trained_weight_a_gradient,
    test_a_chat_and_a_server_read_each_image_once,
    test_a_run_is_resumed_bit_for_bit_and_merged_without_the_original,
    test_losses_gradients_and_answers_of_branches_equal_rows,
    test_the_adapter_has_the_whole_models_names,
    test_the_plan_reads_no_weights_and_knows_every_slot,
    test_what_was_trained_is_written_as_what_it_was,
    test_what_was_trained_opens_in_a_process_without_vlm_tune,
    trained,
)
from vlm_tune.config.objectives import Matching
from vlm_tune.data.batching.collate import collate
from vlm_tune.errors import DataError, ModelError
from vlm_tune.exporting import export
from vlm_tune.model.feature_cache import tower_features
from vlm_tune.train.matching import MatchingObjective

Tiny = Callable[..., str]


@pytest.fixture(params=["mistral3", "pixtral"])
def sample(request: pytest.FixtureRequest) -> Sample:
    return SHAPED[request.param]


@pytest.fixture
def recipe_text(sample: Sample, tiny_recipe: Tiny, tmp_path: Path) -> str:
    """A recipe over a tiny model of the family: LoRA on the LLM, the connector in full."""
    sample.save(tmp_path / "vlm")
    text = with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", sample.template)
    return with_tune(text, LORA_TUNE)


@pytest.fixture
def shapes(recipe_text: str, color_rows: Path) -> str:
    """The recipe over rows about images of several shapes, several of them, and none."""
    write_rows(color_rows)
    return recipe_text


def test_a_batch_of_shapes_and_cached_features_give_the_losses_of_rows(shapes: str) -> None:
    model = built(parsed(shapes)).eval()
    examples = [e for row in rows_of(parsed(shapes)) for e in model.processor.examples(row)]
    store = tower_features(model, [media for row in rows_of(parsed(shapes)) for media in row.media])
    frames = [frame for example in examples for frame in example.media]
    for frame in frames:
        assert frame.grid is not None
        assert len(store(frame)) == frame.grid.patches
    cached = collate(examples, model.processor.spec, fetch=store, cached=True)
    with torch.no_grad():
        alone = [float(model(batch_of(model, [example])).sum) for example in examples]
        together = float(model(batch_of(model, examples)).sum)
        by_cache = float(model(cached).sum)
    assert together == pytest.approx(sum(alone), rel=1e-5)
    assert by_cache == pytest.approx(sum(alone), rel=1e-5)


def test_an_images_vector_does_not_depend_on_those_beside_it(shapes: str) -> None:
    model = built(parsed(shapes)).eval()
    images = [media for row in rows_of(parsed(shapes)) for media in row.media]
    alone = torch.from_numpy(model.embed_images(images, batch_size=1))
    together = torch.from_numpy(model.embed_images(images, batch_size=len(images)))
    assert largest(alone, together) <= 1e-5
    assert largest(alone[0], alone[1]) > 1e-3


@pytest.mark.slow
def test_the_adapter_opens_in_a_process_without_vlm_tune(
    sample: Sample, recipe_text: str, tmp_path: Path
) -> None:
    model = trained(recipe_text, tmp_path)
    export(tmp_path / "run", tmp_path / "adapter", format="adapter")
    assert_plain_equals(tmp_path / "adapter", model, sample, recipe_text)


def test_training_reads_completions_of_several_shapes_as_generation_drew_them(shapes: str) -> None:
    sampled = {"kind": "grpo", "num_generations": 2, "max_completion_length": 4}
    recipe = parsed(shapes, objective=sampled, data__test=[], evaluate__samples=0)
    model = awake(recipe)
    batches = prompt_batches(model, recipe)
    expected = drawn_answers(model, recipe, batches, 2)
    assert len(expected) == 8
    trained: list[tuple[tuple[int, ...], list[float]]] = []
    for batch in sampler_of(model, recipe)(batches, 1, compiled=False):
        assert batch.completions is not None
        with torch.no_grad():
            output: Any = model(batch, temperature=1.0)
        lengths = batch.completions.lengths.tolist()
        drawn = zip(
            batch.targets.split(lengths),
            output.logprobs.split(lengths),
            batch.completions.ended.tolist(),
            strict=True,
        )
        for ids, logprobs, stopped in drawn:
            end = len(ids) - stopped  # generation has no figure for the stop token
            trained.append((tuple(ids[:end].tolist()), logprobs[:end].tolist()))
    assert_equally_likely(trained, expected)


def test_matching_exchanges_images_of_one_shape_alone(shapes: str) -> None:
    model = built(parsed(shapes))
    wide, _, small, _ = rows_of(parsed(shapes))
    batch = batch_of(model, [model.processor.examples(row)[0] for row in (wide, small)])
    with pytest.raises(DataError, match="the tower keeps their shapes, which differ"):
        MatchingObjective(Matching(kind="matching"))(model, batch)


def test_a_shorter_longest_edge_is_written_into_the_processor(
    tiny_recipe: Tiny, tmp_path: Path
) -> None:
    theirs = save_mistral3(tmp_path / "vlm", "ministral3", tied=True)
    size = LONGEST // 2
    recipe = with_pretrained(
        tiny_recipe("causal"), tmp_path / "vlm", "mistral3", f", tower: {{image_size: {size}}}"
    )
    model = trained(with_tune(recipe, LORA_TUNE), tmp_path)
    assert model.processor.spec.tokens_per_image == (size // SLOT) ** 2
    assert torch.equal(model.llm.head.weight, theirs.lm_head.weight)
    report = export(tmp_path / "run", tmp_path / "exported", dtype="fp32")
    assert report.difference is not None and report.allowed is not None and report.same_text
    assert report.difference <= report.allowed
    written = json.loads((tmp_path / "exported" / "processor_config.json").read_text())
    assert written["image_processor"]["size"] == {"longest_edge": size}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": -2}, "vision_feature_layer: -2"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act: relu"),
    ],
)
def test_variants_are_refused(
    changes: dict[str, object], message: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    save_pixtral(tmp_path / "vlm", **changes)
    recipe = with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", "pixtral")
    with pytest.raises(ModelError, match=message):
        built(parsed(recipe))


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        ("image_size: 49", "image_size: 49 is no multiple of the tower's patches of 2 pixels"),
        ("image_size: 46", "squares of 2 x 2 patches do not divide the tower's grid of 23 x 23"),
        ("grid: 4", "model.tower.grid: the tower takes images of any shape"),
        ("resize: pad", "model.tower.resize: the tower takes images of any shape"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tower: str, message: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    save_mistral3(tmp_path / "vlm")
    extra = f", tower: {{{tower}}}"
    recipe = with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", "mistral3", extra)
    with pytest.raises(ModelError, match=message):
        built(parsed(recipe))
