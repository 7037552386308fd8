"""What a model is asked for beside plain answers, on a GPU: the outcomes are those of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.generation.test_choices import COLORS, REQUESTS
from tests.helpers.answered_jobs import job_of
from tests.helpers.pretended_gpu import CUDA, pretended
from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import png
from tests.serving.test_scheduler import Driver, assert_same, offline
from vlm_tune.generation import picking
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.serving.embedding import EmbeddingRequest, embedding_events
from vlm_tune.serving.jobs import Embedded, EmbeddingJob

Recipes = Callable[..., str]
both_llms = pytest.mark.parametrize("llm", ["causal", "seq2seq"])
IMAGES = [png((60 * k, 200 - 40 * k, 30)).source for k in range(2)]
NUMBERS = {"type": "array", "items": {"type": "integer"}, "maxItems": 2}
FEW = {"max_new_tokens": 4}
SERVED: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("what color is it?", IMAGES[:1], {"max_new_tokens": 5}),
    ("is it red?", IMAGES[:1], {"max_new_tokens": 7}),
    ("two of them", IMAGES, {"temperature": 1.1, "seed": 3, "num_return_sequences": 2, **FEW}),
    ("no image", [], {"repetition_penalty": 1.4, "logprobs": True, "top_logprobs": 2, **FEW}),
    ("a list", [], {"json_schema": NUMBERS, "max_new_tokens": 6}),
    ("which color?", IMAGES[:1], {"choices": ("red", "no", "it is blue")}),
]


@both_llms
def test_a_server_answers_together(llm: str, tiny_recipe: Recipes) -> None:
    """Prompts join and leave, some begin with a prefix that is remembered, or are drawn."""
    model = talkative(tiny_recipe(llm))
    jobs = [job_of(question, images, **settings) for question, images, settings in SERVED]
    expected = [offline(model, job) for job in jobs]
    with pretended(model, CUDA):
        driver = Driver(model, batch=4)
        listening = []
        for job in jobs:
            listening.append(driver.submit(job)[0])
            driver.scheduler.step()
        driver.finish()
    for each, answers in zip(listening, expected, strict=True):
        assert_same(each, answers)


@both_llms
def test_choices_are_compared(llm: str, tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe(llm))
    expected = model.answer_batch(REQUESTS, choices=COLORS)
    with pretended(model, CUDA):
        there = model.answer_batch(REQUESTS, choices=COLORS)
    for one, other in zip(there, expected, strict=True):
        assert one.text == other.text
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"json_schema": NUMBERS},
        {"stop_strings": ["e", "a"], "temperature": 0.9, "seed": 2, "num_return_sequences": 2},
        {"logprobs": True, "top_logprobs": 3},
    ],
    ids=["json", "drawn", "logprobs"],
)
@both_llms
def test_answers_of_all_kinds(settings: dict[str, Any], llm: str, tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe(llm))
    expected = model.answer_batch(REQUESTS, max_new_tokens=6, **settings)
    with pretended(model, CUDA):
        there = model.answer_batch(REQUESTS, max_new_tokens=6, **settings)
        (prompt,) = [each for each in REQUESTS if isinstance(each, str)]
        streamed = "".join(model.stream(prompt, max_new_tokens=6)) if "seed" not in settings else ""
    for one, other in zip(there, expected, strict=True):
        assert [each.ids for each in (one, *one.alternatives)] == [
            each.ids for each in (other, *other.alternatives)
        ]
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
    assert streamed or "seed" in settings


@both_llms
def test_draws_are_deterministic_where_torch_has_to_be(
    llm: str, tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's running sums are not on a GPU."""
    settings: dict[str, Any] = {"temperature": 1.2, "seed": 4, "max_new_tokens": 5}
    model = talkative(tiny_recipe(llm))
    monkeypatch.setattr(picking, "SUMMED", 64)
    expected = model.answer_batch(REQUESTS, **settings)
    torch.use_deterministic_algorithms(True)
    try:
        with pretended(model, CUDA):
            there = model.answer_batch(REQUESTS, **settings)
            with pytest.raises(RuntimeError, match="deterministic"):
                torch.ones(3, device="cuda").cumsum(0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [answer.ids for answer in there] == [answer.ids for answer in expected]


@both_llms
def test_a_chat_goes_on(llm: str, tiny_recipe: Recipes) -> None:
    """With a decoder only what is new of a turn is prefilled."""
    model = talkative(tiny_recipe(llm))

    def turns() -> list[tuple[int, ...]]:
        session = model.start_chat(max_new_tokens=5)
        return [
            session.ask("what is it?", IMAGES[0]).ids,
            session.ask("and this <image>?", IMAGES[1]).ids,
            session.ask("sure?").ids,
        ]

    expected = turns()
    with pretended(model, CUDA):
        assert turns() == expected


@both_llms
def test_vectors_of_images_and_texts(llm: str, tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe(llm))
    texts = ["a red one", "blue"]

    def vectors() -> list[np.ndarray]:
        return [model.embed_images(IMAGES), model.embed_texts(texts), served(model)]

    expected = vectors()
    with pretended(model, CUDA):
        there = vectors()
    for one, other in zip(there, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def served(model: VisionLanguageModel) -> np.ndarray:
    """The vectors of texts and images that a server gives."""
    inputs = ("red", *(png((200 * k, 10, 10)) for k in range(3)))
    driver = Driver(model, batch=4)
    request = EmbeddingRequest(
        EmbeddingJob(inputs, "tiny"), model, lambda event: None, driver.batch.features
    )
    *_, embedded = embedding_events(request, driver.batch.features)
    assert isinstance(embedded, Embedded)
    return embedded.vectors
