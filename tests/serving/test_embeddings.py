"""Vectors by HTTP are those of the model, in the form that the `openai` package reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import openai
import pytest

from tests.helpers.answered_jobs import Listening, job_of
from tests.helpers.served import ask, image_part, listening, served
from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import png
from tests.helpers.tiny_recipes import tiny_text, write_color_rows
from vlm_tune.data.types import Media
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.serving import embedding
from vlm_tune.serving.app import EMBEDDINGS, Server
from vlm_tune.serving.embedding import EmbeddingRequest
from vlm_tune.serving.engine import BatchingEngine
from vlm_tune.serving.jobs import Embedded, EmbeddingJob, JobEvent
from vlm_tune.serving.request import request_of
from vlm_tune.serving.scheduler import Scheduler

RED, BLUE = png((200, 30, 30)).read(), png((20, 30, 200)).read()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    folder = tmp_path_factory.mktemp("model")
    return talkative(tiny_text("causal", write_color_rows(folder), folder / "run"))


@pytest.fixture
def server(model: VisionLanguageModel) -> Iterator[Server]:
    engine = BatchingEngine({"tiny": model}, queue=8, batch=4)
    yield served(model, engine, max_images=3)
    engine.close(0)


@pytest.mark.parametrize("llm", ["causal", "seq2seq"])
def test_the_openai_client_gets_the_models_vectors(
    llm: str, tiny_recipe: Callable[..., str]
) -> None:
    model = talkative(tiny_recipe(llm))
    engine = BatchingEngine({"tiny": model}, queue=8, batch=4)
    texts = ["red", "a blue one", "red"]
    with listening(served(model, engine), engine) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        # The client asks for base64 where no format is given.
        packed = client.embeddings.create(model="tiny", input=texts)
        plain = client.embeddings.create(
            model="tiny", input=texts[1], encoding_format="float", dimensions=model.llm.width
        )
        images: Any = [image_part(RED), "red", image_part(BLUE)]
        mixed = client.embeddings.create(model="tiny", input=images)
    expected = model.embed_texts(texts)
    assert [each.index for each in packed.data] == [0, 1, 2]
    vectors = np.array([each.embedding for each in packed.data])
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    np.testing.assert_allclose(plain.data[0].embedding, expected[1], atol=1e-6)
    assert 0 < plain.usage.prompt_tokens < packed.usage.total_tokens
    red, blue = model.embed_images([RED, BLUE])
    for each, vector in zip(mixed.data, (red, expected[0], blue), strict=True):
        np.testing.assert_allclose(each.embedding, vector, atol=1e-6)
    assert np.abs(red - blue).max() > 1e-3
    assert mixed.usage.prompt_tokens > 2 * model.processor.spec.tokens_per_image


WRONG: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "no input": ({"input": []}, "at least 1 item", "input"),
    "token ids": ({"input": [3, 4]}, "token ids are not taken; send texts", "input.0"),
    "lists of token ids": ({"input": [[3, 4]]}, "token ids are not taken", "input.0"),
    "another type": ({"input": {"text": "red"}}, "valid string", "input"),
    "a part of another type": (
        {"input": [{"type": "input_audio"}]},
        "an input is a text, or a part of type text or image_url",
        "input.0",
    ),
    "a part without a text": ({"input": [{"type": "text"}]}, "is missing", "input.0.text"),
    "an empty text": ({"input": ["red", ""]}, "input 2: '' has no token", "input"),
    "a long text": ({"input": "red " * 500}, "tokens, more than 128", "input"),
    "no image": (
        {"input": ["red", image_part("data:image/png;base64,AAAA")]},
        "input 2: ",
        "input",
    ),
    "too many images": ({"input": [image_part(RED)] * 4}, "at most 3 images", "input"),
    "shorter vectors": ({"dimensions": 7}, "dimensions is 32, the length", "dimensions"),
    "another format": ({"encoding_format": "hex"}, "'float' or 'base64'", "encoding_format"),
    "a misspelt field": ({"dimension": 3}, "did you mean dimensions?", "dimension"),
    "a field of chats": ({"messages": []}, "unknown field messages", "messages"),
    "no such model": ({"model": "x"}, "there is no model 'x'", "model"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_an_error_that_names_the_field(server: Server, name: str) -> None:
    fields, message, param = WRONG[name]
    body = {"model": "tiny", "input": "red"} | fields
    (reply,) = ask(server, ("POST", EMBEDDINGS, body))
    error = reply.json()["error"]
    assert reply.status_code == (404 if name == "no such model" else 400)
    assert message in error["message"] and error["param"] == param


def test_an_image_that_is_read_with_a_question_has_no_vector(
    model: VisionLanguageModel, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.connector, "needs_text", True)
    body = {"model": "tiny", "input": [image_part(RED)]}
    (reply,) = ask(server, ("POST", EMBEDDINGS, body))
    assert reply.status_code == 400 and "reads the question" in reply.json()["error"]["message"]


def test_answers_go_on_while_vectors_are_computed(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "TEXTS", 1)
    scheduler = Scheduler({"tiny": model}, 4)
    listener = Listening(job_of("hello", max_new_tokens=5, temperature=9.0, seed=1))
    scheduler.add(request_of(listener.job, model, listener, ()))
    events: list[JobEvent] = []
    job = EmbeddingJob((*["red"] * 20, Media(RED), Media(RED)), "tiny")
    scheduler.add(EmbeddingRequest(job, model, events.append, ()))
    while not listener.ended:
        assert not events
        scheduler.step()
    assert scheduler.running == 1
    while not events:
        scheduler.step()
    (event,) = events
    assert isinstance(event, Embedded) and len(event.vectors) == 22
    scheduler.step()
    assert scheduler.running == 0
    # The image of both was read once.
    assert len(scheduler.features["tiny"]) == 1


def test_a_fault_or_the_clients_leaving_ends_the_job_alone(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler({"tiny": model}, 4)
    job = EmbeddingJob(("red", Media(RED)), "tiny")
    events: list[list[Any]] = [[], [], []]
    requests = [EmbeddingRequest(job, model, each.append, ()) for each in events]
    for request in requests:
        scheduler.add(request)
    with monkeypatch.context() as patched:
        patched.setattr(embedding, "features_of", lambda *_: 1 / 0)
        scheduler.step()
        scheduler.step()
    assert isinstance(events[0][0].error, ZeroDivisionError)
    scheduler.step()
    requests[1].cancel()
    while scheduler.running or scheduler.waiting:
        scheduler.step()
    assert not events[1] and isinstance(events[2][0], Embedded)
