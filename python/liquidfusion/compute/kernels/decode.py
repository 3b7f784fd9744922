"""Decode: one new token per row attends over the slots where they lie, and the ledger learns what it looked at.

Two launches. `_attend` splits the slots of every (row, kv head) over programs; all query heads of a group share one
read of the keys and values, and the program that owns the slot of the new token writes it. `_merge` joins the splits
and updates mass and peak. Nothing is atomic, so two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import base2_logits, dot, look_weight, precision, squared_lengths

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803 (Triton's constexpr parameters are upper case)

MAX_SPLITS = 64  # `_merge` holds one [splits, head_dim] tile of partial outputs in registers


@triton.jit
def _attend(
    q,
    k,
    v,
    slot_keys,
    slot_values,
    keys,
    values,
    positions,
    mass,
    peak,
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
    mass_row,
    mass_head,
    peak_row,
    peak_head,
    ring_row,
    ring_head,
    slots,
    ring_size,
    per_split,
    window,
    gap,
    scale,
    softcap,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SCORED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    VALUED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    wide_row = row.to(tl.int64)
    splits = tl.num_programs(0)
    kv_heads = tl.num_programs(1)
    start = split * per_split
    stop = min(start + per_split, slots)

    # Slots are the rows of every product: the matrix units take 64 rows at a time, and a group has 8 queries at most.
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    in_group = g < GROUP
    in_dim = d < HEAD_DIM
    q_tile = tl.load(
        q + wide_row * q_row + (head * GROUP + g)[None, :] * q_head + d[:, None],
        mask=in_group[None, :] & in_dim[:, None],
        other=0.0,
    )
    positions += wide_row * positions_row + head * positions_head
    pair = wide_row * kv_heads + head
    logits += pair * slots * GROUP
    norms += pair * slots

    now = tl.load(seen + row)
    target = tl.load(ring + wide_row * ring_row + head * ring_head + tl.load(used + row) % ring_size)

    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_D, BLOCK_G], tl.float32)
    for first in tl.range(start, stop, BLOCK_S, num_stages=STAGES):
        s = first + tl.arange(0, BLOCK_S)
        k_tile = slot_keys.load([row, head, first, 0]).reshape([BLOCK_S, BLOCK_D])
        v_tile = slot_values.load([row, head, first, 0]).reshape([BLOCK_S, BLOCK_D])
        position = tl.load(positions + s, mask=s < stop, other=-1)
        x = dot(k_tile, q_tile, tl.zeros([BLOCK_S, BLOCK_G], tl.float32), PRECISION)
        x = base2_logits(x, scale, softcap, CAPPED)
        visible = (position >= 0) & (s != target)
        if WINDOWED:
            visible = visible & (now - position < window)
        x = tl.where(visible[:, None], x, float("-inf"))
        if SCORED:
            stays = (s < stop) & (s != target)
            tl.store(logits + s[:, None] * GROUP + g[None, :], x, mask=stays[:, None] & in_group[None, :])
            if WEIGHTED:
                norm = tl.full([BLOCK_S], 1.0, tl.float32)
                if VALUED:
                    norm = look_weight(
                        squared_lengths(k_tile, BLOCK_S, BLOCK_D, PRECISION),
                        squared_lengths(v_tile, BLOCK_S, BLOCK_D, PRECISION),
                    )
                counts = (position >= 0) & (now - position >= gap)
                tl.store(norms + s, tl.where(counts, norm, 0.0), mask=stays)

        higher = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(x - shift[None, :])
        fade = tl.exp2(top - shift)
        sums = sums * fade[None, :] + p
        acc = acc * fade[None, :]
        p = p.to(v_tile.dtype)
        # An empty slot may hold NaN, and 0 * NaN would spread through the product.
        if tl.min(tl.where(s < stop, position, 0), 0) < 0:
            acc = dot(tl.trans(tl.where((position >= 0)[:, None], v_tile, 0.0)), p, acc, PRECISION)
        else:
            acc = dot(tl.trans(v_tile), p, acc, PRECISION)
        top = higher
    total = tl.sum(sums, 0)

    if (target >= start) & (target < stop):
        # The new token never went through the loop: what its slot held before is masked there.
        k_new = tl.load(k + wide_row * k_row + head * k_head + d, mask=in_dim, other=0.0)
        v_new = tl.load(v + wide_row * v_row + head * v_head + d, mask=in_dim, other=0.0)
        wide_target = target.to(tl.int64)
        tl.store(keys + wide_row * keys_row + head * keys_head + wide_target * keys_slot + d, k_new, mask=in_dim)
        tl.store(
            values + wide_row * values_row + head * values_head + wide_target * values_slot + d, v_new, mask=in_dim
        )
        tl.store(positions + target, now)
        wide_k = k_new.to(tl.float32)
        wide_v = v_new.to(tl.float32)
        x_new = tl.sum(q_tile.to(tl.float32) * wide_k[:, None], 0)
        x_new = base2_logits(x_new, scale, softcap, CAPPED)
        if SCORED:
            tl.store(mass + wide_row * mass_row + head * mass_head + target, 0.0)
            tl.store(peak + wide_row * peak_row + head * peak_head + target, 0.0)
            tl.store(logits + target * GROUP + g, x_new, mask=in_group)
            if WEIGHTED:
                norm = look_weight(tl.sum(wide_k * wide_k, 0), tl.sum(wide_v * wide_v, 0)) if VALUED else 1.0
                tl.store(norms + target, tl.where(gap > 0, 0.0, norm))
        higher = tl.maximum(top, x_new)
        fade = tl.exp2(top - higher)
        p_new = tl.exp2(x_new - higher)
        total = total * fade + p_new
        acc = acc * fade[None, :] + p_new[None, :] * wide_v[:, None]
        top = higher

    part = (pair * GROUP + g) * splits + split
    tl.store(stats + part * 2, top, mask=in_group)
    tl.store(stats + part * 2 + 1, total, mask=in_group)
    tl.store(partial + part[None, :] * HEAD_DIM + d[:, None], acc, mask=in_group[None, :] & in_dim[:, None])


@triton.jit
def _merge(
    out,
    mass,
    peak,
    logits,
    norms,
    partial,
    stats,
    mass_row,
    mass_head,
    peak_row,
    peak_head,
    slots,
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
    CHAINED: tl.constexpr,
):
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    block = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    pair = row * tl.num_programs(1) + head
    part = tl.arange(0, BLOCK_P)

    if SCORED:
        g = tl.arange(0, BLOCK_G)
        in_group = g < GROUP
        parts = (pair * GROUP + g)[None, :] * splits + part[:, None]
        there = in_group[None, :] & (part < splits)[:, None]
        top = tl.load(stats + parts * 2, mask=there, other=float("-inf"))
        total = tl.load(stats + parts * 2 + 1, mask=there, other=0.0)
        s = block * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = s < slots
        x = tl.load(
            logits + (pair * slots + s)[:, None] * GROUP + g[None, :],
            mask=inside[:, None] & in_group[None, :],
            other=float("-inf"),
        )
        mass += row * mass_row + head * mass_head + s
        peak += row * peak_row + head * peak_head + s
        old_mass = tl.load(mass, mask=inside, other=0.0)
        old_peak = tl.load(peak, mask=inside, other=0.0)
        highest = tl.max(top, 0)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        sums = tl.sum(total * tl.exp2(top - highest[None, :]), 0)
        share = tl.where(sums == 0.0, 0.0, 1.0 / (sums * GROUP))
        p = tl.sum(tl.exp2(x - highest[None, :]) * share[None, :], 1)
        if WEIGHTED:
            p = p * tl.load(norms + pair * slots + s, mask=inside, other=0.0)
        tl.store(mass, old_mass * mass_decay + p, mask=inside)
        tl.store(peak, tl.maximum(old_peak * peak_decay, p), mask=inside)

    if block < GROUP:
        d = tl.arange(0, BLOCK_D)
        own = (pair * GROUP + block) * splits + part
        own_top = tl.load(stats + own * 2, mask=part < splits, other=float("-inf"))
        own_total = tl.load(stats + own * 2 + 1, mask=part < splits, other=0.0)
        acc = tl.load(
            partial + own[:, None] * HEAD_DIM + d[None, :],
            mask=(part < splits)[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        own_highest = tl.max(own_top, 0)
        weight = tl.exp2(own_top - tl.where(own_highest == float("-inf"), 0.0, own_highest))
        own_sum = tl.sum(own_total * weight, 0)
        result = tl.sum(acc * weight[:, None], 0) / tl.where(own_sum == 0.0, 1.0, own_sum)
        tl.store(out + (pair * GROUP + block) * HEAD_DIM + d, result.to(out.dtype.element_ty), mask=d < HEAD_DIM)


def _config(slots: int, programs: int, row_bytes: int, device: torch.device) -> tuple[int, int, int, int]:
    """Choose (splits, slots per split, slots per tile, stages) for `programs` pairs of row and kv head."""
    if device.type != "cuda":
        tiles, tile = triton.cdiv(slots, 16), 16
        splits, stages = min(tiles, 2), 1
    else:
        # Longer rows than 64 of 256 bytes no longer fit into the registers beside the products.
        tile = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
        tiles = triton.cdiv(slots, tile)
        # Two programs per multiprocessor hide each other's latency; a split shorter than one tile gains nothing.
        properties = torch.cuda.get_device_properties(device)
        places = 2 * properties.multi_processor_count
        splits, stages = max(1, min(tiles, MAX_SPLITS, places // programs)), 2
        # Three stages of two 16 KiB tiles must leave room for the second program (not on an A100).
        if 2 * programs > places and properties.shared_memory_per_multiprocessor >= 192 * 1024:
            # A last round of programs that leaves most multiprocessors idle takes as long as a full one.
            splits = min(tiles, max((1, 2, 4), key=lambda n: programs * n / triton.cdiv(programs * n, places)))
            stages = 3
    per_split = triton.cdiv(tiles, splits) * tile
    return triton.cdiv(slots, per_split), per_split, tile, stages


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
    look_gap: int,
) -> Tensor:
    batch, query_heads, head_dim = q.shape
    kv_heads, slots = keys.shape[1:3]
    group = query_heads // kv_heads
    scored = mass is not None and peak is not None
    weighted = scored and (value_weighted or look_gap > 0)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    splits, per_split, tile, stages = _config(slots, batch * kv_heads, head_dim * keys.element_size(), keys.device)

    scratch: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    out = torch.empty((batch, query_heads, head_dim), dtype=q.dtype, device=q.device)
    partial = torch.empty((batch, query_heads, splits, head_dim), **scratch)
    stats = torch.empty((batch, query_heads, splits, 2), **scratch)
    logits = torch.empty((batch, query_heads, slots), **scratch) if scored else stats
    norms = torch.empty((batch, kv_heads, slots), **scratch) if weighted else stats
    block_d = triton.next_power_of_2(head_dim)
    strides = (*mass.stride()[:2], *peak.stride()[:2]) if mass is not None and peak is not None else (0, 0, 0, 0)
    # The merge is launched while the splits still run and waits on the device for their end.
    chained = (
        q.device.type == "cuda"
        and torch.cuda.get_device_capability(q.device) >= (9, 0)
        and hasattr(tl.extra.cuda, "gdc_wait")
    )

    _attend[(splits, kv_heads, batch)](
        q,
        k,
        v,
        *(TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, tile, block_d]) for t in (keys, values)),
        keys,
        values,
        positions,
        mass if mass is not None else stats,
        peak if peak is not None else stats,
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
        *strides,
        *ring.stride()[:2],
        slots,
        ring.shape[2],
        per_split,
        window,
        look_gap,
        scale,
        softcap,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_G=max(8, triton.next_power_of_2(group)),  # the matrix units take 8 columns at least
        BLOCK_D=block_d,
        BLOCK_S=tile,
        SCORED=scored,
        WEIGHTED=weighted,
        VALUED=value_weighted,
        WINDOWED=window > 0,
        CAPPED=softcap > 0,
        PRECISION=precision(q.dtype, q.device),
        STAGES=stages,
        CHAINED=chained,
        num_warps=4,
    )
    block_s = 256 if q.device.type == "cuda" else triton.next_power_of_2(slots)
    blocks = max(group, triton.cdiv(slots, block_s)) if scored else group
    _merge[(blocks, kv_heads, batch)](
        out,
        mass if mass is not None else stats,
        peak if peak is not None else stats,
        logits,
        norms,
        partial,
        stats,
        *strides,
        slots,
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
        CHAINED=chained,
        num_warps=4,
        **({"launch_pdl": True} if chained else {}),
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
    look_gap: int = 0,
) -> Tensor:
    """Attend with one new token per row over the slots, in place.

    Row b, kv head h overwrites slot ``ring[b, h, used[b] % R]`` with its new key and value, sets that slot's
    position to ``seen[b]`` and its scores to 0, attends to every slot whose position is 0 or more, and updates mass
    and peak of every slot. ``used`` and ``seen`` are read, never advanced. A ring entry of -1 writes no token.

    Parameters
    ----------
    q : Tensor
        Queries ``[batch, query_heads, head_dim]``; any strides.
    k, v : Tensor
        New keys and values ``[batch, kv_heads, head_dim]``; any strides.
    keys, values : Tensor
        Slots ``[batch, kv_heads, slots, head_dim]``, the last axis contiguous; written. Empty slots may hold
        anything, NaN included.
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
        Multiply what enters the ledger by the length of the slot's value over that of its key, in float32.
    softcap : float
        Logits become ``softcap * tanh(logit / softcap)``; 0 = off.
    window : int
        Only slots with ``seen - position < window`` are attended; 0 = off. The scores of the others fade.
    look_gap : int
        The ledger counts a look only at a distance of at least this many tokens.

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
        look_gap,
    )
