"""Rows of `match` are scored with images that they do not match as well."""

from __future__ import annotations

import pytest

from tests.helpers.tiny_models import png
from vlm_tune.config.objectives import Contrastive, LanguageModeling, Matching
from vlm_tune.data.prepare.forms import form_fault
from vlm_tune.data.prepare.mismatches import with_mismatches
from vlm_tune.data.types import Conversation, Media, Message, References

IMAGES = [png((shade, 0, 0)) for shade in (10, 90, 170)]


def row(
    name: str, image: Media, caption: str, category: str = "", form: str = "match"
) -> Conversation:
    return Conversation(
        name,
        (Message("user", (image, caption)), Message("assistant", ("yes",))),
        category,
        references=References(form, choices=("yes", "no"), chosen=0),
        rejected=Message("assistant", ("no",)),
    )


def test_each_row_is_followed_by_one_with_the_next_image_of_another_caption() -> None:
    rows = [
        row("a", IMAGES[0], "red"),
        row("b", IMAGES[1], "red"),
        row("c", IMAGES[2], "blue"),
        row("d", IMAGES[1], "blue"),
    ]
    paired = with_mismatches(rows)
    assert [each.id for each in paired[::2]] == ["a", "b", "c", "d"]
    assert [each.id for each in paired[1::2]] == [f"{each.id}#mismatch" for each in rows]
    shown = {each.id: each.media for each in paired}
    # The second image is shown with both captions.
    assert shown["a#mismatch"] == shown["b#mismatch"] == (IMAGES[2],)
    assert shown["c#mismatch"] == shown["d#mismatch"] == (IMAGES[0],)
    first = paired[1]
    assert first.question == "red" and first.messages[-1].text == "no"
    assert first.references.chosen == 1 and first.rejected == rows[0].messages[-1]


@pytest.mark.parametrize(
    "rows",
    [
        [row("a", IMAGES[0], "red"), row("b", IMAGES[1], "red")],
        [row("a", IMAGES[0], "red", "color"), row("b", IMAGES[1], "box", "shape")],
        [row("a", IMAGES[0], "red", form="caption"), row("b", IMAGES[1], "blue", form="caption")],
        [],
    ],
)
def test_rows_without_a_negative_and_other_forms_stay_as_they_are(rows: list[Conversation]) -> None:
    assert with_mismatches(rows) == rows


def test_objective_and_form_belong_together() -> None:
    matching = Matching(kind="matching")
    assert form_fault(matching, "match", "train") is None
    assert "docs/contrastive.md" in str(form_fault(matching, "caption", "train"))
    for other in (LanguageModeling(), Contrastive(kind="contrastive")):
        assert "objective.kind: matching" in str(form_fault(other, "match", "train"))
        assert form_fault(other, "match", "test") is None
