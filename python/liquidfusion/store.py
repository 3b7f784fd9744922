"""The slots of a cache, the ledger beside them, and how both stay in step when the slots live on another device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liquidfusion import _core
from liquidfusion.exceptions import CacheError


@dataclass
class Layer:
    """Slots of one layer, on the device where it attends.

    `keys`, `values`: `[batch, kv_heads, slots, head_dim]`. `positions` (int32, -1 = empty), `mass`, `peak` (float32;
    None when the strategy needs no scores): `[batch, kv_heads, slots]`; on the CPU the Rust core's own memory.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    mass: Tensor | None
    peak: Tensor | None

    def check(self, number: int, key: Tensor) -> None:
        """Refuse keys that layer `number` makes in another dtype than it did.

        Raises
        ------
        CacheError
            Naming both.
        """
        if key.dtype != self.keys.dtype:
            raise CacheError(
                f"layer {number} makes {key.dtype} keys, the cache holds {self.keys.dtype}; build a new KVCache"
            )


@dataclass
class Scores:
    """Positions and scores, of all layers `[layers, batch, kv_heads, slots]` or of one `[batch, kv_heads, slots]`."""

    positions: Tensor
    mass: Tensor | None
    peak: Tensor | None

    @classmethod
    def empty(cls, shape: Sequence[int], scored: bool, device: torch.device, pinned: bool = False) -> Scores:
        """No token stored: positions -1, scores 0."""
        # A cache outlives the inference_mode block that made it.
        with torch.inference_mode(False):
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

    def unbind(self) -> list[Scores]:
        """One for each layer, in the same memory."""
        rest = [None if t is None else t.unbind() for t in (self.mass, self.peak)]
        return [
            Scores(positions, *(None if t is None else t[i] for t in rest))
            for i, positions in enumerate(self.positions.unbind())
        ]

    def grown(self, slots: int) -> Scores:
        """A copy with more slots, the new ones empty."""
        shape = (*self.positions.shape[:-1], slots)
        new = Scores.empty(shape, self.mass is not None, self.positions.device)
        for old, larger in zip(self.tensors(), new.tensors(), strict=True):
            larger[..., : old.shape[-1]] = old
        return new


class Store:
    """Slots of every layer with the Rust ledger that decides about them.

    Parameters
    ----------
    spec : _core.Spec
        The strategy.
    layers, batch, kv_heads, slots : int
        Shape of the ledger.
    device : torch.device
        Where the first layer lives; layers on other devices are mirrored there when they come.
    threads : int or None
        Cap on the core's threads.
    shared : bool
        Whether CPU layers attend on the core's own memory; False mirrors them as if they were on another device.
    """

    def __init__(
        self,
        spec: _core.Spec,
        layers: int,
        batch: int,
        kv_heads: int,
        slots: int,
        device: torch.device,
        threads: int | None,
        shared: bool = True,
    ) -> None:
        self.spec = spec
        cpu = torch.device("cpu")
        self.host = Scores.empty((layers, batch, kv_heads, slots), spec.scored, cpu, pinned=device.type == "cuda")
        self.mirrors: dict[torch.device, list[Scores]] = {cpu: self.host.unbind()} if shared else {}
        self._shared = shared
        self._uploading: set[torch.device] = set()
        self.ledger = _core.Ledger(spec, self.host.positions, self.host.mass, self.host.peak, threads=threads)
        self.layers: list[Layer | None] = [None] * layers
        with torch.inference_mode(False):
            self.written = torch.empty((layers, batch, kv_heads), dtype=torch.int64, device="cpu")

    @property
    def batch(self) -> int:
        """Batch rows."""
        return self.host.positions.shape[1]

    @property
    def kv_heads(self) -> int:
        """Key/value heads per layer."""
        return self.host.positions.shape[2]

    @property
    def slots(self) -> int:
        """Slots per (layer, batch row, kv head)."""
        return self.host.positions.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of the slots with their positions and scores where they attend, and of the reuse queues."""
        used = [layer for layer in self.layers if layer is not None]
        tensors = [t for x in used for t in (x.keys, x.values, x.positions, x.mass, x.peak) if t is not None]
        return sum(t.nbytes for t in tensors) + self.ledger.nbytes

    def layer(self, index: int, key: Tensor, value: Tensor) -> Layer:
        """Slots of a layer, allocated when its first keys `[batch, kv_heads, columns, head_dim]` arrive."""
        layer = self.layers[index]
        if layer is None:
            scores = self._mirror(key.device)[index]
            keys, values = empty_slots(key, self.slots), empty_slots(value, self.slots)
            layer = self.layers[index] = Layer(keys, values, scores.positions, scores.mass, scores.peak)
        return layer

    def begin(self, lengths: Sequence[int]) -> None:
        """Start a call that brings `lengths[row]` real tokens; `written` says where rows with one token put it."""
        self.wait_uploads()
        self.ledger.begin(lengths, self.written)
        if 1 not in lengths:
            return  # no slot was overwritten
        for device, mirror in self._remote():
            taken = self.written.to(device)
            for scores, host, slots in zip(mirror, self.host.positions, taken, strict=True):
                scores.positions.copy_(host)
                index, keep = slots.clamp(min=0)[..., None], (slots < 0)[..., None]
                for tensor in (scores.mass, scores.peak):
                    if tensor is not None:
                        tensor.scatter_(2, index, tensor.gather(2, index) * keep)

    def chunk(self, index: int, ranks: Tensor, mass: Tensor | None, peak: Tensor | None, source: Tensor) -> None:
        """Decide what one layer keeps of its slots and a chunk (`_core.Ledger.chunk`), and mirror the outcome."""
        self.ledger.chunk(index, ranks, mass, peak, source)
        self._upload(index)

    def wait_uploads(self) -> None:
        """Wait until the devices have read what the host sent: it may be overwritten then."""
        for device in self._uploading:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        self._uploading.clear()

    def set_scores(self, index: int, rows: list[int], mass: Tensor, peak: Tensor) -> None:
        """Overwrite the scores `[rows, kv_heads, slots]` (CPU) of some batch rows, before the layer's `chunk`."""
        if self.host.mass is None or self.host.peak is None:
            return
        self.host.mass[index, rows], self.host.peak[index, rows] = mass, peak

    def finish(self, pull: bool) -> None:
        """Choose the next victims where a reuse queue runs low.

        `pull`: the call updated scores on other devices; they cross to the host when they are needed. A chunk's are
        on the host already.
        """
        if pull and self.spec.scored and self.due():
            self.pull_scores()
        self.ledger.finish()

    def due(self) -> bool:
        """Whether some row needs new victims."""
        return min(self.ledger.queue_lengths()) <= self.spec.interval

    def pull_scores(self) -> None:
        """Bring the scores of layers on other devices to the host."""
        self.wait_uploads()
        for index, layer in enumerate(self.layers):
            if (
                layer is not None
                and layer.mass is not None
                and layer.peak is not None
                and not self._is_shared(layer.mass.device)
            ):
                assert self.host.mass is not None
                assert self.host.peak is not None
                self.host.mass[index].copy_(layer.mass)
                self.host.peak[index].copy_(layer.peak)

    def push(self) -> None:
        """Bring positions and scores from the host to the layers on other devices."""
        for index in range(len(self.layers)):
            self._upload(index)

    def reorder(self, rows: Tensor) -> None:
        """Replace batch row `i` by row `rows[i]`, in place: nothing moves in memory that a CUDA graph points to."""
        self.wait_uploads()
        for layer in self.layers:
            if layer is not None:
                for buffer in (layer.keys, layer.values):
                    buffer.copy_(buffer.index_select(0, rows.to(buffer.device)))
        remote = [scores for _, mirror in self._remote() for scores in mirror]
        for scores in (*self.host.unbind(), *remote):
            for tensor in scores.tensors():
                tensor.copy_(tensor.index_select(0, rows.to(tensor.device)))
        self.ledger.reorder(rows.tolist())

    def reset(self) -> None:
        """Empty every slot."""
        self.wait_uploads()
        self.ledger.reset()
        self.push()

    def grow(self, slots: int) -> None:
        """Give every (layer, row, head) more slots; what is stored stays."""
        self.host = self.host.grown(slots)
        remote = {device: [scores.grown(slots) for scores in mirror] for device, mirror in self._remote()}
        self.mirrors = remote | ({torch.device("cpu"): self.host.unbind()} if self._shared else {})
        self.ledger.grow(self.host.positions, self.host.mass, self.host.peak)
        for index, layer in enumerate(self.layers):
            if layer is not None:
                self.layers[index] = None
                new = self.layer(index, layer.keys, layer.values)
                for buffer, larger in ((layer.keys, new.keys), (layer.values, new.values)):
                    larger[:, :, : buffer.shape[2]] = buffer

    def _is_shared(self, device: torch.device) -> bool:
        return self._shared and device.type == "cpu"

    def _remote(self) -> list[tuple[torch.device, list[Scores]]]:
        return [(device, mirror) for device, mirror in self.mirrors.items() if not self._is_shared(device)]

    def _mirror(self, device: torch.device) -> list[Scores]:
        if device not in self.mirrors:
            # Layers do not share memory: torch.compile would copy all of it to change a part.
            shape = self.host.positions.shape
            self.mirrors[device] = [Scores.empty(shape[1:], self.spec.scored, device) for _ in range(shape[0])]
            for scores, host in zip(self.mirrors[device], self.host.positions, strict=True):
                scores.positions.copy_(host)
        return self.mirrors[device]

    def _upload(self, index: int) -> None:
        layer = self.layers[index]
        if layer is None or self._is_shared(layer.positions.device):
            return
        self._uploading.add(layer.positions.device)
        layer.positions.copy_(self.host.positions[index], non_blocking=True)
        for scores, host in ((layer.mass, self.host.mass), (layer.peak, self.host.peak)):
            if scores is not None and host is not None:
                scores.copy_(host[index], non_blocking=True)


def empty_slots(like: Tensor, slots: int) -> Tensor:
    """Zeroed slots for columns like `[batch, kv_heads, columns, head_dim]`: an empty slot must not hold NaN."""
    with torch.inference_mode(False):
        return torch.zeros((*like.shape[:2], slots, like.shape[3]), dtype=like.dtype, device=like.device)
