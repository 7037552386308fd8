"""Marks in texts: where images stand, and how a text says `<image>` itself."""

from __future__ import annotations

import pytest

from vlm_tune.data.chat.image_marks import escaped_marks, joined_marks, split_marks


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("what?", ["what?"]),
        ("<image>", ["", "image", ""]),
        ("a <image>\n\nb<image>", ["a ", "image", "\nb", "image", ""]),
        (r"say \<image> in HTML", ["say <image> in HTML"]),
        ("\\<image>\nthen <image>", ["<image>\nthen ", "image", ""]),
        (r"C:\\<image>", ["C:" + "\\", "image", ""]),
        (r"\\\<image>", ["\\<image>"]),
        (r"\n \image> \\ <image", [r"\n \image> \\ <image"]),
        (r"<video> \<video>", [r"<video> \<video>"]),
    ],
)
def test_a_mark_is_a_place_and_a_backslash_makes_it_text(text: str, pieces: list[str]) -> None:
    assert split_marks(text) == pieces
    # Back again: marks are at odd places, and an empty text is no part.
    texts = [
        (piece, "") if place % 2 else ("text", escaped_marks(piece))
        for place, piece in enumerate(pieces)
    ]
    assert split_marks(joined_marks([each for each in texts if each != ("text", "")])) == pieces


def test_videos_have_marks_where_there_are_videos() -> None:
    assert split_marks(r"<video>\<video><image>", kinds=("image", "video")) == [
        "",
        "video",
        "<video>",
        "image",
        "",
    ]
