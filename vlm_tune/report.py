"""The report of a run: one HTML file without scripts or network, its charts inline SVG, its images inline PNG."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_tune.data.images import decode_image
from vlm_tune.errors import DataError, Problem, RecipeError
from vlm_tune.recipe_yaml import read_yaml_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THUMBNAIL, SHOWN = 192, 112
"""Pixels of an embedded image's longer side, and of the square it is shown in."""
LONG = 120
"""Characters from which a sample takes the page's whole width."""

# Matplotlib can't write CSS variables: charts are drawn in these stand-ins, which are then exchanged for the theme's inks.
SOFT, RULE, TRAIN, VALIDATION = "#010101", "#020202", "#030303", "#040404"
INKS = {SOFT: "var(--soft)", RULE: "var(--rule)", TRAIN: "var(--train)", VALIDATION: "var(--validation)"}

HEAD = """<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">"""

STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1f2428; --soft: #5d666e; --rule: #dfe2e4;
  --train: #2b6cb0; --validation: #c05d1a; --right: #1d7a4c; --wrong: #b23a30; }
@media (prefers-color-scheme: dark) { :root { --page: #15181b; --card: #1d2125; --ink: #e2e5e8; --soft: #9aa4ad; --rule: #343a40;
  --train: #6cabea; --validation: #e59c5e; --right: #62c592; --wrong: #ef857b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; overflow-wrap: anywhere; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.6rem; font-weight: 600; line-height: 1.25; }
h2 { margin: 2.5rem 0 .25rem; font-size: 1.1rem; font-weight: 600; }
p { margin: 0; }
.soft, figcaption, dt, th { color: var(--soft); font-size: .87rem; }
.card, .sample { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.card { margin: .75rem 0 0; padding: .9rem 1rem; }
.figures, .charts, .samples { display: grid; gap: .75rem; margin: .75rem 0 0; }
.figures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 10rem), 1fr)); margin-top: 1.25rem; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.samples { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.figures > *, .charts > *, dd { margin: 0; min-width: 0; }
.figures b { display: block; font-size: 1.55rem; font-weight: 600; line-height: 1.35; }
figure { display: flex; flex-direction: column; }
figure svg { width: 100%; height: auto; margin-top: auto; padding-top: .5rem; }
figure svg text { font-family: inherit !important; }
figcaption b { display: block; color: var(--ink); font-weight: 600; }
.key { margin-right: .75rem; display: inline-block; }
.line::before, .dots::before { content: ""; display: inline-block; width: .9em; height: .2em; margin: 0 .35em .25em 0;
  background: var(--train); }
.dots::before { width: .55em; height: .55em; margin-bottom: .05em; border-radius: 50%; background: var(--validation); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; overflow-wrap: normal; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { font-weight: 500; }
tr:last-child > td { border-bottom: 0; }
tbody th { color: var(--ink); font-weight: 600; padding-top: 1rem; }
.number { text-align: right; }
.bar { width: 45%; min-width: 5rem; vertical-align: middle; padding-right: 0; }
.bar span, .bar i { display: block; height: .5rem; border-radius: 2px; background: var(--rule); }
.bar i { background: var(--train); }
.sample { display: flex; gap: .9rem; padding: .8rem; }
.picture { flex: none; width: SHOWNpx; height: SHOWNpx; border-radius: 4px; background: var(--rule); object-fit: contain; }
.tiny { image-rendering: pixelated; }
p.picture { display: grid; place-items: center; padding: .5rem; text-align: center; font-size: .8rem; color: var(--soft); }
.sample > div { min-width: 0; flex: 1; }
.long { grid-column: 1 / -1; }
.sample dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .75rem; margin: .35rem 0 0; align-items: baseline; }
.sample dd { max-height: 9em; overflow-y: auto; white-space: pre-wrap; }
.right { color: var(--right); }
.wrong { color: var(--wrong); }
ul { margin: 0; padding-left: 1.1rem; }
summary { cursor: pointer; font-weight: 600; }
pre { margin: .75rem 0 0; overflow-x: auto; overflow-wrap: normal; font: .82rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
""".replace("SHOWN", str(SHOWN))


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run's folder from the files there, and returns its path; what is missing is left out.

    Raises `RecipeError` for a folder without recipe.yaml.
    """
    if not (run / "recipe.yaml").is_file():
        raise RecipeError([Problem(str(run), "not the folder of a run: it has no recipe.yaml")])
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    try:
        values = read_yaml_text(recipe, "recipe.yaml").value
    except RecipeError:
        values = {}
    name = str(values.get("name") or run.resolve().name)
    events, result = _events(run / "log.jsonl"), _read(run / "result.json")
    result = result if isinstance(result, dict) else {}
    parts = [
        _header(name, values.get("seed"), events, result),
        _answer_types(result.get("by_answer_type")),
        *(_stage(stage) for stage in _stages(events)),
        _tuning(_rows(_read(run / "tuning.json"))),
        _samples(run, _rows(_read(run / "samples.json"))),
        _notes(events),
        f'<details class="card"><summary>Recipe</summary><pre>{escape(recipe)}</pre></details>',
    ]
    head = f"<head>\n{HEAD}\n<title>{escape(name)}</title>\n<style>{STYLE}</style>\n</head>"
    page = "\n".join(['<!doctype html>\n<html lang="en">', head, "<body>\n<main>", *filter(None, parts), "</main>\n</body>\n</html>\n"])
    path = run / "report.html"
    # JSON may hold lone surrogates, which UTF-8 can't.
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """The value of a JSON file; None where it is missing or can't be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return None


def _events(path: Path) -> list[dict[str, Any]]:
    """The log's events; lines that can't be read (the last, if the run was killed) are passed over."""
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return _rows(events)


def _rows(value: Any) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@dataclass
class _Stage:
    """What the log says of one stage: its stage event, and its other events by step."""

    number: int
    name: str = ""
    start: dict[str, Any] = field(default_factory=dict)
    train: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluate: dict[int, dict[str, Any]] = field(default_factory=dict)


def _stages(events: Sequence[dict[str, Any]]) -> list[_Stage]:
    """Stages in order; of a step that a resumed run took again, the later event counts."""
    stages: dict[int, _Stage] = {}
    for event in events:
        number, step, kind = event.get("stage"), _number(event.get("step")), event.get("event")
        if not isinstance(number, int) or kind not in ("stage", "train", "evaluate"):
            continue
        stage = stages.setdefault(number, _Stage(number))
        stage.name = str(event.get("name") or stage.name)
        if kind == "stage":
            stage.start = event
        elif step is not None:
            (stage.train if kind == "train" else stage.evaluate)[int(step)] = event
    return [stages[number] for number in sorted(stages)]


def _points(events: dict[int, dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(step, value) for step in sorted(events) if (value := _number(events[step].get(key))) is not None]


# --- parts -----------------------------------------------------------------------------------------------------------


def _percent(share: float, digits: int = 1) -> str:
    """A share in percent that says 100 only of all and 0 only of none."""
    shown, least = round(100 * share, digits), 10.0**-digits
    if 0 < share < 1 and shown in (0, 100):
        return f"<{least:.{digits}f}%" if shown == 0 else f">{100 - least:.{digits}f}%"
    return f"{shown:.{digits}f}%"


def _duration(seconds: float) -> str:
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _count(value: Any, unit: str = "") -> str:
    """A whole number with its unit in the plural or singular; nothing for what is no number."""
    number = _number(value)
    return "" if number is None else f"{number:,.0f} {unit if number == 1 or not unit else unit + 's'}".rstrip()


def _section(title: str, body: str, note: str = "") -> str:
    said = f'<p class="soft">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"


def _table(columns: Sequence[tuple[str, str]], bodies: Sequence[str]) -> str:
    """A table in a card; a column is its class and its title."""
    head = "".join(f'<th class="{kind}">{title}</th>' for kind, title in columns)
    return f'<div class="card wide"><table><thead><tr>{head}</tr></thead>{"".join(bodies)}</table></div>'


def _header(name: str, seed: Any, events: Sequence[dict[str, Any]], result: dict[str, Any]) -> str:
    """The run's name, and the headline figures."""
    facts = [] if seed is None else [f"seed {seed}"]
    times = [moment for event in events if (moment := _number(event.get("time"))) is not None and 0 <= moment < 1e11]
    if times:
        facts.append(f"started {datetime.fromtimestamp(times[0], UTC):%Y-%m-%d %H:%M} UTC")
    figures = []
    if (accuracy := _number(result.get("accuracy"))) is not None:
        asked = _count(result.get("n"), "question")
        figures.append(("Test accuracy", _percent(accuracy, 2), f"of {asked}" if asked else ""))
    if (loss := _number(result.get("loss"))) is not None:
        figures.append(("Test loss", f"{loss:.4g}", "per supervised token"))
    if (seconds := _number(result.get("seconds"))) is not None:
        figures.append(("Training time", _duration(seconds), "all stages"))
    if (memory := _number(result.get("peak_memory_mb"))) is not None:
        figures.append(("Peak memory", f"{memory:,.0f} MB", "of the process"))
    cards = [
        f'<div class="card"><dt>{label}</dt><dd><b>{escape(value)}</b><span class="soft">{note}</span></dd></div>'
        for label, value, note in figures
    ]
    listed = f'<dl class="figures">{"".join(cards)}</dl>' if cards else ""
    return f'<header><h1>{escape(name)}</h1><p class="soft">{escape(", ".join(facts))}</p>{listed}</header>'


def _answer_types(table: Any) -> str:
    rows = []
    for name, found in table.items() if isinstance(table, dict) else ():
        accuracy = _number(found.get("accuracy")) if isinstance(found, dict) else None
        if accuracy is not None:
            bar = f'<td class="bar"><span><i style="width:{100 * accuracy:.1f}%"></i></span></td>'
            numbers = "".join(f'<td class="number">{escape(text)}</td>' for text in (_percent(accuracy), _count(found.get("n"))))
            rows.append(f"<tr><td>{escape(name)}</td>{numbers}{bar}</tr>")
    columns = [("", "answer type"), ("number", "accuracy"), ("number", "questions"), ("", "")]
    return _section("Test accuracy by answer type", _table(columns, ["<tbody>", *rows, "</tbody>"])) if rows else ""


def _stage(stage: _Stage) -> str:
    """A stage's facts and its row of charts."""
    loss, rate, speed = (_points(stage.train, key) for key in ("loss", "learning_rate", "questions_per_s"))
    held_out, accuracy = (_points(stage.evaluate, key) for key in ("loss", "accuracy"))
    last = max([0, *stage.train, *stage.evaluate])
    planned = [stage.start.get("steps"), *(event.get("of") for event in stage.train.values())]
    steps = round(max([last, *filter(None, map(_number, planned))]))
    facts = [_count(steps, "step"), _count(stage.start.get("questions"), "question"), _count(stage.start.get("images"), "image")]
    if last < steps:
        facts.append(f"the log ends at step {last:,}")
    charts = []
    if loss or held_out:
        keys = [("line", f"training, last {loss[-1][1]:.3g}")] if loss else []
        if held_out:
            step, lowest = min(held_out, key=lambda point: point[1])
            keys.append(("dots", f"validation, lowest {lowest:.3g} at {step:,}"))
        charts.append(_chart("Loss", keys, [_Panel("loss", loss, held_out)], steps))
    if accuracy:
        # Of equal scores the later checkpoint is the one kept.
        step, best = max(accuracy, key=lambda point: (point[1], point[0]))
        panel = _Panel("accuracy", [], [(step, 100 * value) for step, value in accuracy])
        charts.append(_chart("Accuracy", [("dots", f"validation, best {_percent(best)} at {step:,}")], [panel], steps))
    panels = [_Panel(kind, points, []) for kind, points in (("learning rate", rate), ("questions/s", speed)) if points]
    if panels:
        keys = [("", f"highest {max(value for _, value in rate):.3g}")] if rate else []
        if speed:
            keys.append(("", f"mean {sum(value for _, value in speed) / len(speed):,.4g} questions/s"))
        charts.append(_chart("Learning rate and speed", keys, panels, steps))
    title = f"Stage {stage.number + 1}" + (f": {stage.name}" if stage.name else "")
    body = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    return _section(title, body, ", ".join(filter(None, facts)))


def _tuning(stages: Sequence[dict[str, Any]]) -> str:
    bodies = []
    for stage in stages:
        rows = _rows(stage.get("rows"))
        if len(rows) > 1:
            together = {key: sum(_number(row.get(key)) or 0 for row in rows) for key in ("trained", "total")}
            rows.append({"match": "together", **together})
        head = f'<tr><th colspan="7" scope="rowgroup">{escape(str(stage.get("stage", "")))}</th></tr>'
        bodies.append(f"<tbody>{head}{''.join(map(_tuning_line, rows))}</tbody>" if rows else "")
    numbers = [("number", title) for title in ("learning rate", "trained", "of", "share")]
    table = _table([("", "parameters"), ("", "how"), *numbers, ("", "detail")], bodies)
    return _section("What was trained", table) if any(bodies) else ""


def _tuning_line(row: dict[str, Any]) -> str:
    rate, trained, total = (_number(row.get(key)) for key in ("learning_rate", "trained", "total"))
    share = _percent(trained / total, 2) if trained is not None and total else ""
    match, how, detail = (f"<td>{escape(str(row.get(key) or ''))}</td>" for key in ("match", "how", "detail"))
    figures = ("" if rate is None else f"{rate:g}", _count(trained), _count(total), share)
    return f"<tr>{match}{how}{''.join(f'<td class=number>{escape(figure)}</td>' for figure in figures)}{detail}</tr>"


def _notes(events: Sequence[dict[str, Any]]) -> str:
    notes = [f"<li>{escape(str(event['text']))}</li>" for event in events if event.get("event") == "note" and event.get("text")]
    return _section("Notes", f'<div class="card"><ul>{"".join(notes)}</ul></div>') if notes else ""


# --- samples ---------------------------------------------------------------------------------------------------------


def _samples(run: Path, rows: Sequence[dict[str, Any]]) -> str:
    """The panel of samples, with how many were right before and after."""
    counts = []
    for column in ("before", "after"):
        marks = [mark for row in rows if (mark := _is_right(row, column)) is not None]
        if marks:
            counts.append(f"{column} training {sum(marks)} of {len(marks)} right")
    cards = []
    for row in rows:
        kind = "sample long" if any(len(str(row.get(key))) > LONG for key in ("question", "expected", "before", "after")) else "sample"
        answers = f"<dt>expected</dt><dd>{_text(row.get('expected'))}</dd>{_answer(row, 'before')}{_answer(row, 'after')}"
        words = f"<p>{_text(row.get('question'))}</p><dl>{answers}</dl>"
        cards.append(f'<article class="{kind}">{_picture(run, row)}<div>{words}</div></article>')
    return _section("Samples", f'<div class="samples">{"".join(cards)}</div>', ", ".join(counts)) if rows else ""


def _is_right(row: dict[str, Any], column: str) -> bool | None:
    # Loads torch, so not before there is an answer to judge; a second rule here could contradict the accuracy above.
    from vlm_tune.evaluation import normalise

    given, expected = row.get(column), row.get("expected")
    return None if given is None or expected is None else normalise(str(given)) == normalise(str(expected))


def _text(value: Any) -> str:
    return escape(str(value)) if value not in (None, "") else f'<span class="soft">{"–" if value is None else "(empty)"}</span>'


def _answer(row: dict[str, Any], column: str) -> str:
    name, mark = {None: ("", ""), True: ("right", "✓ "), False: ("wrong", "✗ ")}[_is_right(row, column)]
    shown = f'<span role="img" aria-label="{name}">{mark}</span>' if mark else ""
    return f'<dt>{column}</dt><dd class="{name}">{shown}{_text(row.get(column))}</dd>'


def _picture(run: Path, row: dict[str, Any]) -> str:
    """The sample's image as an inline thumbnail, or that there is none."""
    from PIL import Image

    path = run / str(row.get("image") or "")
    try:
        image = decode_image(path.read_bytes(), path.name)
    except (OSError, ValueError, DataError):
        return f'<p class="picture">{"the image can&#x27;t be read" if row.get("image") else "no image"}</p>'
    kind = "picture tiny" if max(image.size) <= SHOWN else "picture"
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return f'<img class="{kind}" alt="{escape(path.name)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


# --- charts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panel:
    """One pair of axes against the step: a line of training figures, dots of validation figures."""

    kind: str
    line: list[tuple[int, float]]
    dots: list[tuple[int, float]]


def _chart(title: str, keys: Sequence[tuple[str, str]], panels: Sequence[_Panel], steps: int) -> str:
    """A figure element: caption with the colour key, and the panels as inline SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text, in the page's font; with a fixed salt an id stands for the same shape in every chart of the page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vlm_tune", "font.size": 11}):
        figure = Figure(figsize=(4.2, 2.5), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for panel, ax in zip(panels, axes, strict=True):
            _draw(ax, panel, steps)
        axes[-1].set_xlabel("step", color=SOFT)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for stand_in, ink in INKS.items():
        svg = svg.replace(stand_in, ink)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{title} against step"', 1)
    names = "".join(f'<span class="key {kind}">{escape(text)}</span>' for kind, text in keys)
    return f'<figure class="card"><figcaption><b>{title}</b>{names}</figcaption>{svg}</figure>'


def _draw(ax: Axes, panel: _Panel, steps: int) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if panel.line:
        ax.plot(*zip(*panel.line, strict=True), color=TRAIN, linewidth=1.4, marker="o" if len(panel.line) == 1 else "", markersize=4)
    if panel.dots:
        ax.plot(*zip(*panel.dots, strict=True), color=VALIDATION, linewidth=0.8, marker="o", markersize=3.5, clip_on=False, zorder=3)
    values = [value for _, value in (*panel.line, *panel.dots)]
    low, high = min(values), max(values)
    ax.set_xlim(0, max(steps, 1))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    shape = {"accuracy": "{:.0f}%", "questions/s": "{:,.4g}"}.get(panel.kind, "{:.4g}")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shape.format(value)))
    if panel.kind == "accuracy":
        ax.set_ylim(max(10 * math.floor((low - 2) / 10), 0), min(10 * math.ceil((high + 2) / 10), 100))
    elif panel.kind == "loss" and 0 < 20 * low < high:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_ylabel("log scale", color=SOFT)
    elif panel.kind != "loss":
        ax.set_ylim(0, 1.1 * high if high > 0 else 1)
        ax.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        ax.set_title(panel.kind, loc="left", color=SOFT, fontsize=10, pad=3)
    ax.grid(axis="y", color=RULE, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(colors=SOFT, length=0)
    for side, spine in ax.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(RULE)
