"""The first slots of a row, which hold the attention sinks: attended in 16 bits, although they are coded as well.

Codes cost the sinks more than any other token. `first` ``[batch, kv_heads, S, width]`` holds the vectors of slots below
S as they were rotated (keys without the mean) before they were coded. Attention alone reads it: lengths and
distinctness stay those of the codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import key_order, value_order
from .common import base2_logits, dot, soften

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, N806 (Triton's constexpr parameters are upper case)


@triton.jit
def key_tile(
    first,
    s,
    inside,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    QUADS: tl.constexpr,
):
    """Rows of `first` in the order of `key_rows`; of 8 bits' two levels the lower stands for the coordinate."""
    byte, plane = key_order(WORDS, BITS, QUADS)
    if BITS == 8:
        there = (byte < WIDTH) & (plane == 0)
        at = byte
    else:
        there = byte < WIDTH * BITS // 8
        at = byte + plane * (WIDTH * BITS // 8)
    return tl.load(first + s[:, None] * WIDTH + at[None, :], mask=inside[:, None] & there[None, :], other=0.0)


@triton.jit
def value_tile(
    first,
    s,
    inside,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Columns of `first` in the order of `value_columns`; of 8 bits' two levels the lower stands for the coordinate."""
    byte, plane = value_order(WORDS, BITS)
    if BITS == 8:
        there = (byte < WIDTH) & (plane == 0)
        at = byte
    else:
        there = byte < WIDTH * BITS // 8
        at = byte + plane * (WIDTH * BITS // 8)
    return tl.load(first + s[None, :] * WIDTH + at[:, None], mask=inside[None, :] & there[:, None], other=0.0)


@triton.jit
def attend_first(
    q_tile,
    offset,
    keys,
    values,
    key_first,
    value_first,
    positions,
    logits,
    now,
    start,
    stop,
    window,
    scale,
    softcap,
    acc,
    GROUP: tl.constexpr,
    FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K_BITS: tl.constexpr,
    K_WORDS: tl.constexpr,
    V_BITS: tl.constexpr,
    V_WORDS: tl.constexpr,
    CENTRED: tl.constexpr,
    SCORED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    QUADS: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend the slots below FIRST from `start` to `stop`: (highest logit, sums, products with the values) per query.

    Every pointer is that of the row and kv head. All other slots come after, with what this leaves as their start.
    """
    BLOCK: tl.constexpr = 16
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK, BLOCK_G], tl.float32)
    for begin in tl.range(start, min(stop, FIRST), BLOCK, num_stages=1):
        s = begin + tl.arange(0, BLOCK)
        inside = s < min(stop, FIRST)
        position = tl.load(positions + s, mask=inside, other=-1)
        there = position >= 0
        if K_BITS == 16:
            k_tile = tl.load(
                keys + s[:, None] * HEAD_DIM + d[None, :],
                mask=inside[:, None] & (d < HEAD_DIM)[None, :],
                other=0.0,
            )
        else:
            k_tile = key_tile(key_first, s, inside, WIDTH, K_BITS, K_WORDS, QUADS).to(TYPE)
        if V_BITS == 16:
            v_tile = tl.load(
                values + s[None, :] * HEAD_DIM + d[:, None],
                mask=inside[None, :] & (d < HEAD_DIM)[:, None],
                other=0.0,
            )
        else:
            v_tile = value_tile(value_first, s, inside, WIDTH, V_BITS, V_WORDS).to(TYPE)
        x = dot(k_tile, q_tile, tl.zeros([BLOCK, BLOCK_G], tl.float32), PRECISION)
        if CENTRED:
            x += offset[None, :]
        x = base2_logits(x, scale, softcap, CAPPED)
        visible = there
        if WINDOWED:
            visible = visible & (now - position < window)
        x = tl.where(visible[:, None], x, float("-inf"))
        if SCORED:
            tl.store(logits + s[:, None] * GROUP + g[None, :], x, mask=inside[:, None] & (g < GROUP)[None, :])
        top, sums, p, fade = soften(x, top, sums)
        # An empty slot may hold NaN, and 0 * NaN would spread through the product.
        v_tile = tl.where(there[None, :], v_tile, 0.0)
        acc = dot(v_tile, p.to(v_tile.dtype), acc * fade[None, :], PRECISION)
    return top, tl.sum(sums, 0), acc
