"""HTML pages taken apart, and texts that would act if a page did not escape them."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% include 'base.html' %}",
)
VOID = {"meta", "img", "br", "input", "link", "hr"}
ACTIVE = {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
"""Elements that load, send or lead elsewhere; no page has one."""


class Page(HTMLParser):
    """Every element with its attributes and text; fails on tags that don't nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(filter(None, self.text))


def assert_harmless(page: Page) -> None:
    """Nothing of a page runs, and it refers to itself and to inline images alone."""
    assert not {tag for tag, _ in page.elements} & ACTIVE
    attributes = [pair for _, each in page.elements for pair in each.items()]
    assert not any(name.startswith("on") for name, _ in attributes)
    for name, reference in attributes:
        if name in ("href", "xlink:href"):
            assert (reference or "").startswith("#")
        if name == "src":
            assert (reference or "").startswith("data:image/png;base64,")
