"""Containers: every file format gives the same rows, chunk by chunk; damage is named."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
import tracemalloc
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.row_samples import FILES, file_source, good, read, write_rows, write_shard
from vlm_tune.config.data import DatasetSource, WebDatasetSource
from vlm_tune.data.sources import json_csv, webdataset
from vlm_tune.data.sources.columnar import Parquet
from vlm_tune.data.sources.file_rows import FileRows
from vlm_tune.data.sources.json_csv import Csv, JsonLines, JsonList, list_elements
from vlm_tune.data.sources.registry import open_source, read_all
from vlm_tune.data.types import Conversation, Media, Slice
from vlm_tune.errors import DataError


@pytest.fixture
def png(tmp_path: Path) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "PNG")
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    return stream.getvalue()


def vqa(count: int) -> list[dict[str, Any]]:
    return [
        {"image": "a.png", "question": f'what, "is" {n}\n蓝?', "answer": f"it's {n}"}
        for n in range(count)
    ]


CHATS = [
    {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": f"what {n}?"},
            {"role": "assistant", "content": f"蓝 {n}"},
        ],
    }
    for n in range(12)
]


@pytest.mark.parametrize("ending", FILES)
@pytest.mark.parametrize("name", ["task", "chat"])
def test_every_file_format_gives_the_same_conversations(
    tmp_path: Path, png: bytes, ending: str, name: str
) -> None:
    rows = vqa(12) if name == "task" else CHATS
    reference = good(read(file_source(write_rows(tmp_path / "rows.jsonl", rows))))
    source = file_source(write_rows(tmp_path / f"rows.{ending}", rows))
    conversations = good(read(source))
    assert [(row.id, row.messages, row.row) for row in conversations] == [
        (row.id, row.messages, row.row) for row in reference
    ]
    reader = pickle.loads(pickle.dumps(open_source(source, seed=0)))
    backwards = [list(reader.conversations(chunk)) for chunk in list(reader.chunks())[::-1]]
    assert [row for chunk in backwards[::-1] for row in chunk] == conversations


@pytest.mark.parametrize("ending", FILES)
def test_chunks_number_all_rows_in_order(
    tmp_path: Path, png: bytes, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_csv, "CHUNK_ROWS", 4)
    monkeypatch.setattr("vlm_tune.data.sources.columnar.CHUNK_ROWS", 4)
    reader = open_source(file_source(write_rows(tmp_path / f"rows.{ending}", vqa(23))), seed=0)
    chunks = list(reader.chunks())
    assert len(chunks) >= 6 and [chunk.number for chunk in chunks] == list(range(len(chunks)))
    for chunk in chunks:
        rows = good(list(reader.conversations(chunk)))
        assert [row.row for row in rows] == list(
            range(chunk.first_row, chunk.first_row + chunk.rows)
        ) and len(rows) <= 5
    assert sum(chunk.rows for chunk in chunks) == 23


# --- JSON --------------------------------------------------------------------------------------

JUNK = st.sampled_from(
    [
        b"\xff\xfe",
        b"\0",
        b"{",
        b'{"a": 1}',
        b"",
        b"  ",
        b"[1]",
        '"蓝"'.encode(),
        b"nul",
        b'{"a": "' + b"x" * 90 + b'"}',
        b"\r",
    ]
)


@given(
    st.lists(JUNK, max_size=30), st.integers(1, 9), st.integers(1, 64), st.booleans(), st.booleans()
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_fault_09_a_bad_line_is_one_row_wherever_blocks_and_chunks_end(
    tmp_path: Path, lines: list[bytes], size: int, block: int, bom: bool, cut: bool
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        (b"\xef\xbb\xbf" if bom else b"") + b"\n".join(lines) + (b"" if cut else b"\n")
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("CHUNK_ROWS", size), ("BLOCK", block), ("CHUNK_BYTES", 200)):
            patch.setattr(json_csv, name, value)
        form = JsonLines()
        stretches = list(form.stretches(path))
        parsed = [row for first, _, payload in stretches for row in form.rows(path, first, payload)]
    assert all(rows <= size for _, rows, _ in stretches)
    expected = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    assert [number for number, _ in parsed] == [number for number, _ in expected]
    for (_, value), (_, line) in zip(parsed, expected, strict=True):
        try:
            assert b"\0" not in line and value == json.loads(line.decode("utf-8"))
        except (ValueError, AssertionError):
            assert isinstance(value, DataError) and value.message.startswith("not JSON")


def test_a_file_of_many_lines_is_scanned_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    line = json.dumps({"question": "q", "answer": "a" * 30}).encode() + b"\n"
    with path.open("wb") as file:
        for _ in range(50):
            file.write(line * 10_000)
    with path.open(
        "r+b"
    ) as file:  # a hole of 200 MB without a newline, as a disk's fault leaves it
        file.truncate(path.stat().st_size + 200_000_000)
    tracemalloc.start()
    try:
        stretches = list(JsonLines().stretches(path))
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert sum(rows for _, rows, _ in stretches) == 500_001 and stretches[100][0] == 200_001


def test_a_line_longer_than_any_row_is_named_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_csv, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr(json_csv, "BLOCK", 16)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "' + b"x" * 500 + b'"}\n{"a": 2}\n' + b"y" * 400)
    ((first, _, payload),) = JsonLines().stretches(path)
    parsed = list(JsonLines().rows(path, first, payload))
    assert [number for number, _ in parsed] == [1, 2, 3, 4] and parsed[2][1] == {"a": 2}
    assert all(
        isinstance(parsed[place][1], DataError) and "more than 100 bytes" in str(parsed[place][1])
        for place in (1, 3)
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(
    st.lists(JSON, max_size=12),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 4),
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_list_is_read_in_parts_as_it_is_read_whole(
    tmp_path: Path, values: list[Any], indent: int | None, ascii_only: bool, block: int, size: int
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(
        "\ufeff \n" + json.dumps(values, indent=indent, ensure_ascii=ascii_only),
        encoding="utf-8",
        errors="surrogatepass",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_csv, "CHUNK_ROWS", size)
        patch.setattr(json_csv, "BLOCK", max(block, 8))  # the file's first block holds the bracket
        stretches = list(JsonList().stretches(path))
        parsed = [
            row
            for first, _, payload in stretches[::-1]
            for row in JsonList().rows(path, first, payload)
        ]
    parsed = sorted(parsed, key=lambda row: row[0])
    assert [number for number, _ in parsed] == list(range(1, len(values) + 1))
    for (_, value), expected in zip(parsed, values, strict=True):
        assert value == expected or isinstance(value, DataError)
        if ascii_only and "\0" not in json.dumps(expected, ensure_ascii=False):
            assert value == expected


@pytest.mark.parametrize(
    ("text", "message", "read"),
    [
        ('[{"a": 1}, {"a": 2}', "it ends early", 1),
        ('[{"a": 1}, {"a": ', "Expecting value", 1),
        ('[{"a": 1}, {"a": "x', "Unterminated string", 1),
        ('[{"a": 1} {"a": 2}]', "it ends early", 0),
        ('[{"a": 1}, ]', "Expecting value", 1),
        ('[{"a": 1}] []', "more text after the list, at byte 10", 1),
        ("[" * 100_000, "nested too deeply", 0),
        ("[", "Expecting value", 0),
    ],
)
def test_a_list_that_is_none_says_where(tmp_path: Path, text: str, message: str, read: int) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        list(JsonList().stretches(path))
    elements = list_elements(path, 1)
    assert len([next(elements) for _ in range(read)]) == read


def test_one_bad_element_of_a_list_is_one_row(tmp_path: Path, png: bytes) -> None:
    good_row = json.dumps(vqa(1)[0]).encode()
    path = tmp_path / "rows.json"
    path.write_bytes(
        b"["
        + b", ".join([good_row, b'{"image": "\xff"}', b"5", b'{"image": "a\nb"}', good_row])
        + b"]"
    )
    rows = read(file_source(path))
    assert [isinstance(row, DataError) for row in rows] == [False, True, True, True, False]
    assert "row 2: not JSON: 'utf-8' codec" in str(
        rows[1]
    ) and "a row is a JSON object, this is int" in str(rows[2])


# --- CSV ---------------------------------------------------------------------------------------


def test_fault_09_bad_records_of_a_table_are_named(tmp_path: Path, png: bytes) -> None:
    path = tmp_path / "rows.csv"
    lines = [
        b"\xef\xbb\xbfimage,question,answer",
        b'a.png,"two',
        b'lines, ""quoted""",yes',
        b"",
        b"a.png,too few",
        b"a.png,one,too,many",
        b"a.png,not utf-8 \xff,x",
        b"a.png,nul \0,x",
        b'a.png,"bad" quote,x',
        b"a.png,no answer,",
        b"a.png,last,good",
        b'a.png,"cut',
    ]
    path.write_bytes(b"\r\n".join(lines))
    rows = read(file_source(path))
    assert [row.row for row in rows] == list(range(1, 10))
    assert (
        isinstance(rows[0], Conversation) and rows[0].messages[0].text == 'two\r\nlines, "quoted"'
    )
    texts = [
        "2 cells, the header has 3: image, question, answer",
        "4 cells",
        "not UTF-8",
        "a NUL byte",
        "not CSV",
        "no text `answer`",
    ]
    for row, text in zip(rows[1:7], texts, strict=True):
        assert isinstance(row, DataError) and text in str(row)
    assert isinstance(rows[7], Conversation) and rows[7].messages[1].text == "good"
    assert isinstance(rows[8], DataError) and "not CSV: unexpected end of data" in str(rows[8])


@given(
    st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), min_size=1, max_size=20),
    st.integers(1, 5),
)
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_table_is_cut_between_records_only(
    tmp_path: Path, cells: list[tuple[str, str]], size: int
) -> None:
    rows = [{"a": one, "b": other} for one, other in cells]
    assume(all("\r" not in a + b for a, b in cells))
    path = write_rows(tmp_path / "rows.csv", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_csv, "CHUNK_ROWS", size)
        parsed = [
            row
            for first, _, payload in Csv().stretches(path)
            for row in Csv().rows(path, first, payload)
        ]
    assert [number for number, _ in parsed] == list(range(1, len(rows) + 1))
    for (_, value), row in zip(parsed, rows, strict=True):
        nul = "\0" in row["a"] + row["b"]
        assert (
            isinstance(value, DataError)
            if nul
            else value == {key: text or None for key, text in row.items()}
        )


# --- columns -----------------------------------------------------------------------------------


def test_a_long_row_group_is_cut_and_every_part_is_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr("vlm_tune.data.sources.columnar.CHUNK_ROWS", 10)
    monkeypatch.setattr("vlm_tune.data.sources.columnar.READ_ROWS", 7)
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"n": list(range(500))}), path, row_group_size=300)
    stretches = list(Parquet().stretches(path))
    assert len(stretches) == 16 + 16 and stretches[0][1] == 19  # 300 / 16 rows, then 200 / 16
    for first, count, payload in stretches[::-1]:
        assert [(number, row["n"]) for number, row in Parquet().rows(path, first, payload)] == [
            (number, number - 1) for number in range(first, first + count)
        ]


def test_images_in_columns_are_bytes_or_paths(tmp_path: Path, png: bytes) -> None:
    rows = [
        {"image": {"bytes": png, "path": "x.png"}},
        {"image": {"bytes": None, "path": "a.png"}},
        {"image": {"bytes": b"", "path": None}},
    ]
    rows = [{**row, "caption": "c"} for row in rows]
    first, second, third = read(file_source(write_rows(tmp_path / "rows.parquet", rows)))
    assert isinstance(first, Conversation) and first.media == (Media(png),)
    assert isinstance(second, Conversation) and second.media == (Media(tmp_path / "a.png"),)
    assert isinstance(third, DataError) and "the image has no bytes" in str(third)


def test_a_damaged_row_group_is_named_and_the_next_is_read(tmp_path: Path, png: bytes) -> None:
    path = write_rows(
        tmp_path / "rows.parquet", [{**row, "question": row["question"] * 40} for row in vqa(10)]
    )
    data = bytearray(path.read_bytes())
    data[20:200] = bytes(180)
    path.write_bytes(data)
    rows = read(file_source(path, form="vqa"))
    # Each of the group's rows counts.
    assert [(row.row, row.kind) for row in rows[:5] if isinstance(row, DataError)] == [
        (row, "damaged") for row in range(1, 6)
    ]
    assert [row.row for row in good(rows[5:])] == [6, 7, 8, 9, 10]


@pytest.mark.parametrize("ending", ["parquet", "arrow", "feather", "csv", "json", "tar"])
def test_fault_09_whatever_bytes_are_damaged_rows_or_the_file_are_named(
    tmp_path: Path, png: bytes, ending: str
) -> None:
    path = tmp_path / f"rows.{ending}"
    source: Any = web(path, form="caption") if ending == "tar" else file_source(path, form="vqa")
    if ending == "tar":
        write_shard(path, [{"png": png, "txt": b"c"}] * 6)
    else:
        write_rows(path, vqa(12))
    whole, random = path.read_bytes(), Random(0)
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(random.randint(1, 3)):
            data[random.randrange(len(data))] = random.randrange(256)
        path.write_bytes(data[: random.choice([len(data), random.randrange(len(data))])])
        try:
            rows = read(source)
        except DataError as error:
            rows = [error]
        assert all(isinstance(row, Conversation) or str(row).startswith(str(path)) for row in rows)


# --- data sets ---------------------------------------------------------------------------------


def saved(folder: Path, png: bytes, *, kind: str) -> DatasetSource:
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
        if kind != "turns"
        else {
            "image": datasets.Image(),
            "conversations": datasets.Sequence(
                {"from": datasets.Value("string"), "value": datasets.Value("string")}
            ),
        }
    )
    turns = {"from": ["human", "gpt"], "value": ["<image>\nq?", "a"]}
    broken = b"this is no image, and nothing here decodes it"
    rows = [
        {"image": {"bytes": png if n else broken, "path": None}}
        | ({"conversations": turns} if kind == "turns" else {"label": n % 2})
        for n in range(300)
    ]
    data = datasets.Dataset.from_list(rows, features=features)
    if kind == "dict":
        datasets.DatasetDict({"train": data, "test": data.select([3, 1])}).save_to_disk(str(folder))
    elif kind == "parquet":
        (folder / "data").mkdir(parents=True)
        for shard in range(2):
            data.shard(2, shard).to_parquet(
                str(folder / f"data/train-{shard:05d}-of-00002.parquet")
            )
    else:
        data.save_to_disk(str(folder))
    return DatasetSource(kind="dataset", name=str(folder))


@pytest.mark.parametrize("kind", ["disk", "dict", "parquet", "turns"])
def test_a_data_set_is_read_without_decoding(
    tmp_path: Path, png: bytes, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = saved(tmp_path / "set", png, kind=kind)
    rows = good(read(source))
    assert (
        len(rows) == 300
        and rows[5].media == (Media(png),)
        and rows[5].source == str(tmp_path / "set")
    )
    assert [row.row for row in rows] == list(range(1, 301)) and rows[5].id == "set/train:6:6"
    if kind == "turns":
        assert rows[5].messages[0].parts == (Media(png), "q?")
    else:
        assert {row.messages[1].text for row in rows} == {"cat", "dog"} and all(
            "cat, dog" in row.messages[0].text for row in rows
        )
    reader = open_source(source, seed=0)
    assert reader.form == ("llava" if kind == "turns" else "classify")
    state = pickle.dumps(reader)
    assert len(state) < 20_000 or kind == "turns"
    assert good(list(read_all([pickle.loads(state)]))) == rows
    assert reader.fingerprint() == open_source(source, seed=0).fingerprint()


def test_a_data_set_is_streamed_shard_by_shard(
    tmp_path: Path, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = saved(tmp_path / "set", png, kind="parquet")
    rows = good(read(source, streaming=True))
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    whole = good(read(source))
    assert [(row.media, row.category) for row in rows] == [
        (row.media, row.category) for row in whole
    ]
    assert (
        len({row.id for row in rows}) == 300
        and rows[0].source.endswith("set, shard 0")
        and rows[-1].row == 150
    )
    reader = pickle.loads(pickle.dumps(open_source(source, seed=0, streaming=True)))
    chunks = list(reader.chunks())
    assert (
        len(chunks) == 2
        and chunks[0].rows == sys.maxsize
        and good(list(reader.conversations(chunks[1]))) == rows[150:]
    )


def test_a_data_set_that_is_not_there_says_so(tmp_path: Path, png: bytes) -> None:
    source = saved(tmp_path / "set", png, kind="dict")
    with pytest.raises(DataError, match=r"no split 'dev'; expected one of train, test"):
        open_source(source.model_copy(update={"split": "dev"}), seed=0)
    assert len(read(source.model_copy(update={"split": "test"}))) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="can't be loaded: "):
        open_source(DatasetSource(kind="dataset", name=str(tmp_path / "empty")), seed=0)


# --- shards ------------------------------------------------------------------------------------


def web(path: Path | str, **options: Any) -> WebDatasetSource:
    return WebDatasetSource(kind="webdataset", path=str(path), **options)


def test_images_of_a_shard_stay_in_it(tmp_path: Path, png: bytes) -> None:
    path = write_shard(
        tmp_path / "s.tar", [{"png": png, "txt": f"caption {n}".encode()} for n in range(5)]
    )
    rows = good(read(web(path)))
    assert [row.id for row in rows] == [f"s:{n:04d}:{n + 1}" for n in range(5)] and [
        row.row for row in rows
    ] == [1, 2, 3, 4, 5]
    for number, row in enumerate(rows):
        (media,) = row.media
        assert isinstance(media.source, Slice) and media.source.path == path and media.read() == png
        assert row.messages[1].text == f"caption {number}"


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_shard_is_read_as_bytes(tmp_path: Path, png: bytes, mode: str) -> None:
    samples = [{"png": png, "txt": f"caption {n}".encode()} for n in range(5)]
    plain = good(read(web(write_shard(tmp_path / "s.tar", samples))))
    packed = good(read(web(write_shard(tmp_path / f"s.tar.{mode}", samples, f"w:{mode}"))))
    assert [row.media for row in packed] == [(Media(png),)] * 5
    assert [row.messages[1] for row in packed] == [row.messages[1] for row in plain]


def test_a_shards_json_brings_fields_and_the_order_of_images(tmp_path: Path, png: bytes) -> None:
    def row(**fields: Any) -> bytes:
        turns = [{"from": "human", "value": "<image> and <image>?"}, {"from": "gpt", "value": "a"}]
        return json.dumps({"conversations": turns, **fields}).encode()

    samples = [
        {"0.png": png, "1.png": png, "json": row(id="x", image=["0000.1.png", "0000.0.png"])},
        {"0.png": png, "1.png": png, "json": row(image=["elsewhere/1.png", "elsewhere/2.png"])},
        {"0.png": png, "1.png": png, "json": row(), "md5": b"ignored"},
        {"0.png": png, "1.png": png, "json": b"{"},
        {"json": b"[1]"},
        {"0.png": png, "txt": b"\xff"},
    ]
    rows_and_errors = read(web(write_shard(tmp_path / "s.tar", samples), form="llava"))
    rows = good(rows_and_errors[:3])
    offsets = [
        [media.source.offset for media in row.media if isinstance(media.source, Slice)]
        for row in rows
    ]
    assert (
        offsets[0][0] > offsets[0][1]
        and offsets[1] == sorted(offsets[1])
        and offsets[2] == sorted(offsets[2])
    )
    assert [row.id for row in rows] == ["s:x:1", "s:0001:2", "s:0002:3"]
    for row, text in zip(
        rows_and_errors[3:],
        ["0003.json: not JSON", "0004.json holds a list", "0005.txt: 'utf-8'"],
        strict=True,
    ):
        assert isinstance(row, DataError) and text in str(row)


def test_shards_are_read_from_the_middle_and_by_pattern(
    tmp_path: Path, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset, "CHUNK_ROWS", 3)
    long = "a rather long folder name that a plain header has no place for " * 3
    for name in ("a", "b"):
        with tarfile.open(
            tmp_path / f"{name}.tar",
            "w",
            format=tarfile.PAX_FORMAT if name == "a" else tarfile.GNU_FORMAT,
        ) as archive:
            for number in range(8):
                for member_name, content in (
                    (f"{long}/{number}.png", png),
                    (f"{long}/{number}.txt", b"c%d" % number),
                    (f"{long}/._{number}.txt", b"x"),
                ):
                    member = tarfile.TarInfo(f"./{member_name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    reader = open_source(web(tmp_path / "*.tar"), seed=0)
    chunks = list(reader.chunks())
    assert [chunk.rows for chunk in chunks] == [3, 3, 2, 3, 3, 2]
    rows_by_chunk = [good(list(reader.conversations(chunk))) for chunk in chunks[::-1]]
    assert [row.messages[1].text for chunk in rows_by_chunk[::-1] for row in chunk] == [
        f"c{n}" for n in range(8)
    ] * 2
    assert all(row.media[0].read() == png for chunk in rows_by_chunk for row in chunk)
    assert rows_by_chunk[0][0].source == str(tmp_path / "b.tar") and rows_by_chunk[0][0].row == 7


@pytest.mark.parametrize("mode", ["", ":gz"])
def test_a_cut_or_damaged_shard_says_so_at_every_place(
    tmp_path: Path, png: bytes, mode: str
) -> None:
    path = tmp_path / ("s.tar.gz" if mode else "s.tar")
    write_shard(path, [{"png": png, "txt": b"c"} for _ in range(4)], "w" + mode)
    data = path.read_bytes()
    end = len(data) if mode else 8 * 1024
    for tenth in range(1, 10):
        path.write_bytes(data[: end * tenth // 10 + 7])
        *rows, last = read(web(path, form="caption"))
        assert isinstance(last, DataError) and "the shard is damaged near byte" in str(last), tenth
        assert all(isinstance(row, Conversation) or "no text `caption`" in str(row) for row in rows)
    if not mode:
        path.write_bytes(data[:2048] + b"\xff" * 512 + data[2560:])  # a header in the middle
        *rows, last = read(web(path))
        assert (
            len(good(rows)) == 1
            and isinstance(last, DataError)
            and "a header is damaged" in str(last)
        )


def test_a_container_names_what_can_not_be_opened(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"a": 1}])
    rows = FileRows(str(path), (path,), (JsonLines(),))
    path.unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl: can't be read: "):
        list(rows.chunks())
    with pytest.raises(DataError, match="can't be read"):
        rows.fingerprint()
