"""One side of a layer's slots, keys or values: numbers, codes, or a part of the other side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from liquidfusion.compute import codes, kernels
from liquidfusion.compute.codes import Codes, Coding


class Side(ABC):
    """Keys, or values, of `[batch, kv_heads, slots]` slots; `made`: the dtype in which the model makes them."""

    made: torch.dtype

    @abstractmethod
    def read(self) -> Tensor:
        """What is held, in the model's dtype: `[batch, kv_heads, slots, d]`."""

    @abstractmethod
    def rounded(self, states: Tensor) -> Tensor:
        """States `[rows, kv_heads, columns, d]` as they will be read once they are stored."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All memory by name, batch rows first; the empty name where there is but one tensor."""

    @abstractmethod
    def write(self, at: Tensor, states: Tensor, rows: Sequence[int] | None) -> None:
        """Store one token per row and head: see `Slots.write`."""

    @abstractmethod
    def put(self, source: Tensor, states: Tensor) -> None:
        """Store a chunk's columns: see `Slots.put`."""

    @abstractmethod
    def products(self, query: Tensor) -> Tensor:
        """Products of queries `[batch, kv_heads, queries, d]` with each slot: float32 `[..., queries, slots]`."""

    @abstractmethod
    def sums(self, weights: Tensor) -> Tensor:
        """Sums over slots, weighted by float32 `[batch, kv_heads, queries, slots]`: `[..., queries, d]`."""

    @abstractmethod
    def lengths(self) -> Tensor:
        """Length of what each slot holds, float32 `[batch, kv_heads, slots]`."""

    @abstractmethod
    def part(self, rows: range) -> Self:
        """Consecutive batch rows, in the same memory."""

    @abstractmethod
    def upto(self, slots: int) -> Self:
        """The first slots, to be read."""

    @abstractmethod
    def chosen(self, rows: Tensor) -> Self:
        """A copy of some batch rows, int64 indices where they lie."""

    @abstractmethod
    def grown(self, slots: int) -> Self:
        """A copy with more slots, the new ones empty."""


class Plain(Side):
    """Numbers, in the dtype in which the model makes them or in another.

    `held`: `[batch, kv_heads, slots, d]`. `made`: the model's dtype.
    """

    def __init__(self, held: Tensor, made: torch.dtype) -> None:
        self.held, self.made = held, made

    @classmethod
    def empty(cls, like: Tensor, batch: int, slots: int, dtype: torch.dtype | None) -> Self:
        """Zeroed slots for columns like `[rows, kv_heads, columns, d]`: an empty slot must not hold NaN."""
        shape = (batch, like.shape[1], slots, like.shape[3])
        with torch.inference_mode(False):  # a cache outlives the inference_mode block that made it
            return cls(torch.zeros(shape, dtype=dtype or like.dtype, device=like.device), like.dtype)

    def read(self) -> Tensor:
        """What is held: the memory itself where it is in the model's dtype."""
        return self.held.to(self.made)

    def rounded(self, states: Tensor) -> Tensor:
        """States as they will be read."""
        return states.to(self.held.dtype).to(self.made)

    def tensors(self) -> dict[str, Tensor]:
        """All memory."""
        return {"": self.held}

    def write(self, at: Tensor, states: Tensor, rows: Sequence[int] | None) -> None:
        """Store one token per row and head."""
        _scatter(self.held, at, states[:, :, 0].to(self.held.dtype), rows)

    def put(self, source: Tensor, states: Tensor) -> None:
        """Store a chunk's columns."""
        if kernels.available(states.device):
            # Triton launches on the current device, wherever the tensors are.
            with torch.cuda.device_of(states):  # type: ignore[no-untyped-call]
                kernels.place(source, states.to(self.held.dtype), self.held)
            return
        _move(source, states.to(self.held.dtype), self.held)

    def products(self, query: Tensor) -> Tensor:
        """Products of queries with each slot."""
        return (query @ self.read().transpose(2, 3)).float()

    def sums(self, weights: Tensor) -> Tensor:
        """Weighted sums over slots."""
        return weights.to(self.made) @ self.read()

    def lengths(self) -> Tensor:
        """Length of what each slot holds."""
        return _lengths(self.held)

    def part(self, rows: range) -> Self:
        """Consecutive batch rows, in the same memory."""
        return type(self)(self.held[rows.start : rows.stop], self.made)

    def upto(self, slots: int) -> Self:
        """The first slots, to be read."""
        return type(self)(self.held[:, :, :slots], self.made)

    def chosen(self, rows: Tensor) -> Self:
        """A copy of some batch rows."""
        return type(self)(self.held.index_select(0, rows), self.made)

    def grown(self, slots: int) -> Self:
        """A copy with more slots, the new ones empty."""
        new = self.empty(self.held, self.held.shape[0], slots, self.held.dtype)
        new.made = self.made
        new.held[:, :, : self.held.shape[2]] = self.held
        return new


class Coded(Side):
    """Codes; a token is coded once and never again.

    `codes`: what is held. `coding`: how. `made`: the model's dtype. `first`: the first slots' vectors once more, turned
    but not coded, `[batch, kv_heads, first slots, width]` in 16 bits; None: of no slot. Attention sinks lie there:
    every query gives them much of its attention, so that an error in them weighs more than in all other tokens.
    """

    def __init__(self, held: Codes, coding: Coding, made: torch.dtype, first: Tensor | None = None) -> None:
        self.codes, self.coding, self.made, self.first = held, coding, made, first

    @classmethod
    def empty(cls, like: Tensor, batch: int, slots: int, coding: Coding, first: int) -> Self:
        """Empty slots for columns like `[rows, kv_heads, columns, d]`, the first ones also in 16 bits."""
        kv_heads, half = like.shape[1], torch.float16 if like.dtype == torch.float16 else torch.bfloat16
        with torch.inference_mode(False):
            exact = torch.zeros((batch, kv_heads, first, coding.width), dtype=half, device=like.device)
        return cls(coding.empty(batch, kv_heads, slots, like.device), coding, like.dtype, exact if first else None)

    def read(self) -> Tensor:
        """What the codes stand for, and the first slots as they are."""
        states = self.decoded(self.codes)
        if self.first is not None:
            # They are few: in torch on a GPU, too.
            states[:, :, : self.first.shape[2]] = self.coding.turned_back(self.first).to(self.made)
        return states

    def rounded(self, states: Tensor) -> Tensor:
        """States as codes have them."""
        return self.decoded(self.encoded(states))

    def encoded(self, states: Tensor) -> Codes:
        """Codes of states `[rows, kv_heads, columns, d]`."""
        if not kernels.available(states.device):
            return self.coding.encode(states)
        with torch.cuda.device_of(states):  # type: ignore[no-untyped-call]
            return Codes(*kernels.encode_states(states, *self.turn, self.coding.bits))

    def decoded(self, held: Codes) -> Tensor:
        """What codes stand for."""
        if not kernels.available(held.codes.device):
            return self.coding.decode(held, self.made)
        mu, (turn, _) = self.coding.mu, self.turn
        with torch.cuda.device_of(held.codes):  # type: ignore[no-untyped-call]
            mean = None if mu is None else mu.to(held.codes.device)
            states: Tensor = kernels.decode_states(*held, turn, mean, self.coding.head_dim, self.made)
            return states

    @property
    def turn(self) -> tuple[Tensor, Tensor | None]:
        """The rotation and the rotated mean as the kernels take them."""
        device = self.codes.codes.device
        return codes.rotation(self.coding.width, device), self.coding.rotated_mean(device)

    def tensors(self) -> dict[str, Tensor]:
        """All memory by name."""
        exact = {} if self.first is None else {"first": self.first}
        return {"codes": self.codes.codes, "scales": self.codes.scales, **exact}

    def write(self, at: Tensor, states: Tensor, rows: Sequence[int] | None) -> None:
        """Store one token per row and head."""
        new = self.encoded(states)
        _scatter(self.codes.codes, at, new.codes[:, :, 0], rows)
        _scatter(self.codes.scales[..., None], at, new.scales, rows)
        if self.first is not None:
            count = self.first.shape[2]
            source = torch.where(at[..., None] == torch.arange(count, device=at.device), 0, -1)
            held = self.first if rows is None else self.first[list(rows)]
            self._put_first(source, states, held)
            if rows is not None:
                self.first[list(rows)] = held

    def put(self, source: Tensor, states: Tensor) -> None:
        """Store a chunk's columns."""
        if kernels.available(states.device):
            with torch.cuda.device_of(states):  # type: ignore[no-untyped-call]
                kernels.place_coded(source, states, *self.codes, *self.turn, self.first)
            return
        new = self.coding.encode(states)
        _move(source, new.codes, self.codes.codes)
        _move(source, new.scales[..., None], self.codes.scales[..., None])
        if self.first is not None:
            self._put_first(source[..., : self.first.shape[2]], states, self.first)

    def _put_first(self, source: Tensor, states: Tensor, held: Tensor) -> None:
        """Put columns of `states` where `source` `[rows, kv_heads, first slots]` says into `held`."""
        column = source.clamp(min=0).long()[..., None].expand(-1, -1, -1, states.shape[3])
        turned = self.coding.turned(states.gather(2, column)).to(held.dtype)
        torch.where((source >= 0)[..., None], turned, held, out=held)

    def products(self, query: Tensor) -> Tensor:
        """Products of queries with each slot."""
        products = self.coding.logits(query, self.codes)
        if self.first is not None:
            products[..., : self.first.shape[2]] = self.coding.turned_logits(query, self.first)
        return products

    def sums(self, weights: Tensor) -> Tensor:
        """Weighted sums over slots."""
        if self.first is None:
            return self.coding.outputs(weights, self.codes).to(self.made)
        count = self.first.shape[2]
        own = weights[..., :count] @ self.coding.turned_back(self.first)
        rest = weights.clone()
        rest[..., :count] = 0.0
        return (self.coding.outputs(rest, self.codes) + own).to(self.made)

    def lengths(self) -> Tensor:
        """Length of what each slot holds, as codes have it."""
        return self.coding.lengths(self.codes)

    def part(self, rows: range) -> Self:
        """Consecutive batch rows, in the same memory."""
        which = slice(rows.start, rows.stop)
        held = Codes(*(tensor[which] for tensor in self.codes))
        return type(self)(held, self.coding, self.made, None if self.first is None else self.first[which])

    def upto(self, slots: int) -> Self:
        """The first slots, to be read."""
        held = Codes(*(tensor[:, :, :slots].contiguous() for tensor in self.codes))
        return type(self)(held, self.coding, self.made, None if self.first is None else self.first[:, :, :slots])

    def chosen(self, rows: Tensor) -> Self:
        """A copy of some batch rows."""
        held = Codes(*(tensor.index_select(0, rows) for tensor in self.codes))
        return type(self)(
            held, self.coding, self.made, None if self.first is None else self.first.index_select(0, rows)
        )

    def grown(self, slots: int) -> Self:
        """A copy with more slots, the new ones empty."""
        batch, kv_heads, old, _ = self.codes.codes.shape
        new = self.coding.empty(batch, kv_heads, slots, self.codes.codes.device)
        for held, larger in zip(self.codes, new, strict=True):
            larger[:, :, :old] = held
        return type(self)(new, self.coding, self.made, None if self.first is None else self.first.clone())


class Front(Side):
    """Values that are the first elements of keys, and take no memory of their own.

    `keys`: the other side. `width`: elements of a value.
    """

    def __init__(self, keys: Side, width: int) -> None:
        self.keys, self.width, self.made = keys, width, keys.made

    def read(self) -> Tensor:
        """What is held."""
        return self.keys.read()[..., : self.width]

    def rounded(self, states: Tensor) -> Tensor:
        """States as they will be read; what rounds numbers rounds each alone."""
        return self.keys.rounded(states)

    def tensors(self) -> dict[str, Tensor]:
        """None of its own."""
        return {}

    def write(self, at: Tensor, states: Tensor, rows: Sequence[int] | None) -> None:
        """Do nothing: the keys are written."""

    def put(self, source: Tensor, states: Tensor) -> None:
        """Do nothing, likewise."""

    def products(self, query: Tensor) -> Tensor:
        """Products of queries with each slot."""
        return (query @ self.read().transpose(2, 3)).float()

    def sums(self, weights: Tensor) -> Tensor:
        """Weighted sums over slots."""
        return weights.to(self.made) @ self.read()

    def lengths(self) -> Tensor:
        """Length of what each slot holds."""
        return _lengths(self.read())

    def part(self, rows: range) -> Self:
        """Consecutive batch rows, in the same memory."""
        return type(self)(self.keys.part(rows), self.width)

    def upto(self, slots: int) -> Self:
        """The first slots, to be read."""
        return type(self)(self.keys.upto(slots), self.width)

    def chosen(self, rows: Tensor) -> Self:
        """A copy of some batch rows."""
        return type(self)(self.keys.chosen(rows), self.width)

    def grown(self, slots: int) -> Self:
        """A copy with more slots, for keys that have as many."""
        return type(self)(self.keys.grown(slots), self.width)


def _lengths(held: Tensor) -> Tensor:
    """Lengths of vectors, float32, added up in no narrower type than they are."""
    length: Tensor = torch.linalg.vector_norm(held, dim=-1, dtype=torch.promote_types(held.dtype, torch.float32))
    return length.float()


def _scatter(held: Tensor, at: Tensor, new: Tensor, rows: Sequence[int] | None) -> None:
    """Overwrite one slot per row and head of `[batch, kv_heads, slots, x]` by `[rows, kv_heads, x]`."""
    new = new.view(*new.shape[:2], held.shape[3])
    if rows is None:
        held.scatter_(2, at[..., None, None].expand(-1, -1, 1, held.shape[3]), new[:, :, None])
    else:
        row = torch.tensor(rows, device=held.device)[:, None]
        held[row, torch.arange(held.shape[1], device=held.device), at] = new


def _move(source: Tensor, new: Tensor, held: Tensor) -> None:
    """Put columns of `[batch, kv_heads, columns, x]` where `source` says; memory of other slots is not touched."""
    row, head, slot = (source >= 0).nonzero(as_tuple=True)
    held[row, head, slot] = new[row, head, source[row, head, slot].long()]
