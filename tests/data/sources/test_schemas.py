"""Forms: one sample written in each is one conversation.

Each is told from its keys, and bad rows are named.
"""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.chat_samples import processor
from tests.helpers.row_samples import file_source, good, read, write_rows
from vlm_tune.config.data import Form
from vlm_tune.data.sources.registry import open_source
from vlm_tune.data.sources.schema_detection import NEEDS
from vlm_tune.data.types import Conversation, Media
from vlm_tune.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def sharegpt_turn(who: str, value: str, **more: Any) -> dict[str, Any]:
    return {"from": who, "value": value, **more}


def pair(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"user": question, "assistant": answer, "source": "somewhere", **more}


# One sample: a system text, a question with two images, an answer that says <image>, and a second
# question.
QUESTION, ANSWER = "<image>\nthen <image>\nWhat differs?", "Nothing, <image> is a word here."
MARKED = [
    sharegpt_turn("human", QUESTION),
    sharegpt_turn("gpt", ANSWER),
    sharegpt_turn("human", "Sure?"),
    sharegpt_turn("gpt", "Yes."),
]
THEN = [{"type": "text", "text": "then "}, {"type": "text", "text": "What differs?"}]
PLACED = [{"type": "image"}, THEN[0], {"type": "image"}, THEN[1]]
NUMBERED = [{"type": "image", "index": 1}, THEN[0], {"type": "image", "index": 0}, THEN[1]]
OWN = [{"type": "image", "image": "a.png"}, THEN[0], {"type": "image", "path": "b.png"}, THEN[1]]
URLS = [
    {"type": "image_url", "image_url": {"url": "a.png"}},
    THEN[0],
    {"type": "image_url", "image_url": "b.png"},
    THEN[1],
]
NULLS = [
    {"text": None, **part} if part["type"] == "image" else {"image": None, **part}
    for part in PLACED
]  # as Arrow keeps parts
REST = [
    turn("assistant", ANSWER),
    turn("user", "Sure?"),
    turn("assistant", [{"type": "text", "text": "Y"}, {"type": "text", "text": "es."}]),
]
SYSTEM, IMAGES = turn("system", "Be brief."), ["a.png", "b.png"]
COLUMNS = {
    "from": ["human", "gpt", "human", "gpt"],
    "value": [turn["value"] for turn in MARKED],
}  # as old data sets keep turns
SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": (
        "llava",
        {"image": IMAGES, "conversations": [sharegpt_turn("system", "Be brief."), *MARKED]},
    ),
    "sharegpt": ("sharegpt", {"images": IMAGES, "system": "Be brief.", "conversations": MARKED}),
    "sharegpt in columns": (
        "sharegpt",
        {"images": IMAGES, "system": "Be brief.", "conversations": COLUMNS},
    ),
    "sharegpt under messages": (
        "sharegpt",
        {"images": IMAGES, "system": "Be brief.", "messages": MARKED},
    ),
    "messages": ("messages", {"images": IMAGES, "messages": [SYSTEM, turn("user", PLACED), *REST]}),
    "messages from arrow": (
        "messages",
        {"images": IMAGES, "messages": [SYSTEM, turn("user", NULLS), *REST]},
    ),
    "messages, own images": ("messages", {"messages": [SYSTEM, turn("user", OWN), *REST]}),
    "messages, urls": (
        "messages",
        {"system": "Be brief.", "messages": [turn("user", URLS), *REST]},
    ),
    "messages under conversations": (
        "messages",
        {"images": IMAGES, "conversations": [SYSTEM, turn("user", PLACED), *REST]},
    ),
    "prompt_completion": (
        "prompt_completion",
        {"images": IMAGES, "prompt": [SYSTEM, turn("user", PLACED)], "completion": REST},
    ),
    "messages, marks": (
        "messages",
        {"images": IMAGES, "messages": [SYSTEM, turn("user", QUESTION), *REST]},
    ),
    "messages, marks in a part": (
        "messages",
        {
            "images": IMAGES,
            "messages": [SYSTEM, turn("user", [{"type": "text", "text": QUESTION}]), *REST],
        },
    ),
    "messages, numbered parts": (
        "messages",
        {"images": IMAGES[::-1], "messages": [SYSTEM, turn("user", NUMBERED), *REST]},
    ),
    "prompt_completion, marks": (
        "prompt_completion",
        {"images": IMAGES, "prompt": [SYSTEM, turn("user", QUESTION)], "completion": REST},
    ),
    "cauldron": (
        "cauldron",
        {
            "images": IMAGES,
            "system": "Be brief.",
            "texts": [pair(QUESTION, ANSWER), pair("Sure?", "Yes.")],
        },
    ),
    "cauldron in columns": (
        "cauldron",
        {
            "images": IMAGES,
            "system": "Be brief.",
            "texts": {"user": [QUESTION, "Sure?"], "assistant": [ANSWER, "Yes."]},
        },
    ),
    "alpaca": (
        "alpaca",
        {
            "images": IMAGES,
            "system": "Be brief.",
            "history": [[QUESTION, ANSWER]],
            "instruction": "Sure?",
            "input": "",
            "output": "Yes.",
        },
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_a_sample_is_the_same_conversation_in_every_form(folder: Path, name: str) -> None:
    reference = good(read(file_source(write_rows(folder / "llava.jsonl", [SAME["llava"][1]]))))[0]
    assert reference.media == (Media(folder / "a.png"), Media(folder / "b.png"))
    assert reference.messages[1].parts == (
        Media(folder / "a.png"),
        "then ",
        Media(folder / "b.png"),
        "What differs?",
    )
    form, row = SAME[name]
    source = file_source(write_rows(folder / "rows.jsonl", [row]))
    assert open_source(source, seed=0).form == form
    (conversation,) = good(read(source))
    assert [(m.role, m.text, m.trained) for m in conversation.messages] == [
        (m.role, m.text, m.trained) for m in reference.messages
    ]
    assert (
        conversation.media == reference.media
        and conversation.messages[:4] == reference.messages[:4]
    )
    assert (conversation.id, conversation.source, conversation.row) == (
        "rows:1:1",
        str(folder / "rows.jsonl"),
        1,
    )
    assert good(
        read(file_source(folder / "rows.jsonl", form=form, columns=renames(form, row)))
    ) == [conversation]


def renames(form: str, row: dict[str, Any]) -> dict[str, str]:
    """The renames that a recipe with `form` needs for a row with the other form's key."""
    field = "messages" if form == "messages" else "conversations"
    other = "conversations" if field == "messages" else "messages"
    return {field: other} if form in ("messages", "sharegpt") and field not in row else {}


@pytest.mark.parametrize(
    ("name", "layout"), [("chatml", "causal"), ("vicuna", "causal"), ("flan", "seq2seq")]
)
def test_the_same_conversations_are_the_same_examples(folder: Path, name: str, layout: Any) -> None:
    chat_processor = processor(name, "bytes", layout)
    examples = []
    for form in ("llava", "messages", "alpaca"):
        (row,) = good(read(file_source(write_rows(folder / "rows.jsonl", [SAME[form][1]]))))
        examples.append(chat_processor.examples(row))
    for pairs in zip(*examples, strict=True):
        ids = [
            (one.input_ids.tolist(), one.labels.tolist(), one.image_mask.tolist(), one.media)
            for one in pairs
        ]
        assert ids[0] == ids[1] == ids[2]
    assert len(examples[0]) == (1 if layout == "causal" else 2)


TASKS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "vqa": (
        "vqa",
        {"image": "a.png", "question": "what color?", "answer": "red"},
        "what color?",
        "red",
    ),
    "vqa, answers": (
        "vqa",
        {"image": "a.png", "question": "q?", "answers": ["blue", "red", "red"]},
        "q?",
        "red",
    ),
    "vqa, VQAv2": (
        "vqa",
        {
            "image": "a.png",
            "question": "q?",
            "answers": [{"answer": "2"}, {"answer": "3"}, {"answer": "2"}],
        },
        "q?",
        "2",
    ),
    "vqa, a number": (
        "vqa",
        {"image": "a.png", "question": "how many?", "answer": 3},
        "how many?",
        "3",
    ),
    "vqa, true": ("vqa", {"image": "a.png", "question": "is it?", "answer": True}, "is it?", "yes"),
    "vqa, context": (
        "vqa",
        {"image": "a.png", "context": "It is noon.", "question": "q?", "answer": "a"},
        "It is noon.\nq?",
        "a",
    ),
    "choices": (
        "multiple_choice",
        {"image": "a.png", "question": "Which?", "choices": ["the sun", "the moon"], "answer": 1},
        "A. the sun\nB. the moon",
        "B",
    ),
    "choices, letter": (
        "multiple_choice",
        {"image": "a.png", "question": "Q?", "options": ["x", "y"], "answer": "(b)"},
        "B. y",
        "B",
    ),
    "choices, text": (
        "multiple_choice",
        {"image": "a.png", "question": "Q?", "candidates": ["x", "y"], "answer": "x"},
        "A. x",
        "A",
    ),
    "choices, columns": (
        "multiple_choice",
        {"image": "a.png", "question": "Q?", "A": "x", "B": "y", "C": "", "answer": "B"},
        "B. y",
        "B",
    ),
    "choices, labels": (
        "multiple_choice",
        {
            "image": "a.png",
            "question": "Q?",
            "choices": {"label": ["1", "2"], "text": ["x", "y"]},
            "answer": "1",
        },
        "A. x",
        "A",
    ),
    "choices, true": (
        "multiple_choice",
        {"image": "a.png", "question": "Q?", "choices": ["Yes", "No"], "answer": False},
        "B. No",
        "B",
    ),
    "caption": ("caption", {"image": "a.png", "caption": "a red square"}, "", "a red square"),
    "captions": (
        "caption",
        {"image": "a.png", "caption": ["a red square", "red"]},
        "",
        "a red square",
    ),
    "classify": (
        "classify",
        {"image": "a.png", "label": "cat", "choices": ["dog", "cat"]},
        "dog, cat",
        "cat",
    ),
    "classify, place": (
        "classify",
        {"image": "a.png", "label": 1, "choices": ["dog", "cat"]},
        "dog, cat",
        "cat",
    ),
    "retrieval": (
        "retrieval",
        {"image": "a.png", "candidates": ["a cat", "a dog"], "answer": "a dog"},
        "- a cat\n- a dog",
        "a dog",
    ),
    "retrieval, place": (
        "retrieval",
        {"image": "a.png", "candidates": ["a cat", "a dog"], "answer": 0},
        "- a cat\n- a dog",
        "a cat",
    ),
    "ocr": ("ocr", {"image": "a.png", "text": "EXIT\nleft"}, "", "EXIT\nleft"),
    "translate": (
        "translate",
        {"image": "a.png", "target_language": "English", "translation": "Exit"},
        "English",
        "Exit",
    ),
    "translate a text": (
        "translate",
        {
            "image": "a.png",
            "text": "Ausgang",
            "source_language": "German",
            "target_language": "English",
            "translation": "Exit",
        },
        "Ausgang",
        "Exit",
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_row_is_detected_and_asked_in_its_prompt_set(folder: Path, name: str) -> None:
    form, row, question, answer = TASKS[name]
    source = file_source(write_rows(folder / "rows.jsonl", [row, row]))
    reader = open_source(source, seed=0)
    assert reader.form == form
    for conversation in good(read(source)):
        assert [message.role for message in conversation.messages] == ["user", "assistant"]
        assert (
            conversation.messages[0].parts[0] == Media(folder / "a.png")
            and question in conversation.messages[0].text
        )
        assert conversation.messages[1].text == answer and conversation.category == (
            answer if form == "classify" else ""
        )
    renamed = {f"their {key}": value for key, value in row.items()}
    columns = {key: f"their {key}" for key in row}
    (folder / "theirs").mkdir()
    theirs = file_source(
        write_rows(folder / "theirs" / "rows.jsonl", [renamed, renamed]),
        columns=columns,
        image_root=str(folder),
    )
    assert [row.messages for row in good(read(theirs))] == [
        row.messages for row in good(read(source))
    ]
    chinese = good(read(file_source(folder / "rows.jsonl", instructions=f"{form}-zh")))
    assert any("\u4e00" <= character <= "\u9fff" for character in chinese[0].messages[0].text)


BAD = {
    "no answer": ({"image": "a.png", "question": "q?", "answer": ""}, "vqa", "no text `answer`"),
    "answer None": (
        {"image": "a.png", "question": "q?", "answer": None},
        "vqa",
        "no text `answer`",
    ),
    "answer a list": (
        {"image": "a.png", "question": "q?", "answer": ["red"]},
        "vqa",
        "no text `answer`, got a list of 1",
    ),
    "no image": ({"question": "q?", "answer": "a"}, "vqa", "no image"),
    "image None": ({"question": "q?", "answer": "a", "image": None}, "vqa", "no image"),
    "image and images": (
        {"question": "q?", "answer": "a", "image": "a.png", "images": ["a.png"]},
        "vqa",
        "both `image` and `images`",
    ),
    "label unknown": (
        {"image": "a.png", "label": "cow", "choices": ["a", "b"]},
        "classify",
        "'cow' is not one of the 2 choices by text",
    ),
    "label out of range": (
        {"image": "a.png", "label": 2, "choices": ["a", "b"]},
        "classify",
        "`label` 2 is not one",
    ),
    "label true": (
        {"image": "a.png", "label": True, "choices": ["a", "b"]},
        "classify",
        "`label` true is not one",
    ),
    "no choices": ({"image": "a.png", "label": "a"}, "classify", "no list `choices`"),
    "answer not a candidate": (
        {"image": "a.png", "candidates": ["a"], "answer": "b"},
        "retrieval",
        "not one of the 1 candidates",
    ),
    "no language": (
        {"image": "a.png", "translation": "b"},
        "translate",
        "no text `target_language`",
    ),
    "audio": (
        {"audios": ["x.wav"], "messages": [turn("user", "q"), turn("assistant", "a")]},
        "messages",
        "audio",
    ),
    "tools": (
        {"tools": "[...]", "conversations": MARKED, "image": IMAGES},
        "sharegpt",
        "`tools` is not supported",
    ),
    "unknown speaker": (
        {"conversations": [sharegpt_turn("bot", "hi")]},
        "llava",
        "from 'bot' is not one of human, user",
    ),
    "two systems": (
        {
            "system": "a",
            "conversations": [
                sharegpt_turn("system", "b"),
                sharegpt_turn("human", "q"),
                sharegpt_turn("gpt", "a"),
            ],
        },
        "sharegpt",
        "a system turn",
    ),
    "half the images placed": (
        {"images": IMAGES, "messages": [turn("user", PLACED[:2]), *REST]},
        "messages",
        "2 images and 1 <image> mark or part in the questions",
    ),
    "half the images marked": (
        {"images": IMAGES, "instruction": "<image> what?", "output": "a"},
        "alpaca",
        "2 images and 1 <image> mark or part in the questions",
    ),
    "weight of a half": (
        {"messages": [turn("user", "q"), turn("assistant", "a", weight=0.5)]},
        "messages",
        "`weight` must be 0 or 1, got 0.5",
    ),
    "train maybe": (
        {"messages": [turn("user", "q"), turn("assistant", "a", train="no")]},
        "messages",
        "true or false, got 'no'",
    ),
    "history of texts": (
        {"instruction": "q", "output": "a", "history": ["qa"]},
        "alpaca",
        "a list of [question, answer]",
    ),
    "no completion": ({"prompt": "q", "completion": ""}, "prompt_completion", "an empty answer"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_lacks_something_says_what(folder: Path, name: str) -> None:
    row, form, message = BAD[name]
    (error,) = read(file_source(write_rows(folder / "rows.jsonl", [row]), form=form))
    assert (
        isinstance(error, DataError) and message in str(error) and "rows.jsonl, row 1" in str(error)
    )


def test_answers_without_weight_are_context(folder: Path) -> None:
    turns = [
        turn("user", "q"),
        turn("assistant", "a", weight=0),
        turn("user", "q"),
        turn("assistant", "b", weight=1),
    ]
    turns += [
        turn("user", "q"),
        turn("assistant", "c", train=False),
        turn("user", "q"),
        turn("assistant", "d", train=True, weight=None),
    ]
    marked = [
        sharegpt_turn("human", "q"),
        sharegpt_turn("gpt", "a", weight=0),
        sharegpt_turn("human", "q"),
        sharegpt_turn("gpt", "b"),
    ]
    prompt = {
        "prompt": [turn("user", "q"), turn("assistant", "a"), turn("user", "r")],
        "completion": [turn("assistant", "b")],
    }
    for row, expected in (
        ({"messages": turns}, "0101"),
        ({"conversations": marked}, "01"),
        (prompt, "01"),
    ):
        (conversation,) = good(read(file_source(write_rows(folder / "rows.jsonl", [row]))))
        assert (
            "".join(str(int(m.trained)) for m in conversation.messages if m.role == "assistant")
            == expected
        )


def test_images_without_a_place_come_first_in_the_first_question(folder: Path) -> None:
    rows = [
        {
            "images": ["a.png"],
            "messages": [turn("system", "s"), turn("user", "what?"), turn("assistant", "red")],
        },
        {"image": "a.png", "prompt": "what?", "completion": "red"},
        {"images": ["a.png"], "instruction": "what?", "output": "red"},
    ]
    for row in rows:
        (conversation,) = good(read(file_source(write_rows(folder / "rows.jsonl", [row]))))
        assert next(m for m in conversation.messages if m.role == "user").parts == (
            Media(folder / "a.png"),
            "what?",
        )


def test_an_id_names_its_row_and_a_category_is_kept(folder: Path) -> None:
    row = {**TASKS["vqa"][1], "kind": "color"}
    rows = [{**row, "id": "x"}, {**row, "id": 7}, {**row, "id": None}, {**row, "id": ["odd"]}]
    conversations = good(
        read(file_source(write_rows(folder / "rows.jsonl", rows), columns={"category": "kind"}))
    )
    assert [row.id for row in conversations] == ["rows:x:1", "rows:7:2", "rows:3:3", "rows:4:4"]
    assert {row.category for row in conversations} == {"color"}


# --- detection ---------------------------------------------------------------------------------


def test_every_form_has_its_needs_written_down() -> None:
    assert set(NEEDS) == set(Form.__args__)  # type: ignore[attr-defined]


SAMPLES = {name: row for name, (_, row) in SAME.items()} | {
    name: row for name, (_, row, *_) in TASKS.items()
}
FORM_OF = {name: form for name, (form, *_) in (SAME | TASKS).items()}  # type: ignore[operator]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"query": "q", "response": "r"},
            "can't detect the rows' form: the rows have query, response; set `form`",
        ),
        ({"image": "a.png", "question": "q", "answer": "a", "text": "t"}, "may be ocr or vqa"),
        (
            {"image": "a.png", "question": "q", "answer": "a", "candidates": ["a"], "text": "t"},
            "may be multiple_choice or ocr",
        ),
        (
            {"question": "q", "answer": "a", "instruction": "q", "output": "a"},
            "may be alpaca or vqa",
        ),
        ({"question": None, "answer": None}, "the rows have no fields"),
    ],
)
def test_rows_of_no_form_or_of_two_list_what_was_seen(
    folder: Path, row: dict[str, Any], message: str
) -> None:
    path = write_rows(folder / "rows.jsonl", [row] * 3)
    with pytest.raises(DataError) as caught:
        open_source(file_source(path), seed=0)
    assert (
        message in str(caught.value)
        and str(path) in str(caught.value)
        and (
            ": question, answer or answers" in str(caught.value)
            or ": question, choices or options" in str(caught.value)
        )
    )


@pytest.mark.parametrize(
    ("one", "other"), list(itertools.combinations(["llava", "messages", "alpaca", "vqa", "ocr"], 2))
)
def test_a_file_of_two_forms_is_refused_until_told(folder: Path, one: str, other: str) -> None:
    path = write_rows(folder / "rows.jsonl", [SAMPLES[one], SAMPLES[other]])
    with pytest.raises(DataError, match=f"may be {' or '.join(sorted([one, other]))}"):
        open_source(file_source(path), seed=0)
    first, second = read(file_source(path, form=FORM_OF[one]))
    assert isinstance(first, Conversation) and isinstance(second, DataError)


def test_text_only_rows_do_not_make_a_sharegpt_file_ambiguous(folder: Path) -> None:
    plain = {"conversations": MARKED[2:]}
    path = write_rows(folder / "rows.jsonl", [plain, SAMPLES["sharegpt"], plain])
    assert (
        open_source(file_source(path), seed=0).form == "sharegpt"
        and len(good(read(file_source(path)))) == 3
    )
    assert (
        open_source(file_source(write_rows(folder / "plain.jsonl", [plain])), seed=0).form
        == "llava"
    )


def test_unreadable_first_rows_do_not_hide_the_form(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text("{\n" * 40 + json.dumps(SAMPLES["vqa"]) + "\n")
    assert open_source(file_source(path), seed=0).form == "vqa"
    path.write_text("{\n" * 1500 + json.dumps(SAMPLES["vqa"]) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1: not JSON"):
        open_source(file_source(path), seed=0)


def test_columns_are_checked_and_a_row_that_lacks_one_says_so(folder: Path) -> None:
    row = {"pic": "a.png", "query": "q?", "reply": "a", "text": "not ours"}
    columns = {"image": "pic", "question": "query", "answer": "reply"}
    path = write_rows(folder / "rows.jsonl", [row, {"pic": "a.png", "query": "q?", "repyl": "a"}])
    first, second = read(file_source(path, form="vqa", columns=columns))
    assert isinstance(first, Conversation)
    assert isinstance(
        second, DataError
    ) and "no text `answer` (columns: the row has no reply)" in str(second)
    with pytest.raises(DataError, match=r"no form has a field 'questoin'; did you mean question\?"):
        open_source(file_source(path, columns={"questoin": "query"}), seed=0)
    with pytest.raises(
        DataError, match="instructions are for rows of a task; messages rows bring their own words"
    ):
        open_source(file_source(path, form="messages", instructions="vqa"), seed=0)
    # Two fields exchange their names.
    path = write_rows(
        folder / "rows.jsonl", [{"image": "a.png", "question": "red", "answer": "what?"}]
    )
    (conversation,) = good(
        read(file_source(path, columns={"question": "answer", "answer": "question"}))
    )
    assert (conversation.messages[0].text, conversation.messages[1].text) == ("what?", "red")


# --- whatever a row holds ----------------------------------------------------------------------

IMAGE_URL = "data:image/png;base64," + base64.b64encode(b"x").decode()
WORDS = st.sampled_from(
    [
        "user",
        "assistant",
        "human",
        "gpt",
        "system",
        "text",
        "image",
        "video",
        "a.png",
        IMAGE_URL,
        "<image>",
        "[1",
        "[]",
    ]
)
KEYS = [
    "role",
    "content",
    "from",
    "value",
    "type",
    "text",
    "image",
    "path",
    "url",
    "bytes",
    "weight",
    "train",
    "answer",
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=10,
)
FIELD_NAMES = sorted(
    {key for row in SAMPLES.values() for key in row}
    | {"id", "category", "video", "videos", "tools", "audio"}
)


@st.composite
def spoilt(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A good row of some form, some of whose fields (or fields of its turns) hold anything."""
    name = draw(st.sampled_from(sorted(SAMPLES)))
    row = json.loads(json.dumps(SAMPLES[name]))
    for field in draw(
        st.lists(st.sampled_from([*row, *row, *FIELD_NAMES]), min_size=1, max_size=3)
    ):
        value = row.get(field)
        if isinstance(value, list) and value and draw(st.booleans()):
            place = draw(st.integers(0, len(value) - 1))
            if isinstance(value[place], dict) and draw(st.booleans()):
                value[place][draw(st.sampled_from(KEYS))] = draw(VALUES)
            else:
                value[place] = draw(VALUES)
        else:
            row[field] = draw(VALUES)
    return FORM_OF[name], row


@given(spoilt())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_fault_09_a_spoilt_row_is_a_conversation_or_a_named_error(
    tmp_path: Path, sample: tuple[str, dict[str, Any]]
) -> None:
    form, row = sample
    if not (tmp_path / "a.png").exists():
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (parsed,) = read(file_source(path, form=form, shots=0))
    assert (parsed.source, parsed.row) == (str(path), 1)
    if isinstance(parsed, Conversation):
        answers = [message for message in parsed.messages if message.role == "assistant"]
        assert answers and all(message.text.strip() for message in answers)
    try:
        open_source(file_source(path), seed=0)
    except DataError as error:
        assert str(path) in str(error)
