"""Which models `init` tries on which machine, and what it says about batches and epochs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.gemma_samples import save_gemma3, save_paligemma
from tests.helpers.native_models import Kind, native_model
from tests.helpers.tiled_samples import save_llava_onevision
from tests.helpers.vlm_samples import save_blip, save_idefics3
from vlm_tune.config.model import ModelSection
from vlm_tune.config.native import NativeModel
from vlm_tune.data.types import Conversation, Message
from vlm_tune.errors import RecipeError
from vlm_tune.recipe_writer import fit as fitting
from vlm_tune.recipe_writer.choose import (
    batches,
    held_out,
    set_data,
    set_evaluation,
    set_training,
    shape_tower,
)
from vlm_tune.recipe_writer.draft import Draft
from vlm_tune.recipe_writer.fit import Drafted, Fit, fit
from vlm_tune.recipe_writer.look import Facts
from vlm_tune.recipe_writer.machine import Machine
from vlm_tune.recipe_writer.models import ModelChoice, candidates, named_model

CPU = Machine("a CPU", None, 8_000_000_000, 2, hub=False)
GPU = Machine("a GPU", 9.0, 24_000_000_000, 8, hub=True)
OLD_GPU = Machine("an old GPU", 7.5, 16_000_000_000, 8, hub=True)
FACTS = Facts(
    forms=("vqa",),
    rows=780,
    read=780,
    bad=0,
    questions=780,
    images=195,
    most_images=1,
    single_images=True,
    width=160,
    height=160,
    seconds=0.0,
    elongated=0.0,
    answers="repeated",
    distinct_answers=9,
    unrepeated=0.0,
    colours=False,
    whole_image=True,
    longest_answer=12,
    longest_row=80,
    smallest_class=0,
    language="en",
    latin=1.0,
)
SOURCES = {
    "train": [{"kind": "file", "path": "train.jsonl"}],
    "validation": [],
    "test": [],
}


def draft_of(choice: ModelChoice, machine: Machine, facts: Facts, batch: int) -> Draft:
    draft = choice.draft.copy()
    draft.set("name", "x")
    draft.set("output", "runs/x")
    set_data(draft, facts, SOURCES, choice)
    set_training(draft, facts, machine, choice, batch)
    set_evaluation(draft, facts, choice)
    return draft


@pytest.mark.parametrize("machine", [CPU, replace(CPU, hub=True), GPU], ids=lambda each: each.name)
def test_every_candidate_makes_a_valid_recipe(machine: Machine) -> None:
    for choice in candidates(machine, FACTS, None, None):
        recipe = draft_of(choice, machine, FACTS, 1).recipe("recipe")
        assert recipe.train.precision in ("bf16", "fp32")


def test_models_follow_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(machine: Machine) -> list[str]:
        return [choice.name for choice in candidates(machine, FACTS, None, None)]

    monkeypatch.chdir(tmp_path)
    llava = "llava-hf/llava-1.5-7b-hf"
    assert names(GPU) == [llava, f"{llava} in 4 bit", "google/flan-t5-xl in 4 bit"]
    assert names(CPU) == ["a small T5 from random weights"]
    assert names(replace(CPU, hub=True)) == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    (tmp_path / "models" / "smollm2-135m-instruct").mkdir(parents=True)
    (tmp_path / "models" / "efficientnet_lite0.safetensors").touch()
    assert names(CPU) == ["models/smollm2-135m-instruct"]
    (local,) = candidates(CPU, FACTS, None, None)
    assert local.draft.values["model.tower"]["pretrained"].startswith("models/efficientnet")


def test_precision_follows_the_gpu_and_never_fp16_for_t5() -> None:
    llava, _, t5 = candidates(OLD_GPU, FACTS, None, None)
    assert draft_of(llava, OLD_GPU, FACTS, 1).values["train.precision"] == "fp16"
    assert draft_of(t5, OLD_GPU, FACTS, 1).values["train.precision"] == "fp32"
    assert draft_of(t5, GPU, FACTS, 1).values["train.precision"] == "bf16"


def test_small_sets_get_more_epochs_and_smaller_batches() -> None:
    (small,) = candidates(replace(CPU, hub=True), FACTS, None, None)
    assert draft_of(small, GPU, FACTS, 8).values["train.epochs"] == 26
    assert draft_of(small, GPU, FACTS, 8).values["evaluate.every"] == 26 * 25 // 12
    many = replace(FACTS, rows=100_000, read=20_000, questions=20_000, images=5_000)
    values = draft_of(small, GPU, many, 8).values
    assert values["train.epochs"] == 1 and "evaluate.every" not in values
    assert many.all_questions == 100_000 and many.all_images == 25_000
    assert batches(FACTS, small) == [8, 4, 2, 1]  # images: four questions about each
    assert batches(replace(FACTS, images=20), small) == [2, 1]


def test_shares_follow_the_number_of_images() -> None:
    def shares(facts: Facts, **sources: list[dict[str, str]]) -> dict[str, float] | None:
        return held_out(facts, {**SOURCES, **sources})[0]

    assert shares(FACTS) == {"validation": 0.1, "test": 0.1}
    assert shares(replace(FACTS, images=20)) == {"validation": 0.2, "test": 0.2}
    assert shares(replace(FACTS, images=4)) is None
    assert shares(FACTS, validation=[{"path": "val.jsonl"}]) == {"test": 0.1}
    stratified = shares(replace(FACTS, smallest_class=12))
    assert stratified == {"validation": 0.1, "test": 0.1, "stratify": True}


def test_a_model_that_cuts_images_is_left_to_cut_them(tmp_path: Path) -> None:
    """Its chat format follows from its tokenizer: the first SmolVLMs are stored as Idefics3."""
    facts = replace(FACTS, elongated=1.0, most_images=8)
    for folder, marked in (("one", False), ("other", True)):
        save_idefics3(tmp_path / folder, "idefics3", smolvlm_tokenizer=marked)
        choice = named_model(str(tmp_path / folder), None)
        draft = draft_of(choice, CPU, facts, 1)
        assert draft.values["data.template"] == ("smolvlm" if marked else "idefics3")
        assert "model.tower" not in draft.values
        assert choice.splits and choice.image_tokens == 5 * (4 + 3)
        assert draft.values["data.max_length"] >= 8 * 5 * 7


def test_one_among_several_images_of_a_llava_onevision_takes_fewer_tokens(tmp_path: Path) -> None:
    """Of seven frames of an image alone, the picture of the tiles is shrunk to fewer's tokens."""
    save_llava_onevision(tmp_path / "vlm")
    choice = named_model(str(tmp_path / "vlm"), None)
    assert choice.splits and (choice.image_tokens, choice.among_tokens) == (3 * 19, 19)
    assert [choice.tokens_of(images) for images in (0, 1, 2, 8)] == [0, 57, 57, 8 * 19]
    draft = draft_of(choice, CPU, replace(FACTS, most_images=8), 1)
    assert draft.values["data.template"] == "llava_onevision"
    assert "up to 152 tokens" in draft.reasons["data.max_length"]


@pytest.mark.parametrize("shares", [True, False])
def test_questions_share_an_image_where_the_model_lets_them(shares: bool, tmp_path: Path) -> None:
    """A PaliGemma's images see their question; a Gemma 3's do not."""
    if shares:
        save_gemma3(tmp_path / "vlm")
    else:
        save_paligemma(tmp_path / "vlm", "gemma")
    choice = named_model(str(tmp_path / "vlm"), None)
    draft = draft_of(choice, CPU, FACTS, 1)
    assert draft.values["data.template"] == ("gemma3" if shares else "paligemma")
    assert draft.values.get("data.group") == ("image" if shares else None)


def test_questions_share_no_image_where_the_q_former_reads_them(tmp_path: Path) -> None:
    """BLIP-2's does not, InstructBLIP's does; the chat format is that of the LLM."""
    rows = [Conversation("row", (Message("user", ("What is it?",)),))]
    formats = []
    for kind, language in (("blip-2", "opt"), ("instructblip", "llama"), ("instructblip", "t5")):
        folder = tmp_path / f"{kind} {language}"
        save_blip(folder, rows, kind, language)  # type: ignore[arg-type]
        draft = draft_of(named_model(str(folder), None), CPU, FACTS, 1)
        formats.append((draft.values["data.template"], draft.values.get("data.group")))
    assert formats == [("blip2_opt", "image"), ("instructblip", None), ("blip2", None)]


@pytest.mark.parametrize("kind", ["qwen3_vl", "lfm2_vl"])
def test_another_model_of_transformers_is_native(kind: Kind, tmp_path: Path) -> None:
    """Its images are bounded where its processor takes bounds, and shared where rows are joined."""
    native_model(kind).config.save_pretrained(tmp_path / "vlm")
    facts = replace(FACTS, elongated=1.0, most_images=2)
    for choice in candidates(GPU, facts, str(tmp_path / "vlm"), None):
        recipe = draft_of(choice, GPU, facts, 1).recipe("recipe")
        model = recipe.model
        assert isinstance(model, NativeModel)
        assert model.max_pixels == (1024 * 28 * 28 if kind == "qwen3_vl" else None)
        shared = "image" if kind == "qwen3_vl" else "none"
        assert (recipe.data.template, recipe.data.group) == ("own", shared)
        if kind == "qwen3_vl":  # else an image of the most tokens would fill a row
            assert recipe.data.row_length == recipe.data.max_length == 2048
        assert [rule.how for rule in recipe.tune] == ["frozen", "frozen", "lora"]
    assert model.llm.quantize == "nf4"
    with pytest.raises(RecipeError, match="has a vision tower"):
        named_model(str(tmp_path / "vlm"), "ViT-B-32:openai")


def test_rows_of_many_images_get_fewer_tokens_for_each() -> None:
    (small,) = candidates(replace(CPU, hub=True), FACTS, None, None)
    draft = small.draft.copy()
    shape_tower(draft, replace(FACTS, most_images=8), small.size)
    assert draft.values["model.tower"]["grid"] == 6
    whole = candidates(GPU, FACTS, None, None)[0]
    draft = whole.draft.copy()
    shape_tower(draft, replace(FACTS, most_images=8, elongated=0.5), whole.size)
    assert draft.values["model.tower"] == {"resize": "pad", "grid": 6}


class Planned:
    """A plan that needs memory by the batch and the LLM's bits."""

    def __init__(self, recipe: object, tokens: int | None) -> None:
        batch = recipe.train.batch_size  # type: ignore[attr-defined]
        packed = recipe.model.llm.quantize is not None  # type: ignore[attr-defined]
        self.needed = (5 if packed else 15) * 10**9 + batch * 10**9
        self.stages = [self]
        self.why_cached = "the tower is cheap"


@pytest.mark.parametrize(
    ("memory", "name", "batch", "fits"),
    [
        (40, "llava-hf/llava-1.5-7b-hf", 16, True),
        (20, "llava-hf/llava-1.5-7b-hf", 4, True),
        (14, "llava-hf/llava-1.5-7b-hf in 4 bit", 8, True),
        (3, "google/flan-t5-xl in 4 bit", 1, False),
    ],
)
def test_the_best_model_and_largest_batch_that_fit_are_taken(
    memory: int, name: str, batch: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "plan", Planned)
    facts = replace(FACTS, images=780)
    machine = replace(GPU, memory=memory * 10**9)
    chosen: Fit = fit(
        candidates(machine, facts, None, None),
        facts,
        machine,
        lambda choice: Drafted(draft_of(choice, machine, facts, 1), None, "no check"),
    )
    assert (chosen.choice.name, chosen.fits) == (name, fits)
    recipe = chosen.draft.recipe("recipe")
    assert recipe.train.batch_size == batch
    assert recipe.train.batch_size * recipe.train.gradient_accumulation == 32
    assert f"of {memory}.0 GB, says `vlm-tune plan`" in chosen.draft.reasons["train.batch_size"]
    assert isinstance(recipe.model, ModelSection) == name.startswith("google")
