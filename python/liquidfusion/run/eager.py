"""Calls that run as they come: chunks of a prompt everywhere, decode steps where no graph replays them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from liquidfusion import _core
from liquidfusion.compute import kernels, looks, softmax
from liquidfusion.compute.looks import Block, Rule
from liquidfusion.compute.rotary import Rotary, query_ranks, ranks
from liquidfusion.compute.softmax import How, Positions
from liquidfusion.exceptions import CacheError, UnsupportedError
from liquidfusion.geometry import Geometry, Kind
from liquidfusion.run.backend import Backend
from liquidfusion.run.sampling import upload
from liquidfusion.run.step import On, Step
from liquidfusion.state.group import Chunk, Group, Groups
from liquidfusion.state.ledger import Scores
from liquidfusion.state.sides import Coded, Plain
from liquidfusion.state.slots import Slots

_CORE_DTYPES = (torch.float32, torch.bfloat16)  # in which the core attends


@dataclass
class Held:
    """A chunk that is not decided yet, since other layers read it too: `waiting` of them."""

    key: Tensor
    value: Tensor
    scores: Tensor | None
    waiting: set[int]

    @property
    def kept(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What is decided about."""
        return self.key, self.value, self.scores


class Eager(Backend):
    """One call of the model: attention in plain torch, or in the fused kernels where they serve.

    Parameters
    ----------
    groups : Groups
        What is stored.
    step : Step
        What the call brings.
    geometry : Geometry
        What the model's layers look like.
    rotary : Rotary or None
        Gives positions relative to the cache.
    relative_from : int
        Length of a row in tokens from which on its positions are relative.
    threads : int or None
        Cap on the core's threads.
    """

    def __init__(
        self,
        groups: Groups,
        step: Step,
        geometry: Geometry,
        rotary: Rotary | None,
        relative_from: int,
        threads: int | None,
    ) -> None:
        super().__init__()
        self.attended = 0
        self._groups, self._step, self._geometry = groups, step, geometry
        self._rotary, self._relative_from, self._threads = rotary, relative_from, threads
        self.reads = frozenset(reader for readers in geometry.readers.values() for reader in readers)
        self._layer: int | None = None
        self._held: dict[int, Held] = {}
        self._written: dict[Group, Tensor] = {}
        # On a GPU a chunk is decided when the next layer attends, so that the device need not wait for the host: it
        # multiplies on meanwhile. Until then the chunk's keys and values stay, so two layers' exist for a moment.
        self._undecided: tuple[Group, int, Chunk] | None = None
        self._pinned: Tensor | None = None

    def take(self, layer: int) -> None:
        """Note which layer attends next."""
        self._layer = layer

    def attend(self, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        """Attend the new columns of that layer to what it stores, and store them."""
        if self._layer is None:
            raise CacheError("attention ran for a layer that did not hand its keys and values to the cache")
        number, self._layer = self._layer, None
        how = self._how(number, how)
        if number in self.reads:
            return self._read(number, query, how)
        self._settle()
        group, index = self._groups[number]
        self._begin(group, key)
        slots, scores = group.layer(index, key, value)
        slots.check(number, key)
        self.attended += 1
        if self._core_steps(slots, query, how):
            return self._step_by_core(group, index, slots, scores, query, key, value, how)
        self._write_single(group, index, slots, key, value)
        if self._step.columns == 1:
            return self._decode(number, group, slots, scores, query, how)
        return self._chunk(number, query, key, value, how)

    def close(self) -> None:
        """End the call: every layer, row and head gets its next victims.

        Raises
        ------
        UnsupportedError
            Some of the model's attention layers did not attend here.
        """
        layers = len(self._geometry.attention_layers) + len(self.reads)
        if self.attended != layers:
            raise UnsupportedError(
                f"{self._geometry.architecture} ran {self.attended} of {layers} attention layers through the cache; "
                "every layer must use transformers' attention interface"
            )
        self._settle()
        for group in self._written:
            group.finish(self._step.lengths, decoded=self._step.columns == 1)

    def _how(self, number: int, how: How) -> How:
        """How a layer attends, where its window is not told to its attention but in masks only."""
        layer = self._geometry.layers[number]
        if layer.window == how.window or not layer.window:
            return how
        told = (layer.window, layer.kind == Kind.CHUNKED) in self.windows
        if told and not how.window:
            return replace(how, window=layer.window, chunked=layer.kind == Kind.CHUNKED)
        if self._groups[layer.source][0].spec.strategy == "local":
            raise UnsupportedError(
                f"layer {number} attends to a window of {how.window} tokens (0: none), the model's configuration says "
                f"{layer.window}"
            )
        return how

    def _read(self, number: int, query: Tensor, how: How) -> Tensor:
        """Attend a layer that has no keys of its own to what another stores, and in a chunk to that one's columns."""
        source = self._geometry.layers[number].source
        self.attended += 1
        group, index = self._groups[source]
        if self._step.columns == 1:
            slots = group.slots[index]
            assert slots is not None
            return self._decode(source, group, slots, group.ledger.at(index, query.device), query, how, looking=False)
        held = self._held[source]
        output, _ = self._attend_chunk(source, query, held.key, held.value, how, looking=False)
        held.waiting.discard(number)
        if not held.waiting:
            self._settle()
            self._keep(group, index, *self._held.pop(source).kept)
        return output

    def _begin(self, group: Group, key: Tensor) -> None:
        if group in self._written:
            return
        step, kv_heads = self._step, key.shape[1]
        needed = max(step.seen) + step.columns
        if not group.fits(step.batch, kv_heads):
            group.allocate(step.batch, kv_heads, max(256, needed), key.device)
        group.reserve(needed)
        written = group.ledger.begin(step.lengths)
        self._written[group] = upload(written, written.dtype, key.device) if step.single else written

    def _write_single(self, group: Group, index: int, slots: Slots, key: Tensor, value: Tensor) -> None:
        """Rows with one real token overwrite the first slot of their queue before anyone attends (the decode rule)."""
        rows = self._step.single
        if not rows:
            return
        at = self._written[group][index].to(key.device)
        if self._step.decodes:
            slots.write(at, key, value)
            return
        row, column = torch.tensor(rows, device=key.device), self._step.single_columns.to(key.device)
        slots.write(at[row], key[row, :, column][:, :, None], value[row, :, column][:, :, None], rows)

    def _rotated(self, layer: int, query: Tensor, on: On, keys: Tensor, key_positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys rotated to where they stand in the cache, or in the sequence while it is short enough.

        `keys`: `[batch, kv_heads, columns, head_dim]` at `key_positions` `[batch, kv_heads, columns]`.
        """
        if self._rotary is None:
            return query, keys
        step = self._step
        length = torch.tensor([a + b for a, b in zip(step.seen, step.lengths, strict=True)], device=query.device)
        short = (length <= self._relative_from)[:, None, None]
        positions = on.query_positions[:, -query.shape[2] :]
        at_query = torch.where(short, positions[:, None].clamp(min=0), query_ranks(positions, key_positions))
        at_key = torch.where(short, key_positions.clamp(min=0), ranks(key_positions))
        grouped = query.view(query.shape[0], keys.shape[1], -1, *query.shape[2:])
        return self._rotary(grouped, at_query[:, :, None], layer).flatten(1, 2), self._rotary(keys, at_key, layer)

    def _core_steps(self, slots: Slots, query: Tensor, how: How) -> bool:
        """Whether the core takes a decode step as a whole: plain attention on a CPU, over numbers or over codes."""
        plain = self._rotary is None and not how.softcap and how.sinks is None
        if not (plain and self._step.decodes and query.device.type == "cpu"):
            return False
        keys, values = slots.keys, slots.values
        if isinstance(keys, Coded) and isinstance(values, Coded):
            firsts = [side.first.dtype for side in (keys, values) if side.first is not None]
            return values.coding.mu is None and all(dtype == torch.bfloat16 for dtype in firsts)
        known = query.dtype in _CORE_DTYPES
        return known and all(isinstance(side, Plain) and side.held.dtype == query.dtype for side in (keys, values))

    def _step_by_core(
        self,
        group: Group,
        index: int,
        slots: Slots,
        scores: Scores,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        how: How,
    ) -> Tensor:
        """Write a token, attend and look, in one call: a hundred of torch's take longer than what they compute."""
        own, rule, keys, values = scores.attention(), group.rule, slots.keys, slots.values
        at, seen = self._written[group][index], self._step.seen
        rules = None if own is None else (*own, rule.mass_decay, rule.peak_decay, rule.look_gap, rule.value_weighted)
        if isinstance(keys, Coded) and isinstance(values, Coded):
            output = query.new_empty((*query.shape[:3], value.shape[3]), dtype=torch.float32)
            _core.step_coded(
                query.float().contiguous(),
                key.float().contiguous(),
                value.float().contiguous(),
                at,
                seen,
                (keys.codes.codes, keys.codes.scales, keys.first, keys.coding.bits),
                (values.codes.codes, values.codes.scales, values.first, values.coding.bits),
                keys.coding.mu,
                scores.positions,
                how.scale,
                how.window,
                how.chunked,
                output,
                rules,
                threads=self._threads,
            )
            return output.to(query.dtype)
        assert isinstance(keys, Plain)
        assert isinstance(values, Plain)
        output = query.new_empty((*query.shape[:3], value.shape[3]))
        _core.step(
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            at,
            seen,
            keys.held,
            values.held,
            scores.positions,
            how.scale,
            how.window,
            how.chunked,
            output,
            rules,
            threads=self._threads,
        )
        return output

    def _decode(
        self, number: int, group: Group, slots: Slots, scores: Scores, query: Tensor, how: How, looking: bool = True
    ) -> Tensor:
        step, on = self._step, self._step.on(query.device)
        full = step.decodes and min(step.seen) + 1 >= group.ledger.slots
        positions = scores.positions
        if slots.coded and self._rotary is None:
            # Those behind the tokens of the longest row are empty, and codes of empty slots would be worked on as well.
            used = min(max(step.seen) + 1, positions.shape[2])
            slots, positions = slots.upto(used), positions[..., :used].contiguous()
        mask = None
        if not full or how.window:
            mask = Positions(on.query_positions, positions)
        observe, own = None, scores.attention() if looking else None
        if own is not None:
            block = Block(
                on.query_positions,
                positions,
                on.ages,
                step.lengths,
                step.seen,
                1,
                slots.look_weights() if group.rule.value_weighted else None,
                positions.shape[2],
                None,
            )

            observe = partial(self._observe, block=block, rule=group.rule, scores=own)
        if not slots.coded or self._rotary is not None:
            keys, values = slots.read()
            query, keys = self._rotated(number, query, on, keys, positions)
            return softmax.attend(query, keys, values, mask, how, observe, self._threads)
        grouped = query.reshape(query.shape[0], positions.shape[1], -1, query.shape[3])
        weights = softmax.probabilities(slots.keys.products(grouped), 1, mask, how, self._threads)
        output = slots.values.sums(weights.flatten(2, 3)).view(*query.shape[:3], -1)
        if observe is not None:
            observe(weights)
        return output

    def _chunk(self, number: int, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        group, index = self._groups[number]
        output, own = self._attend_chunk(number, query, key, value, how)
        scores = None
        if own is not None:
            scores = torch.stack(own)
            missing = group.ledger.slots + self._step.columns - scores.shape[-1]
            scores = torch.nn.functional.pad(scores, (missing, 0))
        if readers := self._geometry.readers.get(number):
            self._held[number] = Held(key, value, scores, set(readers))  # they see what is evicted next
        else:
            self._keep(group, index, key, value, scores)
        return output

    def _attend_chunk(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, how: How, looking: bool = True
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Attend a chunk to the stored tokens and itself.

        Returns
        -------
        tuple
            The output, and mass and peak of both, `[batch, kv_heads, stored + columns]` each, or None.
        """
        group, index = self._groups[number]
        odd = how.sinks is not None or how.chunked or how.own is not None or key.shape[3] != value.shape[3]
        plain = not self._step.single and self._rotary is None and not odd and query.shape[2] == self._step.columns
        if plain and group.spec.bounded and kernels.available(key.device):
            # Triton launches on the current device, wherever the tensors are.
            with torch.cuda.device_of(key):  # type: ignore[no-untyped-call]
                return self._look_fused(group, index, query, key, value, how, looking)
        return self._look(number, query, key, value, how, looking)

    def _look(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, how: How, looking: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Do it in plain torch."""
        step, on = self._step, self._step.on(key.device)
        group, index = self._groups[number]
        slots, scores = group.layer(index, key, value)
        new_positions = on.new_positions[:, None].expand(-1, key.shape[1], -1)
        keys, values, positions = key, value, new_positions
        stored = scores.positions.shape[2] if any(step.seen) or step.single else 0
        if stored:
            old_keys, old_values = slots.read()
            keys, values = torch.cat((old_keys, key), 2), torch.cat((old_values, value), 2)
            positions = torch.cat((scores.positions, new_positions), 2)
        own = None
        if looking and (before := scores.attention()) is not None:
            fresh = before[0].new_zeros((*key.shape[:2], step.columns))
            mass, peak = (torch.cat((x[..., :stored], fresh), 2) for x in before)
            own = mass, peak
        weights = looks.look_weights(keys, values) if own is not None and group.rule.value_weighted else None
        query, keys = self._rotated(number, query, on, keys, positions)

        output = query.new_empty((*query.shape[:3], value.shape[3]))
        # Without stored tokens every head sees the same ones, and one mask serves all.
        seen_positions = positions if stored else positions[:, :1]
        # A layer that reads another's keys may be asked for the last columns only.
        skipped = step.columns - query.shape[2]
        query_positions = on.query_positions[:, skipped:]
        for part in softmax.blocks(step.batch * query.shape[1], query.shape[2], keys.shape[2], key.device):
            # No query of this block sees a later column where attention is causal.
            end = stored + (skipped + part.stop if how.own is None else step.columns)
            queries, seen = query_positions[:, part].contiguous(), seen_positions[..., :end].contiguous()
            observe = None
            if own is not None:
                block = Block(
                    queries,
                    seen,
                    on.ages[:, part].contiguous(),
                    step.lengths if part.start == 0 else [0] * step.batch,
                    step.seen,
                    max(step.lengths),
                    None if weights is None else weights[..., :end].contiguous(),
                    stored,
                    None if step.padded else skipped + part.start,
                )

                observe = partial(self._observe, block=block, rule=group.rule, scores=own)
            mask: Tensor | Positions = Positions(queries, seen)
            if how.own is not None:
                mask = softmax.visible(queries, seen, how.window, how.chunked)
                mask[..., stored:] = (how.own[:, part] & (on.new_positions >= 0)[:, None])[:, None, None]
            output[:, :, part] = softmax.attend(
                query[:, :, part], keys[:, :, :end], values[:, :, :end], mask, how, observe, self._threads
            )
        return output, own

    def _observe(self, probabilities: Tensor, block: Block, rule: Rule, scores: tuple[Tensor, Tensor]) -> None:
        looks.observe(probabilities, block, rule, *scores, self._threads)

    def _look_fused(
        self, group: Group, index: int, query: Tensor, key: Tensor, value: Tensor, how: How, looking: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Do the same in the kernels."""
        step, on, rule = self._step, self._step.on(key.device), group.rule
        slots, scores = group.layer(index, key, value)
        stored = scores.positions.shape[2] if any(step.seen) else 0
        own = (scores.attention() if looking else None) or (None, None)
        keys, values = slots.read() if stored else (key[:, :, :0], value[:, :, :0])
        output, mass, peak = kernels.prefill(
            query,
            key,
            value,
            keys,
            values,
            scores.positions[..., :stored],
            on.ages,
            *(None if x is None else x[..., :stored] for x in own),
            scale=how.scale,
            mass_decay=rule.mass_decay,
            peak_decay=rule.peak_decay,
            value_weighted=rule.value_weighted,
            softcap=how.softcap,
            window=how.window,
            look_gap=rule.look_gap,
            peak_reach=rule.peak_reach,
            first_position=on.first,
            padded=step.padded,
            full=min(step.seen) >= group.ledger.slots,
        )
        return output, None if mass is None or peak is None else (mass, peak)

    def _keep(self, group: Group, index: int, key: Tensor, value: Tensor, scores: Tensor | None) -> None:
        if scores is None or key.device.type != "cuda":
            chunk = Chunk(key, value, None if scores is None else scores.cpu())
            group.keep(index, self._step.ranks, self._step.lengths, chunk)
            return
        if self._pinned is None or self._pinned.shape != scores.shape:  # layers may differ in slots
            self._pinned = torch.empty(scores.shape, dtype=torch.float32, device="cpu", pin_memory=True)
        self._pinned.copy_(scores, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(key.device))
        self._undecided = group, index, Chunk(key, value, self._pinned, copied.synchronize)

    def _settle(self) -> None:
        """Make the choice that the layer before has left open."""
        if self._undecided is not None:
            (group, index, chunk), self._undecided = self._undecided, None
            chunk.copied()
            group.keep(index, self._step.ranks, self._step.lengths, chunk)
