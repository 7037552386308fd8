"""Messages about rows that exceed a length bound of a batch; such rows are trained on unchanged."""

from __future__ import annotations

import numpy as np

from vlm_tune.config.recipe import Recipe
from vlm_tune.data.prepare.dataset import Prepared


def unkept_bounds(recipe: Recipe, prepared: Prepared) -> list[str]:
    """Messages about prepared training rows over `train.batch_tokens` or `data.row_length`.

    Returns one line for each bound that is exceeded.
    """
    data = recipe.data
    most_tokens = recipe.train.batch_tokens
    bounds: list[tuple[str, int, np.ndarray, str, str]] = []
    units = "images with their rows" if data.group == "image" else "rows"
    longest, total = prepared.unit_lengths.T
    if data.packing:
        bounds.append(
            ("data.row_length", data.row_length, total, units, "stands alone in a row of its own")
        )
    elif data.group == "image" and prepared.layout == "causal":
        lengths = prepared.store.lengths
        bounds.append(
            ("data.row_length", data.row_length, lengths, "rows", "is trained on as it is")
        )
    if most_tokens is not None:
        padded = total if data.packing else longest * np.diff(prepared.starts)
        bounds.append(
            ("train.batch_tokens", most_tokens, padded, units, "is a micro-batch of its own")
        )
    lines = []
    if data.packing and most_tokens is not None and data.row_length > most_tokens:
        text = (
            f"a packed row may have data.row_length {data.row_length:,} tokens, "
            f"more than train.batch_tokens {most_tokens:,}"
        )
        lines.append(f"{text}: each such row is a micro-batch of its own")
    for name, bound, sizes, what, fate in bounds:
        over = int((sizes > bound).sum())
        if over:
            most = int(sizes.max())
            lines.append(
                f"{over:,} of {len(sizes):,} {what} are over {name} {bound:,}, "
                f"the longest {most:,} tokens: each {fate}"
            )
    return lines


def stream_bounds(recipe: Recipe) -> list[str]:
    """Messages about bounds that streamed rows may exceed, as far as the recipe shows."""
    data = recipe.data
    if not data.packing or data.max_length <= data.row_length:
        return []
    text = (
        f"rows may have up to data.max_length {data.max_length:,} tokens, "
        f"more than data.row_length {data.row_length:,}"
    )
    return [f"{text}: a longer one stands alone in a row of its own"]
