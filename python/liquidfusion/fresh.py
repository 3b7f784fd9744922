"""A fresh cache for every `generate` of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from liquidfusion import models
from liquidfusion.cache import KVCache
from liquidfusion.exceptions import UnsupportedError
from liquidfusion.install import CACHE_KEYWORDS, cache_keyword


@contextmanager
def use(model: PreTrainedModel, strategy: str = "liquid_fusion", **parameters: Any) -> Iterator[None]:
    """Give every `model.generate` inside the context, and every pipeline that calls it, a new `KVCache`.

    The context belongs to the model, not to a thread: enter it once, around the threads that generate.

    Parameters
    ----------
    model : PreTrainedModel
        The model whose `generate` is wrapped until the context ends.
    strategy : str
        A name from `liquidfusion.strategies()`.
    **parameters
        What `KVCache` takes. `cache_size` (percent) refers to the prompt of each call. A cache that the caller passes
        to `generate` is used as it is.

    Raises
    ------
    ConfigError, UnsupportedError
        As `KVCache` does, on entering the context. Inside it, continuous batching is refused too.

    Examples
    --------
    >>> with use(model, budget=512):  # doctest: +SKIP
    ...     pipeline("text-generation", model=model, tokenizer=tokenizer)(prompt)
    """
    models.check(model)
    KVCache(model, strategy, **({"prompt_tokens": 1} | parameters))
    had_own = "generate" in model.__dict__
    original: Callable[..., Any] = model.generate  # type: ignore[assignment]

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if all(kwargs.get(name) is None for name in CACHE_KEYWORDS):
            chosen = dict(parameters)
            if chosen.get("cache_size") is not None:
                chosen.setdefault("prompt_tokens", _prompt_tokens(args, kwargs))
            kwargs[cache_keyword(model)] = KVCache(model, strategy, **chosen)
        return original(*args, **kwargs)

    def refuse(*_: Any, **__: Any) -> Any:
        raise UnsupportedError(
            f"continuous batching of {type(model).__name__} brings a paged cache of its own; call generate"
        )

    model.generate = generate  # type: ignore[assignment]
    model.init_continuous_batching = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.__dict__["init_continuous_batching"]
        if had_own:
            model.generate = original  # type: ignore[assignment]
        else:
            del model.__dict__["generate"]


def _prompt_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    candidates = (*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds")))
    prompt = next((value for value in candidates if isinstance(value, torch.Tensor)), None)
    return 1 if prompt is None else int(prompt.shape[1])
