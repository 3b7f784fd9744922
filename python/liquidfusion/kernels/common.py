"""What the kernels share."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

# ruff: noqa: N803 (Triton's constexpr parameters are upper case)

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return ``acc + a @ b`` in float32; "ieee" multiplies float32 operands, which Triton's interpreter needs for bfloat16."""
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


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """Choose the `PRECISION` of `dot`."""
    return "ieee" if dtype == torch.float32 or device.type != "cuda" else "tf32"
