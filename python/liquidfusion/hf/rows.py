"""The rows of a KVCache one by one: requests come and go in them, and each call brings some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from liquidfusion.compute import kernels
from liquidfusion.exceptions import CacheError, ConfigError, UnsupportedError
from liquidfusion.geometry import layer_devices
from liquidfusion.hf.cache import KVCache
from liquidfusion.hf.function import IMPLEMENTATION, REPLAYED
from liquidfusion.hf.hook import Forward, cache_keyword, switched
from liquidfusion.options import Strategy
from liquidfusion.run.backend import Backend, attending
from liquidfusion.run.eager import Eager
from liquidfusion.run.graph import DecodeStep
from liquidfusion.run.rowgraph import RowGraph, sizes_for
from liquidfusion.run.sampling import upload
from liquidfusion.run.step import Step
from liquidfusion.state import session
from liquidfusion.state.part import parts
from liquidfusion.state.row import RowState

SIZES = (1, 8, 64)
"""Batch sizes that decode steps are captured for, besides all rows."""


class RowCache(KVCache):
    """A KVCache whose rows are requests of their own.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode.
    rows : int
        Batch rows.
    strategy, budget, **options
        As for `KVCache`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int,
        strategy: str | Strategy = "liquid_fusion",
        budget: int | None = None,
        **options: Any,
    ) -> None:
        if options.get("cache_size") is not None:
            raise ConfigError(f"cache_size={options['cache_size']}: prompts differ in length; give a budget")
        super().__init__(model, strategy, budget, **options)
        if any(layer.state for layer in self._geometry.layers):
            raise UnsupportedError(
                f"{type(model).__name__} keeps a recurrent state beside its slots, and an Engine's rows hold slots "
                "alone: use KVCache"
            )
        self.rows, self.sizes = rows, sizes_for(rows, SIZES)
        self.vocabulary = self._geometry.vocabulary
        self.device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]
        known = self._geometry.positions
        self.most_positions = known if known and self._rotary is None else None
        """Tokens that a sequence may have; None for any number."""
        self._keyword = cache_keyword(model)
        self._backend: Backend | None = None
        self._row_graph: RowGraph | None = None
        self._compiled: Callable[..., Any] | None = None
        devices = layer_devices(model)
        for number, group in enumerate(self._groups.all):
            first = self._groups.first(number)
            group.allocate(rows, self._geometry.layers[first].kv_heads, 256, devices[first])
        self._seen.columns, self._seen.batch = 1, rows  # transformers goes by `position_ids`
        # One call makes all slots: no later one needs more memory.
        with torch.inference_mode():
            self.read([(0, [0, 0])])
            self._tensors = session.gather(parts(self._groups, range(1)))
            self.release(0)
            self._row_graph = self._graph_of()

    def read(self, chunks: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """Let rows read tokens, each as one chunk; neighbours whose chunks are equally long do it in one call.

        Parameters
        ----------
        chunks : sequence of (int, sequence of int)
            Rows, each at most once, and their tokens.

        Returns
        -------
        Tensor
            Logits after the last token of each, `[chunks, vocabulary]`.
        """
        logits: dict[int, Tensor] = {}
        for run in _neighbours(chunks):
            rows = range(run[0][0], run[0][0] + len(run))
            ids = upload([own for _, own in run], torch.int64, self.device)
            found = self._call(rows, (ids.shape[1],) * len(run), ids)
            logits |= zip(rows, torch.split(found, 1), strict=True)
        return torch.cat([logits[row] for row, _ in chunks])

    def decode(self, rows: tuple[int, ...], last: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Let rows read one token each.

        Parameters
        ----------
        rows : tuple of int
            In ascending order.
        last : Tensor
            int64 `[rows]`, by row.

        Returns
        -------
        tuple
            Logits `[lanes, vocabulary]`, and the row of each lane, -1 for none.
        """
        if self._row_graph is not None:
            logits = self._row_graph.step(rows, last)
            return logits, _lanes(range(len(logits)), rows)
        some = range(rows[0], rows[-1] + 1)
        lanes = _lanes(some, rows)
        lengths = tuple(int(row >= 0) for row in lanes)
        return self._call(some, lengths, last[some.start : some.stop, None]), lanes

    def release(self, row: int) -> None:
        """Empty a row."""
        if self._row_graph is not None:
            self._row_graph.leave(row)
        for group in self._groups.all:
            group.release(row)

    def copy_row(self, source: int, target: int) -> None:
        """Make a row hold what another does."""
        if self._row_graph is not None:
            self._row_graph.settle(source)
        for group in self._groups.all:
            group.copy_row(source, target)

    def save_row(self, row: int, tokens: tuple[int, ...]) -> RowState:
        """What a row holds, which has read `tokens`, in host memory."""
        if self._row_graph is not None:
            self._row_graph.settle(row)
        some = parts(self._groups, range(row, row + 1))
        seen = some.all[0].ledger.core.seen
        if seen != [len(tokens)]:
            raise CacheError(f"row {row} has read {seen[0]} tokens, not {len(tokens)}: a defect of liquidfusion")
        description = {
            **self._kind(),
            "columns": len(tokens),
            "seen": seen,
            "slots": [group.ledger.slots for group in some.all],
            "evictions": 0,
        }
        return RowState(tokens, description, _to_host(session.gather(some)))

    def load_row(self, row: int, state: RowState) -> None:
        """Make an empty row hold what was saved.

        Raises
        ------
        CacheError
            The state is of another model, strategy or budget.
        """
        self.check_state(state)
        for group, slots in zip(self._groups.all, state.description["slots"], strict=True):
            group.reserve(slots)
        session.refill(state.tensors, state.description["seen"], parts(self._groups, range(row, row + 1)))

    def check_state(self, state: RowState) -> None:
        """Refuse a state of another model or strategy.

        Raises
        ------
        CacheError
            Naming what differs.
        """
        own = self._kind()
        for name in ("spec", "model"):
            ours, theirs = own[name], state.description[name]
            differs = next((key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)), None)
            if differs is not None:
                raise CacheError(
                    f"the state was kept with {differs}={theirs.get(differs)!r}, here it is {ours.get(differs)!r}"
                )
        if state.description.get("held") != own.get("held"):
            raise CacheError(
                f"the state holds its layers in {state.description.get('held')}, here in {own.get('held')}"
            )
        session.check(state.tensors, self._tensors)

    def _kind(self) -> dict[str, Any]:
        """What a state must agree on with the rows that it goes into."""
        kind = {"spec": self._told(), "model": asdict(session.Fingerprint.of(self._geometry))}
        if self._bits is None:
            return kind
        slots = next(slots for group in self._groups.all for slots in group.slots if slots is not None)
        return kind | {"made": str(slots.keys.made).removeprefix("torch."), "held": self._groups.held}

    def reset(self) -> None:
        """Empty all rows, whatever has happened."""
        if self._row_graph is not None:
            self._row_graph.abandon()
        super().reset()
        for group in self._groups.all:
            for slots in group.slots:
                for tensor in () if slots is None else slots.tensors().values():
                    tensor.zero_()  # what is empty must not hold NaN
        self._seen.columns = 1

    def _call(self, rows: range, lengths: tuple[int, ...], ids: Tensor) -> Tensor:
        """One call of the model for some rows; logits of the last column `[rows, vocabulary]`."""
        every, columns = self._groups.all[0].ledger.core.seen, ids.shape[1]
        seen = tuple(every[row] for row in rows)
        for group in self._groups.all:
            group.reserve(max(seen) + columns)
        ranks = torch.arange(columns, dtype=torch.int32, device="cpu").repeat(len(rows), 1)
        ranks[[i for i, length in enumerate(lengths) if not length]] = -1
        step = Step(columns, lengths, seen, ranks, 0 in lengths)
        positions = ranks.clamp(min=0).long() + torch.tensor(seen, dtype=torch.int64, device="cpu")[:, None]
        if self._rotary is not None:
            positions = torch.zeros_like(positions)  # the model leaves its queries and keys un-rotated
        backend = Eager(
            parts(self._groups, rows),
            step,
            self._geometry,
            self._rotary,
            self._relative_from,
            self._run.threads,
        )
        logits = self._forward(backend, ids, upload(positions, torch.int64, self.device))
        backend.close()
        self._seen.every_call |= backend.every_call
        return logits

    def _forward(self, backend: Backend, ids: Tensor, positions: Tensor) -> Tensor:
        """Let the model compute with a backend; logits of the last column `[rows, vocabulary]`."""
        self._backend = backend
        given = {"position_ids": positions, self._keyword: self, "logits_to_keep": 1}
        logits: Tensor = self.model(input_ids=ids, use_cache=True, **given).logits[:, -1]
        return logits

    def run(self, inputs: dict[str, Any], forward: Forward) -> Any:
        """Serve the call that `_forward` makes."""
        backend, self._backend = self._backend, None
        if backend is None:
            raise CacheError("this cache belongs to an Engine, which alone may use it")
        if isinstance(backend, DecodeStep) and self._run.compile:
            if self._compiled is None:
                self._compiled = torch.compile(forward, dynamic=False)
            forward = self._compiled
        eager = torch.compiler.set_stance("force_eager") if isinstance(backend, Eager) else nullcontext()
        implementation = REPLAYED if isinstance(backend, DecodeStep) else IMPLEMENTATION
        with switched(self._configs, implementation), attending(backend), eager:
            return forward(**inputs)

    def _graph_of(self) -> RowGraph | None:
        """What runs decode steps on a GPU: layers alike and on one device."""
        group = self._groups.all[0]
        if len(self._groups.all) > 1 or self._rotary is not None or not group.replayable:
            return None
        if self._geometry.untold or not self._geometry.own or self._seen.every_call:
            return None
        if len(group.devices) > 1 or not kernels_run_on(next(iter(group.devices))):
            return None
        graph = RowGraph(group, self.sizes, self._run, self._forward)
        graph.warm()
        return graph


def _to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, pinned where they came from a GPU: they go back faster."""
    kept, devices = {}, set()
    for name, tensor in tensors.items():
        pinned = tensor.device.type == "cuda"
        kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        kept[name].copy_(tensor, non_blocking=pinned)
        devices |= {tensor.device} if pinned else set()
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return kept


def _neighbours(chunks: Sequence[tuple[int, Sequence[int]]]) -> list[list[tuple[int, Sequence[int]]]]:
    """Chunks that one call can read: of rows next to each other, and equally long."""
    runs: list[list[tuple[int, Sequence[int]]]] = []
    for row, ids in sorted(chunks, key=lambda chunk: chunk[0]):
        if runs and runs[-1][-1][0] == row - 1 and len(runs[-1][-1][1]) == len(ids):
            runs[-1].append((row, ids))
        else:
            runs.append([(row, ids)])
    return runs


def _lanes(reached: range, rows: tuple[int, ...]) -> tuple[int, ...]:
    """The row of each lane, -1 where it rests."""
    some = set(rows)
    return tuple(row if row in some else -1 for row in reached)


def kernels_run_on(device: torch.device) -> bool:
    """Whether decode steps go through the kernels."""
    return kernels.available(device)
