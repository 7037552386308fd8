"""Faults 60 to 68: what a server has to stand from its clients."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.helpers.served import (
    CHAT,
    ScriptedEngine,
    ask,
    chat,
    data_url,
    in_process,
    listening,
    question,
    run,
    served,
    with_images,
)
from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import png
from tests.helpers.tiny_recipes import tiny_text, write_color_rows
from vlm_tune.data.types import Media
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.serving import app as app_module
from vlm_tune.serving.api_errors import ApiError
from vlm_tune.serving.app import Server
from vlm_tune.serving.jobs import Closing
from vlm_tune.serving.remote import RemoteImages, is_public

RED = png((200, 30, 30)).read()
PUBLIC, PRIVATE = "93.184.215.14", "10.0.0.1"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    folder = tmp_path_factory.mktemp("model")
    return talkative(tiny_text("causal", write_color_rows(folder), folder / "run"))


@pytest.fixture
def serving(model: VisionLanguageModel) -> Callable[..., Server]:
    """Makes servers whose engine answers at once."""
    return lambda **limits: served(model, ScriptedEngine("red"), **limits)


def refusal(server: Server, *images: Any, **fields: Any) -> str:
    """The message of a request's error 400."""
    response = chat(server, with_images(*images, **fields))
    assert response.status_code == 400, response.text
    return response.json()["error"]["message"]


# --- 60: images of other hosts ------------------------------------------------------------------


def remote(
    pages: dict[str, Any], addresses: dict[str, list[str]], *, seconds: float = 30
) -> tuple[RemoteImages, list[str]]:
    """Fetches from pretended hosts, and the requests that went to them."""
    requests: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        return addresses[host]

    async def answer(request: httpx2.Request) -> httpx2.Response:
        name = f"{request.headers['host']}{request.url.path}"
        requests.append(f"{request.url.host} {name} {request.extensions['sni_hostname']}")
        page = pages[name]
        if callable(page):
            return await page()
        return page

    images = RemoteImages(
        ["good.example", "other.example"],
        most_bytes=1000,
        seconds=seconds,
        resolve=resolve,
        transport=httpx2.MockTransport(answer),
    )
    return images, requests


def page(body: bytes) -> httpx2.Response:
    """A page whose body comes in pieces."""

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    return httpx2.Response(200, content=pieces())


def moved(place: str) -> httpx2.Response:
    return httpx2.Response(302, headers={"Location": place})


ADDRESSES = {
    "good.example": [PUBLIC],
    "other.example": [PUBLIC, PRIVATE],
}


def test_fault_60_no_host_is_asked_by_default(serving: Callable[..., Server]) -> None:
    assert "fetches no images" in refusal(serving(), "https://good.example/a.png")


def test_fault_60_an_allowed_host_is_asked_at_the_address_that_was_checked() -> None:
    pages = {
        "good.example/a.png": moved("/b.png"),
        "good.example/b.png": page(RED),
    }
    images, requests = remote(pages, ADDRESSES)
    assert run(images.fetch("https://GOOD.example/a.png")) == RED
    assert requests == [
        f"{PUBLIC} good.example/a.png good.example",
        f"{PUBLIC} good.example/b.png good.example",
    ]


REFUSED = {
    "another host": ("https://evil.example/a.png", "fetches no images from 'evil.example'"),
    "a name below it": ("https://x.good.example/a.png", "fetches no images from"),
    "an address": ("http://127.0.0.1/a.png", "fetches no images from"),
    "one of its addresses is private": ("https://other.example/a.png", "no host of the public"),
    "another port": ("https://good.example:8443/a.png", "not of the form"),
    "a user": ("https://me:word@good.example/a.png", "not of the form"),
    "a redirect to this machine": ("https://good.example/loop.png", "from '127.0.0.1'"),
    "a redirect to a private name": ("https://good.example/private.png", "no host of the public"),
    "a redirect to a file": ("https://good.example/file.png", "not of the form"),
    "redirects without end": ("https://good.example/again.png", "more than 3 redirects"),
    "a missing page": ("https://good.example/none.png", "status 404"),
    "many bytes": ("https://good.example/big.png", "more than 1,000 bytes"),
    "no URL": (f"https://good.example/{'a' * 70_000}", "can't be fetched (InvalidURL)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fault_60_a_place_is_refused(name: str) -> None:
    url, text = REFUSED[name]
    pages = {
        "good.example/loop.png": moved("http://127.0.0.1/admin"),
        "good.example/private.png": moved("https://other.example/"),
        "good.example/file.png": moved("file:///etc/passwd"),
        "good.example/again.png": moved("/again.png"),
        "good.example/none.png": httpx2.Response(404),
        "good.example/big.png": page(bytes(1001)),
    }
    images, _ = remote(pages, ADDRESSES)
    with pytest.raises(ApiError) as caught:
        run(images.fetch(url))
    assert text in caught.value.message and PRIVATE not in caught.value.message


def test_fault_60_a_host_that_does_not_answer_is_given_up() -> None:
    images, _ = remote({"good.example/a.png": asyncio.Event().wait}, ADDRESSES, seconds=0.05)
    with pytest.raises(ApiError, match=r"more than 0\.05 seconds"):
        run(images.fetch("https://good.example/a.png"))


def test_fault_60_addresses_that_are_not_public() -> None:
    inner = """127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0
        224.0.0.1 255.255.255.255 ::1 :: fe80::1 fe80::1%eth0 fc00::1 ff02::1 ::ffff:127.0.0.1
        ::ffff:8.8.8.8 64:ff9b::7f00:1 64:ff9b:1::1 ::127.0.0.1 fec0::1
        2002:7f00:1:: 2001:0:7f00:1::1 localhost 127.1 0x7f000001"""
    assert [address for address in inner.split() if is_public(address)] == []
    assert is_public(PUBLIC) and is_public("2606:4700:4700::1111")


# --- 61: paths ------------------------------------------------------------------------------------


def test_fault_61_paths_are_refused_without_an_image_root(serving: Callable[..., Server]) -> None:
    server = serving()
    for place in (
        "/etc/passwd",
        "a.png",
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "ftp://a/b",
        "",
    ):
        assert "an image is a data URL" in refusal(server, place)


def test_fault_61_paths_within_the_image_root_alone(
    serving: Callable[..., Server], tmp_path: Path
) -> None:
    root = tmp_path / "images"
    (root / "inner").mkdir(parents=True)
    (root / "inner" / "a.png").write_bytes(RED)
    (root / "text.png").write_text("secret words")
    (tmp_path / "outside.png").write_bytes(RED)
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    os.mkfifo(root / "pipe.png")
    server = serving(image_root=root)
    for place in ("inner/a.png", str(root / "inner" / "a.png"), "./inner/../inner/a.png"):
        assert chat(server, with_images(place)).status_code == 200
    outside = [
        "../outside.png",
        str(tmp_path / "outside.png"),
        "link.png",
        "none.png",
        "inner",
        "..",
    ]
    outside += ["pipe.png", f"file://{root}/inner/a.png", "a\0.png", "x" * 5000, "/etc/passwd", "~"]
    for place in outside:
        message = refusal(server, place)
        # One message, which tells neither what is there nor where the folder is.
        assert "there is no image" in message and "image folder" in message
        assert place.startswith(str(tmp_path)) or str(tmp_path) not in message.replace(place, "")
    message = refusal(server, "text.png")
    assert "not an image" in message and "secret" not in message


# --- 62: bodies and images ------------------------------------------------------------------------


def test_fault_62_a_large_body_is_413(serving: Callable[..., Server]) -> None:
    server = serving(body_bytes=2000)
    response = chat(server, question("x" * 3000))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")

    async def unknown_length() -> httpx2.Response:
        async def pieces() -> Any:
            for _ in range(100):
                yield b" " * 100

        async with in_process(server) as client:
            return await client.post(CHAT, content=pieces())

    assert run(unknown_length()).status_code == 413
    assert server.load.requests == server.load.body_bytes == 0


def test_fault_62_all_bodies_together_are_bounded(serving: Callable[..., Server]) -> None:
    server = serving(bodies_bytes=2000)
    assert chat(server, question("x" * 3000)).status_code == 429
    assert chat(server, question("x")).status_code == 200


def test_fault_62_images_that_a_request_names_are_counted_as_its_body(
    serving: Callable[..., Server], tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(RED + bytes(1500))
    server = serving(bodies_bytes=2000, image_root=tmp_path)
    assert chat(server, with_images("a.png")).status_code == 200
    refused = chat(server, with_images("a.png", "a.png"))
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert server.load.body_bytes == 0


def test_fault_62_a_slow_client_is_408(model: VisionLanguageModel) -> None:
    engine = ScriptedEngine("red")
    server = served(model, engine, body_seconds=0.05)
    with (
        listening(server, engine) as url,
        socket.create_connection(("127.0.0.1", httpx2.URL(url).port or 0), 30) as connection,
    ):
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_fault_62_a_connection_without_a_request_is_closed(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_tune.serving.run.HEAD_SECONDS", 0.05)
    engine = ScriptedEngine("red")
    with (
        listening(served(model, engine), engine) as url,
        socket.create_connection(("127.0.0.1", httpx2.URL(url).port or 0), 30) as connection,
    ):
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert connection.recv(100) == b""


def test_fault_62_too_many_images_are_400(serving: Callable[..., Server]) -> None:
    assert "at most 2 images" in refusal(serving(max_images=2), RED, RED, RED)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header has these sizes, and that holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


BAD_IMAGES: dict[str, tuple[Any, str]] = {
    "bad base64": ("data:image/png;base64,#!", "bad base64"),
    "no base64": ("data:image/png,abc", "not base64"),
    "nothing": ("data:image/png;base64,", "empty"),
    "text": (data_url(b"no image at all"), "not an image"),
    "a bomb": (bomb(60_000, 60_000), "pixels"),
    "too many pixels for a server": (bomb(9_000, 9_000), "64,000,000 pixels"),
    "a strip": (bomb(20_000, 2), "200 to 1"),
    "a svg": (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not an image"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_fault_62_bad_images_are_400(serving: Callable[..., Server], name: str) -> None:
    image, text = BAD_IMAGES[name]
    message = refusal(serving(), RED, image)
    assert message.startswith("image 2: ") and text in message


def test_fault_62_an_image_of_many_bytes_is_400(serving: Callable[..., Server]) -> None:
    assert "more than 100 bytes" in refusal(serving(image_bytes=100), bytes(101))
    assert "more than 100 bytes" in refusal(serving(image_bytes=100), bytes(10_000))


def test_fault_62_deep_json_is_400(serving: Callable[..., Server]) -> None:
    (response,) = ask(serving(), ("POST", CHAT, b"[" * 200_000 + b"]" * 200_000))
    assert response.status_code == 400
    (response,) = ask(serving(), ("POST", CHAT, b'{"seed": 1' + b"0" * 100_000 + b"}"))
    assert response.status_code == 400


# --- 63, 64: templates, numbers -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chat_template", "template"])
def test_fault_63_a_clients_template_is_refused(serving: Callable[..., Server], name: str) -> None:
    message = refusal(serving(), **{name: {"a": "{{ 1 }}"}})
    assert name in message and "the model's chat template" in message


def test_fault_63_a_template_has_no_arguments_but_the_switch_of_reasoning(
    serving: Callable[..., Server],
) -> None:
    message = refusal(serving(), chat_template_kwargs={"a": "{{ 1 }}"})
    assert "chat_template_kwargs" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 17, "temperature": 1},
        {"n": 10**30},
        {"max_tokens": 4097},
        {"max_completion_tokens": 10**12},
        {"max_tokens": 0},
        {"num_beams": 17},
        {"choices": [str(number) for number in range(257)]},
        {"logprobs": True, "top_logprobs": 21},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_fault_64_huge_numbers_are_400(
    serving: Callable[..., Server], fields: dict[str, Any]
) -> None:
    assert next(iter(fields.keys() - {"logprobs", "temperature"})) in refusal(serving(), **fields)


def test_fault_64_long_texts_are_400_before_they_are_read(serving: Callable[..., Server]) -> None:
    server = serving(text_characters=1000)
    for body in (question("x" * 1001), question("x", choices=["y" * 500, "z" * 500])):
        response = chat(server, body)
        assert response.status_code == 400 and "1,001 characters" in response.text
    assert "stop" in refusal(server, stop="x" * 101)
    assert "stop.1" in refusal(server, stop=["x", "x" * 101])


# --- 65: the key ----------------------------------------------------------------------------------


def test_fault_65_every_route_but_health_needs_the_key(
    model: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "index.html").write_text("<title>A page without secrets</title>")
    monkeypatch.setattr(app_module, "PAGE", tmp_path)
    server = served(model, ScriptedEngine("red"), api_key="right")
    (schema,) = ask(server, ("GET", "/openapi.json", None), Authorization="Bearer right")
    routes = [
        (method.upper(), path.replace("{model}", "tiny"))
        for path, methods in schema.json()["paths"].items()
        for method in methods
    ]
    assert len(routes) == 6
    routes += [("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/nothing"), ("PUT", "/health/")]
    routes += [("GET", "/v1"), ("OPTIONS", CHAT), ("GET", "//v1/models"), ("GET", "/index.html/x")]
    wrong: Any = (
        "",
        "Bearer",
        "Bearer wrong",
        "Bearer right ",
        "bearer right",
        "Basic right",
        "Bearer é".encode(),
    )
    for method, path in routes:
        statuses = {
            ask(server, (method, path, None), Authorization=key)[0].status_code for key in wrong
        }
        assert statuses == ({200} if path == "/health" else {401}), path
    # A body is neither read nor counted without the key.
    for path in ("/health", "/"):
        assert ask(server, ("POST", path, {}))[0].status_code == 401, path
    # The page's files hold no secrets: a browser can't send a key for them.
    assert [
        each.status_code for each in ask(server, ("GET", "/", None), ("GET", "/index.html", None))
    ] == [200, 200]
    assert chat(server, question(), Authorization="Bearer right").status_code == 200
    assert "right" not in chat(server, question()).text


def test_fault_65_pages_of_other_sites_are_refused(serving: Callable[..., Server]) -> None:
    server = serving(hostnames=("box.example",), cors=("https://friend.example",))
    for host in (
        "localhost:8000",
        "127.0.0.1",
        "[::1]:8000",
        "192.168.1.7",
        "box.example",
        "a.localhost",
    ):
        assert chat(server, question(), Host=host).status_code == 200
    for host in (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "box.example.evil",
        "[",
        "a]b",
    ):
        assert chat(server, question(), Host=host).status_code == 403
    origins = {"http://localhost:8000": 200, "https://friend.example": 200, "null": 403}
    origins |= {"http://evil.example": 403, "http://localhost:9000": 403, "http://[": 403}
    for origin, status in origins.items():
        response = chat(server, question(), Host="localhost:8000", Origin=origin)
        assert response.status_code == status, origin
    (preflight,) = ask(
        server,
        ("OPTIONS", CHAT, None),
        **{
            "Origin": "https://friend.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
        },
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://friend.example"
    # The friend's page sees why it was refused.
    keyed = serving(api_key="right", cors=("https://friend.example",))
    refused = chat(keyed, question(), Origin="https://friend.example")
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://friend.example"
    assert "access-control-allow-origin" not in chat(serving(), question()).headers
    # A form of another site can't send JSON.
    (form,) = ask(serving(), ("POST", CHAT, None), **{"Content-Type": "text/plain"})
    assert form.status_code == 400


# --- 66: overload, clients that leave, stopping ---------------------------------------------------


async def finished(server: Server, *bodies: Any) -> list[httpx2.Response]:
    """The answers to requests that are sent at once."""
    async with in_process(server) as client:
        return await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))


def test_fault_66_more_requests_than_there_is_room_for_are_429(model: VisionLanguageModel) -> None:
    engine = ScriptedEngine()
    server = served(model, engine, queue=1, batch=2)

    async def act() -> list[httpx2.Response]:
        async with in_process(server) as client:
            tasks = [asyncio.create_task(client.post(CHAT, json=question())) for _ in range(3)]
            await asyncio.to_thread(engine.ticket, 2)
            refused = await client.post(CHAT, json=question())
            health = await client.get("/health")
            for ticket in engine.tickets:
                ticket.finish("red")
            return [refused, health, *await asyncio.gather(*tasks)]

    refused, *others = run(act())
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert [response.status_code for response in others] == [200] * 4
    assert server.load.requests == 0


def test_fault_66_an_answer_that_takes_too_long_is_504(model: VisionLanguageModel) -> None:
    engine = ScriptedEngine()
    server = served(model, engine, timeout=0.05)
    response = chat(server, question())
    assert response.status_code == 504 and "0.05 seconds" in response.text
    assert engine.ticket().cancelled.is_set()


def test_fault_66_a_stream_that_takes_too_long_ends_with_an_error(
    model: VisionLanguageModel,
) -> None:
    engine = ScriptedEngine()
    server = served(model, engine, timeout=0.3)

    async def act() -> httpx2.Response:
        async with in_process(server) as client:
            task = asyncio.create_task(client.post(CHAT, json=question(stream=True)))
            (await asyncio.to_thread(engine.ticket)).say("So")
            return await task

    text = run(act()).text
    assert '"content":"So"' in text and '"code": "timeout"' in text and "[DONE]" in text
    assert engine.ticket().cancelled.is_set()


def test_fault_66_a_client_that_stops_reading_is_left(model: VisionLanguageModel) -> None:
    engine = ScriptedEngine()
    server = served(model, engine, send_seconds=0.05)
    with (
        listening(server, engine) as url,
        socket.create_connection(("127.0.0.1", httpx2.URL(url).port or 0), 30) as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps(question(stream=True)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        ticket = engine.ticket()
        pieces = 0
        while not ticket.cancelled.wait(0.01):
            ticket.say("x" * 100_000)
            pieces += 1
            assert pieces < 1000


def test_fault_66_a_server_that_stops_takes_no_more_requests(
    serving: Callable[..., Server],
) -> None:
    server = serving()
    server.load.draining = True
    refused, health, models = ask(
        server, ("POST", CHAT, question()), ("GET", "/health", None), ("GET", "/v1/models", None)
    )
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
    assert refused.headers["connection"] == "close"
    assert (health.status_code, health.json()) == (503, {"status": "draining"})
    assert models.status_code == 200


def test_fault_66_an_answer_that_the_end_cuts_off_is_503(model: VisionLanguageModel) -> None:
    engine = ScriptedEngine()
    engine.refusal = Closing("over")
    assert chat(served(model, engine), question()).status_code == 503


# --- 67, 68: the page, and the log ----------------------------------------------------------------


def test_fault_67_a_browser_loads_and_runs_nothing_from_elsewhere(
    serving: Callable[..., Server],
) -> None:
    """No script within an answer runs: the policy admits scripts of the page's files alone."""
    for response in ask(serving(), ("GET", "/", None), ("POST", CHAT, question("<script>"))):
        policy = response.headers["content-security-policy"]
        assert "default-src 'self';" in policy and "unsafe" not in policy
        assert "object-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-type"] == "application/json"


def test_fault_68_the_log_has_no_words_and_no_images(
    model: VisionLanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    image = data_url(RED)
    secret = "the secret question"
    engine = ScriptedEngine("the secret answer")
    server = served(model, engine, api_key="the-secret-key")
    bodies = [
        with_images(RED, user=secret),
        {**question(secret), "stream": True},
        {**question(secret), "n": 0},
        {**question(), "secret": secret},
        question(model=secret),
        with_images(image[:80]),
    ]
    for body in bodies:
        chat(server, body, Authorization="Bearer the-secret-key")
    chat(server, question(secret), Authorization="Bearer the-secret-word")
    ask(server, ("GET", f"/{secret}?{secret}", None))
    engine.refusal = KeyError(secret)
    assert chat(server, question(), Authorization="Bearer the-secret-key").status_code == 500
    ours = [each for each in caplog.records if not each.name.startswith(("httpx", "httpcore"))]
    # What uvicorn and the streams' library log at debug level is not shown by `serve`.
    shown = [each for each in ours if each.levelno > logging.DEBUG]
    text = "\n".join(each.getMessage() + str(each.exc_text) for each in shown)
    assert "POST /v1/chat/completions 200" in text and "KeyError on a request" in text
    assert "secret" not in text and image[30:60] not in text
    assert Media(RED).label == "<bytes>"
