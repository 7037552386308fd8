"""Runs one fuzz case in this process and says how it ended."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.fuzz.strategies import Case, base_recipe, dump
from tests.helpers.tiny_recipes import COMPILED, write_color_rows

SECONDS = 240
"""Seconds after which a case counts as one that hangs.

The longest take a few seconds on a quiet machine.
"""

LONGEST_LINE = 2000
"""Characters of one line of a message; more is a row's content that was not cut."""

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass
class Outcome:
    """How a case ended: "done", an error's class with where it was raised, or a fault of ours."""

    kind: str
    ended: str
    site: str = ""
    message: str = ""
    steps: int = 0
    fault: str = ""


class Hangs(BaseException):
    """Raised by the alarm; no `except Exception` takes it."""


def _alarm(*_: Any) -> None:
    raise Hangs


class Workplace:
    """A folder with images, rows, a run and its merged model, from which each case starts anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start = folder / "start"
        self._model: Any = None
        cache = folder / "cache"
        os.environ["VLM_TUNE_CACHE"] = str(cache)
        cache.mkdir(parents=True, exist_ok=True)
        # The parts in C++ are compiled once for all tests.
        COMPILED.mkdir(mode=0o700, exist_ok=True)
        if not (cache / "kernels").exists():
            (cache / "kernels").symlink_to(COMPILED)

    def prepare(self) -> None:
        """Makes the folder, once."""
        from vlm_tune.api import merge, sft

        self.start.mkdir(parents=True)
        write_color_rows(self.start)
        recipe = base_recipe("causal")
        recipe["data"]["validation"] = [{"kind": "file", "path": "messages.jsonl", "limit": 3}]
        recipe["tune"] = [
            {
                "match": "llm.*",
                "how": "lora",
                "r": 2,
                "lora_alpha": 4,
                "target_modules": "all-linear",
            },
            {"match": "*", "how": "frozen"},
        ]
        recipe["train"] |= {"steps": 2, "checkpoints": {"every": 1, "keep": 2}}
        (self.start / "recipe.yaml").write_text(dump(recipe))
        with contextlib.chdir(self.start), contextlib.redirect_stdout(io.StringIO()):
            sft("recipe.yaml")
            merge("run", "merged", dtype="fp32")

    def model(self) -> Any:
        """The merged model, loaded once."""
        if self._model is None:
            from vlm_tune import VisionLanguageModel

            self._model = VisionLanguageModel.from_pretrained(self.start / "merged")
        return self._model

    def run(self, case: Case) -> Outcome:
        """Runs a case in a copy of the folder; the copy goes afterwards."""
        place = self.folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        with_models = case.kind in ("command", "python", "folder")
        ignored = None if with_models else shutil.ignore_patterns("run", "merged", "recipe.yaml")
        shutil.copytree(self.start, place, ignore=ignored)
        before = os.environ["VLM_TUNE_CACHE"]
        try:
            with contextlib.chdir(place):
                self._write(case, place)
                return self._call(case, place)
        finally:
            os.environ["VLM_TUNE_CACHE"] = before
            shutil.rmtree(place, ignore_errors=True)

    def _write(self, case: Case, place: Path) -> None:
        if isinstance(case.recipe, dict):
            (place / "recipe.yaml").write_text(dump(case.recipe))
        elif case.recipe is not None:
            content = case.recipe.encode() if isinstance(case.recipe, str) else case.recipe
            (place / "recipe.yaml").write_bytes(content)
        for name, what in case.files.items():
            match what:
                case ("rows", content):
                    write_rows(place / name, content)
                case ("cut", share):
                    data = (place / name).read_bytes()
                    (place / name).write_bytes(data[: int(share * len(data))])
                case ("bytes", content):
                    (place / name).write_bytes(content)
                case ("save", form, mode, size):
                    # Some formats can't hold some modes: then the image stays as it is.
                    with contextlib.suppress(OSError, ValueError, KeyError):
                        buffer = io.BytesIO()
                        Image.new(mode, size).save(buffer, form)
                        (place / name).write_bytes(buffer.getvalue())
                case ("damage", damage, number, cache):
                    self._damage(place, damage, number, cache)

    def _damage(self, place: Path, damage: str, number: int, cache: bool) -> None:
        if cache:
            shutil.copytree(
                self.folder / "cache", place / "cache", ignore=shutil.ignore_patterns("kernels")
            )
            os.environ["VLM_TUNE_CACHE"] = str(place / "cache")
        root = place / ("cache" if cache else "run")
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        path = paths[number % len(paths)]
        content = path.read_bytes()
        match damage:
            case "cut":
                path.write_bytes(content[: number % (len(content) + 1)])
            case "empty":
                path.write_bytes(b"")
            case "flip" if content:
                where = number % len(content)
                path.write_bytes(
                    content[:where] + bytes([content[where] ^ 4]) + content[where + 1 :]
                )
            case "text":
                path.write_text("null")
            case "folder":
                path.unlink()
                path.mkdir()
            case _:
                path.unlink()

    def _call(self, case: Case, place: Path) -> Outcome:
        from vlm_tune.errors import VlmTuneError

        untouched = {path: path.read_bytes() for path in place.iterdir() if path.is_file()}
        output = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
        outcome = Outcome(case.kind, "done")
        signal.signal(signal.SIGALRM, _alarm)
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                error = self._make(case)
            if error is not None:
                outcome.ended = type(error).__name__
                outcome.message = str(error)
                if isinstance(error, VlmTuneError):
                    outcome.site = site(error)
                    outcome.fault = missing_place(error)
        except Hangs as error:
            outcome.ended = "hangs"
            outcome.fault = "".join(traceback.format_tb(error.__traceback__)[-6:])
        except Exception as error:
            outcome.ended = "traceback"
            outcome.site = site(error)
            outcome.fault = "".join(traceback.format_exception(error))[-3000:]
        finally:
            signal.alarm(0)
        output.flush()
        printed = output.buffer.getvalue().decode()  # type: ignore[attr-defined]
        outcome.steps = (
            trained_steps(place)
            if case.kind in ("recipe", "override", "row", "training", "command")
            else 0
        )
        if case.call[0] == "resumed":
            outcome.steps = max(outcome.steps - 1, 0)
        if not outcome.fault:
            outcome.fault = bad_output(case, printed) or lost(untouched, outcome)
        return outcome

    def _make(self, case: Case) -> BaseException | None:
        """Makes the call.

        Returns our error that it ended with, or a usage error of the command line.
        """
        from vlm_tune.errors import VlmTuneError

        match case.call:
            case ["cli", *arguments]:
                return command_line(arguments)
            case ["resumed", *changes]:
                first = command_line(["sft", "recipe.yaml"])
                if first is not None:
                    return first
                return command_line(["sft", "recipe.yaml", "--resume", *changes])
            case [_, name, arguments, keywords]:
                try:
                    self._python(name, arguments, keywords)
                except VlmTuneError as error:
                    return error
        return None

    def _python(self, name: str, arguments: list[Any], keywords: dict[str, Any]) -> None:
        import vlm_tune

        if name in ("chat", "chat_batch"):
            arguments, keywords = real(arguments), real(keywords)
            getattr(self.model(), name)(*arguments, **keywords)
        elif name == "from_pretrained":
            vlm_tune.VisionLanguageModel.from_pretrained(*arguments, **keywords)
        else:
            getattr(vlm_tune, name)(*arguments, **keywords)


def write_rows(path: Path, content: bytes) -> None:
    """Rows given as JSON, in the format that the file's name says."""
    if path.name.endswith(".gz"):
        content = gzip.compress(content)
    elif path.suffix in (".csv", ".tsv", ".parquet"):
        import pyarrow
        import pyarrow.parquet

        try:
            loaded = (
                json.loads(content)
                if path.suffix == ".parquet"
                else [json.loads(line) for line in content.splitlines()]
            )
            if path.suffix == ".parquet":
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(loaded), path)
                return
            separator = "," if path.suffix == ".csv" else "\t"
            names = sorted({str(key) for row in loaded for key in row})
            lines = [separator.join(names)]
            lines += [separator.join(str(row.get(name, "")) for name in names) for row in loaded]
            content = "\n".join(lines).encode("utf-8", "surrogatepass")
        except (ValueError, TypeError, AttributeError, pyarrow.ArrowException, OverflowError):
            pass  # what is no table is written as it is
    path.write_bytes(content)


def real(value: Any) -> Any:
    """A case's arguments with the names of images replaced by such images."""
    if isinstance(value, dict):
        words = ("content", "prompt", "text", "role")  # where a name is a text
        return {
            key: each if key in words and isinstance(each, str) else real(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [real(each) for each in value]
    makers = {
        "array": lambda: np.zeros((8, 8, 3), np.uint8),
        "empty array": lambda: np.zeros((0, 5, 3), np.uint8),
        "float array": lambda: np.zeros((8, 8, 3), np.float32),
        "nan array": lambda: np.full((8, 8, 3), np.nan),
        "pil": lambda: Image.new("RGB", (9, 9)),
        "hsv": lambda: Image.new("HSV", (9, 9)),
        "bytesio": lambda: io.BytesIO(Path("red.png").read_bytes()),
        "path": lambda: Path("red.png"),
    }
    return makers[value]() if isinstance(value, str) and value in makers else value


def command_line(arguments: list[str]) -> BaseException | None:
    """Runs a command as the shell would; the error it ended with."""
    from vlm_tune.cli import main
    from vlm_tune.errors import VlmTuneError

    argv = sys.argv
    sys.argv = ["vlm-tune", *arguments]
    try:
        main()
    except SystemExit as ended:
        if ended.code in (0, None):
            return None
        cause = ended.__context__
        if isinstance(cause, VlmTuneError):
            assert ended.code == cause.exit_code and ended.code in (2, 3, 4, 5, 130), (
                f"exit code {ended.code}"
            )
            return cause
        # A usage error has 2; a report of `check` with errors 3; a difference that verify-run finds
        # 5.
        allowed = {2, *{"check": {3}, "verify-run": {5}}.get(arguments[0], set())}
        assert ended.code in allowed, f"exit code {ended.code} without an error"
        return ended
    finally:
        sys.argv = argv
    return None


def site(error: BaseException) -> str:
    """The innermost function of vlm_tune that an error came through."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "vlm_tune/" in frame.filename
    ]
    if not frames:
        return ""
    last = frames[-1]
    return f"{last.filename.rpartition('vlm_tune/')[2]}:{last.name}"


PLACE = re.compile(
    r"(:\d+|\brow \d|\brows \d|--\w|\w[\w-]*\.[\w.]+|/|\bimages? \d|\brequest "
    r"\d|\bmessage \d|\bstep \d|\bstage\b"
    r"|^\.{1,2}:|^\S+: no such |'[^']+'|\b[a-z_]+\b:|^[a-z_]+ (is|takes|must) )"
)


def missing_place(error: Any) -> str:
    """The fault of an error's message; empty where it has a place and is short enough."""
    from vlm_tune.errors import RecipeError

    if isinstance(error, RecipeError):
        if not all(problem.where for problem in error.problems):
            return f"a problem without a place: {error}"
    elif not PLACE.search(str(error)):
        return f"no place: {error}"
    longest = max(map(len, str(error).splitlines()), default=0)
    return f"a line of {longest} characters: {str(error)[:300]}" if longest > LONGEST_LINE else ""


def bad_output(case: Case, printed: str) -> str:
    """The fault of a command's output, empty where it has none.

    A traceback of a thread, or characters that a terminal acts on.
    """
    if "Traceback (most recent call last)" in printed:
        return printed[printed.index("Traceback (most recent call last)") :][:3000]
    if case.call[0] == "cli" and (match := CONTROLS.search(printed.replace("\r\n", "\n"))):
        return (
            f"a control character {match[0]!r} is printed: "
            f"{printed[max(0, match.start() - 80) : match.end() + 40]!r}"
        )
    return ""


def lost(untouched: dict[Path, bytes], outcome: Outcome) -> str:
    """Names the user's file that a call changed or deleted."""
    for path, content in untouched.items():
        if not path.is_file() or path.read_bytes() != content:
            return f"{path.name} was there and is changed or gone ({outcome.ended})"
    return ""


def trained_steps(place: Path) -> int:
    """The training steps in the logs of runs in a folder, without those of the prepared run."""
    count = 0
    for log in place.rglob("log.jsonl"):
        if "run" in log.parts and (place / "merged").is_dir():
            continue
        with contextlib.suppress(OSError, ValueError):
            count += sum(
                '"event": "train"' in line for line in log.read_text(errors="replace").splitlines()
            )
    return count


@contextlib.contextmanager
def limits(memory: float = 10e9) -> Iterator[None]:
    """Keeps what a case may take of the machine's memory within `memory` bytes.

    A fork's parent may have mapped some before: that does not count.
    """
    import resource

    lines = Path("/proc/self/status").read_text().splitlines()
    mapped = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (mapped + int(memory), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
