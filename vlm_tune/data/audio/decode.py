"""Decodes audio clips by PyAV: mono waveforms at the rate that a tower takes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlm_tune.data.images.decode import encoded_bytes
from vlm_tune.data.types import Media
from vlm_tune.errors import DataError
from vlm_tune.quoting import reason_of

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
FORMATS = "WAV, FLAC, OGG, MP3"
MAX_SECONDS = 3600
"""Seconds of a clip beyond which it is refused, to spare the memory."""
STREAMED = (0, 0xFFFFFFFF)
"""Sizes in the header of a WAV file whose length was not known when it was written."""


def waveform(media: Media, rate: int) -> np.ndarray:
    """The mono waveform float32[samples] of a clip, resampled to `rate` samples a second.

    Raises `DataError` for formats other than WAV, FLAC, OGG and MP3, told apart by their first
    bytes, for files that are cut, empty or longer than an hour, and if PyAV is not installed.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise DataError("audio files need PyAV: pip install 'vlm_tune[audio]'") from None
    data = encoded_bytes(media)
    demuxer = _demuxer(data)
    if demuxer is None:
        raise _unreadable(media, f"not audio of {FORMATS} ({len(data)} bytes)")
    stated = int.from_bytes(data[4:8], "little")
    if demuxer == "wav" and stated not in STREAMED and len(data) < 8 + stated:
        raise _unreadable(media, f"is cut: {len(data):,} bytes of {8 + stated:,}")
    try:
        # Only this demuxer: a playlist would make FFmpeg open the files that it lists.
        with av.open(io.BytesIO(data), format=demuxer, metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise _unreadable(media, "has no sound")
            samples = _mono(container, rate, media)
    except (OSError, ValueError, FFmpegError) as error:
        raise _unreadable(media, f"can't be decoded: {reason_of(error)}") from None
    if not len(samples):
        raise _unreadable(media, "has no sound")
    if not np.isfinite(samples).all():
        raise _unreadable(media, "has samples that are NaN or infinite")
    return samples


def _unreadable(media: Media, reason: str) -> DataError:
    return DataError(f"{media.name}: {reason}", kind="audio_unreadable")


def _demuxer(data: bytes) -> str | None:
    """FFmpeg's demuxer for an encoded clip, by its first bytes."""
    if data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE":
        return "wav"
    if data.startswith(b"fLaC"):
        return "flac"
    if data.startswith(b"OggS"):
        return "ogg"
    # An MP3 file begins with a tag, or with the eleven set bits of a frame.
    is_frame = len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0
    return "mp3" if data.startswith(b"ID3") or is_frame else None


def _mono(container: Any, rate: int, media: Media) -> np.ndarray:
    """The samples float32[samples] of an open file's first audio stream."""
    pieces: list[np.ndarray] = []
    left = MAX_SECONDS * rate
    for piece in _resampled(container, rate):
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            raise _unreadable(media, f"lasts more than {MAX_SECONDS:,} seconds")
    return np.concatenate(pieces) if pieces else np.empty(0, np.float32)


def _resampled(container: Any, rate: int) -> Iterator[np.ndarray]:
    """Yields the pieces float32[samples] of an open file's first audio stream."""
    from av import AudioResampler

    resampler = AudioResampler(format="flt", layout="mono", rate=rate)
    for frame in container.decode(audio=0):
        for piece in resampler.resample(frame):
            yield piece.to_ndarray()[0]
    for piece in resampler.resample(None):
        yield piece.to_ndarray()[0]
