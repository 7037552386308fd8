"""Starting and stopping: signals drain, options are checked first, adapters share their base."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import typer

from tests.helpers.forked_runs import ended, until
from tests.helpers.served import CHAT, events_of, question, serving
from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import built, parsed, with_tune
from vlm_tune import serve
from vlm_tune.cli.entry import app
from vlm_tune.errors import ModelError, RecipeError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.serving.limits import Limits
from vlm_tune.serving.run import Started
from vlm_tune.serving.welcome import welcome


@pytest.fixture
def folder(tiny_recipe: Callable[..., str], tmp_path: Path) -> Path:
    """A model's folder."""
    talkative(tiny_recipe("causal")).save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def drained(url: str) -> None:
    """Waits until the server says that it stops."""
    until(lambda: httpx2.get(f"{url}/health").status_code == 503)


def test_a_signal_lets_a_running_answer_end(folder: Path, tmp_path: Path) -> None:
    url, pid = serving(folder, tmp_path / "said")
    body = question("Go on", model="mine", max_tokens=100, stream=True)
    with httpx2.stream("POST", f"{url}{CHAT}", json=body, timeout=60) as response:
        lines = response.iter_lines()
        first = next(lines)
        os.kill(pid, signal.SIGTERM)
        drained(url)
        refused = httpx2.post(f"{url}{CHAT}", json=question(model="mine"))
        text = "\n".join([first, *lines])
    assert refused.status_code == 503
    *chunks, done = events_of(text)
    assert done == "[DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    answer = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    alone = VisionLanguageModel.from_pretrained(folder).chat("Go on", max_new_tokens=100)
    assert answer == alone
    assert ended([pid]) == [0]


def test_a_second_signal_ends_the_server_at_once(folder: Path, tmp_path: Path) -> None:
    url, pid = serving(folder, tmp_path / "said", limits=Limits(drain=600))
    body = question("Go on", model="mine", max_tokens=250, num_beams=4)
    with socket.create_connection(("127.0.0.1", httpx2.URL(url).port or 0), 60) as connection:
        encoded = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(encoded)}\r\n\r\n".encode() + encoded)
        until(lambda: "vlm_tune_jobs_running 1.0" in httpx2.get(f"{url}/metrics").text)
        os.kill(pid, signal.SIGINT)
        drained(url)
        os.kill(pid, signal.SIGTERM)
        assert ended([pid]) == [-signal.SIGTERM]


def test_an_adapter_answers_under_its_name(tiny_recipe: Callable[..., str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        talkative(with_tune(tiny_recipe("causal"))).save_pretrained(tmp_path / name)
    url, pid = serving(
        tmp_path / "one", tmp_path / "said", name="first", adapters={"second": tmp_path / "two"}
    )
    cards = httpx2.get(f"{url}/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [
        ("first", None),
        ("second", "first"),
    ]
    for name, place in (("first", "one"), ("second", "two")):
        reply = httpx2.post(f"{url}{CHAT}", json=question(model=name, max_tokens=6), timeout=60)
        alone = VisionLanguageModel.from_pretrained(tmp_path / place)
        text = reply.json()["choices"][0]["message"]["content"]
        assert text == alone.chat("What color?", max_new_tokens=6)
    os.kill(pid, signal.SIGTERM)
    assert ended([pid]) == [0]


def test_what_can_not_be_served_is_an_error_before_a_model_is_loaded(tmp_path: Path) -> None:
    nothing = tmp_path / "none"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RecipeError, match=rf"--port: can't listen .* port {port}: address"):
            serve(nothing, port=port)
    with pytest.raises(RecipeError, match="--name: expected a name"):
        serve(nothing, name="a/b")
    with pytest.raises(RecipeError, match="two models are named 'none'"):
        serve(nothing, adapters={"none": nothing})
    for host in ("no host", "ü" * 64, "a\0b"):
        with pytest.raises(RecipeError, match="--host: can't listen at "):
            serve(nothing, host=host)
    with pytest.raises(RecipeError, match=r"--port: can't listen at .* port 70000"):
        serve(nothing, port=70_000)
    # An empty one would be every address of the machine.
    with pytest.raises(RecipeError, match="--host: expected an address"):
        serve(nothing, host="")
    with pytest.raises(ModelError):
        serve(nothing, port=0)


def test_a_port_that_is_taken_while_models_are_loaded_is_an_error(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(parsed(tiny_recipe("causal")))

    def load(*_: Any, **__: Any) -> dict[str, VisionLanguageModel]:
        taken.listen()
        return {"tiny": model}

    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr("vlm_tune.serving.run._loaded", load)
        with pytest.raises(RecipeError, match=rf"--port: can't listen .* port {port}: address"):
            serve(tmp_path, name="tiny", port=port)


def test_two_adapters_of_one_name_are_an_error(tmp_path: Path) -> None:
    arguments = ["serve", str(tmp_path), "--adapter", "a=one", "--adapter", "a=two"]
    with pytest.raises(typer.BadParameter, match="two adapters are named 'a'"):
        app(arguments, standalone_mode=False)


def test_empty_settings_of_a_shell_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would open the server to everybody, or the folder that it was started in."""
    with pytest.raises(typer.BadParameter, match="expected a folder, got an empty name"):
        app(["serve", str(tmp_path), "--image-root", ""], standalone_mode=False)
    monkeypatch.setenv("VLM_TUNE_API_KEY", "")
    with pytest.raises(RecipeError, match="VLM_TUNE_API_KEY: is empty"):
        app(["serve", str(tmp_path)], standalone_mode=False)
    with pytest.raises(RecipeError, match="--api-key: expected 1 to"):
        app(["serve", str(tmp_path), "--api-key", ""], standalone_mode=False)


def test_a_notebooks_cell_serves_until_it_is_interrupted(folder: Path) -> None:
    """A cell runs within an event loop, in the main thread; an interrupt is a signal."""
    replies: list[Any] = []
    main = threading.get_ident()

    def ask_and_interrupt(url: str) -> None:
        replies.append(httpx2.post(f"{url}{CHAT}", json=question(model="mine", max_tokens=2)))
        signal.pthread_kill(main, signal.SIGINT)

    def started(event: Started) -> None:
        threading.Thread(target=ask_and_interrupt, args=(event.url,)).start()

    async def cell() -> None:
        serve(folder, port=0, started=started)

    loop = asyncio.new_event_loop()
    # Where tests run in the background the shell has interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        loop.run_until_complete(cell())
    finally:
        signal.signal(signal.SIGINT, before)
        loop.close()
    assert replies[0].status_code == 200


def test_limits_out_of_range_are_all_named() -> None:
    with pytest.raises(RecipeError) as caught:
        Limits(
            timeout=-1,
            drain=float("nan"),
            api_key="two words",
            hostnames=("a:80",),
            allow_hosts=("https://a.example",),
            cors=("a.example", "https://a.example/path"),
            image_root=Path("/none"),
        )
    assert [problem.where for problem in caught.value.problems] == [
        "--timeout",
        "--drain",
        "--api-key",
        "--hostname",
        "--allow-host",
        "--cors",
        "--cors",
        "--image-root",
    ]


def test_a_started_server_says_how_to_ask_it() -> None:
    url = "http://127.0.0.1:8000"
    text = welcome(Started(url, ("mine", "other"), False, {"other": "it has fusion"}), "0.0.0.0")
    assert f"curl {url}/v1/chat/completions" in text and '"model": "mine"' in text
    assert "adapters  other" in text and "whoever reaches 0.0.0.0 may use it" in text
    assert "requests to other are answered one at a time: it has fusion" in text
    keyed = welcome(Started(url, ("mine",), True, {}), "127.0.0.1")
    assert 'Authorization: Bearer $VLM_TUNE_API_KEY"' in keyed and "note:" not in keyed
