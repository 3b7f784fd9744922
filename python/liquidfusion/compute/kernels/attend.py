"""Attend: the second launch of a decode step over codes, the slots of every (row, kv head) split over programs."""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import key_order, key_rows, load_words, squared_levels, value_columns, value_order
from .common import base2_logits, dot, look_weight, soften
from .first import attend_first

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, N806 (Triton's constexpr parameters are upper case)


@triton.jit
def attend(
    q,
    offsets,
    keys,
    key_scales,
    values,
    value_scales,
    key_first,
    value_first,
    positions,
    seen,
    active,
    mean,
    logits,
    norms,
    partial,
    stats,
    q_row,
    q_head,
    positions_row,
    positions_head,
    slots,
    per_split,
    window,
    gap,
    scale,
    softcap,
    GROUP: tl.constexpr,
    FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    K_BITS: tl.constexpr,
    K_WORDS: tl.constexpr,
    K_BIAS: tl.constexpr,
    V_BITS: tl.constexpr,
    V_WORDS: tl.constexpr,
    V_BIAS: tl.constexpr,
    CENTRED: tl.constexpr,
    SCORED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    VALUED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CHUNKED: tl.constexpr,
    CAPPED: tl.constexpr,
    ACTIVE: tl.constexpr,
    EVEN: tl.constexpr,
    NATIVE: tl.constexpr,
    QUADS: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Attend one split of the slots of one row and kv head, every query of the group at once."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    splits = tl.num_programs(0)
    pair = row * tl.num_programs(1) + head
    start = split * per_split
    stop = min(start + per_split, slots)
    K_BYTES: tl.constexpr = WIDTH * K_BITS // 8
    V_BYTES: tl.constexpr = WIDTH * V_BITS // 8
    # The lengths of centred keys need their products with the mean: two more columns of queries, its upper and its
    # lower bits.
    MEANS: tl.constexpr = VALUED and CENTRED and WEIGHTED

    g = tl.arange(0, BLOCK_G)
    in_group = g < GROUP
    positions += row * positions_row + head * positions_head
    logits += pair * slots * GROUP
    norms += pair * slots
    keys += pair * slots * (HEAD_DIM if K_BITS == 16 else K_BYTES // 4 if K_BYTES % 4 == 0 else K_BYTES)
    values += pair * slots * (HEAD_DIM if V_BITS == 16 else V_BYTES // 4 if V_BYTES % 4 == 0 else V_BYTES)
    key_scales += pair * slots
    value_scales += pair * slots
    d = tl.arange(0, BLOCK_D)

    if CHAINED:
        tl.extra.cuda.gdc_wait()
    now = tl.load(seen + row)
    if CHUNKED:
        window = now % window + 1
    if ACTIVE:
        stop = tl.where(tl.load(active + row) != 0, stop, start)
    if K_BITS == 16:
        q_tile = tl.load(
            q + row * q_row + (head * GROUP + g)[None, :] * q_head + d[:, None],
            mask=in_group[None, :] & (d < HEAD_DIM)[:, None],
            other=0.0,
        )
    else:
        byte, plane = key_order(K_WORDS, K_BITS, QUADS)
        at = byte + plane * K_BYTES if K_BITS < 8 else byte
        in_key = byte < K_BYTES
        q_tile = tl.load(
            q + row * q_row + (head * GROUP + g)[None, :] * q_head + at[:, None],
            mask=in_group[None, :] & in_key[:, None],
            other=0.0,
        )
        if MEANS:
            mu = tl.load(mean + head * WIDTH + at, mask=in_key, other=0.0)
            upper = mu.to(TYPE)
            lower = (mu - upper.to(tl.float32)).to(TYPE)
            q_tile = tl.where((g == GROUP)[None, :], upper[:, None], q_tile)
            q_tile = tl.where((g == GROUP + 1)[None, :], lower[:, None], q_tile)
            mu = tl.load(mean + head * WIDTH + d, mask=d < WIDTH, other=0.0)
            squared_mean = tl.sum(mu * mu, 0)
        if K_BITS == 8:
            q_tile = (q_tile.to(tl.float32) * tl.where(plane > 0, 16.0, 1.0)[:, None]).to(TYPE)
        key_bias = K_BIAS * tl.sum(q_tile.to(tl.float32), 0)
        if CENTRED:
            offset = tl.load(offsets + pair * GROUP + g, mask=in_group, other=0.0)

    s = start + tl.arange(0, BLOCK_S)
    # One tile ahead of their use: what is this small is not loaded in stages.
    key_scale = tl.full([BLOCK_S], 1.0, tl.float32)
    value_scale = tl.full([BLOCK_S], 1.0, tl.float32)
    if K_BITS < 16:
        key_scale = tl.load(key_scales + s, mask=s < stop, other=0.0).to(tl.float32)
    if V_BITS < 16:
        value_scale = tl.load(value_scales + s, mask=s < stop, other=0.0).to(tl.float32)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    counted = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    if V_BITS == 16:
        acc = tl.zeros([BLOCK_D, BLOCK_G], tl.float32)
    else:
        acc = tl.zeros([V_WORDS * 4 * (4 if V_BITS == 2 else 2), BLOCK_G], tl.float32)
    if FIRST > 0:
        top, total, acc = attend_first(
            q_tile,
            offset if CENTRED else 0.0,
            keys,
            values,
            key_first + pair * FIRST * WIDTH,
            value_first + pair * FIRST * WIDTH,
            positions,
            logits,
            now,
            start,
            stop,
            window,
            scale,
            softcap,
            acc,
            GROUP,
            FIRST,
            HEAD_DIM,
            WIDTH,
            BLOCK_G,
            BLOCK_D,
            K_BITS,
            K_WORDS,
            V_BITS,
            V_WORDS,
            CENTRED,
            SCORED,
            WINDOWED,
            CAPPED,
            QUADS,
            TYPE,
            PRECISION,
        )
        sums = tl.where((tl.arange(0, BLOCK_S) == 0)[:, None], total[None, :], 0.0)
    for begin in tl.range(start, stop, BLOCK_S, num_stages=STAGES):
        s = begin + tl.arange(0, BLOCK_S)
        ahead = s + BLOCK_S
        if EVEN:
            position = tl.load(positions + s)
            inside = tl.full([BLOCK_S], True, tl.int1)
        else:
            position = tl.load(positions + s, mask=s < stop, other=-1)
            inside = s < stop
        there = position >= 0
        if K_BITS == 16:
            k_tile = tl.load(
                keys + s[:, None] * HEAD_DIM + d[None, :],
                mask=(s < stop)[:, None] & (d < HEAD_DIM)[None, :],
                other=0.0,
            )
            x = dot(k_tile, q_tile, tl.zeros([BLOCK_S, BLOCK_G], tl.float32), PRECISION)
        else:
            k_words = load_words(keys, s, stop, K_WORDS, K_BYTES, EVEN)
            k_tile = key_rows(k_words, K_BITS, NATIVE, QUADS).to(TYPE)
            x = dot(k_tile, q_tile, tl.zeros([BLOCK_S, BLOCK_G], tl.float32), PRECISION)
            x = (x - key_bias[None, :]) * key_scale[:, None]
            products = x
            if CENTRED:
                x += offset[None, :]
        x = base2_logits(x, scale, softcap, CAPPED)
        visible = there
        if WINDOWED:
            visible = visible & (now - position < window)
        if FIRST > 0:
            visible = visible & (s >= FIRST)
        x = tl.where(visible[:, None], x, float("-inf"))
        if V_BITS == 16:
            v_tile = tl.load(
                values + s[:, None] * HEAD_DIM + d[None, :],
                mask=(s < stop)[:, None] & (d < HEAD_DIM)[None, :],
                other=0.0,
            )
        else:
            v_words = load_words(values, s, stop, V_WORDS, V_BYTES, EVEN)
        if SCORED:
            rest = inside & (s >= FIRST) if FIRST > 0 else inside
            tl.store(logits + s[:, None] * GROUP + g[None, :], x, mask=rest[:, None] & in_group[None, :])
            if WEIGHTED:
                norm = tl.full([BLOCK_S], 1.0, tl.float32)
                if VALUED:
                    if K_BITS == 16:
                        wide = k_tile.to(tl.float32)
                        squared_key = tl.sum(wide * wide, 1)
                    else:
                        squared_key = squared_levels(k_words, WIDTH, K_BITS, NATIVE) * key_scale * key_scale
                        if MEANS:
                            along = tl.sum(tl.where((g >= GROUP)[None, :], products, 0.0), 1)
                            squared_key = tl.maximum(squared_key + 2.0 * along + squared_mean, 0.0)
                    if V_BITS == 16:
                        wide = v_tile.to(tl.float32)
                        squared_value = tl.sum(wide * wide, 1)
                    else:
                        squared_value = squared_levels(v_words, WIDTH, V_BITS, NATIVE) * value_scale * value_scale
                    norm = look_weight(squared_key, squared_value)
                counts = there & (now - position >= gap)
                tl.store(norms + s, tl.where(counts, norm, 0.0), mask=inside)

        top, sums, p, fade = soften(x, top, sums)
        acc = acc * fade[None, :]
        if V_BITS == 16:
            # An empty slot may hold NaN, and 0 * NaN would spread through the product.
            v_tile = tl.where(there[:, None], v_tile, 0.0)
            acc = dot(tl.trans(v_tile), p.to(v_tile.dtype), acc, PRECISION)
        else:
            p = tl.where(there[:, None], p * value_scale[:, None], 0.0).to(TYPE)
            counted = counted * fade[None, :] + p.to(tl.float32)
            acc = dot(value_columns(v_words, V_BITS, NATIVE).to(TYPE), p, acc, PRECISION)
        if K_BITS < 16:
            key_scale = tl.load(key_scales + ahead, mask=ahead < stop, other=0.0).to(tl.float32)
        if V_BITS < 16:
            value_scale = tl.load(value_scales + ahead, mask=ahead < stop, other=0.0).to(tl.float32)

    part = (pair * GROUP + g) * splits + split
    tl.store(stats + part * 2, top, mask=in_group)
    tl.store(stats + part * 2 + 1, tl.sum(sums, 0), mask=in_group)
    if V_BITS == 16:
        tl.store(partial + part[None, :] * HEAD_DIM + d[:, None], acc, mask=in_group[None, :] & (d < HEAD_DIM)[:, None])
    else:
        acc -= V_BIAS * tl.sum(counted, 0)[None, :]
        byte, plane = value_order(V_WORDS, V_BITS)
        if V_BITS == 8:
            acc = tl.where((plane > 0)[:, None], acc * 16.0, acc)
            acc = tl.sum(acc.reshape([2, V_WORDS * 4, BLOCK_G]), 0)
            at = tl.sum(byte.reshape([2, V_WORDS * 4]), 0) // 2
        else:
            at = tl.where(byte < V_BYTES, byte + plane * V_BYTES, WIDTH)
        tl.store(partial + part[None, :] * WIDTH + at[:, None], acc, mask=in_group[None, :] & (at < WIDTH)[:, None])
