"""A range of a group's rows as a group of their own: what a call of some rows sees, in the same memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from liquidfusion import _core
from liquidfusion.state.group import Group, Groups
from liquidfusion.state.ledger import Ledger, Scores
from liquidfusion.state.slots import Slots


class Part(Group):
    """Some rows of a group.

    Parameters
    ----------
    whole : Group
        Allocated.
    rows : range
        Consecutive ones.
    """

    def __init__(self, whole: Group, rows: range) -> None:
        self.spec, self.rule = whole.spec, whole.rule
        self._whole, self._rows = whole, rows
        self.slots = [None if slots is None else slots.part(rows) for slots in whole.slots]
        self._ledger: LedgerPart = LedgerPart(whole.ledger, rows)

    def fits(self, batch: int, kv_heads: int) -> bool:
        """Whether a call brings so many rows, which the whole has room for."""
        return batch == len(self._rows) and self._whole.fits(self._whole.ledger.batch, kv_heads)

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Slots, Scores]:
        """Slots of a layer, allocated for all rows when its first keys arrive, and what stands beside."""
        slots = self.slots[index]
        if slots is None:
            slots = self.slots[index] = self._whole.layer(index, key, value)[0].part(self._rows)
        return slots, self.ledger.at(index, key.device)

    def finish(self, lengths: Sequence[int], decoded: bool) -> None:
        """End a call; rows whose reuse queue runs low get their next victims."""
        super().finish(lengths, decoded)
        self._ledger.settle()


class LedgerPart(Ledger):
    """Some rows of a ledger.

    Parameters
    ----------
    whole : Ledger
        All rows.
    rows : range
        Consecutive ones.
    """

    def __init__(self, whole: Ledger, rows: range) -> None:
        layers, _, kv_heads, slots = whole.shape
        self._whole, self._rows = whole, rows
        self.spec, self.shape, self._shared = whole.spec, (layers, len(rows), kv_heads, slots), whole._shared
        self.host = _cut(whole.host, rows, 1)
        self.core: Any = CoreRows(whole.core, rows)
        self._attending = [None if layer is None else _cut(layer, rows, 0) for layer in whole._attending]
        self._uploading = whole._uploading
        self._newer_on_device = {row - rows.start for row in whole._newer_on_device if row in rows}
        with torch.inference_mode(False):
            self.written = torch.empty(self.shape[:3], dtype=torch.int64, device="cpu")

    def at(self, index: int, device: torch.device) -> Scores:
        """Positions and scores of a layer `[rows, kv_heads, slots]`, on the device where it attends."""
        layer = self._attending[index]
        if layer is None:
            layer = self._attending[index] = _cut(self._whole.at(index, device), self._rows, 0)
        return layer

    def settle(self) -> None:
        """Tell the whole which rows' scores are newer beside the slots."""
        self._whole._newer_on_device -= set(self._rows)
        self._whole._newer_on_device |= {row + self._rows.start for row in self._newer_on_device}


class CoreRows:
    """The core's ledger as a call of some rows sees it."""

    def __init__(self, core: _core.Ledger, rows: range) -> None:
        self._core, self._rows = core, rows

    def begin(self, lengths: Sequence[int], slots: Tensor) -> None:
        """Start a call of these rows; others rest."""
        self._core.begin(lengths, slots, list(self._rows))

    def chunk(self, *arguments: Any) -> None:
        """Decide what a layer keeps."""
        self._core.chunk(*arguments)

    def finish(self, distinct: Tensor | None = None) -> int:
        """End the call."""
        return self._core.finish(distinct)

    def due(self) -> list[int]:
        """Rows of the running call that get new victims when it ends."""
        return [row - self._rows.start for row in self._core.due()]

    def queue_lengths(self) -> list[int]:
        """Length of each row's queues."""
        return self._of(self._core.queue_lengths())

    def queues(self, out: Tensor) -> None:
        """Copy these rows' queues."""
        self._core.queues(out, list(self._rows))

    def restore(self, queues: Tensor, seen: Sequence[int]) -> None:
        """Take over queues and counts of tokens."""
        self._core.restore(queues, seen, list(self._rows))

    @property
    def seen(self) -> list[int]:
        """Tokens that each row has seen."""
        return self._of(self._core.seen)

    def _of(self, every: Sequence[int]) -> list[int]:
        return list(every[self._rows.start : self._rows.stop])


def parts(groups: Groups, rows: range) -> Groups:
    """Some rows of all groups."""
    some = Groups.__new__(Groups)
    some.places, some.all = groups.places, [Part(group, rows) for group in groups.all]
    return some


def _cut(scores: Scores, rows: range, axis: int) -> Scores:
    """The same memory, some rows of it."""
    positions, mass, peak = (
        None if tensor is None else tensor.narrow(axis, rows.start, len(rows))
        for tensor in (scores.positions, scores.mass, scores.peak)
    )
    assert positions is not None
    return Scores(positions, mass, peak)
