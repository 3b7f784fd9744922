"""Merge: the second launch of a decode step joins the splits of every query and updates mass and peak."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import low, rotate_back
from .common import LOG2E, chained

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803 (Triton's constexpr parameters are upper case)

MAX_SPLITS = 64  # `_merge` holds one [splits, head_dim] tile of partial outputs in registers


@triton.jit
def _joined(top, total, sink, SINKS: tl.constexpr):
    """(highest, sum) of the splits along the first axis, a sink's logit in base 2 among them."""
    highest = tl.max(top, 0)
    if SINKS:
        highest = tl.maximum(highest, sink)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    if len(top.shape) == 1:
        sums = tl.sum(total * tl.exp2(top - highest), 0)
    else:
        sums = tl.sum(total * tl.exp2(top - highest[None, :]), 0)
    if SINKS:
        sums += tl.exp2(sink - highest)
    return highest, sums


@triton.jit
def _merge(
    out,
    mass,
    peak,
    logits,
    norms,
    partial,
    stats,
    active,
    sinks,
    rotation,
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
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
    SCORED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ACTIVE: tl.constexpr,
    SINKS: tl.constexpr,
    ROTATED: tl.constexpr,
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
        inside = s < (tl.where(tl.load(active + row) != 0, slots, 0) if ACTIVE else slots)
        x = tl.load(
            logits + (pair * slots + s)[:, None] * GROUP + g[None, :],
            mask=inside[:, None] & in_group[None, :],
            other=float("-inf"),
        )
        mass += row * mass_row + head * mass_head + s
        peak += row * peak_row + head * peak_head + s
        old_mass = tl.load(mass, mask=inside, other=0.0)
        old_peak = tl.load(peak, mask=inside, other=0.0)
        sink = tl.load(sinks + head * GROUP + g, mask=in_group, other=0.0) * LOG2E if SINKS else 0.0
        highest, sums = _joined(top, total, sink, SINKS)
        share = tl.where(sums == 0.0, 0.0, 1.0 / (sums * GROUP))
        p = tl.sum(tl.exp2(x - highest[None, :]) * share[None, :], 1)
        if WEIGHTED:
            p = p * tl.load(norms + pair * slots + s, mask=inside, other=0.0)
        tl.store(mass, old_mass * mass_decay + p, mask=inside)
        tl.store(peak, tl.maximum(old_peak * peak_decay, p), mask=inside)

    if block < GROUP:
        own = (pair * GROUP + block) * splits + part
        own_top = tl.load(stats + own * 2, mask=part < splits, other=float("-inf"))
        own_total = tl.load(stats + own * 2 + 1, mask=part < splits, other=0.0)
        own_sink = tl.load(sinks + head * GROUP + block) * LOG2E if SINKS else 0.0
        own_highest, own_sum = _joined(own_top, own_total, own_sink, SINKS)
        weight = tl.exp2(own_top - own_highest) / tl.where(own_sum == 0.0, 1.0, own_sum)
        if ROTATED:
            a = tl.arange(0, BLOCK_D // LOW)
            at = a[:, None] * LOW + tl.arange(0, LOW)[None, :]
            acc = tl.load(
                partial + own[:, None, None] * WIDTH + at[None, :, :],
                mask=(part < splits)[:, None, None] & (at < WIDTH)[None, :, :],
                other=0.0,
            )
            result = rotate_back(tl.sum(acc * weight[:, None, None], 0), rotation, WIDTH, LOW)
        else:
            at = tl.arange(0, BLOCK_D)
            acc = tl.load(
                partial + own[:, None] * HEAD_DIM + at[None, :],
                mask=(part < splits)[:, None] & (at < HEAD_DIM)[None, :],
                other=0.0,
            )
            result = tl.sum(acc * weight[:, None], 0)
        tl.store(out + (pair * GROUP + block) * HEAD_DIM + at, result.to(out.dtype.element_ty), mask=at < HEAD_DIM)


class Splits(NamedTuple):
    """What the splits leave for `merge`, float32.

    `partial` are their outputs ``[batch, query_heads, splits, width]``, `stats` their maxima and sums ``[..., 2]``;
    `logits` ``[batch, kv_heads, slots, group]`` in base 2 and the weights of looks `norms` ``[batch, kv_heads, slots]``
    are empty where no one asks for them.
    """

    partial: Tensor
    stats: Tensor
    logits: Tensor
    norms: Tensor

    @classmethod
    def of(cls, q: Tensor, positions: Tensor, splits: int, width: int, scored: bool, weighted: bool) -> Splits:
        """Allocate, for queries and slots."""
        batch, query_heads = q.shape[:2]
        kv_heads, slots = positions.shape[1:]
        shapes = (
            (batch, query_heads, splits, width),
            (batch, query_heads, splits, 2),
            (batch, kv_heads, slots if scored else 0, query_heads // kv_heads),
            (batch, kv_heads, slots if weighted else 0),
        )
        return cls(*(torch.empty(shape, dtype=torch.float32, device=q.device) for shape in shapes))


def merge(
    left: Splits,
    out: Tensor,
    mass: Tensor | None,
    peak: Tensor | None,
    active: Tensor | None,
    sinks: Tensor | None,
    rotation: Tensor | None,
    mass_decay: float,
    peak_decay: float,
) -> None:
    """Join what the splits left into `out` ``[batch, query_heads, head_dim]`` and the ledger.

    With a `rotation` the partial outputs are rotated.
    """
    partial, stats, logits, norms = left
    batch, _, head_dim = out.shape
    splits, wide = partial.shape[2:]
    kv_heads, slots, group = logits.shape[1:]
    scored, weighted = logits.numel() > 0, norms.numel() > 0
    strides = (*mass.stride()[:2], *peak.stride()[:2]) if mass is not None and peak is not None else (0, 0, 0, 0)
    early = chained(out.device)
    block_g = triton.next_power_of_2(group)
    # What a tile of [slots, queries] takes in registers decides.
    block_s = min(256, 8192 // block_g) if out.device.type == "cuda" else triton.next_power_of_2(slots)
    blocks = max(group, triton.cdiv(slots, block_s)) if scored else group
    _merge[(blocks, kv_heads, batch)](
        out,
        mass if mass is not None else stats,
        peak if peak is not None else stats,
        logits,
        norms,
        partial,
        stats,
        active if active is not None else stats,
        sinks if sinks is not None else stats,
        rotation if rotation is not None else stats,
        *strides,
        slots,
        splits,
        mass_decay,
        peak_decay,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_G=block_g,
        BLOCK_D=triton.next_power_of_2(wide),
        BLOCK_S=block_s,
        BLOCK_P=triton.next_power_of_2(splits),
        WIDTH=wide,
        LOW=low(wide, 8) if rotation is not None else 1,
        SCORED=scored,
        WEIGHTED=weighted,
        ACTIVE=active is not None,
        SINKS=sinks is not None,
        ROTATED=rotation is not None,
        CHAINED=early,
        num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )
