"""`vlm-tune chat`: questions, commands, choices, and what ends an answer and what the chat."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.helpers.audio_samples import TONES, hearing_recipe, write_tone_rows
from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import png
from vlm_tune.cli import app
from vlm_tune.cli.chat_terminal import ChatTerminal, completions
from vlm_tune.data.sources.registry import read_path
from vlm_tune.errors import ArgumentError, DataError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.quoting import escaped_lines

Recipes = Callable[..., str]
QUESTION = "what color is it?"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "my red.png"
    path.write_bytes(png((200, 30, 30)).read())
    return path


@pytest.fixture
def model(tiny_recipe: Recipes) -> VisionLanguageModel:
    return talkative(tiny_recipe("causal"), data__max_length=512)


def terminal(model: VisionLanguageModel, images: Any = (), **options: Any) -> ChatTerminal:
    chat = model.start_chat(max_new_tokens=6)
    return ChatTerminal(chat, images, **{"choices": None, "interactive": True, **options})


def typed(*entries: Any) -> Callable[[str], str]:
    """A terminal's `input`: lines, and errors that it raises."""
    left: Iterator[Any] = iter(entries)

    def read(prompt: str) -> str:
        entry = next(left, None)
        if entry is None:
            raise EOFError
        if isinstance(entry, BaseException):
            raise entry
        return entry

    return read


def test_answers_are_those_of_a_chat(
    model: VisionLanguageModel, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal(model, [image]).run(typed(QUESTION, "is it red?"), as_json=False)
    chat = model.start_chat(max_new_tokens=6)
    expected = [chat.ask(QUESTION, [image]).text, chat.ask("is it red?").text]
    assert capsys.readouterr().out == "".join(f"{escaped_lines(text)}\n" for text in expected)
    terminal(model, [image]).run(typed(QUESTION, "is it red?"), as_json=True)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [{"answer": text} for text in expected]


def test_commands_change_the_chat(
    model: VisionLanguageModel, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "saved.jsonl"
    session = terminal(model)
    dropped = str(image).replace(" ", "\\ ")
    session.run(
        typed(
            "/system be brief",
            f"/image {image}",
            dropped,
            f"'{image}'",
            QUESTION,
            f"/save {saved}",
            "/temperature 0.5",
            "/help",
        ),
        as_json=False,
    )
    errors = capsys.readouterr().err
    assert errors.count(f"added {image} to the next question") == 3
    assert "/temperature NUMBER" in errors and f"wrote {saved}" in errors
    assert session.chat.settings["temperature"] == 0.5
    (question, answer) = session.chat.turns
    assert len(question.parts) == 4
    # What is saved is a row of data.
    rows, _ = read_path(str(saved), seed=0)
    assert [message.role for message in rows[0].messages] == ["system", "user", "assistant"]
    assert rows[0].messages[1].parts[-1] == QUESTION
    assert rows[0].messages[2].text == answer.text.strip()
    assert [item.source for item in rows[0].media] == [image] * 3
    session.run(typed("/reset", "/quit", "not asked"), as_json=False)
    assert not session.chat.turns and session.chat.system == "be brief"


def test_clips_are_heard_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = hearing_recipe("causal", write_tone_rows(tmp_path), tmp_path / "run")
    hears = talkative(recipe, data__max_length=512)
    low, high = (tmp_path / f"{name}.wav" for name in TONES)
    session = terminal(hears, audios=[low])
    saved = tmp_path / "saved.jsonl"
    session.run(
        typed("is it <audio>?", f"/audio {high}", str(low), r"\<audio> both?", f"/save {saved}"),
        as_json=False,
    )
    printed = capsys.readouterr()
    assert "Ask about the clip" in printed.err and f"added {high} to the next" in printed.err
    chat = hears.start_chat(max_new_tokens=6)
    answers = [chat.ask("is it <audio>?", (), [low]).text]
    answers.append(chat.ask(r"\<audio> both?", (), [high, low]).text)
    assert printed.out == "".join(f"{escaped_lines(text)}\n" for text in answers)
    rows, _ = read_path(str(saved), seed=0)
    assert [item.source for item in rows[0].media] == [low, high, low]
    assert {item.modality for item in rows[0].media} == {"audio"}
    assert [turn.text for turn in rows[0].messages[::2]] == ["is it ?", "<audio> both?"]
    session.run(typed("/audio nope.wav"), as_json=False)
    assert "no audio file 'nope.wav'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/imgae x.png", "there is no command '/imgae'; /help lists them"),
        ("/image", "the command is: /image PATH"),
        ("/reset now", "the command is: /reset"),
        ("/image nope.png", "no image file 'nope.png'"),
        ("/temperature hot", "a temperature must be a number, got 'hot'"),
        ("/temperature -3", "temperature must be a number from 0 to 100"),
        ("/system \udcff", "the system text must be valid Unicode"),
        ("<image>?", "0 images and 1 <image> marks"),
    ],
)
def test_a_fault_ends_a_pipe_and_not_a_conversation(
    line: str, message: str, model: VisionLanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    session = terminal(model)
    session.run(typed(line, "hello"), as_json=False)
    assert message in capsys.readouterr().err and len(session.chat.turns) == 2
    with pytest.raises((ArgumentError, DataError)):
        terminal(model, interactive=False).run(typed(line), as_json=False)


def test_bytes_that_are_no_text_end_no_conversation(
    model: VisionLanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    session = terminal(model)
    broken = UnicodeDecodeError("utf-8", b"hi \xff", 3, 4, "invalid start byte")
    session.run(typed(broken, "hello"), as_json=False)
    message = "a line of the chat is not utf-8 text: invalid start byte at byte 4"
    assert message in capsys.readouterr().err
    assert len(session.chat.turns) == 2


def test_images_stay_until_a_question_takes_them(
    model: VisionLanguageModel, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refused question prints nothing where answers are read."""
    session = terminal(model, [image])
    session.run(typed("<image> and <image>?"), as_json=False)
    session.run(typed("<image> and <image>?"), as_json=True)
    assert capsys.readouterr().out == "" and session.images == [image]
    session.run(typed(QUESTION), as_json=False)
    assert session.images == [] and len(session.chat.turns[0].parts) == 2


def test_no_temperature_leaves_out_the_settings_of_draws(model: VisionLanguageModel) -> None:
    chat = model.start_chat(max_new_tokens=6, temperature=0.8, seed=1, top_p=0.9)
    session = ChatTerminal(chat, [], None, interactive=False)
    session.run(typed("/temperature 0", QUESTION), as_json=False)
    assert chat.turns[-1].text == model.chat(QUESTION, max_new_tokens=6)
    session = ChatTerminal(chat, [], ["a", "b"], interactive=False)
    with pytest.raises(ArgumentError, match="temperature has no effect on choices"):
        session.run(typed("/temperature 0.5"), as_json=False)


def test_texts_beside_images_are_saved_as_they_are(
    model: VisionLanguageModel, image: Path, tmp_path: Path
) -> None:
    session = terminal(model, interactive=False)
    images = [image, image]
    session.chat.ask("a \\\\<image>\n\nb \\<image> <image>c", images)
    session.run(typed(f"/save {tmp_path / 'saved.jsonl'}"), as_json=False)
    rows, _ = read_path(str(tmp_path / "saved.jsonl"), seed=0)
    parts = [part if isinstance(part, str) else None for part in rows[0].messages[0].parts]
    assert parts == ["a \\", None, "\nb <image> ", None, "c"]


def test_what_is_there_is_not_written_over(model: VisionLanguageModel, image: Path) -> None:
    before = image.read_bytes()
    session = terminal(model, interactive=False)
    with pytest.raises(ArgumentError, match="already exists: give another name"):
        session.run(typed(f"/save {image}"), as_json=False)
    assert image.read_bytes() == before


def test_ctrl_c_ends_the_answer_and_not_the_chat(
    model: VisionLanguageModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = terminal(model)
    step = model.llm.branches
    fail_at = [3]

    def branches(*args: Any, **kwargs: Any) -> Any:
        grown = step(*args, **kwargs)
        plain = grown.step

        def interrupted(tokens: Any) -> Any:
            fail_at[0] -= 1
            if fail_at[0] == 0:
                raise KeyboardInterrupt
            return plain(tokens)

        grown.step = interrupted
        return grown

    monkeypatch.setattr(model.llm, "branches", branches)
    session.run(typed(KeyboardInterrupt(), "hello there", "and now?"), as_json=False)
    output = capsys.readouterr()
    assert output.err.count("(interrupted; Ctrl-D ends)") == 2
    broken, whole = output.out.splitlines()[0], session.chat.turns[-1].text
    assert len(session.chat.turns) == (4 if broken else 2)
    assert whole and not model.training
    with pytest.raises(KeyboardInterrupt):
        terminal(model, interactive=False).run(typed(KeyboardInterrupt()), as_json=False)


def test_choices_are_shown_with_their_probabilities(
    model: VisionLanguageModel, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = terminal(model, [image], choices=["red", "blue"])
    session.run(typed(QUESTION), as_json=False)
    best, first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(f"%  {best}") and {best, second.split()[-1]} == {"red", "blue"}
    session.run(typed("and now?"), as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert sum(printed["probabilities"].values()) == pytest.approx(1)
    assert session.chat.turns[-1].text == printed["answer"]


def test_lines_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "ab.jpg", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    assert completions("/te") == ["/temperature "]
    assert completions("/image " + str(tmp_path / "a")) == [
        f"/image {tmp_path / 'a.png'}",
        f"/image {tmp_path / 'ab.jpg'}",
    ]
    assert completions("hello ") == completions("/image /nowhere/at/all") == []
    monkeypatch.chdir(tmp_path)
    assert completions("/save fo") == ["/save folder/"]


def test_the_command_samples_and_chooses(
    model: VisionLanguageModel, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It sets the levels of the process's loggers.
    monkeypatch.setattr("vlm_tune.cli.chat.quiet_libraries", lambda: None)
    model.save_pretrained(tmp_path / "saved")
    command = ["chat", str(tmp_path / "saved"), "--image", str(image), "--prompt", QUESTION]
    command.append("--json")

    def printed(*options: str) -> Any:
        done = CliRunner().invoke(app, [*command, *options])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    drawing = ["--temperature", "1.5", "--seed", "3", "--top-p", "0.9", "--top-k", "40"]
    drawn = printed("--max-new-tokens", "6", *drawing)
    settings: dict[str, Any] = {"temperature": 1.5, "seed": 3, "top_p": 0.9, "top_k": 40}
    assert drawn == {"answer": model.chat(QUESTION, image, max_new_tokens=6, **settings)}
    chosen = printed("--choices", "red, dark blue")
    assert list(chosen["probabilities"]) == ["red", "dark blue"]
    unused = ["--choices", "red,blue", "--temperature", "0.7"]
    broken = [["--choices", "\udcff,b"], ["--system", "\udcff"]]
    for options in (["--top-p", "0.5"], ["--choices", "red"], unused, *broken):
        failed = CliRunner().invoke(app, [*command, *options])
        assert isinstance(failed.exception, ArgumentError)


def test_help_of_chat_loads_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from vlm_tune.cli import app; "
        "assert CliRunner().invoke(app, ['chat', '--help']).exit_code == 0; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
