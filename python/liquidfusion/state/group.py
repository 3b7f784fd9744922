"""Layers that are kept alike: one ledger, and the slots of each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liquidfusion import _core
from liquidfusion.compute import codes, kernels
from liquidfusion.compute.looks import Rule
from liquidfusion.state.ledger import Ledger, Scores
from liquidfusion.state.slots import Format, Slots


class Group:
    """One ledger, and the slots of each layer that it decides about.

    Parameters
    ----------
    spec : _core.Spec
        The strategy.
    formats : sequence of Format
        How each layer's slots hold keys and values.
    threads : int or None
        Cap on the core's threads.
    """

    def __init__(self, spec: _core.Spec, formats: Sequence[Format], threads: int | None) -> None:
        self.spec, self.rule = spec, Rule.of(spec)
        self.formats = list(formats)
        self.slots: list[Slots | None] = [None] * len(formats)
        self._ledger: Ledger | None = None
        self._threads = threads

    @property
    def ledger(self) -> Ledger:
        """The ledger, once `allocate` has made it."""
        assert self._ledger is not None
        return self._ledger

    @property
    def nbytes(self) -> int:
        """Bytes of the slots with their positions and scores where they attend, and of the reuse queues."""
        slots = sum(t.nbytes for layer in self.slots if layer is not None for t in layer.tensors().values())
        return slots + (0 if self._ledger is None else self._ledger.nbytes)

    @property
    def devices(self) -> set[torch.device]:
        """Where its layers attend."""
        return {device_of(layer) for layer in self.slots if layer is not None}

    @property
    def replayable(self) -> bool:
        """Whether what is kept is bounded, and the decode kernels read all of it."""
        return self.spec.bounded and all(layer is not None and layer.replayable for layer in self.slots)

    @property
    def evictions(self) -> int:
        """Tokens evicted so far, summed over layers, rows and heads."""
        return 0 if self._ledger is None else self._ledger.core.evictions

    def fits(self, batch: int, kv_heads: int) -> bool:
        """Whether what is allocated serves so many rows and heads."""
        return self._ledger is not None and (self._ledger.batch, self._ledger.kv_heads) == (batch, kv_heads)

    def allocate(self, batch: int, kv_heads: int, slots: int, device: torch.device) -> None:
        """Make an empty ledger; an unbounded strategy gets `slots` slots, others their budget."""
        shape = (len(self.slots), batch, kv_heads, slots if self.spec.budget is None else self.spec.budget)
        self.slots = [None] * len(self.slots)
        self._ledger = Ledger(self.spec, shape, device, self._threads, shares_memory(self.spec, device))

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Slots, Scores]:
        """Slots of a layer, made when its first keys `[rows, kv_heads, columns, d]` arrive, and what stands beside."""
        slots, ledger = self.slots[index], self.ledger
        if slots is None:
            slots = self.slots[index] = Slots.empty(key, value, ledger.batch, ledger.slots, self.formats[index])
        return slots, ledger.at(index, key.device)

    def keep(self, index: int, ranks: Tensor, lengths: Sequence[int], chunk: Chunk) -> None:
        """Decide what one layer keeps of its slots and a chunk, and put the chosen columns into their slots."""
        slots, ledger = self.slots[index], self.ledger
        assert slots is not None
        distinct = None
        # Where every row has room for all its tokens nothing is chosen.
        if self.spec.distinct and max(ledger.core.seen) > ledger.slots:
            distinct = self._distinct_of_chunk(slots, ledger.host.positions[index], ranks, lengths, chunk)
        source = ledger.keep(index, ranks, lengths, chunk.scores, distinct)
        slots.put(source.to(chunk.key.device, non_blocking=True), chunk.key, chunk.value)

    def _distinct_of_chunk(
        self, slots: Slots, positions: Tensor, ranks: Tensor, lengths: Sequence[int], chunk: Chunk
    ) -> Tensor:
        """Distinctness of stored tokens and columns alike, `[batch, kv_heads, slots + columns]` on the CPU.

        Columns count as they will be stored; the only token of a row is in its slot already.
        """
        many = torch.tensor(lengths, device="cpu")[:, None] > 1
        new = ((ranks >= 0) & many)[:, None].expand(-1, positions.shape[1], -1)
        held = torch.cat((positions >= 0, new), -1).to(chunk.key.device)
        return slots.distinctness(held, chunk.key).cpu()

    def finish(self, lengths: Sequence[int], decoded: bool) -> None:
        """End a call; rows whose reuse queue runs low get their next victims. `decoded`: it was a decode step."""
        ledger = self.ledger
        if decoded:
            ledger.attended(lengths)
        distinct = None
        if ledger.due():
            ledger.pull()
            if self.spec.distinct:
                distinct = self.distinctness()
        ledger.finish(distinct)

    def distinctness(self) -> Tensor:
        """Distinctness of all tokens not to be overwritten next, `[layers, batch, kv_heads, slots]` on the CPU."""
        held = self.ledger.staying()
        layers = [x for x in self.slots if x is not None]
        found = [x.distinctness(h.to(device_of(x))) for x, h in zip(layers, held, strict=True)]
        return torch.stack([worth.cpu() for worth in found])

    def reorder(self, rows: Tensor) -> None:
        """Replace batch row `i` by row `rows[i]`, in place."""
        self.ledger.reorder(rows)
        for layer in self.slots:
            for buffer in () if layer is None else layer.tensors().values():
                buffer.copy_(buffer.index_select(0, rows.to(buffer.device)))

    def reset(self) -> None:
        """Empty every slot."""
        if self._ledger is not None:
            self._ledger.reset()

    def release(self, row: int) -> None:
        """Empty one row: nothing of it stays, NaN in unused slots neither."""
        self.ledger.release(row)
        torch._foreach_zero_(self._row(row))

    def copy_row(self, source: int, target: int) -> None:
        """Make a row hold what another does, in place."""
        self.ledger.copy_row(source, target)
        torch._foreach_copy_(self._row(target), self._row(source))

    def _row(self, row: int) -> list[Tensor]:
        """One row of every layer's slots."""
        return [t[row] for layer in self.slots if layer is not None for t in layer.tensors().values()]

    def reserve(self, tokens: int) -> None:
        """Let an unbounded strategy have room for `tokens` tokens a row; what is stored stays."""
        if self.spec.budget is None and tokens > self.ledger.slots:
            slots = max(tokens, 2 * self.ledger.slots)
            self.ledger.grow(slots)
            self.slots = [None if layer is None else layer.grown(slots) for layer in self.slots]


def _name(how: torch.dtype | codes.Coding | None) -> str:
    return f"{how.bits} bits" if isinstance(how, codes.Coding) else str(how).removeprefix("torch.")


def device_of(slots: Slots) -> torch.device:
    """Where a layer attends."""
    return next(iter(slots.tensors().values())).device


@dataclass
class Chunk:
    """What one layer computed of a call of several columns, until it is decided what stays.

    `key`, `value`: `[batch, kv_heads, columns, d]`. `scores`: mass and peak, float32
    `[2, batch, kv_heads, slots + columns]` on the CPU, or None. `copied`: waits until they are there.
    """

    key: Tensor
    value: Tensor
    scores: Tensor | None
    copied: Callable[[], None] = lambda: None


def shares_memory(spec: _core.Spec, device: torch.device) -> bool:
    """Whether CPU layers attend on the core's memory: with kernels, the host's ledger follows at a distance."""
    return not kernels.available(device) or spec.budget is None


class Groups:
    """All layers of a model that have slots, in groups that are kept alike.

    Parameters
    ----------
    kept : mapping of int to (_core.Spec, int)
        What each layer that has slots keeps, for how many key/value heads.
    formats : sequence of Format
        How each layer's slots hold keys and values.
    threads : int or None
        Cap on the core's threads.
    """

    def __init__(
        self, kept: Mapping[int, tuple[_core.Spec, int]], formats: Sequence[Format], threads: int | None
    ) -> None:
        kinds = list(dict.fromkeys(kept.values()))
        members: list[list[int]] = [[] for _ in kinds]
        self.places: dict[int, tuple[int, int]] = {}
        for layer, kind in kept.items():
            number = kinds.index(kind)
            self.places[layer] = number, len(members[number])
            members[number].append(layer)
        self.all = [
            Group(spec, [formats[layer] for layer in layers], threads)
            for (spec, _), layers in zip(kinds, members, strict=True)
        ]

    def __getitem__(self, layer: int) -> tuple[Group, int]:
        """The group of a layer, and the layer's index in it."""
        number, index = self.places[layer]
        return self.all[number], index

    @property
    def held(self) -> list[list[str]]:
        """How each layer holds keys and values, in words that JSON can say."""
        formats = (self.all[number].formats[index] for number, index in self.places.values())
        return [[_name(how.keys), _name(how.values)] for how in formats]

    def first(self, number: int) -> int:
        """The first layer of a group."""
        return next(layer for layer, place in self.places.items() if place == (number, 0))

    def device(self, layer: int) -> torch.device:
        """Where a layer attends, once its slots are there."""
        group, index = self[layer]
        slots = group.slots[index]
        assert slots is not None
        return device_of(slots)
