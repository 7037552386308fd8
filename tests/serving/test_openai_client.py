"""The `openai` package works unchanged against a listening server."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx2
import openai
import pytest
from pydantic import BaseModel

from tests.helpers.served import ScriptedEngine, image_part, listening, served
from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import png
from tests.helpers.tiny_recipes import tiny_text, write_color_rows
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.serving.engine import BatchingEngine
from vlm_tune.serving.jobs import Overloaded

RED = png((200, 30, 30)).read()
MESSAGES: Any = [
    {"role": "user", "content": [image_part(RED), {"type": "text", "text": "What color?"}]}
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    folder = tmp_path_factory.mktemp("model")
    return talkative(tiny_text("causal", write_color_rows(folder), folder / "run"))


@pytest.fixture(scope="module")
def url(model: VisionLanguageModel) -> Iterator[str]:
    engine = BatchingEngine({"tiny": model}, queue=64, batch=4)
    with listening(served(model, engine, api_key="secret"), engine) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="secret", max_retries=0)


def test_whole_answers(client: openai.OpenAI, model: VisionLanguageModel) -> None:
    completion = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=8, logprobs=True, n=2, temperature=1, seed=4
    )
    answer = model.answer(
        messages=MESSAGES,
        max_new_tokens=8,
        logprobs=True,
        num_return_sequences=2,
        temperature=1.0,
        seed=4,
    )
    texts = [choice.message.content for choice in completion.choices]
    assert texts == [answer.text, answer.alternatives[0].text]
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == len(answer.ids)
    # A message of an answer can be sent back as it is.
    again: Any = [*MESSAGES, completion.choices[0].message, {"role": "user", "content": "Sure?"}]
    assert client.chat.completions.create(model="tiny", messages=again, max_tokens=2).choices


def test_streams(client: openai.OpenAI, model: VisionLanguageModel) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == model.chat(messages=MESSAGES, max_new_tokens=8)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "vlm_tune"


def test_further_fields_and_probabilities(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model="tiny", messages=MESSAGES, extra_body={"choices": ["red", "blue"]}
    )
    extra = completion.choices[0].model_extra
    assert extra is not None and sum(extra["probabilities"].values()) == pytest.approx(1)


class Color(BaseModel):
    """What a client parses answers into."""

    name: Literal["red", "blue"]
    round: bool


def test_answers_as_objects(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, max_tokens=120, response_format=Color
    )
    color = parsed.choices[0].message.parsed
    assert color is not None and color.name in ("red", "blue")
    whole = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=1, response_format={"type": "json_object"}
    )
    assert (whole.choices[0].message.content or "").strip().startswith("{")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "none", "schema": {"not": {}}},
            },
        )
    assert caught.value.param == "response_format"


def test_64_clients_at_once(url: str, model: VisionLanguageModel) -> None:
    prompts = [f"What is {number}?" for number in range(64)]

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=url, api_key="secret", max_retries=0) as client:

            async def one(prompt: str) -> Any:
                messages: Any = [{"role": "user", "content": prompt}]
                return await client.chat.completions.create(
                    model="tiny", messages=messages, max_tokens=4
                )

            return await asyncio.gather(*map(one, prompts))

    answers = [reply.choices[0].message.content for reply in asyncio.run(ask())]
    assert answers == model.chat_batch(prompts, max_new_tokens=4)


def test_an_abandoned_stream_cancels_its_job(model: VisionLanguageModel) -> None:
    engine = ScriptedEngine()
    with listening(served(model, engine), engine) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        threading.Thread(target=lambda: engine.ticket().say("So")).start()
        stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        assert next(iter(stream)).choices[0].delta.content == "So"
        stream.close()
        assert engine.ticket().cancelled.wait(30)


def test_a_client_that_leaves_before_its_answer_cancels_its_job(
    model: VisionLanguageModel,
) -> None:
    engine = ScriptedEngine()
    with listening(served(model, engine), engine) as address:
        with httpx2.Client(base_url=address) as client, pytest.raises(httpx2.ReadTimeout):
            body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
            client.post("/v1/chat/completions", json=body, timeout=httpx2.Timeout(30, read=0.05))
        assert engine.ticket().cancelled.wait(30)
        status = httpx2.get(f"{address}/metrics").text
    assert 'vlm_tune_requests_total{code="499",route="/v1/chat/completions"} 1.0' in status


ERRORS: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "a wrong field": ({"n": 0}, openai.BadRequestError),
    "no such model": ({"model": "gpt-5"}, openai.NotFoundError),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_the_clients_own(client: openai.OpenAI, name: str) -> None:
    fields, kind = ERRORS[name]
    with pytest.raises(kind):
        client.chat.completions.create(**({"model": "tiny", "messages": MESSAGES} | fields))


def test_a_wrong_key_and_an_overloaded_server(url: str, model: VisionLanguageModel) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="other").models.list()
    engine = ScriptedEngine()
    engine.refusal = Overloaded("full")
    with listening(served(model, engine), engine) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.code == "rate_limit_exceeded"


def test_an_error_within_a_stream(model: VisionLanguageModel) -> None:
    engine = ScriptedEngine()
    with listening(served(model, engine), engine) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def act() -> None:
            ticket = engine.ticket()
            ticket.say("So")
            ticket.fail(ZeroDivisionError())

        threading.Thread(target=act).start()
        stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="the server failed"):
            list(stream)


def test_the_docs_examples_run(
    model: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path("docs/serving.md").read_text(encoding="utf-8")
    (curl,) = re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    pythons = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("bird.png").write_bytes(RED)
    engine = BatchingEngine({"mine": model}, queue=4, batch=2)
    with listening(served({"mine": model}, engine), engine) as url:
        command = shlex.split(curl.replace("http://127.0.0.1:8000", url))
        assert command[0] == "curl" and command[1] == f"{url}/v1/chat/completions"
        reply = httpx2.post(command[1], json=json.loads(command[-1]), timeout=60).json()
        names: dict[str, Any] = {}
        for python in pythons:
            exec(python.replace("http://127.0.0.1:8000", url), names)
    assert reply["choices"][0]["message"]["role"] == "assistant"
    assert names["reply"].choices[0].message.content in ("heron", "stork")
    assert len(names["text"]) == len(names["picture"]) == model.llm.width
