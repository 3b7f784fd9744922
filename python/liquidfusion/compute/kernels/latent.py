"""Decode over latents: the step of `decode` where all query heads share one key per token, whose front is the value.

As `decode`, but with many query heads for one key, so that blocks of them share a program, and with keys of two parts,
the latent and the rotary key. The latent is read once for the logits and the output. The first block of heads writes
the new token; all others only skip its slot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import base2_logits, chained, dot, look_weight, precision, soften
from .merge import Splits, merge

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803 (Triton's constexpr parameters are upper case)

HEADS = 16
"""Query heads of a program."""
MOST_SPLITS = 16
"""`merge` holds one [splits, rank] tile of partial outputs in registers, and a rank is long."""


@triton.jit
def _attend(
    q,
    new,
    keys,
    positions,
    mass,
    peak,
    ring,
    used,
    seen,
    active,
    logits,
    norms,
    partial,
    stats,
    q_row,
    q_head,
    new_row,
    keys_row,
    keys_slot,
    positions_row,
    mass_row,
    peak_row,
    ring_row,
    slots,
    ring_size,
    per_split,
    window,
    gap,
    scale,
    softcap,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SCORED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    VALUED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CHUNKED: tl.constexpr,
    CAPPED: tl.constexpr,
    ACTIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(0)
    block = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    splits = tl.num_programs(0)
    start = split * per_split
    stop = min(start + per_split, slots)

    g = block * BLOCK_G + tl.arange(0, BLOCK_G)
    r = tl.arange(0, BLOCK_R)
    e = tl.arange(0, BLOCK_P)
    in_group = g < GROUP
    in_rank = r < RANK
    in_rotary = e < ROTARY
    q += row * q_row + g[None, :] * q_head
    q_tile = tl.load(q + r[:, None], mask=in_group[None, :] & in_rank[:, None], other=0.0)
    q_rotary = tl.load(q + RANK + e[:, None], mask=in_group[None, :] & in_rotary[:, None], other=0.0)
    keys += row * keys_row
    positions += row * positions_row
    logits += row * slots * GROUP
    norms += row * slots

    now = tl.load(seen + row)
    if CHUNKED:
        window = now % window + 1
    target = tl.load(ring + row * ring_row + tl.load(used + row) % ring_size)
    if ACTIVE:
        stop = tl.where(tl.load(active + row) != 0, stop, start)

    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_G], tl.float32)
    for first in tl.range(start, stop, BLOCK_S, num_stages=STAGES):
        s = first + tl.arange(0, BLOCK_S)
        at = s.to(tl.int64) * keys_slot
        latent = tl.load(keys + at[:, None] + r[None, :], mask=(s < stop)[:, None] & in_rank[None, :], other=0.0)
        rotary = tl.load(
            keys + RANK + at[:, None] + e[None, :], mask=(s < stop)[:, None] & in_rotary[None, :], other=0.0
        )
        # Another block's program may be writing the new token's slot: what is read of it is used nowhere.
        position = tl.load(positions + s, mask=(s < stop) & (s != target), other=-1)
        there = position >= 0
        x = dot(latent, q_tile, tl.zeros([BLOCK_S, BLOCK_G], tl.float32), PRECISION)
        x = base2_logits(dot(rotary, q_rotary, x, PRECISION), scale, softcap, CAPPED)
        visible = there
        if WINDOWED:
            visible = visible & (now - position < window)
        x = tl.where(visible[:, None], x, float("-inf"))
        if SCORED:
            stays = (s < stop) & (s != target)
            tl.store(logits + s[:, None] * GROUP + g[None, :], x, mask=stays[:, None] & in_group[None, :])
            if WEIGHTED:  # noqa: SIM102 - decided when it is compiled
                if block == 0:
                    norm = tl.full([BLOCK_S], 1.0, tl.float32)
                    if VALUED:
                        # Not by the matrix units, as `decode`: operands as long as a rank take all registers.
                        wide_latent = latent.to(tl.float32)
                        wide_rotary = rotary.to(tl.float32)
                        squared = tl.sum(wide_latent * wide_latent, 1)
                        norm = look_weight(squared + tl.sum(wide_rotary * wide_rotary, 1), squared)
                    counts = there & (now - position >= gap)
                    tl.store(norms + s, tl.where(counts, norm, 0.0), mask=stays)

        top, sums, p, fade = soften(x, top, sums)
        # An empty slot may hold NaN, and 0 * NaN would spread through the product.
        value = tl.where(there[:, None], latent, 0.0)
        acc = dot(tl.trans(value), p.to(value.dtype), acc * fade[None, :], PRECISION)
    total = tl.sum(sums, 0)

    if (target >= start) & (target < stop):
        # The new token never went through the loop: what its slot held before is masked there.
        new += row * new_row
        kind = keys.dtype.element_ty
        wide = tl.load(new + r, mask=in_rank, other=0.0).to(kind).to(tl.float32)
        turned = tl.load(new + RANK + e, mask=in_rotary, other=0.0).to(kind).to(tl.float32)
        x_new = tl.sum(q_tile.to(tl.float32) * wide[:, None], 0)
        x_new += tl.sum(q_rotary.to(tl.float32) * turned[:, None], 0)
        x_new = base2_logits(x_new, scale, softcap, CAPPED)
        if SCORED:
            tl.store(logits + target * GROUP + g, x_new, mask=in_group)
        if block == 0:
            at = keys + target.to(tl.int64) * keys_slot
            tl.store(at + r, wide.to(kind), mask=in_rank)
            tl.store(at + RANK + e, turned.to(kind), mask=in_rotary)
            tl.store(positions + target, now)
            if SCORED:
                tl.store(mass + row * mass_row + target, 0.0)
                tl.store(peak + row * peak_row + target, 0.0)
                if WEIGHTED:
                    squared = tl.sum(wide * wide, 0)
                    norm = look_weight(squared + tl.sum(turned * turned, 0), squared) if VALUED else 1.0
                    tl.store(norms + target, tl.where(gap > 0, 0.0, norm))
        higher = tl.maximum(top, x_new)
        fade = tl.exp2(top - higher)
        p_new = tl.exp2(x_new - higher)
        total = total * fade + p_new
        acc = acc * fade[None, :] + p_new[None, :] * wide[:, None]
        top = higher

    part = (row * GROUP + g) * splits + split
    tl.store(stats + part * 2, top, mask=in_group)
    tl.store(stats + part * 2 + 1, total, mask=in_group)
    tl.store(partial + part[None, :] * RANK + r[:, None], acc, mask=in_group[None, :] & in_rank[:, None])


def _config(slots: int, programs: int, element: int, device: torch.device) -> tuple[int, int, int, int]:
    """Choose (splits, slots per split, slots per tile, stages) for `programs` pairs of row and block of heads."""
    if device.type != "cuda":
        tile, stages = 16, 1
        splits = min(triton.cdiv(slots, tile), 2)
    else:
        # What fits into the registers of the eight warps beside one [rank, heads] tile of outputs.
        tile, stages = (32, 2) if element == 2 else (16, 1)
        places = torch.cuda.get_device_properties(device).multi_processor_count
        splits = max(1, min(triton.cdiv(slots, tile), MOST_SPLITS, places // programs))
    per_split = triton.cdiv(triton.cdiv(slots, tile), splits) * tile
    return triton.cdiv(slots, per_split), per_split, tile, stages


def _run(
    q: Tensor,
    new: Tensor,
    keys: Tensor,
    positions: Tensor,
    mass: Tensor | None,
    peak: Tensor | None,
    ring: Tensor,
    used: Tensor,
    seen: Tensor,
    active: Tensor | None,
    sinks: Tensor | None,
    rank: int,
    scale: float,
    mass_decay: float,
    peak_decay: float,
    value_weighted: bool,
    softcap: float,
    window: int,
    chunked: bool,
    look_gap: int,
) -> Tensor:
    batch, query_heads, head_dim = q.shape
    slots = keys.shape[2]
    scored = mass is not None and peak is not None
    weighted = scored and (value_weighted or look_gap > 0)
    q, new = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, new))
    blocks = triton.cdiv(query_heads, HEADS)
    splits, per_split, tile, stages = _config(slots, batch * blocks, keys.element_size(), keys.device)
    left = Splits.of(q, positions, splits, rank, scored, weighted)
    out = torch.empty((batch, query_heads, rank), dtype=q.dtype, device=q.device)
    _attend[(splits, blocks, batch)](
        q,
        new,
        keys,
        positions,
        mass if mass is not None else positions,
        peak if peak is not None else positions,
        ring,
        used,
        seen,
        active if active is not None else positions,
        left.logits,
        left.norms,
        left.partial,
        left.stats,
        *q.stride()[:2],
        new.stride(0),
        keys.stride(0),
        keys.stride(2),
        positions.stride(0),
        mass.stride(0) if mass is not None else 0,
        peak.stride(0) if peak is not None else 0,
        ring.stride(0),
        slots,
        ring.shape[2],
        per_split,
        window,
        look_gap,
        scale,
        softcap,
        GROUP=query_heads,
        RANK=rank,
        ROTARY=head_dim - rank,
        BLOCK_G=HEADS,
        BLOCK_R=max(16, triton.next_power_of_2(rank)),
        BLOCK_P=max(16, triton.next_power_of_2(head_dim - rank)),
        BLOCK_S=tile,
        SCORED=scored,
        WEIGHTED=weighted,
        VALUED=value_weighted,
        WINDOWED=window > 0,
        CHUNKED=chunked,
        CAPPED=softcap > 0,
        ACTIVE=active is not None,
        PRECISION=precision(q.dtype, q.device),
        STAGES=stages,
        CHAINED=chained(q.device),
        num_warps=8,
    )
    merge(left, out, mass, peak, active, sinks, None, mass_decay, peak_decay)
    return out


_operator = torch.library.custom_op(
    "liquidfusion::decode_latent", _run, mutates_args=("keys", "positions", "mass", "peak")
)


@_operator.register_fake
def _(q: Tensor, *others: object) -> Tensor:
    return torch.empty((*q.shape[:2], int(others[10])), dtype=q.dtype, device=q.device)  # type: ignore[call-overload]


def decode_latent(
    q: Tensor,
    new: Tensor,
    keys: Tensor,
    positions: Tensor,
    mass: Tensor | None,
    peak: Tensor | None,
    ring: Tensor,
    used: Tensor,
    seen: Tensor,
    active: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    rank: int,
    scale: float,
    mass_decay: float,
    peak_decay: float,
    value_weighted: bool,
    softcap: float = 0.0,
    window: int = 0,
    chunked: bool = False,
    look_gap: int = 0,
) -> Tensor:
    """Attend with one new token per row over slots of latents, in place.

    As `decode`, whose parameters of the same names it shares, for one key/value head.

    Parameters
    ----------
    q : Tensor
        Queries taken to where latents are ``[batch, query_heads, rank + rotary]``; any strides.
    new : Tensor
        The new token's latent and rotary key ``[batch, 1, rank + rotary]``; any strides.
    keys : Tensor
        Slots ``[batch, 1, slots, rank + rotary]``, the last axis contiguous; written. Empty slots may hold anything.
    rank : int
        Elements of a latent: the front of a key, and its value.

    Returns
    -------
    Tensor
        ``[batch, query_heads, rank]`` in q's dtype; a query that sees no key gives 0.
    """
    call = _operator if torch.compiler.is_compiling() else _run
    return call(
        q,
        new,
        keys,
        positions,
        mass,
        peak,
        ring,
        used,
        seen,
        active,
        sinks,
        rank,
        scale,
        mass_decay,
        peak_decay,
        value_weighted,
        softcap,
        window,
        chunked,
        look_gap,
    )
