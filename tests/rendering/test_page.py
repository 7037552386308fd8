"""Templates: every value is escaped, and one that is missing is an error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

import vlm_tune
from tests.helpers.audio_samples import tone, wav
from tests.helpers.html_page import HOSTILE, Page
from vlm_tune.data.types import Media
from vlm_tune.rendering.page import Thumbnail, thumbnail, write_html

PACKAGE = Path(vlm_tune.__file__).parent
TEMPLATES = sorted((PACKAGE / "rendering" / "templates").iterdir())
HEADER = {"name": "a name", "note": "", "figures": []}


def test_a_missing_value_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UndefinedError, match="'note' is undefined"):
        write_html(tmp_path / "page.html", "base.html", {"name": "a name", "figures": []})
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("hostile", HOSTILE)
def test_headers_are_escaped(hostile: str, tmp_path: Path) -> None:
    figures = [(hostile, hostile, hostile)]
    header = {"name": hostile, "note": hostile, "figures": figures}
    write_html(tmp_path / "page.html", "base.html", header)
    page = Page((tmp_path / "page.html").read_text())
    write_html(tmp_path / "page.html", "base.html", {**HEADER, "figures": [("a", "b", "c")]})
    plain = Page((tmp_path / "page.html").read_text())
    assert page.elements == plain.elements
    assert page.words == " ".join([hostile] * 6)


def test_a_page_begins_as_the_check_of_its_path_expects(tmp_path: Path) -> None:
    write_html(tmp_path / "page.html", "base.html", HEADER)
    assert (tmp_path / "page.html").read_bytes().startswith(b"<!doctype html>\n<html ")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_templates_escape_everything_and_refer_to_nothing(template: Path) -> None:
    text = template.read_text(encoding="utf-8")
    assert not re.findall(r"\|\s*safe\b|autoescape|\braw\b|\bhref\b|\bon\w+=|<script|://", text)
    assert not re.findall(r"""=\{\{|='\{\{""", text), "attributes are in double quotes"
    assert max(map(len, text.splitlines())) <= 100


def test_charts_alone_are_markup() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert [name for name, text in texts.items() if "Markup(" in text] == ["charts.py"]


def test_thumbnail_names_are_escaped_in_attributes(tmp_path: Path) -> None:
    breakout = '"onload="alert(1)'
    row = {"place": "", "thumbnail": Thumbnail(breakout, "AA==", True), "turns": [], "long": False}
    row["finding"] = {"kind": "", "message": ""}
    values = {**HEADER, "levels": [], "parts": [], "odd_rows": [row], "shown_rows": ""}
    write_html(tmp_path / "page.html", "check.html", values)
    (image,) = Page((tmp_path / "page.html").read_text()).all("img")
    assert image == {
        "class": "picture tiny",
        "alt": breakout,
        "src": "data:image/png;base64,AA==",
    }


def test_a_clip_has_its_name_in_place_of_a_picture(tmp_path: Path) -> None:
    """A run's files name media alone, so it is told by its bytes."""
    (tmp_path / "low.wav").write_bytes(wav(tone()))
    assert thumbnail(Media(tmp_path / "low.wav")) == "audio: low.wav"
    assert thumbnail(Media(b"neither")) == "the image can't be read"
