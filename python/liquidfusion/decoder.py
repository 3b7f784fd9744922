"""Decode on CUDA: one graph per step, and victims that are chosen beside it.

The device consumes reuse queues through a ring of `2 * interval` slot numbers per (layer, row, kv head). Every
`interval` steps the scores are copied to pinned memory on a second stream, the Rust core chooses victims while the next
step runs, and they go into the half of the ring that is already consumed. A slot is only ever reused through the ring,
at a step fixed beforehand, so the overlapped run equals the stalling one bit for bit.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from liquidfusion import _core, attention
from liquidfusion.compute import kernels
from liquidfusion.exceptions import CacheError
from liquidfusion.store import Layer, Store

GRAPH_INPUTS = frozenset(
    {
        "input_ids",
        "attention_mask",
        "position_ids",
        "cache",
        "past_key_values",
        "use_cache",
        "return_dict",
        "logits_to_keep",
    }
)
"""Arguments of `forward` under which the captured graph computes what an eager call would."""


class DecodeCall:
    """The running call as the attention layers see it: every layer goes through the decode kernel."""

    def __init__(self, store: Store, spec: _core.Spec, ring: Tensor, used: Tensor, seen: Tensor) -> None:
        # Plain values and lists: torch.compile traces through this object.
        self.layers: list[Layer] = [layer for layer in store.layers if layer is not None]
        self.rings = list(ring.unbind())
        self.used, self.seen = used, seen
        self.mass_decay, self.peak_decay = spec.mass_decay, spec.peak_decay
        self.value_weighted, self.look_gap = spec.value_weighted, spec.look_gap
        self.layer = -1
        self.attended = 0

    def take(self, layer: int) -> None:
        """Note which layer attends next."""
        self.layer = layer

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float) -> Tensor:
        """Write and attend one token per row: `[batch, heads, 1, head_dim]` in and out."""
        layer = self.layers[self.layer]
        layer.check(self.layer, key)
        self.attended += 1
        out = kernels.decode(
            query[:, :, 0],
            key[:, :, 0],
            value[:, :, 0],
            layer.keys,
            layer.values,
            layer.positions,
            layer.mass,
            layer.peak,
            self.rings[self.layer],
            self.used,
            self.seen,
            scale=scale,
            mass_decay=self.mass_decay,
            peak_decay=self.peak_decay,
            value_weighted=self.value_weighted,
            softcap=softcap,
            window=window,
            look_gap=self.look_gap,
        )
        return out[:, :, None]


class Decoder:
    """Runs decode steps on one CUDA device while the host's ledger follows behind.

    Parameters
    ----------
    model : PreTrainedModel
        Whose steps they are.
    store : Store
        Slots; all layers on one device.
    graph : bool
        Capture the step in a CUDA graph at the second step; the first one warms up, and both are real.
    compile : bool
        Let torch.compile fuse what lies between the kernels.
    overlap : bool
        False: wait for each decision instead of running beside it. Same results, slower.
    evicting : bool
        False: reuse the ring's slots in turn and decide nothing, to measure what eviction costs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: Store,
        graph: bool,
        compile: bool,  # noqa: A002
        overlap: bool,
        evicting: bool,
    ) -> None:
        self._model = weakref.ref(model)  # as the cache: neither keeps its memory
        self.store, self.spec = store, store.spec
        self.graph, self.compile, self.overlap, self._evicting = graph, compile, overlap, evicting
        layer = store.layers[0]
        assert layer is not None
        self.device = layer.keys.device
        self._gpu = self.device.type == "cuda"
        ring = (*store.written.shape, 2 * self.spec.interval)
        with torch.inference_mode(False):
            self.ring = torch.zeros(ring, dtype=torch.int32, device=self.device)
            self._ring_host = torch.zeros(ring, dtype=torch.int32, device="cpu", pin_memory=self._gpu)
            self._peeked = torch.zeros(ring, dtype=torch.int32, device="cpu")
            self.used = torch.zeros(store.batch, dtype=torch.int32, device=self.device)
            self.seen = torch.zeros(store.batch, dtype=torch.int32, device=self.device)
            self._ids = torch.zeros((store.batch, 1), dtype=torch.int64, device=self.device)
            self._positions = torch.zeros((store.batch, 1), dtype=torch.int64, device=self.device)
        self._staging: Tensor | None = None
        if self._gpu:
            self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._ledger_copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ring_copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.running = False
        self._steps = 0  # since `start`, all launched
        self._replayed = 0  # of them, known to the host's ledger
        self._due = 0  # step after which the ring must be refilled
        self._deciding = False
        self._compiled: Callable[..., Any] | None = None
        self._captured: tuple[torch.cuda.CUDAGraph, Any] | None = None
        self._captured_with: list[int] = []
        self._warned = False
        self._warm = False
        self._call = DecodeCall(store, self.spec, self.ring, self.used, self.seen)

    @property
    def pending(self) -> int:
        """Steps that the host's ledger does not know of yet."""
        return self._steps - self._replayed

    def start(self) -> None:
        """Take over from the host's ledger, which is complete."""
        if self.running:
            return
        self.running = True
        if self._captured is not None and self._captured_with != self._weights():
            self._captured = None  # it reads memory that the weights have left
        self.store.wait_uploads()
        self._steps = self._replayed = 0
        self.used.zero_()
        self.seen.copy_(torch.tensor(self.store.ledger.seen, dtype=torch.int32, device="cpu"))
        if self._gpu:
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        self._refill()
        if self._gpu:
            torch.cuda.current_stream(self.device).wait_event(self._ring_copied)

    def stop(self) -> None:
        """Bring the host's ledger up to date and hand over to it."""
        if not self.running:
            return
        self._join()
        self._replay(last_open=False)
        self.running = False

    def abandon(self) -> None:
        """Forget the steps taken: the slots are emptied next."""
        if self._gpu:
            torch.cuda.synchronize(self.device)
        self._deciding = self.running = False

    def step(self, forward: Callable[..., Any], inputs: dict[str, Any], columns: int) -> Any:
        """Run one decode step.

        Parameters
        ----------
        forward : callable
            The model's own forward.
        inputs : dict
            The call's arguments by name; one column, every row real.
        columns : int
            Columns that the cache has seen before.

        Returns
        -------
        ModelOutput
            The caller's own: a later step does not change it.
        """
        # Triton launches, and graphs are captured, on the current device.
        with torch.cuda.device_of(self.ring):  # type: ignore[no-untyped-call]
            return self._step(forward, inputs, columns)

    def _step(self, forward: Callable[..., Any], inputs: dict[str, Any], columns: int) -> Any:
        self.start()
        if self._gpu:
            torch.cuda.current_stream(self.device).wait_event(self._ring_copied)
        plain = set(inputs) <= GRAPH_INPUTS and inputs.get("return_dict") is not False
        if self.graph and self._gpu and plain and inputs.get("input_ids") is not None and not self._autocast():
            output = self._graph_step(forward, inputs, columns)
        else:
            output = self._run(forward, inputs)
        if not self._evicting:
            return output
        self._steps += 1
        self._join()
        if self._steps >= self._due:
            self._decide()
        return output

    def _autocast(self) -> bool:
        """Whether weights are cast on the fly: the copies end with the context, a graph would go on reading them."""
        if not torch.is_autocast_enabled(self.device.type):
            return False
        if not self._warned:
            self._warned = True
            name = str(torch.get_autocast_dtype(self.device.type)).removeprefix("torch.")
            warnings.warn(
                f"inside torch.autocast decoding runs without a CUDA graph, several times slower: load the model with "
                f"dtype={name!r} instead",
                RuntimeWarning,
                stacklevel=2,
            )
        return True

    def _weights(self) -> list[int]:
        """Where the weights are."""
        model = self._model()
        assert model is not None  # it is running
        return list(_addresses(chain(model.parameters(), model.buffers())))

    def _run(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        self._call.attended = 0
        token = attention.current.set(self._call)
        attention.traced = self._call
        try:
            output = forward(**inputs)
        finally:
            attention.current.reset(token)
            attention.traced = None
        self.used.add_(1)
        self.seen.add_(1)
        return output

    def _graph_step(self, forward: Callable[..., Any], inputs: dict[str, Any], columns: int) -> Any:
        self._ids.copy_(inputs["input_ids"])
        position_ids = inputs.get("position_ids")
        if position_ids is None:
            self._positions.fill_(columns)
        else:
            self._positions.copy_(position_ids)
        static = {k: v for k, v in inputs.items() if k not in ("attention_mask", "input_ids", "position_ids")}
        static |= {"input_ids": self._ids, "position_ids": self._positions}
        if self.compile and self._compiled is None:
            # The step bound by memory, one token per row: a matrix product of one row is best a fused reduction.
            options: dict[str, Any] = {"coordinate_descent_tuning": self.store.batch == 1}
            self._compiled = torch.compile(forward, dynamic=False, options=options)
        step = self._compiled or forward
        if not self._warm:
            self._warm = True
            return self._run(step, static)
        if self._captured is None:
            try:
                self._captured = self._capture(step, static)
            except RuntimeError as error:
                self.graph = False
                warnings.warn(f"CUDA graph capture failed, decoding without it: {error}", RuntimeWarning, stacklevel=2)
                return self._run(forward, inputs)
        graph, output = self._captured
        graph.replay()
        return _own(output)

    def _capture(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Record one step; nothing of it runs."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        # Freeing pinned memory of a dead cache records an event, which would spoil the capture.
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = self._run(forward, inputs)
        finally:
            if collecting:
                gc.enable()
        self._captured_with = self._weights()
        return graph, output

    def _decide(self) -> None:
        """At a watermark: let the host's ledger catch up and, where a queue runs low, start copying the scores."""
        self._replay(last_open=True)
        ledger = self.store.ledger
        if self.spec.scored and min(ledger.queue_lengths()) <= self.spec.interval:
            self._deciding = True
            self._copy_scores()
            if not self.overlap or not self._gpu:
                self._join()
            else:
                self._due = self._steps + 2 * self.spec.interval  # set for good when the decision is joined
        else:
            ledger.finish()
            if self._gpu:
                # The host may be ahead: the ring is written once the step launched last has read its entry.
                self._copies.wait_stream(torch.cuda.current_stream(self.device))
            self._refill()

    def _copy_scores(self) -> None:
        mirror, host = self.store.mirrors[self.device], self.store.host
        assert host.mass is not None
        assert host.peak is not None
        here = [s.mass for s in mirror if s.mass is not None] + [s.peak for s in mirror if s.peak is not None]
        if not self._gpu:
            torch._foreach_copy_([*host.mass, *host.peak], here)
            return
        if self._staging is None:
            with torch.inference_mode(False):
                self._staging = torch.empty((2, *host.mass.shape), dtype=torch.float32, device=self.device)
        torch._foreach_copy_(list(self._staging.flatten(0, 1)), here)
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            host.mass.copy_(self._staging[0], non_blocking=True)
            host.peak.copy_(self._staging[1], non_blocking=True)
            self._ledger_copied.record(self._copies)

    def _join(self) -> None:
        """Finish the decision under way, if any, and send its victims to the ring."""
        if not self._deciding:
            return
        self._deciding = False
        if self._gpu:
            self._ledger_copied.synchronize()
        self.store.ledger.finish()
        self._refill()

    def _refill(self) -> None:
        """Write the queue's first entries into the ring; what is there already is written again unchanged."""
        ledger, size = self.store.ledger, self._peeked.shape[3]
        if self._gpu:
            self._ring_copied.synchronize()  # the pinned buffer is free again
        ledger.peek(self._peeked, [0] * self.store.batch)
        self._ring_host.copy_(self._peeked.roll(self._replayed % size, 3))
        self._due = self._replayed + min(size, *ledger.queue_lengths()) - self.spec.interval
        if not self._gpu:
            self.ring.copy_(self._ring_host)
            return
        with torch.cuda.stream(self._copies):
            self.ring.copy_(self._ring_host, non_blocking=True)
            self._ring_copied.record(self._copies)

    def _replay(self, last_open: bool) -> None:
        """Tell the host's ledger of the steps since; the last one stays open for the decision that follows it."""
        ledger, ones = self.store.ledger, [1] * self.store.batch
        for step in range(self._replayed, self._steps):
            ledger.begin(ones, self.store.written)
            if step + 1 < self._steps or not last_open:
                if min(ledger.queue_lengths()) <= self.spec.interval and step + 1 < self._steps:
                    raise CacheError("a decision was missed: this is a defect of liquidfusion")
                ledger.finish()
        self._replayed = self._steps


def _addresses(tensors: Iterable[Tensor]) -> Iterator[int]:
    """Where tensors are; those that are made of others, as DTensor, have no memory but theirs."""
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
            yield from _addresses(part for part in parts if isinstance(part, Tensor))
        else:
            yield tensor.data_ptr()


def _own(output: Any) -> Any:
    """A copy of a captured output that the next replay does not overwrite."""
    if not isinstance(output, ModelOutput):
        return output
    return type(output)(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in output.items()})
