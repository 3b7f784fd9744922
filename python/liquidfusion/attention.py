"""Attention over the slots in plain torch: every device, blocks of queries, never an n x n matrix per head.

The registered attention function finds the running call through `current`, because transformers never hands the cache
to an attention function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from liquidfusion import _core
from liquidfusion.exceptions import CacheError, UnsupportedError

if TYPE_CHECKING:
    from liquidfusion.cache import Call
    from liquidfusion.decoder import DecodeCall

IMPLEMENTATION = "liquidfusion"
BLOCK_BYTES = 64 * 2**20
"""Probabilities held at once by the generic path, in bytes; a block has at least one query."""
CPU_BLOCK_BYTES = 8 * 2**20
"""The same on a CPU, whose caches hold this much from one pass to the next: half the time of 64 MiB on a 2 k prompt."""

current: ContextVar[Call | DecodeCall | None] = ContextVar("liquidfusion_call", default=None)
traced: DecodeCall | None = None
"""The running call again, while torch.compile traces: it cannot look into a ContextVar."""


def register() -> None:
    """Make `"liquidfusion"` known to transformers; registering twice is harmless."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention_function)


def running() -> Call | DecodeCall | None:
    """The call of a KVCache that is running in this thread, if any."""
    return traced if torch.compiler.is_compiling() else current.get()


def attention_function(
    module: torch.nn.Module,  # noqa: ARG001 - part of the interface
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the cache keeps its own mask: positions
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend for one layer of the running call (transformers' attention interface).

    Parameters
    ----------
    query : Tensor
        `[batch, heads, columns, head_dim]`.
    key, value : Tensor
        New columns only, `[batch, kv_heads, columns, head_dim]`, rotary already applied.

    Returns
    -------
    tuple
        Output `[batch, columns, heads, head_dim]` and None for the weights.

    Raises
    ------
    CacheError
        No call of a `KVCache` is running.
    UnsupportedError
        Dropout while training, or attention sinks learnt by the model (`s_aux`).
    """
    call = running()
    if call is None:
        raise CacheError("attention 'liquidfusion' ran outside a model call that carries a liquidfusion.KVCache")
    if dropout:
        raise UnsupportedError(f"attention dropout is {dropout}; a KVCache needs evaluation mode: call model.eval()")
    if s_aux is not None:
        raise UnsupportedError("attention sinks learnt by the model (s_aux) are not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    # Inside torch.autocast rotary positions leave float32; transformers' own attention casts it, too.
    query, key = query.to(value.dtype), key.to(value.dtype)
    output = call.attend(query, key, value, scale, sliding_window or 0, softcap or 0.0)
    return output.transpose(1, 2), None


def visible(query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """Which key each query may see.

    Parameters
    ----------
    query_positions : Tensor
        `[batch, queries]`, -1 for padding.
    key_positions : Tensor
        `[batch, kv_heads, keys]`, -1 for an empty slot or padding; 1 for `kv_heads` where all see the same.
    window : int
        Sliding window in tokens, 0 for none.

    Returns
    -------
    Tensor
        bool `[batch, kv_heads, 1, queries, keys]`, or 1 for `kv_heads` as in `key_positions`.
    """
    q, k = query_positions[:, None, :, None], key_positions[:, :, None, :]
    mask = (k >= 0) & (k <= q)
    if window:
        mask &= k > q - window
    return mask[:, :, None]


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    observe: Callable[[Tensor], None] | None,
) -> Tensor:
    """Softmax attention with grouped heads.

    Parameters
    ----------
    query : Tensor
        `[batch, heads, queries, head_dim]`.
    keys, values : Tensor
        `[batch, kv_heads, columns, head_dim]`.
    mask : Tensor or None
        bool, broadcastable to `[batch, kv_heads, group, queries, columns]`; None when every column is visible.
    observe : callable or None
        Receives the float32 probabilities `[batch, kv_heads, group, queries, columns]`, contiguous, and may change
        them. None: nothing needs them, so torch's fused attention does the work.

    Returns
    -------
    Tensor
        `[batch, heads, queries, head_dim]`; a query that sees nothing gives 0.
    """
    batch, heads, queries, _ = query.shape
    kv_heads = keys.shape[1]
    grouped = query.view(batch, kv_heads, heads // kv_heads, queries, -1)
    if observe is None and not softcap:
        if mask is None:
            return F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)
        shared = mask.shape[1] == 1
        each = mask[:, :, 0] if shared else mask.expand(-1, -1, heads // kv_heads, -1, -1).flatten(1, 2)
        output = F.scaled_dot_product_attention(query, keys, values, attn_mask=each, scale=scale, enable_gqa=True)
        return output.masked_fill(~each.any(-1, keepdim=True), 0.0)
    # One product for the whole group: its query heads are more rows against the same keys.
    scores = (grouped.flatten(2, 3) @ keys.transpose(2, 3)).view(*grouped.shape[:4], -1).float().mul_(scale)
    if softcap:
        scores = (scores / softcap).tanh_() * softcap
    if mask is None:
        probabilities = scores.softmax(-1)
    else:
        probabilities = scores.masked_fill_(~mask, -torch.inf).softmax(-1)
        probabilities.masked_fill_(~mask.any(-1, keepdim=True), 0.0)
    output = (probabilities.to(values.dtype).flatten(2, 3) @ values).view(batch, heads, queries, -1)
    if observe is not None:
        observe(probabilities.detach())
    return output


def blocks(rows: int, queries: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Ranges of queries whose probabilities (`rows` heads each, float32) stay within what a device should hold."""
    size = max(1, (CPU_BLOCK_BYTES if device.type == "cpu" else BLOCK_BYTES) // (4 * rows * columns))
    for start in range(0, queries, size):
        yield slice(start, min(start + size, queries))


def look_weights(keys: Tensor, values: Tensor) -> Tensor:
    """What a look at a token can move: the length of its value over the length of its key.

    Parameters
    ----------
    keys, values : Tensor
        `[batch, kv_heads, columns, head_dim]`.

    Returns
    -------
    Tensor
        float32 `[batch, kv_heads, columns]`; 0 for a key of zeros, which an empty slot holds.
    """
    length = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
    weight: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32) / length
    return weight.masked_fill(length == 0, 0.0)


def accumulate(
    probabilities: Tensor,
    ages: Tensor,
    elapsed: Sequence[int],
    mass: Tensor,
    peak: Tensor,
    mass_decay: float,
    peak_decay: float,
    *,
    weights: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """Add a block of probabilities to the first columns of mass and peak: the Rust core on the CPU, torch elsewhere.

    Parameters
    ----------
    probabilities : Tensor
        `[batch, kv_heads, group, queries, columns]`.
    ages : Tensor
        int32 `[batch, queries]` on the CPU: real tokens that follow the query in its call, -1 for padding.
    elapsed : sequence of int
        Real tokens per row by which what is there fades first.
    mass, peak : Tensor
        float32 `[batch, kv_heads, at least columns]`, updated in place.
    mass_decay, peak_decay : float
        Per query token.
    weights : Tensor or None
        float32 `[batch, kv_heads, columns]`, a factor on each column.
    threads : int or None
        Cap on the core's threads.
    """
    device, columns = probabilities.device, probabilities.shape[-1]
    if device.type == "cpu":
        # Columns beyond are new tokens that no query has reached: nothing there can fade.
        first_mass, first_peak = mass[..., :columns].contiguous(), peak[..., :columns].contiguous()
        _core.accumulate(
            probabilities,
            ages,
            elapsed,
            first_mass,
            first_peak,
            mass_decay,
            peak_decay,
            weights=weights,
            threads=threads,
        )
        if columns < mass.shape[-1]:
            mass[..., :columns], peak[..., :columns] = first_mass, first_peak
        return
    age = ages.to(device, torch.float32)[:, None, :, None]
    passed = torch.tensor(elapsed, dtype=torch.float32, device=device)[:, None, None]
    mean = probabilities.float().mean(2).masked_fill(age < 0, 0.0)
    age = age.clamp(min=0)
    summed, highest = (mean * mass_decay**age).sum(2), (mean * peak_decay**age).amax(2)
    if weights is not None:
        summed, highest = summed * weights, highest * weights
    mass.mul_(mass_decay**passed)
    mass[..., :columns] += summed
    peak.mul_(peak_decay**passed)
    peak[..., :columns] = torch.maximum(peak[..., :columns], highest)
