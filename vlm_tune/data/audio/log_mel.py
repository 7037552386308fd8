"""Log-mel frames of audio clips, as the encoders of speech models take them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_tune.data.affine import Affine
from vlm_tune.data.audio.decode import waveform
from vlm_tune.data.types import Media, Modality, Segment, Tile
from vlm_tune.errors import DataError

if TYPE_CHECKING:
    import torch

RATE = 16_000
"""Samples a second."""
WINDOW = 400
HOP = 160
"""Samples of a frame, and from one frame to the next: 25 and 10 ms."""
FLOOR = 1e-10
RANGE = 8.0
"""Decades below the loudest cell at which quieter ones are cut off."""


@dataclass(frozen=True)
class AudioProcessor:
    """Converts clips to the tower's input: log-mel frames float32[bins, frames] of one window.

    A clip takes as many windows of `seconds` as its length needs, at most `windows`; the rest of
    the last one is silence.
    """

    seconds: int
    bins: int = 80
    windows: int = 1
    _last: list[tuple[Media, np.ndarray]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    @property
    def modality(self) -> Modality:
        """Audio."""
        return "audio"

    @property
    def markers(self) -> tuple[str, ...]:
        """None: windows follow each other."""
        return ()

    @property
    def controls(self) -> tuple[str, ...]:
        """None: a window has no tokens of its own."""
        return ()

    def inputs(self, media: Media) -> torch.Tensor:
        """The same as `__call__`: a tower has one input."""
        return self(media)

    def frame(self, width: int, height: int) -> tuple[int, int]:
        """Raises `DataError`: a model that hears sees no image."""
        raise _no_places()

    def places(self, width: int, height: int) -> Affine:
        """Raises `DataError`, as `frame`."""
        raise _no_places()

    def save(self, folder: Path) -> None:
        """Writes nothing: all is in the model's config."""

    def fresh(self) -> AudioProcessor:
        """A copy that remembers no clip."""
        return replace(self)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of a window: bins and frames."""
        return self.bins, self.seconds * RATE // HOP

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a window."""
        import torch

        return torch.float32

    @property
    def layout(self) -> tuple[Any, ...]:
        """All that the number of a clip's slots depends on, beside the tokens of a window."""
        return self.seconds, self.windows

    @property
    def most_frames(self) -> int:
        """The largest number of windows of a clip."""
        return self.windows

    def parts(self, media: Media) -> tuple[str | Media, ...]:
        """The item itself: the model does not take the frames of a video."""
        return (media,)

    def whole(self, media: Media) -> Media:
        """The clip itself."""
        return media

    def segments(self, media: Media, place: int = 0, among: int = 1) -> list[Segment]:
        """The segments of a clip in a prompt, at any place: its windows in order.

        Raises `DataError` for a clip that can't be decoded, or is longer than the windows.
        """
        return [Segment("media", window) for window in self.expand(media)]

    def expand(self, media: Media, among: int = 1) -> tuple[Media, ...]:
        """The windows of a clip in order; raises as `segments`."""
        if media.tile is not None:
            return (media,)
        length = len(self._waveform(media))
        count = -(-length // (self.seconds * RATE))
        if count > self.windows:
            raise DataError(
                f"{media.name}: lasts {length / RATE:.1f} seconds or more, and the model takes at "
                f"most {self.windows} x {self.seconds} "
                "(model.tower.windows x model.tower.seconds)",
                kind="audio_long",
            )
        if count == 1:
            return (media,)
        return tuple(replace(media, tile=Tile(place, 0, count, 1)) for place in range(count))

    def __call__(self, media: Media) -> torch.Tensor:
        """The frames float32[bins, frames] of a window, of the first one for a whole clip.

        Raises `DataError` for a clip that can't be decoded.
        """
        import torch

        length = self.seconds * RATE
        start = media.tile.column * length if media.tile else 0
        samples = self._waveform(replace(media, tile=None))[start : start + length]
        padded = np.pad(samples, (0, length - len(samples)))
        return torch.from_numpy(log_mel(padded, self.bins))

    def plain(self) -> Media:
        """A clip of a second of silence."""
        import io
        import wave

        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes(bytes(2 * RATE))
        return Media(buffer.getvalue(), modality="audio")

    def _waveform(self, media: Media) -> np.ndarray:
        # Its length and its windows are requested one after the other: the last one is cached.
        # Other threads may put another one there meanwhile.
        for last, samples in tuple(self._last):
            if last == media:
                return samples
        samples = waveform(media, RATE, self.windows * self.seconds)
        self._last[:] = [(media, samples)]
        return samples


def _no_places() -> DataError:
    return DataError(
        "boxes and points are in images, and the model's tower takes audio (model.tower.kind)",
        kind="modality",
    )


def log_mel(samples: np.ndarray, bins: int) -> np.ndarray:
    """The log-mel spectrogram float32[bins, frames] of a waveform float32[samples], as Whisper's.

    Frames are centred on every `HOP`-th sample, and scaled so that most cells are within -1 and 1.
    Source: Whisper, arXiv:2212.04356; equal to transformers' `WhisperFeatureExtractor`.
    """
    framed = np.lib.stride_tricks.sliding_window_view(
        np.pad(samples.astype(np.float64), WINDOW // 2, mode="reflect"), WINDOW
    )[::HOP][:-1]
    hann = np.hanning(WINDOW + 1)[:-1]
    power = np.abs(np.fft.rfft(framed * hann)) ** 2
    spectrum = np.log10(np.maximum(power @ _mel_filters(bins), FLOOR)).T
    spectrum = np.maximum(spectrum, spectrum.max() - RANGE)
    return ((spectrum + 4.0) / 4.0).astype(np.float32)


@functools.cache
def _mel_filters(bins: int) -> np.ndarray:
    """Slaney's mel filters float64[WINDOW / 2 + 1, bins]."""
    from transformers.audio_utils import mel_filter_bank

    return mel_filter_bank(
        num_frequency_bins=WINDOW // 2 + 1,
        num_mel_filters=bins,
        min_frequency=0.0,
        max_frequency=RATE / 2,
        sampling_rate=RATE,
        norm="slaney",
        mel_scale="slaney",
    )
