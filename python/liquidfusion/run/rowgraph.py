"""Decode on CUDA for rows that come and go: one graph per batch size, and each row's victims chosen beside it.

As `graph.py`, but every row has steps of its own. The device takes slots from a ring per row; a row's scores cross to
the host when its queue runs low, the Rust core chooses victims while the next step runs, and the ring is filled again
before the row needs it. What a row does depends on nothing but itself, so it keeps the same tokens in any company.
"""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from liquidfusion.exceptions import CacheError
from liquidfusion.options import Run
from liquidfusion.run.backend import Backend
from liquidfusion.run.graph import DecodeStep, Place
from liquidfusion.run.rowscores import RowScores, Sent
from liquidfusion.run.sampling import upload
from liquidfusion.state.group import Group
from liquidfusion.state.part import Part

Forward = Callable[[Backend, Tensor, Tensor], Tensor]
"""Calls the model: a backend, ids and positions `[rows, 1]`; logits `[rows, vocabulary]`."""


class RowGraph:
    """Runs decode steps of some rows while the host's ledger follows behind, each row at its own distance.

    Parameters
    ----------
    group : Group
        All layers of the model, on one device, allocated.
    sizes : tuple of int
        Batch sizes that steps are captured for, ascending, the last one all rows. A step of some rows takes the first
        size that reaches the highest of them.
    run : Run
        `graph`: capture steps. `overlap`: False waits for each decision instead of running beside it.
    forward : callable
        Calls the model.
    """

    def __init__(self, group: Group, sizes: tuple[int, ...], run: Run, forward: Forward) -> None:
        self._group, self._ledger, self._spec = group, group.ledger, group.spec
        self._sizes, self._run, self._forward = sizes, run, forward
        (self._device,) = group.devices
        self._gpu = self._device.type == "cuda"
        layers, rows, kv_heads, _ = self._ledger.shape
        self._ring_size = 2 * self._spec.interval
        ring = (layers, rows, kv_heads, self._ring_size)
        with torch.inference_mode(False):
            self._ring = torch.zeros(ring, dtype=torch.int32, device=self._device)
            self._used = torch.zeros(rows, dtype=torch.int32, device=self._device)
            self._seen = torch.zeros(rows, dtype=torch.int32, device=self._device)
            self._active = torch.zeros(rows, dtype=torch.int8, device=self._device)
            self._last = torch.zeros(rows, dtype=torch.int64, device=self._device)
        self._backends = {size: self._backend(size) for size in sizes}
        self._scores = RowScores(group, self._backends[sizes[-1]], self._ring)
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._now: tuple[int, ...] = ()  # rows that `_active` marks
        self._inside: set[int] = set()  # rows whose state the device leads
        self._steps = np.zeros(rows, np.int64)  # since a row came in, all launched
        self._replayed = np.zeros(rows, np.int64)  # of them, known to the host's ledger
        self._due = np.zeros(rows, np.int64)  # steps after which the ring must be filled again
        self._decisions: deque[Sent] = deque()  # rows that need victims

    def _backend(self, size: int) -> DecodeStep:
        rows = range(size)
        part = Part(self._group, rows)
        places = [
            Place(slots, part.ledger.at(index, self._device), self._ring[index, :size], part.rule)
            for index, slots in enumerate(part.slots)
            if slots is not None
        ]
        return DecodeStep(places, self._device, self._used[:size], self._seen[:size], self._active[:size])

    def warm(self) -> None:
        """Capture every size; no row is active, so nothing changes."""
        for size in self._sizes:
            self._launch(size)
            logits: list[Tensor] = []
            if graph := self._record(lambda size=size, logits=logits: logits.append(self._launch(size))):  # type: ignore[misc]
                self._captured[size] = graph, logits[0]
        self._scores.warm(self._record)

    def step(self, rows: tuple[int, ...], last: Tensor) -> Tensor:
        """Run one step.

        Parameters
        ----------
        rows : tuple of int
            Those that read a token, ascending.
        last : Tensor
            int64 `[all rows]`: the token that each reads.

        Returns
        -------
        Tensor
            Logits `[size, vocabulary]` of the first rows; the next step overwrites them.
        """
        new = [row for row in rows if row not in self._inside]
        if new:
            self._enter(new)
        if rows != self._now:
            mask = np.zeros(len(self._steps), np.int8)
            mask[list(rows)] = 1
            self._active.copy_(upload(mask, torch.int8, self._device))
            self._now = rows
        self._last.copy_(last)
        size = next(size for size in self._sizes if size > rows[-1])
        with torch.cuda.device_of(self._ring):  # type: ignore[no-untyped-call]
            logits = self._launch(size)
        index = list(rows)
        self._steps[index] += 1
        self._join()
        due = [row for row in rows if self._steps[row] >= self._due[row]]
        if due:
            self._decide(due)
            if not self._gpu or not self._run.overlap:
                self._join()
        return logits

    def settle(self, row: int) -> None:
        """Let the host's ledger know of every step that a row has taken."""
        if row not in self._inside:
            return
        self._join()
        steps = int(self._steps[row])
        self._replay([row], [steps], last_open=False)
        if self._spec.scored:
            self._ledger.attended_rows([row])

    def leave(self, row: int) -> None:
        """Forget the steps of a row: it is emptied next."""
        self._inside.discard(row)
        for decision in self._decisions:
            decision.rows = [-1 if other == row else other for other in decision.rows]

    def abandon(self) -> None:
        """Forget the steps of all rows."""
        if self._gpu:
            torch.cuda.synchronize(self._device)
        self._inside.clear()
        self._decisions.clear()

    def _enter(self, rows: list[int]) -> None:
        """Take rows over from the host's ledger, which knows all of them."""
        self._inside.update(rows)
        self._steps[rows] = self._replayed[rows] = 0
        seen = self._ledger.core.seen
        index = upload(rows, torch.int64, self._device)
        self._used.index_fill_(0, index, 0)
        self._seen.index_copy_(0, index, upload([seen[row] for row in rows], torch.int32, self._device))
        self._refill(rows)

    def _launch(self, size: int) -> Tensor:
        if size in self._captured:
            graph, logits = self._captured[size]
            graph.replay()
            return logits
        ids = self._last[:size, None]
        logits = self._forward(self._backends[size], ids, self._seen[:size, None].long())
        # Rows beyond are not active.
        self._used.add_(self._active)
        self._seen.add_(self._active)
        return logits

    def _record(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """Capture what something launches, none of which runs; None where that cannot be."""
        if not self._gpu or not self._run.graph:
            return None
        graph = torch.cuda.CUDAGraph()
        pool = next((graph.pool() for graph, _ in self._captured.values()), None)
        torch.cuda.synchronize(self._device)
        # Freeing pinned memory of a dead cache records an event, which would spoil the capture.
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                run()
        except RuntimeError as error:
            warnings.warn(f"CUDA graph capture failed, decoding without it: {error}", RuntimeWarning, stacklevel=2)
            return None
        finally:
            if collecting:
                gc.enable()
        return graph

    def _decide(self, rows: list[int]) -> None:
        """Send the scores of rows whose queues run low on their way; `_join` chooses their victims."""
        self._decisions.extend(self._scores.send(rows, [int(self._steps[row]) for row in rows]))

    def _join(self) -> None:
        """Choose the victims of the decisions under way and send them to the ring."""
        while self._decisions:
            decision = self._decisions.popleft()
            there = [i for i, row in enumerate(decision.rows) if row >= 0]
            rows = [decision.rows[i] for i in there]
            if not rows:
                continue
            self._replay(rows, [decision.steps[i] for i in there], last_open=True)
            decision.copied()
            distinct, host = None, self._ledger.host.attention()
            if host is not None and decision.scores is not None:
                for own, newest in zip(host, decision.scores, strict=False):
                    for i, row in zip(there, rows, strict=True):
                        own[:, row].copy_(newest[:, i])
            if self._spec.distinct and decision.scores is not None:
                distinct = decision.scores[-1][:, there].contiguous()
            self._ledger.core.finish(distinct)
            self._refill(rows)

    def _replay(self, rows: list[int], steps: list[int], last_open: bool) -> None:
        """Tell the host's ledger of rows' steps so far; the last one stays open for the decision that follows it."""
        core, (layers, _, kv_heads, _) = self._ledger.core, self._ledger.shape
        missing = [(row, step - int(self._replayed[row])) for row, step in zip(rows, steps, strict=True)]
        behind = [(row, count) for row, count in missing if count]
        if behind:
            some = [row for row, _ in behind]
            core.advance([count - 1 for _, count in behind], some)
            written = torch.empty((layers, len(some), kv_heads), dtype=torch.int64, device="cpu")
            core.begin([1] * len(some), written, some)
            if not last_open and core.finish():
                raise CacheError("a decision was missed: this is a defect of liquidfusion")
        self._replayed[rows] = steps

    def _refill(self, rows: list[int]) -> None:
        """Write the first entries of rows' queues into the ring; what is there already is written again unchanged."""
        core, (layers, _, kv_heads, _), size = self._ledger.core, self._ledger.shape, self._ring_size
        peeked = torch.empty((layers, len(rows), kv_heads, size), dtype=torch.int32, device="cpu")
        core.peek(peeked, [0] * len(rows), rows)
        lengths = core.queue_lengths()
        turned = torch.stack([peeked[:, i].roll(int(self._replayed[row]) % size, 2) for i, row in enumerate(rows)], 1)
        self._ring.index_copy_(1, upload(rows, torch.int64, self._device), upload(turned, torch.int32, self._device))
        for row in rows:
            entries = min(size, lengths[row])
            self._due[row] = self._replayed[row] + entries - self._spec.interval


def sizes_for(rows: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Batch sizes that decode steps are captured for: those below the number of rows, and all rows."""
    return (*sorted({size for size in sizes if 0 < size < rows}), rows)
