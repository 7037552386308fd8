"""Requests drawn from the server's own OpenAPI schema, right and wrong: no answer is a fault."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, example, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.helpers.served import CHAT, question, served
from tests.helpers.talkative import talkative
from tests.helpers.tiny_recipes import tiny_text, write_color_rows
from vlm_tune.serving.app import EMBEDDINGS
from vlm_tune.serving.engine import BatchingEngine

CHECKS: list[Any] = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
RIGHT = {CHAT: question(max_tokens=8), EMBEDDINGS: {"model": "tiny", "input": ["red", "blue"]}}
"""A request that is answered, of each operation with a body."""
EXAMPLES = 15
"""Requests of each operation; CONTRIBUTING.md shows the command for more."""


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    model = talkative(tiny_text("causal", write_color_rows(folder), folder / "run"))
    engine = BatchingEngine({"tiny": model}, queue=8, batch=4)
    server = served(model, engine, hostnames=("testserver",), max_tokens=8)
    schema = schemathesis.openapi.from_asgi("/openapi.json", server.app())

    @schema.hook
    def map_body(context: Any, body: Any) -> Any:
        # Else nearly every request asks for a model that there is none of.
        if isinstance(body, dict) and isinstance(body.get("model"), str):
            body = {**body, "model": "tiny"}
            tokens = body.get("max_tokens")
            # As many tokens as the server allows, for most that ask for more.
            if isinstance(tokens, int) and tokens % 5:
                body["max_tokens"] = min(tokens, 8)
        return body

    yield schema
    engine.close(0)


def statuses_of(operation: Any, mode: GenerationMode) -> set[int]:
    """The statuses of answers to requests of an operation, each of which is checked."""
    statuses: set[int] = set()

    @settings(
        max_examples=EXAMPLES if operation.method == "post" else 1,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        response = case.call()
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    if operation.method == "post":
        # Draws differ with the modules that are loaded, and may all be wrong.
        right = RIGHT[operation.path]
        ask = example(case=operation.Case(body=right, media_type="application/json"))(ask)
    ask()
    return statuses


def test_requests_of_the_schema_are_answered_as_it_says(schema: Any) -> None:
    statuses = {
        each.ok().label: statuses_of(each.ok(), GenerationMode.POSITIVE)
        for each in schema.get_all_operations()
    }
    assert len(statuses) == 6
    assert all(statuses[f"POST {path}"] >= {200, 400} for path in RIGHT)


def test_requests_against_the_schema_are_errors_of_the_client(schema: Any) -> None:
    posted = [each.ok() for each in schema.get_all_operations() if each.ok().method == "post"]
    for operation in posted:
        assert statuses_of(operation, GenerationMode.NEGATIVE) <= {200, 400, 404, 405}
