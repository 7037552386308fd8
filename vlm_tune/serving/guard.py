"""Refuses requests before they reach a route: for their host, key, or body, or for lack of room.

It is ASGI middleware. Bodies are read here, so that routes get them whole.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm_tune.quoting import quoted
from vlm_tune.serving.api_errors import ApiError, draining, overloaded
from vlm_tune.serving.limits import Limits

HEALTH = "/health"
FOOTPRINT = "vlm_tune.footprint"
"""The key of an ASGI scope under which a request with a body has its `Footprint`."""


@dataclass
class Load:
    """A server's work at the moment, and whether it takes more.

    Attributes:
        requests: The number of requests with a body that are in progress.
        body_bytes: The bytes of their bodies, and of images that they name.
        draining: Whether the server stops and takes no more requests.
    """

    requests: int = 0
    body_bytes: int = 0
    draining: bool = False


class Footprint:
    """The bytes that a request holds in memory until its end, as they are counted in the load.

    Args:
        load: The server's load.
        most: The most bytes of all requests together.
    """

    def __init__(self, load: Load, most: int) -> None:
        self._load = load
        self._most = most
        self._count = 0

    def add(self, count: int) -> None:
        """Counts further bytes. Raises `ApiError` where there is no room for them."""
        self._count += count
        self._load.body_bytes += count
        if self._load.body_bytes > self._most:
            raise overloaded()

    def release(self) -> None:
        """Ends the request."""
        self._load.body_bytes -= self._count


class Guard:
    """ASGI middleware that refuses requests.

    Args:
        app: The application behind it.
        limits: What the server accepts.
        load: What it has to do; requests are counted in it.
        public: Paths whose GET needs no key, beside `/health`: files of the page, which holds no
            secrets and asks for the key.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, load: Load, public: Collection[str] = ()
    ) -> None:
        self._app = app
        self._limits = limits
        self._load = load
        self._public = frozenset(public)
        self._key = None if limits.api_key is None else f"Bearer {limits.api_key}".encode()
        names = (socket.gethostname(), socket.getfqdn(), *limits.hostnames)
        self._names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Answered here, within the middleware of CORS: pages of allowed origins see errors, too.
        try:
            await self._pass_on(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if self._key is None:
            self._check_browser(headers)
        elif not self._is_public(scope):
            self._check_key(headers)
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._load.draining:
            raise draining()
        if self._load.requests >= self._limits.requests:
            raise overloaded()
        self._load.requests += 1
        scope[FOOTPRINT] = footprint = Footprint(self._load, self._limits.bodies_bytes)
        try:
            body = await self._read(headers, receive, footprint)
            if body is not None:
                await self._app(scope, _replay(body, receive), send)
        finally:
            self._load.requests -= 1
            footprint.release()

    def _is_public(self, scope: Scope) -> bool:
        """Whether a request needs no key. One with a body, which is read and counted, does."""
        path = scope["path"]
        return scope["method"] == "GET" and (path == HEALTH or path in self._public)

    def _check_browser(self, headers: Headers) -> None:
        """Refuses pages of other sites, which a browser on this machine or network may show.

        A site can let its name stand for this server's address (DNS rebinding), so names in `Host`
        are of a list. With a key, which no other site has, there is no need of this.
        """
        host = headers.get("host", "localhost")
        name = _host_name(host)
        if not (name in self._names or name.endswith(".localhost") or _is_address(name)):
            message = (
                f"unknown host name {quoted(name or host)}: start it with --hostname and that "
                "name, or with --api-key"
            )
            raise ApiError(403, message, code="unknown_host")
        origin = headers.get("origin")
        if origin is None or origin in self._limits.cors:
            return
        if origin.partition("://")[2] != host:
            message = f"pages of {quoted(origin)} may not use this server: start it with --cors"
            raise ApiError(403, message, code="unknown_origin")

    def _check_key(self, headers: Headers) -> None:
        given = headers.get("authorization", "").encode()
        if self._key is not None and not hmac.compare_digest(given, self._key):
            raise ApiError(
                401,
                "this server needs its API key, in the header `Authorization: Bearer KEY`",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, headers: Headers, receive: Receive, footprint: Footprint) -> bytes | None:
        """A request's body; None if the client has disconnected."""
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limits.body_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    piece = message.get("body", b"")
                    body += piece
                    if len(body) > self._limits.body_bytes:
                        raise self._too_large()
                    footprint.add(len(piece))
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(
                408,
                f"the request's body was not complete after {self._limits.body_seconds:g} seconds",
                code="body_timeout",
                headers={"Connection": "close"},
            ) from None

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request's body is larger than {self._limits.body_bytes:,} bytes: send smaller "
            f"images",
            code="body_too_large",
            headers={"Connection": "close"},
        )


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read, and after it what comes further."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _host_name(host: str) -> str:
    """The name, or the address, in a header `Host`; empty where there is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".").lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
