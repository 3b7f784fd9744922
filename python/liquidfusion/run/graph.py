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

from liquidfusion.compute import kernels
from liquidfusion.compute.codes import rotation
from liquidfusion.compute.softmax import How
from liquidfusion.exceptions import CacheError, UnsupportedError
from liquidfusion.options import Run
from liquidfusion.run.backend import Backend, attending
from liquidfusion.state.group import Group
from liquidfusion.state.sides import Coded
from liquidfusion.state.slots import Slots

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


class DecodeStep(Backend):
    """A decode step as the attention layers see it: every layer goes through the decode kernel.

    Plain values and lists: torch.compile traces through this object.
    """

    def __init__(
        self,
        group: Group,
        device: torch.device,
        ring: Tensor,
        used: Tensor,
        seen: Tensor,
        active: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.slots: list[Slots] = [layer for layer in group.slots if layer is not None]
        self.scores = [group.ledger.at(index, device) for index in range(group.ledger.layers)]
        self.rings = list(ring.unbind())
        self.used, self.seen, self.active, self.rule = used, seen, active, group.rule
        self.coded = [_coding(slots, device) for slots in self.slots]
        self.layer = -1
        self.attended = 0

    def take(self, layer: int) -> None:
        """Note which layer attends next."""
        self.layer = layer

    def attend(self, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        """Write and attend one token per row: `[batch, heads, 1, head_dim]` in and out."""
        slots, scores = self.slots[self.layer], self.scores[self.layer]
        slots.check(self.layer, key)
        self.attended += 1
        coded = self.coded[self.layer]
        decode: Any = kernels.decode if coded is None else kernels.decode_coded
        out = decode(
            query[:, :, 0],
            key[:, :, 0],
            value[:, :, 0],
            *slots.memory,
            scores.positions,
            scores.mass,
            scores.peak,
            self.rings[self.layer],
            self.used,
            self.seen,
            sinks=how.sinks,
            scale=how.scale,
            mass_decay=self.rule.mass_decay,
            peak_decay=self.rule.peak_decay,
            value_weighted=self.rule.value_weighted,
            softcap=how.softcap,
            window=how.window,
            look_gap=self.rule.look_gap,
            active=self.active,
            **(coded or {}),
        )
        attended: Tensor = out[:, :, None]
        return attended


def _coding(slots: Slots, device: torch.device) -> dict[str, Any] | None:
    """What the kernel over codes is told of a layer; None for one without codes."""
    if not slots.coded:
        return None
    sides = (slots.keys, slots.values)
    one = next(side.coding for side in sides if isinstance(side, Coded))
    mean = slots.keys.coding.rotated_mean(device) if isinstance(slots.keys, Coded) else None
    bits = tuple(side.coding.bits if isinstance(side, Coded) else 16 for side in sides)
    first = [side.first if isinstance(side, Coded) else None for side in sides]
    return {
        "rotation": rotation(one.width, device),
        "mean": mean,
        "bits": bits,
        "key_first": first[0],
        "value_first": first[1],
    }


class Graph:
    """Runs decode steps on one device while the host's ledger follows behind.

    Parameters
    ----------
    model : PreTrainedModel
        Whose steps they are.
    group : Group
        All of its layers, on one device.
    run : Run
        `graph`: capture the step in a CUDA graph at the second step; the first one warms up, and both are real.
        `compile`: let torch.compile fuse what lies between the kernels. `overlap`: False waits for each decision
        instead of running beside it; same results, slower.
    evicting : bool
        False: reuse the ring's slots in turn and decide nothing, to measure what eviction costs.
    """

    def __init__(self, model: PreTrainedModel, group: Group, run: Run, evicting: bool) -> None:
        self._model = weakref.ref(model)  # as the cache: neither keeps its memory
        self.group, self.ledger, self.spec = group, group.ledger, group.spec
        self.run, self._capturing, self._evicting = run, run.graph, evicting
        self.device = group.devices.pop()
        self._gpu = self.device.type == "cuda"
        batch = self.ledger.batch
        ring = (*self.ledger.shape[:3], 2 * self.spec.interval)
        with torch.inference_mode(False):
            self.ring = torch.zeros(ring, dtype=torch.int32, device=self.device)
            self._ring_host = torch.zeros(ring, dtype=torch.int32, device="cpu", pin_memory=self._gpu)
            self._peeked = torch.zeros(ring, dtype=torch.int32, device="cpu")
            self.used = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self.seen = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self._ids = torch.zeros((batch, 1), dtype=torch.int64, device=self.device)
            self._positions = torch.zeros((batch, 1), dtype=torch.int64, device=self.device)
        self._staging: Tensor | None = None
        self._distinct: Tensor | None = None  # of the decision under way
        self._worth: Tensor | None = None  # the same where it is computed
        if self._gpu:
            self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._scores_copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
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
        self._backend = DecodeStep(group, self.device, self.ring, self.used, self.seen)

    @property
    def captured(self) -> bool:
        """Whether steps are replayed."""
        return self._captured is not None

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
        self.ledger.wait()
        self._steps = self._replayed = 0
        self.used.zero_()
        self.seen.copy_(torch.tensor(self.ledger.core.seen, dtype=torch.int32, device="cpu"))
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
        if self._steps:
            self.ledger.attended([1] * self.ledger.batch)
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
        if self._capturing and self._gpu and plain and inputs.get("input_ids") is not None and not self._autocast():
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
        self._backend.attended = 0
        with attending(self._backend, compiled=self._compiled is not None):
            output = forward(**inputs)
        if self._compiled is None and self._backend.attended != self.ledger.layers:
            raise UnsupportedError(
                f"the model ran {self._backend.attended} of {self.ledger.layers} attention layers through the cache"
            )
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
        if self.run.compile and self._compiled is None:
            # The step bound by memory, one token per row: a matrix product of one row is best a fused reduction.
            options: dict[str, Any] = {"coordinate_descent_tuning": self.ledger.batch == 1}
            self._compiled = torch.compile(forward, dynamic=False, options=options)
        step = self._compiled or forward
        if not self._warm:
            self._warm = True
            return self._run(step, static)
        if self._captured is None:
            try:
                self._captured = self._capture(step, static)
            except RuntimeError as error:
                self._capturing = False
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
        due = bool(self.ledger.due())
        self._distinct = self._distinctness() if due and self.spec.distinct else None
        if self.spec.scored and due:
            self._deciding = True
            self._copy_scores()
            if not self.run.overlap or not self._gpu:
                self._join()
            else:
                self._due = self._steps + 2 * self.spec.interval  # set for good when the decision is joined
        else:
            self.ledger.finish(self._distinct)
            if self._gpu:
                # The host may be ahead: the ring is written once the step launched last has read its entry.
                self._copies.wait_stream(torch.cuda.current_stream(self.device))
            self._refill()

    def _copy_scores(self) -> None:
        host = self.ledger.host.attention()
        assert host is not None
        layers = [self.ledger.at(index, self.device).attention() or () for index in range(self.ledger.layers)]
        here = [scores for kind in zip(*layers, strict=True) for scores in kind]
        if not self._gpu:
            torch._foreach_copy_([scores for kind in host for scores in kind], here)
            return
        if self._staging is None:
            with torch.inference_mode(False):
                self._staging = torch.empty((2, *self.ledger.shape), dtype=torch.float32, device=self.device)
        torch._foreach_copy_(list(self._staging.flatten(0, 1)), here)
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            for own, newest in zip(host, self._staging, strict=True):
                own.copy_(newest, non_blocking=True)
            if self._worth is not None and self._distinct is not None:
                self._distinct.copy_(self._worth, non_blocking=True)
            self._scores_copied.record(self._copies)

    def _distinctness(self) -> Tensor:
        """Distinctness of the tokens that no victim is chosen of yet, `[layers, batch, kv_heads, slots]` on the CPU.

        On a GPU where scores are copied, too, it is there when they are.
        """
        if not (self._gpu and self.spec.scored):
            return self.group.distinctness()
        if self._worth is None:
            with torch.inference_mode(False):
                self._worth = torch.empty(self.ledger.shape, dtype=torch.float32, device=self.device)
                self._worth_host = torch.empty(self.ledger.shape, dtype=torch.float32, device="cpu", pin_memory=True)
        size, slots = self.ring.shape[3], self.ledger.slots
        # What is left of the queues is in the ring, from the entry that the next step takes.
        lengths = torch.tensor(self.ledger.core.queue_lengths(), device=self.device)
        waiting = (torch.arange(size, device=self.device) - self._replayed) % size < lengths[:, None]
        for index in range(self.ledger.layers):
            held = torch.nn.functional.pad(self._backend.scores[index].positions >= 0, (0, 1))
            taken = self.ring[index].long().where(waiting[:, None], slots)
            held.scatter_(2, taken, False)
            self._worth[index] = self._backend.slots[index].distinctness(held[..., :slots].contiguous())
        return self._worth_host

    def _join(self) -> None:
        """Finish the decision under way, if any, and send its victims to the ring."""
        if not self._deciding:
            return
        self._deciding = False
        if self._gpu:
            self._scores_copied.synchronize()
        self.ledger.finish(self._distinct)
        self._refill()

    def _refill(self) -> None:
        """Write the queue's first entries into the ring; what is there already is written again unchanged."""
        core, size = self.ledger.core, self._peeked.shape[3]
        if self._gpu:
            self._ring_copied.synchronize()  # the pinned buffer is free again
        core.peek(self._peeked, [0] * self.ledger.batch)
        self._ring_host.copy_(self._peeked.roll(self._replayed % size, 3))
        self._due = self._replayed + min(size, *core.queue_lengths()) - self.spec.interval
        if not self._gpu:
            self.ring.copy_(self._ring_host)
            return
        with torch.cuda.stream(self._copies):
            self.ring.copy_(self._ring_host, non_blocking=True)
            self._ring_copied.record(self._copies)

    def _replay(self, last_open: bool) -> None:
        """Tell the host's ledger of the steps since; the last one stays open for the decision that follows it."""
        core, ones = self.ledger.core, [1] * self.ledger.batch
        for step in range(self._replayed, self._steps):
            core.begin(ones, self.ledger.written)
            if step + 1 < self._steps or not last_open:
                if self.ledger.due() and step + 1 < self._steps:
                    raise CacheError("a decision was missed: this is a defect of liquidfusion")
                self.ledger.finish()
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
