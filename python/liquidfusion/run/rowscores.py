"""Scores of rows whose queues run low, on their way to the host: gathered from all layers by one replayed graph.

A decision needs a few rows' scores of every layer, which lie apart. Launched one by one the gathering would cost the
host more than a decode step; so it is captured for few numbers of rows, and more rows are sent in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liquidfusion.run.graph import DecodeStep
from liquidfusion.run.sampling import upload
from liquidfusion.state.group import Group
from liquidfusion.state.slots import Slots

AT_ONCE = (1, 2, 4, 8)
"""Rows that are gathered at once."""


@dataclass
class Sent:
    """Scores of some rows: float32 `[kinds, layers, rows, kv_heads, slots]` on the host, there when `copied` says so.

    Mass and peak where the strategy keeps them, and distinctness last where it goes by it; None where it does neither.
    """

    rows: list[int]
    steps: list[int]
    scores: Tensor | None
    copied: Callable[[], None]


class _Buffers:
    """What one number of rows is gathered with: which they are, the steps that each has taken, and where to."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        with torch.inference_mode(False):
            # Rows, and the steps that each has taken.
            self.which = torch.zeros((2, shape[2]), dtype=torch.int64, device=device)
            self.scores = torch.zeros(tuple(shape), dtype=torch.float32, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.copied: torch.cuda.Event | None = None


class RowScores:
    """Sends scores of rows to the host.

    Parameters
    ----------
    group : Group
        All layers of the model, on one device, allocated.
    backend : DecodeStep
        Slots and scores of all rows.
    ring : Tensor
        int32 `[layers, rows, kv_heads, 2 * interval]`: the slots that each row takes next, in turn.
    """

    def __init__(self, group: Group, backend: DecodeStep, ring: Tensor) -> None:
        self._spec, self._backend, self._ring = group.spec, backend, ring
        self._scores = list(zip(*(scores.attention() or () for scores in backend.scores), strict=True))  # by kind
        layers, rows, kv_heads, slots = group.ledger.shape
        kinds = len(self._scores) + self._spec.distinct
        self._shape = kinds, layers, kv_heads, slots
        self._sizes = [size for size in AT_ONCE if size <= rows] if kinds else []
        self._buffers = {size: _Buffers((kinds, layers, size, kv_heads, slots), ring.device) for size in self._sizes}
        self._gpu = ring.device.type == "cuda"
        if self._gpu:
            self._copies = torch.cuda.Stream(ring.device)  # type: ignore[no-untyped-call]

    def warm(self, record: Callable[[Callable[[], None]], torch.cuda.CUDAGraph | None]) -> None:
        """Gather once by each size, then capture it: `record` runs something into a graph, or says that it cannot."""
        for buffers in self._buffers.values():
            self._gather(buffers)
            buffers.graph = record(lambda buffers=buffers: self._gather(buffers))  # type: ignore[misc]

    def send(self, rows: Sequence[int], steps: Sequence[int]) -> Iterator[Sent]:
        """Start sending scores.

        Parameters
        ----------
        rows : sequence of int
            Whose.
        steps : sequence of int
            How many steps each has taken since it came in.
        """
        if not self._sizes:
            yield Sent(list(rows), list(steps), None, lambda: None)
            return
        most = self._sizes[-1]
        for start in range(0, len(rows), most):
            yield self._send(list(rows[start : start + most]), list(steps[start : start + most]))

    def _send(self, rows: list[int], steps: list[int]) -> Sent:
        buffers = self._buffers[next(size for size in self._sizes if size >= len(rows))]
        missing = buffers.which.shape[1] - len(rows)
        which = [[*own, *own[:1] * missing] for own in (rows, steps)]
        if buffers.copied is not None:
            torch.cuda.current_stream(self._ring.device).wait_event(buffers.copied)  # the last ones have left
        buffers.which.copy_(upload(which, torch.int64, self._ring.device))
        if buffers.graph is None:
            self._gather(buffers)
        else:
            buffers.graph.replay()
        if not self._gpu:
            return Sent(rows, steps, buffers.scores.clone(), lambda: None)
        host = torch.empty(buffers.scores.shape, dtype=torch.float32, device="cpu", pin_memory=True)
        copied = buffers.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copies.wait_stream(torch.cuda.current_stream(self._ring.device))
        with torch.cuda.stream(self._copies):
            host.copy_(buffers.scores, non_blocking=True)
            copied.record(self._copies)
        return Sent(rows, steps, host, copied.synchronize)

    def _gather(self, buffers: _Buffers) -> None:
        rows, steps = buffers.which.unbind()
        for own, out in zip(self._scores, buffers.scores, strict=False):
            for layer, scores in enumerate(own):
                out[layer].copy_(scores.index_select(0, rows))
        if self._spec.distinct:
            self._distinctness(rows, steps, buffers.scores[-1])

    def _distinctness(self, rows: Tensor, steps: Tensor, out: Tensor) -> None:
        """Distinctness of rows' tokens that are no victims yet: float32 `[layers, rows, kv_heads, slots]`."""
        size, (_, _, _, slots) = self._ring.shape[3], self._shape
        # An interval's worth of victims waits in the ring, from the entry that the next step takes.
        entry = torch.arange(size, device=self._ring.device)
        waiting = ((entry - steps[:, None]) % size < self._spec.interval)[:, None]
        taken = self._ring.index_select(1, rows).long().where(waiting, slots)
        held = torch.stack([scores.positions.index_select(0, rows) for scores in self._backend.scores]) >= 0
        held = torch.nn.functional.pad(held, (0, 1)).scatter_(3, taken, False)[..., :-1].contiguous()
        for layer, own in enumerate(self._backend.slots):
            out[layer] = Slots(own.keys.chosen(rows), own.values).distinctness(held[layer])
