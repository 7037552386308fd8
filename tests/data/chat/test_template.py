"""Chat formats.

Equal to the tokenizer's own chat template, masks by construction, malformed formats refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.chat_samples import (
    CHAT,
    IMAGE,
    KINDS,
    LAYOUTS,
    Kind,
    as_dicts,
    ends,
    fitting,
    processor,
    tokenizer,
    turns,
)
from vlm_tune.data.chat.processor_jinja import processor_jinja
from vlm_tune.data.chat.template import load_template, read_template
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example, Media, Message
from vlm_tune.errors import DataError

CAUSAL = [name for name, layout in LAYOUTS if layout == "causal"]
LONG = [name for name in CAUSAL if not load_template(name).one_question]
"""Formats of conversations of several questions."""
BENIGN = {
    "one turn": turns("What color is the shape?", "red"),
    "system": turns("Is it a circle?", "no, a triangle", system="You are helpful."),
    "turns": turns(
        "What color is it?",
        "blue",
        "And its shape?",
        "a small circle",
        "Is it red?\nSay yes or no.",
        "no",
    ),
    "system and turns": turns(
        "Describe the image.", "A red circle.", "Shorter:", "circle", system="Answer in one line."
    ),
}


def expected_ids(
    name: str, kind: Kind, messages: tuple[Message, ...], *, prompt: bool = False
) -> list[int]:
    tokens = tokenizer(name, kind)
    given = as_dicts(messages[:-1] if prompt else messages)
    return tokens.apply_chat_template(
        given,
        chat_template=load_template(name).jinja,
        add_generation_prompt=prompt,
        tokenize=True,
        return_dict=False,
    )


def kinds_of(name: str) -> list[Kind]:
    # The GPT-2 split of "\n\n" depends on the letter after it, and T5's takes a line's end for a
    # space before the next segment; the tokenizers of the models these formats are for do neither.
    if name == "llama3":
        return ["bytes", "llama3"]
    return [kind for kind in KINDS if kind != "t5" or name in ("flan", "vicuna")]


def assert_same_ids(example: Example, expected: list[int]) -> None:
    """The input and the label at its end are what the chat template gives.

    This holds up to what follows the last trained token.
    """
    ids = [*example.input_ids.tolist(), int(example.labels[-1])]
    assert ids == expected[: len(ids)]
    assert (
        len(expected) - len(ids) <= 2
    )  # a line's end, perhaps with the tokenizer's space before it


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in CAUSAL for kind in kinds_of(name)]
)
def test_ids_equal_the_tokenizers_own_chat_template(name: str, kind: Kind) -> None:
    for label, conversed in BENIGN.items():
        messages = fitting(name, conversed)
        conversation = Conversation(label, messages)
        (example,) = processor(name, kind, "causal").examples(conversation)
        assert_same_ids(example, expected_ids(name, kind, messages))
        prompt = processor(name, kind, "causal").prompt(conversation).input_ids.tolist()
        assert prompt == expected_ids(name, kind, messages, prompt=True), label
        assert example.input_ids[: len(prompt)].tolist() == prompt, label
        assert (example.labels[: len(prompt) - 1] != IGNORE_INDEX).sum() < example.supervised, label


WORDS = ["red", "blue", "a", "the", "shape", "image", "It", "is,", "Yes.", "no?", "12", "3x:"]
words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)


@given(st.data(), st.sampled_from(CAUSAL), st.integers(1, 3), st.none() | words)
@settings(max_examples=40, deadline=None)
def test_ids_of_random_conversations_equal_the_chat_template(
    data: st.DataObject, name: str, pairs: int, system: str | None
) -> None:
    kind = data.draw(st.sampled_from(kinds_of(name)))
    messages = fitting(name, turns(*(data.draw(words) for _ in range(2 * pairs)), system=system))
    (example,) = processor(name, kind, "causal").examples(Conversation("r", messages))
    assert_same_ids(example, expected_ids(name, kind, messages))


@pytest.mark.parametrize("name", LONG)
def test_answers_and_their_end_are_trained_and_nothing_else(name: str) -> None:
    tokens, end = tokenizer(name, "bytes"), ends(load_template(name), tokenizer(name, "bytes"))
    messages = turns(
        "first question", "zebra", "second question", "quick fox", system="system text", image=True
    )
    (example,) = processor(name, "bytes", "causal").examples(Conversation("m", messages))
    following = example.labels[:-1] != IGNORE_INDEX
    assert (example.labels[:-1][following] == example.input_ids[1:][following]).all()
    spans: list[list[int]] = [[]]
    for label in example.labels.tolist():
        if label != IGNORE_INDEX:
            spans[-1].append(label)
        elif spans[-1]:
            spans.append([])
    spans = [span for span in spans if span]
    assert [span[-1] for span in spans] == [end, end]
    # A format with reasoning begins its last answer with an empty block where there is none.
    block = "<think>\n\n</think>\n\n" if load_template(name).reasoning else ""
    written = [tokens.decode(span[:-1]).strip() for span in spans]
    assert written == ["zebra", f"{block}quick fox"]
    trained = np.append(False, following)
    rest = tokens.decode(example.input_ids[~trained & ~example.image_mask].tolist())
    assert (
        "first question" in rest
        and "system text" in rest
        and "zebra" not in rest
        and "fox" not in rest
    )


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (name, layout)
        for name, layout in LAYOUTS
        if all(piece.content != "images" for piece in load_template(name).user)
    ],
)
def test_image_slots_stand_where_the_message_has_the_image(name: str, layout: str) -> None:
    messages = (Message("user", ("before ", IMAGE, " after")), Message("assistant", ("answer",)))
    (example,) = processor(name, "bytes", layout).examples(
        Conversation("i", messages)  # type: ignore[arg-type]
    )
    slots = example.image_mask.nonzero()[0]
    assert example.media == (IMAGE,)
    assert len(slots) == 3 and slots[-1] - slots[0] == 2
    decode = tokenizer(name, "bytes").decode
    template = load_template(name)
    space = "" if template.strip == "texts" else " "
    assert decode(example.input_ids[: slots[0]].tolist()).endswith(f"before{space}")
    after = f"{template.after_image}{space}after"
    assert decode(example.input_ids[slots[-1] + 1 :].tolist()).startswith(after)


def test_the_recipes_system_text_stands_in_for_the_formats_and_yields_to_the_datas() -> None:
    template = load_template("smollm2")

    def system(messages: tuple[Message, ...], given: str | None) -> str:
        return str(template.segments(Conversation("s", messages), system=given)[1].payload)

    assert "SmolLM" in system(turns("q", "a"), None)
    assert system(turns("q", "a"), "from the recipe") == "system\nfrom the recipe"
    assert (
        system(turns("q", "a", system="from the data"), "from the recipe")
        == "system\nfrom the data"
    )
    segments = template.segments(Conversation("s", turns("q", "a")), system="")
    assert [segment.payload for segment in segments][1] == "user\nq"


def test_a_prompt_trains_nothing_and_ends_where_the_answer_begins() -> None:
    for name in CHAT:
        template = load_template(name)
        if template.one_question:
            continue
        row = Conversation("p", turns("one", "first", "two", "second"))
        segments = template.segments(row, prompt_only=True)
        assert not any(segment.trained for segment in segments)
        text = "".join(str(segment.payload) for segment in segments)
        assert "first" in text and "two" in text and "second" not in text


def test_unknown_roles_and_missing_system_turns_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the role 'tool'"):
        load_template("chatml").segments(Conversation("t", (Message("tool", ("x",)),)))
    path = tmp_path / "plain.yaml"
    path.write_text(
        "name: plain\nlayouts: [causal]\nuser: [{content: prompt}]\nassistant: "
        "[{content: trained}, {control: eos, trained: true}]\n"
    )
    with pytest.raises(DataError, match="no system turn"):
        load_template(str(path)).segments(Conversation("s", turns("q", "a", system="x")))


def test_an_unknown_format_names_the_shipped_ones() -> None:
    with pytest.raises(DataError, match=r"chatml.*vicuna"):
        load_template("nope")


GOOD = """
name: mine
layouts: [causal]
start: [{control: bos}]
user: [{text: "Q: "}, {content: prompt}]
assistant: [{text: "A: "}, {content: trained}, {control: eos, trained: true}]
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('{text: "Q: "}, ', "{text: Q, control: eos}, ", "one of text, control, content"),
        ('{text: "Q: "}, ', "{}, ", "one of text, control, content"),
        ("{content: prompt}", "{content: trained}", "only the assistant's words are trained"),
        (
            'user: [{text: "Q: "}, {content: prompt}]',
            "user: [{text: Q}]",
            "user turn has no content",
        ),
        ("layouts: [causal]", "layouts: []", "layouts"),
        ("layouts: [causal]", "layouts: [decoder]", "layouts"),
        ("{content: prompt}", '{content: prompt}, {text: "!", end: true}', "no trained text"),
        ("{control: eos, trained: true}", '{text: "!", end: true}', "no trained text"),
        ("name: mine", "name: mine\nextra: 1", "extra"),
        ("name: mine", "name: [", "not YAML"),
    ],
)
def test_malformed_formats_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    assert read_template(path).name == "mine"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(DataError, match=message):
        read_template(path)


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in CAUSAL for kind in kinds_of(name)]
)
def test_the_processors_chat_template_gives_the_same_ids(name: str, kind: Kind) -> None:
    """Contents as text and as lists; a format without system turns refuses them by name."""
    template = load_template(name)
    jinja, tokens = processor_jinja(template, None, "<image>"), tokenizer(name, kind)
    for label, conversed in BENIGN.items():
        messages = fitting(name, conversed)
        for prompt in (False, True):
            texts = as_dicts(messages[:-1] if prompt else messages)
            lists = [
                {**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in texts
            ]
            for given_turns in (texts, lists):
                ids = tokens.apply_chat_template(
                    given_turns,
                    chat_template=jinja,
                    add_generation_prompt=prompt,
                    return_dict=False,
                )
                assert ids == expected_ids(name, kind, messages, prompt=prompt), label


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "unigram"])
def test_ids_of_reasoning_equal_the_chat_template(kind: Kind, inline: bool) -> None:
    """Of the last answer alone, whether it is in a field or in the answer's text."""
    template = load_template("qwen3")
    tokens = tokenizer("qwen3", kind)
    messages = turns("Is it a circle?", "no", "Is it red?", "\n yes", system="You are helpful.")
    reasons = {2: "It has corners.", 4: "\n It is \n\n red. \n"}
    given = as_dicts(messages)
    rows = list(messages)
    for place, reason in reasons.items():
        text = f"<think>\n{reason}\n</think>\n\n{messages[place].text}"
        rows[place] = (
            replace(messages[place], parts=(text,), trained=place == 4)
            if inline
            else replace(messages[place], reasoning=reason, trained=place == 4)
        )
        given[place] |= {"content": text} if inline else {"reasoning_content": reason}
    (example,) = processor("qwen3", kind, "causal").examples(Conversation("r", tuple(rows)))
    for jinja in (template.jinja, processor_jinja(template, None, "<image>")):
        expected = tokens.apply_chat_template(given, chat_template=jinja, return_dict=False)
        assert_same_ids(example, expected)
        prompt = tokens.apply_chat_template(
            given[:-1],
            chat_template=jinja,
            add_generation_prompt=True,
            enable_thinking=False,
            return_dict=False,
        )
        without = processor("qwen3", kind, "causal").thinking(False)
        assert without.prompt(Conversation("r", messages)).input_ids.tolist() == prompt


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ((IMAGE, "What is it?"), "@\nWhat is it?"),
        ((IMAGE, "\nWhat is it?"), "@\nWhat is it?"),
        (("Look: ", IMAGE, IMAGE, " same?"), "Look: @\n@\n same?"),
        (("Look: ", IMAGE), "Look: @\n"),
        ((), ""),
    ],
)
def test_what_ends_an_image_stands_once_behind_it(
    parts: tuple[str | Media, ...], text: str
) -> None:
    """In segments, and in the processor's chat template."""
    template = load_template("internvl")
    segments = template.segments(Conversation("row", (Message("user", parts),)))
    written = "".join("@" if s.kind == "media" else str(s.payload) for s in segments)
    assert written == f"<|im_start|>user\n{text}<|im_end|>\n"
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in parts
    ]
    rendered = tokenizer("internvl", "bpe").apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=processor_jinja(template, None, "@"),
        tokenize=False,
    )
    assert rendered == written


@pytest.mark.parametrize(
    ("texts", "written"),
    [
        (("<__media_7__>", "What is it?"), "User:<__media_7__>What is it?"),
        (("What is it?", "<__media_7__>"), "User: What is it?<__media_7__>"),
        (("What is <__media_7__>?",), "User: What is <__media_7__>?"),
    ],
)
def test_texts_that_begin_as_the_marker_stand_for_images(
    texts: tuple[str, ...], written: str
) -> None:
    """As llama.cpp gives images to a chat template; a SmolVLM has no space before one."""
    content = [{"type": "text", "text": text} for text in texts]
    jinja = processor_jinja(load_template("smolvlm"), None, "<image>", "<__media")
    for turn in (content, "".join(texts)):
        rendered = tokenizer("chatml", "bpe").apply_chat_template(
            [{"role": "user", "content": turn}], chat_template=jinja, tokenize=False
        )
        assert rendered == f"<|im_start|>{written}<end_of_utterance>\n"


@pytest.mark.parametrize("marker", ["<__media__>", "<__media_aB3__>"])
@pytest.mark.parametrize(
    "texts", [("MARK", " What? "), (" What? ", "MARK"), (" Is ", "MARK", " as ", "MARK", " here? ")]
)
def test_gemma_3_has_empty_lines_around_images_that_llama_cpp_marks(
    texts: tuple[str, ...], marker: str
) -> None:
    """In parts of a turn, and in the one text that its server makes of them."""
    parts = [text.replace("MARK", marker) for text in texts]
    content = [{"type": "text", "text": text} for text in parts]
    written = "".join(f"\n\n{part}\n\n" if part == marker else part.strip() for part in parts)
    jinja = processor_jinja(load_template("gemma3"), None, "<__media__>", "<__media", "\n\n")
    for turn in (content, "".join(parts)):
        rendered = tokenizer("chatml", "bpe").apply_chat_template(
            [{"role": "user", "content": turn}], chat_template=jinja, tokenize=False
        )
        assert rendered.endswith(f"<start_of_turn>user\n{written}<end_of_turn>\n")


@pytest.mark.parametrize("behind", ["What?", "\nWhat?"])
def test_internvl_has_a_line_end_behind_images_that_llama_cpp_marks(behind: str) -> None:
    jinja = processor_jinja(load_template("internvl"), None, "<__media__>", "<__media")
    parts = ["<__media_aB3__>", behind, "<__media_aB3__>"]
    for turn in ([{"type": "text", "text": part} for part in parts], "".join(parts)):
        rendered = tokenizer("chatml", "bpe").apply_chat_template(
            [{"role": "user", "content": turn}], chat_template=jinja, tokenize=False
        )
        written = "user\n<__media_aB3__>\nWhat?<__media_aB3__>\n<|im_end|>\n"
        assert rendered.endswith(written)


def test_a_text_that_only_begins_as_a_marker_stays_as_it_is() -> None:
    jinja = processor_jinja(load_template("gemma3"), None, "<__media__>", "<__media", "\n\n")
    rendered = tokenizer("chatml", "bpe").apply_chat_template(
        [{"role": "user", "content": "what is <__media here?"}], chat_template=jinja, tokenize=False
    )
    assert rendered.endswith("user\nwhat is <__media here?<end_of_turn>\n")


def test_the_processors_chat_template_writes_images_and_the_runs_system_text() -> None:
    template = load_template("llama3")
    turns = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": " what {{ is }} 'this'?\n"}],
        }
    ]
    tokens = tokenizer("llama3", "llama3")
    prompt = tokens.apply_chat_template(
        turns, chat_template=processor_jinja(template, ' Say "äöü 🙂". ', "<image>"), tokenize=False
    )
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert prompt == (
        tokens.bos_token
        + head.format("system")
        + 'Say "äöü 🙂".<|eot_id|>'
        + head.format("user")
        + "<image> what {{ is }} 'this'?<|eot_id|>"
    )


def test_an_answer_that_contains_its_end_is_refused() -> None:
    template = load_template("blip2_opt")
    template.check_ends(Conversation("a", turns("what is it?", "a cat\n")))
    with pytest.raises(DataError, match="which ends answers in the blip2_opt format"):
        template.check_ends(Conversation("a", turns("what is it?", "a cat\na dog")))
