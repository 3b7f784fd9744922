"""Keys and values of one layer's slots, and how they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from liquidfusion.compute import kernels
from liquidfusion.exceptions import CacheError


class Slots(Protocol):
    """What stores a layer's tokens, `[batch, kv_heads, slots]` of them."""

    def check(self, layer: int, key: Tensor) -> None:
        """Refuse keys in another dtype than the layer made before."""

    def write(self, at: Tensor, key: Tensor, value: Tensor, rows: Sequence[int] | None = None) -> None:
        """Store one token per row and head: `at` int64 `[rows, kv_heads]`, `key`, `value` `[rows, kv_heads, 1, d]`."""

    def put(self, source: Tensor, key: Tensor, value: Tensor, rows: Sequence[int] | None = None) -> None:
        """Store a chunk's columns: `source` int32 `[rows, kv_heads, slots]` names the column of each slot, -1: none."""

    def read(self, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values `[rows, kv_heads, slots, d]` as they attend."""

    def tensors(self) -> dict[str, Tensor]:
        """All memory by name, batch rows first."""

    def grown(self, slots: int) -> Self:
        """A copy with more slots, the new ones empty."""


class Plain:
    """Keys and values as the model makes them.

    `keys`, `values`: `[batch, kv_heads, slots, head_dim]`.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    @classmethod
    def empty(cls, key: Tensor, value: Tensor, batch: int, slots: int) -> Self:
        """Zeroed slots for columns like `[rows, kv_heads, columns, head_dim]`: an empty slot must not hold NaN."""
        with torch.inference_mode(False):  # a cache outlives the inference_mode block that made it
            keys, values = (
                torch.zeros((batch, x.shape[1], slots, x.shape[3]), dtype=x.dtype, device=x.device)
                for x in (key, value)
            )
        return cls(keys, values)

    def check(self, layer: int, key: Tensor) -> None:
        """Refuse keys in another dtype than the layer made before.

        Raises
        ------
        CacheError
            Naming both.
        """
        if key.dtype != self.keys.dtype:
            raise CacheError(
                f"layer {layer} makes {key.dtype} keys, the cache holds {self.keys.dtype}; build a new KVCache"
            )

    def write(self, at: Tensor, key: Tensor, value: Tensor, rows: Sequence[int] | None = None) -> None:
        """Store one token per row and head."""
        for buffer, new in ((self.keys, key), (self.values, value)):
            target = at[..., None, None].expand(-1, -1, 1, buffer.shape[3])
            if rows is None:
                buffer.scatter_(2, target, new)
            else:
                index = torch.tensor(rows, device=buffer.device)
                buffer[index] = buffer[index].scatter(2, target, new)

    def put(self, source: Tensor, key: Tensor, value: Tensor, rows: Sequence[int] | None = None) -> None:
        """Store a chunk's columns."""
        for buffer, new in ((self.keys, key), (self.values, value)):
            if rows is None:
                _place(source, new, buffer)
            else:
                for row, target in enumerate(rows):
                    _place(source[row : row + 1], new[row : row + 1], buffer[target : target + 1])

    def read(self, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values: the memory itself, or a copy of some rows."""
        return (self.keys, self.values) if rows is None else (self.keys[list(rows)], self.values[list(rows)])

    def tensors(self) -> dict[str, Tensor]:
        """All memory by name."""
        return {"keys": self.keys, "values": self.values}

    def grown(self, slots: int) -> Self:
        """A copy with more slots, the new ones empty."""
        new = self.empty(self.keys, self.values, self.keys.shape[0], slots)
        for old, larger in ((self.keys, new.keys), (self.values, new.values)):
            larger[:, :, : old.shape[2]] = old
        return new


def _place(source: Tensor, new: Tensor, buffer: Tensor) -> None:
    if kernels.available(new.device):
        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device_of(new):  # type: ignore[no-untyped-call]
            kernels.place(source, new, buffer)
        return
    moved, column = (source >= 0)[..., None], source.clamp(min=0).long()[..., None]
    torch.where(moved, new.gather(2, column.expand(-1, -1, -1, new.shape[3])), buffer, out=buffer)
