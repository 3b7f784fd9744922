"""Decode on CUDA: one graph per step, and victims that are chosen beside it.

Layers that are kept alike form a group, and each group's slots are reused through a ring of its own (`reuse.py`); all
layers of a step, whatever their group, are in one graph.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from liquidfusion.compute import kernels, softmax
from liquidfusion.compute.codes import rotation
from liquidfusion.compute.looks import Rule
from liquidfusion.compute.softmax import How
from liquidfusion.exceptions import UnsupportedError
from liquidfusion.geometry import Geometry, Kind
from liquidfusion.options import Run
from liquidfusion.run.backend import Backend, attending
from liquidfusion.run.reuse import Reuse
from liquidfusion.state.group import Groups
from liquidfusion.state.ledger import Scores
from liquidfusion.state.sides import Coded, Front
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


GROUPED, BATCHED = "grouped_mm", "batched_mm"
"""Ways in which transformers lets experts compute: each expert's tokens together, or each token by its own weights."""

FEW = 8
"""Rows up to which each row's experts are gathered: copies of their weights take memory."""


def experts_way(rows: int, compiled: bool, weight: Tensor) -> str:
    """How experts that compute by grouped products do so in a step of `rows` tokens that is replayed.

    But for their fast path, bfloat16 on capability 9.0, torch's grouped products wait for the host, and no graph can be
    captured. In a compiled step of one row the gather is a part of the product.
    """
    fast = weight.dtype == torch.bfloat16 and torch.cuda.get_device_capability(weight.device) >= (9, 0)
    return BATCHED if rows <= FEW and not (fast and (rows > 1 or not compiled)) else GROUPED


@dataclass(frozen=True)
class Place:
    """Slots that a layer attends to.

    `slots`, `scores`: what is stored, and what stands beside. `ring`: the slots that coming steps overwrite, int32
    `[rows, kv_heads, entries]`. `rule`: how looks become scores. `reads`: whether they are another layer's, which the
    layer reads and leaves as they are. `window`, `chunked`: of a layer whose attention is told of its window in masks
    only, and else 0.
    """

    slots: Slots
    scores: Scores
    ring: Tensor
    rule: Rule
    reads: bool = False
    window: int = 0
    chunked: bool = False


class DecodeStep(Backend):
    """A decode step as the attention layers see it: every layer with slots goes through the decode kernel.

    Plain values and lists: torch.compile traces through this object.

    Parameters
    ----------
    places : sequence of Place or None
        Of each layer of the model; None for one that does not attend.
    device : torch.device
        Where all of them are.
    used, seen, active : Tensor
        Steps taken, tokens read and whether a row reads one, int32 `[rows]` each.
    """

    def __init__(
        self,
        places: Sequence[Place | None],
        device: torch.device,
        used: Tensor,
        seen: Tensor,
        active: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.places = list(places)
        self.used, self.seen, self.active = used, seen, active
        self.reads = frozenset(i for i, place in enumerate(self.places) if place is not None and place.reads)
        self.kernels = [(None, {}) if place is None else _kernel(place.slots, device) for place in self.places]
        self.layers = sum(place is not None for place in self.places)
        self.layer = -1
        self.attended = 0

    @property
    def slots(self) -> list[Slots]:
        """What is stored, of each layer that has slots of its own."""
        return [place.slots for place in self.places if place is not None and not place.reads]

    @property
    def scores(self) -> list[Scores]:
        """What stands beside, likewise."""
        return [place.scores for place in self.places if place is not None and not place.reads]

    def take(self, layer: int) -> None:
        """Note which layer attends next."""
        self.layer = layer

    def attend(self, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        """Write and attend one token per row: `[batch, heads, 1, head_dim]` in and out."""
        place = self.places[self.layer]
        assert place is not None  # a layer that attends
        slots, scores, rule = place.slots, place.scores, place.rule
        window, chunked = (place.window, place.chunked) if place.window else (how.window, how.chunked)
        self.attended += 1
        if place.reads:
            # The layer whose slots these are has attended before, and written the token that is read now.
            mask = softmax.visible(self.seen[:, None], scores.positions, window, chunked)
            return softmax.attend(query, *slots.read(), mask, how, None)
        slots.check(self.layer, key)
        decode, more = self.kernels[self.layer]
        new = (key[:, :, 0],) if decode is kernels.decode_latent else (key[:, :, 0], value[:, :, 0])
        out = decode(
            query[:, :, 0],
            *new,
            *slots.memory,
            scores.positions,
            scores.mass,
            scores.peak,
            place.ring,
            self.used,
            self.seen,
            sinks=how.sinks,
            scale=how.scale,
            mass_decay=rule.mass_decay,
            peak_decay=rule.peak_decay,
            value_weighted=rule.value_weighted,
            softcap=how.softcap,
            window=window,
            chunked=chunked,
            look_gap=rule.look_gap,
            active=self.active,
            **more,
        )
        attended: Tensor = out[:, :, None]
        return attended


def _kernel(slots: Slots, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The kernel that decodes over a layer's slots, and what it alone is told of them."""
    if isinstance(slots.values, Front):
        return kernels.decode_latent, {"rank": slots.values.width}
    if not slots.coded:
        return kernels.decode, {}
    sides = (slots.keys, slots.values)
    one = next(side.coding for side in sides if isinstance(side, Coded))
    mean = slots.keys.coding.rotated_mean(device) if isinstance(slots.keys, Coded) else None
    bits = tuple(side.coding.bits if isinstance(side, Coded) else 16 for side in sides)
    first = [side.first if isinstance(side, Coded) else None for side in sides]
    return kernels.decode_coded, {
        "rotation": rotation(one.width, device),
        "mean": mean,
        "bits": bits,
        "key_first": first[0],
        "value_first": first[1],
    }


class Graph:
    """Runs decode steps on one device while the host's ledgers follow behind.

    Parameters
    ----------
    model : PreTrainedModel
        Whose steps they are.
    groups : Groups
        All of its layers that have slots, on one device.
    geometry : Geometry
        Of the model.
    states : callable
        Gives the tensors beside the slots that a step changes in place: recurrent and convolution states.
    run : Run
        `graph`: capture the step in a CUDA graph at the second step; the first one warms up, and both are real.
        `compile`: let torch.compile fuse what lies between the kernels. `overlap`: False waits for each decision
        instead of running beside it; same results, slower.
    evicting : bool
        False: reuse the rings' slots in turn and decide nothing, to measure what eviction costs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Groups,
        geometry: Geometry,
        states: Callable[[], Iterable[Tensor]],
        run: Run,
        evicting: bool,
    ) -> None:
        self._model = weakref.ref(model)  # as the cache: neither keeps its memory
        self.run, self._evicting, self._states = run, evicting, states
        self._capturing = run.graph and geometry.replayable
        self.ledgers = [group.ledger for group in groups.all]
        (self.device,) = set().union(*(group.devices for group in groups.all))
        self._gpu = self.device.type == "cuda"
        self.reuses = [Reuse(group, self.device, run.overlap) for group in groups.all]
        batch = self.ledgers[0].batch
        replays = self._gpu and self._capturing
        self.experts = experts_way(batch, run.compile, next(model.parameters())) if replays else GROUPED
        with torch.inference_mode(False):
            self.used = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self.seen = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self._ids = torch.zeros((batch, 1), dtype=torch.int64, device=self.device)
            self._positions = torch.zeros((batch, 1), dtype=torch.int64, device=self.device)
        self.running = False
        self._compiled: Callable[..., Any] | None = None
        self._captured: tuple[torch.cuda.CUDAGraph, Any] | None = None
        self._captured_with: list[int] = []
        self._warned = False
        self._warm = False
        self._backend = DecodeStep(list(self._places(groups, geometry)), self.device, self.used, self.seen)

    def _places(self, groups: Groups, geometry: Geometry) -> Iterator[Place | None]:
        for number, layer in enumerate(geometry.layers):
            if layer.kind == Kind.NONE:
                yield None
                continue
            which, index = groups.places[layer.source]
            reuse = self.reuses[which]
            slots = reuse.group.slots[index]
            assert slots is not None  # the prompt has filled them
            yield Place(
                slots,
                reuse.ledger.at(index, self.device),
                reuse.ring[index],
                reuse.group.rule,
                layer.source != number,
                0 if layer.told else layer.window,
                layer.kind == Kind.CHUNKED,
            )

    @property
    def captured(self) -> bool:
        """Whether steps are replayed."""
        return self._captured is not None

    @property
    def pending(self) -> int:
        """Steps that the host's ledgers do not know of yet, of the first group."""
        return self.reuses[0].pending

    def start(self) -> None:
        """Take over from the host's ledgers, which are complete."""
        if self.running:
            return
        self.running = True
        if self._captured is not None and self._captured_with != self._weights():
            self._captured = None  # it reads memory that the weights have left
        self.used.zero_()
        self.seen.copy_(torch.tensor(self.ledgers[0].core.seen, dtype=torch.int32, device="cpu"))
        for reuse in self.reuses:
            reuse.start()

    def stop(self) -> None:
        """Bring the host's ledgers up to date and hand over to them."""
        if not self.running:
            return
        for reuse in self.reuses:
            reuse.stop()
        self.running = False

    def abandon(self) -> None:
        """Forget the steps taken: the slots are emptied next."""
        if self._gpu:
            torch.cuda.synchronize(self.device)
        for reuse in self.reuses:
            reuse.abandon()
        self.running = False

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
        with torch.cuda.device_of(self.used):  # type: ignore[no-untyped-call]
            return self._step(forward, inputs, columns)

    def _step(self, forward: Callable[..., Any], inputs: dict[str, Any], columns: int) -> Any:
        self.start()
        for reuse in self.reuses:
            reuse.wait()
        plain = set(inputs) <= GRAPH_INPUTS and inputs.get("return_dict") is not False
        if self._capturing and self._gpu and plain and inputs.get("input_ids") is not None and not self._autocast():
            output = self._graph_step(forward, inputs, columns)
        else:
            output = self._run(forward, inputs)
        for reuse in self.reuses if self._evicting else ():
            reuse.stepped()
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
        """Where the weights are, and the states that a step changes."""
        model = self._model()
        assert model is not None  # it is running
        return list(_addresses(chain(model.parameters(), model.buffers(), self._states())))

    def _run(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        self._backend.attended = 0
        with attending(self._backend, compiled=self._compiled is not None):
            output = forward(**inputs)
        if self._compiled is None and self._backend.attended != self._backend.layers:
            raise UnsupportedError(
                f"the model ran {self._backend.attended} of {self._backend.layers} attention layers through the cache"
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
            options: dict[str, Any] = {"coordinate_descent_tuning": len(self._ids) == 1}
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
