"""Enter: the first launch of a decode step over codes rotates the queries and writes the new token to its slot."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import STEPS, bounded, encode, low, pack, rotate
from .common import chained

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, N806 (Triton's constexpr parameters are upper case)


@triton.jit
def _store_vector(
    new,
    mean,
    states,
    scales,
    first,
    rotation,
    pair,
    target,
    slots,
    FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    LOW: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Write one key or value to its slot, coded unless BITS is 16."""
    slot = pair * slots + target
    if BITS == 16:
        d = tl.arange(0, BLOCK_D)
        x = tl.load(new + d, mask=d < HEAD_DIM, other=0.0)
        tl.store(states + slot * HEAD_DIM + d, x.to(states.dtype.element_ty), mask=d < HEAD_DIM)
    else:
        PARTS: tl.constexpr = 8 // BITS
        i = tl.arange(0, LOW)[None, :]
        at = tl.arange(0, BLOCK_D // LOW)[:, None] * LOW + i
        x = tl.load(new + at, mask=at < HEAD_DIM, other=0.0).to(tl.float32)
        y = rotate(x, rotation, WIDTH, LOW, ROWS, PARTS)
        r = tl.arange(0, PARTS * ROWS)[:, None]
        there = r % ROWS < WIDTH // (LOW * PARTS)
        at = (r // ROWS * (WIDTH // (LOW * PARTS)) + r % ROWS) * LOW + i
        if CENTRED:
            y -= tl.load(mean + at, mask=there, other=0.0)
        if FIRST > 0 and target < FIRST:
            tl.store(first + (pair * FIRST + target) * WIDTH + at, y.to(first.dtype.element_ty), mask=there)
        y = tl.where(there, y, 0.0)
        norm = tl.sqrt_rn(tl.sum(tl.sum(y * y, 1), 0))
        code, level = encode(y, norm, there, WIDTH, BITS, STEP)
        scale = tl.div_rn(norm, tl.sqrt_rn(tl.sum(tl.sum(level * level, 1), 0)))
        packed = pack(code.reshape([1, PARTS, ROWS * LOW]), BITS).reshape([ROWS * LOW])
        byte = tl.arange(0, ROWS * LOW)
        BYTES: tl.constexpr = WIDTH * BITS // 8
        tl.store(states + slot * BYTES + byte, packed, mask=byte < BYTES)
        tl.store(scales + slot, bounded(scale, norm))


@triton.jit
def _enter(
    q,
    k,
    v,
    keys,
    key_scales,
    values,
    value_scales,
    key_first,
    value_first,
    positions,
    mass,
    peak,
    ring,
    used,
    seen,
    active,
    rotation,
    mean,
    queries,
    offsets,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    positions_row,
    positions_head,
    mass_row,
    mass_head,
    peak_row,
    peak_head,
    ring_row,
    ring_head,
    slots,
    ring_size,
    GROUP: tl.constexpr,
    K_FIRST: tl.constexpr,
    V_FIRST: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K_BITS: tl.constexpr,
    K_STEP: tl.constexpr,
    K_LOW: tl.constexpr,
    K_ROWS: tl.constexpr,
    V_BITS: tl.constexpr,
    V_STEP: tl.constexpr,
    V_LOW: tl.constexpr,
    V_ROWS: tl.constexpr,
    LOW: tl.constexpr,
    CENTRED: tl.constexpr,
    SCORED: tl.constexpr,
    ACTIVE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One vector per program: a query head of the group, the key or the value."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    vector = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(1)
    pair = row * kv_heads + head
    mean += head * WIDTH
    if vector < QUERIES:
        i = tl.arange(0, LOW)[None, :]
        at = tl.arange(0, BLOCK_D // LOW)[:, None] * LOW + i
        x = tl.load(q + row * q_row + (head * GROUP + vector) * q_head + at, mask=at < HEAD_DIM, other=0.0)
        y = rotate(x.to(tl.float32), rotation, WIDTH, LOW, BLOCK_D // LOW, 1)
        query = pair * GROUP + vector
        tl.store(queries + query * WIDTH + at, y.to(queries.dtype.element_ty), mask=at < WIDTH)
        if CENTRED:
            y = y * tl.load(mean + at, mask=at < WIDTH, other=0.0)
            tl.store(offsets + query, tl.sum(tl.sum(y, 1), 0))
    else:
        target = tl.load(ring + row * ring_row + head * ring_head + tl.load(used + row) % ring_size)
        alive = target >= 0
        if ACTIVE:
            alive = alive & (tl.load(active + row) != 0)
        if alive:
            if vector == QUERIES:
                _store_vector(
                    k + row * k_row + head * k_head,
                    mean,
                    keys,
                    key_scales,
                    key_first,
                    rotation,
                    pair,
                    target,
                    slots,
                    K_FIRST,
                    HEAD_DIM,
                    WIDTH,
                    BLOCK_D,
                    K_BITS,
                    K_STEP,
                    K_LOW,
                    K_ROWS,
                    CENTRED,
                )
                tl.store(positions + row * positions_row + head * positions_head + target, tl.load(seen + row))
                if SCORED:
                    tl.store(mass + row * mass_row + head * mass_head + target, 0.0)
                    tl.store(peak + row * peak_row + head * peak_head + target, 0.0)
            else:
                _store_vector(
                    v + row * v_row + head * v_head,
                    mean,
                    values,
                    value_scales,
                    value_first,
                    rotation,
                    pair,
                    target,
                    slots,
                    V_FIRST,
                    HEAD_DIM,
                    WIDTH,
                    BLOCK_D,
                    V_BITS,
                    V_STEP,
                    V_LOW,
                    V_ROWS,
                    False,
                )


def enter(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_slots: tuple[Tensor, Tensor | None, Tensor | None, int],
    value_slots: tuple[Tensor, Tensor | None, Tensor | None, int],
    positions: Tensor,
    mass: Tensor | None,
    peak: Tensor | None,
    ring: Tensor,
    used: Tensor,
    seen: Tensor,
    active: Tensor | None,
    rotation: Tensor,
    mean: Tensor | None,
    kind: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Write the new token; give the queries as the slots' keys want them, and their products with the keys' mean.

    Slots are given as (states or codes, scales, first, bits), `first` as of `decode_coded`. Of coded keys the queries
    are rotated ``[batch, query_heads, width]``, of dtype `kind`, and the products float32 ``[batch, query_heads]``.
    """
    keys, key_scales, key_first, key_bits = key_slots
    values, value_scales, value_first, value_bits = value_slots
    batch, query_heads, head_dim = q.shape
    kv_heads, slots = positions.shape[1:]
    group = query_heads // kv_heads
    width = rotation.shape[0]
    none = positions
    strides = (*mass.stride()[:2], *peak.stride()[:2]) if mass is not None and peak is not None else (0, 0, 0, 0)
    queries, offsets = q, q
    if key_bits < 16:
        queries = torch.empty((batch, query_heads, width), dtype=kind, device=q.device)
        offsets = torch.empty((batch, query_heads), dtype=torch.float32, device=q.device)
    rows = [triton.next_power_of_2(triton.cdiv(width * min(b, 8) // 8, low(width, b))) for b in (key_bits, value_bits)]
    own = group if key_bits < 16 else 0
    _enter[(own + 2, kv_heads, batch)](
        q,
        k,
        v,
        keys,
        key_scales if key_scales is not None else none,
        values,
        value_scales if value_scales is not None else none,
        key_first if key_first is not None else none,
        value_first if value_first is not None else none,
        positions,
        mass if mass is not None else none,
        peak if peak is not None else none,
        ring,
        used,
        seen,
        active if active is not None else none,
        rotation,
        mean if mean is not None else rotation,
        queries,
        offsets,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *positions.stride()[:2],
        *strides,
        *ring.stride()[:2],
        slots,
        ring.shape[2],
        GROUP=group,
        K_FIRST=key_first.shape[2] if key_first is not None else 0,
        V_FIRST=value_first.shape[2] if value_first is not None else 0,
        QUERIES=own,
        HEAD_DIM=head_dim,
        WIDTH=width,
        BLOCK_D=triton.next_power_of_2(width),
        K_BITS=key_bits,
        K_STEP=STEPS.get(key_bits, 0.0),
        K_LOW=low(width, key_bits),
        K_ROWS=rows[0],
        V_BITS=value_bits,
        V_STEP=STEPS.get(value_bits, 0.0),
        V_LOW=low(width, value_bits),
        V_ROWS=rows[1],
        LOW=low(width, 8),
        CENTRED=mean is not None,
        SCORED=mass is not None,
        ACTIVE=active is not None,
        CHAINED=chained(q.device),
        num_warps=1,
    )
    return queries, offsets
