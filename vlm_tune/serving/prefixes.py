"""Prefixes of prompts, whose keys and values later prompts reuse: an image is read once.

A prompt's keys and values up to the end of its last image are remembered, and a later prompt begins
with those of the longest prefix that it shares.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from vlm_tune.data.images.decode import encoded_bytes
from vlm_tune.data.media_slots import owners
from vlm_tune.data.types import Example, Media
from vlm_tune.model.language.row_buffers import Prefix

MOST_PREFIXES = 256
"""Most prefixes that are remembered: each is compared with every prompt that comes."""


class Sized(Protocol):
    """Something that takes memory."""

    @property
    def nbytes(self) -> int:
        """The memory that it takes, in bytes."""
        ...


Key = TypeVar("Key", bound=Hashable)
Entry = TypeVar("Entry", bound=Sized)


class Remembered(Generic[Key, Entry]):
    """Entries by key, of which the ones used least recently go when they take too much memory.

    Several threads may use it.
    """

    def __init__(self, limit: int, most: int | None = None) -> None:
        """Begins without entries.

        Args:
            limit: The most bytes that they may take.
            most: The most entries; None for any number.
        """
        self.limit = limit
        self.most = most
        self.nbytes = 0
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def by_use(self) -> list[Key]:
        """The keys, of the entry used least recently first."""
        with self._lock:
            return list(self._entries)

    def get(self, key: Key) -> Entry | None:
        """The entry of a key, which counts as used now; None if it is not there."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: Key, entry: Entry) -> None:
        """Remembers an entry, unless it is larger than all may be together."""
        with self._lock:
            if key in self._entries or entry.nbytes > self.limit:
                return
            self._entries[key] = entry
            self.nbytes += entry.nbytes
            most = len(self._entries) if self.most is None else self.most
            while self.nbytes > self.limit or len(self._entries) > most:
                _, oldest = self._entries.popitem(last=False)
                self.nbytes -= oldest.nbytes


@dataclass(frozen=True)
class Beginning:
    """The first tokens of a prompt: equal for prompts with the same keys and values.

    Attributes:
        ids: The token ids int64[n] as bytes; in the slots of the prompt's image k it is -1 - k.
        images: The digests of the images.
    """

    ids: bytes
    images: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.ids) // 8

    def common(self, other: Beginning) -> int:
        """The number of first tokens of this prompt that another one has too.

        An image counts as a whole. At least one token of this prompt is left, whose hidden states
        predict the answer's first one.
        """
        mine, theirs = (np.frombuffer(each.ids, dtype=np.int64) for each in (self, other))
        length = min(len(mine) - 1, len(theirs))
        pairs = enumerate(zip(self.images, other.images, strict=False))
        images = next(
            (k for k, (one, another) in pairs if one != another),
            min(len(self.images), len(other.images)),
        )
        # Both have the same ids in the slots of an image that differs.
        same = (mine[:length] == theirs[:length]) & (mine[:length] >= -images)
        count = length if same.all() else int(same.argmin())
        while count and mine[count] < 0 and mine[count - 1] == mine[count]:
            count -= 1
        return count

    def first(self, count: int) -> Beginning:
        """The first tokens of it."""
        ids = np.frombuffer(self.ids, dtype=np.int64)[:count]
        images = -int(ids.min(initial=0))
        return Beginning(ids.tobytes(), self.images[:images])

    @property
    def images_end(self) -> int:
        """The number of tokens up to the end of the last image; 0 without images."""
        places = (np.frombuffer(self.ids, dtype=np.int64) < 0).nonzero()[0]
        return int(places[-1]) + 1 if len(places) else 0


def image_digest(media: Media) -> bytes:
    """A digest of an image's encoded bytes, and of which tile of it is meant.

    Raises `DataError` if they can't be read.
    """
    digest = hashlib.sha256(encoded_bytes(media))
    digest.update(repr(media.tile).encode())
    return digest.digest()


def beginning_of(prompt: Example, tokens_per_image: int, digests: dict[Media, bytes]) -> Beginning:
    """The whole of a prompt as a `Beginning`; `digests` are those of its images."""
    ids = prompt.input_ids.astype(np.int64)
    slots = prompt.image_mask.nonzero()[0]
    ids[slots] = -1 - owners(prompt.media, tokens_per_image)
    return Beginning(ids.tobytes(), tuple(digests[media] for media in prompt.media))


Prefixes = Remembered[Beginning, Prefix]


def longest_prefix(prefixes: Prefixes, prompt: Beginning) -> Prefix | None:
    """The longest remembered prefix that a prompt begins with; None if there is none."""
    best: Beginning | None = None
    most = 0
    for key in prefixes.by_use():
        count = prompt.common(key)
        if count > most:
            best = key
            most = count
    prefix = None if best is None else prefixes.get(best)
    if prefix is None or most == prefix.length:
        return prefix
    shorter = [[tensor[:, :most] for tensor in layer] for layer in prefix.layers]
    return Prefix(shorter, most)
