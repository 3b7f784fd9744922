"""`Engine`: many requests at once on a fixed number of rows, each bounded for life."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from liquidfusion.geometry import Geometry
from liquidfusion.hf.formats import layer_formats, row_bytes
from liquidfusion.hf.rows import RowCache
from liquidfusion.options import SHORT, Strategy, chosen, resolve
from liquidfusion.precision import Bits
from liquidfusion.run.loop import Loop
from liquidfusion.run.scheduler import Scheduler
from liquidfusion.run.stepper import Stepper
from liquidfusion.state.row import RowState


class Engine(Loop):
    """Serves many requests at once, each in a row of slots that is its whole memory for life.

    A request waits until a row is free, and never again: nothing is swapped or read twice, and memory does not grow.
    What it answers does not depend on what runs beside it, but for the rounding of larger matrix products.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode.
    rows : int
        Requests that run side by side.
    strategy, budget, **options
        As for `KVCache`.
    tokenizer : optional
        Needed for stop strings; its end token ends answers if the model's generation configuration names none.
    chunk : int
        Tokens of a prompt that are read at once. What a row keeps depends on it, and on nothing else but the request.
    step_tokens : int
        Tokens of one step, a decoding row counting as one and a chunk as its own, or as 256 where it has fewer: as many
        whole chunks run beside those that decode as fit, and at least one. While few prompts are read and many rows
        decode, it is every third step that has chunks.
    queue_limit : int, optional
        Requests that may wait; None for any number.
    prefixes : int
        Beginnings shared by several prompts, such as a system prompt, that are kept at most, each as large as a row, in
        host memory; 0 for none.

    Raises
    ------
    ConfigError
        A parameter is out of range.
    UnsupportedError
        The model cannot be served; the message names why.

    Examples
    --------
    >>> with Engine(model, rows=64, budget=2048) as engine:  # doctest: +SKIP
    ...     (request,) = engine.submit(tokenizer(prompt).input_ids, Sampling(max_tokens=100))
    ...     for token in request:
    ...         print(token.id)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: int,
        strategy: str | Strategy = "liquid_fusion",
        budget: int | None = None,
        tokenizer: Any = None,
        chunk: int = 512,
        step_tokens: int = 1024,
        queue_limit: int | None = None,
        prefixes: int = 4,
        **options: Any,
    ) -> None:
        scheduler = Scheduler(rows, chunk=chunk, step_tokens=step_tokens, queue_limit=queue_limit)
        self._model, self._geometry = model, Geometry.of(model)  # a cache does not keep its model
        cache = RowCache(model, rows, strategy, budget, **options)
        stepper = Stepper(
            cache,
            scheduler,
            eos=end_tokens(model, tokenizer),
            tokenizer=tokenizer,
            prefixes=prefixes,
            lag=lag_on(cache.device),
        )
        super().__init__(cache, stepper)

    def load_state(self, path: str) -> RowState:
        """Read a state that `RowState.to_file` has written.

        Raises
        ------
        CacheError
            It is truncated, was changed, or is of another model, strategy or budget.
        """
        state = RowState.from_file(path, self._geometry)
        self._own.check_state(state)
        return state


def row_nbytes(
    model: PreTrainedModel, strategy: str | Strategy, budget: int | None, bits: Any = None, **parameters: Any
) -> int:
    """Bytes that a row of an engine of this model takes.

    Raises
    ------
    ConfigError
        A parameter is out of range.
    UnsupportedError
        The model cannot be served.
    """
    geometry = Geometry.of(model)
    short = {name: parameters.pop(name, None) for name in SHORT}
    spec = resolve(chosen(strategy, short, parameters), budget)
    formats = layer_formats(model, geometry, Bits.of(bits), None)
    return row_bytes(geometry, formats, spec, geometry.positions, getattr(torch, geometry.dtype).itemsize)


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: of the model's generation configuration, else of the tokenizer."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids is None:
        ids = getattr(tokenizer, "eos_token_id", None)
    return () if ids is None else tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)


def lag_on(device: torch.device) -> int:
    """Steps that run ahead of the host: on a GPU the next one starts before the tokens of the last one are read."""
    return 1 if device.type == "cuda" else 0
