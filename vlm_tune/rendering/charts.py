"""Charts as inline SVG in the page's colors: curves against the step, and scatters of trials."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib can't write CSS variables: charts are drawn in these stand-in colors, which are then
# replaced by the theme's.
SOFT, RULE, TRAIN, VALIDATION = "#010101", "#020202", "#030303", "#040404"
RUN_INKS = ("#050505", "#060606", "#070707", "#080808", "#090909", "#0a0a0a")
WIDTH, HEIGHT, FONT = 302.0, 180.0, 11.0
"""A chart's width, height and text size, in points."""
INKS = {
    SOFT: "var(--soft)",
    RULE: "var(--rule)",
    TRAIN: "var(--train)",
    VALIDATION: "var(--validation)",
    **{ink: f"var(--run-{number})" for number, ink in enumerate(RUN_INKS, 1)},
}


@dataclass(frozen=True)
class Stroke:
    """How a curve is drawn.

    Attributes:
        ink: its stand-in color.
        width: the line's width, in points.
        dashes: lengths of dash and gap in turn, in points; none for a solid line.
        marker: the mark of a point, by Matplotlib's name.
        marks: "all" points are marked, "some", or only a "lone" one.
        place: of a stroke with some marks, its place among the others: marks of curves that lie on
            each other are at different points.
    """

    ink: str
    width: float
    dashes: tuple[float, ...] = ()
    marker: str = "o"
    marks: Literal["all", "some", "lone"] = "lone"
    place: int = 0


LINE = Stroke(TRAIN, 1.4)
DOTS = Stroke(VALIDATION, 0.8, marks="all")
COMPLETE = Stroke(VALIDATION, 0)
PRUNED = Stroke(SOFT, 0, marker="X")
BEST = Stroke(TRAIN, 0, marker="D")
"""The marks of a sweep's trials."""
SOME_MARKS = 6
"""Marks of a curve of which some points are marked."""
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (8, 2, 1.5, 2), (3, 3), (10, 3))
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "X": "✖"}
"""Each mark, and the character that shows it in a key."""
RUN_STROKES = tuple(
    Stroke(ink, 1.3, dashes, marker, "some", place)
    for place, (ink, dashes, marker) in enumerate(zip(RUN_INKS, DASHES, MARKERS, strict=True))
)
"""The strokes of overlaid runs, which differ by dashes and marks too: not all eyes tell colors."""


@dataclass(frozen=True)
class Curve:
    """Figures by step, and how they are drawn."""

    points: Sequence[tuple[int, float]]
    stroke: Stroke


@dataclass(frozen=True)
class Panel:
    """One pair of axes against the step, and the curves in it, of which each has a point."""

    kind: str
    curves: Sequence[Curve]


@dataclass(frozen=True)
class Cloud:
    """Points of a scatter, and how each is marked."""

    points: Sequence[tuple[float, float]]
    stroke: Stroke


@dataclass(frozen=True)
class Axis:
    """The horizontal axis of a scatter.

    Attributes:
        title: its name.
        names: of the places 0, 1, ... if these stand for choices; else none.
        ends: the numbers that it goes from and to, without names.
        log: whether it is logarithmic.
    """

    title: str
    names: Sequence[str] = ()
    ends: tuple[float, float] = (0, 1)
    log: bool = False


@dataclass(frozen=True)
class Key:
    """A line of a chart's key: its text, and the class or the picture that shows the curve."""

    text: str
    kind: str = ""
    swatch: Markup | None = None


@dataclass(frozen=True)
class Chart:
    """A chart's title, its key, and its panels as inline SVG."""

    title: str
    keys: Sequence[Key]
    svg: Markup
    """Not escaped: Matplotlib wrote it, and escaped its texts."""


def swatch(stroke: Stroke) -> Markup:
    """A short piece of a curve with its mark, as inline SVG for a key; no line without a width."""
    dashes = " ".join(f"{length * 1.33:g}" for length in stroke.dashes)
    line = Markup('<path d="M0 6H34" stroke="{}" stroke-width="2" stroke-dasharray="{}"/>')
    return Markup(
        '<svg class="swatch" viewBox="0 0 34 12" aria-hidden="true">{line}'
        '<text x="17" y="6" fill="{ink}" text-anchor="middle" dominant-baseline="central">'
        "{mark}</text></svg>"
    ).format(
        line=line.format(INKS[stroke.ink], dashes) if stroke.width else "",
        ink=INKS[stroke.ink],
        mark=MARKERS[stroke.marker],
    )


def beside_swatch(stroke: Stroke, text: str) -> Markup:
    """A text, which is escaped, after a swatch."""
    return Markup("{}{}").format(swatch(stroke), text)


def chart(title: str, keys: Sequence[Key], panels: Sequence[Panel], steps: int) -> Chart:
    """Draws panels, one below the other, over the steps of a stage."""
    with _figure() as figure:
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for panel, ax in zip(panels, axes, strict=True):
            _draw(ax, panel, steps)
        axes[-1].set_xlabel("step", color=SOFT)
        figure.subplots_adjust(**_margins(list(axes), f"{steps:,}"))
        return Chart(title, keys, _svg(figure, f"{title} against step"))


def scatter(
    title: str, keys: Sequence[Key], clouds: Sequence[Cloud], axis: Axis, *, share: bool
) -> Chart:
    """Draws points, of which there are some; the vertical axis is in percent for a `share`."""
    with _figure() as figure:
        ax = figure.subplots()
        for cloud in clouds:
            ax.plot(
                *zip(*cloud.points, strict=True),
                color=cloud.stroke.ink,
                linestyle="",
                marker=cloud.stroke.marker,
                markersize=5,
                clip_on=False,
                zorder=3,
            )
        last = _draw_axis(ax, axis)
        scores = [score for cloud in clouds for _, score in cloud.points]
        if not share and 0 < 20 * min(scores) < max(scores):
            _draw_log_scale(ax, min(scores), max(scores))
        else:
            _draw_scores(ax, "{:.0f}%" if share else "{:.4g}")
        _draw_frame(ax)
        ax.set_xlabel(axis.title, color=SOFT)
        figure.subplots_adjust(**_margins([ax], last))
        return Chart(title, keys, _svg(figure, f"{title} against {axis.title}"))


@contextmanager
def _figure() -> Iterator[Figure]:
    """An empty figure of a chart's size, in the context in which it is drawn and written.

    Text stays text, in the page's font. With a fixed salt, an id names the same shape in every
    chart of the page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "vlm_tune", "font.size": FONT}
    ):
        yield Figure(figsize=(WIDTH / 72, HEIGHT / 72))


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as inline SVG, named for who can't see it."""
    file = io.StringIO()
    figure.savefig(
        file,
        format="svg",
        transparent=True,
        metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
    )
    svg = file.getvalue()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for stand_in, ink in INKS.items():
        svg = svg.replace(stand_in, ink)
    opening = Markup('<svg role="img" aria-label="{}"').format(label)
    return Markup(svg.replace("<svg", opening, 1))


def _margins(axes: Sequence[Axes], last: str) -> dict[str, float]:
    """The margins around the panels, as shares of the figure's size.

    Half of `last`, the last label of the horizontal axis, stands beyond its end.

    They are computed from the labels' lengths: Matplotlib's own layouts draw everything a second
    time to measure it, and in a font that is not the page's.
    """
    labels = [
        label
        for ax in axes
        for label in ax.yaxis.get_major_formatter().format_ticks(list(ax.get_yticks()))
    ]
    digit = 0.64 * FONT
    titled = any(ax.get_title(loc="left") for ax in axes)
    left = (
        digit * max(map(len, labels))
        + 8
        + (1.6 * FONT if any(ax.get_ylabel() for ax in axes) else 0)
    )
    right = max(digit * len(last) / 2, 6)
    top = 2 * FONT if titled else FONT
    bottom = 3.6 * FONT
    panel = (HEIGHT - top - bottom - 2.2 * FONT * (len(axes) - 1)) / len(axes)
    return {
        "left": left / WIDTH,
        "right": 1 - right / WIDTH,
        "top": 1 - top / HEIGHT,
        "bottom": bottom / HEIGHT,
        "hspace": 2.2 * FONT / panel,
    }


def _draw(ax: Axes, panel: Panel, steps: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for curve in panel.curves:
        _draw_curve(ax, curve)
    values = [value for curve in panel.curves for _, value in curve.points]
    low = min(values)
    high = max(values)
    ax.set_xlim(0, max(steps, 1))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _draw_scores(ax, {"share": "{:.0f}%", "questions/s": "{:,.4g}"}.get(panel.kind, "{:.4g}"))
    if panel.kind == "share":
        ax.set_ylim(
            max(10 * math.floor((low - 2) / 10), 0), min(10 * math.ceil((high + 2) / 10), 100)
        )
    elif panel.kind == "loss" and 0 < 20 * low < high:
        _draw_log_scale(ax, low, high)
    elif panel.kind not in ("loss", "score", "margin"):
        ax.set_ylim(0, 1.1 * high if high > 0 else 1)
        ax.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        ax.set_title(panel.kind, loc="left", color=SOFT, fontsize=10, pad=3)
    _draw_frame(ax)


def _draw_scores(ax: Axes, shape: str) -> None:
    """Sets the ticks of the vertical axis, whose labels have that shape."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shape.format(value)))


def _draw_log_scale(ax: Axes, low: float, high: float) -> None:
    """Makes the vertical axis logarithmic, for values from `low` to `high`."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("log scale", color=SOFT)


def _draw_axis(ax: Axes, axis: Axis) -> str:
    """Sets the horizontal axis of a scatter; returns its last label."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if axis.names:
        ax.set_xlim(-0.5, len(axis.names) - 0.5)
        # Matplotlib takes text between dollars for a formula.
        names = [name.replace("$", r"\$") for name in axis.names]
        ax.set_xticks(range(len(names)), names)
        return ""
    if axis.log:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(numticks=5))
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlim(*axis.ends)
    return f"{axis.ends[1]:g}"


def _draw_frame(ax: Axes) -> None:
    """Draws the grid, and of the frame the lower side alone."""
    ax.grid(axis="y", color=RULE, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(colors=SOFT, length=0)
    ax.tick_params(axis="x", pad=5)
    for side, spine in ax.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(RULE)


def _draw_curve(ax: Axes, curve: Curve) -> None:
    stroke = curve.stroke
    count = len(curve.points)
    every = slice(None)
    if stroke.marks == "some" and count > SOME_MARKS:
        apart = -(-count // SOME_MARKS)
        # Steps of the golden ratio lie far from each other, however many there are.
        every = slice(round(0.382 * stroke.place * apart) % apart, None, apart)
    ax.plot(
        *zip(*curve.points, strict=True),
        color=stroke.ink,
        linewidth=stroke.width,
        linestyle=(0, stroke.dashes) if stroke.dashes else "-",
        marker=stroke.marker if count == 1 or stroke.marks != "lone" else "",
        markevery=every,
        markersize=3.5 if stroke.marks == "all" else 4,
        # A mark at the edge is whole.
        clip_on=stroke.marks == "lone",
        zorder=3 if stroke.marks == "all" else 2,
    )
