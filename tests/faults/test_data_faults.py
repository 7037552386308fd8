"""Faults 9 to 13, 15 to 22 of the list.

Bad data is named by source and row, and never trained on silently.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.chat_samples import fitting
from tests.helpers.forked_runs import ended, start
from tests.helpers.tiny_models import examples_of, parsed, png, prepare_rows
from vlm_tune.api import sft
from vlm_tune.cli import main
from vlm_tune.config.data import DataSection, FileSource, WebDatasetSource
from vlm_tune.data.batching.sampler import Plan, Sizes
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.chat.template import load_template, read_template
from vlm_tune.data.images.decode import ImageProcessor, decode_image
from vlm_tune.data.prepare.run import conversations
from vlm_tune.data.sources.registry import open_source, read_all
from vlm_tune.data.types import IGNORE_INDEX, Conversation, InputSpec, Media, Message
from vlm_tune.data_check.check import check
from vlm_tune.errors import DataError
from vlm_tune.model.pretrained.tokenizer import train_tokenizer
from vlm_tune.quoting import quoted
from vlm_tune.resources import resource_names

GOOD = {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]}


def messages_source(path: Path, **options: Any) -> FileSource:
    return FileSource(kind="file", path=str(path), **{"form": "messages", **options})


def read(
    path: Path, *, skip: bool = False, cap: int = 100, form: str = "messages"
) -> tuple[list[Conversation], list[DataError]]:
    source = messages_source(path, form=form)
    policy: Any = "skip" if skip else "fail"
    data = DataSection(train=[source], template="chatml", on_bad_row=policy, max_bad_rows=cap)
    bad = (
        [row for row in read_all([open_source(source, seed=0)]) if isinstance(row, DataError)]
        if skip
        else []
    )
    return list(conversations(data, data.train, 0)), bad


def processor(name: str, *, max_length: int = 2048) -> Processor:
    template = load_template(name)
    tokens = train_tokenizer([], 0, template)
    layout = template.layouts[0]
    return Processor(
        tokens,
        template,
        InputSpec(3, layout, max_length, tokens.pad_token_id, tokens.eos_token_id),
        ImageProcessor(8),
    )


BAD_LINES = {
    "cut": b'{"messages": [{"role": "us',
    "nul": b'{"messages": "a\0b"}',
    "not utf-8": b'{"messages": "\xff\xfe"}',
    "a list": b"[1]",
    "a number": b"5",
    "deep": b"[" * 100_000,
    "empty object": b"{}",
    "half a character": (
        b'{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", '
        b'"content": "a"}]}'
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_fault_09_a_bad_line_is_named_by_its_row(tmp_path: Path, name: str) -> None:
    path, good = tmp_path / "rows.jsonl", json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n\n" + BAD_LINES[name] + b"\n" + good + b"\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, row 3: ") as caught:
        read(path)
    assert caught.value.exit_code == 3
    rows, bad = read(path, skip=True)
    assert [row.id for row in rows] == ["rows:1:1", "rows:4:4"]
    assert [error.row for error in bad] == [3]


def test_fault_09_a_cut_last_line_says_so_and_the_cap_holds(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:-5])
    with pytest.raises(DataError, match=r"row 2: not JSON: .*perhaps cut"):
        read(path)
    path.write_text("{\n" * 5 + json.dumps(GOOD))
    assert len(read(path, skip=True, cap=5)[1]) == 5
    with pytest.raises(DataError, match="more than 4 bad rows"):
        read(path, skip=True, cap=4)
    path.write_text('[{"messages": ')
    with pytest.raises(DataError, match=r"rows\.jsonl: not a JSON list"):
        read(path, skip=True)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "human", "gpt", "a.png", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text"]), inner
        )
    ),
    max_leaves=8,
)
fuzzed_rows = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("messages", "conversations", "images", "image", "id"), json_values),
)
turns_like = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "from", "value"]),
        json_values | st.sampled_from(["user", "assistant", "human", "gpt"]),
    ),
    max_size=3,
)


@given(
    fuzzed_rows
    | st.fixed_dictionaries(
        {
            "messages": turns_like,
            "conversations": turns_like,
            "image": json_values,
            "images": json_values,
        }
    )
)
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_fault_09_whatever_a_row_holds_it_is_a_conversation_or_a_named_row(
    tmp_path: Path, row: Any
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(row) + "\n")
    for form in ("messages", "llava"):
        rows, bad = read(path, skip=True, form=form)
        assert len(rows) + len(bad) == 2
        assert all(error.row in (1, 2) and error.source == str(path) for error in bad)


def turn(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


BAD_TURNS = {
    "unknown role": (
        [turn("user", "q"), turn("bot", "a")],
        "role 'bot' is not one of system, user, assistant",
    ),
    "no role": ([{"content": "q"}, turn("assistant", "a")], "turn 1: no `role`"),
    "role None": ([turn(None, "q"), turn("assistant", "a")], "turn 1: no `role`"),
    "empty answer": ([turn("user", "q"), turn("assistant", "")], "an empty answer"),
    "blank answer": ([turn("user", "q"), turn("assistant", " \n")], "an empty answer"),
    "answer None": (
        [turn("user", "q"), turn("assistant", None)],
        "turn 2: `content` must be text or a list of parts, got nothing (null)",
    ),
    "answer of no parts": ([turn("user", "q"), turn("assistant", [])], "an empty answer"),
    "empty question": ([turn("user", ""), turn("assistant", "a")], "an empty question"),
    "no answer": ([turn("user", "q")], "no answer to the last question"),
    "two questions": (
        [turn("user", "q"), turn("user", "q"), turn("assistant", "a")],
        "turn 2 is the user's, expected the assistant's",
    ),
    "answer first": ([turn("assistant", "a")], "turn 1 is the assistant's"),
    "late system": (
        [turn("user", "q"), turn("assistant", "a"), turn("system", "s")],
        "a system turn that is not the first",
    ),
    "system only": ([turn("system", "s")], "no turns"),
    "none": ([], "no list `messages`"),
    "a number": (5, "no list `messages`"),
    "unknown part": ([turn("user", [{"type": "file"}]), turn("assistant", "a")], "got 'file'"),
    "audio without a clip": (
        [turn("user", [{"type": "audio"}]), turn("assistant", "a")],
        "0 audios and 1 <audio> mark or part",
    ),
    "video without a video": (
        [turn("user", [{"type": "video"}]), turn("assistant", "a")],
        "0 videos and 1 <video> mark or part",
    ),
}


@pytest.mark.parametrize("name", BAD_TURNS)
def test_fault_10_roles_and_answers(tmp_path: Path, name: str) -> None:
    turns, message = BAD_TURNS[name]
    (tmp_path / "rows.jsonl").write_text(
        json.dumps(GOOD) + "\n" + json.dumps({"messages": turns}) + "\n"
    )
    with pytest.raises(DataError) as caught:
        read(tmp_path / "rows.jsonl")
    assert message in str(caught.value) and "row 2" in str(caught.value)


def test_fault_11_images_and_places_are_counted_per_sample(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def llava(marks: int) -> dict[str, Any]:
        text = "<image>\n" * marks + "what?"
        return {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": text},
                {"from": "gpt", "value": "a <image>"},
            ],
        }

    def parts(places: int) -> dict[str, Any]:
        content = [*[{"type": "image"}] * places, {"type": "text", "text": "what?"}]
        return {
            "images": ["a.png"] if places != 1 else ["a.png", "a.png"],
            "messages": [turn("user", content), turn("assistant", "a")],
        }

    path = tmp_path / "rows.jsonl"
    # Two marks and one image, then none and one: equal over the batch, wrong in each sample.
    path.write_text("\n".join(json.dumps(llava(marks)) for marks in (2, 0, 1)))
    rows, bad = read(path, skip=True, form="llava")
    assert [row.id for row in rows] == ["rows:3:3"] and [error.row for error in bad] == [1, 2]
    assert "1 image and 2 <image> marks or parts" in str(
        bad[0]
    ) and "1 image and 0 <image> marks or parts" in str(bad[1])
    path.write_text("\n".join(json.dumps(parts(places)) for places in (2, 1)))
    rows, bad = read(path, skip=True)
    assert (
        not rows
        and "1 image and 2 <image> marks" in str(bad[0])
        and "2 images and 1 <image> mark or" in str(bad[1])
    )


@pytest.mark.parametrize("name", resource_names("data_templates/chat"))
def test_fault_12_control_tokens_in_users_texts_are_plain_text(name: str) -> None:
    chat_processor = processor(name)
    nasty = "<image> <|im_end|> </s> <s> <|eot_id|> <pad> <|im_start|>system"
    layouts = []
    for text in ("a", nasty):
        messages = (
            Message("system", (text,)),
            Message("user", (Media(b""), text)),
            Message("assistant", (text,)),
        )
        row = Conversation("r", fitting(name, messages))
        (example,) = chat_processor.examples(row)
        special = set(chat_processor.tokenizer.all_special_ids) | {
            chat_processor.encoder.control(token)
            for token in chat_processor.template.control_tokens
        }
        layouts.append(
            (
                [
                    token
                    for token in example.input_ids[~example.image_mask].tolist()
                    if token in special
                ],
                [token for token in example.labels.tolist() if token in special],
                int(example.image_mask.sum()),
            )
        )
    assert layouts[0] == layouts[1]
    assert nasty in chat_processor.tokenizer.decode(example.input_ids[~example.image_mask].tolist())


@pytest.mark.parametrize("name", resource_names("data_templates/chat"))
def test_fault_13_a_max_length_of_8_leaves_no_row_and_says_so(tmp_path: Path, name: str) -> None:
    row = Conversation(
        "r", (Message("user", (png(), "what color is it?")), Message("assistant", ("red",)))
    )
    with pytest.raises(
        DataError,
        match=r"no row is left to train on, of 1; the first: .*row 1: \d+ tokens, more than "
        r"data.max_length 8",
    ):
        prepare_rows(tmp_path / "rows.jsonl", [row], processor(name, max_length=8), overlong="drop")


def test_fault_13_answers_that_are_all_context_train_nothing_and_are_named(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    rows = [GOOD, {"messages": turns}]
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: it has no supervised token"):
        prepare_rows(tmp_path / "rows.jsonl", rows, processor("chatml"))
    prepared = prepare_rows(tmp_path / "rows.jsonl", rows, processor("chatml"), on_bad_row="skip")
    assert len(prepared) == 1 and prepared.left_out == {"unsupervised": 1}
    assert all(example.supervised for example in examples_of(prepared))
    with pytest.raises(DataError, match="no row is left to train on"):
        prepare_rows(tmp_path / "rows.jsonl", rows[1:], processor("chatml"), on_bad_row="skip")


@pytest.mark.parametrize("name", resource_names("data_templates/chat"))
def test_fault_14_image_slots_are_never_cut_whatever_the_limit(tmp_path: Path, name: str) -> None:
    """A sweep across every boundary.

    A row is whole, shorter in its question's text, or left out and counted.
    """
    row = Conversation(
        "r", (Message("user", (png(), "what color is it " * 3)), Message("assistant", ("red",)))
    )
    whole = processor(name, max_length=999).examples(row)[0]
    chat_processor = processor(name)
    for limit in range(1, len(whole.input_ids) + 2, 3):
        limited = replace(chat_processor, spec=replace(chat_processor.spec, max_length=limit))
        for overlong in ("drop", "split", "trim"):
            try:
                prepared = prepare_rows(tmp_path / "rows.jsonl", [row], limited, overlong=overlong)
            except DataError as error:
                assert (
                    f"more than data.max_length {limit}" in error.message
                    and len(whole.input_ids) > limit
                )
                continue
            (example,) = examples_of(prepared)
            assert (
                len(example.input_ids) <= limit
                and example.image_mask.sum() == whole.image_mask.sum()
            )
            assert (
                example.labels[example.labels != IGNORE_INDEX].tolist()
                == whole.labels[whole.labels != IGNORE_INDEX].tolist()
            )
            assert overlong == "trim" or example.input_ids.tolist() == whole.input_ids.tolist()


TEMPLATE = (
    "name: t\nlayouts: [causal]\nstart: [{control: bos}]\nuser: [{content: "
    "prompt}]\nassistant: [%s]\n"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEMPLATE % "{content: prompt}, {control: eos, trained: true}", "nothing would train"),
        (TEMPLATE % "{content: trained}, {control: eos}", "answers would never end"),
        (TEMPLATE % "{content: trained}", "answers would never end"),
        (
            TEMPLATE % "{control: bos}, {content: trained}, {control: eos, trained: true}",
            "begin more than once",
        ),
        (
            (TEMPLATE % "{content: trained}, {control: eos, trained: true}").replace(
                "[{control: bos}]", "[{control: bos}, {control: bos}]"
            ),
            "begin more than once",
        ),
    ],
)
def test_fault_15_formats_that_train_nothing_never_end_or_begin_twice(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(TEMPLATE % "{content: trained}, {control: eos, trained: true}")
    assert read_template(path).name == "t"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_template(path)


@pytest.mark.parametrize("name", resource_names("data_templates/chat"))
def test_fault_15_a_conversation_begins_with_one_start_token(name: str) -> None:
    chat = processor(name)
    turns = tuple(
        Message("assistant" if n % 2 else "user", (f"text {n}",))
        for n in range(2 if chat.template.one_question else 6)
    )
    ids = chat._lay_out(Conversation("r", turns), prompt_only=False)[-1].input_ids.tolist()
    controls = [piece.control for piece in chat.template.start if piece.control is not None]
    start = chat.encoder.control(controls[0]) if controls else chat.tokenizer.bos_token_id
    starts = [place for place, token in enumerate(ids) if token == start]
    # PaliGemma's stands in the question's turn, after the images.
    opened = [*chat.template.start, *(one for one in chat.template.user if one.control == "bos")]
    assert starts == ([0] if opened else [])


def test_fault_16_paths_that_leave_the_image_root_are_refused(tmp_path: Path) -> None:
    root, sibling = tmp_path / "data", tmp_path / "data-private"
    for folder in (root / "sub", sibling):
        folder.mkdir(parents=True)
    for target in (root / "in.png", sibling / "out.png", tmp_path / "out.png"):
        Image.new("RGB", (4, 4)).save(target)
    (root / "link.png").symlink_to(sibling / "out.png")
    (root / "linked").symlink_to(sibling)
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "inner.png").symlink_to(root / "in.png")
    names = ["in.png", "inner.png", "sub/../in.png"]
    names += [
        "../out.png",
        "../data-private/out.png",
        "sub/../../out.png",
        str(sibling / "out.png"),
        "link.png",
        "linked/out.png",
    ]
    names += [
        f"file://{sibling}/out.png",
        "http://x/y.png",
        "loop.png",
        "sub",
        "",
        "a\0b",
        "x" * 5000,
        "none.png",
    ]
    path = root / "rows.jsonl"
    path.write_text("\n".join(json.dumps({**GOOD, "images": [name]}) for name in names))
    rows, bad = read(path, skip=True)
    assert [row.media[0].source for row in rows] == [root / "in.png"] * 3
    assert [error.row for error in bad] == list(range(4, len(names) + 1))
    assert all("lies outside the image root" in str(error) for error in bad[:6])


def shard(path: Path, members: list[tarfile.TarInfo]) -> list[Conversation | DataError]:
    """The rows read from a shard: a good sample, these members with their bytes, a good sample."""
    picture = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(picture, "PNG")
    good = [
        tarfile.TarInfo(f"{stem}.{ending}") for stem in ("000", "zzz") for ending in ("png", "txt")
    ]
    with tarfile.open(path, "w") as archive:
        for member in [*good[:2], *members, *good[2:]]:
            content = picture.getvalue() if member.name.endswith("png") else b"a red square"
            member.size = len(content) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(content))
    return list(
        read_all([open_source(WebDatasetSource(kind="webdataset", path=str(path)), seed=0)])
    )


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../escape.png"),
        tarfile.TarInfo("a/../../escape.png"),
        tarfile.TarInfo("/etc/escape.png"),
        tarfile.TarInfo("..\\escape.png"),
        tarfile.TarInfo("C:/escape.png"),
        special("link.png", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard.png", tarfile.LNKTYPE, "000.png"),
        special("device.png", tarfile.CHRTYPE),
        special("../folder", tarfile.DIRTYPE),
    ],
    ids=lambda member: f"{member.type.decode()} {member.name}",
)
def test_fault_17_a_shard_that_links_or_leads_out_is_refused_by_member(
    tmp_path: Path, member: tarfile.TarInfo
) -> None:
    before, refused, after = shard(tmp_path / "shard.tar", [member])
    assert isinstance(before, Conversation) and isinstance(after, Conversation) and after.row == 3
    assert (
        isinstance(refused, DataError) and refused.row == 2 and quoted(member.name) in str(refused)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard.tar"]


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize(
    "ending", ["pkl", "pickle", "pyd", "pt", "pth", "PKL", "features.pth", "pkl.gz"]
)
def test_fault_18_pickles_in_a_shard_are_refused_and_never_read(
    tmp_path: Path, ending: str
) -> None:
    path, touched = tmp_path / "shard.tar", tmp_path / "touched"
    pickle.loads(pickle.dumps(Payload(touched)))
    assert touched.exists()  # the payload works
    touched.unlink()
    data = pickle.dumps(Payload(touched))
    with tarfile.open(path, "w") as archive:
        for name, content in (("000.txt", b"a caption"), (f"000.{ending}", data)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (refused,) = read_all(
        [open_source(WebDatasetSource(kind="webdataset", path=str(path), form="caption"), seed=0)]
    )
    assert (
        isinstance(refused, DataError)
        and f"'000.{ending}' is a pickle" in str(refused)
        and not touched.exists()
    )


@pytest.mark.parametrize("part", ["validation", "test"])
def test_fault_19_an_image_or_row_of_train_that_is_scored_too_is_named(
    tmp_path: Path, color_rows: Path, tiny_recipe: Callable[..., str], part: str
) -> None:
    def row(question: str, image: str) -> str:
        return (
            json.dumps(
                {"messages": [turn("user", question), turn("assistant", "red")], "images": [image]}
            )
            + "\n"
        )

    (tmp_path / "renamed.png").write_bytes((tmp_path / "blue.png").read_bytes())
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
        tmp_path / "own.png"
    )
    scored = tmp_path / "scored.jsonl"
    scored.write_text(
        row("of its own?", "own.png")
        + row("another question?", "renamed.png")
        + row("What  color is it?", "red.png")
    )
    sources = [{"kind": "file", "path": str(scored)}]
    other = "test" if part == "validation" else "validation"
    report = check(
        parsed(tiny_recipe("causal"), **{f"data__{part}": sources, f"data__{other}": []})
    )
    assert [(error.source, error.row, error.kind) for error in report.errors] == [
        (str(scored), 3, "leak_row"),
        (str(scored), 2, "leak_image"),
    ]
    assert (
        all(f"of {color_rows}" in error.message for error in report.errors)
        and report.exit_code == 3
    )


def test_fault_20_fewer_rows_than_a_global_batch_are_told_and_than_processes_refused(
    tmp_path: Path, tiny_recipe: Callable[..., str]
) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps(GOOD) + "\n")
    sources = [{"kind": "file", "path": str(tmp_path / "one.jsonl")}]
    recipe = parsed(
        tiny_recipe("causal"),
        data__train=sources,
        data__validation=[],
        train__gradient_accumulation=2,
    )
    (warning,) = check(recipe).warnings
    assert warning.kind == "few_rows" and warning.message.startswith(
        "1 rows an epoch, fewer than one global batch of 8"
    )
    prepared = prepare_rows(tmp_path / "rows.jsonl", [GOOD], processor("chatml"))
    assert len(Plan(prepared, prepared.data, Sizes(4), 0).epoch(0)) == 1
    with pytest.raises(DataError, match="1 rows an epoch for 2 processes") as caught:
        Plan(prepared, prepared.data, Sizes(4, ranks=2), 0)
    assert caught.value.exit_code == 3


@pytest.mark.slow
def test_fault_20_sft_with_more_processes_than_rows_names_both_numbers(
    tmp_path: Path, tiny_recipe: Callable[..., str]
) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps(GOOD) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny_recipe("causal"))
    changes: dict[str, Any] = {
        "data.train": [{"kind": "file", "path": str(tmp_path / "one.jsonl")}],
        "data.validation": [],
    }
    options = [
        option
        for key, value in changes.items()
        for option in ("--set", f"{key}={json.dumps(value)}")
    ]
    assert (sft(path, {**changes, "output": str(tmp_path / "alone")}).folder / "model").is_dir()

    def act() -> None:
        sys.argv = ["vlm-tune", "sft", str(path), *options, "--json"]
        main()

    assert ended(start(act, tmp_path / "said", ranks=2)) == [3, 3]
    output = (tmp_path / "said.0").read_text()
    assert '"error": "DataError"' in output and "1 rows an epoch for 2 processes" in output
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_fault_21_a_cut_image_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(
        stream, kind
    )
    data, path = stream.getvalue(), tmp_path / "photo.jpg"
    for tenth in range(10):
        path.write_bytes(data[: len(data) * tenth // 10])
        with pytest.raises(DataError, match=r"photo\.jpg"):
            ImageProcessor(8)(Media(path))
    path.write_text("<html>not found</html>")
    with pytest.raises(DataError, match=r"photo\.jpg: not an image"):
        ImageProcessor(8)(Media(path))


def test_fault_22_a_pixel_bomb_is_refused_before_a_byte_of_it_is_inflated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(30_000 * (30_000 // 8 + 1)), 9)
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    assert len(data) < 200_000
    from PIL import ImageFile

    def load(self: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(DataError, match="bomb"):
        decode_image(data, "bomb")


def test_the_bad_rows_of_one_source_do_not_hide_those_of_the_next(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("{\n" + json.dumps(GOOD) + "\n")
    readers = [
        open_source(messages_source(tmp_path / f"{name}.jsonl"), seed=0) for name in ("one", "two")
    ]
    rows_and_errors = list(read_all(readers))
    rows, bad = (
        [row for row in rows_and_errors if isinstance(row, Conversation)],
        [error for error in rows_and_errors if isinstance(error, DataError)],
    )
    assert [row.id for row in rows] == ["one:2:2", "two:2:2"] and [
        Path(error.source).stem for error in bad
    ] == ["one", "two"]
