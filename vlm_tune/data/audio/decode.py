"""Decodes audio clips by PyAV: mono waveforms at the rate that a tower takes."""

from __future__ import annotations

import io
from itertools import chain
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
TAG_SHIFTS = (21, 14, 7, 0)
"""Bits by which the bytes of an ID3 tag's size are shifted."""
STREAMED = (0, 0xFFFFFFFF)
"""Sizes in the header of a WAV file whose length was not known when it was written."""


def waveform(media: Media, rate: int, longest: float | None = None) -> np.ndarray:
    """The mono waveform float32[samples] of a clip, resampled to `rate` samples a second.

    With `longest`, a clip of more seconds is decoded no further, so that the samples are too many.

    Raises `DataError` for formats other than WAV, FLAC, OGG and MP3, distinguished by their first
    bytes, for files that are cut, empty or longer than an hour, and if PyAV is not installed.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise DataError("audio files need PyAV: pip install 'vlm_tune[audio]'") from None
    data = _untagged(encoded_bytes(media))
    demuxer = _demuxer(data)
    if demuxer is None:
        raise _unreadable(media, f"not audio of {FORMATS} ({len(data)} bytes)")
    cut = _cut_end(demuxer, data)
    if cut is not None:
        raise _unreadable(media, f"is cut: {cut}")
    try:
        # Only this demuxer: a playlist would make FFmpeg open the files that it lists.
        with av.open(io.BytesIO(data), format=demuxer, metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise _unreadable(media, "has no sound")
            samples, decoded = _mono(container, rate, media, longest)
    except (OSError, ValueError, FFmpegError) as error:
        raise _unreadable(media, f"can't be decoded: {reason_of(error)}") from None
    if longest is not None and len(samples) > longest * rate:
        return samples
    stated = _flac_samples(data) if demuxer == "flac" else 0
    if decoded < stated:
        raise _unreadable(media, f"is cut: {decoded:,} samples of {stated:,}")
    if not len(samples):
        raise _unreadable(media, "has no sound")
    if not np.isfinite(samples).all():
        raise _unreadable(media, "has samples that are NaN or infinite")
    return samples


def is_audio(data: bytes) -> bool:
    """Whether the first bytes of an encoded file are those of a format that `waveform` takes."""
    return _demuxer(data) is not None


def clip_seconds(media: Media) -> float:
    """The length of a clip in seconds. Raises `DataError` as `waveform`."""
    rate = 8000  # what is decoded is only counted
    return len(waveform(media, rate)) / rate


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


def _untagged(data: bytes) -> bytes:
    """A file without an ID3 tag before a FLAC stream, which would make an MP3 of it."""
    if data[:3] == b"ID3":
        pairs = zip(data[6:10], TAG_SHIFTS, strict=False)
        size = sum((byte & 0x7F) << shift for byte, shift in pairs)
        if data[10 + size : 14 + size] == b"fLaC":
            return data[10 + size :]
    return data


def _cut_end(demuxer: str, data: bytes) -> str | None:
    """Says what a file lacks of the length that its format states; None if nothing is known.

    An MP3 states none. Of a FLAC the samples are counted.
    """
    if demuxer == "wav":
        stated = 8 + int.from_bytes(data[4:8], "little")
        streamed = stated - 8 in STREAMED
        return None if streamed or len(data) >= stated else f"{len(data):,} bytes of {stated:,}"
    if demuxer == "ogg" and not _ends_as_ogg(data):
        return f"{len(data):,} bytes without the end of the stream"
    return None


def _ends_as_ogg(data: bytes) -> bool:
    """Whether the last page of an Ogg file is whole and ends its stream.

    Source: RFC 3533, 6.
    """
    page = 0
    ends = False
    while data[page : page + 4] == b"OggS":
        header = data[page : page + 27]
        if len(header) < 27:
            return False
        segments = header[26]
        ends = bool(header[5] & 4)
        page += 27 + segments + sum(data[page + 27 : page + 27 + segments])
    return ends and page <= len(data)


def _flac_samples(data: bytes) -> int:
    """The number of samples of a channel that a FLAC file states; 0 where it states none.

    Source: RFC 9639, 8.2.
    """
    return int.from_bytes(data[21:26], "big") & (1 << 36) - 1


def _mono(container: Any, rate: int, media: Media, longest: float | None) -> tuple[np.ndarray, int]:
    """The samples float32[samples] of an open file's first audio stream, at the new rate.

    Beside it the number of samples of a channel before. They end soon after `longest` seconds.
    """
    from av import AudioResampler

    resampler = AudioResampler(format="flt", layout="mono", rate=rate)
    pieces: list[np.ndarray] = []
    left = MAX_SECONDS * rate
    decoded = 0
    for frame in chain(container.decode(audio=0), [None]):
        decoded += 0 if frame is None else frame.samples
        for piece in resampler.resample(frame):
            pieces.append(piece.to_ndarray()[0])
            left -= len(pieces[-1])
        if longest is not None and left < (MAX_SECONDS - longest) * rate:
            break
        if left < 0:
            raise _unreadable(media, f"lasts more than {MAX_SECONDS:,} seconds")
    return np.concatenate(pieces) if pieces else np.empty(0, np.float32), decoded
