"""What the kernels share."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803 (Triton's constexpr parameters are upper case)

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return ``acc + a @ b`` in float32; "ieee" multiplies in float32, as Triton's interpreter must with bfloat16."""
    if PRECISION == "ieee":
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def base2_logits(x, scale, softcap, CAPPED: tl.constexpr):
    """Scale products of queries and keys, cap them, and change to base 2."""
    if CAPPED:
        x = softcap * (1.0 - 2.0 / (tl.exp2(x * scale * (2.0 * LOG2E / softcap)) + 1.0))
        return x * LOG2E
    return x * (scale * LOG2E)


@triton.jit
def soften(x, top, sums):
    """One step of the online softmax over logits [slots, queries] in base 2: (top, sums, probabilities, fade)."""
    higher = tl.maximum(top, tl.max(x, 0))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(x - shift[None, :])
    fade = tl.exp2(top - shift)
    return higher, sums * fade[None, :] + p, p, fade


@triton.jit
def squared_lengths(rows, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Squared length of each row: the diagonal of 16 x 16 products.

    The matrix units multiply 16-bit numbers exactly and add in float32, and take a fifth of the instructions that
    widening, squaring and summing across threads does.
    """
    blocks = tl.reshape(rows, [ROWS // 16, 16, WIDTH])
    none = tl.zeros([ROWS // 16, 16, 16], tl.float32)
    products = dot(blocks, tl.permute(blocks, (0, 2, 1)), none, PRECISION)
    i = tl.arange(0, 16)
    diagonal = tl.where((i[:, None] == i[None, :])[None, :, :], products, 0.0)
    return tl.reshape(tl.sum(diagonal, 2), [ROWS])


@triton.jit
def look_weight(squared_key, squared_value):
    """What a look can move: the length of the value over the length of the key; 0 for a key of zeros."""
    return tl.where(squared_key > 0.0, tl.sqrt(squared_value / tl.where(squared_key > 0.0, squared_key, 1.0)), 0.0)


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """Choose the `PRECISION` of `dot`."""
    return "ieee" if dtype == torch.float32 or device.type != "cuda" else "tf32"


def chained(device: torch.device) -> bool:
    """Whether kernels may be launched while the one before still runs, to wait on the device for its end."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and hasattr(tl.extra.cuda, "gdc_wait")
    )
