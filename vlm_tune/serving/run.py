"""Starts the HTTP server, and stops it without losing answers."""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vlm_tune.errors import ArgumentError, ModelError, Problem, RecipeError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.generation.requests import check_text
from vlm_tune.model.base_places import BaseArgument
from vlm_tune.model.checkpoint import task_folders
from vlm_tune.paths import check_path, reason
from vlm_tune.quoting import quoted
from vlm_tune.serving.app import Server
from vlm_tune.serving.engine import BatchingEngine
from vlm_tune.serving.jobs import Engine
from vlm_tune.serving.limits import Limits

NAME = re.compile(r"[\w][\w.:-]{0,99}", re.ASCII)
"""A model's name: it stands in URLs."""
HEAD_SECONDS = 10
"""Seconds in which a connection has to bring a request's head."""
CLOSE_SECONDS = 5
"""Seconds in which clients have to take the last of their answers when the server stops."""
IDLE_CONNECTIONS = 512
"""The most open connections beside those of requests in progress."""


@dataclass(frozen=True)
class Started:
    """A server that takes requests.

    Attributes:
        url: Its address.
        models: The names of what it serves.
        keyed: Whether requests need a key.
        one_by_one: Reasons for which a model's requests are answered one at a time, by its name.
    """

    url: str
    models: tuple[str, ...]
    keyed: bool
    one_by_one: Mapping[str, str]


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    limits: Limits | None = None,
    dtype: str | None = None,
    base: BaseArgument = None,
    accept_other_base: bool = False,
    device: str | None = None,
    started: Callable[[Started], None] | None = None,
) -> None:
    """Serves a model by HTTP, as OpenAI's API, until a signal stops it.

    At the first SIGTERM or SIGINT no more requests are taken, and those in progress get
    `limits.drain` seconds; a second signal ends the process at once. In a notebook the cell runs
    until it is interrupted, and the first interrupt is such a signal.

    Args:
        model: a run, a checkpoint or a merged folder. Where tasks have adapters of their own, each
            task's model is served by the task's name.
        host: the address to listen at; 0.0.0.0 is every one of the machine's.
        port: the port; 0 takes a free one.
        name: the name under which requests ask for the model; its folder's by default.
        adapters: further runs over the same base, by name; the base is in memory once.
        limits: what the server accepts; `Limits()` by default.
        dtype: bf16, fp16 or fp32; the models' own by default.
        base: as in `merge`, like `accept_other_base`.
        device: as in `VisionLanguageModel.from_pretrained`.
        started: called once requests are taken.

    Raises:
        RecipeError: an argument is invalid, or the port can't be used.
        ArgumentError: an argument is of the wrong type.
        ModelError: a model can't be loaded.
    """
    _check_arguments(model, host, name, adapters, limits)
    folders = _named_folders(model, name, adapters or {})
    limits = limits or Limits()
    # A port that is in use is an error before models are loaded.
    with _bound(host, port) as listening:
        models = _loaded(
            folders, dtype=dtype, base=base, accept_other_base=accept_other_base, device=device
        )
        # Another server may have come to listen at the port while the models were loaded.
        with _port_problems(host, port):
            listening.listen(limits.requests)
        engine = BatchingEngine(models, queue=limits.queue, batch=limits.batch)
        server = HttpServer(Server(engine, models, limits), engine, limits)
        address = listening.getsockname()[:2]
        keyed = limits.api_key is not None
        event = Started(_url(*address), tuple(models), keyed, engine.one_by_one)
        _run(server, listening, lambda: started(event) if started else None)


def _run(server: HttpServer, listening: socket.socket, started: Callable[[], None]) -> None:
    """Runs a server until it is stopped, also where this thread has an event loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(server.run(listening, started))
        return
    # A notebook's cells run within an event loop, and an interrupt is a KeyboardInterrupt here.
    loops: Future[asyncio.AbstractEventLoop] = Future()

    async def run() -> None:
        loops.set_result(asyncio.get_running_loop())
        await server.run(listening, started)

    with ThreadPoolExecutor(1, thread_name_prefix="server") as pool:
        running = pool.submit(asyncio.run, run())
        while True:
            try:
                running.result()
                return
            except KeyboardInterrupt:
                # The loop may end at the same time.
                with suppress(RuntimeError):
                    loops.result().call_soon_threadsafe(server.stop)


def _check_arguments(model: Any, host: Any, name: Any, adapters: Any, limits: Any) -> None:
    """Raises `RecipeError` or `ArgumentError` for an argument of `serve` of the wrong type."""
    check_path("model", model)
    if limits is not None and not isinstance(limits, Limits):
        raise ArgumentError(
            f"limits must be a Limits of vlm_tune.serving.limits, got {quoted(limits)}"
        )
    check_text("host", host)
    if name is not None:
        check_text("name", name)
    if adapters is not None and not isinstance(adapters, Mapping):
        raise ArgumentError(
            f"adapters must be a mapping of names to folders, got {quoted(adapters)}"
        )


def _named_folders(
    model: str | Path, name: str | None, adapters: Mapping[str, str | Path]
) -> dict[str, Path]:
    """The folders of what is served, by name; the first is the model's, or its first task's."""
    folders: dict[str, Path] = {}
    with suppress(ModelError):  # that there is no model is an error when it is loaded
        folders = task_folders(Path(model))
    if folders and name is not None:
        message = f"tasks are served by their own names: {', '.join(folders)}; leave it out"
        raise RecipeError([Problem("--name", message)])
    folders = folders or {Path(model).resolve().name if name is None else name: Path(model)}
    for each, folder in adapters.items():
        check_text("an adapter's name", each)
        check_path(f"adapter {quoted(each)}", folder)
        if each in folders:
            raise RecipeError([Problem("--adapter", f"two models are named {quoted(each)}")])
        folders[each] = Path(folder)
    for place, each in enumerate(folders):
        if not NAME.fullmatch(each):
            option = "--adapter" if place else "--name"
            message = f"expected a name of letters, digits and .:_-, got {quoted(each)}"
            raise RecipeError([Problem(option, message)])
    return folders


def _loaded(folders: Mapping[str, Path], **options: Any) -> dict[str, VisionLanguageModel]:
    """The models of folders, by name; all but the first share its base."""
    (name, folder), *others = folders.items()
    model = VisionLanguageModel.from_pretrained(folder, **options)
    return {name: model, **{each: model.load_adapter(place, each) for each, place in others}}


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound to an address, and does not listen yet."""
    if not host:
        raise RecipeError([Problem("--host", "expected an address, such as 127.0.0.1")])
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _port_problems(host, port):
            bound.bind((host, port))
        yield bound


@contextmanager
def _port_problems(host: str, port: int) -> Iterator[None]:
    """Errors of an address within the block are problems of the option, --host or --port."""
    try:
        yield
    # The name of a host that can't be encoded is a ValueError, or a TypeError.
    except (OSError, OverflowError, ValueError, TypeError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        message = f"can't listen at {quoted(host)}, port {quoted(port)}: {why}"
        # A port is taken, not permitted, or no such number; anything else is the address.
        number = getattr(error, "errno", None)
        of_port = (
            number in (errno.EADDRINUSE, errno.EACCES)
            or isinstance(error, OverflowError)
            or not isinstance(port, int)
        )
        raise RecipeError([Problem("--port" if of_port else "--host", message)]) from None


def _url(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"


class HttpServer:
    """Runs a server's application until a signal, or `stop`.

    Args:
        server: The server.
        engine: Its engine, which is closed at the end.
        limits: What it accepts.
    """

    def __init__(self, server: Server, engine: Engine, limits: Limits) -> None:
        self._server = server
        self._engine = engine
        self._limits = limits
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                server.app(),
                http=_PromptProtocol,
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=limits.requests + IDLE_CONNECTIONS,
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )
        self._stopping: asyncio.Task[None] | None = None

    async def run(self, listening: socket.socket, started: Callable[[], None]) -> None:
        """Answers requests at a socket that listens until the server was stopped."""
        # Its debug messages quote answers.
        logging.getLogger("sse_starlette").setLevel(logging.INFO)
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._signalled)
        started()
        try:
            await self._uvicorn.serve(sockets=[listening])
        finally:
            self._server.close()

    def _signalled(self) -> None:
        """Begins to stop. A second signal has its usual effect, and ends the process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        self.stop()

    def stop(self) -> None:
        """Takes no more requests, and stops once those in progress are answered; in the loop."""
        if self._stopping is None:
            self._server.load.draining = True
            self._stopping = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await asyncio.to_thread(self._engine.close, self._limits.drain)
            async with asyncio.timeout(CLOSE_SECONDS):
                while self._server.load.requests:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            pass
        finally:
            self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, whose signals are handled here."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone."""
        yield


class _PromptProtocol(H11Protocol):
    """uvicorn's protocol; it closes connections that do not bring a request's head in time."""

    def connection_made(self, transport: Any) -> None:
        """Begins a connection."""
        super().connection_made(transport)
        self._expect_head()

    def on_response_complete(self) -> None:
        """Ends an answer; the next request's head may come."""
        super().on_response_complete()
        self._expect_head()

    def _expect_head(self) -> None:
        self.loop.call_later(HEAD_SECONDS, self._close_without_head, self.cycle)

    def _close_without_head(self, last: Any) -> None:
        idle = self.cycle is last and (last is None or last.response_complete)
        if idle and not self.transport.is_closing():
            self.transport.close()
