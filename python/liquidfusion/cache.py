"""`KVCache`: key/value slots with a hard bound, filled by transformers, decided by the Rust core."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn, Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from liquidfusion import _core, attention, models, session
from liquidfusion.compute import kernels
from liquidfusion.decoder import Decoder
from liquidfusion.exceptions import CacheError, ConfigError, UnsupportedError
from liquidfusion.install import install, switched
from liquidfusion.rotary import Rotary, query_ranks, ranks
from liquidfusion.store import Layer, Store

POSITIONS = ("absolute", "cache", "auto")
"""What `positions` may be."""

SMALLEST_WINDOW = 8
"""Sliding windows of fewer tokens are kept by the cache's own strategy."""


class KVCache(Cache):
    """A KV cache with a hard memory bound: at most `budget` tokens per (layer, batch row, kv head).

    Parameters
    ----------
    model : PreTrainedModel
        A decoder-only language model whose attention goes through transformers' attention interface. One reversible
        wrapper is put on its `forward` (`liquidfusion.uninstall` removes it).
    strategy : str
        A name from `liquidfusion.strategies()`: `full`, `local`, `streaming`, `h2o`, `liquid_fusion`, `tova`, `snapkv`,
        `random`.
    budget : int, optional
        Slots in tokens, at least `sink_size + 4`. Default: what `window_size` asks for. `full` ignores it.
    cache_size : float, optional
        The budget in percent (0 to 100] of `prompt_tokens`; not together with `budget`.
    prompt_tokens : int, optional
        Prompt length in tokens that `cache_size` refers to.
    window_size : int, optional
        Recent tokens to keep when no budget is given (default 256); the budget itself for `tova`, `snapkv` and
        `random`.
    sink_size, sink_update_rate, heavy_ratio, recent_ratio, peak_ratio, eviction_interval, sinks
        Parameters of the strategy; None is the strategy's own default. One that the strategy does not use is checked,
        ignored and None in `spec.params`.
    value_weighted, look_gap, peak_reach, averaged, age_half_life
        What liquid_fusion's scores count, likewise: looks times the length of the token's value over its key's, only
        looks from `look_gap` tokens away or more, for the peak within one chunk only those from up to `peak_reach`
        tokens away (default: the budget), mass per query that could look, and half of that for every `age_half_life`
        tokens of the token's age (0: whatever its age).
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

    Raises
    ------
    ConfigError
        A parameter is out of range or contradicts another.
    UnsupportedError
        The model cannot be served; the message names why.

    Notes
    -----
    A layer with a sliding window that fits into the budget keeps its window alone, exactly, in as many slots; one with
    a wider window is bounded like every other layer.

    Bytes per slot: `2 * head_dim * element_size + 12`. Sources: H2O, https://arxiv.org/abs/2306.14048; StreamingLLM,
    https://arxiv.org/abs/2309.17453.

    Examples
    --------
    >>> cache = KVCache(model, strategy="liquid_fusion", budget=2048)  # doctest: +SKIP
    >>> model.generate(**inputs, past_key_values=cache, max_new_tokens=256)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel,
        strategy: str = "liquid_fusion",
        budget: int | None = None,
        *,
        cache_size: float | None = None,
        prompt_tokens: int | None = None,
        window_size: int | None = None,
        sink_size: int | None = None,
        sink_update_rate: float | None = None,
        heavy_ratio: float | None = None,
        recent_ratio: float | None = None,
        peak_ratio: float | None = None,
        eviction_interval: int | None = None,
        sinks: str | None = None,
        value_weighted: bool | None = None,
        look_gap: int | None = None,
        peak_reach: int | None = None,
        averaged: bool | None = None,
        age_half_life: int | None = None,
        positions: str = "absolute",
        threads: int | None = None,
        graph: bool = True,
        compile: bool = False,  # noqa: A002 - transformers' and torch's own name for it
        overlap: bool = True,
    ) -> None:
        models.check(model)
        self.spec = make_spec(
            strategy,
            budget,
            cache_size=cache_size,
            prompt_tokens=prompt_tokens,
            window_size=window_size,
            sink_size=sink_size,
            sink_update_rate=sink_update_rate,
            heavy_ratio=heavy_ratio,
            recent_ratio=recent_ratio,
            peak_ratio=peak_ratio,
            eviction_interval=eviction_interval,
            sinks=sinks,
            value_weighted=value_weighted,
            look_gap=look_gap,
            peak_reach=peak_reach,
            averaged=averaged,
            age_half_life=age_half_life,
        )
        if positions not in POSITIONS:
            raise ConfigError(f"positions={positions!r}; {list(POSITIONS)} are accepted")
        known = int(getattr(models.text_config(model), "max_position_embeddings", 0))
        if positions != "absolute" and self.spec.budget is not None and self.spec.budget > known:
            raise ConfigError(
                f"positions={positions!r} with budget={self.spec.budget}: ranks go up to the budget, "
                f"and the model knows {known} positions"
            )
        self._positions = positions
        self._rotary = None if positions == "absolute" else Rotary(model)
        self._longest = 0 if positions == "cache" else known
        super().__init__(layers=[])
        self._model = weakref.ref(model)
        self._threads = threads
        self._graph, self._compile, self._overlap = graph, compile, overlap
        self._decoder: Decoder | None = None
        self.evicting = True
        """False: GPU decode steps reuse slots in turn, to measure what eviction costs; set before the first step."""
        self._windows = models.windows(model)
        specs = [layer_spec(self.spec, window) for window in self._windows]
        self._specs = list(dict.fromkeys(specs))
        self._places = [(self._specs.index(spec), specs[:i].count(spec)) for i, spec in enumerate(specs)]
        self._stores: list[Store] = []
        self._evicted_before = 0
        self._columns = 0
        self._broken: str | None = None
        install(model, KVCache)

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
        self._settle()
        return self._evicted_before + sum(store.ledger.evictions for store in self._stores)

    @property
    def nbytes(self) -> int:
        """Bytes that the slots, their positions and scores, and the reuse queues hold; 0 before the first call."""
        return sum(store.nbytes for store in self._stores)

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
        store, index = self._place(layer)
        return store.host.positions[index].clone()

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
        slots = self._layer(layer)
        if slots.mass is None or slots.peak is None:
            strategy = self._specs[self._places[layer][0]].strategy
            raise CacheError(f"strategy '{strategy}' keeps no scores")
        return slots.mass.cpu().clone(), slots.peak.cpu().clone()

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Key and value slots of a layer, `[batch, kv_heads, slots, head_dim]` each: the cache's own memory."""
        slots = self._layer(layer)
        return slots.keys, slots.values

    def reset(self) -> None:
        """Make the cache as new; buffers are kept and reused when the next prompt has the same batch size."""
        if self._decoder is not None:
            self._decoder.abandon()
        for store in self._stores:
            store.reset()
        self._columns, self._evicted_before, self._broken = 0, 0, None

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
        unknown = sorted(set(options) - {"threads", "graph", "compile", "overlap"})
        if unknown:
            raise ConfigError(f"{unknown[0]} comes from the file; threads, graph, compile and overlap are accepted")
        models.check(model)
        state = session.read(path, model)
        return cls._from_state(state, model, models.layer_devices(model), options)

    def copy(self) -> Self:
        """A cache of its own with the same contents, to go on in another way from here; `copy.deepcopy` makes the same.

        Raises
        ------
        CacheError
            An earlier call failed half-way.
        """
        options: dict[str, Any] = {
            "threads": self._threads, "graph": self._graph, "compile": self._compile, "overlap": self._overlap
        }  # fmt: skip
        if not self._columns and self._broken is None:
            return type(self)(self.model, **self._told_spec(), **options)
        state = self._state()
        devices = [state.tensors[f"keys.{layer}"].device for layer in range(len(self))]
        return self._from_state(state, self.model, devices, options)

    def __copy__(self) -> Self:
        return self.copy()  # two caches cannot share slots

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.copy()

    def _told_spec(self) -> dict[str, Any]:
        """What `KVCache` takes to keep the same tokens; JSON's types only."""
        (strategy,), parameters = self.spec.__getnewargs_ex__()
        return {"strategy": strategy, "positions": self._positions, **parameters}

    def _state(self) -> session.State:
        if self._broken is not None:
            raise CacheError(f"an earlier call failed half-way ({self._broken}); its state cannot be kept")
        stores = self._settled()
        description = {
            "spec": self._told_spec(),
            "model": asdict(session.Fingerprint.of(self.model)),
            "columns": self._columns,
            "seen": list(stores[0].ledger.seen),
            "slots": [store.slots for store in stores],
            "evictions": self.evictions,
        }
        return session.State(description, session.gather(stores, self._places))

    @classmethod
    def _from_state(
        cls, state: session.State, model: PreTrainedModel, devices: list[torch.device], options: dict[str, Any]
    ) -> Self:
        told = state.description
        try:
            cache = cls(model, **told["spec"], **options)
        except (ConfigError, UnsupportedError, TypeError) as error:
            raise CacheError(f"the session's strategy cannot be: {error}") from error
        if len(told["slots"]) != len(cache._specs):
            raise CacheError(f"the session has {len(told['slots'])} groups of layers, this model {len(cache._specs)}")
        cache._allocate(len(told["seen"]), told["model"]["kv_heads"], devices[0], told["slots"])
        session.scatter(state, cache._stores, cache._places, devices)
        cache._columns, cache._evicted_before = told["columns"], told["evictions"]
        return cache

    def __repr__(self) -> str:
        params = ", ".join(f"{name}={value!r}" for name, value in self.spec.params.items() if value is not None)
        return (
            f"KVCache(strategy={self.spec.strategy!r}, budget={self.spec.budget}, {params}; "
            f"columns seen={self._columns}, evictions={self.evictions}, bytes={self.nbytes})"
        )

    # What transformers asks

    def __len__(self) -> int:
        return len(self._windows)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - the same for every layer
        """Columns seen so far, padding included: transformers slices its inputs with it."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        """-1: any number of tokens may be fed."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: ARG002
        """Columns of a dense mask that nobody builds: visibility comes from `positions`."""
        return self._columns + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Columns seen so far."""
        return self._columns

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        """Take the new columns of one layer; they are stored by the attention call that follows.

        Raises
        ------
        CacheError
            The model was not called through its own `forward` (a submodule was called, or the wrapper was removed).
        """
        call = attention.running()
        if call is None:
            raise CacheError("a KVCache works only in calls of the model it was built for: call model(...) itself")
        call.take(layer_idx)
        return key_states, value_states

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row `i` by row `beam_idx[i]`, in place (beam search)."""
        for store in self._settled():
            store.reorder(beam_idx)

    def activate_past_recording(self) -> NoReturn:
        """Refuse assisted decoding, which rolls the cache back: evicted tokens cannot return.

        Raises
        ------
        UnsupportedError
            Always, before any work.
        """
        raise UnsupportedError(
            "assisted decoding rolls the cache back, and evicted tokens cannot return: use another cache"
        )

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse: evicted tokens cannot return.

        Raises
        ------
        UnsupportedError
            Always.
        """
        raise UnsupportedError(
            f"crop({tokens_to_remove}) needs tokens that may be evicted; build a new KVCache instead"
        )

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Refuse: buffers never change shape.

        Raises
        ------
        UnsupportedError
            Always.
        """
        raise UnsupportedError(f"batch_repeat_interleave({repeats}): a KVCache keeps its batch size")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        """Refuse: buffers never change shape.

        Raises
        ------
        UnsupportedError
            Always.
        """
        raise UnsupportedError(f"batch_select_indices({indices.tolist()}): a KVCache keeps its batch size")

    @property
    def batch_size(self) -> int:
        """Batch rows, or -1 before the first call."""
        return self._stores[0].batch if self._columns else -1

    @property
    def is_compileable(self) -> bool:
        """False: True would make `generate` compile on its own."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether tokens are stored."""
        return self._columns > 0

    @property
    def is_croppable(self) -> bool:
        """False: evicted tokens cannot return."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """False for every layer: windows are honoured through positions."""
        return [False] * len(self._windows)

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer."""
        return [False] * len(self._windows)

    @property
    def is_dummy(self) -> list[bool]:
        """False for every layer."""
        return [False] * len(self._windows)

    # What the wrapper on model.forward asks

    def run(self, inputs: dict[str, Any], forward: Callable[..., Any]) -> Any:
        """Serve one call of the model: check it, let `forward` run with this cache, then choose the next victims.

        Parameters
        ----------
        inputs : dict
            The call's arguments by name.
        forward : callable
            The model's own forward.

        Raises
        ------
        CacheError
            The call does not continue what the cache has seen, or an earlier call failed half-way.
        UnsupportedError
            The call asks for what a bounded cache cannot give.
        """
        call = self._open(inputs)
        decoder = self._fast(call)
        token = attention.current.set(call)
        try:
            with switched(self.model):
                if decoder is not None:
                    output = decoder.step(forward, inputs, self._columns)
                else:
                    self._settle()
                    if self._rotary is not None:
                        inputs = inputs | {"position_ids": call.no_positions(inputs)}
                    output = forward(**inputs)
                    call.close()
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {error}"
            raise
        finally:
            attention.current.reset(token)
        self._columns += call.columns
        return output

    def _fast(self, call: Call) -> Decoder | None:
        """The decoder that runs this call on the GPU: one real token per row, layers alike and on one device."""
        if not self._columns or call.columns > 1 or min(call.lengths) < 1 or len(self._stores) > 1 or self._rotary:
            return None
        store = self._stores[0]
        if not store.spec.bounded:
            return None
        if self._decoder is None:
            devices = {layer.keys.device for layer in store.layers if layer is not None}
            if len(devices) > 1 or not kernels_usable(devices.pop()):
                return None
            self._decoder = Decoder(self.model, store, self._graph, self._compile, self._overlap, self.evicting)
        return self._decoder

    def _settle(self) -> None:
        """Let the host's ledger know of every step the GPU has taken."""
        if self._decoder is not None:
            self._decoder.stop()

    def _seen(self) -> list[int]:
        pending = 0 if self._decoder is None or not self._decoder.running else self._decoder.pending
        return [n + pending for n in self._used()[0].ledger.seen]

    def _open(self, inputs: dict[str, Any]) -> Call:
        if self._broken is not None:
            raise CacheError(f"an earlier call failed half-way ({self._broken}); call reset() or build a new KVCache")
        if inputs.get("output_attentions"):
            raise UnsupportedError("output_attentions=True: attention weights of evicted tokens do not exist")
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise CacheError("the call has neither input_ids nor inputs_embeds")
        batch, columns = tokens.shape[:2]
        if not columns:
            raise CacheError(
                f"the call brings no new column after the {self._columns} that the cache has seen; "
                "for a new prompt call reset()"
            )
        if self._columns and batch != self.batch_size:
            raise CacheError(
                f"the call has {batch} rows, the cache holds {self.batch_size}; call reset() for a new prompt"
            )
        seen = self._seen() if self._columns else [0] * batch
        real = self._real_columns(inputs.get("attention_mask"), batch, columns, seen)
        lengths = [columns] * batch if real is None else real.sum(1).tolist()
        ranks = None if real is None else (real.cumsum(1) - 1).masked_fill(~real, -1).int()
        self._check_positions(inputs.get("position_ids"), ranks, seen, batch, columns)
        return Call(self, batch, columns, lengths, ranks, seen)

    def _real_columns(self, mask: Any, batch: int, columns: int, seen: list[int]) -> Tensor | None:
        """Which new columns hold real tokens, bool `[batch, columns]` on the CPU; None when all do."""
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            what = f"{mask.dim()}-dimensional" if isinstance(mask, Tensor) else type(mask).__name__
            raise UnsupportedError(f"attention_mask is {what}; [batch, columns] is accepted")
        if tuple(mask.shape) != (batch, self._columns + columns):
            raise CacheError(
                f"attention_mask is {list(mask.shape)}, but the cache has seen {self._columns} columns and the call "
                f"brings {columns}: [{batch}, {self._columns + columns}] is accepted; for a new prompt call reset()"
            )
        mask = mask.ne(0).cpu()
        # Rows whose past disagrees belong to another prompt.
        if self._columns and columns > 1 and mask[:, : self._columns].sum(1).tolist() != seen:
            raise CacheError(
                f"attention_mask counts {mask[:, : self._columns].sum(1).tolist()} earlier tokens, the cache has seen "
                f"{seen}; for a new prompt call reset()"
            )
        real = mask[:, self._columns :]
        return None if bool(real.all()) else real

    def _check_positions(
        self, position_ids: Any, ranks: Tensor | None, seen: list[int], batch: int, columns: int
    ) -> None:
        if not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
            return
        if position_ids.device.type != "cpu" and columns == 1 and self._columns:
            return  # reading it back would stall the device at every step
        given = position_ids.cpu().expand(batch, -1)
        steps = torch.arange(columns, device="cpu").expand(batch, -1) if ranks is None else ranks.long()
        own = steps + torch.tensor(seen, device="cpu")[:, None]
        by_column = (torch.arange(columns, device="cpu") + self._columns).expand(batch, -1)
        wrong = (given != own) & (given != by_column) & (steps >= 0)
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            raise CacheError(
                f"position_ids[{row}, {column}] is {int(given[row, column])}, but the cache continues at "
                f"{int(own[row, column])}; for a new prompt call reset()"
            )

    def _used(self) -> list[Store]:
        if not self._columns:
            raise CacheError("the cache has not been used yet")
        return self._stores

    def _settled(self) -> list[Store]:
        stores = self._used()
        self._settle()
        return stores

    def _place(self, layer: int) -> tuple[Store, int]:
        """The store of a layer, and its index there."""
        stores = self._settled()
        number, index = self._places[layer]
        return stores[number], index

    def _layer(self, layer: int) -> Layer:
        store, index = self._place(layer)
        slots = store.layers[index]
        assert slots is not None
        return slots

    def _prepare(self, call: Call, key: Tensor) -> list[Store]:
        """Slots for the running call: allocated by the first one, grown by an unbounded strategy."""
        batch, kv_heads = key.shape[:2]
        if not self._columns and any((store.batch, store.kv_heads) != (batch, kv_heads) for store in self._stores):
            self._stores = []
        needed = max(call.seen) + call.columns
        if not self._stores:
            self._allocate(batch, kv_heads, key.device, [max(256, needed)] * len(self._specs))
        for store in self._stores:
            if store.spec.budget is None and needed > store.slots:
                store.grow(max(needed, 2 * store.slots))
        return self._stores

    def _allocate(self, batch: int, kv_heads: int, device: torch.device, slots: list[int]) -> None:
        """New stores; `slots` says how many an unbounded strategy starts with."""
        self._decoder = None
        for number, spec in enumerate(self._specs):
            layers = sum(place[0] == number for place in self._places)
            size = slots[number] if spec.budget is None else spec.budget
            # Where the kernels run, the ledger follows the slots at a distance, also in Triton's interpreter.
            shared = not kernels_usable(device) or spec.budget is None
            self._stores.append(Store(spec, layers, batch, kv_heads, size, device, self._threads, shared))


def kernels_usable(device: torch.device) -> bool:
    """Whether attention on a device goes through the Triton kernels."""
    return kernels.available(device)


def make_spec(
    strategy: str,
    budget: int | None,
    *,
    cache_size: float | None = None,
    prompt_tokens: int | None = None,
    **parameters: Any,
) -> _core.Spec:
    """Resolve a strategy's parameters, with the budget in tokens or in percent of the prompt.

    Raises
    ------
    ConfigError
        Both or an incomplete pair of sizes, or a parameter out of range.
    """
    if cache_size is None:
        return _core.Spec(strategy, budget, **parameters)
    if budget is not None:
        raise ConfigError(f"budget={budget} and cache_size={cache_size} are both given; one of them is accepted")
    if prompt_tokens is None:
        raise ConfigError(f"cache_size={cache_size} is a percentage of the prompt: prompt_tokens is needed with it")
    probe = _core.Spec(strategy, None, **parameters)
    sink_size = cast(int, probe.params["sink_size"] or 0)
    return _core.Spec(strategy, _core.budget_from_percent(cache_size, prompt_tokens, sink_size), **parameters)


def layer_spec(spec: _core.Spec, window: int) -> _core.Spec:
    """What a layer keeps: its window alone where that fits into the budget, since it never attends to other tokens.

    Parameters
    ----------
    spec : _core.Spec
        The cache's own.
    window : int
        Sliding window of the layer in tokens, 0 for none.
    """
    if not window or window < SMALLEST_WINDOW or (spec.budget is not None and window > spec.budget):
        return spec
    return _core.Spec("local", window)


@dataclass
class Call:
    """One call of the model, from the wrapper's checks to the choice of the next victims.

    `lengths`: real new tokens of each row. `ranks`: int32 `[batch, columns]`, the token's index among its row's new
    tokens, -1 for padding; None when no column is padding. `seen`: real tokens of each row before the call.
    """

    cache: KVCache
    batch: int
    columns: int
    lengths: list[int]
    ranks: Tensor | None
    seen: list[int]
    layer: int | None = None
    stores: list[Store] = field(default_factory=list)
    attended: int = 0
    _single: list[int] = field(default_factory=list)
    _undecided: Callable[[], None] | None = None
    _host_scores: Tensor | None = None
    _by_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def no_positions(self, inputs: dict[str, Any]) -> Tensor:
        """Position 0 for every column: the model leaves its queries and keys un-rotated."""
        tokens = inputs.get("input_ids")
        tokens = inputs["inputs_embeds"] if tokens is None else tokens
        return torch.zeros((self.batch, self.columns), dtype=torch.int64, device=tokens.device)

    def take(self, layer: int) -> None:
        """Note which layer attends next."""
        self.layer = layer

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float) -> Tensor:
        """Attend one layer's new columns to what it stores, update its ledger and store them.

        Parameters
        ----------
        query : Tensor
            `[batch, heads, columns, head_dim]`.
        key, value : Tensor
            `[batch, kv_heads, columns, head_dim]`.
        scale, window, softcap
            Of the model's attention; 0 for no window, no softcap.

        Returns
        -------
        Tensor
            `[batch, heads, columns, head_dim]`.
        """
        if self.layer is None:
            raise CacheError("attention ran for a layer that did not hand its keys and values to the cache")
        number, self.layer = self.layer, None
        self._settle()
        key, value = key.detach(), value.detach()
        if not self.stores:
            self._begin(key)
        which, index = self.cache._places[number]
        store = self.stores[which]
        if store.spec != self.cache.spec and window != self.cache._windows[number]:
            raise UnsupportedError(
                f"layer {number} attends to a window of {window} tokens (0: none), the model's configuration says "
                f"{self.cache._windows[number]}"
            )
        layer = store.layer(index, key, value)
        layer.check(number, key)
        self.attended += 1
        self._write_single(store, index, layer, key, value)
        if self.columns == 1:
            return self._decode(number, layer, query, scale, window, softcap)
        return self._chunk(store, index, number, layer, query, key, value, scale, window, softcap)

    def close(self) -> None:
        """Choose the next victims of every layer, row and head."""
        if self.attended != len(self.cache):
            raise UnsupportedError(
                f"{type(self.cache.model).__name__} ran {self.attended} of {len(self.cache)} attention layers through "
                "the cache; every layer must use transformers' attention interface"
            )
        self._settle()
        for store in self.stores:
            store.finish(pull=self.columns == 1)

    def _begin(self, key: Tensor) -> None:
        self.stores = self.cache._prepare(self, key)
        for store in self.stores:
            store.begin(self.lengths)
        # Rows with one real token overwrite the first slot of their queue before anyone attends (the decode rule).
        self._single = [row for row, length in enumerate(self.lengths) if length == 1]

    def _write_single(self, store: Store, index: int, layer: Layer, key: Tensor, value: Tensor) -> None:
        if not self._single:
            return
        slots = store.written[index].to(key.device)
        if self.columns == 1 and len(self._single) == self.batch:
            for buffer, new in ((layer.keys, key), (layer.values, value)):
                buffer.scatter_(2, slots[..., None, None].expand(-1, -1, 1, buffer.shape[3]), new)
            return
        rows = torch.tensor(self._single, device="cpu")
        columns = self._ranks()[rows].argmax(1)
        for buffer, new in ((layer.keys, key), (layer.values, value)):
            target = slots[rows.to(slots.device)][..., None, None].expand(-1, -1, 1, buffer.shape[3])
            chosen = new[rows.to(new.device), :, columns.to(new.device)][:, :, None]
            buffer[rows.to(new.device)] = buffer[rows.to(new.device)].scatter(2, target, chosen)

    def _rotated(
        self, layer: int, query: Tensor, query_positions: Tensor, keys: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys rotated to where they stand in the cache, or in the sequence while it is short enough.

        `query`: `[batch, heads, queries, head_dim]` at `[batch, queries]`; `keys`: `[batch, kv_heads, columns,
        head_dim]` at `[batch, kv_heads, columns]`.
        """
        rotary = self.cache._rotary
        if rotary is None:
            return query, keys
        length = torch.tensor([n + new for n, new in zip(self.seen, self.lengths, strict=True)], device=query.device)
        short = (length <= self.cache._longest)[:, None, None]
        at_query = torch.where(
            short, query_positions[:, None].clamp(min=0), query_ranks(query_positions, key_positions)
        )
        at_key = torch.where(short, key_positions.clamp(min=0), ranks(key_positions))
        grouped = query.view(query.shape[0], keys.shape[1], -1, *query.shape[2:])
        return rotary(grouped, at_query[:, :, None], layer).flatten(1, 2), rotary(keys, at_key, layer)

    def _decode(self, number: int, layer: Layer, query: Tensor, scale: float, window: int, softcap: float) -> Tensor:
        last = [[n if length else -1] for n, length in zip(self.seen, self.lengths, strict=True)]
        newest = torch.tensor(last, device="cpu")
        dense = len(self._single) == self.batch and min(self.seen) + 1 >= layer.keys.shape[2] and not window
        ages, newest = newest.clamp(max=0).int(), newest.to(query.device)
        mask = None if dense else attention.visible(newest, layer.positions, window)
        observe = None
        if layer.mass is not None and layer.peak is not None:
            weights = self._weights(layer.keys, layer.values)
            observe = self._observer(ages, newest, layer.positions, weights, layer.mass, layer.peak)
        query, keys = self._rotated(number, query, newest, layer.keys, layer.positions)
        return attention.attend(query, keys, layer.values, mask, scale, softcap, observe)

    def _chunk(
        self,
        store: Store,
        index: int,
        number: int,
        layer: Layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        plain = not self._single and self.cache._rotary is None
        if plain and store.spec.bounded and kernels_usable(key.device):
            # Triton launches on the current device, wherever the tensors are.
            with torch.cuda.device_of(key):  # type: ignore[no-untyped-call]
                return self._fused_chunk(store, index, layer, query, key, value, scale, window, softcap)
        ranks, seen = self._ranks(), torch.tensor(self.seen, dtype=torch.int32, device="cpu")[:, None]
        query_positions = (ranks + seen).masked_fill(ranks < 0, -1)
        new_positions = query_positions.clone()
        new_positions[self._single] = -1  # their one token is in its slot already
        ages = self._ages()
        query_positions, new_positions = query_positions.to(key.device), new_positions.to(key.device)
        new_positions = new_positions[:, None].expand(-1, key.shape[1], -1)

        stored = layer.keys.shape[2] if any(self.seen) or self._single else 0
        all_keys, all_values, all_positions = key, value, new_positions
        if stored:
            all_keys, all_values = torch.cat((layer.keys, key), 2), torch.cat((layer.values, value), 2)
            all_positions = torch.cat((layer.positions, new_positions), 2)
        query, all_keys = self._rotated(number, query, query_positions, all_keys, all_positions)
        mass = peak = weights = None
        if layer.mass is not None and layer.peak is not None:
            weights = self._weights(all_keys, all_values)
            mass, peak = layer.mass.new_zeros((2, *key.shape[:2], self.columns)).unbind()
            if stored:
                mass, peak = torch.cat((layer.mass, mass), 2), torch.cat((layer.peak, peak), 2)

        output = torch.empty_like(query)
        # Without stored tokens every head sees the same ones, and one mask serves all.
        seen_positions = all_positions if stored else all_positions[:, :1]
        rows = self.batch * query.shape[1]
        for block in attention.blocks(rows, self.columns, stored + self.columns, key.device):
            end = stored + block.stop  # no query of this block sees a later column
            mask = attention.visible(query_positions[:, block], seen_positions[..., :end], window)
            observe = None
            if mass is not None and peak is not None:
                observe = self._observer(
                    ages[:, block].contiguous(),
                    query_positions[:, block],
                    seen_positions[..., :end],
                    None if weights is None else weights[..., :end].contiguous(),
                    mass,
                    peak,
                    first=block.start == 0,
                )
            output[:, :, block] = attention.attend(
                query[:, :, block], all_keys[:, :, :end], all_values[:, :, :end], mask, scale, softcap, observe
            )
        self._keep(store, index, layer, key, value, mass, peak, stored)
        return output

    def _fused_chunk(
        self,
        store: Store,
        index: int,
        layer: Layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        stored = store.slots if any(self.seen) else 0
        old_mass = None if layer.mass is None else layer.mass[..., :stored]
        old_peak = None if layer.peak is None else layer.peak[..., :stored]
        ages, first_position = self._on(key.device)
        output, mass, peak = kernels.prefill(
            query,
            key,
            value,
            layer.keys[:, :, :stored],
            layer.values[:, :, :stored],
            layer.positions[..., :stored],
            ages,
            old_mass,
            old_peak,
            scale=scale,
            mass_decay=store.spec.mass_decay,
            peak_decay=store.spec.peak_decay,
            value_weighted=store.spec.value_weighted,
            softcap=softcap,
            window=window,
            look_gap=store.spec.look_gap,
            peak_reach=store.spec.peak_reach,
            first_position=first_position,
            padded=self.ranks is not None,
            full=min(self.seen) >= store.slots,
        )
        self._keep(store, index, layer, key, value, mass, peak, stored)
        return output

    def _keep(
        self,
        store: Store,
        index: int,
        layer: Layer,
        key: Tensor,
        value: Tensor,
        mass: Tensor | None,
        peak: Tensor | None,
        stored: int,
    ) -> None:
        """Let the core choose what stays of the slots and the chunk, and put the chosen columns into their slots.

        On a GPU the choice is made when the next layer attends, so that the device need not wait for the host: it
        multiplies on meanwhile. Until then the chunk's keys and values stay, so two layers' exist for a moment.

        `mass`, `peak`: float32 `[batch, kv_heads, stored + columns]`, updated for this call.
        """
        if mass is None or peak is None:
            self._choose(store, index, layer, key, value, None)
            return
        scores = torch.stack((mass, peak))
        if not stored:
            scores = torch.nn.functional.pad(scores, (store.slots, 0))
        if key.device.type != "cuda":
            self._choose(store, index, layer, key, value, scores.cpu())
            return
        if self._host_scores is None or self._host_scores.shape != scores.shape:  # layers may differ in slots
            self._host_scores = torch.empty(scores.shape, dtype=torch.float32, device="cpu", pin_memory=True)
        host = self._host_scores
        host.copy_(scores, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(key.device))

        def choose() -> None:
            copied.synchronize()
            self._choose(store, index, layer, key, value, host)

        self._undecided = choose

    def _settle(self) -> None:
        """Make the choice that the layer before has left open."""
        if self._undecided is not None:
            choose, self._undecided = self._undecided, None
            choose()

    def _choose(
        self, store: Store, index: int, layer: Layer, key: Tensor, value: Tensor, scores: Tensor | None
    ) -> None:
        mass, peak = (None, None) if scores is None else scores.unbind()
        if mass is not None and peak is not None and self._single:
            rows = self._single
            store.set_scores(index, rows, mass[rows, :, : store.slots], peak[rows, :, : store.slots])
        shape = (store.batch, store.kv_heads, store.slots)
        source = torch.empty(shape, dtype=torch.int32, device="cpu", pin_memory=key.device.type == "cuda")
        store.chunk(index, self._ranks(), mass, peak, source)
        source = source.to(key.device, non_blocking=True)
        if kernels_usable(key.device):
            with torch.cuda.device_of(key):  # type: ignore[no-untyped-call]
                for buffer, new in ((layer.keys, key), (layer.values, value)):
                    kernels.place(source, new, buffer)
            return
        moved, column = (source >= 0)[..., None], source.clamp(min=0).long()[..., None]
        for buffer, new in ((layer.keys, key), (layer.values, value)):
            torch.where(moved, new.gather(2, column.expand(-1, -1, -1, new.shape[3])), buffer, out=buffer)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ages and first positions on a device; copied once a call, since each such copy waits for the device."""
        if device not in self._by_device:
            first = torch.tensor(self.seen, dtype=torch.int32, device="cpu")
            self._by_device[device] = self._ages().to(device), first.to(device)
        return self._by_device[device]

    def _ranks(self) -> Tensor:
        if self.ranks is not None:
            return self.ranks.contiguous()
        return torch.arange(self.columns, dtype=torch.int32, device="cpu").repeat(self.batch, 1)

    def _ages(self) -> Tensor:
        """Real tokens that follow each column in the call, int32 `[batch, columns]` on the CPU; -1 for padding."""
        ranks = self._ranks()
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device="cpu")[:, None]
        return (lengths - 1 - ranks).masked_fill(ranks < 0, -1)

    def _weights(self, keys: Tensor, values: Tensor) -> Tensor | None:
        return attention.look_weights(keys, values) if self.cache.spec.value_weighted else None

    def _observer(
        self,
        ages: Tensor,
        query_positions: Tensor,
        key_positions: Tensor,
        weights: Tensor | None,
        mass: Tensor,
        peak: Tensor,
        first: bool = True,
    ) -> Callable[[Tensor], None]:
        """Add a block's probabilities to mass and peak `[batch, kv_heads, columns]`; the first block lets them fade."""
        spec = self.cache.spec
        elapsed = self.lengths if first else [0] * self.batch

        def observe(probabilities: Tensor) -> None:
            def add(mass: Tensor, peak: Tensor) -> None:
                attention.accumulate(
                    probabilities,
                    ages,
                    elapsed,
                    mass,
                    peak,
                    spec.mass_decay,
                    spec.peak_decay,
                    weights=weights,
                    threads=self.cache._threads,
                )

            def distance() -> Tensor:
                return query_positions[:, None, :, None] - key_positions[:, :, None, :]

            if spec.look_gap:
                probabilities.masked_fill_((distance() < spec.look_gap)[:, :, None], 0.0)
            if spec.peak_reach is None or max(self.lengths) <= spec.peak_reach:
                add(mass, peak)
                return
            own = key_positions >= torch.tensor(self.seen, device=key_positions.device)[:, None, None]
            add(mass, peak.clone())
            probabilities.masked_fill_(((distance() > spec.peak_reach) & own[:, :, None])[:, :, None], 0.0)
            add(mass.clone(), peak)

        return observe
