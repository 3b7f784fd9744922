"""Encode: a chunk's keys or values become codes, in place in their slots or beside them; and codes become states again.

Rotations are products with a matrix of signs, which 16-bit numbers and small integers leave exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import QUADS, STEPS, as_words, bias, bounded, encode, key_order, key_rows, load_words, pack, words_of
from .common import dot, precision
from .first import key_tile

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, N806 (Triton's constexpr parameters are upper case)


@triton.jit
def _encode(
    source,
    new,
    codes,
    scales,
    states,
    rotation,
    mean,
    new_row,
    new_head,
    new_column,
    count,
    FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACED: tl.constexpr,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, head, heads = tl.program_id(2), tl.program_id(1), tl.num_programs(1)
    PARTS: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = WIDTH // PARTS
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = (row.to(tl.int64) * heads + head) * count
    column = tl.load(source + first + index, mask=index < count, other=-1) if PLACED else index
    moved = (column >= 0) & (index < count)
    if tl.max(moved.to(tl.int32), 0) > 0:
        d = tl.arange(0, BLOCK_D)
        start = row.to(tl.int64) * new_row + head.to(tl.int64) * new_head
        x = tl.load(
            new + start + column[:, None].to(tl.int64) * new_column + d[None, :],
            mask=moved[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        # Coordinates in the order of the codes: all that the lowest bits hold, then all of the next.
        c = tl.arange(0, PARTS * ROWS)
        real = c % ROWS < BYTES
        c = tl.where(real, c // ROWS * BYTES + c % ROWS, 0)
        signs = tl.load(
            rotation + c[None, :] * WIDTH + d[:, None], mask=real[None, :] & (d < WIDTH)[:, None], other=0.0
        )
        signs = tl.where(signs > 0, 1.0, tl.where(signs < 0, -1.0, 0.0)).to(x.dtype)
        y = dot(x, signs, tl.zeros([BLOCK, PARTS * ROWS], tl.float32), PRECISION)
        y = y * tl.abs(tl.load(rotation + c * (WIDTH + 1)))[None, :]
        if CENTRED:
            y -= tl.load(mean + head * WIDTH + c)[None, :]
        if FIRST > 0:
            to = states + ((row.to(tl.int64) * heads + head) * FIRST + index)[:, None] * WIDTH + c[None, :]
            tl.store(to, y.to(states.dtype.element_ty), mask=(moved & (index < FIRST))[:, None] & real[None, :])
        y = tl.where(real[None, :], y, 0.0)
        norm = tl.sqrt_rn(tl.sum(y * y, 1))
        code, level = encode(y, norm[:, None], real[None, :], WIDTH, BITS, STEP)
        scale = tl.div_rn(norm, tl.sqrt_rn(tl.sum(level * level, 1)))
        packed = pack(code.reshape([BLOCK, PARTS, ROWS]), BITS)
        byte = tl.arange(0, ROWS)
        at = (first + index)[:, None] * BYTES + byte[None, :]
        tl.store(codes + at, packed, mask=moved[:, None] & (byte < BYTES)[None, :])
        tl.store(scales + first + index, bounded(scale, norm), mask=moved)


def _launch(
    source: Tensor | None,
    new: Tensor,
    codes: Tensor,
    scales: Tensor,
    rotation: Tensor,
    mean: Tensor | None,
    first: Tensor | None,
) -> None:
    batch, kv_heads, count, code_bytes = codes.shape
    head_dim, width = new.shape[3], rotation.shape[0]
    bits = code_bytes * 8 // width
    if new.stride(3) != 1:
        new = new.contiguous()
    block = 32
    _encode[(triton.cdiv(count, block), kv_heads, batch)](
        source if source is not None else scales,
        new,
        codes,
        scales,
        first if first is not None else scales,
        rotation,
        mean if mean is not None else rotation,
        *new.stride()[:3],
        count,
        FIRST=first.shape[2] if first is not None else 0,
        HEAD_DIM=head_dim,
        WIDTH=width,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        BITS=bits,
        STEP=STEPS[bits],
        ROWS=triton.next_power_of_2(max(code_bytes, 16 * bits // 8)),
        BLOCK=block,
        PLACED=source is not None,
        CENTRED=mean is not None,
        PRECISION=precision(new.dtype, new.device),
    )


def encode_states(new: Tensor, rotation: Tensor, mean: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Code keys or values.

    Parameters
    ----------
    new : Tensor
        ``[batch, kv_heads, columns, head_dim]``.
    rotation : Tensor
        float32 ``[width, width]``, as of `decode_coded`.
    mean : Tensor or None
        float32 ``[kv_heads, width]``: what is subtracted, **rotated**.
    bits : int
        8, 4 or 2.

    Returns
    -------
    codes, scales : Tensor
        uint8 ``[batch, kv_heads, columns, width * bits / 8]`` and float16 ``[batch, kv_heads, columns]``.
    """
    shape = (*new.shape[:3], rotation.shape[0] * bits // 8)
    codes = torch.empty(shape, dtype=torch.uint8, device=new.device)
    scales = torch.empty(shape[:3], dtype=torch.float16, device=new.device)
    _launch(None, new, codes, scales, rotation, mean, None)
    return codes, scales


def place_coded(
    source: Tensor,
    new: Tensor,
    codes: Tensor,
    scales: Tensor,
    rotation: Tensor,
    mean: Tensor | None,
    first: Tensor | None = None,
) -> None:
    """Overwrite coded slots by columns of a chunk, in place: `place` for codes.

    Parameters
    ----------
    source : Tensor
        int32 ``[batch, kv_heads, slots]``, contiguous: the chunk's column that each slot gets; -1 = it keeps its token.
    new : Tensor
        Keys or values of the chunk ``[batch, kv_heads, columns, head_dim]``.
    codes, scales : Tensor
        uint8 ``[batch, kv_heads, slots, width * bits / 8]`` and float16 ``[batch, kv_heads, slots]``, contiguous.
    rotation, mean : Tensor
        As of `encode_states`.
    first : Tensor or None
        ``[batch, kv_heads, S, width]`` as of `decode_coded`, contiguous: slots below S are written there too.
    """
    _launch(source, new, codes, scales, rotation, mean, first)


@triton.jit
def _decode(
    codes,
    scales,
    first,
    rotation,
    mu,
    out,
    slots,
    FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    NATIVE: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, head, heads = tl.program_id(2), tl.program_id(1), tl.num_programs(1)
    pair = row.to(tl.int64) * heads + head
    BYTES: tl.constexpr = WIDTH * BITS // 8
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    codes += pair * slots * (BYTES // 4 if BYTES % 4 == 0 else BYTES)
    levels = key_rows(load_words(codes, s, slots, WORDS, BYTES, False), BITS, NATIVE, QUADS)
    byte, plane = key_order(WORDS, BITS, QUADS)
    at = byte if BITS == 8 else byte + plane * BYTES
    d = tl.arange(0, BLOCK_D)
    signs = tl.load(
        rotation + at[:, None] * WIDTH + d[None, :], mask=(byte < BYTES)[:, None] & (d < WIDTH)[None, :], other=0.0
    )
    signs = tl.where(signs > 0, 1.0, tl.where(signs < 0, -1.0, 0.0))
    if BITS == 8:
        signs = signs * tl.where(plane > 0, 16.0, 1.0)[:, None]
    x = dot(levels, signs.to(tl.bfloat16), tl.zeros([BLOCK, BLOCK_D], tl.float32), PRECISION)
    x -= BIAS * tl.sum(signs, 0)[None, :]
    # A column of blocks of one size has entries of one size.
    size = tl.abs(tl.load(rotation + d * (WIDTH + 1), mask=d < WIDTH, other=0.0))
    x = x * size[None, :] * tl.load(scales + pair * slots + s, mask=s < slots, other=0.0).to(tl.float32)[:, None]
    if FIRST > 0 and tl.program_id(0) * BLOCK < FIRST:
        apart = s < min(FIRST, slots)
        tile = key_tile(first + pair * FIRST * WIDTH, s, apart, WIDTH, BITS, WORDS, QUADS)
        whole = dot(tile, signs.to(tile.dtype), tl.zeros([BLOCK, BLOCK_D], tl.float32), PRECISION)
        x = tl.where(apart[:, None], whole * size[None, :], x)
    if CENTRED:
        x += tl.load(mu + head * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)[None, :]
    tl.store(
        out + (pair * slots + s)[:, None] * HEAD_DIM + d[None, :],
        x.to(out.dtype.element_ty),
        mask=(s < slots)[:, None] & (d < HEAD_DIM)[None, :],
    )


def decode_states(
    codes: Tensor,
    scales: Tensor,
    rotation: Tensor,
    mu: Tensor | None,
    head_dim: int,
    dtype: torch.dtype,
    first: Tensor | None = None,
) -> Tensor:
    """Make states of codes.

    Parameters
    ----------
    codes, scales : Tensor
        uint8 ``[batch, kv_heads, slots, width * bits / 8]`` and float16 ``[batch, kv_heads, slots]``, contiguous.
    rotation : Tensor
        float32 ``[width, width]``, as of `decode_coded`.
    mu : Tensor or None
        float32 ``[kv_heads, head_dim]``: what is added; **not** rotated.
    head_dim : int
        Coordinates of a state.
    dtype : torch.dtype
        Of the states.
    first : Tensor or None
        ``[batch, kv_heads, S, width]`` as of `decode_coded`, contiguous: what slots below S are made of, not codes.

    Returns
    -------
    Tensor
        ``[batch, kv_heads, slots, head_dim]``; of an empty slot whatever its codes say.
    """
    batch, kv_heads, slots, code_bytes = codes.shape
    width = rotation.shape[0]
    bits = code_bytes * 8 // width
    native = codes.device.type == "cuda"
    out = torch.empty((batch, kv_heads, slots, head_dim), dtype=dtype, device=codes.device)
    block = 64 if native else 32
    _decode[(triton.cdiv(slots, block), kv_heads, batch)](
        as_words(codes, bits),
        scales,
        first if first is not None else scales,
        rotation,
        mu if mu is not None else rotation,
        out,
        slots,
        FIRST=first.shape[2] if first is not None else 0,
        HEAD_DIM=head_dim,
        WIDTH=width,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        BITS=bits,
        WORDS=words_of(width, bits),
        BIAS=bias(bits),
        BLOCK=block,
        CENTRED=mu is not None,
        NATIVE=native,
        QUADS=QUADS,
        PRECISION=precision(torch.bfloat16, codes.device),
    )
    return out
