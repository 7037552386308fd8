"""A conversation in the terminal: questions, and commands that begin with a slash."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import typer

from vlm_tune.cli.options import print_json
from vlm_tune.data.audio.decode import AUDIO_SUFFIXES
from vlm_tune.data.chat.image_marks import escaped_marks, joined_marks
from vlm_tune.data.sources.video import IMAGE_SUFFIXES
from vlm_tune.errors import ArgumentError, VlmTuneError
from vlm_tune.generation.chat_session import Chat
from vlm_tune.generation.choices import check_not_generated
from vlm_tune.model.language.decoding import DRAWING, Decoding
from vlm_tune.paths import exists, home, is_file, is_folder, shown_path, write_whole, writing
from vlm_tune.quoting import escaped, escaped_lines, quoted

COMMANDS = {
    "/image": ("PATH", "add an image to the next question (or drag it here)"),
    "/audio": ("PATH", "add an audio clip to the next question (or drag it here)"),
    "/reset": ("", "forget the conversation and its media"),
    "/system": ("TEXT", "set the system text and continue the conversation"),
    "/temperature": ("NUMBER", "sampling temperature; 0 is greedy"),
    "/save": ("FILE", "write the conversation as a row of data, one line of JSON"),
    "/help": ("", "list the commands"),
    "/quit": ("", "end (also an empty line or Ctrl-D)"),
}
"""The argument of each command, and what it does."""
SUFFIXES = {"image": IMAGE_SUFFIXES, "audio": AUDIO_SUFFIXES}
"""The endings of files whose path is a whole line, by kind of medium."""


class ChatTerminal:
    """A chat in a terminal, or over lines of a pipe.

    Attributes:
        chat: The conversation.
        images: The images of the next question.
        audios: The audio clips of the next question.
    """

    def __init__(
        self,
        chat: Chat,
        images: Sequence[Path],
        choices: Sequence[str] | None,
        *,
        audios: Sequence[Path] = (),
        interactive: bool,
    ) -> None:
        """Begins with images and audio clips for the first question.

        Args:
            chat: The conversation.
            images: The images of the first question.
            audios: Its audio clips.
            choices: Texts of which the likeliest is the answer, to every question.
            interactive: Whether a person reads the output: errors and Ctrl-C then do not end it.
        """
        self.chat = chat
        self.images = list(images)
        self.audios = list(audios)
        self.choices = choices
        self.interactive = interactive

    def run(self, read: Callable[[str], str], *, as_json: bool) -> None:
        """Answers lines until an empty one, or the end of the input.

        Args:
            read: Reads a line after a prompt, as `input`.
            as_json: Print one JSON object for each answer.
        """
        if self.interactive:
            complete_with_tab()
            about = "clip" if self.chat.model.processor.images.modality == "audio" else "image"
            typer.echo(f"Ask about the {about}; /help lists commands, Ctrl-D ends.", err=True)
        while True:
            try:
                line = self._line(read)
                if not line or line == "/quit":
                    return
                if self._obeys(line):
                    continue
                if as_json:
                    print_json(self.answer(line))
                else:
                    self.show(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                typer.echo("\n(interrupted; Ctrl-D ends)", err=True)
            except VlmTuneError as error:
                if not self.interactive:
                    raise
                typer.echo(str(error), err=True)

    def _line(self, read: Callable[[str], str]) -> str:
        try:
            return read("> " if self.interactive else "").strip()
        except UnicodeDecodeError as error:
            raise ArgumentError(
                f"a line of the chat is not {error.encoding} text: {error.reason} at byte "
                f"{error.start + 1}"
            ) from None

    def answer(self, prompt: str) -> dict[str, Any]:
        """Answers a question: `answer`, and where there are choices their `probabilities`.

        Of a model that reasons it has `reasoning_content` too.
        """
        with self._media_of_question() as (images, audios):
            answer = self.chat.ask(prompt, images, audios, choices=self.choices)
        described: dict[str, Any] = {"answer": answer.text}
        if answer.reasoning is not None:
            described["reasoning_content"] = answer.reasoning
        if answer.probabilities is not None:
            described["probabilities"] = answer.probabilities
        return described

    def show(self, prompt: str) -> None:
        """Answers a question and prints the answer while it is written."""
        if self.choices is not None:
            described = self.answer(prompt)
            typer.echo(escaped_lines(described["answer"]))
            ranked = sorted(described["probabilities"].items(), key=lambda pair: -pair[1])
            for text, probability in ranked:
                typer.echo(f"  {probability:7.2%}  {escaped(text)}")
            return
        with (
            self._media_of_question() as (images, audios),
            closing(self.chat.stream(prompt, images, audios)) as stream,
        ):
            try:
                for piece in stream:
                    typer.echo(escaped_lines(piece), nl=False)
            finally:
                typer.echo()

    @contextmanager
    def _media_of_question(self) -> Iterator[tuple[list[Path], list[Path]]]:
        """The images and clips of the next question, which stay for another if it is refused."""
        turns = len(self.chat.turns)
        try:
            yield self.images, self.audios
        finally:
            if len(self.chat.turns) > turns:
                self._forget_media()

    def _forget_media(self) -> None:
        self.images = []
        self.audios = []

    def _obeys(self, line: str) -> bool:
        """Whether a line was a command, or the path of an image or clip."""
        for kind, suffixes in SUFFIXES.items():
            dropped = _dropped_path(line, suffixes)
            if dropped is not None:
                self._add(kind, dropped)
                return True
        if not line.startswith("/"):
            return False
        name, _, rest = line.partition(" ")
        if name not in COMMANDS:
            raise ArgumentError(f"there is no command {quoted(name)}; /help lists them")
        rest = rest.strip()
        argument = COMMANDS[name][0]
        if bool(rest) != bool(argument):
            raise ArgumentError(f"the command is: {name} {argument}".rstrip())
        match name:
            case "/image" | "/audio":
                kind = name[1:]
                self._add(kind, _dropped_path(rest, SUFFIXES[kind]) or Path(home(rest)))
            case "/reset":
                self.chat.reset()
                self._forget_media()
            case "/system":
                self.chat.system = rest
            case "/temperature":
                self._set_temperature(rest)
            case "/save":
                self._save(Path(home(rest)))
            case "/help":
                for command, (argument, what) in COMMANDS.items():
                    typer.echo(f"{f'{command} {argument}':21} {what}", err=True)
        return True

    def _add(self, kind: str, path: Path) -> None:
        if not is_file(path):
            raise ArgumentError(f"no {kind} file {quoted(str(path))}")
        (self.audios if kind == "audio" else self.images).append(path)
        typer.echo(f"added {shown_path(path)} to the next question", err=True)

    def _set_temperature(self, text: str) -> None:
        if self.choices is not None:
            check_not_generated(["temperature"])
        try:
            settings: Any = {**self.chat.settings, "temperature": float(text)}
        except ValueError:
            raise ArgumentError(f"a temperature must be a number, got {quoted(text)}") from None
        if settings["temperature"] == 0:
            # They have no effect where no token is drawn.
            for name in DRAWING:
                settings.pop(name, None)
        Decoding(**settings)
        self.chat.settings = settings

    def _save(self, path: Path) -> None:
        if exists(path):
            raise ArgumentError(f"{shown_path(path)} already exists: give another name")
        turns = self.chat.messages
        media = {
            f"{kind}s": [
                str(part[kind]) for turn in turns for part in turn["content"] if kind in part
            ]
            for kind in SUFFIXES
        }
        messages = []
        for turn in turns:
            parts = [(part["type"], part.get("text", "")) for part in turn["content"]]
            if media["audios"] and turn["role"] != "assistant":
                # Where a row has audio, <audio> is a mark.
                parts = [(kind, escaped_marks(text, "audio")) for kind, text in parts]
            messages.append({**turn, "content": joined_marks(parts)})
        row = {"messages": messages, **{name: paths for name, paths in media.items() if paths}}
        with writing(path, "the conversation"):
            write_whole(path, json.dumps(row, ensure_ascii=False) + "\n")
        typer.echo(f"wrote {shown_path(path)}", err=True)


def _dropped_path(line: str, suffixes: Collection[str]) -> Path | None:
    """The file whose path is a whole line, quoted or escaped as terminals paste it.

    Its name ends with one of `suffixes`.
    """
    try:
        words = shlex.split(line)
    except ValueError:  # a quote that is not closed
        words = []
    for text in (line, *(words if len(words) == 1 else ())):
        path = Path(home(text.removeprefix("file://")))
        if path.suffix.lower() in suffixes and is_file(path):
            return path
    return None


def completions(line: str) -> list[str]:
    """The lines that a line may be completed to: commands, and paths after those that take one."""
    name, space, rest = line.partition(" ")
    if not space:
        return [f"{command} " for command in COMMANDS if command.startswith(name)]
    if COMMANDS.get(name, ("",))[0] not in ("PATH", "FILE"):
        return []
    head, slash, start = home(rest).rpartition("/")
    folder = Path(f"{head}{slash}" or ".")
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # there is no such folder, or it may not be read
        entries = []
    return [
        f"{name} {head}{slash}{entry.name}{'/' if is_folder(entry) else ''}"
        for entry in entries
        if entry.name.startswith(start)
    ]


def complete_with_tab() -> None:
    """Lets the terminal complete lines by the tab key and recall earlier ones, where it can."""
    try:
        import readline
    except ImportError:  # there is none on Windows
        return

    def complete(text: str, number: int) -> str | None:
        matches = completions(text)
        return matches[number] if number < len(matches) else None

    readline.set_completer_delims("")
    readline.set_completer(complete)
    by_editline = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if by_editline else "tab: complete")
