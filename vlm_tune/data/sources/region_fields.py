"""A row's boxes and points, and the places that its texts have for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from vlm_tune.data.images.decode import image_size
from vlm_tune.data.regions import Region, Size
from vlm_tune.data.sources.fields import BOX_FIELDS, POINT_FIELDS, is_empty
from vlm_tune.data.types import Media, Message
from vlm_tune.errors import DataError, is_finite
from vlm_tune.quoting import quoted

Row = Mapping[str, Any]
Unit = Literal["pixels", "norm1", "norm1000"]

OBJECTS = "objects"
BOX = "<bbox>"
POINT = "<point>"
PHRASE = "<ref-object>"
_MARK = re.compile(r"(?P<slashes>\\*)(?P<mark><bbox>|<point>|<ref-object>)")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
UNITS: dict[str, Unit] = {"real": "pixels", "norm1": "norm1", "norm1000": "norm1000"}
"""ms-swift's names of units (`bbox_type`)."""
SLACK = 1.0
"""Pixels by which a box may reach over the edge of its image: annotations are rounded."""


@dataclass(frozen=True)
class BoxOptions:
    """How a source writes boxes: two corners, or a corner and the sides; and the unit."""

    form: Literal["xyxy", "xywh"] = "xyxy"
    unit: Unit = "pixels"


@dataclass
class _Listed:
    """The regions and phrases of a row, as it has them.

    `images` are the numbers of the images that boxes are of, `unread` says which fields hold
    something else.
    """

    boxes: list[Any]
    points: list[Any]
    phrases: list[str]
    images: list[Any]
    unit: Unit
    unread: list[str]


def region_marks(row: Row) -> list[str]:
    """A mark for each of a row's boxes, then for each of its points.

    Raises `DataError` where their fields can't be read.
    """
    listed = _listed(row, BoxOptions())
    if not (listed.boxes or listed.points) and listed.unread:
        raise DataError(listed.unread[0], kind="box")
    return [BOX] * len(listed.boxes) + [POINT] * len(listed.points)


def has_marks(text: str) -> bool:
    """Whether a text has a mark of a region or phrase."""
    return _MARK.search(text) is not None


def escaped_regions(text: str) -> str:
    """The text in which every mark of a region is plain text."""
    return _MARK.sub(lambda mark: mark["slashes"] * 2 + "\\" + mark["mark"], text)


def with_regions(messages: Sequence[Message], row: Row, options: BoxOptions) -> list[Message]:
    r"""The turns, with each mark of a box, point or phrase replaced by the row's next one.

    Marks are `<bbox>`, `<point>` and `<ref-object>`, as in ms-swift, and plain text in rows without
    a field for them; `\<bbox>` is the text itself.

    Raises:
        DataError: marks and regions differ in number, or a region is none or outside its image.
    """
    listed = _listed(row, options)
    if not (listed.boxes or listed.points or listed.phrases or _lacks_regions(messages, row)):
        return list(messages)
    media = [
        picture
        for each in messages
        for part in each.parts
        if isinstance(part, Media)
        for picture in part.pictures
    ]
    replacer = _Replacer(listed, media, options)
    replaced = [replace(each, parts=tuple(replacer.parts(each.parts))) for each in messages]
    replacer.check()
    return replaced


class _Replacer:
    """Replaces the marks of a row's texts, one after the other."""

    def __init__(self, listed: _Listed, media: Sequence[Media], options: BoxOptions) -> None:
        self.listed = listed
        self.media = media
        self.options = options
        self.marks = {BOX: 0, POINT: 0, PHRASE: 0}
        self._sizes: dict[int, Size] = {}

    def parts(self, parts: Sequence[str | Media]) -> Iterator[str | Media]:
        """The parts of a turn, with regions as parts of their own."""
        for part in parts:
            if isinstance(part, Media):
                yield part
            else:
                yield from self._pieces(part)

    def _pieces(self, text: str) -> Iterator[str]:
        piece = ""
        end = 0
        for match in _MARK.finditer(text):
            piece += text[end : match.start()] + "\\" * (len(match["slashes"]) // 2)
            end = match.end()
            mark = match["mark"]
            if len(match["slashes"]) % 2:
                piece += mark
                continue
            number = self.marks[mark]
            self.marks[mark] += 1
            if mark == PHRASE:
                phrases = self.listed.phrases
                piece += phrases[number] if number < len(phrases) else ""
                continue
            regions = self.listed.boxes if mark == BOX else self.listed.points
            if number < len(regions):  # otherwise `check` reports it
                if piece:
                    yield piece
                piece = ""
                yield self._region(regions[number], mark, number)
        piece += text[end:]
        if piece:
            yield piece

    def check(self) -> None:
        """Raises `DataError` where marks and fields differ in number."""
        for mark, fields, noun in (
            (BOX, self.listed.boxes, "box" if len(self.listed.boxes) == 1 else "boxes"),
            (POINT, self.listed.points, "point" if len(self.listed.points) == 1 else "points"),
            (PHRASE, self.listed.phrases, f"ref of `{OBJECTS}`"),
        ):
            marks = self.marks[mark]
            # Phrases may be mere labels of boxes.
            if marks != len(fields) and (marks or mark != PHRASE):
                unread = "".join(f"; {each}" for each in self.listed.unread)
                raise DataError(
                    f"{len(fields)} {noun} and {marks} {mark} mark{'s' if marks != 1 else ''} in "
                    f"the texts{unread} (\\{mark} is the text itself; `ignore` passes over a "
                    "field)",
                    kind="box",
                )

    def _region(self, value: Any, mark: str, number: int) -> Region:
        sizes = (4, 2) if mark == BOX else (2,)
        if (
            not isinstance(value, list | tuple)
            or len(value) not in sizes
            or not all(_is_number(each) for each in value)
        ):
            wanted = "[x1, y1, x2, y2]" if mark == BOX else "[x, y]"
            raise DataError(f"a {_noun(sizes)} must be {wanted}, got {_shown(value)}", kind="box")
        size = self._size(number if mark == BOX else None)
        noun = _noun((len(value),))
        scale = {"pixels": (1.0, 1.0), "norm1": size, "norm1000": (size[0] / 1e3, size[1] / 1e3)}
        across, down = scale[self.listed.unit]
        numbers = [each * (down if place % 2 else across) for place, each in enumerate(value)]
        if self.options.form == "xywh" and len(numbers) == 4:
            numbers[2:] = [numbers[0] + numbers[2], numbers[1] + numbers[3]]
        shown = f"the {noun} {_shown(value)} of an image of {size[0]}x{size[1]}"
        if len(numbers) == 4 and not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
            raise DataError(
                f"{shown} is empty, or its corners are swapped: expected x1 < x2 and y1 < y2 "
                "(box_format: xywh reads a corner and the sides)",
                kind="box",
            )
        bounds = [size[place % 2] for place in range(len(numbers))]
        if any(
            not -SLACK <= each <= bound + SLACK for each, bound in zip(numbers, bounds, strict=True)
        ):
            raise DataError(
                f"{shown} is outside of it: coordinates are pixels of the upright original "
                "(box_unit says otherwise)",
                kind="box",
            )
        clipped = [
            min(max(each, 0.0), float(bound)) for each, bound in zip(numbers, bounds, strict=True)
        ]
        if len(clipped) == 4 and not (clipped[0] < clipped[2] and clipped[1] < clipped[3]):
            raise DataError(f"{shown} is outside of it", kind="box")
        return Region(clipped, size)

    def _size(self, number: int | None) -> Size:
        """The size of the image that a box of this number is of; for None that of the first."""
        images = self.listed.images
        image = 0 if number is None or not images else images[min(number, len(images) - 1)]
        if not any(each.modality == "image" for each in self.media):
            raise DataError("a box or point and no image", kind="image_count")
        if (
            not isinstance(image, int)
            or isinstance(image, bool)
            or image not in range(len(self.media))
        ):
            raise DataError(
                f"`image_id` {quoted(image)} is not one of the row's {len(self.media)} images, "
                "which are numbered from 0",
                kind="box",
            )
        if image not in self._sizes:
            self._sizes[image] = image_size(self.media[image])
        return self._sizes[image]


def _shown(value: Any) -> str:
    """A value for a message; the numbers of a list too."""
    if not isinstance(value, list | tuple):
        return quoted(value)
    more = ", ..." if len(value) > 6 else ""
    return f"[{', '.join(map(quoted, value[:6]))}{more}]"


def _noun(sizes: Sequence[int]) -> str:
    return "box" if 4 in sizes else "point"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)


# --- fields ---------------------------------------------------------------------------------------


def _listed(row: Row, options: BoxOptions) -> _Listed:
    objects = _decoded(OBJECTS, row.get(OBJECTS))
    boxes = _values(row, BOX_FIELDS)
    points = _values(row, POINT_FIELDS)
    unread = [*_unread(row, BOX_FIELDS, "[x1, y1, x2, y2]"), *_unread(row, POINT_FIELDS, "[x, y]")]
    if is_empty(objects):
        return _Listed(boxes, points, [], [], options.unit, unread)
    if not isinstance(objects, Mapping):
        raise DataError(
            f"`{OBJECTS}` must be an object of `ref` and `bbox`, got {quoted(objects)} "
            "(`ignore` passes over it)",
            kind="box",
        )
    if boxes:
        raise DataError(f"boxes in `{OBJECTS}` and in a field of their own", kind="box")
    lists = {name: objects.get(name) or [] for name in ("bbox", "ref", "image_id")}
    for name, value in lists.items():
        if not isinstance(value, list):
            raise DataError(f"`{OBJECTS}.{name}` must be a list, got {quoted(value)}", kind="box")
    unit = objects.get("bbox_type") or None
    if unit is not None and unit not in UNITS:
        raise DataError(
            f"`{OBJECTS}.bbox_type` {quoted(unit)} is not one of {', '.join(UNITS)}", kind="box"
        )
    images = lists["image_id"]
    if images and len(images) != len(lists["bbox"]):
        raise DataError(
            f"`{OBJECTS}` has {len(lists['bbox'])} bbox and {len(images)} image_id", kind="box"
        )
    phrases = lists["ref"]
    if not all(isinstance(phrase, str) for phrase in phrases):
        raise DataError(
            f"`{OBJECTS}.ref` must be a list of texts, got {quoted(phrases)}", kind="box"
        )
    return _Listed(
        lists["bbox"],
        points,
        phrases,
        images,
        options.unit if unit is None else UNITS[unit],
        unread,
    )


def _lacks_regions(messages: Sequence[Message], row: Row) -> bool:
    """Whether texts have marks of a kind that the row has a field for, which holds none."""
    fields = {BOX: (*BOX_FIELDS, OBJECTS), POINT: POINT_FIELDS, PHRASE: (OBJECTS,)}
    lacking = {
        mark
        for mark, names in fields.items()
        if any(name in row and (is_empty(row[name]) or _is_place(row[name])) for name in names)
    }
    texts = (part for each in messages for part in each.parts if isinstance(part, str))
    return bool(lacking) and any(
        len(match["slashes"]) % 2 == 0 and match["mark"] in lacking
        for text in texts
        for match in _MARK.finditer(text)
    )


def _is_place(value: Any) -> bool:
    """Whether a value seems to be a place that is written in another way than as a list."""
    return isinstance(value, Mapping) or (isinstance(value, str) and len(NUMBER.findall(value)) > 1)


def _unread(row: Row, fields: Sequence[str], expected: str) -> list[str]:
    """Lines on fields that hold a place, but no list."""
    values = {name: _decoded(name, row.get(name)) for name in fields}
    return [
        f"`{name}` must be {expected} or a list of them, got {quoted(value)}"
        for name, value in values.items()
        if not is_empty(value) and _is_place(value)
    ]


def _values(row: Row, fields: Sequence[str]) -> list[Any]:
    """The boxes or points of the one field that has some; one alone is a list of one."""
    present = {}
    for name in fields:
        value = _decoded(name, row.get(name))
        # A number or a word under such a name is metadata.
        if isinstance(value, list | tuple) and len(value):
            present[name] = list(value)
    if len(present) > 1:
        raise DataError(f"both {' and '.join(f'`{name}`' for name in present)}", kind="box")
    for values in present.values():
        return [values] if not isinstance(values[0], list | tuple) else values
    return []


def _decoded(name: str, value: Any) -> Any:
    """A field's value; tables store lists and objects as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"`{name}` is not JSON: {quoted(value)}", kind="not_json") from None
    return value
