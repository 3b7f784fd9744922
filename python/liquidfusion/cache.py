"""`KVCache`: key/value slots with a hard bound, filled by transformers, decided by the Rust core."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from liquidfusion import _core, attention, kernels, models
from liquidfusion.decoder import Decoder
from liquidfusion.exceptions import CacheError, ConfigError, UnsupportedError
from liquidfusion.install import install, switched
from liquidfusion.store import Layer, Store


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
    value_weighted, look_gap, averaged
        What liquid_fusion's scores count, likewise: looks times the length of the token's value over its key's, only
        looks from `look_gap` tokens away or more, and mass per query that could look.
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
        averaged: bool | None = None,
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
            averaged=averaged,
        )
        super().__init__(layers=[])
        self._model = weakref.ref(model)
        self._threads = threads
        self._graph, self._compile, self._overlap = graph, compile, overlap
        self._decoder: Decoder | None = None
        self.evicting = True
        """False: GPU decode steps reuse slots in turn, to measure what eviction costs; set before the first step."""
        self._layer_count = int(models.text_config(model).num_hidden_layers)
        self._store: Store | None = None
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
        """Tokens evicted so far, summed over layers, batch rows and kv heads."""
        self._settle()
        return 0 if self._store is None else self._store.ledger.evictions

    @property
    def nbytes(self) -> int:
        """Bytes that the slots, their positions and scores, and the reuse queues hold; 0 before the first call."""
        if self._store is None:
            return 0
        return self._store.nbytes

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
        return self._settled().host.positions[layer].clone()

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
            raise CacheError(f"strategy '{self.spec.strategy}' keeps no scores")
        return slots.mass.cpu().clone(), slots.peak.cpu().clone()

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Key and value slots of a layer, `[batch, kv_heads, slots, head_dim]` each: the cache's own memory."""
        slots = self._layer(layer)
        return slots.keys, slots.values

    def reset(self) -> None:
        """Make the cache as new; buffers are kept and reused when the next prompt has the same batch size."""
        if self._store is not None:
            if self._decoder is not None:
                self._decoder.abandon()
            self._store.reset()
        self._columns, self._broken = 0, None

    def __repr__(self) -> str:
        params = ", ".join(f"{name}={value!r}" for name, value in self.spec.params.items() if value is not None)
        return (
            f"KVCache(strategy={self.spec.strategy!r}, budget={self.spec.budget}, {params}; "
            f"columns seen={self._columns}, evictions={self.evictions}, bytes={self.nbytes})"
        )

    # What transformers asks

    def __len__(self) -> int:
        return self._layer_count

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
        self._settled().reorder(beam_idx)

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
        return -1 if self._store is None or not self._columns else self._store.batch

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
        return [False] * self._layer_count

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer."""
        return [False] * self._layer_count

    @property
    def is_dummy(self) -> list[bool]:
        """False for every layer."""
        return [False] * self._layer_count

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
        """The decoder that runs this call on the GPU: one real token per row, all layers on one device."""
        store = self._store
        if store is None or not self._columns or call.columns > 1 or min(call.lengths) < 1 or not self.spec.bounded:
            return None
        if self._decoder is None:
            devices = {layer.keys.device for layer in store.layers if layer is not None}
            if len(devices) > 1 or not kernels_usable(devices.pop()):
                return None
            self._decoder = Decoder(store, self._graph, self._compile, self._overlap, self.evicting)
        return self._decoder

    def _settle(self) -> None:
        """Let the host's ledger know of every step the GPU has taken."""
        if self._decoder is not None:
            self._decoder.stop()

    def _seen(self) -> list[int]:
        store = self._used()
        pending = 0 if self._decoder is None or not self._decoder.running else self._decoder.pending
        return [n + pending for n in store.ledger.seen]

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
        if self._columns and self._store is not None and batch != self._store.batch:
            raise CacheError(
                f"the call has {batch} rows, the cache holds {self._store.batch}; call reset() for a new prompt"
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
        steps = torch.arange(columns).expand(batch, -1) if ranks is None else ranks.long()
        own = steps + torch.tensor(seen)[:, None]
        by_column = (torch.arange(columns) + self._columns).expand(batch, -1)
        wrong = (given != own) & (given != by_column) & (steps >= 0)
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            raise CacheError(
                f"position_ids[{row}, {column}] is {int(given[row, column])}, but the cache continues at "
                f"{int(own[row, column])}; for a new prompt call reset()"
            )

    def _used(self) -> Store:
        if self._store is None or not self._columns:
            raise CacheError("the cache has not been used yet")
        return self._store

    def _settled(self) -> Store:
        store = self._used()
        self._settle()
        return store

    def _layer(self, index: int) -> Layer:
        layer = self._settled().layers[index]
        assert layer is not None
        return layer

    def _prepare(self, call: Call, key: Tensor) -> Store:
        """Slots for the running call: allocated by the first one, grown by an unbounded strategy."""
        batch, kv_heads = key.shape[:2]
        store, budget = self._store, self.spec.budget
        if store is not None and not self._columns and (store.batch, store.kv_heads) != (batch, kv_heads):
            store = None
        needed = max(call.seen) + call.columns
        if store is None:
            slots = max(256, needed) if budget is None else budget
            self._decoder = None
            # Where the kernels run, the ledger follows the slots at a distance, on the CPU (Triton's interpreter) too.
            shared = not kernels_usable(key.device) or budget is None
            store = Store(self.spec, self._layer_count, batch, kv_heads, slots, key.device, self._threads, shared)
        elif budget is None and needed > store.slots:
            store.grow(max(needed, 2 * store.slots))
        self._store = store
        return store


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
    store: Store | None = None
    attended: int = 0
    _single: list[int] = field(default_factory=list)
    _undecided: Callable[[], None] | None = None
    _host_scores: Tensor | None = None
    _by_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

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
        index, self.layer = self.layer, None
        self._settle()
        key, value = key.detach(), value.detach()
        store = self.store or self._begin(key)
        layer = store.layer(index, key, value)
        self.attended += 1
        self._write_single(store, index, layer, key, value)
        if self.columns == 1:
            return self._decode(layer, query, scale, window, softcap)
        return self._chunk(store, index, layer, query, key, value, scale, window, softcap)

    def close(self) -> None:
        """Choose the next victims of every layer, row and head."""
        if self.store is None or self.attended != len(self.cache):
            raise UnsupportedError(
                f"{type(self.cache.model).__name__} ran {self.attended} of {len(self.cache)} attention layers through "
                "the cache; every layer must use transformers' attention interface"
            )
        self._settle()
        self.store.finish(pull=self.columns == 1)

    def _begin(self, key: Tensor) -> Store:
        store = self.store = self.cache._prepare(self, key)
        store.begin(self.lengths)
        # Rows with one real token overwrite the first slot of their queue before anyone attends (the decode rule).
        self._single = [row for row, length in enumerate(self.lengths) if length == 1]
        return store

    def _write_single(self, store: Store, index: int, layer: Layer, key: Tensor, value: Tensor) -> None:
        if not self._single:
            return
        slots = store.written[index].to(key.device)
        if self.columns == 1 and len(self._single) == self.batch:
            for buffer, new in ((layer.keys, key), (layer.values, value)):
                buffer.scatter_(2, slots[..., None, None].expand(-1, -1, 1, buffer.shape[3]), new)
            return
        rows = torch.tensor(self._single)
        columns = self._ranks()[rows].argmax(1)
        for buffer, new in ((layer.keys, key), (layer.values, value)):
            target = slots[rows.to(slots.device)][..., None, None].expand(-1, -1, 1, buffer.shape[3])
            chosen = new[rows.to(new.device), :, columns.to(new.device)][:, :, None]
            buffer[rows.to(new.device)] = buffer[rows.to(new.device)].scatter(2, target, chosen)

    def _decode(self, layer: Layer, query: Tensor, scale: float, window: int, softcap: float) -> Tensor:
        newest = torch.tensor([[n if length else -1] for n, length in zip(self.seen, self.lengths, strict=True)])
        dense = len(self._single) == self.batch and min(self.seen) + 1 >= layer.keys.shape[2] and not window
        ages, newest = newest.clamp(max=0).int(), newest.to(query.device)
        mask = None if dense else attention.visible(newest, layer.positions, window)
        observe = None
        if layer.mass is not None and layer.peak is not None:
            observe = self._observer(ages, newest, layer.positions, layer.keys, layer.values, layer.mass, layer.peak)
        return attention.attend(query, layer.keys, layer.values, mask, scale, softcap, observe)

    def _chunk(
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
        if not self._single and store.spec.bounded and kernels_usable(key.device):
            # Triton launches on the current device, wherever the tensors are.
            with torch.cuda.device_of(key):  # type: ignore[no-untyped-call]
                return self._fused_chunk(store, index, layer, query, key, value, scale, window, softcap)
        ranks, seen = self._ranks(), torch.tensor(self.seen, dtype=torch.int32)[:, None]
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
        mass = peak = None
        if layer.mass is not None and layer.peak is not None:
            mass, peak = layer.mass.new_zeros((2, *key.shape[:2], self.columns)).unbind()
            if stored:
                mass, peak = torch.cat((layer.mass, mass), 2), torch.cat((layer.peak, peak), 2)

        output = torch.empty_like(query)
        for block in attention.blocks(self.batch * query.shape[1], self.columns, stored + self.columns):
            end = stored + block.stop  # no query of this block sees a later column
            mask = attention.visible(query_positions[:, block], all_positions[..., :end], window)
            observe = None
            if mass is not None and peak is not None:
                observe = self._observer(
                    ages[:, block].contiguous(),
                    query_positions[:, block],
                    all_positions[..., :end],
                    all_keys[:, :, :end],
                    all_values[:, :, :end],
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
        if self._host_scores is None:
            self._host_scores = torch.empty(scores.shape, pin_memory=True)
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
        source = torch.empty(shape, dtype=torch.int32, pin_memory=key.device.type == "cuda")
        store.chunk(index, self._ranks(), mass, peak, source)
        source = source.to(key.device, non_blocking=True)
        moved, column = (source >= 0)[..., None], source.clamp(min=0).long()[..., None]
        for buffer, new in ((layer.keys, key), (layer.values, value)):
            buffer.copy_(torch.where(moved, new.gather(2, column.expand(-1, -1, -1, new.shape[3])), buffer))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ages and first positions on a device; copied once a call, since each such copy waits for the device."""
        if device not in self._by_device:
            first = torch.tensor(self.seen, dtype=torch.int32)
            self._by_device[device] = self._ages().to(device), first.to(device)
        return self._by_device[device]

    def _ranks(self) -> Tensor:
        if self.ranks is not None:
            return self.ranks.contiguous()
        return torch.arange(self.columns, dtype=torch.int32).repeat(self.batch, 1)

    def _ages(self) -> Tensor:
        """Real tokens that follow each column in the call, int32 `[batch, columns]` on the CPU; -1 for padding."""
        ranks = self._ranks()
        return (torch.tensor(self.lengths, dtype=torch.int32)[:, None] - 1 - ranks).masked_fill(ranks < 0, -1)

    def _observer(
        self,
        ages: Tensor,
        query_positions: Tensor,
        key_positions: Tensor,
        keys: Tensor,
        values: Tensor,
        mass: Tensor,
        peak: Tensor,
        first: bool = True,
    ) -> Callable[[Tensor], None]:
        """Add a block's probabilities to mass and peak `[batch, kv_heads, columns]`; the first block lets them fade."""
        spec = self.cache.spec
        weights = attention.look_weights(keys, values) if spec.value_weighted else None
        elapsed = self.lengths if first else [0] * self.batch

        def observe(probabilities: Tensor) -> None:
            if spec.look_gap:
                distance = query_positions[:, None, :, None] - key_positions[:, :, None, :]
                probabilities.masked_fill_((distance < spec.look_gap)[:, :, None], 0.0)
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

        return observe
