"""Lists of segments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from vlm_tune.data.types import Segment


def joined_texts(segments: Iterable[Segment]) -> list[Segment]:
    """The segments, with adjacent texts joined that are both trained or both not."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last and last.kind == segment.kind == "text" and last.trained == segment.trained:
            joined[-1] = replace(last, payload=str(last.payload) + str(segment.payload))
        else:
            joined.append(segment)
    return joined
