"""Answers that are held to a JSON schema: they parse and fit it, however they are generated."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import png
from vlm_tune.errors import ArgumentError
from vlm_tune.generation import answering, streaming
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.generation.constraints import json_constraint
from vlm_tune.model.language.decoding import Decoding

Recipes = Callable[..., str]
both_llms = pytest.mark.parametrize("llm", ["causal", "seq2seq"])
RED, BLUE = png((200, 30, 30)).source, png((30, 30, 200)).source
REQUESTS: list[Any] = [
    {"prompt": "what color is it?", "image": RED},
    {"prompt": "is it red?", "image": RED},
    {"prompt": "is it red?", "image": BLUE},
    "hello",
]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "dark blue", "grün"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 12},
        "parts": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["color", "count", "parts"],
    "additionalProperties": False,
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.5, "top_p": 0.95, "seed": 3, "num_return_sequences": 2},
    "penalised": {"repetition_penalty": 1.4, "logprobs": True, "top_logprobs": 2},
}


def fits(text: str, schema: Any = SCHEMA) -> bool:
    return jsonschema_rs.is_valid(schema, json.loads(text))


@both_llms
@pytest.mark.parametrize("way", WAYS)
def test_answers_fit_the_schema(
    way: str, llm: str, tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same single, batched, streamed, in a chat, and by transformers' `generate`."""
    model = talkative(tiny_recipe(llm), data__max_length=512)
    settings: dict[str, Any] = {"json_schema": SCHEMA, "max_new_tokens": 120, **WAYS[way]}

    def batched() -> list[list[str]]:
        return [
            [each.text for each in (answer, *answer.alternatives)]
            for answer in model.answer_batch(REQUESTS, **settings)
        ]

    answers = batched()
    assert all(fits(text) for texts in answers for text in texts)
    assert len({text for texts in answers for text in texts}) > 2
    for request, texts in zip(REQUESTS, answers, strict=True):
        (alone,) = model.answer_batch([request], **settings)
        assert [each.text for each in (alone, *alone.alternatives)] == texts
        assert alone.finish_reason == "stop"
        # Under the model as it is, which does not know of the schema.
        assert alone.logprobs is None or max(alone.logprobs) <= 0
    one = {name: each for name, each in settings.items() if name != "num_return_sequences"}
    assert "".join(model.stream("hello", **one)) == answers[-1][0]
    chat = model.start_chat(**one)
    assert chat.ask("hello").text == answers[-1][0] and fits(chat.ask("and now?").text)
    for module in (answering, streaming):
        monkeypatch.setattr(module, "continues", lambda model, decoding: False)
    assert batched() == answers


def test_an_answer_that_is_too_long_is_broken_off(tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe("causal"))
    answer = model.answer("hello", json_schema=SCHEMA, max_new_tokens=3)
    assert answer.finish_reason == "length" and len(answer.ids) == 3
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.text)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{}", "json_schema must be a mapping (a JSON schema), got '{}'"),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "integer", "minimum": 5, "maximum": 2}, "minimum (5) is greater than maximum"),
        ({"enum": []}, "Unsatisfiable schema"),
        ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ({"$ref": "https://example.com/a.json"}, "does not fetch resources"),
        ({"const": {1, 2}}, "json_schema can't be written as JSON"),
    ],
)
def test_schemas_that_no_answer_can_follow(schema: Any, message: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        Decoding(json_schema=schema)
    assert message in str(raised.value)


def test_a_schema_of_any_depth_is_an_answer_or_an_error(tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe("causal"))
    for depth in (20, 400, 100_000):
        schema: dict[str, Any] = {"type": "integer"}
        for _ in range(depth):
            schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
        if depth == 20:
            text = model.chat("hello", json_schema=schema, max_new_tokens=90)
            assert text.replace(" ", "").startswith("[" * depth)
            continue
        with pytest.raises(ArgumentError, match=r"json_schema"):
            model.chat("hello", json_schema=schema)


def test_a_schema_has_no_effect_beside_beams_or_choices(tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe("causal"))
    with pytest.raises(ArgumentError, match=r"set num_beams 1"):
        model.answer("hello", json_schema=SCHEMA, num_beams=2)
    with pytest.raises(ArgumentError, match=r"json_schema has no effect on choices"):
        model.answer("hello", json_schema=SCHEMA, choices=["a", "b"])


def as_t5s(model: VisionLanguageModel, characters: str) -> PreTrainedTokenizerFast:
    """A tokenizer of T5's kind, with tokens for these characters and as many as the model's."""
    pieces = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{number}>" for number in range(9))]
    pieces += ["\u2581", "\u2581red", "blue", *characters]
    count = len(model.processor.tokenizer)  # type: ignore[arg-type]
    pieces += [f"\u2581word{number}" for number in range(count - len(pieces))]
    inner = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    inner.decoder = decoders.Metaspace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def t5_like(tiny_recipe: Recipes) -> Callable[[str], VisionLanguageModel]:
    """Makes encoder-decoders whose tokenizer is of T5's kind and has some characters alone."""

    def make(characters: str) -> VisionLanguageModel:
        model = talkative(tiny_recipe("seq2seq"))
        tokenizer = as_t5s(model, characters)
        processor: Any = model.processor
        processor.tokenizer = tokenizer
        processor.spec = type(processor.spec)(
            processor.spec.tokens_per_image, "seq2seq", processor.spec.max_length, 0, 1
        )
        processor.__post_init__()
        return model

    return make


def test_tokenizers_of_t5_write_json_as_far_as_they_have_its_characters(
    t5_like: Callable[[str], VisionLanguageModel],
) -> None:
    model = t5_like('[]",:0123456789rebdlu')
    schema = {"type": "array", "items": {"enum": ["red", "blue", 7]}, "minItems": 2, "maxItems": 3}
    texts = [
        model.chat("red", json_schema=schema, temperature=2.0, seed=seed, max_new_tokens=60)
        for seed in range(3)
    ]
    assert all(fits(text, schema) for text in texts) and len(set(texts)) > 1
    with pytest.raises(ArgumentError) as raised:
        model.chat("red", json_schema=SCHEMA)
    assert "after '' an answer continues with one of {, and the model's tokenizer has none" in str(
        raised.value
    )
    # Where it can begin and not go on, it is an error when it comes to that.
    inner = {"type": "array", "items": {"type": "object"}, "minItems": 1}
    with pytest.raises(ArgumentError, match=r"after '.*\[ ?' an answer continues with one of \{"):
        model.chat("red", json_schema=inner, max_new_tokens=20)


def test_a_tokenizer_is_prepared_once(tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe("causal"))
    one, other = (
        json_constraint(model.processor, Decoding(json_schema=schema), model.llm.vocabulary)
        for schema in (SCHEMA, {"type": "string"})
    )
    assert one is not None and other is not None and one.tokenizer is other.tokenizer


@both_llms
@pytest.mark.parametrize("continued", [True, False])
def test_an_answer_that_a_stop_string_ends_does_not_stop_others(
    continued: bool, llm: str, tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = talkative(tiny_recipe(llm))
    if not continued:
        monkeypatch.setattr(answering, "continues", lambda model, decoding: False)
    settings: dict[str, Any] = {
        "json_schema": {"type": "array", "items": {"enum": ["red", 12, True]}, "minItems": 9},
        "stop_strings": ["t", "12"],
        "temperature": 1.0,
        "seed": 1,
        "max_new_tokens": 12,
    }
    questions = ["hello", "what color is it?", "is it red?", "no"]
    together = model.answer_batch(questions, **settings)
    assert together == [model.answer(each, **settings) for each in questions]
    assert len({len(answer.ids) for answer in together}) > 1
