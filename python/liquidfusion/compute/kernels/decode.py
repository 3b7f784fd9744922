"""Decode: one new token per row attends over the slots where they lie, and the ledger learns what it looked at.

Two launches. `_attend` splits the slots of every (row, kv head) over programs; all query heads of a group share one
read of the keys and values, and the program that owns the slot of the new token writes it. `merge` joins the splits
and updates mass and peak. Nothing is atomic, so two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import base2_logits, chained, dot, look_weight, precision, soften, squared_lengths
from .merge import MAX_SPLITS, Splits, merge

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803 (Triton's constexpr parameters are upper case)


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
    active,
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
    VALUE_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
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
    e = tl.arange(0, BLOCK_V)
    in_group = g < GROUP
    in_dim = d < HEAD_DIM
    in_value = e < VALUE_DIM
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
    if CHUNKED:
        window = now % window + 1
    target = tl.load(ring + wide_row * ring_row + head * ring_head + tl.load(used + row) % ring_size)
    if ACTIVE:
        alive = tl.load(active + row) != 0
        stop = tl.where(alive, stop, start)

    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_V, BLOCK_G], tl.float32)
    for first in tl.range(start, stop, BLOCK_S, num_stages=STAGES):
        s = first + tl.arange(0, BLOCK_S)
        k_tile = slot_keys.load([row, head, first, 0]).reshape([BLOCK_S, BLOCK_D])
        v_tile = slot_values.load([row, head, first, 0]).reshape([BLOCK_S, BLOCK_V])
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
                        squared_lengths(v_tile, BLOCK_S, BLOCK_V, PRECISION),
                    )
                counts = (position >= 0) & (now - position >= gap)
                tl.store(norms + s, tl.where(counts, norm, 0.0), mask=stays)

        top, sums, p, fade = soften(x, top, sums)
        acc = acc * fade[None, :]
        p = p.to(v_tile.dtype)
        # An empty slot may hold NaN, and 0 * NaN would spread through the product.
        if tl.min(tl.where(s < stop, position, 0), 0) < 0:
            acc = dot(tl.trans(tl.where((position >= 0)[:, None], v_tile, 0.0)), p, acc, PRECISION)
        else:
            acc = dot(tl.trans(v_tile), p, acc, PRECISION)
    total = tl.sum(sums, 0)

    if (target >= start) & (target < stop):
        # The new token never went through the loop: what its slot held before is masked there.
        k_new = tl.load(k + wide_row * k_row + head * k_head + d, mask=in_dim, other=0.0).to(keys.dtype.element_ty)
        v_new = tl.load(v + wide_row * v_row + head * v_head + e, mask=in_value, other=0.0).to(values.dtype.element_ty)
        wide_target = target.to(tl.int64)
        tl.store(keys + wide_row * keys_row + head * keys_head + wide_target * keys_slot + d, k_new, mask=in_dim)
        tl.store(
            values + wide_row * values_row + head * values_head + wide_target * values_slot + e, v_new, mask=in_value
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
    tl.store(partial + part[None, :] * VALUE_DIM + e[:, None], acc, mask=in_group[None, :] & in_value[:, None])


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
    active: Tensor | None,
    sinks: Tensor | None,
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
    kv_heads, slots = keys.shape[1:3]
    group, value_dim = query_heads // kv_heads, values.shape[3]
    scored = mass is not None and peak is not None
    weighted = scored and (value_weighted or look_gap > 0)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    row_bytes = max(head_dim, value_dim) * keys.element_size()
    splits, per_split, tile, stages = _config(slots, batch * kv_heads, row_bytes, keys.device)

    left = Splits.of(q, positions, splits, value_dim, scored, weighted)
    out = torch.empty((batch, query_heads, value_dim), dtype=q.dtype, device=q.device)
    block_d, block_v = triton.next_power_of_2(head_dim), triton.next_power_of_2(value_dim)
    strides = (*mass.stride()[:2], *peak.stride()[:2]) if mass is not None and peak is not None else (0, 0, 0, 0)

    _attend[(splits, kv_heads, batch)](
        q,
        k,
        v,
        *(
            TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, tile, block])
            for t, block in ((keys, block_d), (values, block_v))
        ),
        keys,
        values,
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
        VALUE_DIM=value_dim,
        BLOCK_G=max(8, triton.next_power_of_2(group)),  # the matrix units take 8 columns at least
        BLOCK_D=block_d,
        BLOCK_V=block_v,
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
        num_warps=4,
    )
    merge(left, out, mass, peak, active, sinks, None, mass_decay, peak_decay)
    return out


_operator = torch.library.custom_op(
    "liquidfusion::decode", _run, mutates_args=("keys", "values", "positions", "mass", "peak")
)


@_operator.register_fake
def _(q: Tensor, _: Tensor, v: Tensor, *__: object) -> Tensor:
    return torch.empty((*q.shape[:2], v.shape[2]), dtype=q.dtype, device=q.device)


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
    active: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    mass_decay: float,
    peak_decay: float,
    value_weighted: bool,
    softcap: float = 0.0,
    window: int = 0,
    chunked: bool = False,
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
        New keys and values ``[batch, kv_heads, head_dim]``; any strides. Values may have another head_dim.
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
    active : Tensor or None
        bool or int8 ``[batch]``: rows where it is 0 bring no token; nothing of them is read or written, their output is
        0. None: all rows are active.
    sinks : Tensor or None
        float32 ``[query_heads]``: a learned logit per head in the softmax's denominator, neither scaled nor capped.
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
    chunked : bool
        The window begins at the latest multiple of its length instead.
    look_gap : int
        The ledger counts a look only at a distance of at least this many tokens.

    Returns
    -------
    Tensor
        ``[batch, query_heads, head_dim of the values]`` in q's dtype; a query that sees no key gives 0.
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
        active,
        sinks,
        scale,
        mass_decay,
        peak_decay,
        value_weighted,
        softcap,
        window,
        chunked,
        look_gap,
    )
