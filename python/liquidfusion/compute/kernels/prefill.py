"""Prefill: a chunk of tokens attends to the stored slots and itself, and every column learns how it was looked at.

The attention is torch's fused one where nothing but causality is asked for, else `_attend`; both give the
log-sum-exp of every query. `_score` then recomputes the logits tile by tile, keys resident and queries streaming,
and takes the decayed sum and maximum of the group's mean probability down each column. One program owns a column, so
nothing is atomic and two runs give the same bits. Memory is linear in the chunk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import LOG2E, base2_logits, dot, look_weight, precision

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, N806 (Triton's constexpr parameters are upper case)


@triton.jit
def _attend_tile(
    q_tile,
    query_ages,
    top,
    total,
    acc,
    keys,
    values,
    keys_column,
    values_column,
    columns,
    limit,
    column_ages,
    scale,
    softcap,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax. A column's age is -1 where there is no token, so no query is that young."""
    d = tl.arange(0, BLOCK_D)
    there = (columns < limit) & (column_ages >= 0)
    mask = there[:, None] & (d < HEAD_DIM)[None, :]
    k_tile = tl.load(keys + columns[:, None].to(tl.int64) * keys_column + d[None, :], mask=mask, other=0.0)
    v_tile = tl.load(values + columns[:, None].to(tl.int64) * values_column + d[None, :], mask=mask, other=0.0)
    x = dot(q_tile, tl.trans(k_tile), tl.zeros([q_tile.shape[0], k_tile.shape[0]], tl.float32), PRECISION)
    x = base2_logits(x, scale, softcap, CAPPED)
    distance = column_ages[None, :] - query_ages[:, None]
    visible = there[None, :] & (query_ages >= 0)[:, None] & (distance >= 0)
    if WINDOWED:
        visible = visible & (distance < window)
    x = tl.where(visible, x, float("-inf"))
    higher = tl.maximum(top, tl.max(x, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(x - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(p, 1)
    acc = dot(p.to(v_tile.dtype), v_tile, acc * fade[:, None], PRECISION)
    return higher, total, acc


@triton.jit
def _attend(
    q,
    k,
    v,
    keys,
    values,
    positions,
    ages,
    ends,
    sinks,
    out,
    lse,
    q_row,
    q_head,
    q_column,
    k_row,
    k_head,
    k_column,
    v_row,
    v_head,
    v_column,
    keys_row,
    keys_head,
    keys_column,
    values_row,
    values_head,
    values_column,
    positions_row,
    positions_head,
    out_row,
    out_head,
    out_column,
    queries,
    slots,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    query_head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    query_heads = tl.num_programs(1)
    head = query_head // GROUP
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q  # the longest first
    i = first + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    query_ages = tl.load(ages + row * queries + i, mask=i < queries, other=-1)
    q_tile = tl.load(
        q + row * q_row + query_head * q_head + i[:, None].to(tl.int64) * q_column + d[None, :],
        mask=(i < queries)[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    end = tl.load(ends + row)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    if SINKS:
        top = tl.zeros([BLOCK_Q], tl.float32) + tl.load(sinks + query_head) * LOG2E
        total += 1.0
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    for start in tl.range(0, slots, BLOCK_K, num_stages=STAGES):
        s = start + tl.arange(0, BLOCK_K)
        position = tl.load(positions + row * positions_row + head * positions_head + s, mask=s < slots, other=-1)
        top, total, acc = _attend_tile(
            q_tile,
            query_ages,
            top,
            total,
            acc,
            keys + row * keys_row + head * keys_head,
            values + row * values_row + head * values_head,
            keys_column,
            values_column,
            s,
            slots,
            tl.where(position >= 0, end - 1 - position, -1),
            scale,
            softcap,
            window,
            HEAD_DIM,
            BLOCK_D,
            WINDOWED,
            CAPPED,
            PRECISION,
        )
    begin = 0
    if WINDOWED and not PADDED:  # padding may lie between two tokens of one window
        begin = tl.maximum(first - window + 1, 0) // BLOCK_K * BLOCK_K
    for start in tl.range(begin, min(first + BLOCK_Q, queries), BLOCK_K, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_K)
        column_ages = tl.load(ages + row * queries + j, mask=j < queries, other=-1)
        top, total, acc = _attend_tile(
            q_tile,
            query_ages,
            top,
            total,
            acc,
            k + row * k_row + head * k_head,
            v + row * v_row + head * v_head,
            k_column,
            v_column,
            j,
            queries,
            column_ages,
            scale,
            softcap,
            window,
            HEAD_DIM,
            BLOCK_D,
            WINDOWED,
            CAPPED,
            PRECISION,
        )
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out + row * out_row + query_head * out_head + i[:, None].to(tl.int64) * out_column + d[None, :],
        acc.to(out.dtype.element_ty),
        mask=(i < queries)[:, None] & (d < HEAD_DIM)[None, :],
    )
    # +inf for a query that sees nothing makes every exp2(x - lse) of it 0.
    log = tl.where(total == 0.0, float("inf"), (top + tl.log2(total)) / LOG2E)
    tl.store(lse + (row * query_heads + query_head) * queries + i, log, mask=i < queries)


@triton.jit
def _join(
    out,
    lse,
    other,
    other_lse,
    out_row,
    out_head,
    out_column,
    other_row,
    other_head,
    other_column,
    queries,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Merge two softmaxes over disjoint keys into the first."""
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    there = i < queries
    at = (row * tl.num_programs(1) + head) * queries + i
    a = tl.load(lse + at, mask=there, other=0.0)
    b = tl.load(other_lse + at, mask=there, other=0.0)
    highest = tl.maximum(a, b)
    weight_a = tl.exp2((a - highest) * LOG2E)
    weight_b = tl.exp2((b - highest) * LOG2E)
    total = weight_a + weight_b
    mask = there[:, None] & (d < HEAD_DIM)[None, :]
    i = i[:, None].to(tl.int64)
    mine = out + row * out_row + head * out_head + i * out_column + d[None, :]
    x = tl.load(mine, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(other + row * other_row + head * other_head + i * other_column + d[None, :], mask=mask, other=0.0)
    x = (x * weight_a[:, None] + y.to(tl.float32) * weight_b[:, None]) / total[:, None]
    tl.store(mine, x.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + at, highest + tl.log2(total) / LOG2E, mask=there)


@triton.jit
def _prepare(
    lse,
    ages,
    shift,
    ratios,
    queries,
    log_fold,
    log_ratio,
    log_group,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Lay out what `_score` subtracts from a logit in base 2, [row, kv head, tile, head in group, query in tile].

    It holds the log-sum-exp, the group's size and the slower of the two decays, so that one exp2 does all three;
    +inf for what must count nothing. `ratios` is the other decay over that one, [row, tile, query in tile].
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    tiles = tl.num_programs(0)
    g = tl.arange(0, BLOCK_G)
    i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    age = tl.load(ages + row * queries + i, mask=i < queries, other=-1) if PADDED else queries - 1 - i
    there = (g < GROUP)[:, None] & (age >= 0)[None, :]
    heads = (row * tl.num_programs(1) + head) * GROUP + g
    x = tl.load(lse + heads[:, None] * queries + i[None, :], mask=there, other=float("inf"))
    wide = age.to(tl.float32)
    x = x * LOG2E + log_group - (wide * log_fold)[None, :]
    at = ((row * tl.num_programs(1) + head) * tiles + tile) * BLOCK_G * BLOCK_Q
    tl.store(shift + at + g[:, None] * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :], x)
    if head == 0:
        tl.store(ratios + row * tiles * BLOCK_Q + i, tl.exp2(tl.maximum(wide, 0.0) * log_ratio))


@triton.jit
def _score_tiles(
    q,
    k_tile,
    shift,
    ratios,
    shift_start,
    log_ratio,
    ages,
    column_ages,
    mass,
    peak,
    row,
    head,
    low,
    high,
    queries,
    scale,
    softcap,
    window,
    gap,
    reach,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    GENERAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    FOLDED: tl.constexpr,
    PEAKS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add query tiles high-1 down to low to a column block's sums and maxima.

    PEAKS says which looks count for the maxima: "all", "near" (up to `reach` tokens away, with CAUSAL or GENERAL) or
    "none".

    Downwards, so that programs that run together start at the same queries and share them in the L2 cache.
    """
    for step in tl.range(0, high - low, num_stages=STAGES):
        tile = high - 1 - step
        q_tile = q.load([row, head * GROUP, tile * BLOCK_Q, 0]).reshape([BLOCK_G * BLOCK_Q, BLOCK_D])
        x = dot(k_tile, q_tile.T, tl.zeros([BLOCK_K, BLOCK_G * BLOCK_Q], tl.float32), PRECISION)
        shifts = shift.load([shift_start + tile * (BLOCK_G * BLOCK_Q)])
        p = tl.exp2(base2_logits(x, scale, softcap, CAPPED) - shifts[None, :])
        if GENERAL:
            p = tl.where((shifts < float("inf"))[None, :], p, 0.0)  # a padding query may hold NaN
        p = tl.sum(tl.reshape(p, [BLOCK_K, BLOCK_G, BLOCK_Q]), 1)
        i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        if GENERAL or CAUSAL:
            query_ages = queries - 1 - i
            if GENERAL:
                query_ages = tl.load(ages + i, mask=i < queries, other=-1)
            distance = column_ages[:, None] - query_ages[None, :]
            visible = distance >= gap
            if WINDOWED:
                visible = visible & (distance < window)
            p = tl.where(visible, p, 0.0)
        if FOLDED == "both":
            if PEAKS == "all":
                peak = tl.maximum(peak, tl.max(p, 1))
            elif PEAKS == "near":
                peak = tl.maximum(peak, tl.max(tl.where(distance <= reach, p, 0.0), 1))
            mass += tl.sum(p, 1)
        else:
            # The other decay: read where padding makes the ages uneven, else a vector in registers times one power
            # per tile.
            if GENERAL:
                other = p * tl.load(ratios + i)[None, :]
                power = 1.0
            else:
                other = p * tl.exp2((BLOCK_Q - 1 - tl.arange(0, BLOCK_Q)) * log_ratio)[None, :]
                power = tl.exp2((queries - (tile + 1) * BLOCK_Q) * log_ratio)
            if FOLDED == "peak":
                if PEAKS == "all":
                    peak = tl.maximum(peak, tl.max(p, 1))
                elif PEAKS == "near":
                    peak = tl.maximum(peak, tl.max(tl.where(distance <= reach, p, 0.0), 1))
                mass += tl.sum(other, 1) * power
            else:
                if PEAKS == "all":
                    peak = tl.maximum(peak, tl.max(other, 1) * power)
                elif PEAKS == "near":
                    peak = tl.maximum(peak, tl.max(tl.where(distance <= reach, other, 0.0), 1) * power)
                mass += tl.sum(p, 1)
    return mass, peak


@triton.jit
def _score(
    q,
    k,
    v,
    keys,
    values,
    positions,
    ages,
    ends,
    counts,
    shift,
    ratios,
    mass,
    peak,
    new_mass,
    new_peak,
    k_row,
    k_head,
    k_column,
    v_row,
    v_head,
    v_column,
    keys_row,
    keys_head,
    keys_column,
    values_row,
    values_head,
    values_column,
    positions_row,
    positions_head,
    mass_row,
    mass_head,
    peak_row,
    peak_head,
    queries,
    slots,
    tiles,
    scale,
    softcap,
    window,
    gap,
    reach,
    horizon,
    log_mass_decay,
    log_peak_decay,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FOLDED: tl.constexpr,
    LIMITED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Heads vary fastest: the blocks with the most queries of every head go first, the short ones fill the end.
    head = tl.program_id(0)
    row = tl.program_id(2)
    kv_heads = tl.num_programs(0)
    wide_row = row.to(tl.int64)
    block = tl.program_id(1)
    stored_blocks = tl.cdiv(slots, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    in_dim = (d < HEAD_DIM)[None, :]
    count = tl.load(counts + row)
    end = tl.load(ends + row)
    ages += wide_row * queries

    low = 0
    high = tiles
    first = (block - stored_blocks) * BLOCK_K
    limit = reach
    if block < stored_blocks:
        limit = 0x7FFFFFFF  # a stored token has earned its place: looks at it count from anywhere
        columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
        there = columns < slots
        position = tl.load(positions + wide_row * positions_row + head * positions_head + columns, mask=there, other=-1)
        column_ages = tl.where(position >= 0, end - 1 - position, -1)
        base = keys + wide_row * keys_row + head * keys_head
        base += columns[:, None].to(tl.int64) * keys_column
        # Every query of the chunk sees every stored token; looks of the first ones may come from too near.
        diagonal = tl.minimum(tl.cdiv(gap, BLOCK_Q), tiles)
    else:
        columns = first + tl.arange(0, BLOCK_K)
        there = columns < queries
        if PADDED:
            column_ages = tl.load(ages + columns, mask=there, other=-1)
        else:
            column_ages = tl.where(there, queries - 1 - columns, -1)
        base = k + wide_row * k_row + head * k_head
        base += columns[:, None].to(tl.int64) * k_column
        low = first // BLOCK_Q
        diagonal = tl.minimum(low + tl.cdiv(BLOCK_K + gap, BLOCK_Q), tiles)
        if WINDOWED and not PADDED:
            high = tl.minimum(tiles, (first + BLOCK_K + window) // BLOCK_Q + 1)
    k_tile = tl.load(base + d[None, :], mask=there[:, None] & in_dim, other=0.0)
    # Now, or the keys would stay in registers all through the loop.
    wide = k_tile.to(tl.float32)
    squared_key = tl.sum(wide * wide, 1)

    sums = tl.zeros([BLOCK_K], tl.float32)
    maxima = tl.zeros([BLOCK_K], tl.float32)
    shift_start = (row * kv_heads + head) * tiles * (BLOCK_G * BLOCK_Q)
    ratios += wide_row * tiles * BLOCK_Q
    log_ratio = -tl.abs(log_mass_decay - log_peak_decay)
    GENERAL: tl.constexpr = PADDED or WINDOWED
    if not GENERAL:
        inner = high
        if LIMITED:
            # Tiles of which some queries, and of which all, are out of reach of a column of the block.
            outer = high
            late = high
            if block >= stored_blocks:
                inner = tl.minimum(tl.maximum((first + reach + 1) // BLOCK_Q, diagonal), tiles)
                outer = tl.minimum(tl.maximum(tl.cdiv(first + BLOCK_K + reach, BLOCK_Q), diagonal), tiles)
                late = tl.maximum(outer, (queries - horizon) // BLOCK_Q)
            sums, maxima = _score_tiles(
                q,
                k_tile,
                shift,
                ratios,
                shift_start,
                log_ratio,
                ages,
                column_ages,
                sums,
                maxima,
                row,
                head,
                late,
                high,
                queries,
                scale,
                softcap,
                window,
                gap,
                limit,
                GROUP,
                BLOCK_G,
                BLOCK_D,
                BLOCK_Q,
                BLOCK_K,
                False,
                False,
                False,
                CAPPED,
                FOLDED,
                "none",
                PRECISION,
                STAGES,
            )
            sums, maxima = _score_tiles(
                q,
                k_tile,
                shift,
                ratios,
                shift_start,
                log_ratio,
                ages,
                column_ages,
                sums,
                maxima,
                row,
                head,
                inner,
                outer,
                queries,
                scale,
                softcap,
                window,
                gap,
                limit,
                GROUP,
                BLOCK_G,
                BLOCK_D,
                BLOCK_Q,
                BLOCK_K,
                True,
                False,
                False,
                CAPPED,
                FOLDED,
                "near",
                PRECISION,
                1,
            )
        sums, maxima = _score_tiles(
            q,
            k_tile,
            shift,
            ratios,
            shift_start,
            log_ratio,
            ages,
            column_ages,
            sums,
            maxima,
            row,
            head,
            diagonal,
            inner,
            queries,
            scale,
            softcap,
            window,
            gap,
            limit,
            GROUP,
            BLOCK_G,
            BLOCK_D,
            BLOCK_Q,
            BLOCK_K,
            False,
            False,
            False,
            CAPPED,
            FOLDED,
            "all",
            PRECISION,
            STAGES,
        )
        high = diagonal
    sums, maxima = _score_tiles(
        q,
        k_tile,
        shift,
        ratios,
        shift_start,
        log_ratio,
        ages,
        column_ages,
        sums,
        maxima,
        row,
        head,
        low,
        high,
        queries,
        scale,
        softcap,
        window,
        gap,
        limit,
        GROUP,
        BLOCK_G,
        BLOCK_D,
        BLOCK_Q,
        BLOCK_K,
        True,
        GENERAL,
        WINDOWED,
        CAPPED,
        FOLDED,
        "near" if LIMITED else "all",
        PRECISION,
        1,
    )

    real = column_ages >= 0
    sums = tl.where(real, sums, 0.0)
    maxima = tl.where(real, maxima, 0.0)
    if WEIGHTED:
        if block < stored_blocks:
            base = values + wide_row * values_row + head * values_head
            base += columns[:, None].to(tl.int64) * values_column
        else:
            base = v + wide_row * v_row + head * v_head
            base += columns[:, None].to(tl.int64) * v_column
        wide = tl.load(base + d[None, :], mask=real[:, None] & in_dim, other=0.0).to(tl.float32)
        weight = look_weight(tl.where(real, squared_key, 0.0), tl.sum(wide * wide, 1))
        sums *= weight
        maxima *= weight
    target = (wide_row * kv_heads + head) * (slots + queries) + columns
    if block < stored_blocks:
        old = tl.load(mass + wide_row * mass_row + head * mass_head + columns, mask=real, other=0.0)
        sums += old * tl.exp2(count * log_mass_decay)
        old = tl.load(peak + wide_row * peak_row + head * peak_head + columns, mask=real, other=0.0)
        maxima = tl.maximum(maxima, old * tl.exp2(count * log_peak_decay))
    else:
        target += slots
    tl.store(new_mass + target, sums, mask=there)
    tl.store(new_peak + target, maxima, mask=there)


def _fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor] | None:
    """Run torch's fused attention: (out, natural log-sum-exp [batch, heads, queries]), or None where there is none."""
    if (
        q.device.type != "cuda"
        or q.dtype not in (torch.float16, torch.bfloat16)
        or q.shape[-1] % 8
        or q.shape[-1] > 256
    ):
        return None
    if q.shape[-1] <= 128 and torch.backends.cuda.cudnn_sdp_enabled():  # type: ignore[no-untyped-call]
        try:
            out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, 0.0, causal, False, scale=scale
            )[:2]
        except RuntimeError:  # no cuDNN, or no plan of its for this shape
            pass
        else:
            return out, lse.reshape(q.shape[:3])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return out, lse[..., : q.shape[2]].contiguous()


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    ages: Tensor,
    ends: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    plain: bool,
    padded: bool,
) -> tuple[Tensor, Tensor]:
    """Attend, and give the natural log-sum-exp; `plain`: causality is the only mask and every slot is filled."""
    batch, query_heads, queries, head_dim = q.shape
    slots = keys.shape[2]
    block_d = triton.next_power_of_2(head_dim)
    fused = _fused(q, k, v, True, scale) if plain else None
    if fused is not None:
        out, lse = fused
        if slots:
            other, other_lse = _fused(q, keys, values, False, scale) or (out, lse)
            block_q = 32
            _join[(triton.cdiv(queries, block_q), query_heads, batch)](
                out,
                lse,
                other,
                other_lse,
                *out.stride()[:3],
                *other.stride()[:3],
                queries,
                HEAD_DIM=head_dim,
                BLOCK_D=block_d,
                BLOCK_Q=block_q,
            )
        if sinks is not None:
            whole = torch.logaddexp(lse, sinks[:, None])
            out, lse = out.mul_((lse - whole).exp_()[..., None].to(out.dtype)), whole
        return out, lse

    out = torch.empty((batch, query_heads, queries, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, query_heads, queries), dtype=torch.float32, device=q.device)
    wide = head_dim * q.element_size() > 256
    if q.device.type != "cuda":
        block_q, block_k, warps, stages = 32, 32, 4, 1
    elif q.dtype == torch.float32:
        block_q, block_k, warps, stages = (32, 32, 4, 1) if wide else (64, 32, 4, 2)
    else:
        block_q, block_k, warps, stages = (64, 64, 4, 2) if wide else (128, 64, 8, 3)
    _attend[(triton.cdiv(queries, block_q), query_heads, batch)](
        q,
        k,
        v,
        keys,
        values,
        positions,
        ages,
        ends,
        sinks if sinks is not None else lse,
        out,
        lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *keys.stride()[:3],
        *values.stride()[:3],
        *positions.stride()[:2],
        *out.stride()[:3],
        queries,
        slots,
        scale,
        softcap,
        window,
        GROUP=query_heads // k.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        PADDED=padded,
        WINDOWED=window > 0,
        CAPPED=softcap > 0,
        SINKS=sinks is not None,
        PRECISION=precision(q.dtype, q.device),
        STAGES=stages,
        num_warps=warps,
    )
    return out, lse


def _log2(decay: float) -> float:
    """Take the base 2 logarithm of a decay; 0 gives a number so low that any power of it but the 0th is 0."""
    return math.log2(decay) if decay > 0 else -1e4


def _horizon(decay: float, queries: int) -> int:
    """Count the newest queries whose looks the mass can tell from none: others have faded to 2^-40 of their weight."""
    return queries if decay >= 1 else min(queries, math.ceil(-40 / _log2(decay)))


def _described(q: Tensor) -> Tensor:
    """Give a view or copy of q that a tensor descriptor accepts: last axis contiguous, rows and base on 16 bytes."""
    size = q.element_size()
    if q.stride(-1) == 1 and q.data_ptr() % 16 == 0 and all(s * size % 16 == 0 for s in q.stride()[:-1]):
        return q
    width = triton.cdiv(q.shape[-1] * size, 16) * 16 // size
    return torch.nn.functional.pad(q, (0, width - q.shape[-1]))[..., : q.shape[-1]]


def _tiles(q: Tensor, group: int) -> tuple[int, int, int, int]:
    """Choose (columns, query rows of all heads of a group, warps, stages) of a tile of `_score`."""
    heads = triton.next_power_of_2(group)
    if q.device.type != "cuda":
        return 32, max(64, heads), 4, 1
    if q.dtype == torch.float32:
        return (32, max(32, heads), 4, 1) if q.shape[-1] > 128 else (64, max(32, heads), 4, 2)
    return (128, max(64, heads), 8, 2) if q.shape[-1] > 128 else (128, max(128, heads), 8, 2)


def _scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    ages: Tensor,
    ends: Tensor,
    counts: Tensor,
    lse: Tensor,
    mass: Tensor,
    peak: Tensor,
    scale: float,
    mass_decay: float,
    peak_decay: float,
    value_weighted: bool,
    softcap: float,
    window: int,
    look_gap: int,
    peak_reach: int | None,
    padded: bool,
) -> tuple[Tensor, Tensor]:
    """Mass and peak of the stored slots and the chunk's columns, [batch, kv_heads, slots + queries] each."""
    batch, query_heads, queries, head_dim = q.shape
    kv_heads, slots = keys.shape[1:3]
    group = query_heads // kv_heads
    block_k, rows, warps, stages = _tiles(q, group)
    block_g = triton.next_power_of_2(group)
    block_q = rows // block_g
    block_d = triton.next_power_of_2(head_dim)
    tiles = triton.cdiv(queries, block_q)
    new: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    shift = torch.empty(batch * kv_heads * tiles * rows, **new)
    ratios = torch.empty(batch * tiles * block_q, **new)
    new_mass = torch.empty((batch, kv_heads, slots + queries), **new)
    new_peak = torch.empty_like(new_mass)
    slow, fast = max(mass_decay, peak_decay), min(mass_decay, peak_decay)
    padded = padded or fast < 0.9  # the powers of so fast a decay overflow in the last tile of the shorter path
    _prepare[(tiles, kv_heads, batch)](
        lse,
        ages,
        shift,
        ratios,
        queries,
        _log2(slow),
        _log2(fast) - _log2(slow),
        math.log2(group),
        GROUP=group,
        BLOCK_G=block_g,
        BLOCK_Q=block_q,
        PADDED=padded,
    )
    q = _described(q)
    _score[(kv_heads, triton.cdiv(slots, block_k) + triton.cdiv(queries, block_k), batch)](
        TensorDescriptor(q, list(q.shape), list(q.stride()), [1, block_g, block_q, block_d]),
        k,
        v,
        keys,
        values,
        positions,
        ages,
        ends,
        counts,
        TensorDescriptor(shift, [shift.numel()], [1], [rows]),
        ratios,
        mass,
        peak,
        new_mass,
        new_peak,
        *k.stride()[:3],
        *v.stride()[:3],
        *keys.stride()[:3],
        *values.stride()[:3],
        *positions.stride()[:2],
        *mass.stride()[:2],
        *peak.stride()[:2],
        queries,
        slots,
        tiles,
        scale,
        softcap,
        window,
        look_gap,
        peak_reach or 0,
        _horizon(mass_decay, queries),
        _log2(mass_decay),
        _log2(peak_decay),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_G=block_g,
        BLOCK_D=block_d,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        PADDED=padded,
        WINDOWED=window > 0,
        CAPPED=softcap > 0,
        WEIGHTED=value_weighted,
        FOLDED="both" if slow == fast else "peak" if peak_decay == slow else "mass",
        LIMITED=peak_reach is not None and peak_reach < queries - 1,
        PRECISION=precision(q.dtype, q.device),
        STAGES=stages,
        num_warps=warps,
        # Two programs of 8 warps share a multiprocessor: one multiplies while the other takes exponentials.
        **({"maxnreg": 128} if warps == 8 else {}),
    )
    return new_mass, new_peak


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    ages: Tensor,
    first: Tensor,
    mass: Tensor | None,
    peak: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    mass_decay: float,
    peak_decay: float,
    value_weighted: bool,
    softcap: float,
    window: int,
    look_gap: int,
    peak_reach: int | None,
    padded: bool,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    ages = ages.contiguous()
    counts = ages.amax(1) + 1
    ends = first + counts
    plain = not padded and softcap <= 0 and window <= 0 and (full or keys.shape[2] == 0)
    out, lse = _attention(q, k, v, keys, values, positions, ages, ends, sinks, scale, softcap, window, plain, padded)
    if mass is None or peak is None:
        return out, lse.new_empty(0), lse.new_empty(0)
    new_mass, new_peak = _scores(
        q,
        k,
        v,
        keys,
        values,
        positions,
        ages,
        ends,
        counts,
        lse,
        mass,
        peak,
        scale,
        mass_decay,
        peak_decay,
        value_weighted,
        softcap,
        window,
        look_gap,
        peak_reach,
        padded,
    )
    return out, new_mass, new_peak


_operator = torch.library.custom_op("liquidfusion::prefill", _run, mutates_args=())


@_operator.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    k, _, keys = rest[:3]
    shape = (0,) if rest[7] is None else (*keys.shape[:2], keys.shape[2] + k.shape[2])
    mass, peak = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    return torch.empty_like(q), mass, peak


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    ages: Tensor,
    mass: Tensor | None,
    peak: Tensor | None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    mass_decay: float,
    peak_decay: float,
    value_weighted: bool,
    softcap: float = 0.0,
    window: int = 0,
    look_gap: int = 0,
    peak_reach: int | None = None,
    first_position: int | Tensor = 0,
    padded: bool | None = None,
    full: bool | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attend with a chunk of new tokens over the stored slots and the chunk itself.

    Parameters
    ----------
    q : Tensor
        Queries ``[batch, query_heads, n, head_dim]``.
    k, v : Tensor
        New keys and values ``[batch, kv_heads, n, head_dim]``.
    keys, values : Tensor
        Stored slots ``[batch, kv_heads, slots, head_dim]``, the last axis contiguous; slots may be 0, empty slots
        may hold anything.
    positions : Tensor
        int32 ``[batch, kv_heads, slots]``, -1 = empty.
    ages : Tensor
        int32 ``[batch, n]``: real tokens after this one in the chunk, -1 = padding (which neither queries nor is
        attended).
    mass, peak : Tensor or None
        float32 ``[batch, kv_heads, slots]`` before the call, not written. Both None: attention only.
    sinks : Tensor or None
        float32 ``[query_heads]``: a learned logit per head in the softmax's denominator, neither scaled nor capped.
    scale : float
        Factor on the logits.
    mass_decay, peak_decay : float
        Factors by which the scores fade per token.
    value_weighted : bool
        Multiply what enters mass and peak by the length of the column's value over that of its key, in float32.
    softcap : float
        Logits become ``softcap * tanh(logit / softcap)``; 0 = off.
    window : int
        Only keys at a distance below it are attended; 0 = off.
    look_gap : int
        The ledger counts a look only at a distance of at least this many tokens.
    peak_reach : int or None
        A look at a token of the chunk counts for its peak only at a distance of at most this many tokens; None: at any.
    first_position : int or Tensor
        Position of the first real token of the chunk, for all rows or int32 ``[batch]`` on the device.
    padded, full : bool or None
        Whether `ages` contains -1, and whether every slot is filled. None: found out, at the price of waiting for
        the device.

    Returns
    -------
    out : Tensor
        ``[batch, query_heads, n, head_dim]``; a query that sees no key gives 0.
    mass, peak : Tensor or None
        float32 ``[batch, kv_heads, slots + n]``, stored slots first, new columns after them; 0 where there is no
        token.
    """
    if padded is None:
        padded = bool((ages < 0).any())
    if full is None:
        full = keys.shape[2] == 0 or bool((positions >= 0).all())
    if isinstance(first_position, int):
        if window >= first_position + q.shape[2]:
            window = 0
        first_position = torch.full((q.shape[0],), first_position, dtype=torch.int32, device=q.device)
    call = _operator if torch.compiler.is_compiling() else _run
    out, new_mass, new_peak = call(
        q,
        k,
        v,
        keys,
        values,
        positions,
        ages,
        first_position,
        mass,
        peak,
        sinks,
        scale,
        mass_decay,
        peak_decay,
        value_weighted,
        softcap,
        window,
        look_gap,
        peak_reach,
        padded,
        full,
    )
    return (out, None, None) if mass is None else (out, new_mass, new_peak)
