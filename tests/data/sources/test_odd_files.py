"""Packed, wrapped, damaged or oddly named files are read, or named in one short message."""

from __future__ import annotations

import base64
import datetime
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

import vlm_tune
from tests.helpers.row_samples import file_source, good, read, write_rows, write_shard
from tests.helpers.tiny_models import parsed
from vlm_tune.config.data import FolderSource, WebDatasetSource
from vlm_tune.data.prepare.run import prepare, scratch_texts
from vlm_tune.data.sources.registry import open_source
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError
from vlm_tune.model.build import build_processor
from vlm_tune.quoting import QUOTED
from vlm_tune.rendering.check_text import show_check
from vlm_tune.rendering.samples import sample_tokens, show_samples

HALF = "\ud83d"
"""Half a surrogate pair, as JSON's \\ud83d gives it."""
VQA = {"image": "a.png", "question": "what color?", "answer": "red"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    return tmp_path


def recipe_on(tiny_recipe: Callable[..., str], source: str, more: str = "") -> Any:
    head, _, rest = tiny_recipe("causal").partition("data:\n")
    return parsed(f"{head}data:\n  train: [{source}]\n{more}{rest[rest.index('  template:') :]}")


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- packed and wrapped ------------------------------------------------------------------------

ROWS = [{**VQA, "id": f"q{number}", "question": f"what is {number}, é?"} for number in range(4500)]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv"])
def test_gzip_is_read_as_the_file_in_it(folder: Path, ending: str) -> None:
    plain = write_rows(folder / f"rows.{ending}", ROWS)
    expected = good(read(file_source(plain)))
    packed = folder / "packed" / f"rows.{ending}.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    reader = open_source(file_source(packed, image_root=str(folder)), seed=0)
    chunks = list(reader.chunks())
    assert len(chunks) == 3
    rows = [
        row for chunk in (chunks[2], chunks[0], chunks[1]) for row in reader.conversations(chunk)
    ]
    assert [row.messages for row in good(rows[500:] + rows[:500])] == [
        row.messages for row in expected
    ]
    assert {row.id for row in good(rows)} == {row.id for row in expected}
    # Its name need not say so.
    named = folder / f"named.{ending}"
    named.write_bytes(packed.read_bytes())
    assert len(good(read(file_source(named)))) == 4500


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_gzip_is_no_short_file(folder: Path, damage: str) -> None:
    data = bytearray(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)))
    if damage == "cut":
        del data[-200:]
    else:
        data[len(data) // 2] ^= 0xFF
    path = folder / "rows.jsonl.gz"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: the gzip file is cut or damaged"):
        read(file_source(path))


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda rows: {"version": 1, "data": rows, "info": {"a": [1, [2]]}},
        lambda rows: {"names": ["x", "y"], "é": rows, "empty": []},
        lambda rows: {"other": [{"x": 1}], "data": rows},
    ],
)
def test_a_list_of_rows_inside_an_object_is_read(
    folder: Path, wrap: Callable[[Any], Any], indent: int | None
) -> None:
    path = folder / "rows.json"
    path.write_text(json.dumps(wrap(ROWS), indent=indent, ensure_ascii=False))
    rows = good(read(file_source(path)))
    assert [row.row for row in rows] == list(range(1, 4501)) and rows[-1].id == "rows:q4499:4500"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "one.json",
            json.dumps(VQA, indent=1).encode(),
            "is one row over several lines, neither JSONL nor a list: put it in [ ]",
        ),
        (
            "two.json",
            json.dumps({"a": [VQA], "b": [VQA]}, indent=1).encode(),
            "contains several lists of objects: a, b",
        ),
        (
            "none.json",
            json.dumps({"a": 1, "b": [1]}, indent=1).encode(),
            "holds one JSON object (a, b) but no list of rows",
        ),
        ("cut.json", json.dumps({"data": [VQA] * 5}, indent=1).encode()[:-40], "not JSON: "),
        ("rows.jsonl", b"PK\x03\x04rest", "is a zip archive: unpack it"),
        ("rows.json", b"PAR1rest", "is a Parquet file: name it .parquet"),
        ("rows.csv", "a,b\n".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        ("rows.jsonl.zst", b"x", "the ending '.zst' is not one of .json"),
        ("rows.parquet.gz", b"x", "the ending '.gz' is not one of .json"),
    ],
)
def test_a_file_that_holds_no_rows_says_what_it_is(
    folder: Path, name: str, content: bytes, message: str
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(file_source(folder / name))
    assert caught.value.message.startswith(message) and caught.value.source == str(folder / name)


def test_a_tilde_is_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    lines(folder / "rows.jsonl", [VQA])
    assert good(read(file_source("~/rows.jsonl", image_root="~")))[0].media[0].name == str(
        folder / "a.png"
    )
    assert len(good(read(file_source("~/*.jsonl")))) == 1
    (folder / "classes" / "red").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "classes" / "red" / "1.png")
    assert len(good(read(FolderSource(kind="folder", path="~/classes")))) == 1
    with pytest.raises(DataError, match="no such file"):
        read(file_source("~nobody-of-this-name/rows.jsonl"))


def test_avif_images_are_read_wherever_images_are(folder: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(folder / "b.avif")
    shard = write_shard(
        folder / "s.tar",
        [{"avif": (folder / "b.avif").read_bytes(), "json": b'{"caption": "red"}'}],
    )
    (row,) = good(read(WebDatasetSource(kind="webdataset", path=str(shard))))
    assert len(row.media) == 1
    from vlm_tune.data.images.decode import decode_image

    data = (folder / "b.avif").read_bytes()
    assert decode_image(data).size == (40, 30)
    for end in range(0, len(data), 40):
        with pytest.raises(DataError):
            decode_image(data[:end])


# --- images in rows ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            {"foo": 1, "bar": 2},
            "the image is an object without `bytes`, `path` or `url`: a mapping with foo, bar",
        ),
        (
            "x" * 240_000,
            f"the image '{'x' * QUOTED}'... (240,000 characters) is no path: File name too long",
        ),
        ("/9j/" + "A" * 299, "the image is bad base64"),
        (5, "the image must be a path, a data URL or bytes, got 5"),
        (
            {"bytes": {"a": 1}},
            "the image must be a path, a data URL or bytes, got a mapping with a",
        ),
        ("no\x1b[31m.png", "no image 'no\\x1b[31m.png' under "),
        (HALF + ".png", "the image '\\ud83d.png' is no path: "),
    ],
)
def test_an_odd_image_is_named_in_few_words(folder: Path, image: Any, message: str) -> None:
    (error,) = read(file_source(lines(folder / "rows.jsonl", [{**VQA, "image": image}])))
    assert isinstance(error, DataError) and message in error.message and len(error.message) < 300
    assert error.message.isprintable()


def test_base64_without_a_header_is_an_image(folder: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((16, 16), 90).convert("RGB").save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    (row,) = good(read(file_source(lines(folder / "rows.jsonl", [{**VQA, "image": text}]))))
    assert row.media[0].source == buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "turn 1: `content` must be text or a list of parts, got nothing (null)"),
        ([None], "turn 1: a part must be an object with a `type`, got nothing (null)"),
        (
            [{"type": "text", "text": None}],
            "turn 1: a part of type text has a `text` and nothing else, got nothing (null)",
        ),
        ([{"type": "text", "text": "a", "image": "a.png"}], "got `image` beside it"),
        (
            [{"type": "image", "text": "a", "image": "a.png"}],
            "turn 1: a part of type image with a `text`",
        ),
        (
            [{"text": "a"}],
            "a part is text, image, image_url, video, audio or input_audio, got nothing (null)",
        ),
        ([{"type": "y" * 500}], f"got '{'y' * QUOTED}'... (500 characters)"),
    ],
)
def test_an_odd_content_is_named_in_few_words(folder: Path, content: Any, message: str) -> None:
    row = {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
    }
    (error,) = read(file_source(lines(folder / "rows.jsonl", [row])))
    assert isinstance(error, DataError) and message in error.message and len(error.message) < 300


# --- text that is none -------------------------------------------------------------------------

MESSAGES = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def spoilt(field: str) -> dict[str, Any]:
    """A good row with half a surrogate pair in one of its fields, or in a turn."""
    if field in ("role", "content"):
        turn = {"role": "user", "content": "q", field: f"x{HALF}"}
        return {"messages": [turn, MESSAGES["messages"][1]]}
    if field == "key":
        return {**VQA, f"k{HALF}": 1}
    return {**VQA, field: f"x{HALF}"}


@pytest.mark.parametrize(
    "field",
    [
        "id",
        "category",
        "question",
        "answer",
        "image",
        "unused",
        "key",
        "tools",
        "role",
        "content",
        "system",
    ],
)
@pytest.mark.parametrize("policy", ["fail", "skip", "quarantine"])
def test_half_a_character_anywhere_is_a_row_error_or_passes(
    folder: Path, tiny_recipe: Callable[..., str], field: str, policy: str
) -> None:
    good_row = MESSAGES if field in ("role", "content") else VQA
    path = lines(folder / "rows.jsonl", [good_row, spoilt(field), *[good_row] * 3])
    recipe = recipe_on(tiny_recipe, f"{{kind: file, path: {path}}}", f"  on_bad_row: {policy}\n")
    passes = field in ("unused", "key")
    console = Console(file=io.StringIO(), width=200)
    report = vlm_tune.check(recipe)
    show_check(console, report)
    json.dumps(report.summary(), ensure_ascii=False).encode()
    findings = [
        finding
        for finding in (*report.errors, *report.warnings)
        if finding.row == 2 and finding.kind != "duplicate"
    ]
    assert bool(findings) is not passes and (not findings or findings[0].message.isprintable())
    processor = build_processor(recipe, scratch_texts(recipe) if policy != "fail" or passes else [])
    if policy == "fail" and not passes:
        with pytest.raises(DataError, match=r"rows\.jsonl, row 2: "):
            prepare(recipe.data, recipe.data.train, processor, seed=0)
        return
    prepared = prepare(recipe.data, recipe.data.train, processor, seed=0)
    assert prepared.bad == (0 if passes else 1)
    for record in prepared.records(1):
        json.dumps(record, ensure_ascii=False).encode()
        assert json.loads(record["content"])


def test_names_of_files_that_are_no_text_are_read(
    folder: Path, tiny_recipe: Callable[..., str]
) -> None:
    odd = os.fsdecode(b"odd\xff.png")
    (folder / "a.png").rename(folder / odd)
    data = folder / os.fsdecode(b"rows\xff")
    data.mkdir()
    lines(
        data / os.fsdecode(b"r\xfe.jsonl"),
        [{**VQA, "image": odd}, {**VQA, "answer": None}, {**VQA, "image": odd}],
    )
    source = f"{{kind: file, path: '{folder}/rows*/*.jsonl', image_root: '{folder}'}}"
    recipe = recipe_on(tiny_recipe, source, "  on_bad_row: skip\n")
    prepared = prepare(
        recipe.data, recipe.data.train, build_processor(recipe, scratch_texts(recipe)), seed=0
    )
    assert len(prepared) == 2 and prepared.bad == 1 and prepared.media[0].source == folder / odd
    assert "odd\\udcff.png" in prepared.media[0].name
    report = vlm_tune.check(recipe)
    json.dumps(report.summary(), ensure_ascii=False).encode()
    assert next(each for each in report.warnings if each.row).source.endswith(
        "rows\\udcff/r\\udcfe.jsonl"
    )


def test_class_folders_and_members_of_shards_with_odd_names(folder: Path) -> None:
    classes = folder / "classes"
    (classes / os.fsdecode(b"red\xff")).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(classes / os.fsdecode(b"red\xff") / "1.png")
    with pytest.raises(
        DataError, match=r"the class folder 'red\\udcff' has a name that is no text; rename it"
    ):
        read(FolderSource(kind="folder", path=str(classes)))
    (classes / os.fsdecode(b"red\xff")).rename(classes / "red")
    (classes / "red" / "1.png").rename(classes / "red" / os.fsdecode(b"1\xff.png"))
    (row,) = good(read(FolderSource(kind="folder", path=str(classes))))
    assert (
        row.id == "classes/red/1\\udcff.png"
        and isinstance(row.media[0].source, Path)
        and row.media[0].source.is_file()
    )
    shard = folder / "s.tar"
    import tarfile

    with tarfile.open(shard, "w", encoding="utf-8", errors="surrogateescape") as archive:
        for name, content in (
            (b"x\xff.json", b'{"caption": "red"}'),
            (b"x\xff.png", (row.media[0].source).read_bytes()),
        ):
            member = tarfile.TarInfo(os.fsdecode(name))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (row,) = good(read(WebDatasetSource(kind="webdataset", path=str(shard))))
    assert row.id == "s:x\\udcff:1"


# --- cells of tables ---------------------------------------------------------------------------


def odd_table(path: Path) -> Path:
    """Rows with a column of dates of which one is out of range, and a text that is not UTF-8."""
    import pyarrow as pa
    from pyarrow import feather, parquet

    table = pa.table(
        {
            "image": ["a.png"] * 4,
            "question": pa.array([b"q1?", b"q2\xff?", b"q3?", b"q4?"], pa.binary()).view(
                pa.string()
            ),
            "answer": ["a", "b", "c", "d"],
            "day": pa.array([1, 2, 10**9, 4], pa.int32()).view(pa.date32()),
            "stamp": pa.array([1, 2, 2**60, 4], pa.int64()).view(pa.timestamp("ms")),
        }
    )
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        feather.write_feather(table, str(path), compression="uncompressed")
    return path


@pytest.mark.parametrize("ending", ["parquet", "feather"])
def test_a_cell_that_can_not_be_read_is_its_rows_fault_only_where_it_is_used(
    folder: Path, ending: str
) -> None:
    path = odd_table(folder / f"rows.{ending}")
    rows = read(file_source(path))
    assert [isinstance(row, Conversation) for row in rows] == [True, False, True, True]
    assert (
        isinstance(rows[1], DataError)
        and rows[1].kind == "text"
        and "`question`: 'utf-8' codec can't decode" in rows[1].message
    )
    for column in ("day", "stamp"):
        rows = read(file_source(path, columns={"category": column}, form="vqa"))
        assert (
            isinstance(rows[2], DataError)
            and rows[2].row == 3
            and "`category`: " in rows[2].message
        )
    day = datetime.date(1970, 1, 2)
    assert day in {cell for row in odd_rows(path) for cell in row.values()}


def odd_rows(path: Path) -> list[dict[str, Any]]:
    from vlm_tune.data.sources.columnar import ArrowFile, Parquet

    kind = Parquet() if path.suffix == ".parquet" else ArrowFile()
    return [
        row
        for first, _, payload in kind.stretches(path)
        for _, row in kind.rows(path, first, payload)
    ]


def test_a_damaged_row_group_counts_as_all_of_its_rows(
    folder: Path, tiny_recipe: Callable[..., str]
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = folder / "rows.parquet"
    rows = [{**VQA, "question": f"what is {number}?"} for number in range(800)]
    parquet.write_table(
        pa.Table.from_pylist(rows),
        path,
        row_group_size=100,
        compression="none",
        use_dictionary=False,
    )
    data = bytearray(path.read_bytes())
    data[20:200] = bytes(180)
    path.write_bytes(data)
    recipe = recipe_on(
        tiny_recipe,
        f"{{kind: file, path: {path}, form: vqa}}",
        "  on_bad_row: skip\n  max_bad_rows: 99\n",
    )
    processor = build_processor(
        recipe,
        [row for row in read(file_source(path, form="vqa")) if isinstance(row, Conversation)],
    )
    with pytest.raises(DataError, match="100 bad rows, more than 99"):
        prepare(recipe.data, recipe.data.train, processor, seed=0)


# --- what a terminal acts on -------------------------------------------------------------------

HOSTILE = "\x1b]0;owned\x07\x1b[31mred\x9b2J\u202eback\r"


def test_show_and_check_print_no_control_characters_of_rows(
    folder: Path, tiny_recipe: Callable[..., str]
) -> None:
    row = {**VQA, "id": HOSTILE, "category": HOSTILE, "question": HOSTILE, "answer": HOSTILE}
    bad = [
        {**row, "image": HOSTILE},
        {**VQA, "answer": [HOSTILE]},
        {"messages": HOSTILE, **VQA, "tools": {HOSTILE: 1}},
    ]
    path = lines(folder / "rows.jsonl", [row, *bad])
    recipe = recipe_on(
        tiny_recipe, f"{{kind: file, path: {path}, form: vqa}}", "  on_bad_row: skip\n"
    )
    for ids in (False, True):
        out = io.StringIO()
        show_samples(Console(file=out, width=200), sample_tokens(recipe, 1), ids=ids)
        assert "owned" in out.getvalue().replace("⟩", "") or ids
        assert all(character.isprintable() or character == "\n" for character in out.getvalue())
    out = io.StringIO()
    show_check(Console(file=out, width=200), vlm_tune.check(recipe))
    assert "owned" in out.getvalue() and all(
        character.isprintable() or character == "\n" for character in out.getvalue()
    )
