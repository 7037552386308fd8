"""The page of a check: whatever its rows, sources and names hold is text."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.helpers.html_page import HOSTILE, Page, assert_harmless
from vlm_tune.data.types import Conversation, Media, Message
from vlm_tune.data_check.findings import CheckReport, Finding, Histogram, PartReport, SourceReport
from vlm_tune.data_check.padding import Waste
from vlm_tune.errors import DataError
from vlm_tune.rendering import check_page


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()


def checked(text: str, monkeypatch: pytest.MonkeyPatch) -> CheckReport:
    """A report whose every text is `text`; its odd rows are a conversation and a bad row."""
    image = Media(png(), label=text)
    rows: dict[tuple[str, int], Conversation | DataError] = {
        (text, 1): Conversation("", (Message(text, (image, text)),)),
        (text, 2): DataError("", content={text: text}),
    }
    monkeypatch.setattr(check_page, "read_rows", lambda _, names: {key: rows[key] for key in names})
    source = SourceReport(text, text, 1234, 1, 1, 0, 0, 0, 0, {})
    histogram = Histogram(0, 10, [2, 1, 0, 1], 7, 12, 39)
    padding = [Waste(text, 0.25, 1234.5)]
    part = PartReport(text, text, [source], 3, histogram, None, padding, 0.5, 4)
    read: Any = SimpleNamespace(stage=text, name=text)
    return CheckReport(
        name=text,
        sample=1000,
        parts=[part],
        errors=[Finding(text, row, "role", text, text, text) for row in (0, 1, 2)],
        error_counts=Counter(role=3),
        read=[read],
    )


def written(report: CheckReport, path: Path) -> tuple[str, Page]:
    check_page.write_page(report, path)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_is_never_markup(
    hostile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plain = written(checked("x", monkeypatch), tmp_path / "plain.html")
    text, page = written(checked(hostile, monkeypatch), tmp_path / "page.html")
    assert "<" not in hostile or hostile not in text
    assert_harmless(page)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert [set(each) for _, each in page.elements] == [set(each) for _, each in plain.elements]
    assert page.all("img")[0]["alt"] == Path(hostile).name
    # title, h1; the finding without a row: stage, part, source, message; the part: stage, part,
    # source, form, a way to batch; each odd row: stage, part, source, message; role and text
    assert page.words.replace(repr({hostile: hostile}), "").count(hostile) == 2 + 4 + 5 + 2 * 4 + 2


@pytest.mark.parametrize("text", ["a\x1b[31mb", "a\x00b", "a\u202eb", "a\r\n\tb  c"])
def test_control_characters_stay_text(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_page.write_page(checked(text, monkeypatch), tmp_path / "page.html")
    assert f"<dd>{text}</dd>".encode() in (tmp_path / "page.html").read_bytes()


def test_shows_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, page = written(checked("x", monkeypatch), tmp_path / "page.html")
    words = " ".join(page.words.split())
    for phrase in (
        "x: check x a sample: the first 1,000 rows of each source",
        "Errors 3 Warnings 0 Rows 1,234",
        "kind found meaning role 3 a missing or unknown role x x: x: x",
        "x: x 3 question-answer pairs, 4 steps, 0.50 ms a row",
        "Tokens a row 7 to 39, median 12 0 to 9 2 10 to 19 1 20 to 29 0 30 to 39 1",
        "padded tokens a question padding x 1,234.5 25.0%",
        "A look at the odd rows 2 of 3 x x: x, row 1 role x x x",
        "no image x x: x, row 2 role x row {'x': 'x'}",
    ):
        assert phrase in words
    assert [each["style"] for each in page.all("i")] == [
        f"width:{share}%" for share in ("100.0", "50.0", "0.0", "50.0", "25.0")
    ]
