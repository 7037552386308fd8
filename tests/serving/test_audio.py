"""Audio clips of requests: answers are those of the model, and what is no clip is refused."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.audio_samples import TONES, hearing_recipe, tone, wav, write_tone_rows
from tests.helpers.served import CHAT, ask, events_of, image_part, question, served
from tests.helpers.talkative import talkative
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.serving.app import Server

CLIPS = [wav(tone(hertz, 0.5 + number)) for number, hertz in enumerate(TONES.values())]
"""Two clips, of one and of two windows."""
TEXT = "is it high?"


def audio_part(clip: bytes | str, **fields: Any) -> dict[str, Any]:
    """A message's part with a clip: its bytes, or its base64."""
    data = clip if isinstance(clip, str) else base64.b64encode(clip).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav", **fields}}


def heard(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The body of a request of parts and a text."""
    content = [*parts, {"type": "text", "text": TEXT}]
    messages = [{"role": "user", "content": content}]
    return {"model": "tiny", "messages": messages, "max_tokens": 6, **fields}


def hearing_model(folder: Path, kind: str) -> VisionLanguageModel:
    return talkative(hearing_recipe(kind, write_tone_rows(folder), folder / "run"))


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return served(hearing_model(tmp_path, "causal"))


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_answers_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    model = hearing_model(tmp_path, kind)
    server = served(model)
    first, second, again, both, chosen = ask(
        server,
        *(("POST", CHAT, heard(audio_part(clip))) for clip in CLIPS),
        ("POST", CHAT, heard(audio_part(CLIPS[1]), stream=True)),
        ("POST", CHAT, heard(*map(audio_part, CLIPS))),
        ("POST", CHAT, heard(audio_part(CLIPS[0]), choices=["yes", "no"], max_tokens=None)),
    )
    answers = [model.chat(TEXT, audios=clip, max_new_tokens=6) for clip in CLIPS]
    assert kind == "seq2seq" or answers[0] != answers[1]
    texts = [each.json()["choices"][0]["message"]["content"] for each in (first, second, both)]
    assert texts == [*answers, model.chat(TEXT, audios=CLIPS, max_new_tokens=6)]
    chunks = [event["choices"][0]["delta"] for event in events_of(again.text)[:-1]]
    assert "".join(chunk.get("content", "") for chunk in chunks) == answers[1]
    answer = model.answer(TEXT, audios=CLIPS[0], choices=["yes", "no"])
    assert answer.probabilities is not None
    expected = pytest.approx(answer.probabilities, rel=1e-4)
    assert chosen.json()["choices"][0]["probabilities"] == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an image": (audio_part(b"\x89PNG\r\n"), "audio 1: it is not audio of WAV, FLAC, OGG, MP3"),
    "no base64": (audio_part("%%%"), "audio 1: the audio's data URL is bad base64"),
    "blank": (audio_part(" "), "audio 1: the audio's data URL is empty"),
    "cut": (audio_part(CLIPS[0][:2000]), "audio 1: is cut: 2,000 bytes of"),
    "too long": (audio_part(wav(tone(seconds=2.5))), "the model takes at most 2 x 1"),
    "to be seen": (image_part(), "image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_model_can_not_hear_is_refused(name: str, server: Server) -> None:
    part, message = REFUSED[name]
    (reply,) = ask(server, ("POST", CHAT, heard(part)))
    error = reply.json()["error"]
    assert reply.status_code == 400 and message in error["message"] and error["param"] == "messages"


def test_clips_count_as_images_do(server: Server) -> None:
    parts = [audio_part(CLIPS[0])] * 17
    (reply,) = ask(server, ("POST", CHAT, heard(*parts)))
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["code"] == "too_many_audio_clips"
    assert "at most 16 images or audio clips on this server, got 17 audio clips" in error["message"]
    system = {"role": "system", "content": [audio_part(CLIPS[0])]}
    body = question()
    (reply,) = ask(server, ("POST", CHAT, body | {"messages": [system, *body["messages"]]}))
    assert reply.status_code == 400


def test_a_model_that_sees_hears_nothing(tiny_recipe: Callable[..., str]) -> None:
    server = served(talkative(tiny_recipe("causal")))
    (reply,) = ask(server, ("POST", CHAT, heard(audio_part(CLIPS[0]))))
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "modality"
