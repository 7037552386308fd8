"""The server's page in a real headless Chromium, with a server of two tiny models behind it."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.helpers.served import listening, served
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.serving.engine import BatchingEngine
from vlm_tune.serving.limits import Limits

TRANSFER = """([type, files]) => {
    const transfer = new DataTransfer();
    for (const [name, kind, text] of files) {
        const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
        transfer.items.add(new File([bytes], name, { type: kind }));
    }
    const details = { bubbles: true, cancelable: true };
    const event = type === "paste"
        ? new ClipboardEvent(type, { ...details, clipboardData: transfer })
        : new DragEvent(type, { ...details, dataTransfer: transfer });
    document.body.dispatchEvent(event);
}"""
"""Lets the page get files as the browser gives it those that a user drops or pastes."""
STORED = """() => new Promise((resolve) => {
    indexedDB.open("vlm_tune").onsuccess = ({ target }) => {
        const store = target.result.transaction("chats").objectStore("chats");
        store.getAll().onsuccess = (event) => {
            target.result.close();
            resolve(event.target.result.map((chat) => chat.title));
        };
    };
})"""
"""Reads the titles of the chats that the browser stores, once what writes them has ended."""
EXPECTED_ERRORS = re.compile(r"Failed to load resource: (the server responded|net::ERR_)")
"""What the browser's console has of answers that are errors; the page shows these itself."""
KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".gif": "image/gif", ".txt": "text/plain"}
FORMS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 800}},
    "phone": {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True},
}


MOST_SECONDS = 60
"""The longest that anything on the page is waited for, on a machine that does much else."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The browser. Its driver's event loop is that of this thread, so it ends with the module."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs Chromium")
    expect.set_options(timeout=1000 * MOST_SECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@contextmanager
def page_server(models: Mapping[str, VisionLanguageModel], **limits: Any) -> Iterator[str]:
    """Serves models by their names; yields the address."""
    settings = Limits(**limits)
    engine = BatchingEngine(models, queue=settings.queue, batch=settings.batch)
    with listening(served(models, engine, **limits), engine, **limits) as url:
        yield url


class Visit:
    """A browser's window with the page in it, as a new user has it.

    Attributes:
        page: The window, for what has no method here.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.faults: list[str] = []
        page.on("console", self._note_console)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("dialog", lambda dialog: self.faults.append(f"a dialog: {dialog.message}"))
        page.on("request", lambda request: self._note_request(request.url))
        page.goto(f"{url}/")

    def _note_console(self, message: Any) -> None:
        if message.type == "error" and not EXPECTED_ERRORS.match(message.text):
            self.faults.append(message.text)

    def _note_request(self, url: str) -> None:
        places = urlsplit(url)
        if places.scheme not in ("data", "blob") and places.netloc != urlsplit(self.url).netloc:
            self.faults.append(f"a request to {url}")

    def button(self, name: str) -> Locator:
        """The button of that name."""
        return self.page.get_by_role("button", name=name, exact=True)

    def give(self, how: str, *paths: Path) -> None:
        """Drops or pastes files."""
        files = [
            [path.name, KINDS[path.suffix], base64.b64encode(path.read_bytes()).decode()]
            for path in paths
        ]
        for event in ("dragover", "drop") if how == "drop" else (how,):
            self.page.evaluate(TRANSFER, [event, files])

    def reload(self) -> list[str]:
        """Loads the page anew; returns the titles of the chats that were stored."""
        titles = self.page.evaluate(STORED)
        self.page.reload()
        return titles

    def images(self, count: int) -> None:
        """Waits until the question has that many images, which are shown."""
        expect(self.page.locator(".thumbnails img")).to_have_count(count)
        for image in self.page.locator(".thumbnails img").all():
            expect(image).to_have_js_property("complete", True)
            assert image.evaluate("image => image.naturalWidth") > 0

    @property
    def question(self) -> Locator:
        """The field of the question."""
        return self.page.get_by_role("textbox", name="Question", exact=True)

    def send(self, question: str) -> None:
        """Asks."""
        self.question.fill(question)
        self.button("Send").click()

    def ask(self, question: str, *, ends: str = "done", answers: int = 1) -> list[Locator]:
        """Asks, and waits for the answers' end; returns the turn's answers."""
        self.send(question)
        return self.answers(ends=ends, count=answers)

    def set(self, **options: str) -> None:
        """Fills in fields of the settings: their labels, with _ for spaces."""
        self.button("Settings").click()
        for name, entry in options.items():
            self.page.get_by_label(name.replace("_", " ")).fill(entry)
        self.page.keyboard.press("Escape")

    def answers(self, *, ends: str = "done", count: int = 1) -> list[Locator]:
        """Waits until the last turn's answers have ended; returns them."""
        last = self.page.locator(".transcript > section").last.locator(".answer")
        expect(last).to_have_count(count)
        for answer in last.all():
            expect(answer).to_have_class(f"answer {ends}")
        return last.all()


@contextmanager
def visit(browser: Browser, url: str, form: str = "desktop", **options: Any) -> Iterator[Visit]:
    """Opens the page without anything that earlier visits left.

    At the end nothing was amiss: no error, no breach of the content security policy, no dialog, and
    no request to another host.
    """
    context = browser.new_context(**FORMS[form], **options)
    context.set_default_timeout(1000 * MOST_SECONDS)
    visited = Visit(context.new_page(), url)
    yield visited
    context.close()
    assert visited.faults == []


def text_of(answer: Locator) -> str:
    """An answer's text, as the page has it."""
    return answer.locator(".text").text_content() or ""
