"""Numbers drawn by a seed and a name: the same on every machine, and in whatever order."""

from __future__ import annotations

import hashlib


def draw(seed: int, name: str) -> int:
    """A number of 64 bits by a seed and the name of what it is drawn for, such as a row's id."""
    text = f"{seed}:{name}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
