"""`vlm-tune show`: samples as a stage trains on them, with the media named for what they are."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.helpers.audio_samples import hearing_recipe, write_tone_rows
from tests.helpers.tiny_models import parsed
from tests.helpers.tiny_recipes import COLORS
from vlm_tune.config.recipe import Recipe
from vlm_tune.rendering.samples import sample_tokens, show_samples

GRPO = {"kind": "grpo", "num_generations": 4, "max_completion_length": 6}


def shown(recipe: Recipe, n: int = 1) -> str:
    """What `show` prints of the first units."""
    stream = io.StringIO()
    show_samples(Console(file=stream, width=300), sample_tokens(recipe, n), ids=False)
    return stream.getvalue()


@pytest.fixture
def video_rows(color_rows: Path) -> Path:
    """A row about a folder of four frames."""
    clip = color_rows.parent / "clip"
    clip.mkdir()
    for image in color_rows.parent.glob("*.png"):
        (clip / image.name).write_bytes(image.read_bytes())
    path = color_rows.parent / "videos.jsonl"
    path.write_text(json.dumps({"question": "what?", "answer": "colors", "video": "clip"}))
    return path


def test_slots_are_named_by_their_medium(
    tmp_path: Path, tiny_recipe: Callable[..., str], video_rows: Path
) -> None:
    heard = shown(parsed(hearing_recipe("causal", write_tone_rows(tmp_path), tmp_path / "run")))
    assert "[audio x5]" in heard and "5 audio slots" in heard and "image" not in heard
    sources = [{"kind": "file", "path": str(video_rows)}]
    seen = shown(parsed(tiny_recipe("causal"), data__train=sources))
    assert "[video frame x16]" in seen and "16 video frame slots" in seen and "image" not in seen


def test_a_stage_that_samples_shows_prompts_and_where_their_completions_branch(
    tiny_recipe: Callable[..., str],
) -> None:
    recipe = parsed(tiny_recipe("causal"), objective=GRPO, data__group="image")
    (sample,) = sample_tokens(recipe, 1)
    tokens, completions = sample["tokens"], sample["completions"]
    assert {token["kind"] for token in tokens} == {"prompt", "image"}
    assert sum(token["kind"] == "image" for token in tokens) == 4
    assert (completions["number"], completions["most_tokens"]) == (4, 6)
    assert completions["rewarded_by"] == ["exact_match"]
    ends = [0, *(end + 1 for end in completions["after"])]
    assert ends[-1] == len(tokens)
    by_answer = {
        answer: "".join(token["text"] for token in tokens[start:end])
        for answer, start, end in zip(completions["references"], ends, ends[1:], strict=False)
    }
    assert "blue?" in by_answer["no"] and "color" in by_answer["red"]
    text = shown(recipe)
    assert text.count("completions 1 to 4: sampled in training, up to 6 tokens each") == 2
    assert "reference: red" in text and "0 trained" in text


def test_an_encoder_decoders_prompt_is_followed_by_its_completions(
    tiny_recipe: Callable[..., str],
) -> None:
    (sample,) = sample_tokens(parsed(tiny_recipe("seq2seq"), objective=GRPO), 1)
    assert sample["completions"]["after"] == [len(sample["tokens"]) - 1]
    assert sample["completions"]["references"] == ["red"]
    assert "target" not in {token["kind"] for token in sample["tokens"]}


def test_span_corruption_shows_the_masked_answer(tiny_recipe: Callable[..., str]) -> None:
    sentinels = [f"<extra_id_{number}>" for number in range(4)]
    recipe = parsed(
        tiny_recipe("seq2seq"),
        objective={"kind": "span_corruption", "rate": 0.5},
        model__llm__added_special_tokens=sentinels,
    )
    (sample,) = sample_tokens(recipe, 1)
    texts = {
        kind: "".join(token["text"] for token in sample["tokens"] if token["kind"] == kind)
        for kind in ("prompt", "target")
    }
    assert "<extra_id_0>" in texts["prompt"] and texts["target"].startswith("<extra_id_0>")


def write_captions(color_rows: Path) -> Path:
    """Captions of the four images."""
    path = color_rows.with_name("captions.jsonl")
    rows = [{"image": f"{name}.png", "caption": f"a {name} square"} for name in COLORS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("views", ["image_text", "image_image", "both"])
def test_a_contrastive_stage_shows_what_it_compares(
    kind: str, views: str, tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    augment = {} if views == "image_text" else {"data__augment": {"flip": 0.5}}
    sources = [{"kind": "file", "path": str(write_captions(color_rows))}]
    recipe = parsed(
        tiny_recipe(kind),
        objective={"kind": "contrastive", "views": views},
        data__train=sources,
        data__validation=[],
        data__group="image",
        **augment,
    )
    (sample,) = sample_tokens(recipe, 1)
    texts = {token["kind"]: "" for token in sample["tokens"]}
    for token in sample["tokens"]:
        texts[token["kind"]] += token["text"]
    words = {} if views == "image_image" else {"caption": "a red square"}
    assert {name: text.strip() for name, text in texts.items()} == {"image": "", **words}
    assert sample["compares"] == views
    text = shown(recipe)
    assert ("of captions" in text) == ("caption: " in text) == bool(words)
    assert ("two augmentations" in text) == (views != "image_text")


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_matching_stage_shows_the_answers_to_both_images(
    kind: str, tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    source = {"kind": "file", "path": str(write_captions(color_rows)), "form": "match"}
    recipe = parsed(
        tiny_recipe(kind), objective={"kind": "matching"}, data__train=[source], data__validation=[]
    )
    text = shown(recipe)
    assert re.search(r" match: +yes", text) and re.search(r" mismatch: +no", text)
    assert "chosen" not in text


def test_a_stages_and_a_sources_own_prompt_is_shown(
    tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    source: dict[str, Any] = {"kind": "file", "path": str(color_rows), "system": "Of the source."}
    stages = [
        {"name": "first", "data": {"system": "Of the stage."}},
        {"name": "second", "data": {"train": [source]}},
    ]
    samples = sample_tokens(parsed(tiny_recipe("causal"), stages=stages), 1)
    texts = {
        sample["stage"]: "".join(token["text"] for token in sample["tokens"]) for sample in samples
    }
    assert "Of the stage." in texts["first"] and "Of the source." in texts["second"]
