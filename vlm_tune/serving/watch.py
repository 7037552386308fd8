"""Counts and logs each request, answers errors, and sets the headers that protect the page.

It is ASGI middleware. The log has routes, status and times, and nothing that a client sent.
"""

from __future__ import annotations

import logging
import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm_tune.serving.api_errors import logged_api_error
from vlm_tune.serving.metrics import Metrics

log = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""The status, in logs and metrics, of a request whose client left before its answer."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Headers of every answer: a browser loads nothing from elsewhere for the page."""


class Watch:
    """ASGI middleware around everything else.

    Args:
        app: The application behind it.
        metrics: Where requests are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, and watches its answer."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        begun = time.perf_counter()
        status = CLIENT_LEFT

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, text in HEADERS.items():
                    headers[name] = text
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if status == CLIENT_LEFT:
                await logged_api_error(error).response()(scope, receive, watched)
        finally:
            seconds = time.perf_counter() - begun
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.request_seconds.labels(route).observe(seconds)
            log.info("%s %s %d in %.3f s", scope["method"], route, status, seconds)
