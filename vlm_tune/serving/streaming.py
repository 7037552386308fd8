"""Parts of answering a request: to a deadline, while the client is there, as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from vlm_tune.serving.api_errors import ApiError
from vlm_tune.serving.exchange import Exchange
from vlm_tune.serving.jobs import Finished, Piece
from vlm_tune.serving.replies import Reply
from vlm_tune.serving.watch import CLIENT_LEFT

T = TypeVar("T")


class EventStream(EventSourceResponse):
    """The events of an answer. Whatever ends them, the job of the exchange ends too."""

    def __init__(
        self, events: AsyncIterator[ServerSentEvent], exchange: Exchange, send_seconds: float
    ) -> None:
        super().__init__(events, send_timeout=send_seconds)
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.close()


async def until(
    events: AsyncIterator[Piece | Finished], deadline: float
) -> AsyncIterator[Piece | Finished]:
    """All events, with `TimeoutError` where the next one is not there by the deadline."""
    while True:
        async with asyncio.timeout_at(deadline):
            event = await anext(events, None)
        if event is None:
            return
        yield event


async def collect(reply: Reply, events: AsyncIterator[Piece | Finished]) -> None:
    """Gives a reply the ended answers."""
    async for event in events:
        if isinstance(event, Finished):
            reply.finished.append(event)


async def while_there(request: Request, answering: Coroutine[Any, Any, T]) -> T:
    """Awaits a part of an answer, as long as the client is there.

    Raises:
        ApiError: The client has left.
    """

    async def leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(answering)
    left = asyncio.create_task(leaves())
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_LEFT, "the client has disconnected")
        return task.result()
    finally:
        for each in (task, left):
            each.cancel()
        await asyncio.gather(task, left, return_exceptions=True)
