"""The files of the server's page: nothing from elsewhere, and libraries as published."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

import vlm_tune.serving

PAGE = Path(vlm_tune.serving.__file__).with_name("page")
VENDOR = PAGE / "vendor"
SOURCES = sorted(path for path in PAGE.glob("*.*") if path.suffix in (".html", ".css", ".js"))
REFERENCE = re.compile(r"""(?:\bfrom |\bimport\(|\bsrc=|\bhref=|\burl\()["']([^"'$]+)["']""")
LONGEST_FILE = 450


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_references_are_to_files_of_the_page(path: Path) -> None:
    text = path.read_text()
    references = [name for name in REFERENCE.findall(text) if not name.startswith("#")]
    assert references or path.suffix == ".css" or path.name == "preferences.js"
    for name in references:
        assert (path.parent / name).is_file(), name
    assert not re.search(r"https?://|innerHTML|\beval\(", text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_sources_have_readable_lengths(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= LONGEST_FILE
    assert max(map(len, lines)) <= 100


def test_libraries_are_as_published_with_their_licences() -> None:
    packages = json.loads((VENDOR / "packages.json").read_text())
    sums = {name: digest for package in packages for name, digest in package["sha256"].items()}
    modules = sorted(path.name for path in VENDOR.glob("*.js"))
    assert modules == sorted(sums)
    for name in modules:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == sums[name]
    for package in packages:
        assert (VENDOR / f"LICENSE-{package['name']}.txt").read_text().strip()
