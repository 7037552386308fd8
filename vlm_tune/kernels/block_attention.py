"""Attention of rows whose tokens see intervals, by torch's matrix products: a block of queries at a time, in any float type.

Nothing of [L, L] outlives its block. The backward pass makes a block's weights again, from queries and keys alone.

Shapes: B rows, H query heads, G key heads, L tokens, D head width; Q queries of a block and N keys that some of them see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

QUERIES = 192
"""Queries of a block at most: more of them see more keys that are not theirs, fewer leave the matrix products small."""

KEY_STEP = 64
"""What the keys of a block are padded to a multiple of, and QUERY_STEP its queries: oneDNN compiles a kernel for every shape."""
QUERY_STEP = 32

UNSEEN = -1e30
"""A score that is added where a query does not see a key: finite, so that a query that sees none has no NaN."""


class _Block:
    """A block of queries: `rows` of the row, int64[N] `keys` that they may see, and bool[Q, N] `seen`; all padded."""

    def __init__(self, ends: Tensor, start: int, stop: int) -> None:
        place = torch.arange(stop, device=ends.device)
        # Key j is seen by the queries from j on, up to ends[j].
        (keys,) = ((ends[:stop] > start) & (ends[:stop] > place)).nonzero(as_tuple=True)
        queries = place[start:]
        seen = (keys <= queries[:, None]) & (queries[:, None] < ends[keys])
        self.rows = slice(start, stop)
        self.count = len(keys)
        more_queries = -(stop - start) % QUERY_STEP
        more_keys = -len(keys) % KEY_STEP
        self.keys = pad(keys, (0, more_keys))
        self.seen = pad(seen, (0, more_keys, 0, more_queries))

    def queries(self, query: Tensor, groups: int) -> Tensor:
        """[G, H / G * Q, D] of a row's [H, L, D], zeros for padding."""
        own = query[:, self.rows]
        own = pad(own, (0, 0, 0, len(self.seen) - own.shape[1]))
        return own.reshape(groups, -1, own.shape[-1])

    def of_row(self, made: Tensor, heads: int) -> Tensor:
        """[H, Q, D] without padding, of what is like `queries`."""
        return made.reshape(heads, len(self.seen), -1)[:, : self.rows.stop - self.rows.start]

    def weights(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """[G, H / G * Q, N]: how much each query takes of each key, given `queries` and keys [G, N, D]; zeros for one that sees none."""
        scores = (
            torch.bmm(query, key.transpose(1, 2)).mul_(scale).unflatten(1, (-1, len(self.seen)))
        )
        found = scores.masked_fill_(~self.seen, UNSEEN).softmax(-1)
        blind = ~self.seen.any(-1)
        if bool(blind.any()):
            found[:, :, blind] = 0
        return found.flatten(1, 2)


def _blocks(ends: Tensor) -> Iterator[_Block]:
    """The blocks of a row in which some query sees some key, given where its tokens cease to be seen, int[L]."""
    length = len(ends)
    # Blocks of one size: a short last one would be padded, and its products small.
    size = -(-length // -(-length // QUERIES))
    for start in range(0, length, size):
        block = _Block(ends, start, min(start + size, length))
        if block.count:
            yield block


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float) -> Tensor:
    """Outputs [B, L, H, D] of query [B, H, L, D], key and value [B, G, L, D]: i sees j where j <= i < ends[b, j] (int[B, L])."""
    rows, heads, length, width = query.shape
    out = query.new_zeros(rows, length, heads, width)
    for row in range(rows):
        for block in _blocks(ends[row]):
            own = block.queries(query[row], key.shape[1])
            seen = key[row][:, block.keys]
            values = value[row][:, block.keys]
            found = torch.bmm(block.weights(own, seen, scale), values)
            out[row, block.rows] = block.of_row(found, heads).transpose(0, 1)
    return out


def attend_blocks_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query as [B, L, H, D], and of key and value as [B, L, G, D], given that of the outputs [B, L, H, D]."""
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    of_query = query.new_zeros(rows, length, heads, width)
    of_key, of_value = (query.new_empty(rows, length, groups, width) for _ in range(2))
    wide = torch.promote_types(query.dtype, torch.float32)
    for row in range(rows):
        # Many blocks add to the gradient of a key, so what is added up is wider than what is added.
        sums = [query.new_zeros(groups, length, width, dtype=wide) for _ in range(2)]
        for block in _blocks(ends[row]):
            own = block.queries(query[row], groups)
            seen = key[row][:, block.keys]
            values = value[row][:, block.keys]
            flow = block.queries(gradient[row].transpose(0, 1), groups)
            weights = block.weights(own, seen, scale)
            of_weights = torch.bmm(flow, values.transpose(1, 2))
            of_scores = torch.ops.aten._softmax_backward_data(
                of_weights, weights, -1, weights.dtype
            ).mul_(scale)
            of_query[row, block.rows] = block.of_row(torch.bmm(of_scores, seen), heads).transpose(
                0, 1
            )
            of_both = (
                torch.bmm(of_scores.transpose(1, 2), own),
                torch.bmm(weights.transpose(1, 2), flow),
            )
            for total, made in zip(sums, of_both, strict=True):
                total.index_add_(1, block.keys[: block.count], made[:, : block.count].to(wide))
        of_key[row], of_value[row] = (total.transpose(0, 1) for total in sums)
    return of_query, of_key, of_value


def attend_grown(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    grown: Sequence[tuple[Tensor, Tensor]],
    scale: float,
) -> Tensor:
    """Outputs [B, K, H, D] of the newest tokens' query [B, H, K, D] of K branches of rows.

    `keys` and `values` [B, G, L, D] are a row's, of which its branches see bool[B, K, L] `seen`; `grown` are the key and
    value [B, G, K, D] of each of a branch's own tokens, all of which it sees.
    """
    heads, branches = query.shape[1:3]
    own = query.unflatten(1, (keys.shape[1], -1))
    first = (own.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, (-1, branches)).float()
    keys_grown, values_grown = (torch.stack(each, 2) for each in zip(*grown, strict=True))
    later = torch.einsum("bgrkd,bgnkd->bgrkn", own, keys_grown).float()
    scores = torch.cat([first.masked_fill_(~seen[:, None, None], UNSEEN), later], -1).mul_(scale)
    weights = scores.softmax(-1).to(query.dtype)
    before, after = weights.split([keys.shape[2], len(grown)], -1)
    out = (before.flatten(2, 3) @ values).unflatten(2, (-1, branches)) + torch.einsum(
        "bgrkn,bgnkd->bgrkd", after, values_grown
    )
    return out.reshape(len(query), heads, branches, -1).transpose(1, 2).contiguous()
