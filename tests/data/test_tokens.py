"""Layouts: labels are the trained segments, user text makes no control token, branches are the rows they came from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from chat_samples import IMAGE, IMAGE_SLOTS, LAYOUTS, Kind, processor, tokenizer, turns
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from vlm_tune.data.template import load_template
from vlm_tune.data.tokens import TextEncoder, branch_layout, causal_layout
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example, InputSpec, Media, Message, Segment
from vlm_tune.errors import DataError

MARKS = ("<image>", "<|im_end|>", "<|im_start|>", "</s>", "<s>", "<|eot_id|>", "<|start_header_id|>", "<pad>", "<unk>", "<", "</")
marked = st.lists(st.sampled_from(MARKS) | st.text("ab s/>é\n<", max_size=4), min_size=1, max_size=6).map("".join)
user_text = marked | st.text(min_size=1, max_size=12)
KINDS: tuple[Kind, ...] = ("bytes", "bpe", "unigram", "t5", "prepend")


def is_text(text: str) -> bool:
    return bool(text.strip()) and not any("\ud800" <= character <= "\udfff" for character in text)


@st.composite
def conversations(draw: st.DrawFn, text: st.SearchStrategy[str] = user_text) -> Conversation:
    texts = text.filter(is_text)
    pairs = draw(st.integers(1, 3))
    system = draw(st.none() | texts)
    return Conversation("c", turns(*(draw(texts) for _ in range(2 * pairs)), system=system, image=draw(st.booleans())))


def harmless(conversation: Conversation) -> Conversation:
    """The same turns with a word for each text."""
    messages = [replace(m, parts=tuple("a" if isinstance(part, str) else part for part in m.parts)) for m in conversation.messages]
    return replace(conversation, messages=tuple(messages))


def controls(example: Example, tokens: Any) -> list[list[int]]:
    """The control ids of the input and of the labels, in order; an unknown character's id is no control."""
    special = {token for token in tokens.all_special_ids if token != tokens.unk_token_id}
    special |= {token for token, added in tokens.added_tokens_decoder.items() if added.special and token != tokens.unk_token_id}
    inputs = example.input_ids[~example.image_mask]
    return [[token for token in ids.tolist() if token in special] for ids in (inputs, example.labels)]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@given(conversation=conversations())
@settings(max_examples=15, deadline=None)
def test_control_ids_occur_exactly_where_the_template_put_them(name: str, layout: Any, kind: Kind, conversation: Conversation) -> None:
    made, tokens = processor(name, kind, layout), tokenizer(name, kind)
    found = [controls(example, tokens) for example in made.examples(conversation)]
    assert found == [controls(example, tokens) for example in made.examples(harmless(conversation))]
    assert any(ids for example in found for ids in example)
    prompt = made.prompt(conversation)
    assert controls(prompt, tokens) == controls(made.prompt(harmless(conversation)), tokens)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
@given(conversation=conversations())
@settings(max_examples=25, deadline=None)
def test_labels_are_exactly_the_trained_segments(name: str, layout: Any, conversation: Conversation) -> None:
    made, template = processor(name, "bytes", layout), load_template(name)
    tokens = made.tokenizer
    end = [made.encoder.control(p.control) for p in template.assistant if p.control and p.trained]
    answers = [message.text for message in conversation.messages if message.role == "assistant"]
    answers = [answer.strip() if template.strip else answer for answer in answers]
    lead = "".join(piece.text or "" for piece in template.assistant if piece.trained)
    examples = made.examples(conversation)
    if layout == "seq2seq":
        assert len(examples) == len(answers) and len({example.id for example in examples}) == len(answers)
        assert [example.labels.tolist()[-1:] for example in examples] == [end] * len(answers)
        assert [tokens.decode(example.labels[:-1].tolist()) for example in examples] == [lead + answer for answer in answers]
        assert [example.questions for example in examples] == [1] * len(answers)
    else:
        (example,) = examples
        trained = example.labels != IGNORE_INDEX
        assert (example.labels[trained] == example.input_ids[trained]).all()
        said, spans = example.labels[trained].tolist(), []
        while said:
            cut = said.index(end[0])
            spans.append(tokens.decode(said[:cut]))
            said = said[cut + 1 :]
        assert spans == [lead + answer for answer in answers]
        assert example.questions == len(answers)
    assert all(example.image_mask.sum() == IMAGE_SLOTS * len(conversation.media) for example in examples)
    assert all(example.media == conversation.media for example in examples)


def test_seq2seq_puts_all_before_an_answer_in_the_encoder() -> None:
    made = processor("flan", "bytes", "seq2seq")
    decode = made.tokenizer.decode
    row = Conversation("s", turns("one?", "first", "two?", "second", system="Be brief."))
    examples = made.examples(row)
    assert [decode(example.input_ids.tolist()) for example in examples] == ["Be brief.\none?", "Be brief.\none? first</s>two?"]
    assert [decode(example.labels.tolist()) for example in examples] == [" first</s>", " second</s>"]
    assert [example.id for example in examples] == ["s", "s#1"]
    # Chat asks with what training put in the encoder: the earlier answer and the last question.
    for given_row in (row, replace(row, messages=row.messages[:-1])):
        prompt = made.prompt(given_row)
        assert prompt.input_ids.tolist() == examples[1].input_ids.tolist()
        assert prompt.labels.tolist() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoders_answer_is_the_same_with_and_without_the_formats_space(kind: Kind) -> None:
    """T5-like tokenizers begin a string with a space; the format's own must not come on top of it, nor be lost."""
    made = processor("flan", kind, "seq2seq")
    tokens = made.tokenizer
    labels = made.examples(Conversation("a", turns("What color is it?", "red")))[0].labels.tolist()
    assert tokens.decode(labels[:-1]).strip() == "red"
    text = tokens.backend_tokenizer.encode("is red", add_special_tokens=False).tokens
    assert tokens.convert_ids_to_tokens(labels[:-1]) == text[-len(labels) + 1 :]


def test_text_inside_a_text_gets_no_prefix_of_its_own() -> None:
    for kind in ("unigram", "metaspace_always", "prepend", "metaspace_first", "t5"):
        encoder = TextEncoder(tokenizer("flan", kind))  # type: ignore[arg-type]
        show = encoder.tokenizer.convert_ids_to_tokens
        assert "".join(show(encoder.text("is red"))) == "\u2581is\u2581red"
        assert "".join(show(encoder.text("is red", "text"))) == "is\u2581red", kind
        assert "".join(show(encoder.text(" is red", "text"))) == "\u2581is\u2581red", kind
        if kind != "t5":
            assert show(encoder.text(" ", "text")) == ["\u2581"], kind
    first = TextEncoder(tokenizer("flan", "metaspace_first"))
    assert first.tokenizer.convert_ids_to_tokens(first.text("a", "control")) == ["a"]
    assert "".join(first.tokenizer.convert_ids_to_tokens(first.text("a"))) == "\u2581a"


def test_a_templates_token_that_is_no_special_one_is_kept_out_of_text_too() -> None:
    tokens = type(tokenizer("flan", "bytes"))(
        tokenizer_object=type(tokenizer("flan", "bytes").backend_tokenizer).from_str(tokenizer("flan", "bytes").backend_tokenizer.to_str()),
        pad_token="<pad>",
        eos_token="</s>",
    )
    tokens.add_tokens([AddedToken("<|turn|>", special=False)])
    encoder = TextEncoder(tokens)
    turn = encoder.control("<|turn|>")
    assert turn not in encoder.text("a <|turn|> b") and tokens.decode(encoder.text("a <|turn|> b")) == "a <|turn|> b"


def test_a_missing_control_token_names_the_token_and_the_cure() -> None:
    with pytest.raises(DataError, match=r"<\|im_end\|>.*choose the chat format"):
        TextEncoder(tokenizer("flan", "bytes")).control("<|im_end|>")


def test_a_format_for_decoders_is_refused_for_an_encoder_decoder() -> None:
    with pytest.raises(DataError, match="'chatml' is for causal models, this one is seq2seq"):
        processor("chatml", "bytes", "seq2seq")


# --- branches --------------------------------------------------------------------------------------------------------


def row(ids: list[int], labels: list[int], *, media: tuple[Media, ...] = (), slots: int = 0, name: str = "r") -> Example:
    """`slots` image slots, then `ids`; a label of 0 is no label."""
    return Example(
        name,
        np.array([9] * slots + ids, dtype=np.int32),
        np.array([IGNORE_INDEX] * slots + [label or IGNORE_INDEX for label in labels], dtype=np.int32),
        np.array([True] * slots + [False] * len(ids)),
        media,
    )


def branches_of(joined: Example) -> list[tuple[list[int], list[int], list[int]]]:
    """Each branch with its prefix, as the row it stands for: ids, labels, positions."""
    assert joined.branches is not None and joined.positions is not None
    found = []
    for branch in range(1, int(joined.branches.max()) + 1):
        keep = (joined.branches == 0) | (joined.branches == branch)
        found.append((joined.input_ids[keep].tolist(), joined.labels[keep].tolist(), joined.positions[keep].tolist()))
    return found


def test_rows_of_one_image_become_a_prefix_and_branches() -> None:
    rows = [row([1, 5, 6], [0, 0, 6], media=(IMAGE,), slots=2), row([1, 7, 8, 9], [0, 0, 8, 9], media=(IMAGE,), slots=2, name="s")]
    (joined,) = branch_layout(rows)
    assert joined.branches is not None and joined.positions is not None
    assert joined.input_ids.tolist() == [9, 9, 1, 5, 6, 7, 8, 9]
    assert joined.branches.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert joined.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert joined.labels.tolist() == [-100, -100, -100, -100, 6, -100, 8, 9]
    assert joined.image_mask.tolist() == [True, True] + [False] * 6
    assert joined.media == (IMAGE,) and joined.questions == 2


def test_a_trained_first_token_moves_the_boundary_back() -> None:
    """The first token of a branch has no predecessor in the joined row that could predict it."""
    rows = [row([1, 2, 5], [0, 0, 5], media=(IMAGE,), slots=2), row([1, 2, 6], [0, 0, 6], media=(IMAGE,), slots=2)]
    (joined,) = branch_layout(rows)
    assert joined.branches is not None
    assert joined.branches.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert joined.input_ids.tolist() == [9, 9, 1, 2, 5, 2, 6]
    assert joined.labels.tolist() == [-100, -100, -100, -100, 5, -100, 6]


@pytest.mark.parametrize(
    "rows",
    [
        [row([1, 5], [0, 5], media=(IMAGE,), slots=2)],
        [row([1, 5], [0, 5], media=(IMAGE,), slots=2), row([1, 6], [0, 6], media=(Media(b"two"),), slots=2)],
        [row([1, 5], [0, 5]), row([2, 6], [0, 6])],
    ],
    ids=["alone", "other image", "no common prefix"],
)
def test_rows_that_share_nothing_come_back_unchanged(rows: list[Example]) -> None:
    assert branch_layout(rows) == rows


def test_an_image_that_is_not_in_the_common_prefix_stays_in_its_row() -> None:
    late = [
        Example("l", np.array([1, n, 9, 9, 5]), np.array([-100, -100, -100, -100, 5]), np.array([0, 0, 1, 1, 0], dtype=bool), (IMAGE,))
        for n in (2, 3)
    ]
    assert branch_layout(late) == late


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.lists(
        st.tuples(st.lists(st.integers(1, 3), max_size=4), st.lists(st.integers(1, 3), min_size=1, max_size=3)), min_size=2, max_size=5
    ),
)
@settings(max_examples=100, deadline=None)
def test_every_branch_with_its_prefix_is_the_row_it_came_from(prefix: list[int], rest: list[tuple[list[int], list[int]]]) -> None:
    rows = [row([*prefix, *question, *answer], [0] * len(prefix + question) + answer, media=(IMAGE,), slots=2) for question, answer in rest]
    joined = branch_layout(rows)
    if len(joined) > 1:
        assert joined == rows
        return
    expected = [(r.input_ids.tolist(), r.labels.tolist(), list(range(len(r.input_ids)))) for r in rows]
    assert branches_of(joined[0]) == expected
    assert joined[0].supervised == sum(r.supervised for r in rows)
    assert joined[0].branches is not None
    assert (joined[0].branches == 0).sum() >= 2
    first_of_branch = np.flatnonzero(np.diff(joined[0].branches)) + 1
    assert (joined[0].labels[first_of_branch] == IGNORE_INDEX).all()


def test_branches_of_a_real_format_share_system_text_and_image() -> None:
    made = processor("smollm2", "bytes", "causal")
    rows = [made.examples(Conversation(q, turns(q, "yes", image=True)))[0] for q in ("one?", "only?", "two?")]
    (joined,) = branch_layout(rows)
    assert branches_of(joined) == [(r.input_ids.tolist(), r.labels.tolist(), list(range(len(r.input_ids)))) for r in rows]
    assert joined.image_mask.sum() == IMAGE_SLOTS and len(joined.input_ids) < sum(len(r.input_ids) for r in rows) - 100


def test_a_segment_list_of_media_only_gives_slots_only() -> None:
    made = processor("flan", "bytes", "causal")
    spec = InputSpec(2, "causal", 10, made.spec.pad_id, made.spec.eos_id)
    message = Conversation("m", (Message("user", (IMAGE, IMAGE)),))
    (example,) = causal_layout(message, [Segment("media", IMAGE), Segment("media", IMAGE)], made.encoder, spec)
    assert example.image_mask.tolist() == [True] * 4 and example.media == (IMAGE, IMAGE) and example.supervised == 0
