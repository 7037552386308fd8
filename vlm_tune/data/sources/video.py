"""Videos as evenly spaced frames, from a folder of frames or a file decoded by PyAV."""

from __future__ import annotations

import io
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_tune.data.images.decode import MAX_PIXELS
from vlm_tune.data.types import Media, Slice, Video
from vlm_tune.errors import DataError
from vlm_tune.quoting import quoted, reason_of

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
# Only these demuxers, and no probing: a playlist named .mp4 would make FFmpeg open the files it
# lists.
DEMUXERS = {
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "webm",
    ".avi": "avi",
    ".mpg": "mpeg",
    ".mpeg": "mpeg",
}
JPEG_QUALITY = 92


def read_video(
    video: Path | Slice | bytes, *, suffix: str, frames: int, fps: float | None = None
) -> Media:
    """A video by evenly spaced frames.

    Args:
        video: a folder of frames or an encoded file.
        suffix: the file's suffix, which selects the demuxer.
        frames: the largest number of frames.
        fps: frames per second of a folder of frames; without it their times are unknown.

    Raises:
        DataError: a folder without images, a file that can't be decoded, or PyAV not installed.
    """
    if isinstance(video, Path) and video.is_dir():
        images = [Media(path) for path in frame_files(video)]
        return listed_video(images, frames=frames, fps=fps, name=str(video), origin=video)
    origin = video if isinstance(video, Path) else None
    return Media(
        _decoded(video, suffix, frames, origin), modality="video", of_video=True, origin=origin
    )


def listed_video(
    images: Sequence[Media],
    *,
    frames: int,
    fps: float | None,
    name: str,
    origin: Path | None = None,
) -> Media:
    """As `read_video`, for a video given as all of its images in order, of a folder or a list."""
    if not images:
        raise DataError(f"the video {name} has no frames", kind="video_unreadable")
    places = evenly_spaced(len(images), frames)
    chosen = Video(
        frames=tuple(replace(images[place], of_video=True) for place in places),
        places=tuple(places),
        count=len(images),
        fps=fps,
        seconds=() if fps is None else tuple(place / fps for place in places),
    )
    return Media(chosen, modality="video", of_video=True, origin=origin)


def frame_files(folder: Path) -> list[Path]:
    """A folder's images, in the order of the numbers in their names."""
    return sorted(
        (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES), key=_natural
    )


def evenly_spaced(total: int, count: int) -> list[int]:
    """`count` evenly spaced indices of `range(total)`, the first and the last among them.

    Returns all indices if `total` is at most `count`, and the middle one if `count` is 1.
    """
    if total <= count:
        return list(range(total))
    if count == 1:
        return [total // 2]
    return [(place * (total - 1) + (count - 1) // 2) // (count - 1) for place in range(count)]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts frame_2 before frame_10."""
    return [
        (int(piece), "") if piece.isdigit() else (-1, piece)
        for piece in re.split(r"([0-9]+)", path.name)
    ]


def _decoded(video: Path | Slice | bytes, suffix: str, frames: int, origin: Path | None) -> Video:
    """Evenly spaced frames of a file, as JPEG."""
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise DataError("video files need PyAV: pip install 'vlm_tune[video]'") from None
    demuxer = DEMUXERS.get(suffix.lower())
    if demuxer is None:
        raise DataError(
            f"a video file is one of {', '.join(DEMUXERS)}, "
            f"or a folder of frames; got {quoted(suffix or 'no ending')}",
            kind="unsupported",
        )
    try:
        opened: Any = (
            video.open("rb")
            if isinstance(video, Path)
            else io.BytesIO(video if isinstance(video, bytes) else video.read_bytes())
        )
        with opened, av.open(opened, format=demuxer, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise DataError("the video file has no picture", kind="video_unreadable")
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise DataError(
                    f"the video's {stream.width}x{stream.height} "
                    f"is more than {MAX_PIXELS:,} pixels",
                    kind="video_unreadable",
                )
            return _frames(container, stream, frames, origin)
    except (OSError, ValueError, FFmpegError) as error:
        raise DataError(
            f"the video can't be decoded: {reason_of(error)}", kind="video_unreadable"
        ) from None


def _frames(container: Any, stream: Any, frames: int, origin: Path | None) -> Video:
    """As `_decoded`, for an open stream.

    Times come from the packets, so only the ranges from a key frame to a chosen frame are decoded.
    """
    packets = [
        (packet.pts, packet.is_keyframe)
        for packet in container.demux(stream)
        if packet.size and packet.pts is not None
    ]
    times = sorted(pts for pts, _ in packets)
    keys = sorted(pts for pts, is_key in packets if is_key) or times[:1]
    if not times:
        raise DataError("the video file has no frames", kind="video_unreadable")
    places = evenly_spaced(len(times), frames)
    chosen = _chosen(container, stream, [times[place] for place in places], keys)
    images: list[Media] = []
    seconds: list[float] = []
    for place, frame in zip(places, chosen, strict=True):
        if frame is None:
            raise DataError(
                f"the video ends before frame {place + 1} of {len(times)}", kind="video_unreadable"
            )
        encoded = io.BytesIO()
        frame.to_image().save(encoded, "JPEG", quality=JPEG_QUALITY)
        images.append(Media(encoded.getvalue(), of_video=True, origin=origin))
        seconds.append(float((frame.pts - times[0]) * stream.time_base))
    rate = stream.average_rate or stream.guessed_rate
    return Video(
        frames=tuple(images),
        places=tuple(places),
        count=len(times),
        fps=float(rate) if rate else None,
        seconds=tuple(seconds),
    )


def _chosen(
    container: Any, stream: Any, wanted: Sequence[int], keys: Sequence[int]
) -> Iterator[Any]:
    """The first frame at or after each wanted time; None where the file ends before it."""
    decoding: Iterator[Any] = iter(())
    reached = None
    for time in wanted:
        key = keys[max(bisect_right(keys, time) - 1, 0)]
        if reached is None or key > reached:
            container.seek(key, stream=stream, backward=True)
            decoding = container.decode(stream)
        frame = next(
            (frame for frame in decoding if frame.pts is not None and frame.pts >= time), None
        )
        reached = None if frame is None else frame.pts
        yield frame
