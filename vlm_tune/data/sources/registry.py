"""Which reader serves which kind of source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from vlm_tune.config import Source
from vlm_tune.data.sources.easy_vqa import read_easy_vqa
from vlm_tune.data.sources.llava import read_llava
from vlm_tune.data.sources.messages import read_messages
from vlm_tune.data.sources.rows import BadRows
from vlm_tune.data.types import Conversation

SOURCES: dict[str, Callable[[Any, int, BadRows], Iterator[Conversation]]] = {
    "easy_vqa": read_easy_vqa,
    "llava": read_llava,
    "messages": read_messages,
}


def read_sources(sources: Sequence[Source], *, seed: int, bad: BadRows) -> list[Conversation]:
    """All conversations of the sources in order; raises `DataError` as `bad` tells."""
    return [
        conversation
        for source in sources
        for conversation in islice(SOURCES[getattr(source, "kind")](source, seed, bad), source.limit)  # noqa: B009
    ]
