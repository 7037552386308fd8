"""Servers for tests: in the test's process, or listening; with real engines or scripted ones."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import threading
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

import vlm_tune
from tests.helpers.forked_runs import start
from tests.helpers.tiny_models import png
from vlm_tune.generation.answers import Answer
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.serving.app import Server
from vlm_tune.serving.engine import BatchingEngine
from vlm_tune.serving.jobs import EmbeddingJob, Engine, Failed, Finished, Job, Listener, Piece
from vlm_tune.serving.limits import Limits
from vlm_tune.serving.run import HttpServer

HOST = "http://127.0.0.1:8000"
CHAT = "/v1/chat/completions"


def data_url(image: bytes) -> str:
    """A data URL of an image."""
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def image_part(image: Any = None) -> dict[str, Any]:
    """A message's part with an image: its bytes, or its URL."""
    image = png().read() if image is None else image
    url = data_url(image) if isinstance(image, bytes) else image
    return {"type": "image_url", "image_url": {"url": url}}


def question(text: str = "What color?", **fields: Any) -> dict[str, Any]:
    """The body of a request of one text."""
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **fields}


def with_images(*images: Any, **fields: Any) -> dict[str, Any]:
    """The body of a request of images, as bytes or URLs, and a text."""
    content = [*map(image_part, images), {"type": "text", "text": "What color?"}]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}


def events_of(text: str) -> list[Any]:
    """The events of a stream: parsed JSON, and `[DONE]`."""
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


class ScriptedTicket:
    """A job of a `ScriptedEngine`, whose events a test gives."""

    def __init__(self, job: Job | EmbeddingJob, listener: Listener) -> None:
        self.job = job
        self.listener = listener
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """Notes that the job was cancelled."""
        self.cancelled.set()

    def say(self, text: str, answer: int = 0) -> None:
        """Gives more text of an answer."""
        self.listener(Piece(answer, text))

    def finish(self, text: str, answer: int = 0) -> None:
        """Ends an answer, of one token a character."""
        ids = tuple(range(len(text)))
        self.listener(Finished(answer, Answer(text, "stop", ids), prompt_tokens=7))

    def fail(self, error: Exception) -> None:
        """Ends the job with an error."""
        self.listener(Failed(error))


class ScriptedEngine:
    """An engine that does what a test says.

    Attributes:
        reply: What each job is answered with at once; None leaves that to the test.
        refusal: The error that jobs are refused with.
        tickets: The jobs.
        closed: The seconds that it was closed with.
        failed: Whether it says that it has failed.
    """

    def __init__(self, reply: str | None = None) -> None:
        self.reply = reply
        self.refusal: Exception | None = None
        self.tickets: list[ScriptedTicket] = []
        self.closed: float | None = None
        self.failed = False
        self.waiting = 0
        self.running = 0
        self._submitted = threading.Condition()

    def submit(self, job: Job | EmbeddingJob, listener: Listener) -> ScriptedTicket:
        """Takes a job."""
        if self.refusal is not None:
            raise self.refusal
        ticket = ScriptedTicket(job, listener)
        with self._submitted:
            self.tickets.append(ticket)
            self._submitted.notify_all()
        if self.reply is not None:
            ticket.finish(self.reply)
        return ticket

    def close(self, seconds: float) -> None:
        """Notes that the engine was closed."""
        self.closed = seconds

    def ticket(self, number: int = 0) -> ScriptedTicket:
        """A job, once it was submitted."""
        with self._submitted:
            assert self._submitted.wait_for(lambda: len(self.tickets) > number, 30)
        return self.tickets[number]


def served(
    models: VisionLanguageModel | Mapping[str, VisionLanguageModel],
    engine: Engine | None = None,
    **limits: Any,
) -> Server:
    """A server of a model named tiny, or of several; with an engine of its own if none is given."""
    named = {"tiny": models} if isinstance(models, VisionLanguageModel) else dict(models)
    settings = Limits(**limits)
    engine = engine or BatchingEngine(named, queue=settings.queue, batch=settings.batch)
    return Server(engine, named, settings)


def ask(server: Server, *requests: tuple[str, str, Any], **headers: Any) -> list[httpx2.Response]:
    """The answers to requests (method, path, JSON body or None), one after the other."""
    return run(_ask(server, requests, headers))


def chat(server: Server, body: Any, **headers: Any) -> httpx2.Response:
    """The answer to a chat request."""
    return ask(server, ("POST", CHAT, body), **headers)[0]


async def _ask(server: Server, requests: Any, headers: Mapping[str, Any]) -> list[httpx2.Response]:
    async with in_process(server, headers) as client:
        return [
            await client.request(method, path, content=body, headers={"Content-Type": JSON})
            if isinstance(body, bytes)
            else await client.request(method, path, json=body)
            for method, path, body in requests
        ]


JSON = "application/json"


def in_process(server: Server, headers: Mapping[str, Any] | None = None) -> httpx2.AsyncClient:
    """A client of a server that does not listen."""
    transport = httpx2.ASGITransport(server.app(), raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url=HOST, headers=headers)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns."""
    return asyncio.run(asyncio.wait_for(coroutine, 60))


@contextmanager
def listening(server: Server, engine: Engine, **limits: Any) -> Iterator[str]:
    """Runs a server in a thread; gives its URL, and stops it at the end."""
    http = HttpServer(server, engine, Limits(**limits))
    ready = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await http.run(bound, ready.set)

    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        assert ready.wait(30)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            loops[0].call_soon_threadsafe(http.stop)
            thread.join(30)
            assert not thread.is_alive()


def serving(folder: Path, output: Path, **options: Any) -> tuple[str, int]:
    """Serves a model in a process of its own; returns its URL, and the process's id."""
    reading, writing = os.pipe()

    def act() -> None:
        os.close(reading)
        vlm_tune.serve(
            folder, port=0, started=lambda event: os.write(writing, event.url.encode()), **options
        )

    (pid,) = start(act, output)
    os.close(writing)
    url = os.read(reading, 100).decode()
    os.close(reading)
    assert url, Path(f"{output}.0").read_text()
    return url, pid
