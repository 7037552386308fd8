"""No row is read as something else.

Marks, tool calls, choices, missing values and fields that carry meaning.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm_tune
from tests.helpers.row_samples import file_source, good, read, write_rows
from tests.helpers.tiny_models import parsed
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.prepare.run import prepare, scratch_texts
from vlm_tune.data.sources.fields import MEANT, UNSUPPORTED, USED, is_empty
from vlm_tune.data.sources.legible import is_legible
from vlm_tune.data.types import Conversation, Media
from vlm_tune.errors import DataError
from vlm_tune.model.build import build_processor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, colour in enumerate(("red", "blue", "green")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{number}.png")
    return tmp_path


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def only(folder: Path, row: dict[str, Any], **options: Any) -> Conversation | DataError:
    """The conversation or error that one row, in a file of its own, is read as."""
    (outcome,) = read(file_source(write_rows(folder / "rows.jsonl", [row]), **options))
    return outcome


def message_of(folder: Path, row: dict[str, Any], **options: Any) -> str:
    error = only(folder, row, **options)
    assert isinstance(error, DataError), error
    return error.message


def prepared_of(
    tiny_recipe: Callable[..., str], rows: Path, source: str, more: str = ""
) -> tuple[Prepared, Any]:
    """The source's rows as a run of a tiny decoder would read them, and the tokenizer."""
    text = tiny_recipe("causal")
    head, _, rest = text.partition("data:\n")
    tail = rest[rest.index("  template:") :].replace("max_length: 128", f"max_length: 256\n{more}")
    recipe = parsed(f"{head}data:\n  train: [{source.format(path=rows)}]\n{tail}")
    processor = build_processor(recipe, scratch_texts(recipe))
    return prepare(recipe.data, recipe.data.train, processor, seed=0), processor


def as_trained(prepared: Prepared, processor: Any) -> list[tuple[str, str]]:
    """Each row as the model sees it, image slots as [i], and its trained text."""
    out = []
    for number in range(len(prepared.store)):
        example = prepared.store[number]
        shown = ""
        for token, slot in zip(
            example.input_ids.tolist(), example.image_mask.tolist(), strict=True
        ):
            shown += "[i]" if slot else processor.tokenizer.decode([token])
        while "[i][i]" in shown:
            shown = shown.replace("[i][i]", "[i]")
        labels = [label for label in example.labels.tolist() if label >= 0]
        out.append((shown, processor.tokenizer.decode(labels)))
    return out


# --- marks -------------------------------------------------------------------------------------

D1 = {
    "messages": [
        turn("user", "hello"),
        turn("assistant", "hi"),
        turn("user", "<image>what color?"),
        turn("assistant", "red"),
        turn("user", "and <image>?"),
        turn("assistant", "blue"),
    ],
    "images": ["0.png", "1.png"],
}


def test_marks_put_images_where_they_stand_in_the_tokens_of_a_run(
    folder: Path, tiny_recipe: Callable[..., str]
) -> None:
    second = {
        "prompt": r"a \<image> in words, and <image>\nhere?".replace(r"\n", "\n"),
        "completion": "red",
        "images": ["2.png"],
    }
    texts = {
        "texts": [{"user": "see <image>", "assistant": "green", "source": "x"}],
        "images": ["2.png"],
    }
    source = "{{kind: file, path: {path}}}"
    for row, shown in (
        (D1, ["user\nhello", "user\n[i]what color?", "user\nand [i]?"]),
        (second, ["user\na <image> in words, and [i]here?"]),
        (texts, ["user\nsee [i]<"]),
    ):
        prepared, processor = prepared_of(
            tiny_recipe, write_rows(folder / "rows.jsonl", [row, row]), source
        )
        for text, _ in as_trained(prepared, processor):
            assert all(piece in text for piece in shown), text
        assert [Path(str(media.source)).name for media in prepared.store[0].media] == row["images"]


@pytest.mark.parametrize("images", [[], ["0.png"], ["0.png", "1.png", "2.png"]])
@pytest.mark.parametrize("parts", [False, True])
def test_marks_and_images_that_differ_in_number_are_an_error_naming_both(
    folder: Path, images: list[str], parts: bool
) -> None:
    content: Any = "<image> and <image>?"
    if parts:
        content = [{"type": "image"}, {"type": "text", "text": "and <image>?"}]
    for row in (
        {"messages": [turn("user", content), turn("assistant", "a")], "images": images},
        {
            "prompt": [turn("user", content)],
            "completion": [turn("assistant", "a")],
            "images": images,
        },
        {"prompt": "<image> and <image>?", "completion": "a", "images": images},
        {"instruction": "<image> and <image>?", "output": "a", "images": images},
        {"texts": [{"user": "<image> and <image>?", "assistant": "a"}], "images": images},
        {
            "conversations": [
                {"from": "human", "value": "<image> and <image>?"},
                {"from": "gpt", "value": "a"},
            ],
            "images": images,
        },
    ):
        number = (
            f"{len(images)} image{'' if len(images) == 1 else 's'} and 2 <image> marks or "
            "parts in the questions"
        )
        error = only(folder, row)
        assert (
            isinstance(error, DataError) and error.kind == "image_count" and number in error.message
        )
        assert (r"(\<image> is the text itself)" in error.message) == (len(images) < 2)


def test_a_mark_of_a_system_text_takes_an_image_and_one_in_an_answer_is_text(folder: Path) -> None:
    row = {
        "messages": [
            turn("system", "like <image>"),
            turn("user", "what?"),
            turn("assistant", "a <image>"),
        ],
        "images": ["0.png"],
    }
    conversation = only(folder, row)
    assert isinstance(conversation, Conversation)
    assert [message.parts for message in conversation.messages] == [
        ("like ", Media(folder / "0.png")),
        ("what?",),
        ("a <image>",),
    ]
    row = {
        "messages": [turn("user", "what?"), turn("assistant", "<image> it is")],
        "images": ["0.png"],
    }
    assert "turn 2: a mark in an answer, and none in the questions" in message_of(folder, row)
    row["messages"][0]["content"] = "<image>what?"
    assert isinstance(only(folder, row), Conversation)


def test_marks_in_task_rows_and_in_a_prompt_set_place_images(folder: Path) -> None:
    row = {"images": ["0.png", "1.png"], "question": "Is <image> like <image>?", "answer": "no"}
    conversation = only(folder, row)
    assert isinstance(conversation, Conversation)
    assert conversation.messages[0].parts == (
        "Is ",
        Media(folder / "0.png"),
        " like ",
        Media(folder / "1.png"),
        "?",
    )
    prompt_set = folder / "own.yaml"
    prompt_set.write_text(
        "task: vqa\nlanguage: en\nprompts: ['{question}\n\n  <image>']\nanswer: '{answer}'\n"
    )
    conversation = only(
        folder,
        {"image": "0.png", "question": "What?", "answer": "red"},
        instructions=str(prompt_set),
    )
    assert isinstance(conversation, Conversation) and conversation.messages[0].parts == (
        "What?\n",
        Media(folder / "0.png"),
    )


def test_numbered_parts_are_checked(folder: Path) -> None:
    def row(*indices: Any) -> dict[str, Any]:
        parts = [
            {"type": "image"} if index is None else {"type": "image", "index": index}
            for index in indices
        ]
        return {
            "messages": [
                turn("user", [*parts, {"type": "text", "text": "?"}]),
                turn("assistant", "a"),
            ],
            "images": ["0.png", "1.png"],
        }

    conversation = only(folder, row(1, 0, 1))
    assert isinstance(conversation, Conversation) and [
        Path(str(media.source)).name for media in conversation.media
    ] == ["1.png", "0.png", "1.png"]
    assert "`index` is 2, and the row has 2 images" in message_of(folder, row(2))
    assert "`index` is true" in message_of(folder, row(True))
    assert "2 images, and no part has the `index` 1" in message_of(folder, row(0))
    assert "some image parts have an `index`, and other places have none" in message_of(
        folder, row(0, None)
    )


# --- what nothing here renders -----------------------------------------------------------------

CALL = [{"type": "function", "function": {"name": "look", "arguments": "{}"}}]
TURNS = [
    turn("user", "what?"),
    turn("assistant", "let me look"),
    turn("user", "result: 5"),
    turn("assistant", "five"),
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tool_calls", CALL),
        ("function_call", {"name": "look"}),
        ("name", "Bob"),
        ("audio", {"id": "x"}),
        ("images", ["0.png"]),
        ("loss_scale", 0.5),
    ],
)
def test_a_turn_with_something_that_nothing_renders_is_refused_by_its_name(
    folder: Path, name: str, value: Any
) -> None:
    turns = [TURNS[0], {**TURNS[1], name: value}, *TURNS[2:]]
    assert f"messages, turn 2: `{name}` is not supported" in message_of(folder, {"messages": turns})
    row = {"prompt": turns[:3], "completion": turns[3:]}
    assert f"prompt, turn 2: `{name}` is not supported" in message_of(folder, row)
    speakers = [
        {"from": "human" if each["role"] == "user" else "gpt", "value": each["content"]}
        for each in turns
    ]
    speakers[1][name] = value
    assert f"conversations, turn 2: `{name}` is not supported" in message_of(
        folder, {"conversations": speakers}
    )
    assert isinstance(only(folder, {"messages": turns}, ignore=[name]), Conversation)
    for empty in (None, "", [], {}, "[]"):
        assert isinstance(
            only(folder, {"messages": [TURNS[0], {**TURNS[1], name: empty}, *TURNS[2:]]}),
            Conversation,
        )


@pytest.mark.parametrize("field", sorted(UNSUPPORTED))
def test_tools_and_their_like_beside_the_turns_are_refused_unless_empty(
    folder: Path, field: str
) -> None:
    for empty in (None, "", [], "[]", {}, "null", [None]):
        assert isinstance(only(folder, {"messages": TURNS, field: empty}), Conversation)
    for row in (
        {"messages": TURNS},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "output": "a"},
    ):
        error = only(folder, {**row, field: CALL})
        assert (
            isinstance(error, DataError)
            and error.kind == "unsupported"
            and f"`{field}` is not supported" in error.message
        )
        assert isinstance(only(folder, {**row, field: CALL}, ignore=[field]), Conversation)


def test_results_of_tools_and_parts_that_nothing_reads_are_refused(folder: Path) -> None:
    for role in ("tool", "function"):
        error = only(folder, {"messages": [TURNS[0], turn(role, "5"), TURNS[3]]})
        assert (
            isinstance(error, DataError)
            and error.kind == "unsupported"
            and f"turn 2: the role '{role}'" in error.message
        )
    for kind in ("tool_use", "input_file", "thinking"):
        error = only(folder, {"messages": [turn("user", [{"type": kind, "text": "x"}]), TURNS[3]]})
        assert (
            isinstance(error, DataError)
            and error.kind == "unsupported"
            and f"got '{kind}'" in error.message
        )


def test_loss_of_a_turn_is_read_as_train_is(folder: Path) -> None:
    for value, trained in (
        (False, False),
        (0, False),
        (0.0, False),
        (True, True),
        (1, True),
        (None, True),
    ):
        conversation = only(folder, {"messages": [TURNS[0], turn("assistant", "a", loss=value)]})
        assert (
            isinstance(conversation, Conversation) and conversation.messages[1].trained is trained
        )
    assert "`loss` must be 0 or 1, got 0.5" in message_of(
        folder, {"messages": [TURNS[0], turn("assistant", "a", loss=0.5)]}
    )


# --- choices -----------------------------------------------------------------------------------

MOON = {
    "image": "0.png",
    "question": "Which is bigger?",
    "choices": ["the sun", "the moon"],
    "answer": 0,
}


@pytest.mark.parametrize(
    ("prompts", "answer"), [("multiple_choice", "A"), ("multiple_choice-text", "the sun")]
)
def test_choices_are_shown_and_answered_in_the_tokens_of_a_run(
    folder: Path, tiny_recipe: Callable[..., str], prompts: str, answer: str
) -> None:
    rows = write_rows(folder / "rows.jsonl", [{**MOON, "id": str(number)} for number in range(4)])
    prepared, processor = prepared_of(
        tiny_recipe, rows, f"{{{{kind: file, path: {{path}}, instructions: {prompts}}}}}"
    )
    for shown, trained in as_trained(prepared, processor):
        assert "Which is bigger?" in shown and "A. the sun\nB. the moon" in shown
        assert trained.startswith(answer) and trained.removeprefix(answer).startswith("<")


def test_choices_are_shuffled_by_seed_and_row_and_the_answer_goes_along(folder: Path) -> None:
    rows = [
        {**MOON, "choices": ["a1", "b2", "c3", "d4"], "answer": "c3", "id": str(number)}
        for number in range(40)
    ]
    path = write_rows(folder / "rows.jsonl", rows)

    def lines(seed: int, **options: Any) -> list[tuple[str, str]]:
        conversations = good(read(file_source(path, **options), seed=seed))
        return [(row.messages[0].text, row.messages[1].text) for row in conversations]

    plain, first = lines(0), lines(0, shuffle_choices=True)
    assert {answer for _, answer in plain} == {"C"} and {answer for _, answer in first} == set(
        "ABCD"
    )
    assert first == lines(0, shuffle_choices=True) != lines(1, shuffle_choices=True)
    assert all(f"{answer}. c3" in question for question, answer in first)
    texts = lines(0, shuffle_choices=True, instructions="multiple_choice-text")
    assert {answer for _, answer in texts} == {"c3"}


AMBIGUOUS = {
    "a number that is a text and a place": (
        {"choices": [1, 2, 3], "answer": 1},
        {"index": "B", "text": "A", "index_from_1": "A"},
    ),
    "as text": ({"choices": ["10", "0", "1"], "answer": "1"}, {"index": "B", "text": "C"}),
    "a letter that is a text": (
        {"choices": ["B", "A"], "answer": "A"},
        {"letter": "A", "text": "B"},
    ),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_an_answer_that_can_be_read_in_two_ways_is_refused_until_told(
    folder: Path, name: str
) -> None:
    more, answers = AMBIGUOUS[name]
    row = {**MOON, **more}
    error = only(folder, row)
    assert (
        isinstance(error, DataError)
        and error.kind == "ambiguous"
        and "`answer_is`" in error.message
    )
    for how, answer in answers.items():
        conversation = only(folder, row, answer_is=how)
        assert isinstance(conversation, Conversation) and conversation.messages[1].text == answer
    if name != "a letter that is a text":
        other = {"image": "0.png", "label": row["answer"], "choices": row["choices"]}
        error = only(folder, other)
        assert isinstance(error, DataError) and error.kind == "ambiguous"
        other = {"image": "0.png", "answer": row["answer"], "candidates": row["choices"]}
        error = only(folder, other)
        assert isinstance(error, DataError) and error.kind == "ambiguous"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"answer": 2}, "`answer` 2 is not one of the 2 choices by text, letter or place from 0"),
        ({"answer": -1}, "`answer` -1 is not one"),
        ({"answer": "C"}, "`answer` 'C' is not one"),
        ({"answer": True}, "`answer` true is not one"),
        ({"answer": None, "label": None}, "no `answer`"),
        ({"choices": ["x", "x"], "answer": 0}, "the right choice 'x' comes twice"),
        ({"choices": ["x", None]}, "no text `choices`"),
        ({"choices": ["x", float("nan")]}, "`choices` is nan, which is no value"),
        ({"choices": ["x"]}, "`choices` has 1 choices"),
        (
            {"choices": ["x", "y"], "options": ["x", "y"]},
            "several lists of choices: choices, options",
        ),
        ({"label": 1}, "both `answer` and `label`"),
    ],
)
def test_choices_that_make_no_question_are_errors(
    folder: Path, more: dict[str, Any], message: str
) -> None:
    assert message in message_of(folder, {**MOON, **more}, form="multiple_choice")


def test_choices_as_tables_on_the_hub_keep_them(folder: Path) -> None:
    row = {"image": "0.png", "question": "Q?", "options": "['$6', \"it's 7\"]", "answer": "B"}
    (conversation,) = good(read(file_source(write_rows(folder / "rows.csv", [row]))))
    assert "B. it's 7" in conversation.messages[0].text and conversation.messages[1].text == "B"
    row["options"] = "['$6', open('x')]"
    (bad,) = read(file_source(write_rows(folder / "rows.csv", [row]), form="multiple_choice"))
    assert (
        isinstance(bad, DataError)
        and "`options` is a list, and its text is not JSON" in bad.message
    )


# --- fields that carry meaning -----------------------------------------------------------------

TASK_ROWS = {
    "vqa": {"image": "0.png", "question": "q?", "answer": "a"},
    "caption": {"image": "0.png", "caption": "red"},
    "ocr": {"image": "0.png", "text": "red"},
    "classify": {"image": "0.png", "label": "x", "choices": ["x", "y"]},
    "messages": {"messages": TURNS},
    "llava": {
        "conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}],
        "image": "0.png",
    },
    "alpaca": {"instruction": "q", "output": "a"},
}


@pytest.mark.parametrize("form", TASK_ROWS)
def test_a_field_that_carries_meaning_and_is_not_read_is_an_error(folder: Path, form: str) -> None:
    row = {
        **TASK_ROWS[form],
        "split": "train",
        "source": "web",
        "score": 0.5,
        "width": 640,
        "url": "http://x",
    }
    assert isinstance(only(folder, row, form=form), Conversation)
    for field in sorted(MEANT - USED[form]):
        error = only(folder, {**row, field: ["p", "q"]}, form=form)
        assert (
            isinstance(error, DataError)
            and error.kind in ("unused_field", "unsupported")
            and f"`{field}`" in error.message
        )
        assert "`ignore`" in error.message
        assert isinstance(
            only(folder, {**row, field: ["p", "q"]}, form=form, ignore=[field]), Conversation
        )
    assert isinstance(only(folder, {**row, "weight": 1.0}, form=form), Conversation)


def test_a_detected_task_does_not_drop_a_question(folder: Path) -> None:
    row = {"image": "0.png", "caption": "red", "question": "what?"}
    error = only(folder, row)
    assert (
        isinstance(error, DataError)
        and "`question` ('what?') is not read by the caption form" in error.message
    )
    assert isinstance(only(folder, row, form="caption"), Conversation)
    row = {"image": "0.png", "question": "what?", "answer": "a", "A": "x", "B": "y"}
    assert (
        "`A, B` ('x') is not read by the vqa form: `form: multiple_choice` reads it"
        in message_of(folder, row, form="vqa")
    )


def test_empty_is_no_reason_to_refuse_a_row(folder: Path) -> None:
    for more in (
        {"images": []},
        {"images": None},
        {"images": ""},
        {"videos": []},
        {"tools": "[]"},
        {"choices": []},
        {"label": ""},
    ):
        conversation = only(folder, {**TASK_ROWS["vqa"], **more})
        assert isinstance(conversation, Conversation) and len(conversation.media) == 1
    conversation = only(folder, {**TASK_ROWS["messages"], "image": ""})
    assert isinstance(conversation, Conversation) and not conversation.media
    for lost in ([None], [""], [float("nan")]):
        error = only(folder, {**TASK_ROWS["messages"], "images": lost})
        assert isinstance(error, DataError)
    assert is_empty({"bytes": None, "path": None}) and not is_empty(0) and not is_empty("0")


# --- missing values ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "null",
        '""',
        '" "',
        '"\\u200b"',
        '"\\ufeff"',
        '"\\u0007"',
        '"\\u0301"',
    ],
)
def test_no_answer_is_never_taught(folder: Path, value: str) -> None:
    path = folder / "rows.jsonl"
    path.write_text(f'{{"image": "0.png", "question": "q?", "answer": {value}}}\n')
    (error,) = read(file_source(path, form="vqa"))
    assert isinstance(error, DataError) and "`answer`" in error.message
    path.write_text(
        f'{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", '
        f'"content": {value}}}]}}\n'
    )
    (error,) = read(file_source(path, form="messages"))
    assert isinstance(error, DataError) and error.kind in ("field", "empty_answer")


@pytest.mark.parametrize(
    "text", ["a", "0", "-", "…", "é", "\u200bno", "是", "😀", "👨‍👩‍👧", "\u0301a", "$", "\ufffd"]
)
def test_what_can_be_seen_is_an_answer(text: str) -> None:
    assert is_legible(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\t",
        "\u200b",
        "\ufeff",
        "\x00\x1b",
        "\u202e",
        "\u3164",
        "\u2800",
        "\u00ad",
        "\u0301",
    ],
)
def test_what_can_not_be_seen_is_none(text: str) -> None:
    assert not is_legible(text)


def test_cells_that_are_no_value_are_missing_and_those_that_may_be_are_asked_about(
    folder: Path,
) -> None:
    answers = ["red", "nan", "NaN", "null", "", "#N/A", "<NA>", "None", "NA", "none", "na"]
    path = folder / "rows.csv"
    path.write_text(
        "image,question,answer\n" + "".join(f"0.png,q?,{answer}\n" for answer in answers)
    )
    rows = read(file_source(path))
    kinds = [row.kind if isinstance(row, DataError) else row.messages[-1].text for row in rows]
    assert kinds == ["red", *["missing_field"] * 6, "ambiguous", "ambiguous", "none", "na"]
    assert (
        "`answer` is 'None', a text or a missing value: say which with the source's `null_values`"
        in str(rows[7])
    )
    refused = [
        isinstance(row, DataError)
        for row in read(
            file_source(path, null_values=["", "nan", "NaN", "null", "#N/A", "<NA>", "NA"])
        )
    ]
    assert refused == [False, *[True] * 6, False, True, False, False]
    # In JSON a text is a text, unless the recipe says otherwise.
    row = {"image": "0.png", "question": "q?", "answer": "NA"}
    assert isinstance(only(folder, row), Conversation)
    assert "no text `answer`" in message_of(folder, row, null_values=["NA"], form="vqa")


def test_a_check_names_the_rows_and_a_run_does_not_train_on_them(
    folder: Path, tiny_recipe: Callable[..., str]
) -> None:
    rows = [TASK_ROWS["vqa"]] * 6
    path = folder / "rows.jsonl"
    bad = [
        MOON,
        {**TASK_ROWS["vqa"], "answer": "\u200b"},
        {**TASK_ROWS["vqa"], "tools": CALL},
        {**TASK_ROWS["vqa"], "answer": "\ufeff"},
    ]
    lines = [*rows, *bad]
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in lines)
        + '{"image": "0.png", "question": "q?", "answer": NaN}\n'
    )
    text = tiny_recipe("causal")
    head, _, rest = text.partition("data:\n")
    recipe = parsed(
        f"{head}data:\n  train: [{{kind: file, path: {path}, form: vqa}}]\n  on_bad_row: "
        f"skip\n{rest[rest.index('  template:') :]}"
    )
    report = vlm_tune.check(recipe)
    assert [
        (finding.row, finding.kind)
        for finding in sorted(report.warnings, key=lambda one: one.row)
        if 6 < finding.row < 12
    ] == [
        (7, "unused_field"),
        (8, "missing_field"),
        (9, "unsupported"),
        (10, "missing_field"),
        (11, "missing_field"),
    ]


# --- reasoning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [TURNS[0], TURNS[1]]},
        {"prompt": [TURNS[0]], "completion": [TURNS[1]]},
        {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}]},
        {"texts": [{"user": "what?", "assistant": "this"}]},
        {"prompt": [TURNS[0]], "chosen": [TURNS[1]], "rejected": [TURNS[3]]},
    ],
    ids=["messages", "prompt_completion", "sharegpt", "cauldron", "preference"],
)
def test_the_reasoning_of_a_turn_is_read(folder: Path, row: dict[str, Any], name: str) -> None:
    field = list(row)[0 if len(row) == 1 else 1]
    row = {**row, field: [*row[field][:-1], {**row[field][-1], name: "Let me see."}]}
    conversation = only(folder, row)
    assert isinstance(conversation, Conversation), conversation
    assert conversation.messages[-1].reasoning == "Let me see."
    assert not any(message.reasoning for message in conversation.messages[:-1])
    ignored = only(folder, row, ignore=[name])
    assert isinstance(ignored, Conversation) and not ignored.messages[-1].reasoning


@pytest.mark.parametrize(
    "row",
    [
        {"image": "0.png", "question": "what?", "answer": "this"},
        {"image": "0.png", "question": "what?", "choices": ["this", "that"], "answer": "this"},
        {"instruction": "what?", "output": "this"},
        {"prompt": "what?", "completion": "this"},
    ],
    ids=["vqa", "multiple_choice", "alpaca", "prompt_completion"],
)
def test_the_reasoning_of_a_row_is_that_of_its_answer(folder: Path, row: dict[str, Any]) -> None:
    conversation = only(folder, {**row, "reasoning": "Let me see."})
    assert isinstance(conversation, Conversation), conversation
    assert conversation.messages[-1].reasoning == "Let me see."
    renamed = only(folder, {**row, "rationale": "So."}, columns={"reasoning_content": "rationale"})
    assert isinstance(renamed, Conversation) and renamed.messages[-1].reasoning == "So."


def test_reasoning_that_is_not_before_one_answer_is_refused(folder: Path) -> None:
    user, answer = TURNS[:2]
    odd = {"messages": [{**user, "reasoning_content": "Why?"}, answer]}
    assert "in a turn of the user's" in message_of(folder, odd)
    odd = {"messages": [user, {**answer, "reasoning_content": ["a", "b"]}]}
    assert "must be text" in message_of(folder, odd)
    odd = {"messages": [user, {**answer, "reasoning_content": "a", "thinking": "b"}]}
    assert "`reasoning_content` and `thinking` differ" in message_of(folder, odd)
    completion = [{**answer, "reasoning": "a"}]
    odd = {"prompt": [user], "completion": completion, "reasoning": "b"}
    assert "in a field of the row, and in its last turn" in message_of(folder, odd)
    # A conversation has it in its turns; in a caption nothing reads it.
    for odd in ({"messages": [user, answer]}, {"image": "0.png", "caption": "a cup"}):
        assert "`reasoning`" in message_of(folder, {**odd, "reasoning": "b"})
