"""From rows to prepared examples on disk.

What is left out is counted, what is kept is what was read, once.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.chat_samples import IMAGE_SLOTS, processor, turns
from tests.helpers.tiny_models import examples_of, png, prepare_rows, units_of
from vlm_tune.config.data import Clean, DataSection, DatasetSource, EasyVqaSource, FileSource, Split
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.prepare.job import task_names
from vlm_tune.data.prepare.run import conversations, prepare, read_part
from vlm_tune.data.prepare.worker import ShardMaker
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Media, Message
from vlm_tune.errors import DataError, Interrupted
from vlm_tune.resources import cache_folder

RED, BLUE = png((200, 30, 30)), png((30, 30, 200))


def row(
    name: str,
    question: str = "q?",
    answer: str = "yes",
    media: Media | None = RED,
    category: str = "",
) -> Conversation:
    parts = (question,) if media is None else (media, question)
    return Conversation(name, (Message("user", parts), Message("assistant", (answer,))), category)


def names(prepared: Prepared) -> list[list[str]]:
    """The ids of every unit's examples as the rows give them."""
    return [[example.id.split(":")[1] for example in unit] for unit in units_of(prepared)]


def test_rows_of_an_image_are_one_unit_wherever_they_stand(tmp_path: Path) -> None:
    rows = [
        row("a"),
        row("b", media=BLUE),
        row("c", "other?"),
        row("t", media=None),
        row("u", media=None),
    ]
    plain = prepare_rows(tmp_path / "rows.jsonl", rows, processor("chatml", "bytes", "causal"))
    assert names(plain) == [["a"], ["b"], ["c"], ["t"], ["u"]]
    joined = prepare_rows(
        tmp_path / "rows.jsonl", rows, processor("chatml", "bytes", "causal"), group="image"
    )
    assert [len(unit) for unit in units_of(joined)] == [1, 1, 1, 1] and joined.unit(0)[
        0
    ].questions == 2
    assert joined.questions == plain.questions == 5 and len(joined.media) == len(plain.media) == 2
    apart = prepare_rows(
        tmp_path / "rows.jsonl", rows, processor("flan", "bytes", "seq2seq"), group="image"
    )
    assert names(apart) == [["a", "c"], ["b"], ["t"], ["u"]]


@pytest.mark.parametrize(("name", "layout"), [("chatml", "causal"), ("flan", "seq2seq")])
@pytest.mark.parametrize("group", ["none", "image"])
def test_what_is_read_back_is_what_the_processor_made(
    tmp_path: Path, name: str, layout: Any, group: Any
) -> None:
    chat_processor = processor(name, "bytes", layout)
    rows = [
        row("a"),
        row("b", "two\nlines", media=None, category="text"),
        Conversation("m", turns("one?", "1", "two?", "2")),
    ]
    prepared = prepare_rows(tmp_path / "rows.jsonl", rows, chat_processor, group=group)
    read = list(conversations(prepared.data, prepared.data.train, 0))
    expected = [
        example for conversation in read for example in chat_processor.examples(conversation)
    ]
    examples = examples_of(prepared)
    assert len(examples) == len(expected)
    for one, other in zip(examples, expected, strict=True):
        assert (one.id, one.category, one.questions) == (other.id, other.category, other.questions)
        for part in ("input_ids", "labels", "image_mask"):
            assert np.array_equal(getattr(one, part), getattr(other, part))
        assert [item.read() for item in one.media] == [item.read() for item in other.media]
    assert prepared.unit_lengths.tolist() == [[len(e.input_ids)] * 2 for e in expected]
    again = pickle.loads(pickle.dumps(prepared.store))
    assert again[1].input_ids.tolist() == expected[1].input_ids.tolist()


def test_images_inside_rows_are_kept_beside_the_examples(tmp_path: Path) -> None:
    import base64

    url = "data:image/png;base64," + base64.b64encode(RED.read()).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    talk = [
        {"role": "user", "content": [part, {"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "a"},
    ]
    prepared = prepare_rows(
        tmp_path / "rows.jsonl",
        [{"messages": talk}, row("same bytes")],
        processor("chatml", "bytes", "causal"),
    )
    assert [item.read() for item in prepared.media] == [RED.read()]
    assert {example.media for example in examples_of(prepared)} == {tuple(prepared.media)}
    # A validation or test part reads rows again, with the images that were stored.
    inside, _ = prepared.conversations(np.array([0, 1]))
    assert inside.media == tuple(prepared.media)


# --- what is left out --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout"), [("chatml", "causal"), ("flan", "seq2seq")])
def test_overlong_rows_stop_or_are_dropped_and_counted(
    tmp_path: Path, name: str, layout: Any
) -> None:
    chat_processor = processor(name, "bytes", layout, 60)
    rows = [row("short"), row("long", "x" * 80), row("wordy", "q", "y" * 80)]
    with pytest.raises(DataError, match=r"row 2: .*data\.max_length 60 \(overlong: drop"):
        prepare_rows(tmp_path / "rows.jsonl", rows, chat_processor)
    prepared = prepare_rows(tmp_path / "rows.jsonl", rows, chat_processor, overlong="drop")
    assert names(prepared) == [["short"]] and prepared.left_out == {"overlong": 2}
    assert "row 2: " in next(prepared.reasons(1)) and "more than data.max_length 60" in next(
        prepared.reasons(1)
    )


def test_no_length_up_to_the_limit_is_dropped_and_none_past_it_is_cut(tmp_path: Path) -> None:
    rows = [row("r", "x" * 20)]
    (whole,) = examples_of(
        prepare_rows(tmp_path / "rows.jsonl", rows, processor("chatml", "bytes", "causal"))
    )
    for limit in range(1, len(whole.input_ids) + 3):
        chat_processor = processor("chatml", "bytes", "causal", limit)
        if limit < len(whole.input_ids):
            with pytest.raises(DataError, match="no row is left"):
                prepare_rows(tmp_path / "rows.jsonl", rows, chat_processor, overlong="drop")
        else:
            (example,) = examples_of(
                prepare_rows(tmp_path / "rows.jsonl", rows, chat_processor, overlong="drop")
            )
            assert (
                np.array_equal(example.input_ids, whole.input_ids)
                and example.image_mask.sum() == IMAGE_SLOTS
            )


def test_a_bad_row_stops_or_is_left_out_by_name_and_never_replaced(tmp_path: Path) -> None:
    chat_processor = processor("chatml", "bytes", "causal")
    rows: list[Any] = [row("a"), {"messages": []}, row("b", media=Media(b"no image")), row("c")]
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: "):
        prepare_rows(tmp_path / "rows.jsonl", rows, chat_processor)
    prepared = prepare_rows(tmp_path / "rows.jsonl", rows, chat_processor, on_bad_row="skip")
    assert (
        names(prepared) == [["a"], ["c"]] and sum(prepared.left_out.values()) == prepared.bad == 2
    )
    assert [reason.split(": ")[0][-5:] for reason in prepared.reasons(9)] == ["row 2", "row 3"]
    with pytest.raises(DataError, match=r"2 bad rows, more than 1 \(data\.max_bad_rows\)"):
        prepare_rows(
            tmp_path / "rows.jsonl", rows, chat_processor, on_bad_row="skip", max_bad_rows=1
        )
    # What a lenient reading found holds the policy of the next one too.
    data = prepared.data.model_copy(update={"on_bad_row": "fail"})
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: "):
        prepare(data, data.train, chat_processor, seed=0)


def test_cleaning_rules_leave_rows_out_and_count_them(tmp_path: Path) -> None:
    rows = [
        row("kept", "a question"),
        row("again", "A  question"),
        row("other image", "a question", media=BLUE),
        row("small", "tiny image", media=png(size=(8, 9))),
        row("short", "?", "n", media=None),
    ]
    clean = Clean(duplicates="bytes", min_side=16, min_chars=3)
    prepared = prepare_rows(
        tmp_path / "rows.jsonl", rows, processor("chatml", "bytes", "causal"), clean=clean
    )
    assert names(prepared) == [["kept"], ["other image"]]
    assert prepared.left_out == {"duplicate": 1, "short_text": 1, "small_image": 1}
    assert any("repeats row 1 of" in reason for reason in prepared.reasons(9))


def test_rows_in_other_languages_are_left_out_and_those_that_tell_nothing_stay(
    tmp_path: Path,
) -> None:
    rows = [
        row("en", "What colour is the shape in the middle?", "It is red."),
        row("12", "12", "5"),
    ]
    rows += [
        row("fr", "De quelle couleur est la forme au milieu ?", "Elle est rouge."),
        row("zh", "图像中间的形状是什么颜色?", "红色"),
    ]
    chat_processor = processor("chatml", "bytes", "causal")
    prepared = prepare_rows(
        tmp_path / "rows.jsonl", rows, chat_processor, clean=Clean(languages=["en", "zh"])
    )
    assert names(prepared) == [["en"], ["12"], ["zh"]] and prepared.left_out == {"language": 1}


def test_long_conversations_are_split_between_turns_each_with_system_text_and_image(
    tmp_path: Path,
) -> None:
    chat_processor = processor("smollm2", "bytes", "causal", 150)
    talk = turns(
        *(text for n in range(6) for text in (f"question {n}", f"answer {n}")), system="be brief"
    )
    long = Conversation("long", (talk[0], Message("user", (RED, "question 0")), *talk[2:]))
    prepared = prepare_rows(tmp_path / "rows.jsonl", [long], chat_processor, overlong="split")
    examples = examples_of(prepared)
    assert len(examples) > 1 and all(len(example.input_ids) <= 150 for example in examples)
    assert all(
        example.image_mask.sum() == IMAGE_SLOTS and len(example.media) == 1 for example in examples
    )
    texts = [
        chat_processor.tokenizer.decode(example.input_ids[~example.image_mask].tolist())
        for example in examples
    ]
    assert all(text.count("be brief") == 1 for text in texts)
    assert [n for text in texts for n in range(6) if f"question {n}" in text] == list(range(6))
    assert sum(example.questions for example in examples) == 6 and len(
        {example.id for example in examples}
    ) == len(examples)
    with pytest.raises(DataError, match="no row is left"):
        prepare_rows(
            tmp_path / "rows.jsonl", [row("one turn", "x" * 200)], chat_processor, overlong="split"
        )


@pytest.mark.parametrize(("name", "layout"), [("chatml", "causal"), ("flan", "seq2seq")])
def test_questions_are_trimmed_and_answers_and_images_never(
    tmp_path: Path, name: str, layout: Any
) -> None:
    chat_processor = processor(name, "bytes", layout, 80)
    rows = [
        row("long", "word " * 40 + "end", "the whole answer"),
        row("short"),
        row("wordy", "q", "y" * 90),
    ]
    prepared = prepare_rows(tmp_path / "rows.jsonl", rows, chat_processor, overlong="trim")
    assert names(prepared) == [["long"], ["short"]] and prepared.left_out == {"overlong": 1}
    example = examples_of(prepared)[0]
    assert 70 < len(example.input_ids) <= 80 and example.image_mask.sum() == IMAGE_SLOTS
    answer_ids = example.labels[example.labels != IGNORE_INDEX].tolist()
    assert "the whole answer" in chat_processor.tokenizer.decode(answer_ids)
    assert "word word" in chat_processor.tokenizer.decode(
        example.input_ids[~example.image_mask].tolist()
    )


# --- held out ----------------------------------------------------------------------------------


def colored(number: int) -> Media:
    return png((number % 256, number // 256, 77))


def test_a_split_keeps_the_rows_of_an_image_together_and_takes_its_share(tmp_path: Path) -> None:
    rows = [row(f"{n}", f"question {n}", media=colored(n // 5)) for n in range(500)]
    # A row that shows two images ties their rows together.
    both = Conversation(
        "both", (Message("user", (colored(3), colored(70), "q")), Message("assistant", ("a",)))
    )
    chat_processor = processor("chatml", "bytes", "causal")
    split = Split(validation=0.1, test=0.2)
    prepared = prepare_rows(tmp_path / "rows.jsonl", [*rows, both], chat_processor, split=split)
    parts = {
        part: read_part(prepared.data, part, chat_processor, 0) for part in ("validation", "test")
    }
    train = {example.id for example in examples_of(prepared)}
    part_ids = {part: {row.id for row in part_rows} for part, part_rows in parts.items()}
    assert 40 <= len(part_ids["validation"]) <= 60 and 90 <= len(part_ids["test"]) <= 111
    assert (
        not train & part_ids["validation"]
        and not train & part_ids["test"]
        and not part_ids["test"] & part_ids["validation"]
    )
    assert len(train) + sum(map(len, part_ids.values())) == 501
    shown = {
        part: {item.read() for row in part_rows for item in row.media}
        for part, part_rows in parts.items()
    }
    shown["train"] = {item.read() for item in prepared.media}
    assert (
        not shown["train"] & (shown["validation"] | shown["test"])
        and not shown["validation"] & shown["test"]
    )
    # The same rows in another order are divided in the same way.
    again = prepare_rows(
        tmp_path / "rows.jsonl", [both, *reversed(rows)], chat_processor, split=split
    )
    assert {e.id.split(":")[1] for e in examples_of(again)} == {
        name.split(":")[1] for name in train
    }


def test_a_stratified_split_holds_its_shares_in_every_category(tmp_path: Path) -> None:
    rows = [
        row(f"{n}", f"q {n}", media=colored(n), category="rare" if n % 10 == 0 else "common")
        for n in range(200)
    ]
    chat_processor = processor("chatml", "bytes", "causal")
    prepared = prepare_rows(
        tmp_path / "rows.jsonl", rows, chat_processor, split=Split(validation=0.2, stratify=True)
    )
    categories = [row.category for row in read_part(prepared.data, "validation", chat_processor, 0)]
    assert (categories.count("rare"), categories.count("common")) == (4, 36)


# --- the cache ---------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the shards that are written from now on, in this process."""
    written: list[Path] = []
    plain = ShardMaker._write

    def write(self: ShardMaker, source: int, chunk: Any, temporary: Path, folder: Path) -> None:
        written.append(folder)
        plain(self, source, chunk, temporary, folder)

    monkeypatch.setattr(ShardMaker, "_write", write)
    return written


def test_a_second_start_reads_nothing_and_a_change_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = counted(monkeypatch)
    chat_processor = processor("chatml", "bytes", "causal")
    rows, path = [row("a"), row("b", media=BLUE)], tmp_path / "rows.jsonl"
    first = prepare_rows(path, rows, chat_processor)
    data = first.data

    def again(changed: DataSection = data, using: Any = chat_processor) -> int:
        before = len(written)
        prepare(changed, changed.train, using, seed=0)
        return len(written) - before

    assert len(written) == 1 and again() == 0
    assert again(data.model_copy(update={"on_bad_row": "skip", "shuffle_buffer": 5})) == 0
    assert again(data.model_copy(update={"max_length": 99})) == 1
    assert again(using=processor("smollm2", "bytes", "causal")) == 1
    image = first.media[0].source
    assert isinstance(image, Path)
    os.utime(image, ns=(1, 1))
    assert again() == 1 and again() == 0
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    assert again() == 1


def test_a_stopped_preparation_goes_on_from_the_chunks_it_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_tune.data.sources.base.CHUNK_ROWS", 10)
    monkeypatch.setattr("vlm_tune.data.sources.json_csv.CHUNK_ROWS", 10)
    written = counted(monkeypatch)
    chat_processor = processor("chatml", "bytes", "causal")
    path = tmp_path / "rows.jsonl"
    rows = [row(f"{n}", f"q{n}") for n in range(45)]
    expected = names(prepare_rows(path, rows, chat_processor, workers=0))
    assert len(written) == 5
    shutil.rmtree(cache_folder("prepared"))
    written.clear()
    data = DataSection(
        train=[FileSource(kind="file", path=str(path), form="messages")],
        template="chatml",
        workers=0,
        max_length=4096,
    )
    with pytest.raises(Interrupted, match="after 20 rows; they are reused"):
        prepare(data, data.train, chat_processor, seed=0, stop=lambda: len(written) == 2)
    assert names(prepare(data, data.train, chat_processor, seed=0)) == expected
    assert len(written) == 5 and len(set(written)) == 5


def test_several_processes_prepare_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_tune.data.sources.json_csv.CHUNK_ROWS", 10)
    chat_processor = processor("chatml", "bytes", "causal")
    rows: list[Any] = [row(f"{n}", f"q{n}", media=colored(n % 7)) for n in range(60)]
    rows[33] = {"messages": []}
    examples_by_workers = []
    for workers in (0, 3):
        prepared = prepare_rows(
            tmp_path / "rows.jsonl",
            rows,
            chat_processor,
            group="image",
            on_bad_row="skip",
            workers=workers,
        )
        examples_by_workers.append(
            [
                (e.id, e.input_ids.tolist(), e.labels.tolist(), e.questions)
                for e in examples_of(prepared)
            ]
        )
        assert prepared.bad == 1
        shutil.rmtree(cache_folder("prepared"))
    assert examples_by_workers[0] == examples_by_workers[1] and len(examples_by_workers[0]) == 7


def test_a_killed_worker_is_an_error_that_names_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_tune.data.sources.json_csv.CHUNK_ROWS", 10)
    parent, plain = os.getpid(), ShardMaker._write

    def die(self: ShardMaker, source: int, chunk: Any, temporary: Path, folder: Path) -> None:
        if os.getpid() != parent and chunk.number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(self, source, chunk, temporary, folder)

    monkeypatch.setattr(ShardMaker, "_write", die)
    rows = [row(f"{n}") for n in range(45)]
    with pytest.raises(
        DataError, match=r"rows\.jsonl: a process that prepared rows \d+ to \d+ or after was killed"
    ):
        prepare_rows(
            tmp_path / "rows.jsonl", rows, processor("chatml", "bytes", "causal"), workers=2
        )


def test_a_limit_counts_rows_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    chat_processor = processor("chatml", "bytes", "causal")
    prepare_rows(
        path, [row("a"), {"messages": []}, row("b"), row("c")], chat_processor, on_bad_row="skip"
    )
    source = FileSource(kind="file", path=str(path), form="messages", limit=3)
    data = DataSection(
        train=[source, source], template="chatml", on_bad_row="skip", max_length=4096
    )
    assert names(prepare(data, data.train, chat_processor, seed=0)) == [["a"], ["b"]] * 2
    assert [
        conversation.id.split(":")[1] for conversation in conversations(data, data.train, 0)
    ] == [
        "a",
        "b",
    ] * 2


def test_prompts_past_the_limit_are_refused_by_name() -> None:
    chat_processor = processor("chatml", "bytes", "causal", 60)
    assert len(chat_processor.prompts([row("a"), row("b")])) == 2
    with pytest.raises(DataError, match=r"row long: \d+ tokens, more than 60"):
        chat_processor.prompts([row("a"), row("long", "x" * 80)])


def test_stop_ids_are_the_formats_end_and_the_tokenizers() -> None:
    chat_processor = processor("chatml", "bytes", "causal")
    assert [
        chat_processor.tokenizer.convert_ids_to_tokens(stop) for stop in chat_processor.stop_ids
    ] == [
        "<|im_end|>",
        "</s>",
    ]
    chat_processor = processor("vicuna", "bytes", "causal")
    assert chat_processor.stop_ids == [chat_processor.spec.eos_id]
    answer = chat_processor.examples(Conversation("d", turns("q", " red ")))[0]
    assert chat_processor.decode(answer.labels[answer.labels != IGNORE_INDEX].tolist()) == "red"


def test_sources_are_named_by_their_files_longer_where_two_are_alike() -> None:
    def file(path: str, name: str | None = None) -> FileSource:
        return FileSource(kind="file", path=path, name=name)

    sources = [
        file("a/x.jsonl"),
        file("b/x.jsonl"),
        file("y.csv"),
        file("z/*.parquet"),
        file("w.json", "ours"),
    ]
    assert task_names(sources) == ["a/x.jsonl", "b/x.jsonl", "y", "z/*.parquet", "ours"]
    easy = [EasyVqaSource(kind="easy_vqa", split=split) for split in ("train", "test")]
    assert task_names(easy) == ["easy_vqa:train", "easy_vqa:test"]
    assert task_names([DatasetSource(kind="dataset", name="org/set"), *easy[:1]]) == [
        "org/set",
        "easy_vqa",
    ]
    assert task_names([file("a/x.jsonl", "all"), file("b/x.jsonl", "all")]) == ["all", "all"]
    ours = file("a/x.jsonl").model_copy(update={"task_name": "ocr"})
    assert task_names([ours, file("b/x.jsonl")]) == ["ocr", "b/x.jsonl"]


def image_row(image: str) -> dict[str, Any]:
    """A row about an image file, as it is written."""
    turns = [
        {"role": "user", "content": "<image>what color?"},
        {"role": "assistant", "content": "red"},
    ]
    return {"messages": turns, "images": [image]}


def section_of(path: Path, rows: list[dict[str, Any]], **options: Any) -> DataSection:
    """A data section that reads rows from a file, written now."""
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    source = FileSource(kind="file", path=str(path), form="messages")
    return DataSection(train=[source], template="chatml", max_length=4096, **options)


@pytest.mark.parametrize("policy", ["fail", "skip"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_an_image_that_was_mended_is_looked_at_again(
    policy: Any, damage: str, tmp_path: Path
) -> None:
    """Chunks of a failed preparation keep no file's fault, and neither does a finished one."""
    chat_processor = processor("chatml", "bytes", "causal")
    image = tmp_path / "a.png"
    Image.new("RGB", (32, 32), (200, 10, 10)).save(image)
    Image.new("RGB", (32, 32), (10, 10, 200)).save(tmp_path / "b.png")
    whole = image.read_bytes()
    data = section_of(
        tmp_path / "rows.jsonl", [image_row("a.png"), image_row("b.png")], on_bad_row=policy
    )
    if damage == "cut":
        image.write_bytes(whole[:60])
    else:
        image.unlink()
    if policy == "fail":
        with pytest.raises(DataError, match=r"a\.png"):
            prepare(data, data.train, chat_processor, seed=0)
    else:
        assert prepare(data, data.train, chat_processor, seed=0).bad == 1
    image.write_bytes(whole)
    prepared = prepare(data, data.train, chat_processor, seed=0)
    assert prepared.bad == 0
    assert len(prepared) == 2


def test_a_second_name_of_the_same_image_is_watched_too(tmp_path: Path) -> None:
    chat_processor = processor("chatml", "bytes", "causal")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32), (200, 10, 10)).save(tmp_path / name)
    data = section_of(tmp_path / "rows.jsonl", [image_row("a.png"), image_row("b.png")])
    assert len(prepare(data, data.train, chat_processor, seed=0).media) == 1
    Image.new("RGB", (32, 32), (10, 10, 200)).save(tmp_path / "b.png")
    assert len(prepare(data, data.train, chat_processor, seed=0).media) == 2
