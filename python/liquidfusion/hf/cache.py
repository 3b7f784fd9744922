"""`KVCache`: key/value slots with a hard bound, filled by transformers, decided by the Rust core."""

from __future__ import annotations

import html
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from liquidfusion.compute import kernels
from liquidfusion.compute.rotary import Rotary
from liquidfusion.exceptions import CacheError, ConfigError, UnsupportedError
from liquidfusion.geometry import Geometry, attention_configs, layer_devices
from liquidfusion.hf.formats import fit, layer_formats, layers_kept, with_first
from liquidfusion.hf.function import REPLAYED
from liquidfusion.hf.hook import Forward, Serves, install, refuse_training, switched
from liquidfusion.hf.layers import Seen, States, cache_layers
from liquidfusion.options import SHORT, Run, Strategy, chosen, resolve
from liquidfusion.precision import Bits, bytes_of
from liquidfusion.run.backend import attending
from liquidfusion.run.eager import Eager
from liquidfusion.run.graph import Graph
from liquidfusion.run.step import Past, Step
from liquidfusion.state import session
from liquidfusion.state.group import Group, Groups

POSITIONS = ("absolute", "cache", "auto")
"""What `positions` may be."""


class KVCache(Cache, Serves):
    """A KV cache with a hard memory bound: at most `budget` tokens per (layer, batch row, kv head).

    Parameters
    ----------
    model : PreTrainedModel
        A decoder-only language model whose attention goes through transformers' attention interface. Its calls find
        the cache through a subclass that its class is changed to (`liquidfusion.uninstall` changes it back).
    strategy : str or Strategy
        A name from `liquidfusion.strategies()`, or a `liquidfusion.Strategy` with parameters of its own.
    budget : int, optional
        Slots in tokens, at least `sink_size + 4`. Default: what `window_size` asks for. `full` ignores it.
    cache_size : float, optional
        The budget in percent (0 to 100] of `prompt_tokens`; not together with `budget`.
    prompt_tokens : int, optional
        Prompt length in tokens that `cache_size` refers to.
    memory : int or str, optional
        The budget in bytes of one row (one sequence: all layers and heads, with tensor parallelism those of all
        processes), such as `"512MiB"`: as many slots as `nbytes` allows. Not together with `budget` or `cache_size`.
    bits : int, pair of int or str, optional
        Bits of each number of keys and values: 16, 8 or 4, or a pair (keys, values) from 16, 8, 4 and 16, 8, 4, 2;
        default: the model's dtype. Fewer than 16 are codes, and the same memory holds more tokens. The first such cache
        of a model reads 1,024 fixed tokens once, to see how its keys are best coded.
    positions : str
        What rotary positions are. `absolute`: the token's index in its sequence, as without a KVCache. `cache`: its
        rank among the kept tokens (StreamingLLM), so that a text may go on far past the positions that the model knows.
        `auto`: `absolute` until a row is longer than the model's `max_position_embeddings`, `cache` from then on. The
        latter two take the generic path of plain torch, on a GPU too.
    threads : int, optional
        Cap on the threads of the Rust core; default: the environment's `LIQUIDFUSION_NUM_THREADS`, else all cores.
    graph : bool
        On an NVIDIA GPU, replay each decode step as one CUDA graph. A failing capture warns once and decodes without.
    compile : bool
        With the graph, let torch.compile fuse what lies between the kernels: faster steps, a slow first one.
    overlap : bool
        On an NVIDIA GPU, choose victims while the next step runs; False waits for them. Both give the same results.
    **strategy_parameters
        `window_size`, `sink_size`, `sink_update_rate`, `heavy_ratio` and `recent_ratio`, which may be given here as
        well as in a `Strategy`.

    Raises
    ------
    ConfigError
        A parameter is out of range, contradicts another, or is none that the strategy listens to.
    UnsupportedError
        The model cannot be served; the message names why.

    Notes
    -----
    A layer with a sliding window that fits into the budget keeps its window alone, exactly, in as many slots; one with
    a wider window is bounded like every other layer.

    Bytes per slot: `2 * head_dim * bits / 8 + 12`, and 2 for each coded side. Sources: H2O,
    https://arxiv.org/abs/2306.14048; StreamingLLM, https://arxiv.org/abs/2309.17453.

    Examples
    --------
    >>> cache = KVCache(model, strategy="liquid_fusion", budget=2048)  # doctest: +SKIP
    >>> model.generate(**inputs, past_key_values=cache, max_new_tokens=256)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel,
        strategy: str | Strategy = "liquid_fusion",
        budget: int | None = None,
        *,
        cache_size: float | None = None,
        prompt_tokens: int | None = None,
        memory: int | str | None = None,
        bits: int | tuple[int, int] | str | None = None,
        positions: str = "absolute",
        threads: int | None = None,
        graph: bool = True,
        compile: bool = False,  # noqa: A002 - transformers' and torch's own name for it
        overlap: bool = True,
        **strategy_parameters: Any,
    ) -> None:
        geometry = Geometry.of(model)
        self._run = Run(threads, graph, compile, overlap)
        short = {name: strategy_parameters.pop(name, None) for name in SHORT}
        told = chosen(strategy, short, strategy_parameters)
        if positions not in POSITIONS:
            raise ConfigError(f"positions={positions!r}; {list(POSITIONS)} are accepted")
        self._bits = Bits.of(bits)
        if memory is None:
            self.spec = resolve(told, budget, cache_size, prompt_tokens)
        elif budget is not None or cache_size is not None:
            raise ConfigError(f"memory={memory!r} is given beside another size; one of them is accepted")
        else:
            bytes_of(memory)
            self.spec = resolve(told, None)
        rotary = None if positions == "absolute" else Rotary(model, geometry)
        formats = layer_formats(model, geometry, self._bits, rotary)
        if memory is not None and self.spec.bounded:
            self.spec = fit(told, memory, geometry, formats)
        known = geometry.positions
        if positions != "absolute" and self.spec.budget is not None and self.spec.budget > known:
            raise ConfigError(
                f"positions={positions!r} with budget={self.spec.budget}: ranks go up to the budget, "
                f"and the model knows {known} positions"
            )
        self._geometry, self._configs, self._positions = geometry, attention_configs(model), positions
        self._rotary = rotary
        self._relative_from = 0 if positions == "cache" else known
        self._model = weakref.ref(model)
        self._seen = Seen()
        kept = layers_kept(self.spec, geometry)
        formats = [with_first(held, kept[i][0]) if i in kept else held for i, held in enumerate(formats)]
        self._groups = Groups(kept, formats, threads)
        super().__init__(layers=cache_layers(model, geometry, self._groups, self._seen))
        self._states = States(self.layers)
        self._graph: Graph | None = None
        self.evicting = True
        """False: GPU decode steps reuse slots in turn, to measure what eviction costs; set before the first step."""
        self._evicted_before = 0
        self._broken: str | None = None
        install(model)

    # What users ask

    @property
    def model(self) -> PreTrainedModel:
        """The model this cache was built for."""
        model = self._model()
        if model is None:
            raise CacheError("the model of this KVCache no longer exists")
        return model

    @property
    def evictions(self) -> int:
        """Tokens evicted so far, summed over layers, batch rows and kv heads; also those that left a layer's window."""
        self._catch_up()
        return self._evicted_before + sum(group.evictions for group in self._groups.all)

    @property
    def nbytes(self) -> int:
        """Bytes that the slots, their positions and scores, and the reuse queues hold; 0 before the first call."""
        return sum(group.nbytes for group in self._groups.all) + self._states.nbytes

    def positions(self, layer: int) -> Tensor:
        """Which tokens a layer keeps.

        Parameters
        ----------
        layer : int
            Index of the decoder layer.

        Returns
        -------
        Tensor
            int32 `[batch, kv_heads, slots]` on the CPU: the index in its own sequence (padding not counted) of the
            token that each slot holds, -1 for an empty slot. A copy.

        Raises
        ------
        CacheError
            The cache has not been used yet.
        """
        group, index = self._used(layer)
        return group.ledger.host.positions[index].clone()

    def scores(self, layer: int) -> tuple[Tensor, Tensor]:
        """Attention mass and peak attention of a layer's slots.

        Returns
        -------
        tuple of Tensor
            float32 `[batch, kv_heads, slots]` each, on the CPU. Copies.

        Raises
        ------
        CacheError
            The cache has not been used yet, or its strategy keeps no scores.
        """
        group, index = self._used(layer)
        group.ledger.pull()
        scores = group.ledger.host.attention()
        if scores is None:
            raise CacheError(f"strategy '{group.spec.strategy}' keeps no scores")
        mass, peak = (kind[index].clone() for kind in scores)
        return mass, peak

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer's slots as they attend, `[batch, kv_heads, slots, head_dim]` each.

        Where slots hold the model's own dtype this is the cache's own memory.
        """
        group, index = self._used(layer)
        slots = group.slots[index]
        assert slots is not None
        return slots.read()

    def reset(self) -> None:
        """Make the cache as new; buffers are kept and reused when the next prompt has the same batch size."""
        if self._graph is not None:
            self._graph.abandon()
        for group in self._groups.all:
            group.reset()
        self._states.reset()
        self._seen.reset()
        self._evicted_before, self._broken = 0, None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a file, so that `load` can go on where it is.

        The file is written beside `path` first and renamed: what was there stays until the new one is whole. With
        tensor parallelism each process saves its own heads to a path of its own.

        Parameters
        ----------
        path : str or PathLike
            A safetensors file; its folder must exist.

        Raises
        ------
        CacheError
            The cache has not been used yet, or an earlier call failed half-way.
        """
        session.write(self._state(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: PreTrainedModel, **options: Any) -> Self:
        """A cache that goes on where the saved one was; its strategy and budget come from the file.

        Parameters
        ----------
        path : str or PathLike
            What `save` has written.
        model : PreTrainedModel
            A model of the same architecture, shape and dtype.
        **options
            `threads`, `graph`, `compile`, `overlap`, as for a new cache.

        Raises
        ------
        CacheError
            The file is truncated, no session, was changed, or belongs to another model.
        ConfigError
            An option that is not among those above.
        """
        accepted = list(Run.__dataclass_fields__)
        unknown = sorted(set(options) - set(accepted))
        if unknown:
            raise ConfigError(f"{unknown[0]} comes from the file; {', '.join(accepted)} are accepted")
        state = session.read(path, Geometry.of(model))
        return cls._from_state(state, model, layer_devices(model), options)

    def copy(self) -> Self:
        """A cache of its own with the same contents, to go on in another way from here; `copy.deepcopy` makes the same.

        Raises
        ------
        CacheError
            An earlier call failed half-way.
        """
        options = asdict(self._run)
        if not self._seen.columns and self._broken is None:
            return self._like(self._told(), self.model, options)
        state = self._state()
        return self._from_state(state, self.model, layer_devices(self.model), options)

    def __copy__(self) -> Self:
        return self.copy()  # two caches cannot share slots

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.copy()

    def __reduce__(self) -> NoReturn:
        raise CacheError(
            "a KVCache cannot be pickled: write it with save(path) and read it with KVCache.load, or copy() it"
        )

    def __repr__(self) -> str:
        bits = {} if self._bits is None else {"bits": self._bits.given}
        told = {"budget": self.spec.budget} | bits | {k: v for k, v in self.spec.params.items() if v is not None}
        return (
            f"KVCache(strategy={self.spec.strategy!r}, {', '.join(f'{k}={v!r}' for k, v in told.items())}; "
            f"columns seen={self._seen.columns}, evictions={self.evictions}, bytes={self.nbytes})"
        )

    def _repr_html_(self) -> str:
        """Show the cache in a notebook."""
        filled = [
            f"{int((group.ledger.host.positions >= 0).sum())} of {group.ledger.host.positions.numel()}"
            for group in self._groups.all
            if self._seen.columns
        ]
        rows = {
            "strategy": self.spec.strategy,
            "budget": "unbounded" if self.spec.budget is None else f"{self.spec.budget} tokens a layer, row and head",
            "bits": "the model's own" if self._bits is None else self._bits.given,
            "slots filled": ", ".join(filled) or "none yet",
            "columns seen": self._seen.columns,
            "evictions": self.evictions,
            "bytes": f"{self.nbytes:,}",
        } | {name: value for name, value in self.spec.params.items() if value is not None}
        cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
        return f"<table><caption>KVCache</caption>{cells}</table>"

    # What transformers asks beside what its layers answer

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row `i` by row `beam_idx[i]`, in place (beam search).

        Raises
        ------
        ConfigError, TensorError
            There are no such rows; nothing was changed.
        """
        self._catch_up()
        if self._seen.columns:
            for group in self._groups.all:
                group.reorder(beam_idx)
            self._states.reorder(beam_idx)
            self._seen.reorder(beam_idx.tolist())

    # What the hook asks

    def run(self, inputs: dict[str, Any], forward: Forward) -> Any:
        """Serve one call of the model: check it, let `forward` run with this cache, then choose the next victims.

        Parameters
        ----------
        inputs : dict
            The call's arguments by name.
        forward : callable
            Computes the call.

        Raises
        ------
        CacheError
            The call does not continue what the cache has seen, or an earlier call failed half-way.
        UnsupportedError
            The call asks for what a bounded cache cannot give.
        """
        if self._broken is not None:
            raise CacheError(f"an earlier call failed half-way ({self._broken}); call reset() or build a new KVCache")
        refuse_training(inputs, self.model)
        step = Step.of(inputs, self._past())
        self._states.expect(step, self._seen.columns, self._geometry)
        graph = self._graph_for(step)
        try:
            with switched(self._configs) if graph is None else switched(self._configs, REPLAYED, graph.experts):
                if graph is not None:
                    output = graph.step(forward, inputs, self._seen.columns)
                else:
                    output = self._eager(step, inputs, forward)
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {error}"
            raise
        self._seen.add(step)
        return output

    def _eager(self, step: Step, inputs: dict[str, Any], forward: Forward) -> Any:
        self._catch_up()
        backend = Eager(
            self._groups,
            step,
            self._geometry,
            self._rotary,
            self._relative_from,
            self._run.threads,
        )
        if self._rotary is not None:
            # Position 0 for every column: the model leaves its queries and keys un-rotated.
            tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            zeros = torch.zeros((step.batch, step.columns), dtype=torch.int64, device=tokens.device)
            inputs = inputs | {"position_ids": zeros}
        with attending(backend), torch.compiler.set_stance("force_eager"):
            output = forward(**inputs)
        backend.close()
        self._seen.every_call |= backend.every_call
        self._seen.windows = frozenset(backend.windows)
        return output

    def _graph_for(self, step: Step) -> Graph | None:
        """What replays this call on the GPU: one real token per row, all layers served by the kernels of one device."""
        groups, seen = self._groups, self._seen
        odd = self._rotary is not None or seen.every_call or not self._geometry.untold <= seen.windows
        if odd or not seen.columns or not step.decodes:
            return None
        if self._graph is None or self._graph.ledgers != [group.ledger for group in groups.all]:
            where = set().union(*(group.devices for group in groups.all))
            if len(where) > 1 or not kernels.available(where.pop()):
                return None
            if not all(group.replayable for group in groups.all):
                return None
            self._graph = Graph(self.model, groups, self._geometry, self._states.all, self._run, self.evicting)
        return self._graph

    def _past(self) -> Past:
        if not self._seen.columns:
            return Past(0, ())
        pending = self._graph.pending if self._graph is not None and self._graph.running else 0
        seen = [n + pending for n in self._groups.all[0].ledger.core.seen]
        return Past(self._seen.columns, seen, self._seen.offsets, self._seen.right)

    def _catch_up(self) -> None:
        """Let the host's ledger know of every step the GPU has taken."""
        if self._graph is not None:
            self._graph.stop()

    def _used(self, layer: int) -> tuple[Group, int]:
        """The group of a layer and its index there, the host's side up to date."""
        if not self._seen.columns:
            raise CacheError("the cache has not been used yet")
        self._catch_up()
        if layer not in self._groups.places:
            raise CacheError(f"layer {layer} has no slots of its own; {list(self._groups.places)} have")
        return self._groups[layer]

    # Saving and copying

    def _told(self) -> dict[str, Any]:
        """What makes a cache that keeps the same tokens; JSON's types only."""
        (strategy,), parameters = self.spec.__getnewargs_ex__()
        bits = {} if self._bits is None else {"bits": self._bits.given}
        return {"strategy": strategy, "positions": self._positions, **bits, **parameters}

    def _state(self) -> session.State:
        if self._broken is not None:
            raise CacheError(f"an earlier call failed half-way ({self._broken}); its state cannot be kept")
        group, index = self._used(next(iter(self._groups.places)))
        slots = group.slots[index]
        assert slots is not None
        made = {"made": str(slots.keys.made).removeprefix("torch."), "held": self._groups.held}
        description = {
            **({} if self._bits is None else made),
            "spec": self._told(),
            "model": asdict(session.Fingerprint.of(self._geometry)),
            **self._seen.described(),
            "seen": list(self._groups.all[0].ledger.core.seen),
            "slots": [group.ledger.slots for group in self._groups.all],
            "evictions": self.evictions,
        }
        return session.State(description, session.gather(self._groups) | self._states.tensors())

    @classmethod
    def _like(cls, told: Mapping[str, Any], model: PreTrainedModel, options: Mapping[str, Any]) -> Self:
        """An unused cache by what `_told` says."""
        ours = {name: told[name] for name in ("positions", "bits") if name in told}
        own = {name: value for name, value in told.items() if name not in ("strategy", "budget", *ours)}
        return cls(model, Strategy(told["strategy"], **own), told.get("budget"), **ours, **options)

    @classmethod
    def _from_state(
        cls, state: session.State, model: PreTrainedModel, devices: Sequence[torch.device], options: dict[str, Any]
    ) -> Self:
        try:
            cache = cls._like(state.description["spec"], model, options)
        except (ConfigError, UnsupportedError, TypeError) as error:
            raise CacheError(f"the session's strategy cannot be: {error}") from error
        held = state.description.get("held")
        if cache._bits is not None and held != cache._groups.held:
            raise CacheError(f"the session holds its layers in {held}, this model's are {cache._groups.held}")
        rows = len(state.description["seen"])
        cache._states.restore(state.tensors, list(devices), rows)
        session.scatter(state, cache._groups, devices)
        cache._seen.restore(state.description, rows)
        cache._evicted_before = state.description["evictions"]
        return cache
