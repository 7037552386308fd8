"""The routes of the HTTP API."""

from __future__ import annotations

import asyncio
import json
import mimetypes
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from sse_starlette import ServerSentEvent
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from vlm_tune.data.types import Media, Modality
from vlm_tune.errors import DataError, VlmTuneError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.quoting import quoted
from vlm_tune.serving.api_errors import (
    ApiError,
    data_error,
    invalid_request,
    logged_api_error,
    timed_out,
)
from vlm_tune.serving.chat_requests import job_of
from vlm_tune.serving.embedding_requests import INPUT, embedding_job_of, embeddings_of
from vlm_tune.serving.embedding_wire import Embeddings, EmbeddingsRequest
from vlm_tune.serving.exchange import Exchange
from vlm_tune.serving.guard import FOOTPRINT, HEALTH, Guard, Load
from vlm_tune.serving.jobs import Embedded, Engine, Finished, Piece
from vlm_tune.serving.limits import Limits
from vlm_tune.serving.media import MediaReader, ReadMedia
from vlm_tune.serving.metrics import Metrics
from vlm_tune.serving.remote import RemoteImages
from vlm_tune.serving.replies import Reply
from vlm_tune.serving.streaming import EventStream, collect, until, while_there
from vlm_tune.serving.watch import Watch
from vlm_tune.serving.wire import (
    ChatRequest,
    Completion,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
)
from vlm_tune.version import __version__

T = TypeVar("T")
EMBEDDINGS = "/v1/embeddings"
PAGE = Path(__file__).with_name("page")
"""The folder of the page's files, which are served from `/` on."""
READERS = 4
"""Threads that read images, lay prompts out and write answers."""
ERRORS: dict[int | str, dict[str, Any]] = {
    # It also takes the place of FastAPI's own error of 422, which there is none of.
    "default": {"model": ErrorBody, "description": "Another error."},
} | {
    status: {"model": ErrorBody, "description": text}
    for status, text in (
        (400, "The request is wrong, or beyond a limit."),
        (401, "The API key is missing or wrong."),
        (403, "The host or origin is unknown."),
        (404, "There is no such model."),
        (408, "The body came too slowly."),
        (413, "The body is too large."),
        (429, "The queue is full: try again later."),
        (500, "The server failed."),
        (503, "The server is stopping, or its engine has failed."),
        (504, "The answer took too long."),
    )
}
"""The errors of routes, for the OpenAPI schema."""


class Server:
    """Answers the API's requests by an engine.

    Args:
        engine: The engine, which knows the models by the same names.
        models: The models by the names under which they are served; the others are adapters over
            the first one's base.
        limits: What the server accepts.
        remote: Fetches images from other hosts; by default as the limits say.

    Attributes:
        load: What the server has to do at the moment.
    """

    def __init__(
        self,
        engine: Engine,
        models: Mapping[str, VisionLanguageModel],
        limits: Limits,
        remote: RemoteImages | None = None,
    ) -> None:
        self.load = Load()
        self._engine = engine
        self._models = dict(models)
        self._limits = limits
        self._created = int(time.time())
        self._metrics = Metrics(engine)
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="requests")
        remote = remote or RemoteImages(
            limits.allow_hosts, most_bytes=limits.image_bytes, seconds=limits.fetch_seconds
        )
        observe = self._metrics.image_seconds.observe
        self._read_media = MediaReader(limits, self._pool, remote, observe)

    def app(self) -> ASGIApp:
        """The ASGI application, with all that protects it."""
        files = _page_files()
        app: ASGIApp = Guard(self._routes(files), self._limits, self.load, files)
        if self._limits.cors:
            app = CORSMiddleware(
                app,
                allow_origins=self._limits.cors,
                allow_methods=["GET", "POST"],
                # Clients in browsers send headers of their own, as openai's X-Stainless-Lang.
                allow_headers=["*"],
                expose_headers=["Retry-After"],
            )
        return Watch(app, self._metrics)

    def close(self) -> None:
        """Ends the threads that read requests; called once none comes any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _routes(self, files: Mapping[str, Path]) -> FastAPI:
        # The schema's own pages load scripts from elsewhere.
        app = FastAPI(
            title="vlm_tune",
            version=__version__,
            summary="Chat with vision-language models, as OpenAI's API does.",
            docs_url=None,
            redoc_url=None,
            exception_handlers={
                HTTPException: _answer_error,
                VlmTuneError: _answer_error,
                RequestValidationError: _answer_invalid,
                Exception: _answer_error,
            },
        )
        bearer = HTTPBearer(
            auto_error=False, description="The key that the server was started with."
        )
        keyed = [] if self._limits.api_key is None else [Depends(bearer)]
        app.post(
            "/v1/chat/completions",
            dependencies=keyed,
            response_model=Completion,
            responses={
                **ERRORS,
                200: {
                    "description": "The answers; with `stream` as events.",
                    # The schema of an event is that of a chunk; a stream as a whole has none.
                    "content": {"text/event-stream": {}},
                },
            },
        )(self.complete)
        app.post(EMBEDDINGS, dependencies=keyed, response_model=Embeddings, responses=ERRORS)(
            self.embed
        )
        errors = {status: ERRORS[status] for status in (401, 403, 404, "default")}
        app.get("/v1/models", response_model=ModelList, dependencies=keyed, responses=errors)(
            self.models
        )
        app.get(
            "/v1/models/{model}", response_model=ModelCard, dependencies=keyed, responses=errors
        )(self.model)
        app.get(HEALTH, response_model=Health, responses={503: {"model": Health}})(self.health)
        app.get(
            "/metrics",
            response_class=Response,
            dependencies=keyed,
            responses={**errors, 200: {"content": {"text/plain": {}}}},
        )(self.metrics)
        for path, file in files.items():
            app.get(path, include_in_schema=False)(_file_route(file))
        return app

    # --- routes -----------------------------------------------------------------------------------

    async def models(self) -> ModelList:
        """Lists the served models."""
        return ModelList(data=[self._card(name) for name in self._models])

    async def model(self, model: str) -> ModelCard:
        """Describes a served model."""
        self._served(model)
        return self._card(model)

    async def health(self) -> Response:
        """Tells whether the server takes requests."""
        if self._engine.failed:
            health = Health(status="failed")
        else:
            health = Health(status="draining" if self.load.draining else "ok")
        return JSONResponse(health.model_dump(), 200 if health.status == "ok" else 503)

    async def metrics(self) -> Response:
        """Shows the metrics, in Prometheus' form."""
        text, kind = self._metrics.exposition()
        return Response(text, media_type=kind)

    async def complete(self, request: Request, body: ChatRequest) -> Any:
        """Answers a conversation."""
        begun = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + self._limits.timeout
        model = self._served(body.model)
        logprobs = bool(body.logprobs)
        reply = Reply(body.model, model.processor, logprobs=logprobs)
        exchange: Exchange | None = None
        read_media = self._media_reader(request)

        async def begin() -> tuple[Exchange, AsyncIterator[Piece | Finished], Piece | Finished]:
            nonlocal exchange
            async with asyncio.timeout_at(deadline):
                job = await job_of(body, reply.id, self._limits, read_media)
                exchange = Exchange(self._engine, job)
                await exchange.submit(self._pool)
                events = exchange.events()
                first = await anext(events)
            return exchange, events, first

        streams = False
        try:
            exchange, events, first = await while_there(request, begin())
            self._metrics.first_token_seconds.labels(body.model).observe(
                time.perf_counter() - begun
            )
            events = self._counted(body.model, first, events)
            if body.stream:
                streams = True
                usage = bool(body.stream_options and body.stream_options.include_usage)
                chunks = self._chunks(reply, until(events, deadline), usage=usage)
                return EventStream(chunks, exchange, self._limits.send_seconds)
            await while_there(request, collect(reply, until(events, deadline)))
            text = await self._apart(lambda: reply.completion().model_dump_json())
            return Response(text, media_type="application/json")
        except TimeoutError:
            raise timed_out(self._limits.timeout) from None
        finally:
            if exchange is not None and not streams:
                exchange.close()

    async def embed(self, request: Request, body: EmbeddingsRequest) -> Any:
        """Answers with the vectors of texts and images."""
        deadline = asyncio.get_running_loop().time() + self._limits.timeout
        width = self._served(body.model).llm.width
        exchange: Exchange | None = None

        async def embedded() -> Embedded:
            nonlocal exchange
            async with asyncio.timeout_at(deadline):
                read_media = self._media_reader(request)
                job = await embedding_job_of(body, width, self._limits, read_media)
                exchange = Exchange(self._engine, job)
                await exchange.submit(self._pool)
                return await exchange.vectors()

        try:
            vectors = await while_there(request, embedded())
            self._metrics.prompt_tokens.labels(body.model).inc(vectors.tokens)
            text = await self._apart(lambda: embeddings_of(body, vectors).model_dump_json())
            return Response(text, media_type="application/json")
        except TimeoutError:
            raise timed_out(self._limits.timeout) from None
        except DataError as error:
            raise data_error(error, INPUT) from None
        finally:
            if exchange is not None:
                exchange.close()

    # --- of an answer -----------------------------------------------------------------------------

    async def _chunks(
        self, reply: Reply, events: AsyncIterator[Piece | Finished], *, usage: bool
    ) -> AsyncIterator[ServerSentEvent]:
        """The events of a stream. An error after its beginning is an event of it."""
        try:
            async for event in events:
                if isinstance(event, Piece):
                    piece = partial(reply.piece, event)
                    yield ServerSentEvent(await self._apart(piece) if event.scored else piece())
                    continue
                for chunk in await self._apart(lambda event=event: list(reply.end(event))):
                    yield ServerSentEvent(chunk)
            if usage:
                yield ServerSentEvent(reply.last())
        except TimeoutError:
            yield _error_event(timed_out(self._limits.timeout))
        except Exception as error:
            yield _error_event(logged_api_error(error))
        yield ServerSentEvent("[DONE]")

    def _media_reader(self, request: Request) -> ReadMedia:
        """Reads the images and clips of a request, in whose footprint they are counted."""

        def read_media(url: str, modality: Modality) -> Awaitable[Media]:
            return self._read_media(url, modality, request.scope[FOOTPRINT])

        return read_media

    async def _apart(self, work: Callable[[], T]) -> T:
        """What a function returns in a thread.

        The log-probabilities of a long answer's tokens take seconds to write out, in which the
        event loop serves others.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _counted(
        self, name: str, first: Piece | Finished, events: AsyncIterator[Piece | Finished]
    ) -> AsyncIterator[Piece | Finished]:
        """All events, whose tokens and times are counted."""
        begun = time.perf_counter()
        prompted = False

        def count(event: Piece | Finished) -> None:
            nonlocal prompted
            if isinstance(event, Piece):
                return
            tokens = len(event.whole.ids)
            self._metrics.answer_tokens.labels(name).inc(tokens)
            if tokens > 1:
                seconds = (time.perf_counter() - begun) / (tokens - 1)
                self._metrics.token_seconds.labels(name).observe(seconds)
            if not prompted:
                prompted = True
                self._metrics.prompt_tokens.labels(name).inc(event.prompt_tokens)

        count(first)
        yield first
        async for event in events:
            count(event)
            yield event

    def _served(self, name: str) -> VisionLanguageModel:
        if name not in self._models:
            names = ", ".join(self._models)
            message = f"there is no model {quoted(name)}; served are {names}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._models[name]

    def _card(self, name: str) -> ModelCard:
        first = next(iter(self._models))
        return ModelCard(
            id=name,
            created=self._created,
            parent=None if name == first else first,
            max_model_len=self._models[name].processor.spec.max_length,
            max_images=self._limits.max_images,
            max_tokens=self._limits.max_tokens,
        )


def _error_event(error: ApiError) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(error.body()))


# --- errors, and the page -------------------------------------------------------------------------


async def _answer_error(_: Request, error: Exception) -> Response:
    return logged_api_error(error).response()


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    body_class = EmbeddingsRequest if request.url.path == EMBEDDINGS else ChatRequest
    return invalid_request(error.errors(), error.body, body_class.model_fields).response()


def _page_files() -> dict[str, Path]:
    """The files of the page by their paths in URLs; `/` is index.html."""
    files = {
        f"/{file.relative_to(PAGE).as_posix()}": file
        for file in sorted(PAGE.rglob("*"))
        if file.is_file()
    }
    index = files.get("/index.html")
    return files if index is None else {"/": index, **files}


def _file_route(file: Path) -> Any:
    kind = mimetypes.guess_type(file.name)[0]

    async def page_file() -> FileResponse:
        return FileResponse(file, media_type=kind, headers={"Cache-Control": "no-cache"})

    return page_file
