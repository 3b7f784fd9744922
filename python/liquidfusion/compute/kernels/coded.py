"""Decode over codes: the step of `decode` where keys, values or both lie in 8, 4 or 2 bits a coordinate.

Three launches. `enter` rotates the queries, codes the new token's key and value and writes them to its slot. `attend`
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

from .attend import attend
from .codes import QUADS, as_words, bias, words_of
from .common import chained, precision
from .enter import enter
from .merge import MAX_SPLITS, Splits, merge

REGISTERS = 128  # of a thread where a tile's products fit; more would leave fewer programs to hide each other's latency


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
    key_first: Tensor | None,
    value_first: Tensor | None,
    key_bits: int,
    value_bits: int,
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
    first = key_first if key_first is not None else value_first
    queries, offsets = enter(
        q,
        k,
        v,
        (keys, key_scales, key_first, key_bits),
        (values, value_scales, value_first, value_bits),
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
    attend[(splits, kv_heads, batch)](
        queries,
        offsets,
        as_words(keys, key_bits),
        key_scales if key_scales is not None else none,
        as_words(values, value_bits),
        value_scales if value_scales is not None else none,
        key_first if key_first is not None else none,
        value_first if value_first is not None else none,
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
        FIRST=first.shape[2] if first is not None else 0,
        HEAD_DIM=head_dim,
        WIDTH=width,
        BLOCK_G=max(8, triton.next_power_of_2(group + (2 if centred and weighted and value_weighted else 0))),
        BLOCK_D=block_d,
        BLOCK_S=tile,
        K_BITS=key_bits,
        K_WORDS=words_of(width, key_bits),
        K_BIAS=bias(key_bits),
        V_BITS=value_bits,
        V_WORDS=words_of(width, value_bits),
        V_BIAS=bias(value_bits),
        CENTRED=centred,
        SCORED=scored,
        WEIGHTED=weighted,
        VALUED=value_weighted,
        WINDOWED=window > 0,
        CHUNKED=chunked,
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
    mutates_args=(
        "keys",
        "key_scales",
        "values",
        "value_scales",
        "positions",
        "mass",
        "peak",
        "key_first",
        "value_first",
    ),
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
    key_first: Tensor | None = None,
    value_first: Tensor | None = None,
    scale: float,
    mass_decay: float,
    peak_decay: float,
    value_weighted: bool,
    softcap: float = 0.0,
    window: int = 0,
    chunked: bool = False,
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
    key_first, value_first : Tensor or None
        16-bit floats ``[batch, kv_heads, S, width]``, contiguous; written. What slots below S hold, rotated (keys
        without the mean) but not coded: attended in place of their codes. One for every coded side, or None for both.

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
        key_first,
        value_first,
        *bits,
        scale,
        mass_decay,
        peak_decay,
        value_weighted,
        softcap,
        window,
        chunked,
        look_gap,
    )
