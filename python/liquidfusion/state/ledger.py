"""Positions, scores and reuse queues of layers that are kept alike, and which side is newer.

The Rust core decides on the host's tensors. A layer attends beside its own positions and scores: on the CPU these are
the host's memory, on another device a copy, kept in step here and nowhere else. A position is the host's to say. A
score is the device's to say from a row's decode step until it is pulled, the host's at all other times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liquidfusion import _core


@dataclass
class Scores:
    """Positions and scores, of all layers `[layers, batch, kv_heads, slots]` or of one `[batch, kv_heads, slots]`.

    `positions`: int32, -1 = empty. `mass`, `peak`: float32; None when the strategy needs no scores.
    """

    positions: Tensor
    mass: Tensor | None
    peak: Tensor | None

    @classmethod
    def empty(cls, shape: Sequence[int], scored: bool, device: torch.device, pinned: bool = False) -> Scores:
        """No token stored: positions -1, scores 0."""
        with torch.inference_mode(False):  # a cache outlives the inference_mode block that made it
            positions = torch.full(tuple(shape), -1, dtype=torch.int32, device=device, pin_memory=pinned)
            if not scored:
                return cls(positions, None, None)
            mass, peak = (
                torch.zeros(tuple(shape), dtype=torch.float32, device=device, pin_memory=pinned) for _ in range(2)
            )
            return cls(positions, mass, peak)

    def tensors(self) -> list[Tensor]:
        """Those that exist."""
        return [t for t in (self.positions, self.mass, self.peak) if t is not None]

    def attention(self) -> tuple[Tensor, Tensor] | None:
        """Mass and peak, or None."""
        return None if self.mass is None or self.peak is None else (self.mass, self.peak)

    def grown(self, slots: int) -> Scores:
        """A copy with more slots, the new ones empty."""
        new = Scores.empty((*self.positions.shape[:-1], slots), self.mass is not None, self.positions.device)
        for old, larger in zip(self.tensors(), new.tensors(), strict=True):
            larger[..., : old.shape[-1]] = old
        return new


class Ledger:
    """The Rust core's ledger with the tensors it decides on, and their copies where layers attend.

    Parameters
    ----------
    spec : _core.Spec
        The strategy.
    shape : tuple of int
        `(layers, batch, kv_heads, slots)`.
    device : torch.device
        Where the first layer attends.
    threads : int or None
        Cap on the core's threads.
    shared : bool
        Whether CPU layers attend on the core's own memory; False gives them copies as if they were on another device.
    """

    def __init__(
        self,
        spec: _core.Spec,
        shape: tuple[int, int, int, int],
        device: torch.device,
        threads: int | None,
        shared: bool = True,
    ) -> None:
        self.spec, self.shape, self._shared = spec, shape, shared
        self.host = Scores.empty(shape, spec.scored, torch.device("cpu"), pinned=device.type == "cuda")
        self.core = _core.Ledger(spec, self.host.positions, self.host.mass, self.host.peak, threads=threads)
        self._attending: list[Scores | None] = [None] * shape[0]
        self._uploading: dict[torch.device, torch.cuda.Event] = {}
        # Rows whose scores beside the slots are newer than the host's.
        self._newer_on_device: set[int] = set()
        with torch.inference_mode(False):
            self.written = torch.empty(shape[:3], dtype=torch.int64, device="cpu")

    @property
    def layers(self) -> int:
        """Layers."""
        return self.shape[0]

    @property
    def batch(self) -> int:
        """Batch rows."""
        return self.shape[1]

    @property
    def kv_heads(self) -> int:
        """Key/value heads per layer."""
        return self.shape[2]

    @property
    def slots(self) -> int:
        """Slots per (layer, batch row, kv head)."""
        return self.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of positions and scores where layers attend, and of the reuse queues."""
        tensors = [tensor for layer in self._attending if layer is not None for tensor in layer.tensors()]
        return sum(tensor.nbytes for tensor in tensors) + self.core.nbytes

    def at(self, index: int, device: torch.device) -> Scores:
        """Positions and scores of a layer `[batch, kv_heads, slots]`, on the device where it attends the first time."""
        layer = self._attending[index]
        if layer is None:
            host = self._of_host(index)
            layer = host
            if not (self._shared and device.type == "cpu"):
                # Layers do not share memory: torch.compile would copy all of it to change a part.
                layer = Scores.empty(self.shape[1:], self.spec.scored, device)
                for copy, newest in zip(layer.tensors(), host.tensors(), strict=True):
                    copy.copy_(newest)
            self._attending[index] = layer
        return layer

    def _of_host(self, index: int) -> Scores:
        scores = self.host.attention()
        return Scores(self.host.positions[index], *((None, None) if scores is None else (x[index] for x in scores)))

    # A call, in this order

    def begin(self, lengths: Sequence[int]) -> Tensor:
        """Start a call that brings `lengths[row]` real tokens.

        Returns
        -------
        Tensor
            int64 `[layers, batch, kv_heads]`: the slot that a row with one token overwrites, now the new token's with
            scores of 0; -1 in other rows.
        """
        self.wait()
        self.core.begin(lengths, self.written)
        if 1 in lengths:
            apart = list(self._apart())
            taken = {device: self.written.to(device) for device in {x.positions.device for _, x in apart}}
            for index, layer in apart:
                slots = taken[layer.positions.device][index]
                layer.positions.copy_(self.host.positions[index])
                at, keep = slots.clamp(min=0)[..., None], (slots < 0)[..., None]
                for scores in layer.attention() or ():
                    scores.scatter_(2, at, scores.gather(2, at) * keep)
        return self.written

    def attended(self, lengths: Sequence[int]) -> None:
        """Note that layers have added the looks of a decode step to their own scores."""
        if self.spec.scored and any(True for _ in self._apart()):
            self._newer_on_device |= {row for row, length in enumerate(lengths) if length}

    def attended_rows(self, rows: Sequence[int]) -> None:
        """Note that the layers' own scores of some rows are newer."""
        self._newer_on_device.update(rows)

    def keep(
        self, index: int, ranks: Tensor, lengths: Sequence[int], scores: Tensor | None, distinct: Tensor | None = None
    ) -> Tensor:
        """Decide what one layer keeps of its slots and a chunk.

        Parameters
        ----------
        index : int
            The layer's.
        ranks : Tensor
            int32 `[batch, columns]` on the CPU: the token's index among its row's new ones, -1 for padding.
        lengths : sequence of int
            Real new tokens of each row.
        scores : Tensor or None
            Mass and peak with this call's looks, float32 `[2, batch, kv_heads, slots + columns]` on the CPU.
        distinct : Tensor or None
            Distinctness, float32 `[batch, kv_heads, slots + columns]` on the CPU, where the strategy asks for it.

        Returns
        -------
        Tensor
            int32 `[batch, kv_heads, slots]` on the CPU: the column that goes into each slot, -1 for none.
        """
        mass, peak = (None, None) if scores is None else scores.unbind()
        host = self.host.attention()
        if host is not None and mass is not None and peak is not None:
            single = [row for row, length in enumerate(lengths) if length == 1]
            for own, new in zip(host, (mass, peak), strict=True):
                own[index, single] = new[single, :, : self.slots]
        pinned = self.host.positions.is_pinned()
        source = torch.empty(self.shape[1:], dtype=torch.int32, device="cpu", pin_memory=pinned)
        self.core.chunk(index, ranks, mass, peak, source, distinct)
        rows = [row for row, length in enumerate(lengths) if length]
        self._push(index, rows)
        self._newer_on_device.difference_update(rows)
        return source

    def finish(self, distinct: Tensor | None = None) -> None:
        """Choose the next victims where a reuse queue runs low.

        `distinct`: float32 `[layers, batch, kv_heads, slots]` on the CPU, where the strategy asks for it and a row is
        due.
        """
        self.core.finish(distinct)

    def due(self) -> list[int]:
        """Rows of the running call that get new victims when it ends."""
        return self.core.due()

    def staying(self) -> Tensor:
        """Which slots hold a token that is not waiting to be overwritten: bool `[layers, batch, kv_heads, slots]`."""
        queues = torch.empty(self.shape, dtype=torch.int32, device="cpu")
        self.core.queues(queues)
        held = torch.cat((self.host.positions >= 0, self.host.positions.new_zeros((*self.shape[:3], 1)).bool()), -1)
        held.scatter_(-1, queues.long().where(queues >= 0, self.slots), False)
        return held[..., :-1]

    # Both sides

    def pull(self) -> None:
        """Bring the host's scores up to date."""
        self.wait()
        host = self.host.attention()
        if host is None or not self._newer_on_device:
            return
        rows = sorted(self._newer_on_device)
        for index, layer in self._apart():
            for own, newer in zip(host, layer.attention() or (), strict=True):
                if len(rows) == self.batch:
                    own[index].copy_(newer)
                else:
                    own[index, rows] = newer[rows].cpu()
        self._newer_on_device.clear()

    def push(self) -> None:
        """Bring positions and scores from the host to every layer."""
        copies, newest = [], []
        for index, layer in self._apart():
            copies += layer.tensors()
            newest += self._of_host(index).tensors()
        if copies:
            torch._foreach_copy_(copies, newest, non_blocking=True)
            for device in {copy.device for copy in copies}:
                self._sent(device)
        self._newer_on_device.clear()

    def wait(self) -> None:
        """Wait until the devices have read what the host sent: it may be overwritten then."""
        for sent in self._uploading.values():
            sent.synchronize()
        self._uploading.clear()

    def _apart(self) -> Iterator[tuple[int, Scores]]:
        """Layers that attend beside copies of the host's memory."""
        for index, layer in enumerate(self._attending):
            if layer is not None and layer.positions.data_ptr() != self.host.positions[index].data_ptr():
                yield index, layer

    def _push(self, index: int, rows: Sequence[int]) -> None:
        """Send some rows of a layer; of the others the device's scores may be newer."""
        layer = self._attending[index]
        if layer is None or layer.positions.data_ptr() == self.host.positions[index].data_ptr():
            return
        for copy, newest in zip(layer.tensors(), self._of_host(index).tensors(), strict=True):
            if len(rows) == self.batch:
                copy.copy_(newest, non_blocking=True)
            else:
                for row in rows:
                    copy[row].copy_(newest[row], non_blocking=True)
        self._sent(layer.positions.device)

    def _sent(self, device: torch.device) -> None:
        """Note that a device reads the host's memory until what was launched so far is done."""
        if device.type == "cuda":
            sent = self._uploading[device] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            sent.record(torch.cuda.current_stream(device))

    # All rows

    def reorder(self, rows: Tensor) -> None:
        """Replace batch row `i` by row `rows[i]`, in place: nothing moves in memory that a CUDA graph points to."""
        self.wait()
        chosen = rows.tolist()
        self.core.reorder(chosen)  # refuses before anything is written
        for scores in (*map(self._of_host, range(self.layers)), *(layer for _, layer in self._apart())):
            for tensor in scores.tensors():
                tensor.copy_(tensor.index_select(0, rows.to(tensor.device)))
        self._newer_on_device = {row for row, old in enumerate(chosen) if old in self._newer_on_device}

    def release(self, row: int) -> None:
        """Empty one row."""
        self.wait()
        self.core.release(row)
        self._newer_on_device.discard(row)
        of_kinds = zip(*(layer.tensors() for _, layer in self._apart()), strict=True)
        for number, tensors in enumerate(of_kinds):
            rows = [tensor[row] for tensor in tensors]
            torch._foreach_zero_(rows)
            if number == 0:  # positions
                torch._foreach_sub_(rows, 1)

    def copy_row(self, source: int, target: int) -> None:
        """Make a row hold what another does, in place."""
        self.wait()
        self.core.copy_row(source, target)
        for _, layer in self._apart():
            for tensor in layer.tensors():
                tensor[target].copy_(tensor[source])
        self._newer_on_device.discard(target)
        if source in self._newer_on_device:
            self._newer_on_device.add(target)

    def reset(self) -> None:
        """Empty every slot."""
        self.wait()
        self.core.reset()
        self.push()

    def grow(self, slots: int) -> None:
        """Give every (layer, row, head) more slots; what is stored stays."""
        self.wait()
        apart = dict(self._apart())
        self.host = self.host.grown(slots)
        self.shape = (*self.shape[:3], slots)
        self._attending = [
            apart[index].grown(slots) if index in apart else None if layer is None else self._of_host(index)
            for index, layer in enumerate(self._attending)
        ]
        self.core.grow(self.host.positions, self.host.mass, self.host.peak)
