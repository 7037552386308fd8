"""Rows of preferences: pairs of answers, and single ones that are liked or disliked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.chat_samples import processor
from tests.helpers.row_samples import file_source, good, read, write_rows
from vlm_tune.config.data import EasyVqaSource
from vlm_tune.data.packing import branch_layout, pack_layout, separate_rows
from vlm_tune.data.sources.easy_vqa import KINDS, answer_type
from vlm_tune.data.sources.media import MediaFinder
from vlm_tune.data.sources.preferences import preference, shared_prompt, unpaired_preference
from vlm_tune.data.sources.registry import open_source
from vlm_tune.data.types import ANSWER_KINDS, IGNORE_INDEX, Conversation, Media
from vlm_tune.errors import DataError

USER = {"role": "user", "content": "what is it?"}
DOG = {"role": "assistant", "content": "a dog"}
CAT = {"role": "assistant", "content": "a cat"}
GPT_DOG = {"from": "gpt", "value": "a dog"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    return tmp_path


ALIKE: dict[str, dict[str, Any]] = {
    "conversational": {"prompt": [USER], "chosen": [DOG], "rejected": [CAT], "images": ["a.png"]},
    "texts": {"prompt": "what is it?", "chosen": "a dog", "rejected": "a cat", "image": "a.png"},
    "question": {
        "question": "what is it?",
        "chosen": "a dog",
        "rejected": "a cat",
        "image": "a.png",
    },
    "implicit prompt": {"chosen": [USER, DOG], "rejected": [USER, CAT], "images": ["a.png"]},
    "LLaMA-Factory's": {
        "conversations": [{"from": "human", "value": "<image>what is it?"}],
        "chosen": GPT_DOG,
        "rejected": {"from": "gpt", "value": "a cat"},
        "images": ["a.png"],
    },
    "LLaMA-Factory's in OpenAI's form": {
        "messages": [USER],
        "chosen": DOG,
        "rejected": CAT,
        "images": ["a.png"],
    },
    "ms-swift's": {"messages": [USER, DOG], "rejected_response": "a cat", "images": ["a.png"]},
    "ms-swift's with whole turns": {
        "messages": [USER, DOG],
        "rejected_messages": [USER, CAT],
        "images": ["a.png"],
    },
    "LLaMA-Factory's Alpaca": {
        "instruction": "what is it?",
        "input": "",
        "chosen": "a dog",
        "rejected": "a cat",
        "images": ["a.png"],
    },
    "mark": {
        "prompt": "<image>what is it?",
        "chosen": "a dog",
        "rejected": "a cat",
        "images": ["a.png"],
    },
}


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_forms_of_a_pair_are_one_conversation(folder: Path, name: str, kind: str) -> None:
    reader = open_source(file_source(write_rows(folder / f"r.{kind}", [ALIKE[name]])), seed=0)
    assert reader.form == "preference"
    (row,) = good(read(file_source(folder / f"r.{kind}")))
    assert row.rejected is not None and row.rejected.text == "a cat"
    assert [(turn.role, turn.text) for turn in row.messages] == [
        ("user", "what is it?"),
        ("assistant", "a dog"),
    ]
    assert len(row.media) == 1 and row.desirable is None


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([USER, DOG], [USER, CAT]),
        ([USER, DOG, USER, DOG], [USER, DOG, USER, CAT]),
        ("what is it? a dog", "what is it? a cat"),
        ("The sky is blue.", "The sky is green."),
    ],
)
def test_a_shared_prompt_is_that_of_trl(chosen: Any, rejected: Any) -> None:
    from trl import extract_prompt

    expected = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert shared_prompt(chosen, rejected) == tuple(
        expected[name] for name in ("prompt", "chosen", "rejected")
    )


@pytest.mark.parametrize("label", [True, False])
def test_a_judged_answer_knows_whether_it_is_liked(folder: Path, label: bool) -> None:
    rows = [{"prompt": [USER], "completion": [DOG], "label": label, "images": ["a.png"]}]
    reader = open_source(file_source(write_rows(folder / "r.jsonl", rows)), seed=0)
    assert reader.form == "unpaired_preference"
    (row,) = good(read(file_source(folder / "r.jsonl")))
    assert row.desirable is label and row.rejected is None
    (example,) = processor("chatml", "bytes", "causal").examples(row)
    assert example.answers is not None
    assert set(example.answers.tolist()) == {-1, 0 if label else 1}


@pytest.mark.parametrize(
    "turns",
    [
        {"messages": [USER, DOG]},
        {
            "conversations": [
                {"from": "human", "value": "what is it?"},
                {"from": "gpt", "value": "a dog"},
            ]
        },
    ],
    ids=["messages", "conversations"],
)
def test_the_last_turn_is_judged_where_a_row_has_turns(folder: Path, turns: Any) -> None:
    rows = [{**turns, "label": label, "images": ["a.png"]} for label in (True, False)]
    reader = open_source(file_source(write_rows(folder / "r.jsonl", rows)), seed=0)
    assert reader.form == "unpaired_preference"
    liked, disliked = good(read(file_source(folder / "r.jsonl")))
    assert (liked.desirable, disliked.desirable) == (True, False)
    assert [turn.text for turn in liked.messages] == ["what is it?", "a dog"]
    assert liked.messages[0].parts[0] == Media(folder / "a.png")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "what is it?", "input": "", "output": "a dog"},
        {"messages": [USER, DOG]},
        {"conversations": ALIKE["LLaMA-Factory's"]["conversations"] + [GPT_DOG]},
    ],
    ids=["alpaca", "messages", "conversations"],
)
def test_llama_factorys_kto_rows_are_judged_by_their_kto_tag(folder: Path, row: Any) -> None:
    rows = [{**row, "kto_tag": tag, "images": ["a.png"]} for tag in (False, True)]
    reader = open_source(file_source(write_rows(folder / "r.jsonl", rows)), seed=0)
    assert reader.form == "unpaired_preference"
    disliked, liked = good(read(file_source(folder / "r.jsonl")))
    assert (disliked.desirable, liked.desirable) == (False, True)
    assert [turn.text for turn in liked.messages] == ["what is it?", "a dog"]


def test_a_judgement_is_not_dropped_where_rows_are_read_as_another_form(folder: Path) -> None:
    rows = [{"messages": [USER, DOG], "kto_tag": True}]
    (error,) = read(file_source(write_rows(folder / "r.jsonl", rows), form="messages"))
    assert "`kto_tag` (true) is not read by the messages form" in str(error)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_label_may_be_a_text_or_a_number(folder: Path, kind: str) -> None:
    labels = ["True", "false", " 1 ", "0"] if kind == "csv" else [1.0, 0, "TRUE", "false"]
    rows = [
        {"prompt": "what is it?", "completion": "a dog", "label": label, "image": "a.png"}
        for label in labels
    ]
    reader = open_source(file_source(write_rows(folder / f"r.{kind}", rows)), seed=0)
    assert reader.form == "unpaired_preference"
    read_rows = good(read(file_source(folder / f"r.{kind}")))
    assert [row.desirable for row in read_rows] == [True, False, True, False]


@pytest.mark.parametrize("label", ["yes", 2, None])
def test_a_row_without_a_judgement_is_a_bad_one_among_others(folder: Path, label: Any) -> None:
    row = {"prompt": "what is it?", "completion": "a dog", "label": True, "image": "a.png"}
    rows = [row, row | {"label": label}, row]
    source = file_source(write_rows(folder / "r.jsonl", rows))
    (error,) = [each for each in read(source) if isinstance(each, DataError)]
    assert "row 2: `label` must be true or false" in str(error)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "equal": ({"prompt": "q", "chosen": "a dog", "rejected": "a dog "}, "the same answer"),
    "empty": ({"prompt": "q", "chosen": "a", "rejected": " "}, "`rejected` is an empty answer"),
    "no prompt": ({"chosen": [DOG], "rejected": [CAT]}, "begin with no turn that they share"),
    "two turns": (
        {"prompt": [USER], "chosen": [DOG, USER, DOG], "rejected": [CAT]},
        "`chosen` must be one turn of the assistant's after the prompt, got: assistant, user",
    ),
    "user": ({"prompt": [USER], "chosen": [USER], "rejected": [CAT]}, "got: user"),
    "order": ({"prompt": [DOG], "chosen": [DOG], "rejected": [CAT]}, "expected the user's"),
    "both": (
        {"prompt": "q", "question": "q", "chosen": "a", "rejected": "b"},
        "both `prompt` and `question`",
    ),
    "image in an answer": (
        {
            "prompt": [USER],
            "chosen": [{"role": "assistant", "content": [{"type": "image"}]}],
            "rejected": [CAT],
            "images": ["a.png"],
        },
        "`chosen` is an empty answer",
    ),
    "no answer": ({"prompt": "q", "chosen": "a", "rejected": None}, "no text or list `rejected`"),
    "an object": (
        {"prompt": [USER], "chosen": [DOG], "rejected": {"text": "a"}},
        "no text or list `rejected` of turns, got",
    ),
    "the answer alone": ({"messages": [DOG], "label": True}, "a prompt and an answer, got 1 turn"),
    "a number": ({"prompt": 3, "chosen": "a", "rejected": "b"}, "`prompt` of turns, got 3"),
    "label": ({"prompt": "q", "completion": "a", "label": "good"}, "`label` must be true or false"),
    "two labels": (
        {"prompt": "q", "completion": "a", "label": True, "kto_tag": False},
        "both `label` and `kto_tag`",
    ),
    "two rejected answers": (
        {"messages": [USER, DOG], "rejected_response": "b", "rejected_messages": [USER, CAT]},
        "both `rejected_response` and `rejected_messages`",
    ),
    "a prompt beside turns": (
        {"messages": [USER, DOG], "rejected_messages": [USER, CAT], "prompt": "x"},
        "both `messages` and `prompt`",
    ),
    "another prompt": (
        {"messages": [USER, DOG], "rejected_messages": [{**USER, "content": "where?"}, CAT]},
        "`messages` and `rejected_messages` begin with no turn that they share",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_says_what_is_wrong(folder: Path, name: str) -> None:
    row, message = BAD[name]
    form = "unpaired_preference" if "label" in row else "preference"
    (error,) = read(file_source(write_rows(folder / "rows.jsonl", [row]), form=form))
    assert isinstance(error, DataError)
    assert message in str(error) and "rows.jsonl, row 1" in str(error)


def test_no_shots_are_drawn_from_answers_that_may_be_bad(folder: Path) -> None:
    rows = [{"prompt": "q", "completion": "a", "label": True}]
    with pytest.raises(DataError, match="may be a bad one"):
        open_source(file_source(write_rows(folder / "r.jsonl", rows), shots=1), seed=0)


def pair_of(folder: Path, layout: str, *texts: str) -> Any:
    question, chosen, rejected = texts
    row = {"prompt": question, "chosen": chosen, "rejected": rejected, "images": ["a.png"]}
    (conversation,) = good(read(file_source(write_rows(folder / "p.jsonl", [row]))))
    template = "chatml" if layout == "causal" else "flan"
    (example,) = processor(template, "bytes", layout).examples(conversation)  # type: ignore[arg-type]
    return example


def labelled(example: Any, number: int) -> list[int]:
    return example.labels[example.answers == number].tolist()


@pytest.mark.parametrize("layout", ["causal", "seq2seq"])
def test_a_pair_holds_its_prompt_once_and_both_answers(folder: Path, layout: str) -> None:
    example = pair_of(folder, layout, "what?", "dog", "a cat")
    alone = [pair_of(folder, layout, "what?", answer, "z") for answer in ("dog", "a cat")]
    assert example.judged == 1 and example.questions == 1
    assert [labelled(example, 0), labelled(example, 1)] == [labelled(each, 0) for each in alone]
    assert example.image_mask.sum() == alone[0].image_mask.sum()
    if layout == "causal":
        rows = separate_rows(example)
        assert [row.input_ids.tolist() for row in rows] == [
            separate_rows(each)[0].input_ids.tolist() for each in alone
        ]
    else:
        assert example.input_ids.tolist() == alone[0].input_ids.tolist()
        assert example.label_samples.max() == 1


def test_pairs_of_one_image_are_numbered_through_tree_and_pack(folder: Path) -> None:
    pairs = [
        pair_of(folder, "causal", question, "dog", "a cat")
        for question in ("what?", "where?", "what?")
    ]
    (tree,) = branch_layout(pairs, 4096)
    assert tree.judged == 3 and tree.image_mask.sum() == pairs[0].image_mask.sum()
    for number in range(3):
        for kind in range(2):
            assert labelled(tree, ANSWER_KINDS * number + kind) == labelled(pairs[0], kind)
    rows = [row for pair in pairs for row in separate_rows(pair)]
    assert sorted(row.input_ids.tolist() for row in separate_rows(tree)) == sorted(
        row.input_ids.tolist() for row in rows
    )
    packed = pack_layout([tree, pairs[0]], "causal")
    assert packed.judged == 4 and labelled(packed, 3 * ANSWER_KINDS) == labelled(pairs[0], 0)
    assert (packed.labels[packed.answers < 0] == IGNORE_INDEX).all()


def test_the_answers_of_a_pair_stay_in_one_row(folder: Path) -> None:
    pairs = [pair_of(folder, "causal", f"what {n}?", "dog", "a cat") for n in range(4)]
    for row_length in (1, 40, 60, 4096):
        trees = branch_layout(pairs, row_length)
        assert sum(tree.judged for tree in trees) == 4
        for tree in trees:
            counts = np.bincount(tree.answers[tree.answers >= 0], minlength=3 * tree.judged)
            assert (counts.reshape(-1, ANSWER_KINDS)[:, :2] > 0).all()


def test_easy_vqa_rejects_another_answer_of_the_same_kind() -> None:
    source = EasyVqaSource(kind="easy_vqa", split="validation", task="preference")
    rows = [row for row in read(source) if isinstance(row, Conversation)]
    plain = read(EasyVqaSource(kind="easy_vqa", split="validation"))
    assert [row.messages for row in rows] == [
        row.messages for row in plain if isinstance(row, Conversation)
    ]
    assert all(isinstance(item, Media) for row in rows for item in row.media)
    rejected = set()
    for row in rows:
        assert row.rejected is not None
        answer, other = row.messages[-1].text, row.rejected.text
        assert answer != other and other in KINDS[answer_type(answer)]
        rejected.add(other)
    assert len(rejected) == 13


def test_a_prompts_input_is_read_and_its_history_is_not() -> None:
    row = {"prompt": "Shorten:", "input": "a long text", "chosen": "a", "rejected": "b"}
    judged = preference(row, MediaFinder(None))
    assert judged.messages[0].text == "Shorten:\na long text"
    with pytest.raises(DataError, match="`history` is not read beside judged answers"):
        preference({**row, "history": [["a", "b"]]}, MediaFinder(None))
    with pytest.raises(DataError, match="`input` must be text after a text"):
        preference({**row, "input": ["a"]}, MediaFinder(None))


@pytest.mark.parametrize("in_text", [False, True])
def test_pairs_of_one_answer_may_differ_in_their_reasoning(in_text: bool) -> None:
    def answer(reasoning: str) -> dict[str, str]:
        if in_text:
            return {"role": "assistant", "content": f"<think>{reasoning}</think>4"}
        return {"role": "assistant", "content": "4", "reasoning_content": reasoning}

    row = {"prompt": [USER], "chosen": [answer("two and two")], "rejected": [answer("five less")]}
    judged = preference(row, MediaFinder(None))
    assert judged.rejected is not None
    assert judged.messages[-1].words != judged.rejected.words
    with pytest.raises(DataError, match="the same answer"):
        preference({**row, "rejected": row["chosen"]}, MediaFinder(None))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER], "label": True}, "must be a prompt and an answer, got 1 turn"),
        ({"messages": [USER, DOG, USER], "label": True}, r"`messages\[-1\]` must be one turn"),
        ({"messages": [DOG], "rejected_response": "b"}, "a prompt and an answer, got 1 turn"),
        ({"messages": [USER, DOG], "rejected_response": ""}, "no text or list `chosen`"),
    ],
)
def test_what_turns_lack_is_named_by_their_own_field(row: dict[str, Any], message: str) -> None:
    read = unpaired_preference if "label" in row else preference
    with pytest.raises(DataError, match=message):
        read(row, MediaFinder(None))
