"""Keys and values of one layer's slots: each side holds numbers or codes, and the two need not be alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from liquidfusion.compute import codes, kernels
from liquidfusion.compute.codes import Coding
from liquidfusion.exceptions import CacheError
from liquidfusion.state.sides import Coded, Front, Plain, Side


@dataclass(frozen=True)
class Format:
    """How a layer's slots hold keys and values: a dtype, a coding, or None for the model's own dtype.

    `front`: where values are the first elements of keys, as many as this, and else 0. `first`: how many of the first
    slots hold 16 bits beside codes.
    """

    keys: torch.dtype | Coding | None = None
    values: torch.dtype | Coding | None = None
    front: int = 0
    first: int = 0


class Slots:
    """One layer's slots."""

    def __init__(self, keys: Side, values: Side) -> None:
        self.keys, self.values = keys, values

    @classmethod
    def empty(cls, key: Tensor, value: Tensor, batch: int, slots: int, held: Format) -> Self:
        """Empty slots for columns like `key`, `value` `[rows, kv_heads, columns, d]`."""

        def side(like: Tensor, how: torch.dtype | Coding | None) -> Side:
            if isinstance(how, Coding):
                return Coded.empty(like, batch, slots, how, held.first)
            return Plain.empty(like, batch, slots, how)

        keys = side(key, held.keys)
        return cls(keys, Front(keys, held.front) if held.front else side(value, held.values))

    @property
    def coded(self) -> bool:
        """Whether a side holds codes."""
        return isinstance(self.keys, Coded) or isinstance(self.values, Coded)

    @property
    def memory(self) -> tuple[Tensor | None, ...]:
        """The tensors as the kernels take them: keys and values, or where a side is coded both with their scales.

        Keys alone where values are a part of them.
        """
        plain = [side.held if isinstance(side, Plain) else None for side in (self.keys, self.values)]
        if isinstance(self.values, Front):
            return tuple(plain[:1])
        if not self.coded:
            return tuple(plain)
        coded = [side.codes if isinstance(side, Coded) else None for side in (self.keys, self.values)]
        pairs = [(held, None) if codes is None else codes for held, codes in zip(plain, coded, strict=True)]
        return tuple(tensor for pair in pairs for tensor in pair)

    @property
    def replayable(self) -> bool:
        """Whether the decode kernels read this layer.

        Numbers in another dtype than the model's are converted first; the kernel over codes takes one width.
        """
        sides = (self.keys, self.values)
        plain = [side.held for side in sides if isinstance(side, Plain)]
        coded = [side.coding for side in sides if isinstance(side, Coded)]
        widths = {held.shape[3] for held in plain} | {coding.head_dim for coding in coded}
        alike = not coded or len(widths) == 1
        return alike and all(held.dtype == self.keys.made for held in plain)

    def check(self, layer: int, key: Tensor) -> None:
        """Refuse keys in another dtype than the layer made before.

        Raises
        ------
        CacheError
            Naming both.
        """
        made = self.keys.made
        if key.dtype != made:
            raise CacheError(f"layer {layer} makes {key.dtype} keys, the cache holds {made}; build a new KVCache")

    def write(self, at: Tensor, key: Tensor, value: Tensor, rows: Sequence[int] | None = None) -> None:
        """Store one token per row and head.

        Parameters
        ----------
        at : Tensor
            int64 `[rows, kv_heads]`: the slots to overwrite.
        key, value : Tensor
            `[rows, kv_heads, 1, d]`.
        rows : sequence of int or None
            Which batch rows they are; None: all.
        """
        self.keys.write(at, key, rows)
        self.values.write(at, value, rows)

    def put(self, source: Tensor, key: Tensor, value: Tensor) -> None:
        """Store a chunk's columns: `source` int32 `[batch, kv_heads, slots]` names each slot's column, -1 for none."""
        self.keys.put(source, key)
        self.values.put(source, value)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[batch, kv_heads, slots, d]` in the model's dtype."""
        return self.keys.read(), self.values.read()

    def look_weights(self) -> Tensor:
        """What a look at each slot can move, float32 `[batch, kv_heads, slots]`: see `looks.look_weights`."""
        length = self.keys.lengths()
        return (self.values.lengths() / length).masked_fill(length == 0, 0.0)

    def distinctness(self, held: Tensor, key: Tensor | None = None) -> Tensor:
        """How far each key points from the mean direction of all that are held.

        Parameters
        ----------
        held : Tensor
            bool `[batch, kv_heads, slots + columns]`: which of them count.
        key : Tensor or None
            A chunk's keys `[batch, kv_heads, columns, d]`, which count as they will be stored; None: no columns.

        Returns
        -------
        Tensor
            float32 `[batch, kv_heads, slots + columns]`, 0 where nothing is held.
        """
        keys = self.keys
        if kernels.available(held.device):
            with torch.cuda.device_of(held):  # type: ignore[no-untyped-call]
                return _distinct_by_kernel(keys, held, key)
        if key is not None:
            stored = keys.decoded(keys.codes) if isinstance(keys, Coded) else keys.read()
            return codes.distinctness(torch.cat((stored, keys.rounded(key)), 2), held)
        if isinstance(keys, Coded):
            return keys.coding.distinctness(keys.codes, held)
        return codes.distinctness(keys.read(), held)

    def tensors(self) -> dict[str, Tensor]:
        """All memory by name, batch rows first."""
        sides = {"key": self.keys.tensors(), "value": self.values.tensors()}
        return {f"{side}_{x}" if x else f"{side}s": t for side, named in sides.items() for x, t in named.items()}

    def part(self, rows: range) -> Self:
        """Consecutive batch rows, in the same memory."""
        return type(self)(self.keys.part(rows), self.values.part(rows))

    def upto(self, slots: int) -> Self:
        """The first slots, to be read."""
        return type(self)(self.keys.upto(slots), self.values.upto(slots))

    def grown(self, slots: int) -> Self:
        """A copy with more slots, the new ones empty."""
        keys = self.keys.grown(slots)
        if isinstance(self.values, Front):
            return type(self)(keys, Front(keys, self.values.width))
        return type(self)(keys, self.values.grown(slots))


def _distinct_by_kernel(keys: Side, held: Tensor, key: Tensor | None) -> Tensor:
    """`Slots.distinctness` on a GPU, where neither stored nor new keys are decoded."""
    if isinstance(keys, Coded):
        parts: list[tuple[Tensor, Tensor | None]] = [keys.codes]
        parts += [] if key is None else [keys.encoded(key)]
        width, mean = keys.coding.width, keys.turn[1]
    else:
        states = [keys.read()] if key is None else [keys.read(), keys.rounded(key)]
        parts, width, mean = [(part.contiguous(), None) for part in states], None, None
    counts = [part[0].shape[2] for part in parts]
    which = [part.contiguous() for part in torch.split(held, counts, 2)]
    together = [(*part, counted) for part, counted in zip(parts, which, strict=True)]
    distinct: Tensor = kernels.distinctness(*together, mean=mean, width=width)
    return distinct
