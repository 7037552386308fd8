"""The server's page for everyone: assistive technology, keyboards, phones; and what it may load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Route, expect

from tests.helpers.page_visits import FORMS, Visit, chromium, page_server, visit
from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import png
from tests.helpers.tiny_recipes import tiny_text, write_color_rows

__all__ = ["chromium"]
AXE = (Path(__file__).parent.parent / "fixtures" / "axe" / "axe.min.js").read_text()
QUESTION = "what color is it?"
REQUESTS = "**/v1/chat/completions"
BREACHES = """() => new Promise((resolve) => {
    const breaches = [];
    addEventListener("securitypolicyviolation", (event) => {
        breaches.push(event.effectiveDirective);
        if (breaches.length === 3) resolve(breaches.sort());
    });
    const script = document.createElement("script");
    script.textContent = "document.title = 'it ran'";
    const image = new Image();
    image.src = "http://localhost.example/pixel.png";
    document.body.append(script, image);
    fetch("http://localhost.example/").catch(() => null);
})"""
"""Tries what the content security policy forbids; returns what it was that was forbidden."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of one model by two names."""
    folder = tmp_path_factory.mktemp("page")
    model = talkative(tiny_text("causal", write_color_rows(folder), folder / "run"))
    with page_server({"base": model, "adapter": model}) as address:
        yield address


@pytest.fixture
def red(tmp_path: Path) -> Path:
    """An image file."""
    path = tmp_path / "red.png"
    path.write_bytes(png().read())
    return path


def fail(route: Route) -> None:
    """Answers with an error."""
    route.fulfill(status=500, json={"error": {"message": "internal error"}})


def violations(visited: Visit) -> list[str]:
    """What axe finds wrong, at any impact."""
    visited.page.evaluate(AXE)
    report = visited.page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    return [
        f"{violation['impact']} {violation['id']}: {json.dumps(violation['nodes'])[:500]}"
        for violation in report["violations"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("form", FORMS)
def test_axe_finds_nothing(chromium: Browser, url: str, red: Path, form: str, scheme: Any) -> None:
    with visit(chromium, url, form, color_scheme=scheme, reduced_motion="reduce") as visited:
        page = visited.page
        expect(page.get_by_label("Model", exact=True)).to_have_value("base")
        assert violations(visited) == []
        visited.give("drop", red)
        visited.images(1)
        visited.button("Compare two models").click()
        visited.button("Choices").click()
        page.get_by_label("Choices, one per line").fill("red\nblue")
        assert violations(visited) == []
        visited.ask(QUESTION, answers=2)
        page.route(REQUESTS, fail)
        visited.ask(QUESTION, answers=2, ends="failed")
        page.unroute(REQUESTS)
        page.route(REQUESTS, lambda route: None)
        visited.send(QUESTION)
        expect(page.locator(".answer.waiting")).to_have_count(2)
        assert violations(visited) == []
        for name in ("Settings", "Code", "Enlarge red.png"):
            visited.button(name).first.click()
            expect(page.get_by_role("dialog")).to_be_visible()
            assert violations(visited) == []
            page.keyboard.press("Escape")
            expect(page.get_by_role("dialog")).to_have_count(0)
        if form == "phone":
            visited.button("Chats").click()
            expect(visited.button("New chat")).to_be_in_viewport()
            assert violations(visited) == []


def test_all_is_done_by_keyboard(chromium: Browser, url: str) -> None:
    with visit(chromium, url) as visited:
        page = visited.page
        press = page.keyboard.press
        question = visited.question
        expect(question).to_be_focused()
        page.keyboard.type("one")
        press("Shift+Enter")
        page.keyboard.type("two")
        expect(question).to_have_value("one\ntwo")
        press("Enter")
        visited.answers()
        expect(question).to_be_focused()
        page.route(REQUESTS, lambda route: None)
        page.keyboard.type("three")
        press("Enter")
        press("Escape")
        visited.answers(ends="stopped")
        settings = visited.button("Settings")
        settings.focus()
        press("Enter")
        expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
        press("Escape")
        expect(settings).to_be_focused()
        visited.button("New chat").focus()
        press("Shift+Tab")
        skip = page.get_by_role("link", name="Skip to the question")
        expect(skip).to_be_focused()
        expect(skip).to_be_in_viewport()
        press("Enter")
        expect(question).to_be_focused()


def test_a_screen_reader_gets_an_answer_once_it_has_ended(chromium: Browser, url: str) -> None:
    with visit(chromium, url) as visited:
        page = visited.page
        page.route(REQUESTS, lambda route: None)
        visited.send(QUESTION)
        log = page.get_by_role("log", name="Conversation")
        expect(log).to_have_attribute("aria-live", "polite")
        answer = log.get_by_role("article", name="Answer of base")
        expect(answer).to_have_attribute("aria-busy", "true")
        visited.button("Stop").click()
        expect(answer).to_have_attribute("aria-busy", "false")


def test_a_phone_shows_it_all_and_opens_its_camera(chromium: Browser, url: str, red: Path) -> None:
    with visit(chromium, url, "phone") as visited:
        page = visited.page
        with page.expect_file_chooser() as photographed:
            visited.button("Take a photo").click()
        camera = photographed.value
        assert camera.element.get_attribute("capture") == "environment"
        camera.set_files(red)
        visited.images(1)
        visited.button("Compare two models").click()
        visited.ask("x" * 60, answers=2)
        page.evaluate("window.scrollTo(0, 0)")
        for element in ("html", ".composer", ".bar"):
            wide = page.locator(element).evaluate("element => element.scrollWidth")
            assert wide <= 360
        visited.button("Chats").click()
        expect(visited.button("New chat")).to_be_in_viewport()
        page.keyboard.press("Escape")
        expect(visited.button("New chat")).not_to_be_in_viewport()


def test_the_theme_is_chosen_and_stays(chromium: Browser, url: str) -> None:
    ground = "body => getComputedStyle(body).backgroundColor"
    with visit(chromium, url, color_scheme="light") as visited:
        body = visited.page.locator("body")
        light = body.evaluate(ground)
        visited.button("Settings").click()
        visited.page.get_by_label("Dark", exact=True).check()
        visited.page.keyboard.press("Escape")
        expect(visited.page.locator("html")).to_have_attribute("data-theme", "dark")
        assert body.evaluate(ground) != light
        visited.reload()
        expect(visited.page.locator("html")).to_have_attribute("data-theme", "dark")
        assert body.evaluate(ground) != light


def test_the_page_loads_nothing_from_elsewhere(chromium: Browser, url: str) -> None:
    with visit(chromium, url) as visited:
        assert visited.page.evaluate(BREACHES) == ["connect-src", "img-src", "script-src-elem"]
        assert visited.page.title() == "vlm_tune"
        # What the policy stopped is in the console, and is what was tried here.
        assert len(visited.faults) >= 3
        attempt = "a request to http://localhost.example/pixel.png"
        assert all(
            "Content Security Policy" in fault or fault == attempt for fault in visited.faults
        )
        visited.faults.clear()
