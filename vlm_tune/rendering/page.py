"""Writes HTML pages from `templates/`: each one file without scripts or network."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_tune.data.audio.decode import is_audio
from vlm_tune.data.images.decode import decode_image
from vlm_tune.data.regions import mentions
from vlm_tune.data.types import Media
from vlm_tune.errors import DataError
from vlm_tune.paths import write_whole

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL.Image import Image

THUMBNAIL = 192
SHOWN = 112
"""Pixels of an embedded image's longer side, and of the square in which it is shown."""
GREEN = "#00a000"
RED = "#e00000"
LONG = 120
"""A sample with a longer text, in characters, takes the page's whole width."""


@dataclass(frozen=True)
class Thumbnail:
    """An image's file name and its PNG in base64; `tiny` where the page enlarges its pixels."""

    name: str
    png: str
    tiny: bool


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        loader=PackageLoader("vlm_tune.rendering"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "thousands": "{:,}".format}
    return environment


def write_html(path: Path, template: str, values: Mapping[str, Any]) -> None:
    """Renders a template of `templates/` into a file; text among `values` is escaped."""
    page = _environment().get_template(template).render(values, shown=SHOWN)
    # JSON may hold lone surrogates, which UTF-8 can't encode.
    write_whole(path, page, errors="replace")


def percent(share: float, digits: int = 1) -> str:
    """Formats a share in percent, with 100 only for a share of 1 and 0 only for a share of 0."""
    shown = round(100 * share, digits)
    least = 10.0**-digits
    if 0 < share < 1 and shown in (0, 100):
        return f"<{least:.{digits}f}%" if shown == 0 else f">{100 - least:.{digits}f}%"
    return f"{shown:.{digits}f}%"


def is_long(texts: Iterable[str]) -> bool:
    """Whether a sample with these texts takes the page's whole width."""
    return any(len(text) > LONG for text in texts)


Marked = tuple[str, str]
"""A text with boxes and points in pixels of an image, and the colour in which they are drawn."""


def regions_drawn(size: Any, expected: Any, answers: Sequence[Any]) -> list[Marked]:
    """The texts whose boxes are drawn on a sample's image: the reference in green, answers in red.

    `size` is that of the image which the reference's boxes are of; None where it has none.
    """
    if size is None:
        return []
    return [*((str(answer), RED) for answer in answers if answer), (str(expected), GREEN)]


def thumbnail(media: Media | None, marked: Sequence[Marked] = ()) -> Thumbnail | str:
    """Returns the image as a thumbnail, or the reason why there is none, as for audio.

    Args:
        media: The image or audio clip.
        marked: Texts whose boxes and points are drawn on it.
    """
    from PIL import Image

    try:
        if media is None:
            return "no image"
        encoded = media.read()
        # A run's files name their media without saying what they are.
        if is_audio(encoded):
            return f"audio: {Path(media.name).name}"
        image = decode_image(encoded, media.name)
    except (OSError, ValueError, DataError):
        return "the image can't be read"
    tiny = max(image.size) <= SHOWN
    size = image.size
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    _draw(image, size, marked)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return Thumbnail(Path(media.name).name, base64.b64encode(stream.getvalue()).decode(), tiny)


def _draw(image: Image, original: tuple[int, int], marked: Sequence[Marked]) -> None:
    """Draws boxes and points, in pixels of the original's size, on a smaller copy of an image."""
    from PIL import ImageDraw

    pen = ImageDraw.Draw(image)
    for text, colour in marked:
        for mention in mentions(text):
            placed = [
                number * image.size[place % 2] / original[place % 2]
                for place, number in enumerate(mention.coordinates)
            ]
            if len(placed) == 4:
                pen.rectangle(placed, outline=colour)
            else:
                x, y = placed
                pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colour)
