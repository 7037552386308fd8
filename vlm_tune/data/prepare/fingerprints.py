"""Fingerprints of a stage's data, to tell whether and where the data of a resumed run has changed.

A row is hashed by its roles, texts and images' bytes. So a file that was copied or touched is the
same, and the recipe's processing of rows (template, tokenizer, `max_length`) does not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_tune.config.data import Source
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.prepare.part_rows import PartRows
from vlm_tune.data.sources.registry import open_source

BLOCK = 1000
"""The number of rows that share a hash, to locate where a source differs."""


def fingerprint_prepared(prepared: Prepared) -> list[dict[str, Any]]:
    """Fingerprints each source of prepared rows.

    Returns {source, rows, digest, blocks} for each: the number of rows, a hash of all rows, and one
    of every `BLOCK` of them.
    """
    numbers = prepared.column("number")
    keys = PartRows(prepared, np.arange(len(numbers))).contents
    sources = []
    for number, reader in enumerate(prepared.readers):
        rows = keys[numbers == number]
        blocks = [_digest(rows[start : start + BLOCK], 4) for start in range(0, len(rows), BLOCK)]
        sources.append(
            {
                "source": reader.name,
                "rows": len(rows),
                "digest": _digest(rows, 16),
                "blocks": blocks,
            }
        )
    return sources


def fingerprint_streams(sources: Sequence[Source], seed: int) -> list[dict[str, Any]]:
    """Fingerprints each streamed source.

    Returns {source, stream} for each; of files, `stream` hashes sizes and modification times.
    """
    readers = [open_source(source, seed=seed, streaming=True) for source in sources]
    return [{"source": reader.name, "stream": reader.fingerprint()} for reader in readers]


def fingerprint_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Messages about differences between the fingerprints of a stage's parts.

    Returns one line for each source that differs. Raises `KeyError`, `TypeError`, `ValueError` or
    `AttributeError` for an invalid fingerprint.
    """
    differences = []
    for part in sorted({*before, *now}):
        then = before.get(part, [])
        since = now.get(part, [])
        for old, new in zip(then, since, strict=False):
            where = f"data.{part} {new['source']}"
            if old["source"] != new["source"] and _content(old) != _content(new):
                differences.append(f"{where}: was {old['source']}")
            elif _content(old) != _content(new):
                differences.append(f"{where}: {_row_differences(old, new)}")
        differences += [
            f"data.{part}: {source['source']} is no longer read" for source in then[len(since) :]
        ]
        differences += [
            f"data.{part}: {source['source']} was not read before" for source in since[len(then) :]
        ]
    return differences


def _digest(keys: np.ndarray, size: int) -> str:
    return hashlib.blake2b(keys.astype("<u8").tobytes(), digest_size=size).hexdigest()


def _content(source: Mapping[str, Any]) -> Any:
    """The content of a source's fingerprint, without its name."""
    return source["stream"] if "stream" in source else (source["rows"], source["digest"])


def _row_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Message about which rows of a source differ, to the block.

    Raises `ValueError` for inconsistent fingerprints.
    """
    if "stream" in old or "stream" in new:
        return "its files have another size or modification time"
    whole = min(old["rows"], new["rows"]) // BLOCK
    pairs = list(zip(old["blocks"], new["blocks"], strict=False))
    different = [number for number, (one, other) in enumerate(pairs) if one != other]
    first = different[0] if different else len(pairs)
    if old["rows"] == new["rows"]:
        if not different:
            raise ValueError("the hash of all rows differs, but the hash of each block is equal")
        last = min((different[-1] + 1) * BLOCK, old["rows"])
        return f"of {old['rows']:,} rows some of {first * BLOCK + 1:,} to {last:,} differ"
    same = f" (the first {first * BLOCK:,} are the same)" if 0 < first <= whole else ""
    return f"{old['rows']:,} rows, now {new['rows']:,}{same}"
