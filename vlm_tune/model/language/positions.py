"""Tables of learned positions, which limit the length of rows."""

from __future__ import annotations

import re

from torch import nn

POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings|positions_embed)$")
"""Names of tables of learned positions in transformers models."""


def learned_positions(module: nn.Module) -> int | None:
    """The longest row, in tokens, that a module has learned positions for; None without a table."""
    sizes = [
        table.num_embeddings - int(getattr(table, "offset", 0))
        for name, table in module.named_modules()
        if isinstance(table, nn.Embedding) and POSITIONS.search(name)
    ]
    return min(sizes, default=None)
