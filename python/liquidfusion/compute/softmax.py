"""Attention over slots in plain torch: every device, blocks of queries, never an n x n matrix per head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from liquidfusion import _core

BLOCK_BYTES = 64 * 2**20
"""Probabilities held at once, in bytes; a block has at least one query."""
CPU_BLOCK_BYTES = 8 * 2**20
"""The same on a CPU, whose caches hold this much from one pass to the next: half the time of 64 MiB on a 2 k prompt."""


@dataclass(frozen=True)
class How:
    """How a layer attends.

    `scale`: factor on the products of queries and keys. `window`: sliding window in tokens, 0 for none. `softcap`:
    bound of the logits, 0 for none. `sinks`: learned attention sinks `[heads]`, one more logit in each head's
    denominator. `chunked`: whether the window is a chunk, which ends at each multiple of its length. `own`: bool
    `[batch, queries, columns]`, which of the call's own columns each query sees where that is not causal, else None.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    chunked: bool = False
    own: Tensor | None = None


class Positions(NamedTuple):
    """Who sees whom, told by where they stand, as `visible` takes it: int32, contiguous."""

    queries: Tensor
    keys: Tensor


def visible(query_positions: Tensor, key_positions: Tensor, window: int, chunked: bool = False) -> Tensor:
    """Which key each query may see.

    Parameters
    ----------
    query_positions : Tensor
        `[batch, queries]`, -1 for padding.
    key_positions : Tensor
        `[batch, kv_heads, keys]`, -1 for an empty slot or padding; 1 for `kv_heads` where all see the same.
    window : int
        Sliding window in tokens, 0 for none.
    chunked : bool
        The window ends at each multiple of its length instead of sliding.

    Returns
    -------
    Tensor
        bool `[batch, kv_heads, 1, queries, keys]`, or 1 for `kv_heads` as in `key_positions`.
    """
    q, k = query_positions[:, None, :, None], key_positions[:, :, None, :]
    mask = (k >= 0) & (k <= q)
    if window:
        mask &= k >= q // window * window if chunked else k > q - window
    return mask[:, :, None]


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | Positions | None,
    how: How,
    observe: Callable[[Tensor], None] | None,
    threads: int | None = None,
) -> Tensor:
    """Softmax attention with grouped heads.

    Parameters
    ----------
    query : Tensor
        `[batch, heads, queries, head_dim]`.
    keys, values : Tensor
        `[batch, kv_heads, columns, head_dim]`; values may have another head_dim.
    mask : Tensor, Positions or None
        bool, broadcastable to `[batch, kv_heads, group, queries, columns]`, or what tells it; None when every column is
        visible.
    how : How
        Scale, softcap and learned sinks, and with `Positions` the window; else that is in the mask.
    observe : callable or None
        Receives the float32 probabilities `[batch, kv_heads, group, queries, columns]`, contiguous, and may change
        them. None: nothing needs them, so torch's fused attention does the work.
    threads : int or None
        Cap on the core's threads.

    Returns
    -------
    Tensor
        `[batch, heads, queries, head_dim of the values]`; a query that sees nothing gives 0.
    """
    batch, heads, queries, _ = query.shape
    kv_heads = keys.shape[1]
    if observe is None and not how.softcap and how.sinks is None:
        mask = _dense(mask, how)
        if mask is None:
            return F.scaled_dot_product_attention(query, keys, values, scale=how.scale, enable_gqa=True)
        shared = mask.shape[1] == 1
        each = mask[:, :, 0] if shared else mask.expand(-1, -1, heads // kv_heads, -1, -1).flatten(1, 2)
        output = F.scaled_dot_product_attention(query, keys, values, attn_mask=each, scale=how.scale, enable_gqa=True)
        return output.masked_fill(~each.any(-1, keepdim=True), 0.0)
    # One product for the whole group: its query heads are more rows against the same keys.
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * queries, -1)
    weights = probabilities((grouped @ keys.transpose(2, 3)).float(), queries, mask, how, threads)
    output = (weights.to(values.dtype).flatten(2, 3) @ values).view(batch, heads, queries, -1)
    if observe is not None:
        observe(weights.detach())
    return output


def probabilities(
    products: Tensor, queries: int, mask: Tensor | Positions | None, how: How, threads: int | None = None
) -> Tensor:
    """Softmax of products of queries and keys.

    Parameters
    ----------
    products : Tensor
        float32 `[batch, kv_heads, group * queries, columns]`; changed.
    queries : int
        Queries of each head.
    mask : Tensor, Positions or None
        bool, broadcastable to the result, or what tells it; None when every column is visible.
    how : How
        Scale, softcap and learned sinks, and with `Positions` the window.
    threads : int or None
        Cap on the core's threads.

    Returns
    -------
    Tensor
        float32 `[batch, kv_heads, group, queries, columns]`, contiguous; a query that sees nothing gives 0.
    """
    batch, kv_heads, rows, columns = products.shape
    logits = products.view(batch, kv_heads, rows // queries, queries, columns)
    if isinstance(mask, Positions) and products.device.type == "cpu" and not how.softcap and how.sinks is None:
        # One pass over each row, in place, where torch takes five over all.
        _core.softmax(logits, *mask, how.scale, how.window, how.chunked, threads=threads)
        return logits
    mask = _dense(mask, how)
    logits.mul_(how.scale)
    if how.softcap:
        logits = (logits / how.softcap).tanh_() * how.softcap
    if mask is not None:
        logits.masked_fill_(~mask, -torch.inf)
    if how.sinks is not None:
        sinks = how.sinks.float().view(1, kv_heads, -1, 1, 1).expand(batch, -1, -1, queries, 1)
        return torch.cat((logits, sinks), -1).softmax(-1)[..., :-1].contiguous()
    weights = logits.softmax(-1)
    return weights if mask is None else weights.masked_fill_(~mask.any(-1, keepdim=True), 0.0)


def _dense(mask: Tensor | Positions | None, how: How) -> Tensor | None:
    return visible(*mask, how.window, how.chunked) if isinstance(mask, Positions) else mask


def blocks(rows: int, queries: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Ranges of queries whose probabilities (`rows` heads each, float32) stay within what a device should hold."""
    size = max(1, (CPU_BLOCK_BYTES if device.type == "cpu" else BLOCK_BYTES) // (4 * rows * columns))
    for start in range(0, queries, size):
        yield slice(start, min(start + size, queries))
