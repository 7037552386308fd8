"""Sources: two forms of one sample are one conversation, and what easy-VQA's questions reveal is true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_samples import processor
from PIL import Image

from vlm_tune.config import EasyVqaSource, LlavaSource, MessagesSource
from vlm_tune.data.instructions import load_instructions
from vlm_tune.data.sources.easy_vqa import COLORS, SHAPES, _questions, answer_type, read_easy_vqa, revealed
from vlm_tune.data.sources.registry import read_sources
from vlm_tune.data.sources.rows import BadRows, json_rows
from vlm_tune.data.types import Conversation, Media
from vlm_tune.errors import DataError
from vlm_tune.resources import resource_names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def read(path: Path, kind: str, rows: list[Any]) -> list[Conversation]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = LlavaSource(kind="llava", path=str(path)) if kind == "llava" else MessagesSource(kind="messages", path=str(path))
    return read_sources([source], seed=0, bad=BadRows())


LLAVA = {
    "id": "x",
    "image": ["a.png", "b.png"],
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\nthen <image>\nWhat differs?"},
        {"from": "gpt", "value": "Nothing, <image> is a word here."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ],
}
PARTS = [{"type": "image"}, {"type": "text", "text": "then "}, {"type": "image"}, {"type": "text", "text": "What differs?"}]
MESSAGES = {
    "id": "x",
    "images": ["a.png", "b.png"],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": PARTS},
        {"role": "assistant", "content": "Nothing, <image> is a word here."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Y"}, {"type": "text", "text": "es."}]},
    ],
}


@pytest.mark.parametrize(("name", "layout"), [("chatml", "causal"), ("vicuna", "causal"), ("flan", "seq2seq")])
def test_llava_and_messages_forms_of_a_sample_give_the_same_examples(folder: Path, name: str, layout: Any) -> None:
    (llava,) = read(folder / "rows.jsonl", "llava", [LLAVA])
    (messages,) = read(folder / "rows.jsonl", "messages", [MESSAGES])
    assert llava.id == messages.id and llava.media == messages.media == (Media(folder / "a.png"), Media(folder / "b.png"))
    made = processor(name, "bytes", layout)
    pairs = list(zip(made.examples(llava), made.examples(messages), strict=True))
    assert len(pairs) == (1 if layout == "causal" else 2)
    for one, other in pairs:
        assert one.input_ids.tolist() == other.input_ids.tolist() and one.labels.tolist() == other.labels.tolist()
        assert one.image_mask.tolist() == other.image_mask.tolist() and one.media == other.media


def test_images_without_a_place_come_first_in_the_first_question(folder: Path) -> None:
    row = {"images": ["a.png"], "messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]}
    (found,) = read(folder / "rows.jsonl", "messages", [row])
    assert found.messages[0].parts == (Media(folder / "a.png"), "what?")


def test_json_lists_and_lines_number_their_rows_alike(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"b": "蓝"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8-sig")
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "lines.jsonl").write_text("\n" + lines.replace("\n", "\n\n"), encoding="utf-8-sig")
    assert list(json_rows(tmp_path / "list.json")) == [(1, rows[0]), (2, rows[1])]
    assert list(json_rows(tmp_path / "lines.jsonl")) == [(2, rows[0]), (4, rows[1])]
    with pytest.raises(DataError, match="no such file"):
        list(json_rows(tmp_path / "none.jsonl"))


def test_limit_takes_the_first_rows(folder: Path) -> None:
    path = folder / "rows.jsonl"
    read(path, "llava", [{**LLAVA, "id": str(number)} for number in range(5)])
    found = read_sources([LlavaSource(kind="llava", path=str(path), limit=2)] * 2, seed=0, bad=BadRows())
    assert [row.id for row in found] == ["rows:0:1", "rows:1:2"] * 2


# --- easy-VQA --------------------------------------------------------------------------------------------------------


def easy(split: str, **options: Any) -> list[Conversation]:
    return list(read_easy_vqa(EasyVqaSource(kind="easy_vqa", split=split, **options), 0, BadRows()))  # type: ignore[arg-type]


def test_train_validation_and_test_share_no_image_and_lose_no_row() -> None:
    splits = {split: easy(split) for split in ("train", "validation", "test")}
    images = {split: {row.media[0] for row in rows} for split, rows in splits.items()}
    assert len(images["validation"]) == 200
    assert not images["train"] & images["validation"] and not images["test"] & (images["train"] | images["validation"])
    assert len(splits["train"]) + len(splits["validation"]) == len(easy("train", validation_images=0))
    for rows in splits.values():
        assert len({row.id for row in rows}) == len(rows)
        assert all(row.media[0].source.is_file() for row in rows[:: len(rows) // 20])  # type: ignore[union-attr]
        assert {row.category for row in rows} == {"yes/no", "color", "shape"}
    with pytest.raises(DataError, match="leaves none"):
        easy("train", validation_images=10_000_000)


def test_answer_types() -> None:
    assert [answer_type(answer) for answer in ("yes", "no", "teal", "circle")] == ["yes/no", "yes/no", "color", "shape"]


@pytest.mark.parametrize(
    ("question", "answer", "known"),
    [
        ("what color is the shape?", "red", {"color": "red"}),
        ("what shape is in the image?", "circle", {"shape": "circle"}),
        ("what is the color of the triangle?", "teal", {"color": "teal", "shape": "triangle"}),
        ("what is the blue shape?", "rectangle", {"color": "blue", "shape": "rectangle"}),
        ("is there a red shape?", "yes", {"color": "red"}),
        ("is there a red shape?", "no", {}),
        ("is there not a red shape?", "no", {"color": "red"}),
        ("is there not a red shape?", "yes", {}),
        ("is no circle present?", "no", {"shape": "circle"}),
        ("is no circle present?", "yes", {}),
        ("does the image contain a circle?", "yes", {"shape": "circle"}),
    ],
)
def test_what_a_question_and_its_answer_reveal(question: str, answer: str, known: dict[str, str]) -> None:
    assert revealed([(0, question, answer, 7)]) == ({7: known} if known else {})


def test_what_the_train_split_reveals_agrees_with_all_of_an_images_answers() -> None:
    """Truth of each statement is judged from the words, apart from how `revealed` found them."""
    _, rows = _questions(EasyVqaSource(kind="easy_vqa", split="train"))
    found = revealed(rows)
    assert len(found) > 0.95 * len({image for *_, image in rows})
    assert {known["color"] for known in found.values() if "color" in known} == set(COLORS)
    assert {known["shape"] for known in found.values() if "shape" in known} == set(SHAPES)
    told = 0
    for _, question, answer, image in rows:
        words = question.rstrip("?").split()
        for kind, names in (("color", COLORS), ("shape", SHAPES)):
            known = found.get(image, {}).get(kind)
            if answer in names:
                assert known == answer
            named = [word for word in words if word in names]
            if answer in ("yes", "no") and named and known:
                denied = "not" in words or "no" in words
                assert (named[0] == known) == ((answer == "yes") != denied), (question, answer, known)
                told += 1
    assert told > 1000


def test_captions_say_what_is_revealed_and_only_for_their_split() -> None:
    captions = easy("validation", task="caption", instructions="caption")
    _, rows = _questions(EasyVqaSource(kind="easy_vqa", split="validation"))
    known = revealed(rows)
    assert len(captions) == sum(map(len, known.values()))
    for row in captions:
        image = int(row.media[0].source.stem)  # type: ignore[union-attr]
        assert row.messages[-1].text == known[image][row.category]


# --- prompt sets -----------------------------------------------------------------------------------------------------


def test_every_task_has_an_english_and_a_chinese_prompt_set() -> None:
    tasks = {"vqa": ("vqa", "vqa-varied", "vqa-zh"), "caption": ("caption", "caption-zh"), "classify": ("classify", "classify-zh")}
    assert sorted(name for names in tasks.values() for name in names) <= resource_names("data_templates/instructions")
    for task, names in tasks.items():
        sets = [load_instructions(name, task) for name in names]
        assert {found.language for found in sets} == {"en", "zh"}
        for found in sets:
            chinese = [any("\u4e00" <= c <= "\u9fff" for c in prompt) for prompt in found.prompts if prompt != "{question}"]
            assert all(is_chinese == (found.language == "zh") for is_chinese in chinese)
            assert len(set(found.prompts)) == len(found.prompts)
    for name in resource_names("data_templates/instructions"):
        assert any(name in names for names in tasks.values()), f"{name} is in no test"


VALUES = {"vqa": {"question": "Q{x}%s?", "answer": "A"}, "caption": {"caption": "C"}, "classify": {"choices": "x, y", "label": "y"}}


@pytest.mark.parametrize("name", resource_names("data_templates/instructions"))
def test_a_prompt_set_fills_in_its_fields_whatever_they_hold(name: str) -> None:
    task = name.split("-")[0]
    found, media = load_instructions(name, task), Media(b"i")
    row = found.conversation("r", media, VALUES[task], seed=0, category="c")
    question, answer = row.messages[-2], row.messages[-1]
    assert question.parts[0] == media and answer.text == list(VALUES[task].values())[-1]
    if task != "caption":
        assert next(iter(VALUES[task].values())) in question.text
    assert (row.id, row.category) == ("r", "c")


def test_the_phrasing_is_a_function_of_seed_and_row_and_varies_with_both() -> None:
    found = load_instructions("vqa-varied", "vqa")

    def phrasings(seed: int) -> list[str]:
        return [found.conversation(f"row {n}", Media(b""), VALUES["vqa"], seed=seed).messages[0].text for n in range(200)]

    assert phrasings(0) == phrasings(0) != phrasings(1)
    counts = [phrasings(0).count(text) for text in set(phrasings(0))]
    assert len(counts) == len(found.prompts) and min(counts) > 20
    first = found.conversation("row 0", Media(b""), VALUES["vqa"], seed=0).messages[0].text
    assert first == "Q{x}%s?\nAnswer with a single word or a short phrase."  # stable over versions: a changed draw changes every run


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("{picture}", r"uses \['picture'\]"), ("{question", "brace"), ("{question.__class__}", "uses"), ("{}", "uses"), ("{0}", "uses")],
)
def test_prompt_sets_with_wrong_fields_are_refused(tmp_path: Path, prompt: str, message: str) -> None:
    path = tmp_path / "set.yaml"
    path.write_text(f"task: vqa\nlanguage: en\nprompts: [{json.dumps(prompt)}]\nanswer: '{{answer}}'\n")
    with pytest.raises(DataError, match=message):
        load_instructions(str(path), "vqa")


def test_a_prompt_set_for_another_task_is_refused() -> None:
    with pytest.raises(DataError, match="a prompt set for caption, the source gives vqa rows"):
        load_instructions("caption", "vqa")
    with pytest.raises(DataError, match=r"no prompt set 'nope'; there are .*vqa"):
        load_instructions("nope", "vqa")
