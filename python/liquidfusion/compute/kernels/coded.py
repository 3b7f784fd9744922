"""Decode over codes: the step of `decode` where keys, values or both lie in 8, 4 or 2 bits a coordinate.

Three launches. `enter` rotates the queries, codes the new token's key and value and writes them to its slot. `_attend`
splits the slots of every (row, kv head) over programs of one warp each: words of codes go from memory to the operands
of the matrix units without leaving their thread, products are of small integers, and a slot's scale multiplies its
logit and its probability. `merge` joins the splits, rotates the outputs back and updates mass and peak. Nothing is
atomic, so two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import (
    QUADS,
    bias,
    key_order,
    key_rows,
    load_words,
    squared_levels,
    value_columns,
    value_order,
)
from .common import base2_logits, chained, dot, look_weight, precision, soften
from .enter import enter
from .merge import MAX_SPLITS, Splits, merge

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, N806 (Triton's constexpr parameters are upper case)

REGISTERS = 128  # of a thread where a tile's products fit; more would leave fewer programs to hide each other's latency


@triton.jit
def _attend(
    q,
    offsets,
    keys,
    key_scales,
    values,
    value_scales,
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
    for first in tl.range(start, stop, BLOCK_S, num_stages=STAGES):
        s = first + tl.arange(0, BLOCK_S)
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
            tl.store(logits + s[:, None] * GROUP + g[None, :], x, mask=inside[:, None] & in_group[None, :])
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


def _config(slots: int, pairs: int, tile: int, device: torch.device) -> tuple[int, int]:
    """Choose (splits, slots per split) for so many pairs of row and kv head."""
    tiles = triton.cdiv(slots, tile)
    if device.type != "cuda":
        splits = min(tiles, 2)
    else:
        # So many programs of one warp share a multiprocessor's registers.
        places = 65536 // (32 * REGISTERS) * torch.cuda.get_device_properties(device).multi_processor_count
        splits = min(tiles, MAX_SPLITS, places // pairs)
        if splits < 3:
            # A last round of programs that leaves most multiprocessors idle takes as long as a full one.
            splits = min(tiles, max((1, 2, 3, 4, 6, 8), key=lambda n: pairs * n / triton.cdiv(pairs * n, places)))
    per_split = triton.cdiv(tiles, splits) * tile
    return triton.cdiv(slots, per_split), per_split


def _words(codes: Tensor, bits: int) -> Tensor:
    """View codes as the int32 that a kernel loads, where a vector makes whole words."""
    return codes.view(torch.int32) if bits < 16 and codes.shape[-1] % 4 == 0 else codes


def _count(width: int, bits: int) -> int:
    """Words of a vector, up to the next power of two; the matrix units take 16 coordinates at least."""
    return int(triton.next_power_of_2(max(triton.cdiv(width * bits // 8, 4), 1 if bits == 2 else 2)))


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    key_scales: Tensor | None,
    values: Tensor,
    value_scales: Tensor | None,
    positions: Tensor,
    mass: Tensor | None,
    peak: Tensor | None,
    ring: Tensor,
    used: Tensor,
    seen: Tensor,
    active: Tensor | None,
    sinks: Tensor | None,
    rotation: Tensor,
    mean: Tensor | None,
    key_bits: int,
    value_bits: int,
    scale: float,
    mass_decay: float,
    peak_decay: float,
    value_weighted: bool,
    softcap: float,
    window: int,
    look_gap: int,
) -> Tensor:
    batch, query_heads, head_dim = q.shape
    kv_heads, slots = positions.shape[1:]
    group = query_heads // kv_heads
    width = rotation.shape[0]
    scored = mass is not None and peak is not None
    weighted = scored and (value_weighted or look_gap > 0)
    centred = mean is not None and key_bits < 16
    native = q.device.type == "cuda"
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    block_d = triton.next_power_of_2(width)
    # What the products of one tile keep in registers decides.
    wide = max(width * (2 if bits == 8 else 1) for bits in (key_bits, value_bits))
    narrow = wide <= 128 and 16 not in (key_bits, value_bits) and q.dtype != torch.float32 and group <= 6
    tile = 32 if narrow and native else 16
    splits, per_split = _config(slots, batch * kv_heads, tile, q.device)
    left = Splits.of(q, positions, splits, width if value_bits < 16 else head_dim, scored, weighted)
    out = torch.empty((batch, query_heads, head_dim), dtype=q.dtype, device=q.device)
    early = chained(q.device)
    launch = {"launch_pdl": True} if early else {}
    kind = torch.float32 if q.dtype == torch.float32 else torch.bfloat16
    none = positions
    queries, offsets = enter(
        q,
        k,
        v,
        (keys, key_scales, key_bits),
        (values, value_scales, value_bits),
        positions,
        mass,
        peak,
        ring,
        used,
        seen,
        active,
        rotation,
        mean if centred else None,
        kind,
    )
    _attend[(splits, kv_heads, batch)](
        queries,
        offsets,
        _words(keys, key_bits),
        key_scales if key_scales is not None else none,
        _words(values, value_bits),
        value_scales if value_scales is not None else none,
        positions,
        seen,
        active if active is not None else none,
        mean if mean is not None else rotation,
        left.logits,
        left.norms,
        left.partial,
        left.stats,
        *queries.stride()[:2],
        *positions.stride()[:2],
        slots,
        per_split,
        window,
        look_gap,
        scale,
        softcap,
        GROUP=group,
        HEAD_DIM=head_dim,
        WIDTH=width,
        BLOCK_G=max(8, triton.next_power_of_2(group + (2 if centred and weighted and value_weighted else 0))),
        BLOCK_D=block_d,
        BLOCK_S=tile,
        K_BITS=key_bits,
        K_WORDS=_count(width, key_bits),
        K_BIAS=bias(key_bits),
        V_BITS=value_bits,
        V_WORDS=_count(width, value_bits),
        V_BIAS=bias(value_bits),
        CENTRED=centred,
        SCORED=scored,
        WEIGHTED=weighted,
        VALUED=value_weighted,
        WINDOWED=window > 0,
        CAPPED=softcap > 0,
        ACTIVE=active is not None,
        EVEN=slots % tile == 0,
        NATIVE=native,
        QUADS=QUADS,
        TYPE=tl.float32 if kind == torch.float32 else tl.bfloat16,
        PRECISION=precision(kind, q.device),
        STAGES=3 if native else 1,
        CHAINED=early,
        num_warps=1,
        **launch,
        **({"maxnreg": REGISTERS} if narrow else {}),
    )
    merge(left, out, mass, peak, active, sinks, rotation if value_bits < 16 else None, mass_decay, peak_decay)
    return out


_operator = torch.library.custom_op(
    "liquidfusion::decode_coded",
    _run,
    mutates_args=("keys", "key_scales", "values", "value_scales", "positions", "mass", "peak"),
)


@_operator.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def decode_coded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    key_scales: Tensor | None,
    values: Tensor,
    value_scales: Tensor | None,
    positions: Tensor,
    mass: Tensor | None,
    peak: Tensor | None,
    ring: Tensor,
    used: Tensor,
    seen: Tensor,
    active: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    rotation: Tensor,
    mean: Tensor | None,
    bits: tuple[int, int],
    scale: float,
    mass_decay: float,
    peak_decay: float,
    value_weighted: bool,
    softcap: float = 0.0,
    window: int = 0,
    look_gap: int = 0,
) -> Tensor:
    """Attend with one new token per row over coded slots, in place.

    As `decode`, whose parameters of the same names it shares. The new token is coded first and attended as it is
    stored.

    Parameters
    ----------
    keys, values : Tensor
        Codes, uint8 ``[batch, kv_heads, slots, width * bits / 8]``, or at 16 bits ``[batch, kv_heads, slots,
        head_dim]``; contiguous; written. Empty slots may hold anything.
    key_scales, value_scales : Tensor or None
        float16 ``[batch, kv_heads, slots]``, contiguous; written. None at 16 bits.
    rotation : Tensor
        float32 ``[width, width]``: blocks of Hadamard matrices, largest first, times signs of the columns; orthonormal.
        `width` is head_dim up to the next multiple of 8.
    mean : Tensor or None
        float32 ``[kv_heads, width]``: what was subtracted from keys before coding, **rotated**. None: nothing.
    bits : tuple of int
        Bits of keys (16, 8 or 4) and of values (16, 8, 4 or 2); not 16 and 16.

    Returns
    -------
    Tensor
        ``[batch, query_heads, head_dim]`` in q's dtype; a query that sees no key gives 0.
    """
    call = _operator if torch.compiler.is_compiling() else _run
    return call(
        q,
        k,
        v,
        keys,
        key_scales,
        values,
        value_scales,
        positions,
        mass,
        peak,
        ring,
        used,
        seen,
        active,
        sinks,
        rotation,
        mean,
        *bits,
        scale,
        mass_decay,
        peak_decay,
        value_weighted,
        softcap,
        window,
        look_gap,
    )
