"""Draw a token per row by temperature, top-k, top-p and min-p without sorting the vocabulary.

One program has one row and reads it a few times. The least weight that top-k or top-p lets through is found by search:
weights are between 0 and 1, where the bits of a float32 order like the numbers, and each pass over the row counts, and
adds up, what lies above eight marks. A row's sums are in one order whatever the batch is, so its token is the same in
any company.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803 (Triton's constexpr parameters are upper case)

ONE = tl.constexpr(0x3F800000)  # the bits of 1.0, which the most likely token has


@triton.jit
def _weights(logits, tokens, size, temperature, top):
    """Weights of tokens, 1 for the most likely one, and 0 beyond the row's end."""
    x = tl.load(logits + tokens, mask=tokens < size, other=float("-inf")).to(tl.float32)
    return tl.exp((x - top) / temperature)


@triton.jit
def _above(logits, size, temperature, top, marks, BLOCK: tl.constexpr):
    """How many weights are at or above each of eight marks, and their sums; marks are bits of float32."""
    counts = tl.zeros([8], tl.int32)
    sums = tl.zeros([8], tl.float32)
    for start in range(0, size, BLOCK):
        w = _weights(logits, start + tl.arange(0, BLOCK), size, temperature, top)
        reached = w.to(tl.int32, bitcast=True)[:, None] >= marks[None, :]
        counts += tl.sum(reached.to(tl.int32), 0)
        sums += tl.sum(tl.where(reached, w[:, None], 0.0), 0)
    return counts, sums


@triton.jit
def _search(logits, size, temperature, top, low, total, number, share, BLOCK: tl.constexpr):
    """The highest mark above which there still are `number` weights, and `share` of the sum; and the sum there."""
    high = ONE + 1
    beyond = 0
    inside = size
    each = tl.arange(0, 8)
    while (high - low > 1) & (inside > 1):
        step = (high - low + 7) // 8
        counts, sums = _above(logits, size, temperature, top, low + each * step, BLOCK)
        # Marks that reach both: a first part of the eight, the lowest of them for certain.
        n = tl.maximum(tl.sum(((counts >= number) & (sums >= share)).to(tl.int32), 0), 1)
        total = tl.sum(tl.where(each == n - 1, sums, 0.0), 0)
        beyond = tl.where(n < 8, tl.sum(tl.where(each == n, counts, 0), 0), beyond)
        inside = tl.sum(tl.where(each == n - 1, counts, 0), 0) - beyond
        high = tl.minimum(high, low + n * step)
        low = low + (n - 1) * step
    return low, total


@triton.jit
def _draw(logits, settings, noise, ids, row_stride, settings_stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    settings += row * settings_stride
    temperature = tl.load(settings)
    top_k = tl.load(settings + 1).to(tl.int32)
    top_p = tl.load(settings + 2)
    min_p = tl.load(settings + 3)

    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, size, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        x = tl.load(logits + tokens, mask=tokens < size, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(highest, x)
    top = tl.max(highest, 0)

    low = 0
    _, sums = _above(logits, size, temperature, top, tl.zeros([8], tl.int32), BLOCK)
    total = tl.max(sums, 0)
    if (top_k > 0) & (top_k < size):
        low, total = _search(logits, size, temperature, top, low, total, top_k, 0.0, BLOCK)
    if top_p < 1.0:
        low, total = _search(logits, size, temperature, top, low, total, 1, top_p * total, BLOCK)
    least = min_p.to(tl.int32, bitcast=True)
    if least > low:
        low = least
        _, sums = _above(logits, size, temperature, top, tl.zeros([8], tl.int32) + low, BLOCK)
        total = tl.max(sums, 0)

    target = tl.load(noise + row).to(tl.float32) * total
    before = 0.0
    found = size
    last = 0
    start = 0
    while (start < size) & (found == size):
        tokens = start + tl.arange(0, BLOCK)
        w = _weights(logits, tokens, size, temperature, top)
        w = tl.where(w.to(tl.int32, bitcast=True) >= low, w, 0.0)
        upto = before + tl.cumsum(w, 0)
        found = tl.min(tl.where((upto > target) & (w > 0.0), tokens, size), 0)
        last = tl.maximum(last, tl.max(tl.where(w > 0.0, tokens, 0), 0))
        before += tl.sum(w, 0)
        start += BLOCK
    # Rounding may leave the target above the last sum.
    tl.store(ids + row, tl.where(found == size, last, found).to(tl.int64))


def draw(logits: Tensor, settings: Tensor, noise: Tensor) -> Tensor:
    """Draw one token per row by inverting the distribution function.

    Parameters
    ----------
    logits : Tensor
        `[rows, vocabulary]`, float32 or a 16-bit type, the last axis contiguous.
    settings : Tensor
        float32 `[rows, at least 4]`: temperature (above 0), top-k (0 for none), top-p, min-p.
    noise : Tensor
        float64 `[rows]` in [0, 1).

    Returns
    -------
    Tensor
        int64 `[rows]`.
    """
    rows, size = logits.shape
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    block = min(2048, max(16, triton.next_power_of_2(size)))
    if rows:
        _draw[(rows,)](
            logits, settings, noise, ids, logits.stride(0), settings.stride(0), size, BLOCK=block, num_warps=8
        )
    return ids
