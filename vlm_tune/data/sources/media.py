"""Media from rows' values: paths under one root, data URLs, bytes, archive members."""

from __future__ import annotations

import base64
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_tune.data.sources.video import frame_files, listed_video, read_video
from vlm_tune.data.types import Media, Slice
from vlm_tune.errors import DataError
from vlm_tune.quoting import quoted, reason_of

BASE64_IMAGE = re.compile(
    r"(?=[\w+/=\s]{200})(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|SUkqA|TU0AK|AAAA[\w+/]{2}Z0eX)", re.ASCII
)
"""Base64 text of a PNG, JPEG, GIF, WebP, TIFF or AVIF file, recognized by its first characters.

It has at least 200 characters of base64; no path of that length begins like that.
"""
REMEMBERED = 4096
"""Number of resolved folders that an image root caches."""


class ImageFolder:
    """Resolver of files under one root; nothing outside it is opened."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._folders: dict[str, Path | None] = {}

    def find(self, name: Any) -> Media:
        """The image named `name`.

        Raises `DataError` if it is not a file under the root, with links resolved.
        """
        return Media(self.path(name, "image"))

    def path(self, name: Any, what: str, *, folder: bool = False) -> Path:
        """The file (with `folder`, the file or folder) named `name`; raises as `find` does."""
        if not isinstance(name, str) or not name:
            raise DataError(
                f"the {what} must be a path relative to {self.root}, got {quoted(name)}",
                kind="image_missing",
            )
        try:
            path, mode = self._resolved(name)
        except FileNotFoundError:
            missing = self.root / name
            raise DataError(
                f"no {what} {quoted(name)} under {self.root}", kind="image_missing", file=missing
            ) from None
        # A name that is too long, one with a NUL byte, links in a circle.
        except (OSError, ValueError, RuntimeError) as error:
            why = getattr(error, "strerror", None) or reason_of(error)
            raise DataError(
                f"the {what} {quoted(name)} is no path: {why}", kind="image_missing"
            ) from None
        if path is None:
            raise DataError(
                f"the {what} {quoted(name)} lies outside the image root {self.root}; "
                "the source's image_root names a folder above all of them",
                kind="image_outside",
                file=self.root / name,
            )
        if stat.S_ISREG(mode) or (folder and stat.S_ISDIR(mode)):
            return path
        raise DataError(
            f"no {what} {quoted(name)} under {self.root}", kind="image_missing", file=path
        )

    def _resolved(self, name: str) -> tuple[Path | None, int]:
        """The path with links resolved (None if outside the root), and its `st_mode`.

        Resolving makes a system call for every folder of the path, so folders are cached.
        """
        head, tail = os.path.split(name)
        if tail not in ("", ".", ".."):
            if head not in self._folders:
                if len(self._folders) >= REMEMBERED:
                    self._folders.clear()
                folder = (self.root / head).resolve()
                self._folders[head] = folder if folder.is_relative_to(self.root) else None
            folder = self._folders[head]
            if folder is not None:
                path = folder / tail
                mode = path.lstat().st_mode
                if not stat.S_ISLNK(mode):
                    return path, mode
        path = (self.root / name).resolve()
        return (path, path.lstat().st_mode) if path.is_relative_to(self.root) else (None, 0)


@dataclass(frozen=True)
class MediaFinder:
    """Turns a row's value for an image, a video or an audio clip into media.

    `images` is None where the source has no folder, so that a path can't be meant. `frames` and
    `fps` are as in `read_video`.
    """

    images: ImageFolder | None
    frames: int = 8
    fps: float | None = None

    def image(self, value: Any) -> Media:
        """An image from a path, a data URL, bytes, {"bytes", "path"}, or a slice of a file.

        Raises `DataError` for anything else.
        """
        source = self._source(value, "image")
        return Media(
            source if not isinstance(source, str) else self._root("image").path(source, "image")
        )

    def audio(self, value: Any) -> Media:
        """An audio clip from the kinds of values that an image has, or OpenAI's {"data", "format"}.

        Raises `DataError` for anything else.
        """
        if isinstance(value, Mapping) and isinstance(value.get("data"), str):
            value = base64_bytes(value["data"], "audio")
        source = self._source(value, "audio")
        if isinstance(source, str):
            source = self._root("audio").path(source, "audio")
        return Media(source, modality="audio")

    def item(self, kind: str, value: Any) -> Media:
        """The item of a value of a kind: image, video or audio; raises as these do."""
        read = {"video": self.video, "audio": self.audio, "image": self.image}
        return read[kind](value)

    def video(self, value: Any) -> Media:
        """A video by its chosen frames.

        The value is a folder of frames, a list of frames, or a video file with the same kinds of
        values as for `image`.
        """
        if isinstance(value, list):
            return listed_video(
                [self.image(frame) for frame in value],
                frames=self.frames,
                fps=self.fps,
                name="of listed frames",
            )
        source = self._source(value, "video")
        if isinstance(source, str):
            root = self._root("video")
            path = root.path(source, "video", folder=True)
            if path.is_dir():
                # A frame may itself be a link that leads out of the root.
                frames = [root.find(str(frame)) for frame in frame_files(path)]
                return listed_video(
                    frames, frames=self.frames, fps=self.fps, name=quoted(source), origin=path
                )
            try:
                return read_video(path, suffix=path.suffix, frames=self.frames)
            except DataError as error:
                raise DataError(error.message, kind=error.kind, file=path) from None
        return read_video(source, suffix=_video_suffix(value, source), frames=self.frames)

    def _source(self, value: Any, what: str) -> str | bytes | Slice:
        """The text of a path, or the bytes or slice that hold the file."""
        if isinstance(value, Mapping):
            keys = [name for name in ("bytes", "path", "url") if value.get(name) not in (None, "")]
            if not keys:
                raise DataError(
                    f"the {what} is an object without `bytes`, `path` or `url`: {quoted(value)}",
                    kind="field",
                )
            value = value[keys[0]]
        if isinstance(value, bytes | bytearray | memoryview):
            if not len(value):
                raise DataError(f"the {what} has no bytes", kind=f"{what}_unreadable")
            return bytes(value)
        if isinstance(value, str) and value[:5].lower() == "data:":
            return data_url(value, what)
        if isinstance(value, str) and value[:8].lower().startswith(("http://", "https://")):
            raise DataError(
                f"the {what} {quoted(value)} is a URL, and URLs are not fetched: download it and "
                "give its path",
                kind="unsupported",
            )
        if isinstance(value, str) and BASE64_IMAGE.match(value):
            return base64_bytes(value, what)
        if isinstance(value, str | Slice):
            return value
        raise DataError(
            f"the {what} must be a path, a data URL or bytes, got {quoted(value)}", kind="field"
        )

    def _root(self, what: str) -> ImageFolder:
        if self.images is None:
            raise DataError(
                f"the {what} is a path, and the source has no folder: set image_root",
                kind="image_missing",
            )
        return self.images


def _video_suffix(value: Any, source: bytes | Slice) -> str:
    """The file suffix of an encoded video, by the name next to its bytes or by its first bytes."""
    named = value.get("path") if isinstance(value, Mapping) else None
    if isinstance(named, str):
        return Path(named).suffix
    start = (
        source[:16]
        if isinstance(source, bytes)
        else Slice(source.path, source.offset, min(source.size, 16)).read_bytes()
    )
    if start[4:8] == b"ftyp":
        return ".mp4"
    if start.startswith(b"\x1a\x45\xdf\xa3"):
        return ".mkv"
    if start.startswith(b"RIFF") and start[8:12] == b"AVI ":
        return ".avi"
    return ""


def data_url(text: str, what: str = "image") -> bytes:
    """The bytes of a base64 data URL.

    Raises `DataError` for another encoding, for bad base64 and for an empty URL.
    """
    head, comma, body = text.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise DataError(
            f"the {what}'s data URL is not base64: it begins {quoted(text[:40])}",
            kind=f"{what}_unreadable",
        )
    data = base64_bytes(body, what, "'s data URL")
    if not data:
        raise DataError(f"the {what}'s data URL is empty", kind=f"{what}_unreadable")
    return data


def base64_bytes(text: str, what: str, place: str = "") -> bytes:
    """The decoded bytes of a base64 text. Raises `DataError` for bad base64.

    `what` is the kind of medium, and `place` names where the text stands, for the message.
    """
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise DataError(
            f"the {what}{place} is bad base64: {reason_of(error)}", kind=f"{what}_unreadable"
        ) from None
