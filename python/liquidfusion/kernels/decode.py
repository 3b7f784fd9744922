"""Decode: one new token per row attends over the slots where they lie, and the ledger learns what it looked at.

Two launches. `_attend` splits the slots of every (row, kv head) over programs; all query heads of a group share one read of the
keys and values, and the program that owns the slot of the new token writes it. `_merge` joins the splits and updates mass and peak.
Nothing is atomic, so two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import base2_logits, dot, precision

# ruff: noqa: N803 (Triton's constexpr parameters are upper case)

MAX_SPLITS = 64  # `_merge` holds one [splits, head_dim] tile of partial outputs in registers


@triton.jit
def _attend(
    q,
    k,
    v,
    keys,
    values,
    positions,
    ring,
    used,
    seen,
    logits,
    norms,
    partial,
    stats,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    keys_row,
    keys_head,
    keys_slot,
    values_row,
    values_head,
    values_slot,
    positions_row,
    positions_head,
    ring_row,
    ring_head,
    slots,
    ring_size,
    per_split,
    window,
    scale,
    softcap,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SCORED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    split = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    splits = tl.num_programs(0)
    kv_heads = tl.num_programs(1)
    start = split * per_split
    stop = min(start + per_split, slots)

    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    query_heads = head * GROUP + g
    in_dim = d < HEAD_DIM
    q_tile = tl.load(
        q + row * q_row + query_heads[:, None] * q_head + d[None, :],
        mask=(g < GROUP)[:, None] & in_dim[None, :],
        other=0.0,
    )
    keys += row * keys_row + head * keys_head
    values += row * values_row + head * values_head
    positions += row * positions_row + head * positions_head
    flat_heads = row * kv_heads * GROUP + query_heads

    now = tl.load(seen + row)
    target = tl.load(ring + row * ring_row + head * ring_head + tl.load(used + row) % ring_size)

    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for first in tl.range(start, stop, BLOCK_S, num_stages=STAGES):
        s = first + tl.arange(0, BLOCK_S)
        inside = s < stop
        position = tl.load(positions + s, mask=inside, other=-1)
        k_mask = inside[:, None]
        v_mask = (position >= 0)[:, None]  # an empty slot may hold NaN, and 0 * NaN would spread through the dot
        if HEAD_DIM != BLOCK_D:
            k_mask = k_mask & in_dim[None, :]
            v_mask = v_mask & in_dim[None, :]
        k_tile = tl.load(keys + s[:, None].to(tl.int64) * keys_slot + d[None, :], mask=k_mask, other=0.0)
        v_tile = tl.load(values + s[:, None].to(tl.int64) * values_slot + d[None, :], mask=v_mask, other=0.0)

        x = dot(q_tile, tl.trans(k_tile), tl.zeros([BLOCK_G, BLOCK_S], tl.float32), PRECISION)
        x = base2_logits(x, scale, softcap, CAPPED)
        visible = (position >= 0) & (s != target)
        if WINDOWED:
            visible = visible & (now - position < window)
        x = tl.where(visible[None, :], x, float("-inf"))
        if SCORED:
            tl.store(
                logits + flat_heads[:, None] * slots + s[None, :],
                x,
                mask=(g < GROUP)[:, None] & (inside & (s != target))[None, :],
            )
            if WEIGHTED:
                wide = v_tile.to(tl.float32)
                norm = tl.sqrt(tl.sum(wide * wide, 1))
                tl.store(norms + (row * kv_heads + head) * slots + s, norm, mask=inside & (s != target))

        higher = tl.maximum(top, tl.max(x, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(x - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(p, 1)
        acc = dot(p.to(v_tile.dtype), v_tile, acc * fade[:, None], PRECISION)
        top = higher

    if (target >= start) & (target < stop):
        # The new token never went through the loop: what its slot held before is masked there.
        k_new = tl.load(k + row * k_row + head * k_head + d, mask=in_dim, other=0.0)
        v_new = tl.load(v + row * v_row + head * v_head + d, mask=in_dim, other=0.0)
        tl.store(keys + target.to(tl.int64) * keys_slot + d, k_new, mask=in_dim)
        tl.store(values + target.to(tl.int64) * values_slot + d, v_new, mask=in_dim)
        tl.store(positions + target, now)
        wide = v_new.to(tl.float32)
        x_new = tl.sum(q_tile.to(tl.float32) * k_new.to(tl.float32)[None, :], 1)
        x_new = base2_logits(x_new, scale, softcap, CAPPED)
        if SCORED:
            tl.store(logits + flat_heads * slots + target, x_new, mask=g < GROUP)
            if WEIGHTED:
                tl.store(norms + (row * kv_heads + head) * slots + target, tl.sqrt(tl.sum(wide * wide, 0)))
        higher = tl.maximum(top, x_new)
        fade = tl.exp2(top - higher)
        p_new = tl.exp2(x_new - higher)
        total = total * fade + p_new
        acc = acc * fade[:, None] + p_new[:, None] * wide[None, :]
        top = higher

    part = flat_heads * splits + split
    tl.store(stats + part * 2, top, mask=g < GROUP)
    tl.store(stats + part * 2 + 1, total, mask=g < GROUP)
    tl.store(partial + part[:, None] * HEAD_DIM + d[None, :], acc, mask=(g < GROUP)[:, None] & in_dim[None, :])


@triton.jit
def _merge(
    out,
    mass,
    peak,
    ring,
    used,
    logits,
    norms,
    partial,
    stats,
    mass_row,
    mass_head,
    peak_row,
    peak_head,
    ring_row,
    ring_head,
    slots,
    ring_size,
    splits,
    mass_decay,
    peak_decay,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SCORED: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    block = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(1)
    first_head = (row * kv_heads + head) * GROUP
    part = tl.arange(0, BLOCK_P)

    if block < GROUP:
        d = tl.arange(0, BLOCK_D)
        parts = (first_head + block) * splits + part
        top = tl.load(stats + parts * 2, mask=part < splits, other=float("-inf"))
        total = tl.load(stats + parts * 2 + 1, mask=part < splits, other=0.0)
        acc = tl.load(
            partial + parts[:, None] * HEAD_DIM + d[None, :],
            mask=(part < splits)[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        highest = tl.max(top, 0)
        weight = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
        sums = tl.sum(total * weight, 0)
        result = tl.sum(acc * weight[:, None], 0) / tl.where(sums == 0.0, 1.0, sums)
        tl.store(out + (first_head + block) * HEAD_DIM + d, result.to(out.dtype.element_ty), mask=d < HEAD_DIM)

    if SCORED:
        g = tl.arange(0, BLOCK_G)
        parts = (first_head + g)[:, None] * splits + part[None, :]
        there = (g < GROUP)[:, None] & (part < splits)[None, :]
        top = tl.load(stats + parts * 2, mask=there, other=float("-inf"))
        total = tl.load(stats + parts * 2 + 1, mask=there, other=0.0)
        highest = tl.max(top, 1)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        sums = tl.sum(total * tl.exp2(top - highest[:, None]), 1)
        scale = tl.where(sums == 0.0, 0.0, 1.0 / (sums * GROUP))

        s = block * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = s < slots
        x = tl.load(
            logits + (first_head + g)[:, None] * slots + s[None, :],
            mask=(g < GROUP)[:, None] & inside[None, :],
            other=float("-inf"),
        )
        p = tl.sum(tl.exp2(x - highest[:, None]) * scale[:, None], 0)
        if WEIGHTED:
            p = p * tl.load(norms + (row * kv_heads + head) * slots + s, mask=inside, other=0.0)
        target = tl.load(ring + row * ring_row + head * ring_head + tl.load(used + row) % ring_size)
        old = inside & (s != target)
        mass += row * mass_row + head * mass_head + s
        peak += row * peak_row + head * peak_head + s
        tl.store(mass, tl.load(mass, mask=old, other=0.0) * mass_decay + p, mask=inside)
        tl.store(peak, tl.maximum(tl.load(peak, mask=old, other=0.0) * peak_decay, p), mask=inside)


def _config(
    slots: int, programs: int, head_dim: int, element: int, device: torch.device
) -> tuple[int, int, int, int, int]:
    """Choose (splits, slots per split, slots per tile, stages, warps) for `programs` pairs of row and kv head."""
    if device.type != "cuda":
        return min(2, triton.cdiv(slots, 16)), triton.cdiv(triton.cdiv(slots, 16), 2) * 16, 16, 1, 4
    tile = 64 if head_dim * element <= 256 else 32
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    tiles = triton.cdiv(slots, tile)
    # Two programs per multiprocessor hide each other's latency; a split shorter than one tile gains nothing.
    splits = max(1, min(tiles, MAX_SPLITS, 2 * processors // programs))
    per_split = triton.cdiv(tiles, splits) * tile
    return triton.cdiv(slots, per_split), per_split, tile, 3, 4


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    mass: Tensor | None,
    peak: Tensor | None,
    ring: Tensor,
    used: Tensor,
    seen: Tensor,
    scale: float,
    mass_decay: float,
    peak_decay: float,
    value_weighted: bool,
    softcap: float,
    window: int,
) -> Tensor:
    batch, query_heads, head_dim = q.shape
    kv_heads, slots = keys.shape[1:3]
    group = query_heads // kv_heads
    scored = mass is not None and peak is not None
    weighted = scored and value_weighted
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    splits, per_split, tile, stages, warps = _config(
        slots, batch * kv_heads, head_dim, keys.element_size(), keys.device
    )

    scratch = {"dtype": torch.float32, "device": q.device}
    out = torch.empty((batch, query_heads, head_dim), dtype=q.dtype, device=q.device)
    partial = torch.empty((batch, query_heads, splits, head_dim), **scratch)
    stats = torch.empty((batch, query_heads, splits, 2), **scratch)
    logits = torch.empty((batch, query_heads, slots), **scratch) if scored else stats
    norms = torch.empty((batch, kv_heads, slots), **scratch) if weighted else stats
    block_d = triton.next_power_of_2(head_dim)

    _attend[(splits, kv_heads, batch)](
        q,
        k,
        v,
        keys,
        values,
        positions,
        ring,
        used,
        seen,
        logits,
        norms,
        partial,
        stats,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        *positions.stride()[:2],
        *ring.stride()[:2],
        slots,
        ring.shape[2],
        per_split,
        window,
        scale,
        softcap,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_G=max(16, triton.next_power_of_2(group)),  # the matrix units take 16 rows at least
        BLOCK_D=block_d,
        BLOCK_S=tile,
        SCORED=scored,
        WEIGHTED=weighted,
        WINDOWED=window > 0,
        CAPPED=softcap > 0,
        PRECISION=precision(q.dtype, q.device),
        STAGES=stages,
        num_warps=warps,
    )
    block_s = 256 if q.device.type == "cuda" else triton.next_power_of_2(slots)
    blocks = max(group, triton.cdiv(slots, block_s)) if scored else group
    _merge[(blocks, kv_heads, batch)](
        out,
        mass if scored else stats,
        peak if scored else stats,
        ring,
        used,
        logits,
        norms,
        partial,
        stats,
        *(mass.stride()[:2] if mass is not None else (0, 0)),
        *(peak.stride()[:2] if peak is not None else (0, 0)),
        *ring.stride()[:2],
        slots,
        ring.shape[2],
        splits,
        mass_decay,
        peak_decay,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_G=triton.next_power_of_2(group),
        BLOCK_D=block_d,
        BLOCK_S=block_s,
        BLOCK_P=triton.next_power_of_2(splits),
        SCORED=scored,
        WEIGHTED=weighted,
        num_warps=4,
    )
    return out


_operator = torch.library.custom_op(
    "liquidfusion::decode", _run, mutates_args=("keys", "values", "positions", "mass", "peak")
)


@_operator.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    mass: Tensor | None,
    peak: Tensor | None,
    ring: Tensor,
    used: Tensor,
    seen: Tensor,
    *,
    scale: float,
    mass_decay: float,
    peak_decay: float,
    value_weighted: bool,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Attend with one new token per row over the slots, in place.

    Row b, kv head h overwrites slot ``ring[b, h, used[b] % R]`` with its new key and value, sets that slot's position to
    ``seen[b]`` and its scores to 0, attends to every slot whose position is 0 or more, and updates mass and peak of every slot.
    ``used`` and ``seen`` are read, never advanced. A ring entry of -1 writes no token.

    Parameters
    ----------
    q : Tensor
        Queries ``[batch, query_heads, head_dim]``; any strides.
    k, v : Tensor
        New keys and values ``[batch, kv_heads, head_dim]``; any strides.
    keys, values : Tensor
        Slots ``[batch, kv_heads, slots, head_dim]``, the last axis contiguous; written. Empty slots may hold anything, NaN included.
    positions : Tensor
        int32 ``[batch, kv_heads, slots]``, -1 = empty; written.
    mass, peak : Tensor or None
        float32 ``[batch, kv_heads, slots]``, 0 for empty slots; written. Both None: attention only.
    ring : Tensor
        int32 ``[batch, kv_heads, R]``: the slots to overwrite, in turn.
    used, seen : Tensor
        int32 ``[batch]`` on the device: ring entries consumed, tokens seen.
    scale : float
        Factor on the logits.
    mass_decay, peak_decay : float
        Factors by which the scores fade per token.
    value_weighted : bool
        Multiply the probabilities that enter the ledger by the float32 norm of the slot's value.
    softcap : float
        Logits become ``softcap * tanh(logit / softcap)``; 0 = off.
    window : int
        Only slots with ``seen - position < window`` are attended; 0 = off. The scores of the others fade.

    Returns
    -------
    Tensor
        ``[batch, query_heads, head_dim]`` in q's dtype; a query that sees no key gives 0.
    """
    # Outside torch.compile the dispatcher would only cost host time.
    call = _operator if torch.compiler.is_compiling() else _run
    return call(
        q,
        k,
        v,
        keys,
        values,
        positions,
        mass,
        peak,
        ring,
        used,
        seen,
        scale,
        mass_decay,
        peak_decay,
        value_weighted,
        softcap,
        window,
    )
