"""Several runs over one base: its weights once in memory, each run's answers as by itself."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.helpers.tiny_models import (
    CLIP,
    LORA_TUNE,
    built,
    parsed,
    png,
    rows_of,
    save_llm,
    tuned_by,
    with_llm,
    with_tower,
    with_tune,
)
from tests.helpers.vlm_samples import stir
from vlm_tune.errors import ArgumentError, ModelError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.lora import clean, is_adapter, parts

Tiny = Callable[..., str]
SIZES = {
    "causal": {"hidden_size": 64, "intermediate_size": 128},
    "seq2seq": {"d_model": 64, "d_kv": 32, "d_ff": 128},
}
ALL_LORA = """
tune:
  - {match: "tower.*", how: lora, r: 2, target_modules: all-linear}
  - {match: "connector.*", how: full}
  - {match: "llm.*", how: lora, r: 4, init: pissa, target_modules: all-linear}
train:"""
PROMPTED = """
tune:
  - {match: "tower.*", how: frozen}
  - {match: "connector.*", how: full}
  - {match: "llm.*", how: prompt, tokens: 3}
train:"""
CONNECTOR = """
tune:
  - {match: "connector.*", how: full}
  - {match: "*", how: frozen}
train:"""
WHOLE_TOWER = """
tune:
  - {match: "tower.*", how: full}
  - {match: "connector.*", how: full}
  - {match: "llm.*", how: lora, r: 2, target_modules: all-linear}
train:"""
REQUESTS: list[Any] = [
    {"prompt": question, "image": png(color).read()}
    for color in ((200, 30, 30), (30, 30, 200), (9, 9, 9))
    for question in ("what color is it?", "is it red?")
]


@pytest.fixture
def base_recipe(tiny_recipe: Tiny, tmp_path: Path) -> Callable[..., str]:
    """Text of a recipe over a saved tiny LLM and a saved CLIP tower."""
    torch.manual_seed(0)
    stir(CLIPVisionModel(CLIPVisionConfig(**CLIP))).save_pretrained(tmp_path / "clip")

    def make(kind: str, extra: str = "", tower: str = "layer: -2") -> str:
        text = tiny_recipe(kind)
        folder = tmp_path / kind
        if not folder.exists():
            save_llm(folder, kind, rows_of(parsed(text)), **SIZES[kind])
        clip = f"{{kind: transformers, name: {tmp_path / 'clip'}, {tower}}}"
        return with_tower(with_llm(text, folder, kind, extra), clip)

    return make


def saved_run(text: str, tune: str, folder: Path, seed: int) -> Path:
    """A model folder as a run leaves it, with what was trained far from its start."""
    recipe = parsed(with_tune(text, tune), seed=seed)
    model = built(recipe)
    tuned_by(model, recipe)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += noise.to(parameter.dtype) * 0.3
    model.save_pretrained(folder)
    return folder


def answers(model: VisionLanguageModel, **settings: Any) -> list[tuple[int, ...]]:
    """The ids of the answers to all requests, each asked alone."""
    return [
        model.answer(request["prompt"], request["image"], max_new_tokens=6, **settings).ids
        for request in REQUESTS
    ]


def apart(one: VisionLanguageModel, other: VisionLanguageModel) -> set[str]:
    """The names of the first model's base weights whose memory is not the second one's too."""
    addresses = {each.data_ptr() for each in other.parameters()}
    return {
        f"{part}.{clean(name)}"
        for part, module in parts(one).items()
        for name, each in module.named_parameters()
        if not is_adapter(name) and each.data_ptr() not in addresses
    }


def connector_of(model: VisionLanguageModel) -> set[str]:
    return {f"connector.{name}" for name, _ in model.connector.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("causal", ""),
        ("seq2seq", ""),
        ("causal", ", quantize: nf4"),
        ("causal", ", quantize: int8"),
    ],
    ids=["decoder", "T5", "nf4", "int8"],
)
def test_adapters_share_the_base_and_answer_as_by_themselves(
    kind: str, extra: str, base_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """Two runs over one base, asked by eight threads at once, with the base in memory once.

    The second one has LoRA in its tower too, and of another kind.
    """
    text = base_recipe(kind, extra)
    # PiSSA takes no packed weights.
    everywhere = ALL_LORA.replace("init: pissa, ", "") if extra else ALL_LORA
    folders = [
        saved_run(text, tune, tmp_path / f"run {seed}", seed)
        for seed, tune in enumerate((LORA_TUNE, everywhere))
    ]
    alone = [answers(VisionLanguageModel.from_pretrained(folder)) for folder in folders]
    assert alone[0] != alone[1]
    # The base is read once: where the first model has it, and not from its files.
    first = VisionLanguageModel.from_pretrained(folders[0])
    for base in (tmp_path / kind, tmp_path / "clip"):
        shutil.rmtree(base)
    second = first.load_adapter(folders[1], "second")
    assert apart(first, second) == connector_of(first)
    assert first.adapter("second") is second and first.adapter_names == ("second",)
    models = [first, second] * 4
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(answers, models))
    assert at_once == alone * 4
    # What one model changes in its weights is not the other's.
    for parameter in second.parameters():
        parameter.data = torch.zeros_like(parameter.data)
    assert answers(first) == alone[0]
    first.delete_adapter("second")
    assert first.adapter_names == ()


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_trained_rows_virtual_tokens_and_towers_are_each_runs_own(
    kind: str, base_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """Neither the run with new tokens nor the others see what was trained elsewhere."""
    plain = base_recipe(kind)
    words = base_recipe(kind, ", added_tokens: ['<loc_1>', '<loc_2>']")
    folders = {
        "words": saved_run(words, LORA_TUNE, tmp_path / "words", 1),
        "prompt": saved_run(plain, PROMPTED, tmp_path / "prompt", 2),
        "tower": saved_run(plain, WHOLE_TOWER, tmp_path / "tower", 3),
        "grid": saved_run(base_recipe(kind, tower="layer: -1"), LORA_TUNE, tmp_path / "grid", 4),
    }
    assert (folders["words"] / "llm.safetensors").is_file()
    alone = {
        name: answers(VisionLanguageModel.from_pretrained(folder))
        for name, folder in folders.items()
    }
    for begun in ("words", "prompt"):
        first = VisionLanguageModel.from_pretrained(folders[begun])
        models = {begun: first} | {
            name: first.load_adapter(folder, name)
            for name, folder in folders.items()
            if name != begun
        }
        assert {name: answers(model) for name, model in models.items()} == alone
        retrained = apart(models["prompt"], models["words"]) - connector_of(models["prompt"])
        assert retrained and retrained <= {f"llm.{name}" for name in models["words"].beside}
        for name in ("tower", "grid"):
            others = apart(models["prompt"], models[name])
            assert {key.partition(".")[0] for key in others} == {"tower", "connector"}
    # A model over a base is saved and loaded like any other.
    models["tower"].save_pretrained(tmp_path / "again")
    assert answers(VisionLanguageModel.from_pretrained(tmp_path / "again")) == alone["tower"]


def test_other_bases_can_not_be_shared(
    base_recipe: Callable[..., str], tiny_recipe: Tiny, tmp_path: Path
) -> None:
    text = base_recipe("causal")
    first = VisionLanguageModel.from_pretrained(saved_run(text, LORA_TUNE, tmp_path / "one", 1))
    packed = base_recipe("causal", ", quantize: nf4")
    with pytest.raises(ModelError, match=r"its llm is nf4, the loaded one not quantised; load it "):
        first.load_adapter(saved_run(packed, LORA_TUNE, tmp_path / "nf4", 2), "nf4")
    shutil.move(tmp_path / "causal", tmp_path / "before")
    save_llm(tmp_path / "causal", "causal", rows_of(parsed(text)), seed=3, **SIZES["causal"])
    with pytest.raises(ModelError, match=r"can't share the base .*tensors differ \(lm_head"):
        first.load_adapter(saved_run(text, LORA_TUNE, tmp_path / "other", 2), "other")
    # A whole trained LLM in the model folder: nothing of it is a base's.
    whole = saved_run(tiny_recipe("causal"), LORA_TUNE, tmp_path / "scratch", 2)
    with pytest.raises(ModelError, match=r"can't share the base .*load it by itself"):
        first.load_adapter(whole, "scratch")
    assert first.adapter_names == ()


def test_runs_over_a_whole_saved_model_share_it(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """A merged model's own LLM is the base of what was trained over it, its tower by its file."""
    whole = saved_run(tiny_recipe("causal"), CONNECTOR, tmp_path / "whole", 1)
    text = with_llm(tiny_recipe("causal"), whole / "llm", "causal")
    run = saved_run(text, LORA_TUNE, tmp_path / "run", 1)
    alone = answers(VisionLanguageModel.from_pretrained(run))
    first = VisionLanguageModel.from_pretrained(whole)
    second = first.load_adapter(run, "run")
    assert apart(first, second) == connector_of(first)
    assert answers(second) == alone


def test_names_of_adapters(base_recipe: Callable[..., str], tmp_path: Path) -> None:
    run = saved_run(base_recipe("causal"), LORA_TUNE, tmp_path / "one", 1)
    first = VisionLanguageModel.from_pretrained(run)
    second = first.load_adapter(run, "a")
    # Over the second one's base as well, which is the first one's.
    second.load_adapter(str(run), "b")
    assert first.adapter_names == second.adapter_names == ("a", "b")
    with pytest.raises(ArgumentError, match=r"an adapter 'a' is loaded already"):
        first.load_adapter(run, "a")
    with pytest.raises(ArgumentError, match=r"an adapter's name must be a string, got ''"):
        first.load_adapter(run, "")
    for call in (first.adapter, first.delete_adapter):
        with pytest.raises(ArgumentError, match=r"no adapter 'c'; loaded are a, b"):
            call("c")
    first.delete_adapter("a")
    first.delete_adapter("b")
    with pytest.raises(ArgumentError, match=r"no adapter 'a'; none is loaded"):
        first.adapter("a")
    assert second.chat("hello", max_new_tokens=3) == first.chat("hello", max_new_tokens=3)
    with pytest.raises(ModelError, match=r"this one is built or copied"):
        copy.deepcopy(first).load_adapter(run, "a")
