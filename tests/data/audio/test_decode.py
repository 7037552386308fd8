"""Audio files decoded to mono waveforms, and files that are none."""

from __future__ import annotations

import io
import pickle
import re
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from tests.helpers.audio_samples import tone, wav
from vlm_tune.data.audio import decode
from vlm_tune.data.audio.decode import waveform
from vlm_tune.data.types import Media, Slice
from vlm_tune.errors import DataError

SECONDS = 0.5


def encoded(codec: str, container: str, rate: int = 48_000, *, seconds: float = SECONDS) -> bytes:
    """A tone in a format, of half a second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")  # pyright: ignore
        samples = (tone(440, seconds, rate) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(format=stream.format.name, layout="mono", rate=rate)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(piece))
        file.mux(stream.encode(None))
    return buffer.getvalue()


FORMATS = {"pcm_s16le": "wav", "flac": "flac", "libopus": "ogg", "libmp3lame": "mp3"}


@pytest.mark.parametrize("codec", FORMATS)
def test_each_format_is_told_by_its_bytes_and_resampled(codec: str, tmp_path: Path) -> None:
    data = encoded(codec, FORMATS[codec])
    samples = waveform(Media(data, "audio"), 16_000)
    assert samples.dtype == np.float32 and abs(len(samples) - 8_000) < 800
    # The loudest frequency of half a second, to 2 Hz.
    spectrum = np.abs(np.fft.rfft(samples[:8_000], 8_000))
    assert abs(int(spectrum.argmax()) * 2 - 440) <= 4
    (tmp_path / "x.bin").write_bytes(b"ab" + data)
    cut_out = Media(Slice(tmp_path / "x.bin", 2, len(data)), "audio")
    assert np.array_equal(waveform(cut_out, 16_000), samples)


def test_channels_are_mixed_and_a_waveform_of_the_rate_is_unchanged() -> None:
    samples = tone()
    assert np.abs(waveform(Media(wav(samples), "audio"), 16_000) - samples).max() < 1e-4
    both = waveform(Media(wav(samples, channels=2), "audio"), 16_000)
    assert len(both) == len(samples) and np.corrcoef(both, samples)[0, 1] > 0.999


def cut(codec: str) -> bytes:
    data = encoded(codec, FORMATS[codec])
    return data[: len(data) // 2]


NO_AUDIO = {
    "text": (b"not a sound", "not audio of WAV, FLAC, OGG, MP3 (11 bytes)"),
    "nothing": (b"", "not audio of WAV, FLAC, OGG, MP3 (0 bytes)"),
    "a header alone": (wav(tone())[:44], "is cut: 44 bytes of 16,044"),
    "a cut WAV": (wav(tone())[:-100], "is cut: 15,944 bytes of 16,044"),
    "a cut FLAC": (cut("flac"), "can't be decoded"),
    "a cut OGG": (cut("libopus"), "is cut: "),
    "a WAV without samples": (wav(tone(seconds=0)), "has no sound"),
    "noise after an MP3's first bytes": (b"\xff\xfb" + bytes(range(200)), "can't be decoded"),
}


@pytest.mark.parametrize("name", NO_AUDIO)
def test_what_is_no_audio_is_an_error_with_its_name(name: str) -> None:
    data, message = NO_AUDIO[name]
    with pytest.raises(DataError) as caught:
        waveform(Media(data, "audio", label="row 3's clip"), 16_000)
    assert message in caught.value.message and "row 3's clip" in caught.value.message
    assert caught.value.kind == "audio_unreadable"


def test_a_file_that_states_its_length_is_refused_wherever_it_is_cut() -> None:
    """Also behind a whole page of Ogg, or a whole frame of FLAC, where decoders find no fault."""
    for codec, mark in (("libopus", b"OggS"), ("flac", b"\xff\xf8")):
        whole = encoded(codec, FORMATS[codec], seconds=3)
        assert abs(len(waveform(Media(whole, "audio"), 16_000)) - 48_000) < 200
        marks = [place.start() for place in re.finditer(mark, whole)]
        places = [*range(1, len(whole), len(whole) // 12), *marks[1:20], len(whole) - 1]
        assert len(marks) > 2
        for end in places:
            with pytest.raises(DataError) as caught:
                waveform(Media(whole[:end], "audio"), 16_000)
            assert caught.value.kind == "audio_unreadable"


def test_a_flac_behind_an_id3_tag_is_no_mp3() -> None:
    data = encoded("flac", "flac")
    tag = b"ID3\x04\x00\x00" + bytes([0, 0, 1, 2]) + bytes(130)
    tagged = waveform(Media(tag + data, "audio"), 16_000)
    assert np.array_equal(tagged, waveform(Media(data, "audio"), 16_000))


def test_a_missing_file_a_long_one_and_samples_that_are_no_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"gone.wav: can't be read: No such file") as caught:
        waveform(Media(tmp_path / "gone.wav", "audio"), 16_000)
    assert caught.value.kind == "audio_unreadable"
    broken = np.full(100, np.nan, np.float32).tobytes()
    header = wav(np.zeros(200, np.float32))[:44]
    floats = header[:20] + b"\x03\x00" + header[22:28] + (64_000).to_bytes(4, "little")
    floats += (4).to_bytes(2, "little") + (32).to_bytes(2, "little") + header[36:44] + broken
    with pytest.raises(DataError, match="NaN or infinite"):
        waveform(Media(floats, "audio"), 16_000)
    monkeypatch.setattr(decode, "MAX_SECONDS", 1)
    with pytest.raises(DataError, match="lasts more than 1 seconds"):
        waveform(Media(wav(tone(seconds=1.5)), "audio"), 16_000)


def test_a_playlist_that_is_named_as_audio_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "secret.wav").write_bytes(wav(tone()))
    listing = f"ffconcat version 1.0\nfile {tmp_path / 'secret.wav'}\n".encode()
    (tmp_path / "list.wav").write_bytes(listing)
    with pytest.raises(DataError, match="not audio"):
        waveform(Media(tmp_path / "list.wav", "audio"), 16_000)


def test_without_pyav_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"pip install 'vlm_tune\[audio\]'"):
        waveform(Media(wav(tone()), "audio"), 16_000)
    assert pickle.loads(pickle.dumps(Media(b"x", "audio"))).modality == "audio"
