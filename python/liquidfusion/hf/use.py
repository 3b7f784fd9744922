"""A fresh cache for every `generate` of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from liquidfusion.exceptions import ConfigError
from liquidfusion.hf import hook
from liquidfusion.hf.cache import KVCache
from liquidfusion.options import Strategy


@contextmanager
def use(
    model: PreTrainedModel, strategy: str | Strategy = "liquid_fusion", budget: int | None = None, **options: Any
) -> Iterator[None]:
    """Give every `model.generate` inside the context, and every pipeline that calls it, a new `KVCache`.

    The context belongs to the model, not to a thread: enter it once, around the threads that generate. Contexts may be
    nested; the newest that is open counts.

    Parameters
    ----------
    model : PreTrainedModel
        The model whose `generate` brings a cache until the context ends.
    strategy, budget, **options
        What `KVCache` takes. `cache_size` (percent) refers to the prompt of each call. A cache that the caller passes
        to `generate` is used as it is, and `use_cache=False` generates without one.

    Raises
    ------
    ConfigError, UnsupportedError
        As `KVCache` does, on entering the context. Inside it `generate_batch` runs through an `Engine`; other ways to
        continuous batching are refused, and so is a `cache_implementation` of transformers' own.

    Examples
    --------
    >>> with use(model, budget=512):  # doctest: +SKIP
    ...     pipeline("text-generation", model=model, tokenizer=tokenizer)(prompt)
    """
    KVCache(model, strategy, budget, **({"prompt_tokens": 1} | options))

    with hook.generating(model, _Maker(model, strategy, budget, options)):
        yield


@dataclass(frozen=True)
class _Maker:
    """What a context was told."""

    model: PreTrainedModel
    strategy: str | Strategy
    budget: int | None
    options: Mapping[str, Any]

    def cache(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> KVCache | None:
        """A new cache for a call of `generate`."""
        if not _uses_cache(self.model, kwargs):
            return None
        given = dict(self.options)
        if given.get("cache_size") is not None:
            given.setdefault("prompt_tokens", _prompt_tokens(args, kwargs))
        return KVCache(self.model, self.strategy, self.budget, **given)

    def batch(self, *args: Any, **kwargs: Any) -> Any:
        """Run a call of `generate_batch` through an `Engine`."""
        from liquidfusion.hf.batches import generate_batch  # transformers' own takes a second to import

        return generate_batch(self.model, self.strategy, self.budget, self.options, *args, **kwargs)


def _uses_cache(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of `generate` wants a cache, and not one of transformers' own."""
    given = kwargs.get("generation_config")
    for source in (kwargs.get, lambda name: getattr(given, name, None)):
        kind = source("cache_implementation")
        if kind is not None:
            raise ConfigError(f"cache_implementation={kind!r} inside liquidfusion.use: leave one of them out")
    settings = (kwargs.get("use_cache"), getattr(given or model.generation_config, "use_cache", None))
    wanted = next((value for value in settings if value is not None), True)
    return bool(wanted)


def _prompt_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    candidates = (*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds")))
    prompt = next((value for value in candidates if isinstance(value, torch.Tensor)), None)
    return 1 if prompt is None else int(prompt.shape[1])
