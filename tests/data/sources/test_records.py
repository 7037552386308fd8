"""Sources as a whole: order, laziness, fingerprints, and readers that other processes take over."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.audio_samples import tone, wav
from tests.helpers.row_samples import file_source, good, read, write_rows
from vlm_tune.config.data import DataSection, FolderSource
from vlm_tune.data.prepare.run import conversations
from vlm_tune.data.sources.registry import SOURCES, open_source, read_all
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return [
        {
            "id": f"q{n}",
            "image": "ab"[n % 2] + ".png",
            "question": f"what is {n}?",
            "answer": f"it is {n}",
        }
        for n in range(5000)
    ]


def test_chunks_read_in_another_process_are_what_reading_all_gives(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    reader = open_source(file_source(write_rows(tmp_path / "rows.jsonl", rows), shots=1), seed=3)
    expected = good(list(read_all([reader])))
    assert [row.row for row in expected] == list(range(1, 5001)) and reader.form == "vqa"
    chunks = list(reader.chunks())
    assert [chunk.number for chunk in chunks] == [0, 1, 2] and sum(
        chunk.rows for chunk in chunks
    ) == 5000
    assert len(pickle.dumps(chunks)) < 500
    (tmp_path / "work.pkl").write_bytes(pickle.dumps((reader, chunks[::-1])))
    # In a fresh process, last chunk first, with nothing heavy loaded.
    code = (
        "import pickle, sys, pathlib\n"
        "reader, chunks = pickle.loads(pathlib.Path('work.pkl').read_bytes())\n"
        "found = [list(reader.conversations(chunk)) for chunk in chunks]\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'pyarrow', 'av'} & "
        "set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "pathlib.Path('found.pkl').write_bytes(pickle.dumps(found))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3])])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    rows_by_chunk = pickle.loads((tmp_path / "found.pkl").read_bytes())
    assert [row for chunk in rows_by_chunk[::-1] for row in chunk] == expected


def test_opening_and_taking_some_rows_reads_no_further(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    row_stream = read_all([open_source(file_source(path), seed=0)])
    assert isinstance(next(row_stream), Conversation)
    path.write_bytes(path.read_bytes()[:400_000])
    assert len([next(row_stream) for _ in range(1500)]) == 1500


def test_a_limit_takes_the_first_rows(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows[:5])
    data = DataSection(
        train=[file_source(path, limit=2), file_source(path, limit=2)], template="chatml"
    )
    assert [row.id for row in conversations(data, data.train, 0)] == ["rows:q0:1", "rows:q1:2"] * 2


def test_the_fingerprint_changes_with_the_rows_and_with_what_shapes_them(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows[:5])

    def fingerprint(seed: int = 0, **options: Any) -> str:
        return open_source(file_source(path, **options), seed=seed).fingerprint()

    first = fingerprint()
    assert (
        first
        == fingerprint()
        == fingerprint(limit=3)
        == fingerprint(weight=2.0)
        == fingerprint(template="vicuna")
    )
    prompt_set = tmp_path / "own.yaml"
    prompt_set.write_text("task: vqa\nlanguage: en\nprompts: ['{question}']\nanswer: '{answer}'\n")
    others = [
        fingerprint(1),
        fingerprint(shots=1),
        fingerprint(instructions="vqa-zh"),
        fingerprint(image_root=str(tmp_path / "x")),
    ]
    others += [
        fingerprint(instructions=str(prompt_set)),
        fingerprint(columns={"category": "id"}),
        fingerprint(video_frames=2),
    ]
    prompt_set.write_text(prompt_set.read_text().replace("'{question}'", "'{question} Say.'"))
    others += [fingerprint(instructions=str(prompt_set))]
    write_rows(path, rows[:6])
    others += [fingerprint()]
    assert len({first, *others}) == len(others) + 1


def test_a_pattern_reads_its_files_in_order_and_names_them(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    for place, kind in (("x/part-2.jsonl", 0), ("x/part-10.parquet", 1), ("y/part-2.csv", 2)):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / place, rows[kind * 2 : kind * 2 + 2])
    with (tmp_path / "x/part-2.jsonl").open("a") as file:
        file.write("{\n")
    source = file_source(tmp_path / "*/part-*", image_root=str(tmp_path))
    parsed = read(source)
    places = [(row.source, row.row) for row in parsed]
    names = ["x/part-10.parquet"] * 2 + ["x/part-2.jsonl"] * 3 + ["y/part-2.csv"] * 2
    assert places == [
        (str(tmp_path / name), row) for name, row in zip(names, [1, 2, 1, 2, 3, 1, 2], strict=True)
    ]
    assert isinstance(parsed[4], DataError) and str(parsed[4]).startswith(
        f"{tmp_path}/x/part-2.jsonl, row 3: not JSON"
    )
    assert [row.id for row in parsed if isinstance(row, Conversation)][-1] == "y/part-2:q5:2"
    chunks = list(open_source(source, seed=0).chunks())
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "none.jsonl: no such file"),
        ("none-*.jsonl", "no file fits this pattern"),
        (".", "is a folder; name a file, or a pattern"),
        ("n" * 300, "no such file"),
        ("a.png", r"the ending '.png' is not one of .json, .*"),
        ("shard.tar", "a tar shard is of `kind: webdataset`"),
        ("broken.parquet", r"broken.parquet: can't be read: "),
        ("broken.arrow", r"broken.arrow: can't be read: "),
        ("broken.feather", r"broken.feather: can't be read: "),
        ("empty.jsonl", "empty.jsonl: no rows"),
        ("empty.csv", "empty.csv: no header"),
        ("twice.csv", "a column comes twice"),
    ],
)
def test_a_source_that_is_none_says_why(
    tmp_path: Path, rows: list[dict[str, Any]], name: str, message: str
) -> None:
    for file_name, text in {
        "shard.tar": "x",
        "empty.jsonl": "",
        "empty.csv": "",
        "twice.csv": "a,b,a\n1,2,3\n",
    }.items():
        (tmp_path / file_name).write_text(text)
    for file_name in ("broken.parquet", "broken.arrow", "broken.feather"):
        data = write_rows(tmp_path / file_name, rows[:50]).read_bytes()
        (tmp_path / file_name).write_bytes(
            data[: len(data) // 2] if file_name != "broken.arrow" else b"not arrow at all"
        )
    with pytest.raises(DataError, match=message):
        open_source(file_source(tmp_path / name), seed=0)


def test_every_kind_of_source_has_a_reader() -> None:
    kinds = json.loads(json.dumps(DataSection.model_json_schema()))["properties"]["train"]["items"][
        "discriminator"
    ]["mapping"]
    assert set(kinds) == set(SOURCES)


def test_a_folder_a_class_is_a_classification(tmp_path: Path) -> None:
    root = tmp_path / "animals"
    for place in ("cat/2.png", "cat/1.jpg", "dog/deep/x.png", ".hidden/y.png"):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / place)
    (root / "cat" / "notes.txt").write_text("not an image")
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    (root / "dog" / "out.png").symlink_to(tmp_path / "outside.png")
    source = FolderSource(kind="folder", path=str(root))
    parsed = read(source)
    assert [row.row for row in parsed] == [1, 2, 3, 4]
    bad = parsed.pop()
    assert (
        isinstance(bad, DataError)
        and "lies outside the image root" in str(bad)
        and "row 4" in str(bad)
    )
    assert [(row.id, row.category, row.messages[-1].text) for row in good(parsed)] == [
        ("animals/cat/1.jpg", "cat", "cat"),
        ("animals/cat/2.png", "cat", "cat"),
        ("animals/dog/deep/x.png", "dog", "dog"),
    ]
    assert all(
        "cat, dog" in row.messages[0].text and row.media[0].source == root / row.id[8:]
        for row in good(parsed)
    )
    reader = open_source(source, seed=0)
    assert reader.form == "classify" and len(list(reader.chunks())) == 2
    before = reader.fingerprint()
    Image.new("RGB", (4, 4)).save(root / "cat/3.png")
    assert open_source(source, seed=0).fingerprint() != before
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="the class 'empty' has no image"):
        read(source)
    with pytest.raises(DataError, match="no such folder"):
        read(FolderSource(kind="folder", path=str(tmp_path / "none")))
    with pytest.raises(DataError, match="contains no folders"):
        read(FolderSource(kind="folder", path=str(root / "empty")))


def test_the_words_of_a_task_name_the_medium(tmp_path: Path) -> None:
    """Those of other sets, or of the source's own, are taken as they are."""
    (tmp_path / "a.wav").write_bytes(wav(tone()))
    for number in range(2):
        Image.new("RGB", (8, 8), (100 * number, 0, 0)).save(tmp_path / f"{number}.png")
    media = {"audio": "a.wav", "video": ["0.png", "1.png"], "image": "0.png"}
    tasks: dict[str, dict[str, Any]] = {
        "ocr": {"text": "hello"},
        "caption": {"caption": "a tone"},
        "classify": {"label": "low", "choices": ["low", "high"]},
    }
    words = {
        "audio": "speech|speak|spoken|said|sound|recording|heard",
        "video": "video|clip",
        "image": "image|picture",
    }

    def questions_of(path: Path, **options: Any) -> list[str]:
        reader = open_source(file_source(path, **options), seed=0)
        return [row.question for row in good(list(read_all([reader])))]

    for kind, value in media.items():
        for form, fields in tasks.items():
            rows = [fields | {kind: value, "id": number} for number in range(8)]
            path = write_rows(tmp_path / "rows.jsonl", rows)
            questions = questions_of(path, form=form)
            assert all(re.search(words[kind], question) for question in questions), questions
            named = questions_of(path, form=form, instructions=form)
            assert all(re.search(words["image"], question) for question in named)
