"""Builds the spoken digits of `recipes/spoken-digits.yaml`: espeak-ng's voices say them.

    pip install 'vlm_tune[audio,speech]'
    python -m benchmarks.spoken_digits

Each clip has one to three digits, and several rows of the VQA form ask about it. Voices are accents
of English with espeak-ng's variants, at random speeds and pitches. The variants of validation and
test are in no other part. The same arguments give the same clips and rows.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-gb-x-rp", "en-us")
PARTS = {"train": 3000, "validation": 200, "test": 600}
"""Clips by part."""
EVERY = 5
"""Every fifth variant is heard in test alone, the one after it in validation alone."""
SKIPPED = ("whisper", "demonic", "anxious", "fast")
"""Beginnings of names of variants that people hardly understand."""
SPEEDS = (130, 210)
PITCHES = (25, 75)
RETRIEVAL = 1
"""espeak-ng's number for output to a callback, as those that follow are for other choices."""
UTF8 = 1
SPEED = 1
PITCH = 3


class Voice(ctypes.Structure):
    """espeak-ng's `espeak_VOICE`, of which the first fields are read."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("unused", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    )


class Speaker:
    """espeak-ng, from the package `espeakng-loader`."""

    def __init__(self) -> None:
        import espeakng_loader  # pyright: ignore[reportMissingImports]

        self._library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.rate: int = self._library.espeak_Initialize(RETRIEVAL, 0, data, 0)
        if self.rate <= 0:
            raise SystemExit(f"espeak-ng can't read its data in {data.decode()}")
        self._pieces: list[bytes] = []
        prototype = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self._callback = prototype(self._take)
        self._library.espeak_SetSynthCallback(self._callback)

    def _take(self, samples: Any, count: int, _: Any) -> int:
        if samples and count:
            self._pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    def variants(self) -> list[str]:
        """The names of the variants of voices that can be loaded, sorted."""
        self._library.espeak_ListVoices.restype = ctypes.POINTER(ctypes.POINTER(Voice))
        listed = self._library.espeak_ListVoices(ctypes.byref(Voice(languages=b"variant")))
        names = []
        while listed[len(names)]:
            names.append(listed[len(names)].contents.identifier.decode().removeprefix("!v/"))
        clear = (name for name in names if not name.lower().startswith(SKIPPED))
        return sorted(name for name in clear if self._set_voice(f"{ACCENTS[0]}+{name}"))

    def _set_voice(self, voice: str) -> bool:
        return self._library.espeak_SetVoiceByName(voice.encode()) == 0

    def say(self, text: str, voice: str, speed: int, pitch: int) -> bytes:
        """The samples of a text as 16-bit PCM, `rate` a second."""
        self._pieces.clear()
        if not self._set_voice(voice):
            raise SystemExit(f"espeak-ng has no voice {voice}")
        self._library.espeak_SetParameter(SPEED, speed, 0)
        self._library.espeak_SetParameter(PITCH, pitch, 0)
        encoded = text.encode()
        self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, UTF8, None, None)
        self._library.espeak_Synchronize()
        return b"".join(self._pieces)


def variants_of(part: str, variants: Sequence[str]) -> list[str]:
    """The variants that are heard in a part."""
    place = {"test": 0, "validation": 1}.get(part)
    if place is None:
        return [name for number, name in enumerate(variants) if number % EVERY > 1]
    return list(variants[place::EVERY])


def questions(digits: Sequence[str], draw: random.Random) -> list[tuple[str, str]]:
    """Questions about the digits of a clip, with their answers."""
    spoken = draw.random() < 0.5
    named = draw.choice([word for word in WORDS if (word in digits) == spoken])
    return [
        ("which digits are spoken?", " ".join(digits)),
        ("which digit comes first?", digits[0]),
        ("which digit comes last?", digits[-1]),
        ("how many digits are spoken?", str(len(digits))),
        (f"is {named} spoken?", "yes" if spoken else "no"),
    ]


def build(folder: Path, parts: dict[str, int], speaker: Speaker, seed: int = 0) -> None:
    """Writes the clips as WAV files, and `train.jsonl` and so on beside them."""
    variants = speaker.variants()
    for part, clips in parts.items():
        draw = random.Random(f"{seed} {part}")
        voices = variants_of(part, variants)
        (folder / part).mkdir(parents=True, exist_ok=True)
        rows = []
        for number in range(clips):
            digits = draw.choices(WORDS, k=draw.randint(1, 3))
            voice = f"{draw.choice(ACCENTS)}+{draw.choice(voices)}"
            samples = speaker.say(
                " ".join(digits), voice, draw.randint(*SPEEDS), draw.randint(*PITCHES)
            )
            path = folder / part / f"{number:05}.wav"
            with wave.open(str(path), "wb") as file:
                file.setparams((1, 2, speaker.rate, 0, "NONE", ""))
                file.writeframes(samples)
            for question, answer in questions(digits, draw):
                row = {"question": question, "answer": answer, "audio": f"{part}/{path.name}"}
                rows.append(row | {"category": _category(question)})
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{part}: {clips:,} clips of {len(voices)} variants, {len(rows):,} questions")


def _category(question: str) -> str:
    return "is it spoken" if question.startswith("is ") else question.rstrip("?")


def main() -> None:
    """Builds the data set in a folder."""
    parser = argparse.ArgumentParser(description="Builds the spoken digits.")
    parser.add_argument("--folder", type=Path, default=Path("spoken-digits"))
    for part, clips in PARTS.items():
        parser.add_argument(f"--{part}", type=int, default=clips, help=f"clips (default: {clips})")
    options = parser.parse_args()
    build(options.folder, {part: getattr(options, part) for part in PARTS}, Speaker())


if __name__ == "__main__":
    main()
