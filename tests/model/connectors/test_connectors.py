"""Connectors of every kind inside a model.

Slots, saving, batches without media, cached features, and what text they read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.connector_kinds import KINDS, READS_TEXT, SLOTS, TOWER, Tiny, with_connector
from tests.helpers.tiny_models import (
    assert_close,
    assert_same_outputs,
    batch_of,
    built,
    largest,
    one_step,
    parsed,
    rows_of,
    stage_loop,
    tuned_by,
    with_tower,
    with_tune,
)
from vlm_tune.config.connectors import (
    AvgPoolConnector,
    Gemma3Connector,
    PixelShuffleConnector,
    ResamplerConnector,
)
from vlm_tune.config.load import dump_recipe
from vlm_tune.data.batching.collate import collate
from vlm_tune.data.packing import pack_layout
from vlm_tune.data.types import Conversation, Example, Message
from vlm_tune.errors import ModelError, RecipeError
from vlm_tune.events import Event, TrainSteps
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.build import build_processor
from vlm_tune.model.checkpoint import load_model
from vlm_tune.model.connectors.registry import CONNECTORS, build_connector
from vlm_tune.model.language.decoding import Decoding

both_llms = pytest.mark.parametrize("llm", ["causal", "seq2seq"])
every_kind = pytest.mark.parametrize("kind", KINDS)


def stirred(model: VisionLanguageModel) -> VisionLanguageModel:
    """The model with a random connector, so that nothing in it is zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.connector.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def examples_of(model: VisionLanguageModel, recipe: Any) -> list[Example]:
    return [example for row in rows_of(recipe) for example in model.processor.examples(row)]


def text_rows(model: VisionLanguageModel) -> list[Example]:
    rows = [("hello there?", "yes"), ("and?", "a longer answer")]
    return [
        example
        for question, answer in rows
        for example in model.processor.examples(
            Conversation(question, (Message("user", (question,)), Message("assistant", (answer,))))
        )
    ]


def test_every_kind_of_the_registry_is_tested() -> None:
    """But for what is inside a native model, and what only towers of any shape go with."""
    tested = {text.split("kind: ")[1].split(",")[0].rstrip("}") for text in KINDS.values()}
    assert tested == set(CONNECTORS) - {"native", "patch_merger"}


@every_kind
@both_llms
def test_declared_slots_are_the_features_given(kind: str, llm: str, tiny_recipe: Tiny) -> None:
    recipe = parsed(with_connector(tiny_recipe(llm), kind))
    model = built(recipe)
    assert model.processor.spec.tokens_per_image == SLOTS[kind]
    assert build_processor(recipe, rows_of(recipe)).spec == model.processor.spec
    batch = batch_of(model, examples_of(model, recipe))
    assert int(batch.image_mask.sum()) == SLOTS[kind] * len(batch.media_index)
    connected = model.media(batch)
    assert connected is not None
    assert connected.shape[::2] == (len(batch.media_index), model.llm.width)
    assert model.embed(batch).shape == (*batch.input_ids.shape, model.llm.width)


@every_kind
@both_llms
@torch.no_grad()
def test_a_saved_model_is_the_same(kind: str, llm: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = parsed(with_connector(tiny_recipe(llm), kind))
    model = stirred(built(recipe)).eval()
    batch = batch_of(model, examples_of(model, recipe))
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    one, other = (m.llm.supervised_logits(m.embed(batch), batch) for m in (model, again))
    assert_same_outputs(one, other)
    fresh = stirred(built(recipe)).eval()
    list(fresh.connector.parameters())[-1].data += 1
    assert largest(fresh.llm.supervised_logits(fresh.embed(batch), batch), one) > 1e-5


@pytest.mark.parametrize(
    "tower",
    [
        "{kind: timm, name: resnet10t, image_size: 32, grid: 2}",
        "{kind: pair, towers: [{kind: timm, name: resnet10t, image_size: 32, grid: 2}, "
        "{kind: open_clip, config: {layers: 1, width: 64, head_width: 32, patch_size: "
        "16, image_size: 48}, class_token: false}]}",
    ],
)
@torch.no_grad()
def test_a_frozen_tower_of_random_weights_is_saved(
    tower: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """No name gives them again."""
    recipe = parsed(with_tower(tiny_recipe("causal"), tower))
    model = built(recipe).eval()
    model.save_pretrained(tmp_path / "saved")
    torch.manual_seed(99)
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    batch = batch_of(model, examples_of(model, recipe))
    assert batch.pixels is not None
    assert_same_outputs(model.tower(batch.pixels), again.tower(batch.pixels))


@every_kind
@both_llms
def test_a_batch_without_media_reaches_every_trained_parameter_and_changes_nothing(
    kind: str, llm: str, tiny_recipe: Tiny
) -> None:
    """Else a rank without images would leave the others waiting for its gradients."""
    recipe = parsed(with_connector(tiny_recipe(llm), kind))
    model = stirred(built(recipe))
    tuned_by(model, recipe)
    batch = batch_of(model, text_rows(model))
    loss: Any = model.train()(batch)
    loss.sum.backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert any(name.startswith("connector.") for name, _ in trained)
    missing = [name for name, p in trained if p.grad is None]
    assert missing == []
    assert float(loss.sum.detach()) == pytest.approx(
        float(model.eval()(batch).sum.detach()), rel=1e-6
    )


@every_kind
@both_llms
def test_a_batch_with_media_reaches_every_trained_parameter(
    kind: str, llm: str, tiny_recipe: Tiny
) -> None:
    recipe = parsed(with_connector(tiny_recipe(llm), kind))
    model = stirred(built(recipe))
    tuned_by(model, recipe)
    loss: Any = model.train()(batch_of(model, examples_of(model, recipe)))
    loss.sum.backward()
    idle = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    # A key's bias moves all scores of a query alike, and softmax does not see that.
    assert [name for name in idle if not name.endswith("key.bias")] == []


@every_kind
def test_a_step_on_cached_features_is_the_same(
    kind: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "train__steps": 1,
        "train__log_every": 1,
        "train__max_grad_norm": None,
    }
    recipe = parsed(with_connector(tiny_recipe("causal"), kind), **changes)
    loss, gradients = one_step(recipe, tmp_path / "plain", prepare_model=stirred)
    cached_loss, cached_gradients = one_step(
        recipe, tmp_path / "cached", cached=True, prepare_model=stirred
    )
    assert cached_loss == pytest.approx(loss, rel=1e-5)
    assert_close(cached_gradients, gradients, relative=1e-4)


@every_kind
@both_llms
@torch.no_grad()
def test_a_batch_generates_as_its_rows_do_one_by_one(
    kind: str, llm: str, tiny_recipe: Tiny
) -> None:
    """Rows with one image, two and none, padded on the left for a decoder.

    Greedy and with beams.
    """
    recipe = parsed(with_connector(tiny_recipe(llm), kind))
    model = stirred(built(recipe)).eval()
    rows = rows_of(recipe)
    two = Conversation(
        "two",
        (
            Message("user", (rows[0].media[0], "then", rows[4].media[0], "what changed?")),
            Message("assistant", ("no",)),
        ),
    )
    none = Conversation(
        "none", (Message("user", ("what is it about, then?",)), Message("assistant", ("no",)))
    )
    prompts = model.processor.prompts([rows[0], two, none, rows[3]])
    for beams in (1, 3):
        decoding = Decoding(5, beams)
        together = answer_prompts(model, prompts, decoding, fetch=model.processor.images)
        assert together == [
            answer_prompts(model, [prompt], decoding, fetch=model.processor.images)[0]
            for prompt in prompts
        ]


@every_kind
@both_llms
def test_a_lora_run_in_bf16_trains_saves_and_answers(
    kind: str, llm: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """Frozen bf16 weights beside an fp32 connector, cached bf16 features, then all in bf16."""
    text = with_tune(with_connector(tiny_recipe(llm, precision="bf16"), kind))
    events: list[Event] = []
    recipe = parsed(text, train__steps=2, train__log_every=1)
    loop = stage_loop(built(recipe), recipe, tmp_path / "run", cached=True, report=events.append)
    before = {name: value.clone() for name, value in loop.model.connector.state_dict().items()}
    loop.run()
    assert all(np.isfinite(event.loss) for event in events if isinstance(event, TrainSteps))
    after = loop.model.connector.state_dict()
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    loop.model.save_pretrained(tmp_path / "saved")
    again = VisionLanguageModel.from_pretrained(tmp_path / "saved")
    assert {parameter.dtype for parameter in again.connector.parameters()} == {torch.bfloat16}
    image = rows_of(recipe)[0].media[0].source
    assert isinstance(again.chat("what color is it?", images=[image], max_new_tokens=3), str)
    assert isinstance(again.chat("nothing to see?", max_new_tokens=3), str)


# --- text-conditioned ones ---------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", READS_TEXT)
@both_llms
def test_features_depend_on_the_question_and_not_on_the_answer(
    kind: str, llm: str, tiny_recipe: Tiny
) -> None:
    recipe = parsed(with_connector(tiny_recipe(llm), kind))
    model = stirred(built(recipe)).eval()
    media = rows_of(recipe)[0].media

    def connected(question: str, *rest: str, prompt: bool = False) -> torch.Tensor:
        turns = [Message("user", (*media, question))]
        turns += [
            Message("user" if place % 2 else "assistant", (text,))
            for place, text in enumerate(rest)
        ]
        row = Conversation("row", tuple(turns))
        chosen = [model.processor.prompt(row)] if prompt else model.processor.examples(row)[:1]
        batch = collate(
            chosen,
            model.processor.spec,
            fetch=model.processor.images,
            pad_left=prompt and llm == "causal",
        )
        features = model.media(batch)
        assert features is not None
        return features

    reference = connected("what color is it?", "red")
    assert_same_outputs(reference, connected("what color is it?", "a long green answer"))
    assert_same_outputs(reference, connected("what color is it?", "red", "and now?", "no"))
    assert largest(reference, connected("what color is it?", "red", prompt=True)) <= 1e-6
    assert largest(reference, connected("what shape is it?", "red")) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", READS_TEXT)
def test_packed_samples_read_their_own_instruction(kind: str, tiny_recipe: Tiny) -> None:
    recipe = parsed(with_connector(tiny_recipe("causal"), kind))
    model = stirred(built(recipe)).eval()
    examples = examples_of(model, recipe)[:3]

    batch = batch_of(model, [pack_layout(examples, "causal")])
    packed, expected = model.media(batch), model.media(batch_of(model, examples))
    assert packed is not None
    assert expected is not None
    assert largest(packed, expected) <= 1e-5


def test_questions_that_share_an_image_are_refused_where_the_connector_reads_them(
    tiny_recipe: Tiny,
) -> None:
    text = with_connector(tiny_recipe("causal"), "qformer-text")
    with pytest.raises(RecipeError, match=r"data\.group: none"):
        parsed(text, data__group="image")
    with pytest.raises(RecipeError, match=r"data\.group: none"):
        parsed(with_connector(tiny_recipe("causal"), "fusion-gate"), data__group="image")
    parsed(with_connector(tiny_recipe("seq2seq"), "qformer-text"), data__group="image")
    parsed(with_connector(tiny_recipe("causal"), "qformer"), data__group="image")


@torch.no_grad()
def test_a_long_instruction_is_read_from_its_end(tiny_recipe: Tiny) -> None:
    recipe = parsed(
        with_connector(tiny_recipe("seq2seq"), "qformer-text").replace(
            "max_text: 64", "max_text: 4"
        )
    )
    model = stirred(built(recipe)).eval()
    media = rows_of(recipe)[0].media
    features = []
    for question in (
        "one of many words here?",
        "quite another beginning here?",
        "one of many words here!",
    ):
        rows = (Message("user", (*media, question)), Message("assistant", ("no",)))
        features.append(
            model.media(batch_of(model, model.processor.examples(Conversation("row", rows))))
        )
    assert largest(features[0], features[1]) <= 1e-6
    assert largest(features[0], features[2]) > 1e-5


# --- in a recipe -------------------------------------------------------------------------------


def test_nested_parts_of_a_recipe_are_read_back_and_their_faults_located(tiny_recipe: Tiny) -> None:
    pair = "{kind: pair, towers: [{kind: timm, name: resnet18}, {kind: open_clip, name: ViT-B-32}]}"
    text = with_connector(tiny_recipe("causal"), "cross_attention").replace(
        f"tower: {TOWER}", f"tower: {pair}"
    )
    recipe = parsed(text)
    assert parsed(dump_recipe(recipe)) == recipe
    for right, wrong, message in (
        ("latents: 3", "latent: 3", r"recipe:6:\d+: unknown key 'latent'; did you mean latents\?"),
        (
            "kind: resampler",
            "kind: cross_attention",
            r"recipe:6:\d+: model\.connector\.base: 'cross_attention' is not one of linear, mlp",
        ),
        (
            "open_clip, name: ViT-B-32",
            "open_clip",
            r"recipe:5:\d+: give exactly one of model\.tower\.towers\.1\.name and",
        ),
    ):
        assert right in text
        with pytest.raises(RecipeError, match=message):
            parsed(text.replace(right, wrong))


# --- what does not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "tokens", "message"),
    [
        (
            PixelShuffleConnector(kind="pixel_shuffle"),
            17,
            "square grid of tokens, the tower gives 17",
        ),
        (
            PixelShuffleConnector(kind="pixel_shuffle", factor=3),
            16,
            "by 3 does not divide the tower's grid of 4 x 4",
        ),
        (AvgPoolConnector(kind="avg_pool", grid=2), 5, "square grid of tokens, the tower gives 5"),
        (AvgPoolConnector(kind="avg_pool", grid=5), 16, "larger grid of 5 x 5"),
        (Gemma3Connector(kind="gemma3", grid=3), 16, "3 does not divide the tower's grid of 4 x 4"),
    ],
)
def test_grids_that_do_not_fit_are_refused(config: Any, tokens: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_connector(config, 8, 8).tokens(tokens)


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="5 attention heads don't divide a width of 8"):
        build_connector(ResamplerConnector(kind="resampler", heads=5), 8, 8)


@torch.no_grad()
def test_average_pool_is_the_mean_of_each_cell() -> None:
    connector: Any = build_connector(AvgPoolConnector(kind="avg_pool", grid=2, depth=1), 3, 5)
    features = torch.randn(2, 16, 3)
    cells = features.view(2, 2, 2, 2, 2, 3).mean((2, 4)).view(2, 4, 3)
    assert largest(connector(features), connector.layers(cells)) <= 1e-6
