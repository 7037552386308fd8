"""Images and videos as rows name them."""

from __future__ import annotations

import base64
import io
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.audio_samples import tone, wav
from tests.helpers.row_samples import file_source, good, read, write_rows, write_shard
from vlm_tune.config.data import WebDatasetSource
from vlm_tune.data.images.decode import decode_image
from vlm_tune.data.media_processor import frame_parts
from vlm_tune.data.sources import media, video
from vlm_tune.data.sources.media import ImageFolder, MediaFinder
from vlm_tune.data.sources.video import evenly_spaced, read_video
from vlm_tune.data.types import Conversation, Media, Slice, Video
from vlm_tune.errors import DataError

ANSWER = {"role": "assistant", "content": "a"}


def png(color: Any = "red", size: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), color).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def finder(tmp_path: Path) -> MediaFinder:
    (tmp_path / "a.png").write_bytes(png())
    return MediaFinder(ImageFolder(tmp_path), frames=3)


def test_an_image_is_a_path_a_data_url_bytes_or_a_part_of_a_file(
    tmp_path: Path, finder: MediaFinder
) -> None:
    data = png()
    code = base64.b64encode(data).decode()
    assert (
        finder.image("a.png")
        == finder.image({"path": "a.png"})
        == finder.image({"bytes": None, "path": "a.png"})
    )
    assert finder.image("a.png").source == tmp_path / "a.png"
    wrapped = "\n".join(code[place : place + 20] for place in range(0, len(code), 20))
    same = [
        data,
        bytearray(data),
        {"bytes": data, "path": "elsewhere/x.png"},
        f"data:image/png;base64,{code}",
    ]
    same += [f"DATA:image/png;BASE64,{wrapped}", {"url": f"data:;base64,{code}"}]
    assert {finder.image(value) for value in same} == {Media(data)}
    assert finder.image(Slice(tmp_path / "a.png", 0, len(data))).read() == data


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "https://example.org/a.png",
            "is a URL, and URLs are not fetched: download it and give its path",
        ),
        ({"url": "HTTP://example.org/a.png"}, "is a URL"),
        ("data:image/png;base64,!!!", "bad base64"),
        ("data:image/png;base64,AAA", "bad base64"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/svg+xml,%3Csvg%3E", "is not base64"),
        ("data:image/png", "is not base64"),
        (b"", "has no bytes"),
        ({"bytes": b""}, "has no bytes"),
        ({}, "an object without `bytes`, `path` or `url`"),
        (5, "got 5"),
        ([1], "got a list of 1"),
        ("", "got ''"),
        ("none.png", "no image 'none.png' under"),
        ("../x.png", "lies outside the image root"),
    ],
)
def test_what_is_no_image_says_why(finder: MediaFinder, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        finder.image(value)


def test_audio_is_what_an_image_is_or_what_openai_sends(tmp_path: Path) -> None:
    data = wav(tone())
    (tmp_path / "a.wav").write_bytes(data)
    finder = MediaFinder(ImageFolder(tmp_path))
    code = base64.b64encode(data).decode()
    same = [data, f"data:audio/wav;base64,{code}", {"data": code, "format": "wav"}]
    assert {finder.audio(value) for value in same} == {Media(data, "audio")}
    assert finder.audio({"bytes": None, "path": "a.wav"}) == Media(tmp_path / "a.wav", "audio")
    for value, message in (
        ({"data": "!!!"}, "the audio is bad base64"),
        ("../a.wav", "the audio '../a.wav' lies outside the image root"),
        ("b.wav", "no audio 'b.wav' under"),
        ("https://example.org/a.wav", "is a URL"),
    ):
        with pytest.raises(DataError, match=message):
            finder.audio(value)


def test_clips_have_places_of_their_own_in_rows_and_shards(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(tone()))
    (tmp_path / "b.png").write_bytes(png())
    sounds = [{"role": "user", "content": r"x <audio>\<audio> <image>y"}, ANSWER]
    plain = [{"role": "user", "content": "is <audio> a mark?"}, ANSWER]
    rows = [
        {"messages": sounds, "audios": ["a.wav"], "image": "b.png"},
        {"messages": plain},
        {"messages": plain, "audio": ["a.wav", "a.wav"]},
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}, ANSWER], "audio": "a.wav"},
    ]
    first, second, third, fourth = read(file_source(write_rows(tmp_path / "rows.jsonl", rows)))
    clip = Media(tmp_path / "a.wav", "audio")
    assert isinstance(first, Conversation) and isinstance(fourth, Conversation)
    parts = ("x ", clip, "<audio> ", Media(tmp_path / "b.png"), "y")
    assert first.messages[0].parts == parts and fourth.media == (clip,)
    assert isinstance(second, Conversation) and second.question == "is <audio> a mark?"
    assert isinstance(third, DataError) and "2 audios and 1 <audio> mark" in third.message
    sample = {"wav": wav(tone()), "json": b'{"question": "q", "answer": "a"}'}
    shard = WebDatasetSource(kind="webdataset", path=str(write_shard(tmp_path / "s.tar", [sample])))
    (row,) = good(read(shard))
    assert row.media[0].modality == "audio" and row.media[0].read() == wav(tone())


def test_a_path_needs_a_root() -> None:
    with pytest.raises(DataError, match="set image_root"):
        MediaFinder(None).image("a.png")
    assert MediaFinder(None).image(b"x") == Media(b"x")


def test_remembered_folders_do_not_let_a_path_out_and_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "REMEMBERED", 10)
    root = tmp_path / "root"
    for folder in range(30):
        (root / str(folder)).mkdir(parents=True)
        (root / str(folder) / "a.png").write_bytes(b"x")
    (tmp_path / "a.png").write_bytes(b"x")
    (root / "out").symlink_to(tmp_path)
    (root / "0" / "link.png").symlink_to(tmp_path / "a.png")
    images = ImageFolder(root)
    for _ in range(2):
        for folder in range(30):
            assert images.find(f"{folder}/a.png").source == root / str(folder) / "a.png"
            for name in ("out/a.png", "0/link.png", f"{folder}/../../a.png", ".."):
                with pytest.raises(DataError, match="lies outside"):
                    images.find(name)
        assert len(images._folders) <= 10


# --- videos ------------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(1, 40))
def test_frames_are_evenly_spaced(total: int, count: int) -> None:
    places = evenly_spaced(total, count)
    assert (
        len(places) == min(total, count)
        and places == sorted(set(places))
        and 0 <= places[0] <= places[-1] < total
    )
    if 1 < count < total:
        gaps = np.diff(places)
        assert (places[0], places[-1]) == (0, total - 1) and gaps.max() - gaps.min() <= 1


def frame_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"frame_{number}.png").write_bytes(png((number, 0, 0)))
    (folder / "notes.txt").write_text("no frame")
    return folder


def test_a_folder_of_frames_is_a_video_in_the_order_of_its_numbers(
    tmp_path: Path, finder: MediaFinder
) -> None:
    folder = frame_folder(tmp_path / "clip", 21)
    chosen = [Media(folder / f"frame_{number}.png") for number in (0, 10, 20)]
    shown = finder.video("clip")
    assert shown.source == Video(tuple(chosen), (0, 10, 20), 21)
    assert shown == read_video(folder, suffix="", frames=3)
    assert frame_parts(shown) == tuple(chosen)
    timed = MediaFinder(ImageFolder(tmp_path), frames=3, fps=4.0).video("clip")
    assert timed.source == Video(tuple(chosen), (0, 10, 20), 21, 4.0, (0.0, 2.5, 5.0))
    assert frame_parts(timed) == ("0.0s: ", chosen[0], "2.5s: ", chosen[1], "5.0s: ", chosen[2])
    listed = finder.video([f"clip/frame_{number}.png" for number in range(2)])
    assert listed.pictures == tuple(Media(folder / f"frame_{n}.png") for n in (0, 1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the video 'empty' has no frames"):
        finder.video("empty")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "clip").symlink_to(folder)
    (folder / "frame_5.png").unlink()
    outside = tmp_path.parent / f"{tmp_path.name}-outside.png"
    outside.write_bytes(png())
    (folder / "frame_5.png").symlink_to(outside)
    with pytest.raises(DataError, match="lies outside the image root"):
        finder.video("clip")


def clip(
    path: Path, frames: int = 25, rate: int = 5, codec: str = "mpeg4", gap: int = 7, start: int = 0
) -> Path:
    """A video whose n-th frame is of the grey 10 n, with a key frame every `gap` frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 64, "yuv420p", gap
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(
                np.full((64, 64, 3), 10 * number, dtype=np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = number + start, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(video: Media) -> list[int]:
    """Which frames of a `clip` those of a video are."""
    frames = [decode_image(frame.read()) for frame in video.pictures]
    return [round(float(np.asarray(image).mean()) / 10) for image in frames]


@pytest.mark.parametrize(
    ("name", "codec", "gap"),
    [
        ("v.mp4", "mpeg4", 7),
        ("v.mp4", "libx264", 250),
        ("v.mkv", "libx264", 3),
        ("v.webm", "libvpx", 9),
        ("v.avi", "mpeg4", 1),
        ("v.mov", "mpeg4", 7),
    ],
)
def test_a_video_files_frames_are_the_ones_at_their_times(
    tmp_path: Path, finder: MediaFinder, name: str, codec: str, gap: int
) -> None:
    path = clip(tmp_path / name, codec=codec, gap=gap)
    shown = finder.video(name)
    chosen = shown.source
    assert isinstance(chosen, Video)
    assert chosen.seconds == (0.0, 2.4, 4.8) and greys(shown) == [0, 12, 24]
    assert (chosen.places, chosen.count, chosen.fps) == ((0, 12, 24), 25, 5.0)
    assert [part for part in frame_parts(shown) if isinstance(part, str)] == [
        "0.0s: ",
        "2.4s: ",
        "4.8s: ",
    ]
    for count in (1, 2, 8, 25, 99):
        assert greys(MediaFinder(finder.images, frames=count).video(name)) == evenly_spaced(
            25, count
        )
    assert greys(finder.video(str(path))) == [0, 12, 24]
    assert greys(finder.video({"bytes": path.read_bytes(), "path": name})) == [0, 12, 24]
    if name not in ("v.webm",):
        assert greys(finder.video(path.read_bytes())) == [0, 12, 24]


def test_a_videos_times_start_at_its_first_frame(tmp_path: Path, finder: MediaFinder) -> None:
    clip(tmp_path / "late.mkv", start=500)
    shown = finder.video("late.mkv")
    assert isinstance(shown.source, Video) and shown.source.seconds == (0.0, 2.4, 4.8)
    assert greys(shown) == [0, 12, 24]


def test_a_video_that_is_none_says_why(
    tmp_path: Path, finder: MediaFinder, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = clip(tmp_path / "v.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    # A playlist would have FFmpeg open what it lists, here a file outside the root.
    (tmp_path / "list.mp4").write_text(
        f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/v.mp4\n#EXT-X-ENDLIST\n"
    )
    (tmp_path / "list.m3u8").write_text((tmp_path / "list.mp4").read_text())
    for name in ("cut.mp4", "empty.mp4", "list.mp4"):
        with pytest.raises(DataError, match="the video can't be decoded"):
            finder.video(name)
    for value, message in (
        ("list.m3u8", "a video file is one of .mp4, "),
        ("none.mp4", "no video 'none.mp4' under"),
        ("../v.mp4", "lies outside"),
        ("https://example.org/v.mp4", "the video .* is a URL"),
        (b"what is this?", "a video file is one of"),
        (5, "the video must be a path"),
    ):
        with pytest.raises(DataError, match=message):
            finder.video(value)
    monkeypatch.setattr(video, "MAX_PIXELS", 100)
    with pytest.raises(DataError, match="64x64 is more than 100 pixels"):
        finder.video("v.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"need PyAV: pip install 'vlm_tune\[video\]'"):
        finder.video("v.mp4")


def test_rows_of_every_kind_place_videos(tmp_path: Path) -> None:
    clip(tmp_path / "v.mp4")
    answer = {"role": "assistant", "content": "grey"}
    text = {"type": "text", "text": "What happens?"}
    rows = [
        {
            "videos": ["v.mp4"],
            "conversations": [
                {"from": "human", "value": "<video>What happens?"},
                {"from": "gpt", "value": "grey"},
            ],
        },
        {
            "videos": ["v.mp4"],
            "messages": [{"role": "user", "content": [{"type": "video"}, text]}, answer],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "video", "video": "v.mp4"}, text]},
                answer,
            ]
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "video_url", "video_url": {"url": "v.mp4"}}, text],
                },
                answer,
            ]
        },
        {"videos": ["v.mp4"], "messages": [{"role": "user", "content": "What happens?"}, answer]},
        {"video": "v.mp4", "question": "What happens?", "answer": "grey"},
        {"video": "v.mp4", "instruction": "What happens?", "output": "grey"},
    ]
    conversations = []
    for number, row in enumerate(rows):
        (one,) = good(
            read(file_source(write_rows(tmp_path / f"{number}.jsonl", [row]), video_frames=2))
        )
        conversations.append([(message.role, message.parts) for message in one.messages])
    assert all(messages == conversations[0] for messages in conversations)
    shown = [part if isinstance(part, str) else part.source for part in conversations[0][0][1]]
    assert isinstance(shown[0], Video) and shown[0].seconds == (0.0, 4.8)
    assert shown[1:] == ["What happens?"]
    # Where a row has no video, <video> is a word.
    plain = {
        "conversations": [
            {"from": "human", "value": "What is <video> in HTML?"},
            {"from": "gpt", "value": "a tag"},
        ]
    }
    (one,) = good(read(file_source(write_rows(tmp_path / "plain.jsonl", [plain]))))
    assert one.messages[0].parts == ("What is <video> in HTML?",)
    for text_of_question, message in (
        ("<video><video>?", "1 video and 2 <video> marks"),
        ("no mark", "1 video and 0 <video> marks"),
    ):
        turns = [{"from": "human", "value": text_of_question}, {"from": "gpt", "value": "a"}]
        (bad,) = read(
            file_source(
                write_rows(tmp_path / "bad.jsonl", [{"videos": ["v.mp4"], "conversations": turns}])
            )
        )
        assert isinstance(bad, DataError) and message in str(bad)


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_video_in_a_shard(tmp_path: Path, ending: str) -> None:
    data = clip(tmp_path / "v.mkv").read_bytes()
    path = write_shard(
        tmp_path / f"s.{ending}",
        [{"mkv": data, "txt": b"it gets lighter"}],
        "w:gz" if ending.endswith("gz") else "w",
    )
    (row,) = read(WebDatasetSource(kind="webdataset", path=str(path), video_frames=3))
    assert isinstance(row, Conversation) and greys(row.items[0]) == [0, 12, 24]


@pytest.mark.parametrize("value", ["data:;base64,!!!", "data:,x", "data:;base64,", b""])
@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_bytes_that_can_not_be_read_are_a_fault_of_their_own_kind(
    kind: str, value: Any, finder: MediaFinder
) -> None:
    with pytest.raises(DataError) as caught:
        finder.item(kind, value)
    assert caught.value.kind == f"{kind}_unreadable"
