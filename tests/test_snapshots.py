"""Commands, public Python names and all messages are those of the snapshots in tests/golden/."""

from __future__ import annotations

import difflib

from tests.helpers.snapshots import GOLDEN, snapshots


def test_what_a_user_reads_is_as_it_was_reviewed() -> None:
    texts = snapshots()
    stored = {
        str(path.relative_to(GOLDEN)): path.read_text(encoding="utf-8")
        for path in GOLDEN.rglob("*.txt")
    }
    changes = [
        line
        for name in sorted(texts.keys() | stored.keys())
        for line in difflib.unified_diff(
            stored.get(name, "").splitlines(),
            texts.get(name, "").splitlines(),
            name,
            name,
            n=1,
            lineterm="",
        )
    ]
    assert not changes, "\n".join([*changes, "`make snapshots` takes the new texts: review them"])
