"""Log-mel frames, and clips cut in windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.audio_samples import tone, wav
from vlm_tune.data.audio.log_mel import RATE, AudioProcessor, log_mel
from vlm_tune.data.types import Media, Tile
from vlm_tune.errors import DataError


@pytest.mark.parametrize("bins", [80, 128])
def test_frames_equal_those_of_whispers_feature_extractor(bins: int) -> None:
    from transformers import WhisperFeatureExtractor

    noise = np.random.default_rng(0).standard_normal(24_000).astype(np.float32) * 0.1
    extractor = WhisperFeatureExtractor(feature_size=bins, chunk_length=2)
    theirs = extractor(noise, sampling_rate=RATE, return_tensors="np").input_features[0]
    ours = log_mel(np.pad(noise, (0, 8_000)), bins)
    assert ours.shape == theirs.shape == (bins, 200)
    assert np.abs(ours - theirs).max() < 1e-5


def test_a_clip_takes_the_windows_that_its_length_needs() -> None:
    processor = AudioProcessor(1, windows=3)
    for seconds, count in ((0.2, 1), (1.0, 1), (1.1, 2), (3.0, 3)):
        clip = Media(wav(tone(seconds=seconds)), "audio")
        windows = processor.expand(clip)
        assert len(windows) == count <= processor.most_frames
        assert [segment.payload for segment in processor.segments(clip)] == list(windows)
        assert windows == (
            (clip,)
            if count == 1
            else tuple(
                Media(clip.source, "audio", Tile(place, 0, count, 1)) for place in range(count)
            )
        )
    with pytest.raises(
        DataError, match=r"lasts 3.. seconds or more, and the model takes at most 3 x 1"
    ):
        processor.expand(Media(wav(tone(seconds=3.5)), "audio"))


def test_a_window_has_its_own_part_of_the_clip_and_then_silence() -> None:
    processor = AudioProcessor(1, windows=2)
    samples = np.concatenate([tone(300, 1.0), tone(3000, 0.5)])
    first, second = processor.expand(Media(wav(samples), "audio"))
    frames = processor(first)
    assert frames.shape == processor.shape == (80, 100)
    assert frames.dtype == processor.dtype == torch.float32
    loudest = [int(processor(window)[:, 20].argmax()) for window in (first, second)]
    assert loudest[0] < 20 < loudest[1]
    # The second window's sound ends in its middle; the quietest level follows.
    assert float(processor(second)[:, 60:].max()) == float(processor(second).min())


def test_the_plain_clip_and_a_fresh_copy() -> None:
    processor = AudioProcessor(2, windows=2)
    plain = processor.plain()
    assert processor.expand(plain) == (plain,)
    assert processor(plain).shape == (80, 200)
    assert processor.fresh() == processor and processor.fresh() is not processor


@pytest.mark.parametrize("method", [AudioProcessor.frame, AudioProcessor.places])
def test_boxes_are_refused_by_a_model_that_hears(method: Any) -> None:
    with pytest.raises(DataError, match="boxes and points are in images") as caught:
        method(AudioProcessor(seconds=1), 64, 48)
    assert caught.value.kind == "modality"


def test_another_threads_clip_is_never_taken_for_this_one() -> None:
    """A server lays out prompts in several threads, with one processor."""
    processor = AudioProcessor(1, windows=3)
    low, high = (Media(wav(tone(hertz)), modality="audio") for hertz in (220.0, 880.0))
    expected = AudioProcessor(1, windows=3)(low)

    class Crossed(list[Any]):
        """What is remembered; another thread's clip comes as soon as one is."""

        def __setitem__(self, place: Any, remembered: Any) -> None:
            super().__setitem__(place, [(high, np.zeros(RATE, np.float32))])

    object.__setattr__(processor, "_last", Crossed())
    assert torch.equal(processor(low), expected)
    assert torch.equal(processor(low), expected)
