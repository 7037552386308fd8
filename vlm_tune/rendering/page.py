"""Common parts of the HTML pages: one file without scripts or network, with inline PNG images."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from vlm_tune.data.images.decode import decode_image
from vlm_tune.data.types import Media
from vlm_tune.errors import DataError

THUMBNAIL = 192
SHOWN = 112
"""Pixels of an embedded image's longer side, and of the square in which it is shown."""
LONG = 120
"""A sample with a longer text, in characters, takes the page's whole width."""


HEAD = """<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">"""

STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1f2428; \
--soft: #5d666e; --rule: #dfe2e4;
  --train: #2b6cb0; --validation: #c05d1a; --right: #1d7a4c; --wrong: #b23a30; }
@media (prefers-color-scheme: dark) { :root { --page: #15181b; --card: #1d2125; --ink: #e2e5e8; \
--soft: #9aa4ad; --rule: #343a40;
  --train: #6cabea; --validation: #e59c5e; --right: #62c592; --wrong: #ef857b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); \
font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; overflow-wrap: anywhere; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.6rem; font-weight: 600; line-height: 1.25; }
h2 { margin: 2.5rem 0 .25rem; font-size: 1.1rem; font-weight: 600; }
p { margin: 0; }
.soft, figcaption, dt, th { color: var(--soft); font-size: .87rem; }
.card, .sample { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.card { margin: .75rem 0 0; padding: .9rem 1rem; }
.figures, .charts, .samples { display: grid; gap: .75rem; margin: .75rem 0 0; }
.figures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 10rem), 1fr)); \
margin-top: 1.25rem; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.samples { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.figures > *, .charts > *, dd { margin: 0; min-width: 0; }
.figures b { display: block; font-size: 1.55rem; font-weight: 600; line-height: 1.35; }
figure { display: flex; flex-direction: column; }
figure svg { width: 100%; height: auto; margin-top: auto; padding-top: .5rem; }
figure svg text { font-family: inherit !important; }
figcaption b { display: block; color: var(--ink); font-weight: 600; }
.key { margin-right: .75rem; display: inline-block; }
.line::before, .dots::before { content: ""; display: inline-block; width: .9em; height: .2em; \
margin: 0 .35em .25em 0;
  background: var(--train); }
.dots::before { width: .55em; height: .55em; margin-bottom: .05em; border-radius: 50%; \
background: var(--validation); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; overflow-wrap: normal; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; white-space: nowrap; \
border-bottom: 1px solid var(--rule); }
th { font-weight: 500; }
tr:last-child > td { border-bottom: 0; }
tbody th { color: var(--ink); font-weight: 600; padding-top: 1rem; }
.number { text-align: right; }
.bar { width: 45%; min-width: 5rem; vertical-align: middle; padding-right: 0; }
.bar span, .bar i { display: block; height: .5rem; border-radius: 2px; background: var(--rule); }
.bar i { background: var(--train); }
.sample { display: flex; gap: .9rem; padding: .8rem; }
.picture { flex: none; width: SHOWNpx; height: SHOWNpx; border-radius: 4px; \
background: var(--rule); object-fit: contain; }
.tiny { image-rendering: pixelated; }
p.picture { display: grid; place-items: center; padding: .5rem; text-align: center; \
font-size: .8rem; color: var(--soft); }
.sample > div { min-width: 0; flex: 1; }
.long { grid-column: 1 / -1; }
.sample dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .75rem; \
margin: .35rem 0 0; align-items: baseline; }
.sample dd { max-height: 9em; overflow-y: auto; white-space: pre-wrap; }
.right { color: var(--right); }
.wrong { color: var(--wrong); }
ul { margin: 0; padding-left: 1.1rem; }
summary { cursor: pointer; font-weight: 600; }
pre { margin: .75rem 0 0; overflow-x: auto; overflow-wrap: normal; \
font: .82rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
""".replace("SHOWN", str(SHOWN))


def write_html(path: Path, title: str, parts: Iterable[str]) -> None:
    """Writes a page with the non-empty ones of `parts`."""
    head = f"<head>\n{HEAD}\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>"
    page = "\n".join(
        [
            '<!doctype html>\n<html lang="en">',
            head,
            "<body>\n<main>",
            *filter(None, parts),
            "</main>\n</body>\n</html>\n",
        ]
    )
    # JSON may hold lone surrogates, which UTF-8 can't encode.
    path.write_text(page, encoding="utf-8", errors="replace")


def percent(share: float, digits: int = 1) -> str:
    """Formats a share in percent, with 100 only for a share of 1 and 0 only for a share of 0."""
    shown = round(100 * share, digits)
    least = 10.0**-digits
    if 0 < share < 1 and shown in (0, 100):
        return f"<{least:.{digits}f}%" if shown == 0 else f">{100 - least:.{digits}f}%"
    return f"{shown:.{digits}f}%"


def section(title: str, body: str, note: str = "") -> str:
    """A section of the page: its title, an optional note, and its body as HTML."""
    note_html = f'<p class="soft">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{note_html}{body}</section>"


def table(columns: Sequence[tuple[str, str]], bodies: Sequence[str]) -> str:
    """A table in a card, of columns given as (class, title) and bodies given as HTML."""
    head = "".join(f'<th class="{kind}">{title}</th>' for kind, title in columns)
    return (
        f'<div class="card wide"><table><thead><tr>{head}</tr></thead>'
        f"{''.join(bodies)}</table></div>"
    )


def picture(media: Media | None) -> str:
    """The image as an inline thumbnail, or a text if there is none or it can't be read."""
    from PIL import Image

    try:
        if media is None:
            return '<p class="picture">no image</p>'
        image = decode_image(media.read(), media.name)
    except (OSError, ValueError, DataError):
        return '<p class="picture">the image can&#x27;t be read</p>'
    kind = "picture tiny" if max(image.size) <= SHOWN else "picture"
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    encoded = base64.b64encode(data.getvalue()).decode()
    return (
        f'<img class="{kind}" alt="{escape(Path(media.name).name)}" '
        f'src="data:image/png;base64,{encoded}">'
    )
