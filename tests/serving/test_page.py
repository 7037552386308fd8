"""The server's page, used in a browser: what is asked, answered, shown, stored and copied."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, expect

from tests.helpers.page_visits import chromium, page_server, text_of, visit
from tests.helpers.served import ScriptedEngine, listening, served
from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import png
from tests.helpers.tiny_recipes import tiny_text, write_color_rows
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.serving.jobs import Overloaded

__all__ = ["chromium"]
QUESTION = "what color is it?"
HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VisionLanguageModel]:
    """Two models that answer differently."""
    folder = tmp_path_factory.mktemp("page")
    recipe = tiny_text("causal", write_color_rows(folder), folder / "run")
    return {"base": talkative(recipe), "other": talkative(recipe, seed=9)}


@pytest.fixture(scope="module")
def url(models: dict[str, VisionLanguageModel]) -> Iterator[str]:
    """The address of a server of both."""
    with page_server(models) as address:
        yield address


@pytest.fixture
def scripted(models: dict[str, VisionLanguageModel]) -> Iterator[tuple[ScriptedEngine, str]]:
    """An engine that answers as a test says, and the address of its server."""
    engine = ScriptedEngine()
    with listening(served(models, engine), engine) as address:
        yield engine, address


@pytest.fixture
def red(tmp_path: Path) -> Path:
    """An image file; its name is one that shells and quotes trip over."""
    path = tmp_path / "it's $HOME.png"
    path.write_bytes(png().read())
    return path


def shown(answer: Locator) -> dict[str, float]:
    """The choices of an answer with the percentages beside them, from the top."""
    rows = answer.locator(".ranking tr").all()
    cells = [row.locator("th, td:last-child").all_text_contents() for row in rows]
    return {text: float(percent.removesuffix("%")) / 100 for text, percent in cells}


def ran(language: str, code: str, folder: Path | None = None, **environment: str) -> str:
    """The answer that copied code gets, run in a folder."""
    run = subprocess.run(
        ["bash"] if language == "curl" else [sys.executable, "-"],
        input=code,
        cwd=folder,
        text=True,
        capture_output=True,
        env={**os.environ, "no_proxy": "127.0.0.1", **environment},
    )
    assert run.returncode == 0, run.stderr
    if language == "curl":
        return json.loads(run.stdout)["choices"][0]["message"]["content"]
    return run.stdout.removesuffix("\n")


def test_a_dropped_image_is_asked_about_and_the_chat_survives_a_reload(
    chromium: Browser, url: str, red: Path, models: dict[str, VisionLanguageModel]
) -> None:
    offline = models["base"].answer(QUESTION, red.read_bytes(), max_new_tokens=9)
    with visit(chromium, url) as visited:
        page = visited.page
        visited.give("drop", red)
        visited.images(1)
        visited.set(Most_tokens="9")
        (answer,) = visited.ask(QUESTION)
        assert text_of(answer) == offline.text
        assert visited.reload() == [QUESTION]
        visited.button(QUESTION).click()
        (answer,) = visited.answers()
        assert text_of(answer) == offline.text
        expect(page.locator(".question img")).to_have_js_property("naturalWidth", 32)

        page.locator("nav li").hover()
        visited.button(f"Rename {QUESTION}").click()
        page.get_by_label("Title of the chat").fill("My red")
        page.keyboard.press("Enter")
        expect(visited.button("My red")).to_be_visible()
        assert visited.reload() == ["My red"]
        page.locator("nav li").hover()
        visited.button("Delete My red").click()
        expect(page.get_by_role("status")).to_contain_text("Deleted")
        expect(page.locator("nav li")).to_have_count(0)
        visited.button("Undo").click()
        assert visited.reload() == ["My red"]
        visited.button("Delete all chats").click()
        visited.button("Delete all").click()
        assert visited.reload() == []
        expect(page.locator("nav li")).to_have_count(0)


def test_two_models_answer_side_by_side_each_from_its_earlier_answers(
    chromium: Browser, url: str, red: Path, models: dict[str, VisionLanguageModel]
) -> None:
    with visit(chromium, url) as visited:
        visited.give("paste", red)
        visited.images(1)
        visited.button("Compare two models").click()
        visited.set(Most_tokens="6")
        first = [text_of(answer) for answer in visited.ask(QUESTION, answers=2)]
        second = [text_of(answer) for answer in visited.ask("is it blue?", answers=2)]
        assert first[0] != first[1]
        for name, text, later in zip(models, first, second, strict=True):
            model = models[name]
            assert model.chat(QUESTION, images=[red], max_new_tokens=6) == text
            content = [{"type": "image", "image": red}, {"type": "text", "text": QUESTION}]
            messages = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": text},
                {"role": "user", "content": "is it blue?"},
            ]
            assert model.chat(messages=messages, max_new_tokens=6) == later


def test_a_question_by_itself_has_the_images_and_not_the_words_before_it(
    chromium: Browser, url: str, red: Path
) -> None:
    with visit(chromium, url) as visited:
        page = visited.page
        visited.give("drop", red)
        visited.images(1)
        visited.set(Most_tokens="6")
        visited.ask("say something")
        visited.button("Settings").click()
        page.get_by_label("Each question by itself").check()
        page.keyboard.press("Escape")
        with page.expect_request("**/v1/chat/completions") as sent:
            visited.ask(QUESTION)
        (message,) = sent.value.post_data_json["messages"]
        assert [part["type"] for part in message["content"]] == ["image_url", "text"]
        assert message["content"][1]["text"] == QUESTION


def test_choices_have_bars_with_their_probabilities(
    chromium: Browser, url: str, red: Path, models: dict[str, VisionLanguageModel]
) -> None:
    choices = ["red", "blue", HOSTILE]
    offline = models["base"].answer(QUESTION, red.read_bytes(), choices=choices)
    assert offline.probabilities is not None
    with visit(chromium, url) as visited:
        visited.give("drop", red)
        visited.images(1)
        visited.set(Temperature="0.5", Most_tokens="3")
        visited.button("Choices").click()
        visited.page.get_by_label("Choices, one per line").fill("\n".join(["", *choices, "red "]))
        (answer,) = visited.ask(QUESTION)
        percentages = shown(answer)
        assert percentages == pytest.approx(offline.probabilities, abs=6e-4)
        assert list(percentages.values()) == sorted(percentages.values(), reverse=True)
        bars = answer.locator(".share i").all()
        tracks = answer.locator(".share div").all()
        for bar, track, share in zip(bars, tracks, percentages.values(), strict=True):
            width = "element => element.getBoundingClientRect().width"
            assert bar.evaluate(width) == pytest.approx(share * track.evaluate(width), abs=0.5)


@pytest.mark.parametrize("language", ["Python", "curl", "openai"])
def test_copied_code_gets_the_answer_of_the_page(
    chromium: Browser, url: str, red: Path, language: str
) -> None:
    question = 'say "it\'s" `echo` $HOME \\n {x}\nJSON'
    with visit(chromium, url, permissions=["clipboard-read", "clipboard-write"]) as visited:
        page = visited.page
        visited.give("drop", red)
        visited.images(1)
        visited.set(Most_tokens="12")
        (answer,) = visited.ask(question)
        visited.button("Code").click()
        page.get_by_label(language, exact=True).check()
        visited.button("Copy code").click()
        expect(page.get_by_text("Copied")).to_be_visible()
        code = page.evaluate("navigator.clipboard.readText()")
        expected = text_of(answer)
    assert ran(language, code, folder=red.parent) == expected


def test_the_code_of_a_later_question_has_the_chat_the_settings_and_the_key(
    chromium: Browser, models: dict[str, VisionLanguageModel]
) -> None:
    with (
        page_server(models, api_key="secret") as address,
        visit(chromium, address) as visited,
    ):
        page = visited.page
        key = page.get_by_label("Key", exact=True)
        key.fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_text("The server refused this key.")).to_be_visible()
        key.fill("secret")
        page.keyboard.press("Enter")
        expect(page.get_by_label("Model", exact=True)).to_have_value("base")
        visited.set(System_text="Be brief.", Temperature="0.5", Seed="3", Most_tokens="5")
        visited.ask("hello")
        with page.expect_request("**/v1/chat/completions") as sent:
            (answer,) = visited.ask("and now?")
        visited.button("Code").last.click()
        code = page.get_by_label("Code", exact=True).text_content() or ""
        request = sent.value.post_data_json
        assert ran("Python", code, VLM_TUNE_API_KEY="secret") == text_of(answer)
    assert request["temperature"] == 0.5 and request["seed"] == 3
    assert [message["role"] for message in request["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert "secret" not in code


def test_a_large_photo_is_turned_upright_and_scaled_down(
    chromium: Browser, url: str, tmp_path: Path
) -> None:
    photo = Image.new("RGB", (2600, 1300), "blue")
    photo.paste("red", (0, 0, 1300, 1300))
    exif = photo.getexif()
    exif[0x0112] = 6  # its left side is the top
    photo.save(tmp_path / "photo.jpg", exif=exif)
    Image.new("RGBA", (8, 8)).save(tmp_path / "moving.gif")
    (tmp_path / "notes.txt").write_text("no image")
    with visit(chromium, url) as visited:
        page = visited.page
        page.locator("input[type=file]").set_input_files(
            [tmp_path / "photo.jpg", tmp_path / "moving.gif", tmp_path / "notes.txt"]
        )
        visited.images(2)
        expect(page.get_by_role("status")).to_contain_text("can't read notes.txt as an image")
        expect(page.locator(".size").first).to_have_text("1024 × 2048 (scaled down)")
        with page.expect_request("**/v1/chat/completions") as sent:
            visited.ask(QUESTION)
        parts = sent.value.post_data_json["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert urls[1].startswith("data:image/png;base64,")
    upright = Image.open(io.BytesIO(base64.b64decode(urls[0].partition(",")[2])))
    assert upright.size == (1024, 2048) and not upright.getexif()
    top = upright.convert("RGB").getpixel((500, 200))
    assert isinstance(top, tuple) and top[0] > 200 and top[2] < 60


def test_no_more_images_are_taken_than_the_server_takes(
    chromium: Browser, models: dict[str, VisionLanguageModel], red: Path
) -> None:
    with page_server(models, max_images=2) as address, visit(chromium, address) as visited:
        expect(visited.page.locator(".tools")).to_contain_text("Up to 2 images")
        visited.give("drop", red, red, red)
        expect(visited.page.get_by_role("status")).to_contain_text("takes no more images")
        visited.images(2)
        visited.button(f"Remove {red.name}").first.click()
        visited.images(1)
        visited.ask(QUESTION)
        expect(visited.page.locator(".tools")).to_contain_text("Up to 1 image")


def test_markup_in_questions_and_answers_is_text(
    chromium: Browser, scripted: tuple[ScriptedEngine, str]
) -> None:
    engine, address = scripted
    with visit(chromium, address) as visited:
        page = visited.page
        visited.send(HOSTILE)
        ticket = engine.ticket()
        ticket.say(HOSTILE[:9])
        expect(page.locator(".answer .text")).to_have_text(HOSTILE[:9])
        expect(page.locator(".answer")).to_have_class("answer streaming")
        ticket.say(HOSTILE[9:])
        ticket.finish(HOSTILE)
        (answer,) = visited.answers()
        assert text_of(answer) == HOSTILE
        expect(page.locator(".question .text")).to_have_text(HOSTILE)
        assert visited.reload() == [HOSTILE]
        visited.button(HOSTILE).click()
        visited.answers()
        assert page.locator("body script, body img:not([src='icon.svg'])").count() == 0


def test_a_question_waits_for_a_busy_server(
    chromium: Browser, scripted: tuple[ScriptedEngine, str]
) -> None:
    engine, address = scripted
    engine.refusal = Overloaded("the queue is full")
    with visit(chromium, address) as visited:
        visited.page.clock.install()
        visited.send(QUESTION)
        expect(visited.page.locator(".answer")).to_contain_text("Asking again in 1 s")
        engine.refusal = None
        visited.page.clock.run_for(1000)
        engine.ticket().finish("")
        (answer,) = visited.answers()
        expect(answer).to_contain_text("The answer is empty.")


def test_an_answer_is_stopped_and_asked_again(
    chromium: Browser, scripted: tuple[ScriptedEngine, str]
) -> None:
    engine, address = scripted
    with visit(chromium, address) as visited:
        page = visited.page
        visited.send(QUESTION)
        engine.ticket().say("It is")
        expect(page.locator(".answer .text")).to_have_text("It is")
        expect(visited.button("Edit")).to_have_count(0)
        visited.button("Stop").click()
        (answer,) = visited.answers(ends="stopped")
        assert text_of(answer) == "It is"
        assert engine.ticket().cancelled.wait(30)
        visited.button("Ask again").click()
        engine.ticket(1).say("red")
        engine.ticket(1).finish("red")
        (answer,) = visited.answers()
        assert text_of(answer) == "red"
        visited.button("Edit").click()
        expect(visited.question).to_have_value(QUESTION)
        expect(page.locator(".answer")).to_have_count(0)


def test_a_server_that_comes_back_is_asked_again(chromium: Browser, url: str) -> None:
    with visit(chromium, url) as visited:
        page = visited.page
        page.route("**/v1/models", lambda route: route.abort())
        page.reload()
        expect(page.get_by_role("status")).to_contain_text("The server can't be reached")
        visited.question.fill(QUESTION)
        expect(visited.button("Send")).to_be_disabled()
        page.unroute("**/v1/models")
        visited.button("Try again").click()
        visited.ask(QUESTION)


def test_errors_are_in_plain_words(chromium: Browser, url: str) -> None:
    with visit(chromium, url) as visited:
        page = visited.page
        (answer,) = visited.ask("word " * 2000, ends="failed")
        expect(answer.get_by_role("alert")).to_contain_text("tokens")
        with page.expect_request("**/v1/chat/completions") as sent:
            visited.ask(QUESTION)
        assert len(sent.value.post_data_json["messages"]) == 1
        page.context.set_offline(True)
        (answer,) = visited.ask(QUESTION, ends="failed")
        expect(answer.get_by_role("alert")).to_contain_text("The server can't be reached")
        page.context.set_offline(False)
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(body="data: {}", content_type="text/event-stream"),
        )
        (answer,) = visited.ask(QUESTION, ends="failed")
        expect(answer.get_by_role("alert")).to_contain_text("The connection broke")
