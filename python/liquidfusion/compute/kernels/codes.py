"""Codes of keys and values, as the kernels read and make them.

A vector of `width` coordinates is rotated and each coordinate becomes a level, an odd integer, of `bits` bits. Byte j
holds coordinate j in its lowest bits and j + width / parts, j + 2 width / parts, ... above it, `parts` = 8 / bits. Four
bytes make a word, and what a 16-bit lane of a shifted word holds becomes a bfloat16 by putting an exponent on it: one
shift and one logical operation make two coordinates. Such a number is its level plus `bias`, which is taken off the
products. 8 bits are two levels of 4 bits, of which the upper counts 16 times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, N806 (Triton's constexpr parameters are upper case)

STEPS = {8: 0.03076, 4: 0.3352, 2: 0.9957}
"""Distance of two levels by bits, in units of a vector's root mean square."""
# Triton 3.6 lays four neighbouring coordinates into a thread's registers, 3.9 two and two.
QUADS = triton.__version__ < "3.7"


def low(width: int, bits: int) -> int:
    """Choose the `LOW` of `rotate`: so many rows of each part of a byte come in whole blocks."""
    rows = width * min(bits, 8) // 8
    return next(size for size in (8, 4, 2, 1) if rows % size == 0)


def bias(bits: int) -> float:
    """Tell what `unpack` adds to every level."""
    return 12.0 if bits == 2 else 48.0


def as_words(codes: Tensor, bits: int) -> Tensor:
    """View codes as the int32 that a kernel loads, where a vector makes whole words."""
    return codes.view(torch.int32) if bits < 16 and codes.shape[-1] % 4 == 0 else codes


def words_of(width: int, bits: int) -> int:
    """Words of a vector, up to the next power of two; the matrix units take 16 coordinates at least."""
    return int(triton.next_power_of_2(max(triton.cdiv(width * bits // 8, 4), 1 if bits == 2 else 2)))


@triton.jit
def _two(word, SHIFT: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Two bfloat16 of a word: levels plus bias of the codes that lie SHIFT above the lowest bit of each half."""
    # Right below the exponent of 8 or 32, and above a 1, a code c counts twice: 9 + 2c of 2 bits, 33 + 2c of 4.
    PLACE: tl.constexpr = 5 if BITS == 2 else 3
    shifted = word << (PLACE - SHIFT) if SHIFT <= PLACE else word >> (SHIFT - PLACE)
    if NATIVE:
        # The assembler of CUDA 12 makes two instructions of an AND and an OR with constants.
        ASM: tl.constexpr = (
            "lop3.b32 $0, $1, 0x00600060, 0x41104110, 0xEA;"
            if BITS == 2
            else "lop3.b32 $0, $1, 0x00780078, 0x42044204, 0xEA;"
        )
        pair = tl.inline_asm_elementwise(ASM, "=r,r", [shifted], dtype=tl.int32, is_pure=True, pack=1)
    elif BITS == 2:
        pair = (shifted & 0x00600060) | 0x41104110
    else:
        pair = (shifted & 0x00780078) | 0x42044204
    low = (pair & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def unpack(words, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Levels plus bias of words [slots, words], bfloat16 [slots, words, 2, 2, planes].

    Byte 2e + o of a word stands at [e, o].
    """
    if BITS == 2:
        even = tl.join(
            tl.join(_two(words, 0, 2, NATIVE), _two(words, 8, 2, NATIVE)),
            tl.join(_two(words, 4, 2, NATIVE), _two(words, 12, 2, NATIVE)),
        )
        odd = tl.join(
            tl.join(_two(words, 2, 2, NATIVE), _two(words, 10, 2, NATIVE)),
            tl.join(_two(words, 6, 2, NATIVE), _two(words, 14, 2, NATIVE)),
        )
        tile = tl.join(even, odd).reshape([words.shape[0], words.shape[1], 2, 2, 4])
    else:
        tile = tl.join(
            tl.join(_two(words, 0, 4, NATIVE), _two(words, 8, 4, NATIVE)),
            tl.join(_two(words, 4, 4, NATIVE), _two(words, 12, 4, NATIVE)),
        )
    return tile


@triton.jit
def key_rows(words, BITS: tl.constexpr, NATIVE: tl.constexpr, QUADS: tl.constexpr):
    """Rows of levels plus bias, [slots, coordinates] in the order of `key_order`."""
    S: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    T: tl.constexpr = min(W, 4)
    P: tl.constexpr = 4 if BITS == 2 else 2
    tile = unpack(words, BITS, NATIVE).reshape([S, T, W // T, 2, 2, P])
    tile = tile.permute(0, 5, 2, 1, 4, 3) if QUADS else tile.permute(0, 5, 2, 4, 1, 3)
    return tile.reshape([S, W * 4 * P])


@triton.jit
def key_order(WORDS: tl.constexpr, BITS: tl.constexpr, QUADS: tl.constexpr):
    """(byte, plane) of each coordinate of `key_rows`: a thread's coordinates lie in neighbouring words."""
    T: tl.constexpr = min(WORDS, 4)
    J: tl.constexpr = WORDS // T
    i = tl.arange(0, WORDS * 4 * (4 if BITS == 2 else 2))
    e = i % 2
    if QUADS:
        o = i // 2 % 2
        t = i // 4 % T
    else:
        t = i // 2 % T
        o = i // (2 * T) % 2
    j = i // (4 * T) % J
    return (t * J + j) * 4 + 2 * e + o, i // (4 * WORDS)


@triton.jit
def value_columns(words, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Columns of levels plus bias, [coordinates, slots] in the order of `value_order`."""
    S: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    V: tl.constexpr = min(W, 8)
    P: tl.constexpr = 4 if BITS == 2 else 2
    tile = unpack(words, BITS, NATIVE).reshape([S, V, W // V, 2, 2, P])
    return tile.permute(5, 4, 3, 2, 1, 0).reshape([W * 4 * P, S])


@triton.jit
def value_order(WORDS: tl.constexpr, BITS: tl.constexpr):
    """(byte, plane) of each coordinate of `value_columns`."""
    V: tl.constexpr = min(WORDS, 8)
    U: tl.constexpr = WORDS // V
    i = tl.arange(0, WORDS * 4 * (4 if BITS == 2 else 2))
    word = i % V * U + i // V % U
    return word * 4 + i // WORDS % 2 * 2 + i // (2 * WORDS) % 2, i // (4 * WORDS)


@triton.jit
def load_words(codes, slots, limit, WORDS: tl.constexpr, BYTES: tl.constexpr, EVEN: tl.constexpr):
    """Words [slots, WORDS] of the codes of one (row, kv head); beyond `limit`, unless EVEN, and beyond BYTES 0.

    `codes` points to int32, or to uint8 where a vector's bytes make no whole words.
    """
    w = tl.arange(0, WORDS)
    if EVEN and WORDS * 4 == BYTES:
        return tl.load(codes + slots[:, None] * WORDS + w[None, :])
    if BYTES % 4 == 0:
        mask = (slots < limit)[:, None]
        if WORDS * 4 != BYTES:
            mask = mask & (w < BYTES // 4)[None, :]
        return tl.load(codes + slots[:, None] * (BYTES // 4) + w[None, :], mask=mask, other=0)
    words = tl.zeros([slots.shape[0], WORDS], tl.int32)
    for b in tl.static_range(4):
        at = w * 4 + b
        byte = tl.load(
            codes + slots[:, None] * BYTES + at[None, :],
            mask=(slots < limit)[:, None] & (at < BYTES)[None, :],
            other=0,
        )
        words = words | (byte.to(tl.int32) << (8 * b))
    return words


@triton.jit
def _products(words, weights, total, NATIVE: tl.constexpr):
    """Add the products of four pairs of bytes to a total."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r", [words, weights, total], dtype=tl.int32, is_pure=True, pack=1
        )
    for b in tl.static_range(4):
        total += ((words >> (8 * b)) & 0xFF) * ((weights >> (8 * b)) & 0xFF)
    return total


@triton.jit
def squared_levels(words, WIDTH: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Sums of squares of levels, float32 [slots], of words [slots, words].

    With b bits (2c - top)^2 is top^2 - 4 c (top - c), and top - c is c with every bit turned.
    """
    TOP: tl.constexpr = 2**BITS - 1
    total = tl.zeros_like(words)
    if BITS == 8:
        total = _products(words, ~words, total, NATIVE)
    elif BITS == 4:
        total = _products(words & -0x0F0F0F10, ~words & -0x0F0F0F10, total, NATIVE) >> 8  # both count 16 times
        total = _products(words & 0x0F0F0F0F, ~words & 0x0F0F0F0F, total, NATIVE)
    else:
        for plane in tl.static_range(4):
            part = (words >> (2 * plane)) & 0x03030303
            total = _products(part, part ^ 0x03030303, total, NATIVE)
    return (TOP * TOP * WIDTH - 4 * tl.sum(total, 1)).to(tl.float32)


@triton.jit
def _mix(LOW: tl.constexpr):
    """The Hadamard matrix of LOW = 1, 2, 4 or 8 rows."""
    i = tl.arange(0, LOW)
    odd = i[:, None] & i[None, :]
    odd = odd ^ (odd >> 2)
    odd = (odd ^ (odd >> 1)) & 1
    return 1.0 - 2.0 * odd.to(tl.float32)


@triton.jit
def rotate(x, rotation, WIDTH: tl.constexpr, LOW: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Rotate a vector given as float32 [blocks, LOW]: [PARTS * ROWS, LOW], part p's blocks from p * ROWS on.

    A Hadamard matrix is one of its blocks' numbers times one of LOW rows, and `rotation` [WIDTH, WIDTH] holds the first
    where both its indices divide by LOW. Signs that differ inside a block stand beside the diagonal.
    """
    BLOCKS: tl.constexpr = WIDTH // LOW
    a = tl.arange(0, x.shape[0])
    i = tl.arange(0, LOW)
    own = tl.load(rotation + (a * LOW * (WIDTH + 1)), mask=a < BLOCKS, other=1.0)
    beside = tl.load(rotation + (a * LOW * (WIDTH + 1))[:, None] + i[None, :], mask=(a < BLOCKS)[:, None], other=1.0)
    x = tl.where(beside * own[:, None] > 0, x, -x)
    r = tl.arange(0, PARTS * ROWS)
    block = r // ROWS * (BLOCKS // PARTS) + r % ROWS
    there = (r % ROWS < BLOCKS // PARTS)[:, None] & (a < BLOCKS)[None, :]
    high = tl.load(rotation + (block * LOW * WIDTH)[:, None] + (a * LOW)[None, :], mask=there, other=0.0)
    y = tl.sum(high[:, :, None] * x[None, :, :], 1)
    return tl.sum(y[:, None, :] * _mix(LOW)[None, :, :], 2)


@triton.jit
def rotate_back(y, rotation, WIDTH: tl.constexpr, LOW: tl.constexpr):
    """Undo `rotate` for a vector [blocks, LOW]."""
    BLOCKS: tl.constexpr = WIDTH // LOW
    a = tl.arange(0, y.shape[0])
    i = tl.arange(0, LOW)
    own = tl.load(rotation + (a * LOW * (WIDTH + 1)), mask=a < BLOCKS, other=1.0)
    beside = tl.load(rotation + (a * LOW * (WIDTH + 1))[:, None] + i[None, :], mask=(a < BLOCKS)[:, None], other=1.0)
    there = (a < BLOCKS)[:, None] & (a < BLOCKS)[None, :]
    high = tl.load(rotation + (a * LOW * WIDTH)[:, None] + (a * LOW)[None, :], mask=there, other=0.0)
    x = tl.sum(high[:, :, None] * y[:, None, :], 0)
    x = tl.sum(x[:, None, :] * _mix(LOW)[None, :, :], 2)
    return tl.where(beside * own[:, None] > 0, x, -x)


@triton.jit
def encode(y, norm, there, WIDTH: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr):
    """(codes, levels) of rotated vectors of length `norm`, in any shape; float32, 0 where nothing is `there`."""
    TOP: tl.constexpr = 2**BITS - 1
    unit = norm * (STEP / WIDTH**0.5)
    unit = tl.where(unit > 0, unit, 1.0) + tl.zeros_like(y)
    code = tl.floor(tl.div_rn(y, unit) + 2.0 ** (BITS - 1))
    code = tl.where(there, tl.minimum(tl.maximum(code, 0.0), TOP), 0.0)
    return code, tl.where(there, 2.0 * code - TOP, 0.0)


@triton.jit
def bounded(scale, norm):
    """Make float16 of a scale. A vector that is not finite must not become one that is."""
    return tl.where(scale < 65504.0, scale, tl.where(norm < float("inf"), 65504.0, float("nan"))).to(tl.float16)


@triton.jit
def pack(codes, BITS: tl.constexpr):
    """Bytes [vectors, bytes] of codes [vectors, parts, bytes] as float32."""
    part = tl.arange(0, 8 // BITS)
    return tl.sum(codes.to(tl.int32) << (part * BITS)[None, :, None], 1).to(tl.uint8)
