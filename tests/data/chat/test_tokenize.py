"""Layouts: labels are the trained segments, and user text makes no control token."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from tests.helpers.chat_samples import (
    IMAGE,
    IMAGE_SLOTS,
    LAYOUTS,
    Kind,
    fitting,
    processor,
    tokenizer,
    turns,
)
from vlm_tune.data.chat.template import load_template
from vlm_tune.data.chat.tokenize import TextEncoder, causal_layout
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example, InputSpec, Message, Segment
from vlm_tune.errors import DataError

MARKS = (
    "<image>",
    "<|im_end|>",
    "<|im_start|>",
    "</s>",
    "<s>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<pad>",
    "<unk>",
    "<",
    "</",
)
marked = st.lists(
    st.sampled_from(MARKS) | st.text("ab s/>é\n<", max_size=4), min_size=1, max_size=6
).map("".join)
user_text = marked | st.text(min_size=1, max_size=12)
KINDS: tuple[Kind, ...] = ("bytes", "bpe", "unigram", "t5", "prepend")
CASES = [
    (name, layout, kind)
    for name, layout in LAYOUTS
    for kind in KINDS
    # T5's tokenizer has no token for a line's end.
    if not (load_template(name).end_texts and kind == "t5")
]


def is_text(text: str) -> bool:
    return bool(text.strip()) and not any("\ud800" <= character <= "\udfff" for character in text)


@st.composite
def conversations(draw: st.DrawFn, text: st.SearchStrategy[str] = user_text) -> Conversation:
    texts = text.filter(is_text)
    pairs = draw(st.integers(1, 3))
    system = draw(st.none() | texts)
    return Conversation(
        "c",
        turns(*(draw(texts) for _ in range(2 * pairs)), system=system, image=draw(st.booleans())),
    )


def harmless(conversation: Conversation) -> Conversation:
    """The same turns with a word for each text."""
    messages = [
        replace(m, parts=tuple("a" if isinstance(part, str) else part for part in m.parts))
        for m in conversation.messages
    ]
    return replace(conversation, messages=tuple(messages))


def controls(example: Example, tokens: Any) -> list[list[int]]:
    """The control ids of the input and of the labels, in order.

    An unknown character's id is no control.
    """
    special = {token for token in tokens.all_special_ids if token != tokens.unk_token_id}
    special |= {
        token
        for token, added in tokens.added_tokens_decoder.items()
        if added.special and token != tokens.unk_token_id
    }
    inputs = example.input_ids[~example.image_mask]
    return [
        [token for token in ids.tolist() if token in special] for ids in (inputs, example.labels)
    ]


@pytest.mark.parametrize(("name", "layout", "kind"), CASES)
@given(conversation=conversations())
@settings(max_examples=15, deadline=None)
def test_control_ids_occur_exactly_where_the_template_put_them(
    name: str, layout: Any, kind: Kind, conversation: Conversation
) -> None:
    conversation = replace(conversation, messages=fitting(name, conversation.messages))
    chat_processor, tokens = processor(name, kind, layout), tokenizer(name, kind)
    control_ids = [controls(example, tokens) for example in chat_processor.examples(conversation)]
    assert control_ids == [
        controls(example, tokens) for example in chat_processor.examples(harmless(conversation))
    ]
    assert any(ids for example in control_ids for ids in example)
    prompt = chat_processor.prompt(conversation)
    assert controls(prompt, tokens) == controls(
        chat_processor.prompt(harmless(conversation)), tokens
    )


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
@given(conversation=conversations())
@settings(max_examples=25, deadline=None)
def test_labels_are_exactly_the_trained_segments(
    name: str, layout: Any, conversation: Conversation
) -> None:
    conversation = replace(conversation, messages=fitting(name, conversation.messages))
    chat_processor, template = processor(name, "bytes", layout), load_template(name)
    tokens = chat_processor.tokenizer
    encoder = chat_processor.encoder
    end = [encoder.control(p.control) for p in template.assistant if p.control and p.trained]
    end += [token for text in template.end_texts for token in encoder.text(text, "text")]
    answers = [message.text for message in conversation.messages if message.role == "assistant"]
    answers = [answer.strip() if template.strip else answer for answer in answers]
    if template.reasoning is not None and template.reasoning.strip_answer:
        answers[-1] = answers[-1].lstrip("\n")
    opening = [p for p in template.assistant if p.trained and not p.end and not p.reasoned]
    places = ["earlier"] * (len(answers) - 1) + ["last"]
    written = [
        "".join(p.text or "" for p in opening if p.when in (None, place)) + answer
        for place, answer in zip(places, answers, strict=True)
    ]
    examples = chat_processor.examples(conversation)
    if layout == "seq2seq":
        assert len(examples) == len(answers) and len({example.id for example in examples}) == len(
            answers
        )
        assert [example.labels.tolist()[-1:] for example in examples] == [end] * len(answers)
        assert [tokens.decode(example.labels[:-1].tolist()) for example in examples] == written
        assert [example.questions for example in examples] == [1] * len(answers)
    else:
        (example,) = examples
        trained = example.labels != IGNORE_INDEX
        assert (
            example.labels[:-1][trained[:-1]] == example.input_ids[1:][trained[:-1]]
        ).all() and trained[-1]
        remaining_ids, spans = example.labels[trained].tolist(), []
        while remaining_ids:
            # A line's end may also stand inside an answer.
            inner = remaining_ids[:-1] if template.end_texts else []
            cut = remaining_ids.index(end[0], len(inner))
            spans.append(tokens.decode(remaining_ids[:cut]))
            remaining_ids = remaining_ids[cut + 1 :]
        assert spans == written
        assert example.questions == len(answers)
    assert all(
        example.image_mask.sum() == IMAGE_SLOTS * len(conversation.media) for example in examples
    )
    assert all(example.media == conversation.media for example in examples)


def test_seq2seq_puts_all_before_an_answer_in_the_encoder() -> None:
    chat_processor = processor("flan", "bytes", "seq2seq")
    decode = chat_processor.tokenizer.decode
    row = Conversation("s", turns("one?", "first", "two?", "second", system="Be brief."))
    examples = chat_processor.examples(row)
    assert [decode(example.input_ids.tolist()) for example in examples] == [
        "Be brief.\none?",
        "Be brief.\none? first</s>two?",
    ]
    assert [decode(example.labels.tolist()) for example in examples] == [
        " first</s>",
        " second</s>",
    ]
    assert [example.id for example in examples] == ["s", "s#1"]
    # Chat asks with what training put in the encoder: the earlier answer and the last question.
    for given_row in (row, replace(row, messages=row.messages[:-1])):
        prompt = chat_processor.prompt(given_row)
        assert prompt.input_ids.tolist() == examples[1].input_ids.tolist()
        assert prompt.labels.tolist() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoders_answer_is_the_same_with_and_without_the_formats_space(kind: Kind) -> None:
    """T5-like tokenizers begin a string with a space.

    The format's own must not come on top of it, nor be lost.
    """
    flan = processor("flan", kind, "seq2seq")
    tokens = flan.tokenizer
    labels = flan.examples(Conversation("a", turns("What color is it?", "red")))[0].labels.tolist()
    assert tokens.decode(labels[:-1]).strip() == "red"
    text = tokens.backend_tokenizer.encode("is red", add_special_tokens=False).tokens
    assert tokens.convert_ids_to_tokens(labels[:-1]) == text[-len(labels) + 1 :]


def test_text_inside_a_text_gets_no_prefix_of_its_own() -> None:
    for kind in ("unigram", "metaspace_always", "prepend", "metaspace_first", "t5"):
        tokens = tokenizer("flan", kind)  # type: ignore[arg-type]
        encoder, show = TextEncoder(tokens), tokens.convert_ids_to_tokens
        assert "".join(show(encoder.text("is red"))) == "\u2581is\u2581red"
        assert "".join(show(encoder.text("is red", "text"))) == "is\u2581red", kind
        assert "".join(show(encoder.text(" is red", "text"))) == "\u2581is\u2581red", kind
        if kind != "t5":
            assert show(encoder.text(" ", "text")) == ["\u2581"], kind
    tokens = tokenizer("flan", "metaspace_first")
    first = TextEncoder(tokens)
    assert tokens.convert_ids_to_tokens(first.text("a", "control")) == ["a"]
    assert "".join(tokens.convert_ids_to_tokens(first.text("a"))) == "\u2581a"


def test_a_templates_token_that_is_no_special_one_is_kept_out_of_text_too() -> None:
    tokens = type(tokenizer("flan", "bytes"))(
        tokenizer_object=type(tokenizer("flan", "bytes").backend_tokenizer).from_str(
            tokenizer("flan", "bytes").backend_tokenizer.to_str()
        ),
        pad_token="<pad>",
        eos_token="</s>",
    )
    tokens.add_tokens([AddedToken("<|turn|>", special=False)])
    encoder = TextEncoder(tokens)
    turn = encoder.control("<|turn|>")
    assert (
        turn not in encoder.text("a <|turn|> b")
        and tokens.decode(encoder.text("a <|turn|> b")) == "a <|turn|> b"
    )


def test_a_missing_control_token_names_the_token_and_the_cure() -> None:
    with pytest.raises(DataError, match=r"<\|im_end\|>.*choose the chat format"):
        TextEncoder(tokenizer("flan", "bytes")).control("<|im_end|>")


def test_a_format_for_decoders_is_refused_for_an_encoder_decoder() -> None:
    with pytest.raises(DataError, match="'chatml' is for causal models, this one is seq2seq"):
        processor("chatml", "bytes", "seq2seq")


def test_a_segment_list_of_media_only_gives_slots_only() -> None:
    chat_processor = processor("flan", "bytes", "causal")
    spec = InputSpec(2, "causal", 10, chat_processor.spec.pad_id, chat_processor.spec.eos_id)
    message = Conversation("m", (Message("user", (IMAGE, IMAGE)),))
    (example,) = causal_layout(
        message, [Segment("media", IMAGE), Segment("media", IMAGE)], chat_processor.encoder, spec
    )
    assert (
        example.image_mask.tolist() == [True] * 4
        and example.media == (IMAGE, IMAGE)
        and example.supervised == 0
    )


@pytest.mark.parametrize("layout", ["causal", "seq2seq"])
def test_a_row_whose_images_alone_would_fill_the_memory_is_refused_before(layout: Any) -> None:
    small = processor("flan", "bytes", layout)
    spec = replace(small.spec, tokens_per_image=12_124**2)
    chat_processor = replace(small, spec=spec)
    question = Message("user", (IMAGE, "what is it?"))
    row = Conversation("m", (question, Message("assistant", ("red",))))
    for lay_out in (chat_processor.examples, chat_processor.prompt):
        with pytest.raises(DataError, match="its images take 146,991,376 tokens") as error:
            lay_out(row)
        assert error.value.kind == "overlong"


def test_long_texts_leave_no_memory_behind() -> None:
    encoder = TextEncoder(tokenizer("chatml", "bytes"))
    texts = (f"{number} " + "is there a red circle here? " * 100 for number in range(100))
    encoder.text("a first text")
    tracemalloc.start()
    for text in texts:
        encoder.text(text)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Their ids would take 8 bytes for each of 290,000 tokens.
    assert after < 500_000
