"""Layers that are kept alike: one ledger, and the slots of each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liquidfusion import _core
from liquidfusion.compute import kernels
from liquidfusion.compute.looks import Rule
from liquidfusion.state.ledger import Ledger, Scores
from liquidfusion.state.slots import Plain, Slots


class Group:
    """One ledger, and the slots of each layer that it decides about.

    Parameters
    ----------
    spec : _core.Spec
        The strategy.
    layers : int
        How many there are.
    threads : int or None
        Cap on the core's threads.
    """

    def __init__(self, spec: _core.Spec, layers: int, threads: int | None) -> None:
        self.spec, self.rule = spec, Rule.of(spec)
        self.slots: list[Slots | None] = [None] * layers
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
        return {tensor.device for layer in self.slots if layer is not None for tensor in layer.tensors().values()}

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
        """Slots of a layer, allocated when its first keys `[rows, kv_heads, columns, d]` arrive, and what stands beside."""
        slots, ledger = self.slots[index], self.ledger
        if slots is None:
            slots = self.slots[index] = Plain.empty(key, value, ledger.batch, ledger.slots)
        return slots, ledger.at(index, key.device)

    def keep(self, index: int, ranks: Tensor, lengths: Sequence[int], chunk: Chunk) -> None:
        """Decide what one layer keeps of its slots and a chunk, and put the chosen columns into their slots."""
        slots = self.slots[index]
        assert slots is not None
        source = self.ledger.keep(index, ranks, lengths, chunk.scores)
        slots.put(source.to(chunk.key.device, non_blocking=True), chunk.key, chunk.value)

    def finish(self, lengths: Sequence[int], decoded: bool) -> None:
        """End a call; rows whose reuse queue runs low get their next victims. `decoded`: it was a decode step."""
        if decoded:
            self.ledger.attended(lengths)
        if self.ledger.due():
            self.ledger.pull()
        self.ledger.finish()

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

    def reserve(self, tokens: int) -> None:
        """Let an unbounded strategy have room for `tokens` tokens a row; what is stored stays."""
        if self.spec.budget is None and tokens > self.ledger.slots:
            slots = max(tokens, 2 * self.ledger.slots)
            self.ledger.grow(slots)
            self.slots = [None if layer is None else layer.grown(slots) for layer in self.slots]


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
    """Whether CPU layers attend on the core's memory: where the kernels run, the host's ledger follows at a distance."""
    return not kernels.available(device) or spec.budget is None


class Groups:
    """All layers of a model, in groups.

    Parameters
    ----------
    specs : sequence of _core.Spec
        What each layer keeps.
    threads : int or None
        Cap on the core's threads.
    """

    def __init__(self, specs: Sequence[_core.Spec], threads: int | None) -> None:
        kinds = list(dict.fromkeys(specs))
        self.places = [(kinds.index(spec), specs[:layer].count(spec)) for layer, spec in enumerate(specs)]
        self.all = [Group(spec, specs.count(spec), threads) for spec in kinds]

    def __getitem__(self, layer: int) -> tuple[Group, int]:
        """The group of a layer, and the layer's index in it."""
        number, index = self.places[layer]
        return self.all[number], index

    def device(self, layer: int) -> torch.device:
        """Where a layer attends, once its slots are there."""
        group, index = self[layer]
        slots = group.slots[index]
        assert slots is not None
        return next(iter(slots.tensors().values())).device
