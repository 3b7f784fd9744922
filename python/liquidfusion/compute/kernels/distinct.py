"""Distinct: how far the key of every slot points from the mean direction of the keys held.

Source: KeyDiff, https://arxiv.org/abs/2504.15364. Two launches over the slots: the first sums unit keys, the second
takes the products with that sum. Splits and slots have one fixed order, so two runs give the same bits. Of codes
everything stays rotated, which changes no product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import QUADS, bias, key_order, key_rows, load_words

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, N806 (Triton's constexpr parameters are upper case)


@triton.jit
def _keys(
    keys,
    scales,
    mean,
    pair,
    head,
    s,
    slots,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    BIAS: tl.constexpr,
    CENTRED: tl.constexpr,
    NATIVE: tl.constexpr,
    QUADS: tl.constexpr,
):
    """Keys of slots, float32 [slots, coordinates], of codes rotated and in the order of `key_order`."""
    if BITS == 16:
        d = tl.arange(0, BLOCK_D)
        x = tl.load(
            keys + (pair * slots + s)[:, None] * HEAD_DIM + d[None, :],
            mask=(s < slots)[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        ).to(tl.float32)
    else:
        BYTES: tl.constexpr = WIDTH * BITS // 8
        codes = keys + pair * slots * (BYTES // 4 if BYTES % 4 == 0 else BYTES)
        levels = key_rows(load_words(codes, s, slots, WORDS, BYTES, False), BITS, NATIVE, QUADS).to(tl.float32) - BIAS
        byte, plane = key_order(WORDS, BITS, QUADS)
        scale = tl.load(scales + pair * slots + s, mask=s < slots, other=0.0).to(tl.float32)
        x = tl.where((byte < BYTES)[None, :], levels, 0.0)
        at = tl.where(byte < BYTES, byte + plane * BYTES, WIDTH)
        if BITS == 8:
            x = x.reshape([s.shape[0], 2, WORDS * 4])
            x = tl.sum(x * tl.where(tl.arange(0, 2) > 0, 16.0, 1.0)[None, :, None], 1)
            at = tl.sum(byte.reshape([2, WORDS * 4]), 0) // 2
        x = x * scale[:, None]
        if CENTRED:
            x += tl.load(mean + head * WIDTH + at, mask=at < WIDTH, other=0.0)[None, :]
    return x


@triton.jit
def _inverse(x, held):
    """Inverse lengths of keys, 0 where no token is held; and keys in which what is not held is 0."""
    x = tl.where(held[:, None], x, 0.0)
    length = tl.sqrt_rn(tl.sum(x * x, 1))
    return x, tl.where(length > 0, 1.0 / tl.where(length > 0, length, 1.0), 0.0)


@triton.jit
def _sum(
    keys,
    scales,
    mean,
    held,
    sums,
    slots,
    per_split,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    BIAS: tl.constexpr,
    CENTRED: tl.constexpr,
    NATIVE: tl.constexpr,
    QUADS: tl.constexpr,
):
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pair = row.to(tl.int64) * tl.num_programs(1) + head
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(split * per_split, tl.minimum((split + 1) * per_split, slots), BLOCK):
        s = first + tl.arange(0, BLOCK)
        there = tl.load(held + pair * slots + s, mask=s < slots, other=0) != 0
        x = _keys(
            keys,
            scales,
            mean,
            pair,
            head,
            s,
            slots,
            HEAD_DIM,
            WIDTH,
            BLOCK_D,
            BITS,
            WORDS,
            BIAS,
            CENTRED,
            NATIVE,
            QUADS,
        )
        x, inverse = _inverse(x, there)
        total += tl.sum(x * inverse[:, None], 0)
    tl.store(sums + (pair * tl.num_programs(0) + split) * BLOCK_D + tl.arange(0, BLOCK_D), total)


@triton.jit
def _worth(
    keys,
    scales,
    mean,
    held,
    sums,
    worth,
    worth_row,
    worth_head,
    slots,
    splits,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    BIAS: tl.constexpr,
    CENTRED: tl.constexpr,
    NATIVE: tl.constexpr,
    QUADS: tl.constexpr,
):
    head, row = tl.program_id(1), tl.program_id(2)
    pair = row.to(tl.int64) * tl.num_programs(1) + head
    part = tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    total = tl.load(
        sums + (pair * splits + part)[:, None] * BLOCK_D + d[None, :], mask=(part < splits)[:, None], other=0.0
    )
    total = tl.sum(total, 0)
    length = tl.sqrt_rn(tl.sum(total * total, 0))
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = tl.load(held + pair * slots + s, mask=s < slots, other=0) != 0
    x = _keys(
        keys, scales, mean, pair, head, s, slots, HEAD_DIM, WIDTH, BLOCK_D, BITS, WORDS, BIAS, CENTRED, NATIVE, QUADS
    )
    x, inverse = _inverse(x, there)
    along = tl.sum(x * total[None, :], 1) * inverse
    along = tl.where(length > 0, -along / tl.where(length > 0, length, 1.0), 0.0)
    tl.store(worth + row.to(tl.int64) * worth_row + head * worth_head + s, along, mask=s < slots)


def distinctness(
    *parts: tuple[Tensor, Tensor | None, Tensor], mean: Tensor | None = None, width: int | None = None
) -> Tensor:
    """Tell how far each key points from the mean direction of all that are held: minus the cosine with their sum.

    Parameters
    ----------
    *parts : tuple of (Tensor, Tensor or None, Tensor)
        Keys, their scales and whether each holds a token that may stay. Keys are ``[batch, kv_heads, slots, head_dim]``
        without scales, or codes of `width` coordinates with scales float16 ``[batch, kv_heads, slots]``; held is bool
        ``[batch, kv_heads, slots]``; all contiguous. Several parts, all coded or none, count as one sequence of slots:
        what is stored and what a chunk brings.
    mean : Tensor or None
        float32 ``[kv_heads, width]``: what was subtracted from coded keys, **rotated**.
    width : int or None
        Coordinates of coded keys; None where none is.

    Returns
    -------
    Tensor
        float32 ``[batch, kv_heads, slots of all parts]``, 0 where nothing is held.
    """
    parts = tuple(part for part in parts if part[0].shape[2])
    batch, kv_heads = parts[0][0].shape[:2]
    device = parts[0][0].device
    native = device.type == "cuda"
    block = 32
    splits = [min(32, triton.cdiv(keys.shape[2], block)) for keys, _, _ in parts]
    worth = torch.empty((batch, kv_heads, sum(k.shape[2] for k, _, _ in parts)), dtype=torch.float32, device=device)
    wide = triton.next_power_of_2(max(parts[0][0].shape[3] if width is None else width, 16))
    partial = [torch.empty((batch, kv_heads, n, wide), dtype=torch.float32, device=device) for n in splits]

    def options(keys: Tensor, scales: Tensor | None) -> dict[str, int | float | bool]:
        bits = 16 if scales is None or width is None else keys.shape[3] * 8 // width
        return {
            "HEAD_DIM": keys.shape[3],
            "WIDTH": width or 0,
            "BLOCK_D": wide,
            "BLOCK": block,
            "BITS": bits,
            "WORDS": wide * bits // 32,
            "BIAS": bias(bits),
            "CENTRED": mean is not None and bits < 16,
            "NATIVE": native,
            "QUADS": QUADS,
        }

    given = []
    for keys, scales, held in parts:
        whole = scales is not None and keys.shape[3] % 4 == 0
        given.append(
            (
                keys.view(torch.int32) if whole else keys,
                scales if scales is not None else held,
                mean if mean is not None else worth,
                held,
            )
        )
    for part, states, sums, count in zip(parts, given, partial, splits, strict=True):
        slots = part[0].shape[2]
        each = triton.cdiv(triton.cdiv(slots, block), count) * block
        _sum[(count, kv_heads, batch)](*states, sums, slots, each, **options(*part[:2]))
    sums = partial[0] if len(partial) == 1 else torch.cat(partial, 2)
    start = 0
    for part, states in zip(parts, given, strict=True):
        slots = part[0].shape[2]
        _worth[(triton.cdiv(slots, block), kv_heads, batch)](
            *states,
            sums,
            worth[..., start:],
            *worth.stride()[:2],
            slots,
            sums.shape[2],
            BLOCK_P=triton.next_power_of_2(sums.shape[2]),
            **options(*part[:2]),
        )
        start += slots
    return worth
