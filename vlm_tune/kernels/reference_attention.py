"""Attention over intervals of tokens by torch's matrix products, one block of queries at a time.

It works in any float type. No matrix of [L, L] is kept beyond its block; the backward pass
recomputes a block's weights from queries and keys.

Shapes: B rows, H query heads, G key heads, L tokens, D head width; Q queries of a block and N keys
that some of them see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

QUERIES = 192
"""Most queries of a block. More would compute more masked scores, fewer make products small."""

KEY_STEP = 64
"""A block's keys are padded to a multiple of this, and its queries to one of `QUERY_STEP`, because
oneDNN compiles a kernel for every shape."""
QUERY_STEP = 32

UNSEEN = -1e30
"""The score of masked keys. It is finite, so that a query that sees no key gives no NaN."""


class _Block:
    """A block of queries.

    `rows` are its positions, `keys` (int64[N]) the keys that some of them see, and `seen`
    (bool[Q, N]) the mask, True where a query sees a key. `keys` and `seen` are padded.
    """

    def __init__(self, visible_until: Tensor, start: int, stop: int) -> None:
        place = torch.arange(stop, device=visible_until.device)
        # Key j is seen by the queries from j on, up to visible_until[j].
        (keys,) = ((visible_until[:stop] > start) & (visible_until[:stop] > place)).nonzero(
            as_tuple=True
        )
        queries = place[start:]
        seen = (keys <= queries[:, None]) & (queries[:, None] < visible_until[keys])
        self.rows = slice(start, stop)
        self.count = len(keys)
        more_queries = -(stop - start) % QUERY_STEP
        more_keys = -len(keys) % KEY_STEP
        self.keys = pad(keys, (0, more_keys))
        self.seen = pad(seen, (0, more_keys, 0, more_queries))

    def queries(self, query: Tensor, groups: int) -> Tensor:
        """The block of a row's [H, L, D] as [G, H / G * Q, D], padded with zeros."""
        rows = query[:, self.rows]
        rows = pad(rows, (0, 0, 0, len(self.seen) - rows.shape[1]))
        return rows.reshape(groups, -1, rows.shape[-1])

    def of_row(self, padded: Tensor, heads: int) -> Tensor:
        """Undoes the layout of `queries`: [H, Q, D] without padding."""
        return padded.reshape(heads, len(self.seen), -1)[:, : self.rows.stop - self.rows.start]

    def weights(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Attention weights [G, H / G * Q, N] of `queries` and keys [G, N, D].

        They are zero for a query that sees no key.
        """
        scores = (
            torch.bmm(query, key.transpose(1, 2)).mul_(scale).unflatten(1, (-1, len(self.seen)))
        )
        # In fp16 the score would be none of its numbers.
        unseen = max(UNSEEN, torch.finfo(scores.dtype).min)
        weights = scores.masked_fill_(~self.seen, unseen).softmax(-1)
        blind = ~self.seen.any(-1)
        if bool(blind.any()):
            weights.masked_fill_(blind[:, None], 0)
        return weights.flatten(1, 2)


def _blocks(visible_until: Tensor) -> Iterator[_Block]:
    """The blocks of a row in which some query sees some key.

    `visible_until` (int[L]) is the position at which each token stops being visible.
    """
    length = len(visible_until)
    # Blocks of equal size: a short last one would be padded, and its products small.
    size = -(-length // -(-length // QUERIES))
    for start in range(0, length, size):
        block = _Block(visible_until, start, min(start + size, length))
        if block.count:
            yield block


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, visible_until: Tensor, scale: float
) -> Tensor:
    """Attention in which token i sees token j if j <= i < visible_until[b, j].

    Args:
        query: [B, H, L, D].
        key: [B, G, L, D].
        value: [B, G, L, D].
        visible_until: int[B, L].
        scale: factor of the scores.

    Returns:
        Outputs [B, L, H, D].
    """
    rows, heads, length, width = query.shape
    out = query.new_zeros(rows, length, heads, width)
    for row in range(rows):
        for block in _blocks(visible_until[row]):
            queries = block.queries(query[row], key.shape[1])
            keys = key[row][:, block.keys]
            values = value[row][:, block.keys]
            outputs = torch.bmm(block.weights(queries, keys, scale), values)
            out[row, block.rows] = block.of_row(outputs, heads).transpose(0, 1)
    return out


def attend_blocks_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, visible_until: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of `attend_blocks`.

    `gradient` is that of the outputs [B, L, H, D]. Returns the gradients of query [B, L, H, D], and
    of key and value [B, L, G, D].
    """
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    of_query = query.new_zeros(rows, length, heads, width)
    of_key, of_value = (query.new_empty(rows, length, groups, width) for _ in range(2))
    wide = torch.promote_types(query.dtype, torch.float32)
    for row in range(rows):
        # Many blocks add to the gradient of a key, so the sum is in a wider type than its terms.
        sums = [query.new_zeros(groups, length, width, dtype=wide) for _ in range(2)]
        for block in _blocks(visible_until[row]):
            queries = block.queries(query[row], groups)
            keys = key[row][:, block.keys]
            values = value[row][:, block.keys]
            flow = block.queries(gradient[row].transpose(0, 1), groups)
            weights = block.weights(queries, keys, scale)
            of_weights = torch.bmm(flow, values.transpose(1, 2))
            of_scores = torch.ops.aten._softmax_backward_data(
                of_weights, weights, -1, weights.dtype
            ).mul_(scale)
            of_query[row, block.rows] = block.of_row(torch.bmm(of_scores, keys), heads).transpose(
                0, 1
            )
            of_both = (
                torch.bmm(of_scores.transpose(1, 2), queries),
                torch.bmm(weights.transpose(1, 2), flow),
            )
            for total, addend in zip(sums, of_both, strict=True):
                total.index_add_(1, block.keys[: block.count], addend[:, : block.count].to(wide))
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

    `keys` and `values` [B, G, L, D] are those of the shared row, `seen` (bool[B, K, L]) is the mask
    of its branches. `grown` holds the key and value [B, G, K, D] of each token that was generated
    in a branch; a branch sees all of its own.
    """
    heads, branches = query.shape[1:3]
    grouped = query.unflatten(1, (keys.shape[1], -1))
    first = (grouped.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, (-1, branches)).float()
    keys_grown, values_grown = (torch.stack(each, 2) for each in zip(*grown, strict=True))
    later = torch.einsum("bgrkd,bgnkd->bgrkn", grouped, keys_grown).float()
    scores = torch.cat([first.masked_fill_(~seen[:, None, None], UNSEEN), later], -1).mul_(scale)
    weights = scores.softmax(-1).to(query.dtype)
    before, after = weights.split([keys.shape[2], len(grown)], -1)
    out = (before.flatten(2, 3) @ values).unflatten(2, (-1, branches)) + torch.einsum(
        "bgrkn,bgnkd->bgrkd", after, values_grown
    )
    return out.reshape(len(query), heads, branches, -1).transpose(1, 2).contiguous()
