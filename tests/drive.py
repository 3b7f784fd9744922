"""Drives the Rust ledger call by call as the cache does, beside the naive twins, with injected probabilities.

Why the comparison may demand identical positions although the ledger is float32 and the twin float64: each call's
probabilities are drawn, shown to the twins first, and drawn again if any choice of any twin had a margin below `MARGIN`
(relative), which is far above the float32 error of a few hundred additions. An exact tie is accepted: it comes from
equal operations on equal numbers, so it is a tie in both arithmetics, and the rule decides it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from torch import Tensor

from liquidfusion import _core
from reference import Rules, Twin, distinctness

MARGIN = 1e-4
ATTEMPTS = 60

Draw = Callable[[np.random.Generator, list[int], list[int], int], np.ndarray]
"""From (generator, visible positions, positions of the queries, group) to float32 [group, queries, visible]."""


def continuous(rng: np.random.Generator, visible: list[int], queries: list[int], group: int) -> np.ndarray:
    """Peaked random attention in which some positions stay popular, causal, rows summing to 1."""
    popular = np.array([((position * 2654435761) % 97) / 24 for position in visible])
    logits = rng.normal(size=(group, len(queries), len(visible))) * 1.5 + popular
    causal = np.asarray(visible)[None, :] <= np.asarray(queries)[:, None]
    weights = np.where(causal, np.exp(logits), 0.0)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def dyadic(rng: np.random.Generator, visible: list[int], queries: list[int], group: int) -> np.ndarray:
    """Attention in quarters: with no fading every sum is exact in float32, so equal masses are true ties."""
    out = np.zeros((group, len(queries), len(visible)), np.float32)
    where = {position: column for column, position in enumerate(visible)}
    for head in range(group):
        for row, query in enumerate(queries):
            candidates = [where[position] for position in visible if position <= query]
            for column in rng.choice(candidates, size=4):
                out[head, row, column] += 0.25
    return out


def key(layer: int, row: int, head: int, position: int) -> list[float]:
    """The key of a token: a few numbers that lean one way, so that some keys point elsewhere."""
    rng = np.random.default_rng([layer, row, head, position])
    return [float(x) for x in rng.normal(0.3, 1.0, size=6)]


@dataclass
class Call:
    """Real new tokens of each row, and the columns of padding put before them."""

    lengths: Sequence[int]
    padding: int = 0


@dataclass
class Drive:
    """One ledger and its twins, `layers` x `batch` x `kv_heads` of them.

    Stored keys and values are stood in for by `tags`, the position of the token whose K/V lie in each slot: they are
    written only through the slots and sources the product names, so a K/V that does not belong to its position shows.
    """

    spec: _core.Spec
    rules: Rules
    layers: int
    batch: int
    kv_heads: int
    group: int
    seed: int
    draw: Draw = continuous
    threads: int | None = None
    slots: int = field(init=False)
    positions: Tensor = field(init=False)
    mass: Tensor | None = field(init=False)
    peak: Tensor | None = field(init=False)
    tags: Tensor = field(init=False)
    ledger: _core.Ledger = field(init=False)
    twins: dict[tuple[int, int, int], Twin] = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.slots = self.spec.budget if self.spec.budget is not None else 8
        self.positions, self.mass, self.peak, self.tags = self._buffers(self.slots)
        self.ledger = _core.Ledger(self.spec, self.positions, self.mass, self.peak, threads=self.threads)
        self.twins = {
            (layer, row, head): Twin(self.rules, layer, head, keys=self._keys(layer, row, head))
            for layer in range(self.layers)
            for row in range(self.batch)
            for head in range(self.kv_heads)
        }

    def _buffers(self, slots: int) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        shape = (self.layers, self.batch, self.kv_heads, slots)
        scores = (torch.zeros(shape), torch.zeros(shape)) if self.spec.scored else (None, None)
        return torch.full(shape, -1, dtype=torch.int32), *scores, torch.full(shape, -1, dtype=torch.int64)

    def _keys(self, layer: int, row: int, head: int) -> Callable[[list[int]], list[list[float]]]:
        return lambda positions: [key(layer, row, head, position) for position in positions]

    def _distinct(self, layer: int, row: int, head: int, held: Sequence[int]) -> Tensor:
        """What the product is told of the tokens at `held` (-1: none); NaN where it must not look."""
        candidates = [column for column, position in enumerate(held) if position >= 0]
        out = torch.full((len(held),), math.nan)
        if candidates:
            keys = self._keys(layer, row, head)([held[column] for column in candidates])
            out[candidates] = torch.tensor(distinctness(keys))
        return out

    def _weights(self, positions: Sequence[int]) -> np.ndarray:
        """What a look at each position counts; only the product is told weight and attention separately."""
        if not self.spec.value_weighted:
            return np.ones(len(positions))
        return np.array([0.5 + ((position + 1) * 40503 % 64) / 64 for position in positions])

    def _norms(self, layer: int, extra: Tensor | None = None) -> Tensor | None:
        """The same per slot (and per column of a chunk, whose positions are `extra`), as the product takes it."""
        if not self.spec.value_weighted:
            return None
        held = self.positions[layer] if extra is None else torch.cat([self.positions[layer], extra], -1)
        return torch.from_numpy(self._weights(held.flatten().tolist())).float().reshape(held.shape)

    def grow(self, slots: int) -> None:
        """More slots for an unbounded ledger, the contents copied."""
        old = (self.positions, self.mass, self.peak, self.tags)
        new = self._buffers(slots)
        for source, target in zip(old, new, strict=True):
            if source is not None:
                target[..., : self.slots] = source
        self.positions, self.mass, self.peak, self.tags = new
        self.slots = slots
        self.ledger.grow(self.positions, self.mass, self.peak)

    def call(self, call: Call) -> None:
        """One model call: the twins on probabilities they can decide, then the product on the same ones."""
        columns = max(call.lengths) + call.padding
        if columns == 0:
            return
        if not self.spec.bounded:
            needed = max(twin.seen + call.lengths[row] for (_, row, _), twin in self.twins.items())
            if needed > self.slots:
                self.grow(max(needed, 2 * self.slots))
        before = list(self.ledger.seen)
        # A chunk makes the choice anew.
        doomed = {key: [] if call.lengths[key[1]] > 1 else list(twin.doomed) for key, twin in self.twins.items()}
        looks = {key: self._twin(twin, call.lengths[key[1]], key) for key, twin in self.twins.items()}
        slots = torch.full((self.layers, self.batch, self.kv_heads), -7, dtype=torch.int64)
        self.ledger.begin(list(call.lengths), slots)
        for layer in range(self.layers):
            for row, new in enumerate(call.lengths):
                for head in range(self.kv_heads):
                    slot = int(slots[layer, row, head])
                    assert (slot >= 0) == (new == 1)
                    if new == 1:
                        self.tags[layer, row, head, slot] = before[row]
            if columns == 1:
                self._decode(layer, call, looks)
            else:
                self._chunk(layer, call, columns, before, looks)
        self.ledger.finish(self._distinct_slots(doomed) if self.spec.distinct else None)
        self.compare()

    def _distinct_slots(self, doomed: dict[tuple[int, int, int], list[int]]) -> Tensor:
        """Distinctness of what is stored and not queued, `[layers, batch, kv_heads, slots]`."""
        out = torch.empty(self.positions.shape)
        for where in self.twins:
            held = self.positions[where].tolist()
            out[where] = self._distinct(*where, [-1 if position in doomed[where] else position for position in held])
        return out

    def _twin(self, twin: Twin, new: int, key: tuple[int, int, int]) -> dict[int, np.ndarray]:
        """Advance a twin by one call; the accepted probabilities by visible position, [group, queries] each."""
        if new == 0:
            return {}
        for _ in range(ATTEMPTS):
            trial = twin.copy()
            trial.margin = math.inf
            seen: dict[int, np.ndarray] = {}

            def attend(
                visible: list[int], queries: list[int], seen: dict[int, np.ndarray] = seen
            ) -> list[list[list[float]]]:
                drawn = self.draw(self.rng, visible, queries, self.group)
                seen.update({position: drawn[..., column] for column, position in enumerate(visible)})
                return (drawn * self._weights(visible)).tolist()

            trial.call(new, attend)
            if trial.margin > MARGIN:
                self.twins[key] = trial
                return seen
        raise RuntimeError(f"no draw with a margin above {MARGIN} in {ATTEMPTS} attempts")

    def _decode(self, layer: int, call: Call, looks: dict[tuple[int, int, int], dict[int, np.ndarray]]) -> None:
        if not self.spec.scored:
            return
        assert self.mass is not None
        assert self.peak is not None
        probabilities = torch.zeros(self.batch, self.kv_heads, self.group, 1, self.slots)
        for row in range(self.batch):
            for head in range(self.kv_heads):
                held = self.positions[layer, row, head].tolist()
                self._fill(probabilities[row, head], looks[layer, row, head], held, call.lengths[row])
        ages = torch.tensor([[0 if new else -1] for new in call.lengths], dtype=torch.int32)
        _core.accumulate(
            probabilities, ages, list(call.lengths), self.mass[layer], self.peak[layer],
            self.spec.mass_decay, self.spec.peak_decay, weights=self._norms(layer), threads=self.threads,
        )  # fmt: skip

    def _chunk(
        self, layer: int, call: Call, columns: int, before: list[int],
        looks: dict[tuple[int, int, int], dict[int, np.ndarray]],
    ) -> None:  # fmt: skip
        ranks = torch.full((self.batch, columns), -1, dtype=torch.int32)
        for row, new in enumerate(call.lengths):
            ranks[row, columns - new :] = torch.arange(new, dtype=torch.int32)
        mass = peak = None
        if self.spec.scored:
            assert self.mass is not None
            assert self.peak is not None
            probabilities = torch.zeros(self.batch, self.kv_heads, self.group, columns, self.slots + columns)
            ages = torch.full((self.batch, columns), -1, dtype=torch.int32)
            fresh = torch.zeros(self.batch, self.kv_heads, columns)
            mass = torch.cat([self.mass[layer], fresh], -1)
            peak = torch.cat([self.peak[layer], fresh], -1)
            extra = torch.full((self.batch, self.kv_heads, columns), -1, dtype=torch.int32)
            for row, new in enumerate(call.lengths):
                # A row with one real token already lies in its slot; its column is not a second copy of it.
                if new > 1:
                    extra[row, :, columns - new :] = torch.arange(before[row], before[row] + new, dtype=torch.int32)
                ages[row, columns - new :] = torch.arange(new - 1, -1, -1, dtype=torch.int32)
                for head in range(self.kv_heads):
                    held = self.positions[layer, row, head].tolist() + extra[row, head].tolist()
                    self._fill(probabilities[row, head], looks[layer, row, head], held, new)
            norms = self._norms(layer, extra)

            def add(mass: Tensor, peak: Tensor) -> None:
                _core.accumulate(
                    probabilities, ages, list(call.lengths), mass, peak,
                    self.spec.mass_decay, self.spec.peak_decay, weights=norms, threads=self.threads,
                )  # fmt: skip

            if self.spec.peak_reach is None:
                add(mass, peak)
            else:
                # As the cache does: every look for the mass, then those within reach for the peak.
                add(mass, peak.clone())
                queries, keys = torch.arange(columns)[:, None], torch.arange(columns)
                probabilities[..., self.slots :] *= queries - keys <= self.spec.peak_reach
                add(mass.clone(), peak)
            for row, new in enumerate(call.lengths):
                if new == 1:
                    self.mass[layer, row] = mass[row, :, : self.slots]
                    self.peak[layer, row] = peak[row, :, : self.slots]
        distinct = None
        if self.spec.distinct:
            distinct = torch.full((self.batch, self.kv_heads, self.slots + columns), math.nan)
            for row, head in product(range(self.batch), range(self.kv_heads)):
                new = [before[row] + rank if rank >= 0 else -1 for rank in ranks[row].tolist()]
                held = self.positions[layer, row, head].tolist() + new
                distinct[row, head] = self._distinct(layer, row, head, held)
        source = torch.full((self.batch, self.kv_heads, self.slots), -7, dtype=torch.int32)
        self.ledger.chunk(layer, ranks, mass, peak, source, distinct)
        for row, new in enumerate(call.lengths):
            for head in range(self.kv_heads):
                for slot, column in enumerate(source[row, head].tolist()):
                    assert column >= -1
                    if column >= 0:
                        assert new >= 2
                        self.tags[layer, row, head, slot] = before[row] + int(ranks[row, column])

    def _fill(self, out: Tensor, look: dict[int, np.ndarray], held: list[int], new: int) -> None:
        """Spread probabilities over the columns that hold their positions; the last `new` queries are real.

        The caller of `accumulate` leaves out looks from nearer than the look gap, as the cache does.
        """
        columns = [column for column, position in enumerate(held) if position >= 0]
        if new and columns:
            assert {held[column] for column in columns} == set(look), "the product sees other tokens than the twin"
            stacked = np.stack([look[held[column]] for column in columns], -1)
            newest = max(look)
            queries, keys = np.arange(newest - new + 1, newest + 1), np.array([held[column] for column in columns])
            stacked[:, queries[:, None] - keys < self.spec.look_gap] = 0.0
            out[:, out.shape[1] - new :, columns] = torch.from_numpy(stacked)

    def compare(self) -> None:
        """Kept and doomed positions, counters and ledger of every head against its twin."""
        reach = 0 if not self.spec.bounded else self.slots
        queue = torch.full((self.layers, self.batch, self.kv_heads, max(reach, 1)), -7, dtype=torch.int32)
        self.ledger.queues(queue) if reach else None
        for (layer, row, head), twin in self.twins.items():
            where = f"layer {layer}, row {row}, head {head}, after {twin.seen} tokens"
            held = self.positions[layer, row, head].tolist()
            kept = sorted(position for position in held if position >= 0)
            assert kept == twin.kept, where
            slot_of = {position: slot for slot, position in enumerate(held) if position >= 0}
            tags = self.tags[layer, row, head].tolist()
            assert all(tags[slot] == position for position, slot in slot_of.items()), where
            if reach:
                doomed = [held[slot] for slot in queue[layer, row, head].tolist() if slot >= 0]
                assert [position for position in doomed if position >= 0] == twin.doomed, where
                assert doomed.count(-1) == twin.empty, where
            if self.mass is not None and self.peak is not None:
                order = [slot_of[position] for position in twin.kept]
                masses = [twin.tokens[position].mass for position in twin.kept]
                peaks = [twin.tokens[position].peak for position in twin.kept]
                for own, exact in ((self.mass, masses), (self.peak, peaks)):
                    error = np.abs(own[layer, row, head, order].numpy() - exact)
                    assert (error <= 1e-4 * np.asarray(exact) + 1e-12).all(), where
        assert list(self.ledger.seen) == [self.twins[0, row, 0].seen for row in range(self.batch)]
        assert self.ledger.evictions == sum(twin.evictions for twin in self.twins.values())
