"""Chat requests.

Images where they stand, one behaviour batched or single, and errors that name the request.
"""

from __future__ import annotations

import base64
import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny_models import built, parsed, png, rows_of, save_llm, with_llm
from vlm_tune import check, sft
from vlm_tune.data.types import Media
from vlm_tune.errors import ArgumentError, DataError, ModelError, VlmTuneError
from vlm_tune.evaluation.texts import normalise
from vlm_tune.generation.requests import request_conversation
from vlm_tune.model.language.decoding import Decoding

RED, BLUE = png((200, 30, 30)), png((30, 30, 200))
DATA_URL = "data:image/png;base64," + base64.b64encode(RED.read()).decode()
TEXT = {"type": "text", "text": "hi"}


def parts(request: Any) -> list[tuple[str | Media, ...]]:
    return [message.parts for message in request_conversation(1, request).messages]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ("hello", [("hello",)]),
        ({"prompt": "what?", "images": [RED.source]}, [(RED, "what?")]),
        ({"prompt": "what?", "image": RED.source}, [(RED, "what?")]),
        (
            {"prompt": "first <image> then <image>", "images": [RED.source, BLUE.source]},
            [("first ", RED, " then ", BLUE)],
        ),
        (
            {"prompt": r"what is \<image> in HTML?", "images": RED.source},
            [(RED, "what is <image> in HTML?")],
        ),
        (
            {
                "prompt": [{"role": "user", "content": [TEXT, {"type": "image"}]}],
                "images": [RED.source],
            },
            [("hi", RED)],
        ),
        (
            {
                "prompt": [
                    {"role": "user", "content": [{"type": "image", "image": BLUE.source}, TEXT]}
                ]
            },
            [(BLUE, "hi")],
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": DATA_URL}},
                            {"type": "image", "url": DATA_URL},
                            {"type": "image", "base64": DATA_URL.partition(",")[2]},
                            TEXT,
                        ],
                    }
                ]
            },
            [(RED, RED, RED, "hi")],
        ),
        (
            {
                "prompt": [
                    {"role": "user", "content": "hello"},
                    {"role": "assistant", "content": "an <image> is"},
                    {"role": "user", "content": "<image>\nand?"},
                ],
                "images": [RED.source],
            },
            [("hello",), ("an <image> is",), (RED, "and?")],
        ),
    ],
)
def test_images_stand_where_they_are_put(request_: Any, expected: list[Any]) -> None:
    assert parts(request_) == expected


def test_an_image_is_whatever_holds_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED.read())
    array = np.full((4, 6, 3), 90, dtype=np.uint8)
    forms = [
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        RED.read(),
        io.BytesIO(RED.read()),
        DATA_URL,
        array,
        array[..., 0],
    ]
    forms += [
        Image.fromarray(array),
        Image.fromarray(array).convert("HSV"),
        Image.fromarray(array).convert("CMYK"),
    ]
    for form in forms:
        ((media, text),) = parts({"prompt": "what?", "images": form})
        assert isinstance(media, Media) and text == "what?"
        assert Image.open(io.BytesIO(media.read())).size in ((32, 32), (6, 4))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            {"prompt": "<image> and <image>", "images": [RED.source]},
            r"1 images and 2 <image> marks",
        ),
        ({"prompt": "<image>"}, r"0 images and 1 <image> marks .*is the text itself"),
        (
            {"prompt": "<image>", "images": [RED.source, BLUE.source]},
            r"2 images and 1 <image> marks",
        ),
        ({"prompt": "a", "imgae": RED.source}, r"unknown key 'imgae'; did you mean `image`\?"),
        ({"prompt": "a", "messages": []}, r"a request has a `prompt`, or in its place `messages`"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "base64": "no!"}]},
                ]
            },
            r"turn 1: the image's data URL is bad base64",
        ),
        ({"images": [RED.source]}, r"a request has a `prompt`, or in its place `messages`"),
        (
            {"prompt": "a", "image": RED.source, "images": [RED.source]},
            r"both `image` and `images`",
        ),
        (7, r"a request must be a string or .* got 7"),
        ({"prompt": []}, r"a prompt must be a string or a list of turns"),
        ({"prompt": None}, r"a prompt must be a string or a list of turns, got nothing"),
        (
            {"prompt": [{"role": "user", "contnet": "a"}]},
            r"turn 1: unknown key 'contnet'; did you mean `content`\?",
        ),
        (
            {"prompt": [{"role": "robot", "content": "a"}]},
            r"turn 1: the role must be one of system, user, assistant, got 'robot'",
        ),
        (
            {"prompt": [{"role": "user", "content": 5}]},
            r"turn 1: `content` must be a string or a list of parts, got 5",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "video"}]}]},
            r"a part must be text, image, image_url, audio or input_audio, got 'video'",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "audio"}]}]},
            r"0 audios and 1 <audio> marks or parts for them",
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            r"a chat ends with the user's turn",
        ),
        ({"prompt": "a", "images": [None]}, r"an image must be a path, a data URL, .* got nothing"),
        ({"prompt": "a", "images": ["nope.png"]}, r"no image file 'nope.png'"),
        ({"prompt": "a", "images": ["http://a/b.png"]}, r"is a URL, and URLs are not fetched"),
        ({"prompt": "a", "images": ["\0"]}, r"no image file"),
        (
            {"prompt": "a", "images": [np.full((4, 4, 3), np.nan)]},
            r"an image's array must be uint8 from 0 to 255, got float64",
        ),
        ({"prompt": "a", "images": [np.zeros((0, 5, 3), np.uint8)]}, r"got \[0, 5, 3\]"),
        ({"prompt": "a", "images": [Image.new("RGB", (0, 5))]}, r"an image of 0x5 pixels has none"),
        ("half \udcff", "half of a surrogate pair"),
    ],
)
def test_what_is_no_request_is_refused_by_its_number(request_: Any, message: str) -> None:
    with pytest.raises(DataError, match=r"^request 3: .*" + message):
        request_conversation(3, request_)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "3", None, 10**9])
@pytest.mark.parametrize("name", ["max_new_tokens", "num_beams"])
def test_numbers_that_are_none_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"{name} must be an integer from 1") as caught:
        Decoding(**{"max_new_tokens": 4, name: value})
    assert (
        isinstance(caught.value, VlmTuneError)
        and isinstance(caught.value, ValueError)
        and caught.value.exit_code == 2
    )


def test_a_chat_is_the_same_in_a_batch_a_copy_and_with_parts(
    tiny_recipe: Callable[..., str],
) -> None:
    model = built(parsed(tiny_recipe("causal"))).eval()
    image = RED.read()
    turns = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "what color is it?"}],
        }
    ]
    single = model.chat("what color is it?", images=image, max_new_tokens=5)
    assert model.chat(turns, images=[image], max_new_tokens=5) == single
    assert model.chat("<image>\nwhat color is it?", images=[image], max_new_tokens=5) == single
    requests: list[Any] = [{"prompt": "what color is it?", "image": image}, "hello"]
    assert model.chat_batch(requests, max_new_tokens=5) == [
        single,
        model.chat("hello", max_new_tokens=5),
    ]
    assert copy.deepcopy(model).chat("what color is it?", images=image, max_new_tokens=5) == single
    with pytest.raises(ModelError, match=r"save_pretrained"):
        pickle.dumps(model)
    with pytest.raises(ArgumentError, match=r"requests: expected a list"):
        model.chat_batch("hello")
    with pytest.raises(ArgumentError, match=r"num_beams"):
        model.chat("hello", num_beams=0)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_bases_generation_config_changes_no_answer(
    kind: str, tiny_recipe: Callable[..., str], tmp_path: Path, caplog: Any
) -> None:
    from transformers import GenerationConfig

    text = tiny_recipe(kind)
    folder = save_llm(tmp_path / "base", kind, rows_of(parsed(text)))
    recipe = parsed(with_llm(text, folder, kind))
    requests: list[Any] = [
        {"prompt": question, "image": RED.read()}
        for question in ("what color is it?", "is it red?")
    ]
    plain = built(recipe).chat_batch(requests, max_new_tokens=12)
    given = GenerationConfig.from_pretrained(folder)
    odd: dict[str, Any] = {
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 2,
        "num_return_sequences": 2,
        "num_beams": 2,
    }
    odd |= {
        "stop_strings": ["a"],
        "return_dict_in_generate": True,
        "guidance_scale": 2.0,
        "min_new_tokens": 9,
        "suppress_tokens": [5],
    }
    for name, value in odd.items():
        setattr(given, name, value)
    (folder / "generation_config.json").write_text(given.to_json_string(use_diff=True))
    model = built(recipe)
    assert "repetition_penalty 5.0" in caplog.text
    assert model.chat_batch(requests, max_new_tokens=12) == plain
    assert [
        model.chat(request["prompt"], request["image"], max_new_tokens=12) for request in requests
    ] == plain
    assert model.chat_batch(requests, max_new_tokens=12, num_beams=2)
    assert model.llm.model.generation_config.repetition_penalty in (None, 1.0)


def test_an_empty_answer_is_no_full_stop() -> None:
    assert normalise("") != normalise(".") and normalise("Yes.") == normalise(" yes")


GPT2 = (
    "{model_type: gpt2, vocab_size: 400, config: {n_embd: 32, n_layer: 1, n_head: 2, "
    "n_positions: 40}}"
)
OPT = (
    "{model_type: opt, vocab_size: 400, config: {hidden_size: 32, ffn_dim: 48, "
    "num_hidden_layers: 1, num_attention_heads: 2, "
    "word_embed_proj_dim: 32, max_position_embeddings: 40}}"
)


@pytest.mark.parametrize("scratch", [GPT2, OPT], ids=["gpt2", "opt"])
def test_learned_positions_are_not_passed(scratch: str, tiny_recipe: Callable[..., str]) -> None:
    text = tiny_recipe("causal").splitlines()
    lines = [
        f"  llm: {{kind: causal, scratch: {scratch}}}" if line.startswith("  llm:") else line
        for line in text
    ]
    model = built(parsed("\n".join(lines) + "\n")).eval()
    assert model.llm.longest == 40
    requests: list[Any] = [
        {"prompt": question, "image": RED.read()}
        for question in ("what color is it?", "is it red?")
    ]
    assert all(isinstance(answer, str) for answer in model.chat_batch(requests, max_new_tokens=100))
    options: list[Any] = [{"max_new_tokens": 100}, {"max_new_tokens": 100, "num_beams": 2}]
    for settings in options:
        single = [model.answer_batch([each], **settings)[0].ids for each in requests]
        assert [each.ids for each in model.answer_batch(requests, **settings)] == single
        # The shorter question leaves more positions.
        assert len(single[0]) != len(single[1])
    assert isinstance(model.chat("what color is it?", max_new_tokens=100), str)
    with pytest.raises(
        ModelError, match=r"has positions for 40: set data.max_length to at most 40"
    ):
        model.chat("what color is it? " * 9, max_new_tokens=1)


@pytest.mark.parametrize("scratch", [GPT2, OPT], ids=["gpt2", "opt"])
def test_rows_beyond_learned_positions_are_told_before_training(
    scratch: str, tiny_recipe: Callable[..., str]
) -> None:
    """By `check` and by `sft` before its first step.

    Rows of one image that are joined are each within the positions.
    """
    text = tiny_recipe("causal").splitlines()
    lines = [
        f"  llm: {{kind: causal, scratch: {scratch}}}" if line.startswith("  llm:") else line
        for line in text
    ]
    settings: dict[str, Any] = {
        "data__workers": 0,
        "train__steps": 1,
        "evaluate__samples": 0,
        "data__group": "image",
        "data__validation": [],
    }
    recipe = parsed("\n".join(lines) + "\n", **settings)
    longest = max(part.lengths.most for part in check(recipe).parts if part.lengths)
    assert longest < 40
    # The joined rows of an image are longer than any row by itself.
    exact, short = (
        parsed(
            "\n".join(lines).replace(": 40}", f": {size}}}"),
            output=f"{recipe.output}-{size}",
            **settings,
        )
        for size in (longest, longest - 1)
    )
    assert not check(exact).errors
    assert sft(exact).result
    (finding,) = check(short).errors
    assert finding.kind == "unfit" and f"has positions for {longest - 1}" in finding.message
    with pytest.raises(ModelError, match=f"has positions for {longest - 1}: set data.max_length"):
        sft(short)
    assert not (Path(short.output) / "stages").exists()


BART = (
    "encoder_layers: 1, decoder_layers: 1, encoder_attention_heads: 2, "
    "decoder_attention_heads: 2, encoder_ffn_dim: 32, decoder_ffn_dim: 32"
)
PLACED = {
    "bart": f"{{model_type: bart, vocab_size: 400, config: {{d_model: 32, {BART}}}}}",
    "pegasus": f"{{model_type: pegasus, vocab_size: 400, config: {{d_model: 32, {BART}}}}}",
}


@pytest.mark.parametrize("kind", PLACED)
def test_an_encoder_decoder_that_counts_places_takes_no_packed_rows(
    kind: str, tiny_recipe: Callable[..., str]
) -> None:
    """Learned or sinusoidal positions would go on from sample to sample of a packed row.

    T5's distances don't.
    """
    text = tiny_recipe("seq2seq")
    lines = [
        f"  llm: {{kind: seq2seq, scratch: {PLACED[kind]}}}" if line.startswith("  llm:") else line
        for line in text.splitlines()
    ]
    settings: dict[str, Any] = {
        "data__workers": 0,
        "train__steps": 1,
        "evaluate__samples": 0,
        "data__validation": [],
    }
    packed = parsed("\n".join(lines) + "\n", data__packing=True, **settings)
    (finding,) = check(packed).errors
    assert finding.kind == "unfit" and "can't be joined" in finding.message
    with pytest.raises(ModelError, match="can't be joined, it derives positions from the order"):
        sft(packed)
    assert sft(parsed("\n".join(lines) + "\n", **settings), overwrite=True).result
    assert not check(parsed(text, data__packing=True, **settings)).errors


def test_a_question_without_a_token_is_an_error(tiny_recipe: Callable[..., str]) -> None:
    """Where the chat format adds none, an encoder would read nothing."""
    model = built(parsed(tiny_recipe("seq2seq"))).eval()
    with pytest.raises(DataError, match="no text and no media") as caught:
        model.chat("")
    assert caught.value.kind == "empty_question"
    assert isinstance(model.chat("", images=[png()], max_new_tokens=2), str)
