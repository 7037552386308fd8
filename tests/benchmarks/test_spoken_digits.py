"""The data set of the audio recipe: what it holds, and that it is the same anew."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from benchmarks import spoken_digits
from tests.helpers.audio_samples import tone
from tests.helpers.row_samples import file_source, good, read


class Tones:
    """Stands for espeak-ng: its voices are tones."""

    rate = 16_000

    def variants(self) -> list[str]:
        return [f"v{number:02}" for number in range(12)]

    def say(self, text: str, voice: str, speed: int, pitch: int) -> bytes:
        return (tone(10.0 * pitch, 0.1 * len(text.split())) * 32767).astype("<i2").tobytes()


def test_no_voice_is_in_two_parts() -> None:
    voices = Tones().variants()
    parts = {part: spoken_digits.variants_of(part, voices) for part in spoken_digits.PARTS}
    assert sorted(name for names in parts.values() for name in names) == voices
    assert min(map(len, parts.values())) >= 2


def test_questions_about_digits_have_their_answers() -> None:
    draw = random.Random(0)
    named = set()
    for _ in range(40):
        pairs = dict(spoken_digits.questions(["two", "nine"], draw))
        *fixed, (question, answer) = pairs.items()
        assert [text for _, text in fixed] == ["two nine", "two", "nine", "2"]
        assert answer == ("yes" if question.split()[1] in ("two", "nine") else "no")
        named.add(answer)
    assert named == {"yes", "no"}


def test_clips_and_their_rows_are_written_anew_alike(tmp_path: Path) -> None:
    speaker: Any = Tones()
    for folder in ("one", "two"):
        spoken_digits.build(tmp_path / folder, {"train": 3, "test": 2}, speaker)
    rows = good(read(file_source(tmp_path / "one" / "train.jsonl")))
    assert len(rows) == 15 and all(row.media[0].modality == "audio" for row in rows)
    for path in (tmp_path / "one").rglob("*.*"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == other.read_bytes()
