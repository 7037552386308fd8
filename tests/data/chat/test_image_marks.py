"""Marks in texts: where images stand, and how a text says `<image>` itself."""

from __future__ import annotations

import pytest

from vlm_tune.data.chat.image_marks import split_marks


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


def test_videos_have_marks_where_there_are_videos() -> None:
    assert split_marks(r"<video>\<video><image>", video=True) == [
        "",
        "video",
        "<video>",
        "image",
        "",
    ]
