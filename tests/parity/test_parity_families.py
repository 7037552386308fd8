"""Whole models taken over by a recipe: inputs, logits, gradients and text are transformers' own."""

from __future__ import annotations

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.helpers.family_samples import FAMILIES, SHAPED, Sample
from tests.helpers.shaped_samples import LONGEST
from tests.helpers.tiled_samples import LLAVA_ONEVISION_TEMPLATE, save_llava_onevision
from tests.helpers.tiny_models import batch_of, built, largest, parsed, rows_of
from tests.helpers.tiny_recipes import tiny_text
from tests.helpers.transformers_parity import (
    BY_LORA,
    assert_same_logits,
    assert_same_pixels,
    ids_of,
    our_step,
    peft_over,
    same_gradients,
    their_inputs,
    their_logits,
    their_step,
    trained_step,
    until_stop,
    with_adapters,
    write_rows,
)
from tests.helpers.vlm_samples import with_pretrained
from vlm_tune.data.batch import Batch
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example
from vlm_tune.errors import ModelError
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.build import build_processor
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.lora import merge_adapter

WORDS = "[embed_tokens, lm_head, q_proj, down_proj]"


class Taken(NamedTuple):
    """The model of a recipe, transformers' own in the folder, and the rows with their inputs."""

    sample: Sample
    recipe: str
    model: VisionLanguageModel
    theirs: Any
    folder: Path
    rows: list[Conversation]
    examples: list[Example]
    inputs: list[Any]

    @property
    def batch(self) -> Batch:
        """All rows: of one image, of several, and of words alone."""
        return batch_of(self.model, self.examples)


def scale_logits(scale: float, _module: Any, _arguments: Any, output: Any) -> Any:
    """A forward hook: the outputs of a whole model with its LLM's own scale of logits."""
    output.logits = output.logits * scale
    return output


def take(sample: Sample, folder: Path, **options: Any) -> Taken:
    """A family's tiny checkpoint, taken over."""
    rows_file = folder / "rows.jsonl"
    write_rows(rows_file)
    if sample.turns:
        messages = [{"role": role, "content": text} for role, text in sample.turns]
        with rows_file.open("a") as file:
            row = {"messages": messages, "images": ["high.png", "small.png"]}
            file.write(json.dumps(row) + "\n")
    theirs = sample.save(folder / "vlm", **options)
    theirs.register_forward_hook(partial(scale_logits, sample.scale))
    text = tiny_text("causal", rows_file, folder / "run")
    text = text.replace("max_length: 128", "max_length: 256")
    recipe = with_pretrained(text, folder / "vlm", sample.template)
    model = built(parsed(recipe)).eval()
    rows = rows_of(parsed(recipe))
    examples = [model.processor.examples(row)[0] for row in rows]
    inputs = [sample.inputs(folder / "vlm", row) for row in rows]
    return Taken(sample, recipe, model, theirs, folder / "vlm", rows, examples, inputs)


@pytest.fixture(scope="module", params=FAMILIES)
def taken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    return take(FAMILIES[request.param], tmp_path_factory.mktemp(request.param))


def their_loss(taken: Taken, theirs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' supervised logits of all rows, and their mean loss."""
    batch = taken.batch
    logits = their_logits(theirs, batch, taken.inputs)
    labels = batch.labels[batch.labels != IGNORE_INDEX]
    return logits, torch.nn.functional.cross_entropy(logits, labels)


def our_logits(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.llm.supervised_logits(model.embed(batch), batch)


def test_ids_and_pixels_are_transformers(taken: Taken) -> None:
    for example, given in zip(taken.examples, taken.inputs, strict=True):
        ids = [*ids_of(example, taken.theirs.config.image_token_id), int(example.labels[-1])]
        assert given["input_ids"][0, : len(ids)].tolist() == ids
        if example.media:
            assert_same_pixels(taken.model, example, given)
    frames = [len(example.media) for example in taken.examples]
    assert frames == [*taken.sample.frames, *([2] if taken.sample.turns else [])]


def test_logits_and_gradients_are_transformers(taken: Taken) -> None:
    """Of every weight, in one batch of several images, odd sizes and a row of words."""
    logits = our_logits(taken.model, taken.batch)
    taken.theirs.zero_grad(set_to_none=True)
    expected, loss = their_loss(taken, taken.theirs)
    assert_same_logits(logits, expected.detach())
    # Another image is seen: the first tokens of two answers to one question differ.
    counts = torch.tensor([example.supervised for example in taken.examples])
    first = [0, *counts.cumsum(0).tolist()]
    assert largest(logits[first[0]], logits[first[2]]) > 1e-3
    wanted = their_step(taken.theirs, loss, taken.sample.our_name)
    same_gradients(our_step(taken.model, taken.batch), wanted)


def assert_lora_is_pefts(
    taken: Taken, layers: str, connector: str = "how: full"
) -> VisionLanguageModel:
    """Asserts that a LoRA step is that of PEFT over transformers' model; the tuned model."""
    tuned = with_adapters(taken.model, taken.recipe, layers, connector)
    assert largest(our_logits(tuned, taken.batch), our_logits(taken.model, taken.batch)) > 1e-3
    theirs = peft_over(taken.theirs, tuned, taken.sample.our_name)
    expected, loss = their_loss(taken, theirs)
    assert_same_logits(our_logits(tuned, taken.batch), expected.detach())
    names = taken.sample.our_name
    wanted = their_step(theirs, loss, lambda name: names(name.replace(".base_layer.", ".")))
    same_gradients(trained_step(tuned, taken.batch), wanted)
    return tuned


def test_a_lora_step_is_that_of_peft_over_transformers(taken: Taken) -> None:
    """On tower and LLM, with the connector in full."""
    assert_lora_is_pefts(taken, "all-linear")


def test_lora_on_the_connector_is_pefts_and_is_merged(taken: Taken) -> None:
    """On all linear layers of a connector; Gemma 3's is one matrix in none."""
    if taken.sample.template == "gemma3":
        with pytest.raises(ModelError, match=r"'connector\.\*' matches no linear layer"):
            with_adapters(taken.model, taken.recipe, connector=BY_LORA)
        return
    tuned = assert_lora_is_pefts(taken, "all-linear", BY_LORA)
    expected = our_logits(tuned, taken.batch)
    merge_adapter(tuned, "connector")
    assert largest(our_logits(tuned, taken.batch), expected) <= 1e-4


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_embedding_and_head_is_pefts_and_is_merged(
    family: str, tied: bool, tmp_path: Path
) -> None:
    """A head that is the embedding is one no more when each of them has its own adapter."""
    taken = take(FAMILIES[family], tmp_path, tied=tied)
    language: Any = taken.model.llm.model
    embedding, head = language.get_input_embeddings(), language.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    tuned = assert_lora_is_pefts(taken, WORDS)
    expected = our_logits(tuned, taken.batch)
    merge_adapter(tuned, "llm")
    merge_adapter(tuned, "tower")
    assert largest(our_logits(tuned, taken.batch), expected) <= 1e-4


@pytest.mark.parametrize("beams", [1, 2])
def test_text_is_transformers(taken: Taken, beams: int) -> None:
    model, theirs = taken.model, taken.theirs
    prompts = [model.processor.prompt(row) for row in taken.rows]
    decoding = Decoding(6, num_beams=beams)
    if beams > 1 and theirs.config.text_config.model_type == "gemma2":
        # The last token of a prompt would see no more than its window, and not all of the prompt.
        with pytest.raises(ModelError, match="leave out beams"):
            answer_prompts(model, prompts, decoding, fetch=model.processor.images)
        return
    answers = answer_prompts(model, prompts, decoding, fetch=model.processor.images)
    stops = model.processor.stop_ids
    # Older releases repeat each frame for the beams, and not the row's frames in turn.
    mixed_up = "mm_encoder_outputs" not in inspect.signature(theirs.forward).parameters
    for row, example, answer in zip(taken.rows, taken.examples, answers, strict=True):
        if beams > 1 and mixed_up and len(example.media) > 1:
            continue
        prompt = taken.sample.inputs(taken.folder, row, prompt=True)
        generated = theirs.generate(
            **prompt, max_new_tokens=6, do_sample=False, num_beams=beams, eos_token_id=stops
        )
        ids = generated[0, prompt["input_ids"].shape[1] :].tolist()
        assert answer == model.processor.decode(until_stop(ids, stops))


@pytest.mark.parametrize("taken", SHAPED, indirect=True)
def test_a_batch_has_images_of_several_shapes(taken: Taken) -> None:
    """The smaller ones are padded."""
    frames = [frame for example in taken.examples for frame in example.media]
    shapes = {tuple(taken.model.processor.images(frame).shape[1:]) for frame in frames}
    assert len(shapes) == 3
    assert max(map(max, shapes)) == LONGEST
    batch = taken.batch
    assert batch.pixels is not None
    assert batch.patch_places is not None
    assert batch.pixels.shape[2] == 3 * taken.model.tower.patch**2
    assert bool((batch.patch_places == -1).any())


@pytest.mark.parametrize(
    ("taken", "instead"),
    # Later tokens of an image are seen by its earlier ones; the question by the image's tokens.
    [("gemma3", None), ("paligemma", "images"), ("paligemma2", "images")],
    indirect=["taken"],
)
def test_tokens_that_see_each_other_both_ways_matter(taken: Taken, instead: str | None) -> None:
    model = taken.model
    expected = our_logits(model, taken.batch)
    usual = model.llm.bidirectional
    model.llm.bidirectional = instead  # type: ignore[assignment]
    other = our_logits(model, taken.batch)
    model.llm.bidirectional = usual
    assert largest(other, expected) > 1e-3


@pytest.mark.parametrize("taken", ["gemma3"], indirect=True)
def test_an_images_marker_joins_the_line_end_before_it(taken: Taken) -> None:
    assert len(taken.model.processor.encoder.text("\n\n\n")) == 1


def test_llava_onevisions_prompts_are_those_of_its_published_template(tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.jsonl"
    write_rows(rows_file)
    save_llava_onevision(tmp_path / "vlm", template=LLAVA_ONEVISION_TEMPLATE)
    text = tiny_text("causal", rows_file, tmp_path / "run")
    recipe = parsed(with_pretrained(text, tmp_path / "vlm", "llava_onevision"))
    processor = build_processor(recipe, [])
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    for row in rows_of(recipe):
        given = their_inputs(tmp_path / "vlm", row, prompt=True)
        assert ids_of(processor.prompt(row), image) == given["input_ids"][0].tolist()
