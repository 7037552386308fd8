"""Writes HTML pages from `templates/`: each one file without scripts or network."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_tune.data.images.decode import decode_image
from vlm_tune.data.types import Media
from vlm_tune.errors import DataError

if TYPE_CHECKING:
    from jinja2 import Environment

THUMBNAIL = 192
SHOWN = 112
"""Pixels of an embedded image's longer side, and of the square in which it is shown."""
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
    path.write_text(page, encoding="utf-8", errors="replace")


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


def thumbnail(media: Media | None) -> Thumbnail | str:
    """Returns the image as a thumbnail, or the reason why there is none."""
    from PIL import Image

    try:
        if media is None:
            return "no image"
        image = decode_image(media.read(), media.name)
    except (OSError, ValueError, DataError):
        return "the image can't be read"
    tiny = max(image.size) <= SHOWN
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return Thumbnail(Path(media.name).name, base64.b64encode(stream.getvalue()).decode(), tiny)
