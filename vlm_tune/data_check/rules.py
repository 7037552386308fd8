"""Checks of one part's rows: unusable, odd, repeated and leaked rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlm_tune.data.batching.bounds import unkept_bounds
from vlm_tune.data.batching.sampler import Plan, Sizes
from vlm_tune.data.prepare.judgements import judgement_notes
from vlm_tune.data.prepare.worker import BAD, LEFT_OUT
from vlm_tune.data.sources.registry import open_source
from vlm_tune.data.types import Conversation
from vlm_tune.data_check.findings import LISTED, CheckReport, Part
from vlm_tune.data_check.leakage import Leaks, Place, repeats
from vlm_tune.errors import DataError

TINY = 16
HUGE = 25_000_000
NARROW = 8
PLAIN = 2
"""Bounds of odd images.

A side under TINY pixels, over HUGE pixels in all, one side over NARROW times the other, and at most
PLAIN levels between the lightest and the darkest cell.
"""


def check_rows(report: CheckReport, part: Part) -> None:
    """Reports bad and overlong rows, odd images, control tokens in texts, and repeated rows."""
    prepared = part.prepared
    data = part.recipe.data
    status = prepared.column("status")[part.all_places]
    bad = part.all_places[status == BAD]
    left_out = part.all_places[status == LEFT_OUT]
    _report_bad(report, part, bad)
    _report_overlong(report, part, left_out)
    if data.on_bad_row != "fail" and len(bad) > data.max_bad_rows:
        message = f"{len(bad):,} bad rows, more than data.max_bad_rows {data.max_bad_rows:,}"
        report.add_whole(part.stage, part.name, "too_many_bad", message)
    if not len(part.rows.places):
        message = (
            f"no row is left to {'train on' if part.name == 'train' else 'score'}, of "
            f"{len(part.all_places):,}"
        )
        report.add_whole(part.stage, part.name, "no_rows", message)
        return
    _report_images(report, part)
    controls = [
        (place, text) for place, text in _texts_of("controls", part, part.rows.places) if text
    ]
    report.add(
        part,
        "control_text",
        [(place, f"{text}: kept as plain text") for place, text in controls],
        error=False,
    )
    if part.name == "train":
        report.add(
            part,
            "duplicate",
            _pointed(
                "repeats row", {place: (part.rows, first) for place, first in repeats(part.rows)}
            ),
            error=False,
        )


def _texts_of(column: str, part: Part, places: np.ndarray) -> Iterator[tuple[int, str]]:
    return zip(places.tolist(), part.prepared.values(column, places), strict=True)


def _report_bad(report: CheckReport, part: Part, places: np.ndarray) -> None:
    """Reports unusable rows: as errors if they stop the run, as warnings if it leaves them out."""
    prepared = part.prepared
    data = part.recipe.data
    kinds = prepared.values("kind", places)
    messages = prepared.values("message", places)
    rows: dict[tuple[str, bool], list[tuple[int, str]]] = {}
    for place, kind, message in zip(places.tolist(), kinds, messages, strict=True):
        # With `overlong: fail` a long row stops the run, whatever `on_bad_row` says.
        stops = data.on_bad_row == "fail" or kind == "overlong"
        rows.setdefault((kind, stops), []).append((place, message))
    for (kind, stops), bad_rows in rows.items():
        report.add(part, kind, bad_rows, error=stops)


def _report_overlong(report: CheckReport, part: Part, left_out: np.ndarray) -> None:
    """Reports rows over max_length that are not bad rows, with what is done with each."""
    prepared = part.prepared
    data = part.recipe.data
    longest, examples, over = (
        prepared.column(name) for name in ("longest", "examples", "overlong")
    )
    dropped = np.array(
        [place for place, kind in _texts_of("kind", part, left_out) if kind == "overlong"],
        dtype=np.int64,
    )
    usable_overlong = part.rows.places[longest[part.rows.places] > data.max_length]
    if part.name != "train":
        limit = f"data.max_length {data.max_length:,}"
        prompts = prepared.column("prompt")
        # Rows that are held out of train are usable, but not scored with a prompt that is too long.
        held_out = part.all_places if part.name != prepared.part else part.all_places[:0]
        long = np.union1d(dropped, held_out[prompts[held_out] > data.max_length])
        rows = [
            (place, f"the prompt has {prompts[place]:,} tokens, more than {limit}: not scored")
            for place in long.tolist()
        ]
        rows += [
            (
                place,
                f"prompt and answer together have more tokens than {limit}: scored all the same",
            )
            for place in usable_overlong.tolist()
        ]
        report.add(part, "overlong", rows, error=False)
        return
    rows = []
    for place in np.sort(np.concatenate([dropped, usable_overlong])).tolist():
        parts = int(examples[place] + over[place])
        fate = f"split into {parts}" if data.overlong == "split" else "questions trimmed"
        if over[place]:
            fate = (
                "dropped"
                if not examples[place]
                else f"{int(over[place])} of {parts} examples dropped"
            )
        rows.append(
            (
                place,
                f"{longest[place]:,} tokens, more than data.max_length {data.max_length:,}: {fate}",
            )
        )
    report.add(part, "overlong", rows, error=False)


def _report_images(report: CheckReport, part: Part) -> None:
    """Reports images that are likely mistakes, each once, with the first row that shows it."""
    odd_rows: dict[str, list[tuple[int, str]]] = {}
    for number, place in part.rows.first_rows.items():
        media = part.prepared.media_rows[number]
        if media.media.modality != "image":
            continue
        width = media.info.width
        height = media.info.height
        cells = np.frombuffer(media.info.thumbnail, dtype=np.uint8).reshape(-1, 3).astype(int)
        odd = {
            "image_tiny": min(width, height) < TINY,
            "image_huge": width * height > HUGE,
            "image_narrow": max(width, height) > NARROW * min(width, height),
            "image_plain": (cells.max(0) - cells.min(0)).max() <= PLAIN,
        }
        for kind, is_odd in odd.items():
            if is_odd:
                odd_rows.setdefault(kind, []).append(
                    (place, f"{media.media.name}: {width}x{height}")
                )
    for kind, rows in odd_rows.items():
        report.add(part, kind, rows, error=False)


def report_leaks(report: CheckReport, part: Part, leaks: Leaks) -> None:
    """Reports rows of an evaluated part that share content with training rows."""
    heard = part.prepared.media_rows and part.prepared.media_rows[0].media.modality == "audio"
    medium = "audio clip" if heard else "image"
    for kind, rows, what in (
        ("leak_row", leaks.rows, f"its text and {medium}s are those of"),
        ("leak_image", leaks.images, f"an {medium} of it is also in"),
        ("leak_look", leaks.looks, "an image of it looks like one of"),
    ):
        report.add(part, kind, _pointed(f"{what} training row", rows), error=kind != "leak_look")


def _pointed(what: str, rows: dict[int, Place]) -> list[tuple[int, str]]:
    """Returns each row's place with a message that names the row it has something in common with.

    Rows past the first `LISTED` get an empty message.
    """
    places = sorted(rows)
    named = [(*rows[place][0].name(rows[place][1]), place) for place in places[:LISTED]]
    return [(place, f"{what} {row} of {source}") for source, row, place in named] + [
        (place, "") for place in places[LISTED:]
    ]


def check_split(report: CheckReport, part: Part) -> None:
    """Reports parts held out of train that are empty or far from their share."""
    for name in ("validation", "test"):
        if problem := part.prepared.split_problem(name):
            report.add_whole(part.stage, name, "split", problem, "data.split")


def check_batches(report: CheckReport, part: Part) -> None:
    """Reports rows over the bounds of a batch, and an epoch smaller than one global batch."""
    train = part.recipe.train
    for line in unkept_bounds(part.recipe, part.prepared):
        report.add_whole(part.stage, part.name, "bound", line, error=False)
    for line in judgement_notes(part.recipe.objective, part.prepared):
        report.add_whole(part.stage, part.name, "judgements", line, error=False)
    if not len(part.prepared) or train.batch_tokens is not None:
        return
    units = sum(
        Plan(part.prepared, part.recipe.data, Sizes(train.batch_size), part.recipe.seed).counts
    )
    whole = train.batch_size * train.gradient_accumulation
    if units < whole:
        called = "images with their rows" if part.recipe.data.group == "image" else "rows"
        message = (
            f"{units} {called} an epoch, fewer than one global batch of {whole} (train.batch_size "
            f"{train.batch_size} x train.gradient_accumulation {train.gradient_accumulation}): "
            f"every batch is smaller than the recipe says"
        )
        report.add_whole(part.stage, part.name, "few_rows", message, error=False)


def read_rows(
    part: Part, names: set[tuple[str, int]]
) -> dict[tuple[str, int], Conversation | DataError]:
    """Reads rows of a part again from their sources, by (source, row).

    Only chunks that may hold one of them are read.
    """
    rows: dict[tuple[str, int], Conversation | DataError] = {}
    numbers = sorted(row for _, row in names)
    for config in part.prepared.sources if names else ():
        reader = open_source(config, seed=part.recipe.seed)
        for chunk in reader.chunks():
            if any(chunk.first_row <= number < chunk.first_row + chunk.rows for number in numbers):
                for row in reader.conversations(chunk):
                    key = (row.source, row.row)
                    if key in names:
                        rows[key] = row  # type: ignore[index]
            if len(rows) == len(names):
                return rows
    return rows
