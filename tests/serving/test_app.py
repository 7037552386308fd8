"""Answers by HTTP are those of the model, in OpenAI's form; wrong requests are errors of theirs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from tests.helpers.served import (
    CHAT,
    ScriptedEngine,
    ask,
    chat,
    events_of,
    image_part,
    question,
    served,
    with_images,
)
from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import png
from tests.helpers.tiny_recipes import tiny_text, write_color_rows
from vlm_tune.errors import DataError, ModelError
from vlm_tune.generation.answers import Answer
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.serving.app import Server
from vlm_tune.serving.engine import BatchingEngine
from vlm_tune.serving.jobs import EngineFailed, Finished, Overloaded, Piece, ScoredToken
from vlm_tune.serving.replies import Reply, token_logprobs
from vlm_tune.serving.wire import ChatRequest

RED, BLUE = png((200, 30, 30)).read(), png((20, 30, 200)).read()


@pytest.fixture(scope="module", params=["causal", "seq2seq"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    recipe = tiny_text(request.param, write_color_rows(folder), folder / "run")
    return talkative(recipe, data__max_length=512)


@pytest.fixture
def server(model: VisionLanguageModel) -> Iterator[Server]:
    engine = BatchingEngine({"tiny": model}, queue=8, batch=4)
    yield served(model, engine)
    engine.close(0)


def test_an_answer_is_the_models(model: VisionLanguageModel, server: Server) -> None:
    body = with_images(RED, BLUE, max_tokens=12, logprobs=True)
    reply = chat(server, body).json()
    answer = model.answer(
        messages=[
            {
                "role": "user",
                "content": [image_part(RED), image_part(BLUE), *body["messages"][0]["content"][2:]],
            }
        ],
        max_new_tokens=12,
        logprobs=True,
    )
    (choice,) = reply["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": answer.text,
        "reasoning_content": None,
        "refusal": None,
    }
    assert choice["finish_reason"] == answer.finish_reason
    assert [token["logprob"] for token in choice["logprobs"]["content"]] == pytest.approx(
        answer.logprobs, abs=1e-4
    )
    assert reply["object"] == "chat.completion" and reply["model"] == "tiny"
    usage = reply["usage"]
    assert usage["completion_tokens"] == len(answer.ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_likeliest_tokens_of_each_place(model: VisionLanguageModel, server: Server) -> None:
    body = with_images(RED, max_tokens=6, logprobs=True, top_logprobs=3)
    content = chat(server, body).json()["choices"][0]["logprobs"]["content"]
    answer = model.answer("What color?", RED, max_new_tokens=6, logprobs=True, top_logprobs=3)
    assert answer.top_logprobs is not None and content
    for token, tops in zip(content, answer.top_logprobs, strict=True):
        shown = [top["logprob"] for top in token["top_logprobs"]]
        assert shown == pytest.approx(list(tops.values()), abs=1e-4)
        # Greedy: the token is the likeliest one.
        assert {**token["top_logprobs"][0], "top_logprobs": token["top_logprobs"]} == token


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "drawn": (
        {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 5},
        {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 5},
    ),
    "a draw by default": ({"top_k": 5, "seed": 1}, {"temperature": 1.0, "top_k": 5, "seed": 1}),
    "greedy, with idle settings": ({"temperature": 0, "top_p": 0.5, "seed": 3, "top_k": -1}, {}),
    "beams": ({"num_beams": 3}, {"num_beams": 3}),
    "penalised": ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    "stopped": ({"stop": ["e", "a"]}, {"stop_strings": ["e", "a"]}),
    "stopped by one": ({"stop": "e"}, {"stop_strings": "e"}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_those_of_the_models_answers(
    model: VisionLanguageModel, server: Server, name: str
) -> None:
    fields, settings = SETTINGS[name]
    reply = chat(server, question("How are you?", max_completion_tokens=10, **fields)).json()
    expected = model.chat("How are you?", max_new_tokens=10, **settings)
    assert reply["choices"][0]["message"]["content"] == expected


def test_a_conversation_with_a_system_text_and_marks_in_texts(
    model: VisionLanguageModel, server: Server
) -> None:
    messages = [
        {"role": "user", "content": r"A <image> of what?"},
        {"role": "assistant", "content": "None <image>.", "refusal": None, "tool_calls": None},
        {"role": "user", "content": [{"type": "text", "text": "So?"}], "name": "me"},
    ]
    reply = chat(server, {"model": "tiny", "messages": messages, "max_tokens": 8}).json()
    plain = [
        {"role": "user", "content": r"A \<image> of what?"},
        {"role": "assistant", "content": "None <image>."},
        {"role": "user", "content": "So?"},
    ]
    assert reply["choices"][0]["message"]["content"] == model.chat(plain, max_new_tokens=8)


def test_choices_come_with_probabilities(model: VisionLanguageModel, server: Server) -> None:
    (choice,) = chat(server, with_images(RED, choices=["red", "dark blue"])).json()["choices"]
    answer = model.answer("What color?", RED, choices=["red", "dark blue"])
    assert choice["message"]["content"] == answer.text
    assert choice["probabilities"] == pytest.approx(answer.probabilities, abs=1e-5)
    streamed = events_of(chat(server, with_images(RED, choices=["red", "blue"], stream=True)).text)
    assert sum(streamed[-2]["choices"][0]["probabilities"].values()) == pytest.approx(1)


def test_a_stream_adds_up_to_the_answers(model: VisionLanguageModel, server: Server) -> None:
    body = question(n=2, temperature=1.2, seed=3, max_tokens=10, logprobs=True)
    whole = chat(server, body).json()
    response = chat(server, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events_of(response.text)
    assert done == "[DONE]" and usage["usage"] == whole["usage"] and usage["choices"] == []
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert [c["finish_reason"] for c in mine if c.get("finish_reason")] == [
            choice["finish_reason"]
        ]
        scored = [c["logprobs"]["content"] for c in mine if "logprobs" in c]
        assert [token for tokens in scored for token in tokens] == choice["logprobs"]["content"]
        # They come with the text of their tokens.
        assert len(scored) > 1 and all("logprobs" in c for c in mine if c["delta"].get("content"))
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_written_out_apart_from_the_event_loop(
    server: Server, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a long answer take seconds, in which no other request would be served."""
    threads: list[threading.Thread] = []

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return token_logprobs(*arguments)

    monkeypatch.setattr("vlm_tune.serving.replies.token_logprobs", noted)
    assert chat(server, question(logprobs=True, max_tokens=2, stream=stream)).status_code == 200
    assert threads and threading.main_thread() not in threads


@pytest.mark.parametrize("scored", [(), (ScoredToken(40, -0.5, {40: -0.5}),)])
def test_log_probabilities_that_no_piece_had_come_with_the_last_chunk(
    model: VisionLanguageModel, scored: tuple[ScoredToken, ...]
) -> None:
    """Tokens of a stop string have no text; answers that are not batched have pieces of text."""
    tops = ({40: -0.5}, {41: -0.7, 42: -0.8}, {43: -0.1})
    answer = Answer("a", "stop", (40, 42, 43), (-0.5, -0.8, -0.1), tops)
    reply = Reply("tiny", model.processor, logprobs=True)
    first = json.loads(reply.piece(Piece(0, "a", scored)))["choices"][0]
    (last,) = (json.loads(chunk)["choices"][0] for chunk in reply.end(Finished(0, answer, 7)))
    whole = json.loads(reply.completion().model_dump_json())["choices"][0]
    streamed = first.get("logprobs", {"content": []})["content"]
    assert len(streamed) == len(scored) and last["delta"] == {}
    assert [*streamed, *last["logprobs"]["content"]] == whole["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in whole["logprobs"]["content"]] == [1, 2, 1]


def test_models_are_listed(model: VisionLanguageModel) -> None:
    server = served({"tiny": model, "other": model}, ScriptedEngine())
    listed, one, none = ask(
        server,
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/other", None),
        ("GET", "/v1/models/x", None),
    )
    assert [card["id"] for card in listed.json()["data"]] == ["tiny", "other"]
    assert one.json()["parent"] == "tiny" and one.json()["max_model_len"] == 512
    assert none.status_code == 404 and none.json()["error"]["code"] == "model_not_found"


def schema_of(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The field of a request whose answer follows a schema."""
    named = {"name": "answer", "schema": schema, **fields}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def test_an_empty_body_is_named(server: Server) -> None:
    (reply,) = ask(server, ("POST", CHAT, None))
    assert reply.status_code == 400
    assert reply.json()["error"]["message"] == "the body is empty, expected a JSON object"


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "an unknown field": ({"temperatur": 1}, "temperatur", "did you mean temperature?"),
    "a tool": ({"tools": [{"type": "function"}]}, "tools", "calls no tools"),
    "a tool's choice": ({"tool_choice": "required"}, "tool_choice", "calls no tools"),
    "audio": ({"modalities": ["text", "audio"]}, "modalities", "answers are text"),
    "a penalty": ({"presence_penalty": 0.5}, "presence_penalty", "less than or equal to 0"),
    "a type": ({"temperature": "hot"}, "temperature", "valid number"),
    "not a number": ({"top_p": float("nan")}, "top_p", "finite"),
    "a long field": ({"x" * 1000: 1}, "x" * 200 + "... (1,000 characters)", "unknown field"),
    "many fields": ({str(name): 1 for name in range(200)}, "", "the body has more than 100 fields"),
    "a message's fields": (
        {"messages": [{"role": "user", **{str(name): 1 for name in range(200)}}]},
        "messages.0",
        "more than 100 fields",
    ),
    "a role": ({"messages": [{"role": "tool", "content": ""}]}, "messages.0.role", "got 'tool'"),
    "no role": ({"messages": [{"content": ""}]}, "messages.0.role", "is missing"),
    "a part's text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages.0.content.0.text",
        "is missing",
    ),
    "a part's field": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "x": 1}]}]},
        "messages.0.content.0.x",
        "unknown field",
    ),
    "an answer last": (
        {"messages": [{"role": "assistant", "content": "so"}]},
        "messages",
        "the last message is the user's",
    ),
    "no messages": ({"messages": []}, "messages", "at least 1 item"),
    "equal answers": ({"n": 2, "temperature": 0}, "n", "gives equal answers"),
    "settings of choices": ({"choices": ["a", "b"], "seed": 1, "top_k": 3}, "top_k", "no effect"),
    "one choice": ({"choices": ["a"]}, "choices", "at least 2 items"),
    "equal choices": ({"choices": ["a", "a"]}, "choices", "two or more different strings"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs", "beside logprobs"),
    "no kind of answer": (
        {"response_format": {"type": "xml"}},
        "response_format.type",
        "json_schema",
    ),
    "no schema": (
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "missing",
    ),
    "no schema's name": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
        "missing",
    ),
    "a field within the schema's": (
        schema_of({}, strictly=True),
        "response_format.json_schema.strictly",
        "unknown field",
    ),
    "a field beside the schema": (
        {"response_format": {**schema_of({})["response_format"], "strict": True}},
        "response_format.strict",
        "unknown field",
    ),
    "what no answer can follow": (schema_of({"not": {}}), "response_format", "can follow it"),
    "a deep schema": (schema_of(nested(400)), "response_format", "recursion limit"),
    "a long schema": (schema_of({"title": "a" * 60_000}), "response_format", "more than 50,000"),
    "a schema and choices": (
        schema_of({}) | {"choices": ["a", "b"]},
        "response_format",
        "choices",
    ),
    "a schema and beams": (schema_of({}) | {"num_beams": 2}, "response_format", "num_beams 1"),
    "stop strings": ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4 items"),
    "an empty stop string": ({"stop": ""}, "stop", "at least 1 character"),
    "half a character": ({"messages": [{"role": "user", "content": "\ud800"}]}, "", "surrogate"),
    "a long prompt": (
        {"messages": [{"role": "user", "content": "word " * 3000}]},
        "messages",
        "more than 512",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_an_error_that_names_the_field(server: Server, name: str) -> None:
    fields, param, text = WRONG[name]
    body = json.dumps({**question(), **fields}).encode()
    response = ask(server, ("POST", CHAT, body))[0]
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert (error["param"] or "") == param and text in error["message"]
    assert (error["code"] == "context_length_exceeded") == (name == "a long prompt")


def test_wrong_parts_are_not_all_listed() -> None:
    """A list of the faults of many parts takes long, and much memory."""
    message = {"role": "user", "content": [{"type": "text", "text": 1}] * 500}
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"model": "tiny", "messages": [message] * 500})
    assert caught.value.error_count() == 1


def test_a_prompt_beyond_the_models_positions_is_an_error_of_the_request(
    model: VisionLanguageModel, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vars(model.llm), "longest", 5)
    response = chat(server, question("word " * 20))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_harmless_fields_of_openai_change_nothing(server: Server) -> None:
    plain = chat(server, question(max_tokens=5)).json()["choices"]
    fields = {"user": "me", "store": False, "metadata": {"a": "b"}, "logit_bias": None, "tools": []}
    fields |= {"tool_choice": "none", "parallel_tool_calls": True, "modalities": ["text"]}
    fields |= {"presence_penalty": 0, "frequency_penalty": 0.0, "response_format": {"type": "text"}}
    assert chat(server, question(max_tokens=5, **fields)).json()["choices"] == plain


COLORS = {"type": "array", "items": {"enum": ["red", "blue", 7]}, "minItems": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_its_schema(
    model: VisionLanguageModel, server: Server, stream: bool
) -> None:
    body = question(max_tokens=60, stream=stream, **schema_of(COLORS, strict=True))
    response = chat(server, body)
    if stream:
        chunks = events_of(response.text)[:-1]
        text = "".join(each["choices"][0]["delta"].get("content", "") for each in chunks)
    else:
        text = response.json()["choices"][0]["message"]["content"]
    assert text == model.chat("What color?", max_new_tokens=60, json_schema=COLORS)
    assert set(json.loads(text)) <= {"red", "blue", 7}


def test_other_errors_have_openais_form(server: Server) -> None:
    broken, a_list, path, method = ask(
        server,
        ("POST", CHAT, b"{"),
        ("POST", CHAT, [1]),
        ("GET", "/v1/nothing", None),
        ("GET", CHAT, None),
    )
    assert [broken.status_code, a_list.status_code] == [400, 400]
    assert [path.status_code, method.status_code] == [404, 405]
    assert broken.json()["error"]["code"] == "invalid_json"
    for response in (broken, a_list, path, method):
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


ENGINE_ERRORS: list[tuple[Exception, int, str]] = [
    (Overloaded("full"), 429, "rate_limit_exceeded"),
    (EngineFailed("failed"), 503, "engine_failed"),
    (DataError("image 1: can't be decoded", kind="image_unreadable"), 400, "image_unreadable"),
    (ZeroDivisionError("secret"), 500, "internal_error"),
    (ModelError("secret"), 500, "internal_error"),
]


@pytest.mark.parametrize(("error", "status", "code"), ENGINE_ERRORS, ids=lambda each: str(each))
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_engine(
    model: VisionLanguageModel,
    error: Exception,
    status: int,
    code: str,
    stream: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Before the first piece an error is the response's status, also of a stream."""
    engine = ScriptedEngine()
    engine.refusal = error
    response = chat(served(model, engine), question(stream=stream))
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert "secret" not in response.text
    assert (f"{type(error).__name__} on a request" in caplog.text) == (status == 500)


def test_health_is_that_of_the_engine(model: VisionLanguageModel) -> None:
    engine = ScriptedEngine()
    server = served(model, engine)
    (healthy,) = ask(server, ("GET", "/health", None))
    server.load.draining = True
    (draining,) = ask(server, ("GET", "/health", None))
    engine.failed = True
    (failed,) = ask(server, ("GET", "/health", None))
    assert [each.status_code for each in (healthy, draining, failed)] == [200, 503, 503]
    assert failed.json() == {"status": "failed"} and draining.json() == {"status": "draining"}


def test_metrics_count_requests_and_tokens(server: Server) -> None:
    _, reply, _, metrics = ask(
        server,
        ("GET", "/v1/models/tiny", None),
        ("POST", CHAT, with_images(RED, max_tokens=6)),
        ("POST", CHAT, question(n=0)),
        ("GET", "/metrics", None),
    )
    usage = reply.json()["usage"]
    for line in (
        'vlm_tune_requests_total{code="200",route="/v1/chat/completions"} 1.0',
        'vlm_tune_requests_total{code="400",route="/v1/chat/completions"} 1.0',
        'vlm_tune_requests_total{code="200",route="/v1/models/{model}"} 1.0',
        f'vlm_tune_prompt_tokens_total{{model="tiny"}} {float(usage["prompt_tokens"])}',
        f'vlm_tune_answer_tokens_total{{model="tiny"}} {float(usage["completion_tokens"])}',
        'vlm_tune_time_to_first_token_seconds_count{model="tiny"} 1.0',
        "vlm_tune_image_seconds_count 1.0",
        "vlm_tune_jobs_waiting 0.0",
    ):
        assert line in metrics.text.splitlines()
