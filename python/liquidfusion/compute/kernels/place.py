"""Place: a chunk's chosen columns go into their slots, and nothing else is read or written.

With torch's own operators every slot is rewritten, which for hundreds of rows takes longer than the attention.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803 (Triton's constexpr parameters are upper case)


@triton.jit
def _place(
    source,
    new,
    slots,
    new_row,
    new_head,
    new_column,
    count,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, head, heads = tl.program_id(2), tl.program_id(1), tl.num_programs(1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    first = (row.to(tl.int64) * heads + head) * count
    column = tl.load(source + first + index, mask=index < count, other=-1)
    moved = (column >= 0)[:, None] & (d < HEAD_DIM)[None, :]
    start = row.to(tl.int64) * new_row + head.to(tl.int64) * new_head
    tile = tl.load(new + start + column[:, None].to(tl.int64) * new_column + d[None, :], mask=moved)
    tl.store(slots + (first + index)[:, None] * HEAD_DIM + d[None, :], tile, mask=moved)


def place(source: Tensor, new: Tensor, slots: Tensor) -> None:
    """Overwrite slots by columns of a chunk, in place.

    Parameters
    ----------
    source : Tensor
        int32 ``[batch, kv_heads, slots]``, contiguous: the chunk's column that each slot gets; -1 = it keeps its token.
    new : Tensor
        Keys or values of the chunk ``[batch, kv_heads, columns, head_dim]``.
    slots : Tensor
        ``[batch, kv_heads, slots, head_dim]``, contiguous.
    """
    batch, kv_heads, count, head_dim = slots.shape
    if new.stride(3) != 1:
        new = new.contiguous()
    block = 64
    _place[(triton.cdiv(count, block), kv_heads, batch)](
        source,
        new,
        slots,
        *new.stride()[:3],
        count,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK=block,
    )
