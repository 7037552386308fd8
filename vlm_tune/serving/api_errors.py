"""Errors in the form in which OpenAI's API returns them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from vlm_tune.data.types import Modality
from vlm_tune.errors import ArgumentError, DataError
from vlm_tune.quoting import QUOTED_NAME, cut, quoted
from vlm_tune.serving.failures import log_failure
from vlm_tune.serving.idle_fields import REFUSED
from vlm_tune.serving.jobs import Closing, EngineFailed, Overloaded
from vlm_tune.serving.limits import MOST_FIELDS
from vlm_tune.serving.wire import MANY_FIELDS, ChatRequest

RETRY_AFTER = {"Retry-After": "1"}
"""Headers of an answer that asks the client to come again, after a second."""
MESSAGE = 1000
"""Characters of a message that a client gets."""
REQUEST_NAMES = {
    "max_new_tokens": "max_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "json_schema": "response_format",
}
"""Fields of a request by the names that the settings of generation have in Python."""
CODES = {"overlong": "context_length_exceeded"}
"""OpenAI's codes by the kinds of data errors that it has one for; clients look for them."""


class ApiError(HTTPException):
    """An error to answer a request with.

    Attributes:
        message: What is wrong, and what to do.
        type: The kind of error, in OpenAI's words.
        param: The field of the request at fault, as a dotted name.
        code: A name of the error for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message = cut(message, MESSAGE)
        self.type = kind
        self.param = None if param is None else cut(param)
        self.code = code

    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def overloaded() -> ApiError:
    """The error of a request for which there is no room."""
    return ApiError(
        429,
        "the server is busy: its queue is full; try again in a second",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers=RETRY_AFTER,
    )


def draining() -> ApiError:
    """The error of a request that comes while the server stops."""
    return ApiError(
        503,
        "the server is stopping and takes no more requests",
        kind="server_error",
        code="draining",
        headers={**RETRY_AFTER, "Connection": "close"},
    )


def engine_failed() -> ApiError:
    """The error of a request to a server whose engine has failed."""
    return ApiError(
        503,
        "the server's engine has failed, and answers nothing until the server is started again; "
        "its log says where",
        kind="server_error",
        code="engine_failed",
    )


def bad_media(message: str, modality: Modality = "image") -> ApiError:
    """The error of a request with an image or clip that is refused or can't be read."""
    return ApiError(400, message, param="messages", code=f"invalid_{modality}")


def timed_out(seconds: float) -> ApiError:
    """The error of a request whose answer took too long."""
    return ApiError(
        504,
        f"the answer was not complete after {seconds:g} seconds: ask for fewer tokens, or start "
        f"the server with a longer --timeout",
        kind="timeout_error",
        code="timeout",
    )


def internal() -> ApiError:
    """The error of a request on which the server failed; the log has the place."""
    return ApiError(
        500,
        "the server failed on this request; its log says where",
        kind="server_error",
        code="internal_error",
    )


def data_error(error: DataError, param: str) -> ApiError:
    """The error of a request whose texts or images, in the field `param`, can't be read."""
    return ApiError(400, error.message, param=param, code=CODES.get(error.kind, error.kind))


def api_error(error: Exception) -> ApiError:
    """The error to answer with for one of the package, or of the server framework."""
    match error:
        case ApiError():
            return error
        case Overloaded():
            return overloaded()
        case Closing():
            return draining()
        case EngineFailed():
            return engine_failed()
        case ArgumentError():
            message = _in_request_names(str(error))
            # Messages about a setting begin with its name.
            name = message.partition(" ")[0].rstrip(":")
            return ApiError(400, message, param=name if name in ChatRequest.model_fields else None)
        case DataError():
            return data_error(error, "messages")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return internal()


def logged_api_error(error: Exception) -> ApiError:
    """The error to answer a request with; one of the server's own is logged."""
    answer = api_error(error)
    if answer.status_code == 500:
        log_failure(error, "on a request")
    return answer


def _in_request_names(message: str) -> str:
    pattern = "|".join(REQUEST_NAMES)
    return re.sub(rf"\b({pattern})\b", lambda match: REQUEST_NAMES[match[1]], message)


def invalid_request(
    errors: Sequence[Mapping[str, Any]], body: Any, fields: Iterable[str]
) -> ApiError:
    """The error of a request that does not match the schema.

    Args:
        errors: The faults as pydantic lists them.
        body: The body as it was parsed.
        fields: The names of the fields that there are.
    """
    first = errors[0]
    kind = str(first["type"])
    place = _place(first["loc"], body, kind)
    param = ".".join(place)
    if kind == MANY_FIELDS:
        message = f"{cut(param) or 'the body'} has more than {MOST_FIELDS} fields"
        return ApiError(400, message, param=param or None)
    if kind == "extra_forbidden":
        reason = _reason(place[-1], fields) if len(place) == 1 else ""
        return ApiError(400, f"unknown field {cut(param)}{reason}", param=param)
    if kind == "missing" and not place:
        return ApiError(400, "the body is empty, expected a JSON object")
    if kind == "missing":
        return ApiError(400, f"the field {cut(param)} is missing", param=param)
    if kind == "union_tag_invalid":
        key = str(first["ctx"]["discriminator"]).strip("'")
        expected = str(first["ctx"]["expected_tags"]).replace("'", "")
        message = f"{cut(param)}.{key} must be one of {expected}, got {quoted(first['ctx']['tag'])}"
        return ApiError(400, message, param=f"{param}.{key}")
    if kind == "union_tag_not_found":
        key = str(first["ctx"]["discriminator"]).strip("'")
        return ApiError(400, f"the field {cut(param)}.{key} is missing", param=f"{param}.{key}")
    if kind.startswith("json_"):
        return ApiError(400, "the body is no JSON", code="invalid_json")
    if not param:
        return ApiError(400, "the body is no JSON object, or not sent as application/json")
    return ApiError(400, f"{cut(param)}: {first['msg']}", param=param)


def _reason(name: str, fields: Iterable[str]) -> str:
    """The reason for which a field is unknown, or the nearest known name."""
    # The search takes long for a long name, which is near to none.
    if len(name) > QUOTED_NAME:
        return ""
    near = difflib.get_close_matches(name, list(fields), 1)
    return REFUSED.get(name, f"; did you mean {near[0]}?" if near else "")


def _place(location: Sequence[str | int], body: Any, kind: str) -> list[str]:
    """The names of keys and places of lists that lead to a fault in the body.

    pydantic's location also has the tags of unions, which are in no body.
    """
    place: list[str] = []
    names = location[1:] if location and location[0] in ("body", "path", "query") else location
    for number, name in enumerate(names):
        last = number == len(names) - 1
        before = names[number - 1] if number else None
        tagged = isinstance(before, int) or before == "response_format"
        # A message's tag is its role, a part's and a form's its type, which may also be the name of
        # a field.
        if tagged and isinstance(body, dict) and name in (body.get("role"), body.get("type")):
            continue
        steps = isinstance(body, dict) and name in body
        steps = steps or (isinstance(body, list) and isinstance(name, int) and name < len(body))
        if steps:
            body = body[name]  # type: ignore[index]
        if steps or (last and kind in ("missing", "extra_forbidden")):
            place.append(str(name))
    return place
