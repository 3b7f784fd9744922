"""From logits to tokens without sorting the vocabulary: penalties, and draws by temperature, top-k, top-p and min-p.

One program has one row and reads it a few times. The least logit that top-k or top-p lets through is found by search:
the bits of a float order like the numbers, and each pass over the row counts what lies at or above three marks and adds
up its weights. Logits in 16 bits have but 65,536 values, so that eight passes find any; of others the search ends
where one token is left between two marks. A row's sums are in one order whatever the batch is, so its token is the same
in any company.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803 (Triton's constexpr parameters are upper case)

GRAIN = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""Bits of a float32 that numbers of a type leave 0."""
STAGES = tl.constexpr(3)


@triton.jit
def _logits(logits, tokens, size):
    return tl.load(logits + tokens, mask=tokens < size, other=float("-inf")).to(tl.float32)


@triton.jit
def _order(x, GRAIN: tl.constexpr):
    """A whole number that orders like a float32."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> GRAIN


@triton.jit
def _range(logits, size, BLOCK: tl.constexpr):
    """The largest and the least finite logit."""
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    for start in tl.range(0, size, BLOCK, num_stages=STAGES):
        x = _logits(logits, start + tl.arange(0, BLOCK), size)
        highest = tl.maximum(highest, x)
        lowest = tl.minimum(lowest, tl.where(x == float("-inf"), float("inf"), x))
    return tl.max(highest, 0), tl.min(lowest, 0)


@triton.jit
def _above(logits, size, temperature, top, low, step, BLOCK: tl.constexpr, GRAIN: tl.constexpr):
    """How many logits are at or above `low` and one, two and three steps, and the sums of their weights."""
    # Every lane adds up its own, and all of them once at the end.
    c1, c2, c3 = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    s1, s2, s3 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    m1, m2, m3 = (low + step).to(tl.int32), (low + 2 * step).to(tl.int32), (low + 3 * step).to(tl.int32)
    for start in tl.range(0, size, BLOCK, num_stages=STAGES):
        x = _logits(logits, start + tl.arange(0, BLOCK), size)
        w = tl.exp((x - top) / temperature)
        place = _order(x, GRAIN)
        c1 += (place >= m1).to(tl.int32)
        c2 += (place >= m2).to(tl.int32)
        c3 += (place >= m3).to(tl.int32)
        s1 += tl.where(place >= m1, w, 0.0)
        s2 += tl.where(place >= m2, w, 0.0)
        s3 += tl.where(place >= m3, w, 0.0)
    return tl.sum(c1, 0), tl.sum(c2, 0), tl.sum(c3, 0), tl.sum(s1, 0), tl.sum(s2, 0), tl.sum(s3, 0)


@triton.jit
def _search(logits, size, temperature, top, low, high, total, number, share, BLOCK: tl.constexpr, GRAIN: tl.constexpr):
    """The highest place from which on there still are `number` logits and `share` of the weights; and their sum there.

    At `low` there are, with the sum `total`; at `high` there are not.
    """
    beyond = 0
    inside = size
    while (high - low > 1) & (inside > 1):
        step = (high - low + 3) // 4
        c1, c2, c3, s1, s2, s3 = _above(logits, size, temperature, top, low, step, BLOCK, GRAIN)
        first = (c1 >= number) & (s1 >= share)
        second = (c2 >= number) & (s2 >= share)
        third = (c3 >= number) & (s3 >= share)
        # Marks that reach both are a first part of the three.
        n = first.to(tl.int32) + second.to(tl.int32) + third.to(tl.int32)
        at_low = tl.where(third, c3, tl.where(second, c2, tl.where(first, c1, beyond + inside)))
        total = tl.where(third, s3, tl.where(second, s2, tl.where(first, s1, total)))
        beyond = tl.where(third, beyond, tl.where(second, c3, tl.where(first, c2, c1)))
        inside = at_low - beyond
        high = tl.minimum(high, low + (n + 1) * step)
        low = low + n * step
    return low, total


@triton.jit
def _kept(logits, tokens, size, temperature, top, low, min_p, GRAIN: tl.constexpr):
    """Weights of tokens, 1 for the likeliest, and 0 for those that are not let through."""
    x = _logits(logits, tokens, size)
    w = tl.exp((x - top) / temperature)
    return tl.where((_order(x, GRAIN) >= low.to(tl.int32)) & (w >= min_p) & (tokens < size), w, 0.0)


@triton.jit
def _draw(
    logits,
    lanes,
    settings,
    noise,
    ids,
    row_stride,
    settings_stride,
    size,
    BLOCK: tl.constexpr,
    GRAIN: tl.constexpr,
):
    program = tl.program_id(0)
    logits += tl.load(lanes + program) * row_stride
    settings += program * settings_stride
    temperature = tl.load(settings)
    top_k = tl.load(settings + 1).to(tl.int32)
    top_p = tl.load(settings + 2)
    min_p = tl.load(settings + 3)

    top, lowest = _range(logits, size, BLOCK)
    low = _order(lowest, GRAIN).to(tl.int64)
    high = _order(top, GRAIN).to(tl.int64) + 1
    total = 0.0
    if (top_k > 0) & (top_k < size):
        low, total = _search(logits, size, temperature, top, low, high, total, top_k, 0.0, BLOCK, GRAIN)
    if top_p < 1.0:
        if (top_k <= 0) | (top_k >= size):
            _c1, _c2, _c3, total, _s2, _s3 = _above(logits, size, temperature, top, low, 0, BLOCK, GRAIN)
        low, total = _search(logits, size, temperature, top, low, high, total, 1, top_p * total, BLOCK, GRAIN)

    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, size, BLOCK, num_stages=STAGES):
        sums += _kept(logits, start + tl.arange(0, BLOCK), size, temperature, top, low, min_p, GRAIN)
    target = tl.load(noise + program).to(tl.float32) * tl.sum(sums, 0)
    # The first block that reaches the target; where rounding leaves that above them all, the last one with weights.
    before = 0.0
    base = 0.0
    block = 0
    start = 0
    while start < size:
        own = tl.sum(_kept(logits, start + tl.arange(0, BLOCK), size, temperature, top, low, min_p, GRAIN), 0)
        if own > 0.0:
            block = start
            base = before
        before += own
        start = tl.where(before > target, size, start + BLOCK)
    tokens = block + tl.arange(0, BLOCK)
    w = _kept(logits, tokens, size, temperature, top, low, min_p, GRAIN)
    found = tl.min(tl.where((base + tl.cumsum(w, 0) > target) & (w > 0.0), tokens, size), 0)
    last = tl.max(tl.where(w > 0.0, tokens, 0), 0)
    tl.store(ids + program, tl.minimum(found, last).to(tl.int64))


@triton.jit
def _log_sum(logits, lanes, out, row_stride, size, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    logits += tl.load(lanes + program) * row_stride
    top, _ = _range(logits, size, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, size, BLOCK, num_stages=STAGES):
        sums += tl.exp(_logits(logits, start + tl.arange(0, BLOCK), size) - top)
    tl.store(out + program, top + tl.log(tl.sum(sums, 0)))


@triton.jit
def _penalise(
    logits,
    lanes,
    seen,
    rows,
    settings,
    out,
    row_stride,
    settings_stride,
    size,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(1)
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = _logits(logits + tl.load(lanes + program) * row_stride, tokens, size)
    settings += program * settings_stride
    repetition = tl.load(settings + 4)
    told = tl.load(seen + tl.load(rows + program) * size + tokens, mask=tokens < size, other=0)
    times = (told >> 1).to(tl.float32)
    x = tl.where(told != 0, tl.where(x < 0, x * repetition, tl.div_rn(x, repetition)), x)
    x -= tl.load(settings + 5) * times + tl.where(times > 0, tl.load(settings + 6), 0.0)
    tl.store(out + program.to(tl.int64) * size + tokens, x, mask=tokens < size)


def _block(size: int) -> int:
    return min(2048, max(16, int(triton.next_power_of_2(size))))


def draw(logits: Tensor, settings: Tensor, noise: Tensor, lanes: Tensor) -> Tensor:
    """Draw one token for each of some lanes by inverting the distribution function.

    Parameters
    ----------
    logits : Tensor
        `[lanes, vocabulary]`, float32 or a 16-bit type, the last axis contiguous.
    settings : Tensor
        float32 `[draws, at least 4]`: temperature (above 0), top-k (0 for none), top-p, min-p.
    noise : Tensor
        float64 `[draws]` in [0, 1).
    lanes : Tensor
        int64 `[draws]`: whose logits.

    Returns
    -------
    Tensor
        int64 `[draws]`.
    """
    draws, size = len(lanes), logits.shape[1]
    ids = torch.empty(draws, dtype=torch.int64, device=logits.device)
    if draws:
        _draw[(draws,)](
            logits,
            lanes,
            settings,
            noise,
            ids,
            logits.stride(0),
            settings.stride(0),
            size,
            BLOCK=_block(size),
            GRAIN=GRAIN.get(logits.dtype, 0),
            num_warps=8,
        )
    return ids


def log_sum(logits: Tensor, lanes: Tensor) -> Tensor:
    """Logarithm of the sum of the exponentials of each of some lanes' logits, as for `draw`: float32 `[lanes]`."""
    out = torch.empty(len(lanes), dtype=torch.float32, device=logits.device)
    size = logits.shape[1]
    _log_sum[(len(lanes),)](logits, lanes, out, logits.stride(0), size, BLOCK=_block(size), num_warps=8)
    return out


def penalise(logits: Tensor, lanes: Tensor, seen: Tensor, rows: Tensor, settings: Tensor) -> Tensor:
    """Logits after the penalties for tokens that came before.

    Parameters
    ----------
    logits : Tensor
        `[lanes, vocabulary]`, the last axis contiguous.
    lanes, rows : Tensor
        int64 `[penalised]`: whose logits, and whose tokens.
    seen : Tensor
        int32 `[rows, vocabulary]`: twice how often a token is in the answer, and one more if it is in the prompt.
    settings : Tensor
        float32 `[penalised, 7]`: repetition, frequency and presence penalty last.

    Returns
    -------
    Tensor
        float32 `[penalised, vocabulary]`.
    """
    size = logits.shape[1]
    out = torch.empty((len(lanes), size), dtype=torch.float32, device=logits.device)
    block = _block(size)
    _penalise[(triton.cdiv(size, block), len(lanes))](
        logits, lanes, seen, rows, settings, out, logits.stride(0), settings.stride(0), size, BLOCK=block
    )
    return out
