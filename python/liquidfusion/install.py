"""One reversible wrapper on `model.forward`, active only for calls that carry a KVCache."""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from liquidfusion import attention, models
from liquidfusion.exceptions import CacheError

if TYPE_CHECKING:
    from liquidfusion.cache import KVCache

CACHE_KEYWORDS = ("cache", "past_key_values")
"""Names under which transformers passes a cache to `forward`: 5.24 and newer, and 5.17."""

_MARK = "_liquidfusion_original"
_INSTALLING = threading.Lock()


def cache_keyword(model: PreTrainedModel) -> str:
    """Name of the cache argument of `model.forward` (and of `model.generate`) in the transformers version at hand."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_KEYWORDS if name in parameters), CACHE_KEYWORDS[0])


def install(model: PreTrainedModel, cache_type: type[KVCache]) -> None:
    """Wrap `model.forward`; a model that is wrapped already stays as it is.

    The wrapper passes every call without a KVCache on untouched. Which attention runs is a setting of the model, so
    calls of several threads take turns; one that began before does not wait. `uninstall` takes it off again.
    """
    with _INSTALLING:
        if not hasattr(model.forward, _MARK):
            attention.register()
            model.forward = Forward(model, cache_type)


class Forward:
    """`model.forward` of a model that has KVCaches.

    An object and no closure: what copies or pickles the model takes it along, and it must call the copy then.

    Parameters
    ----------
    model : PreTrainedModel
        Whose `forward` it takes the place of.
    cache_type : type
        `KVCache`.
    """

    def __init__(self, model: PreTrainedModel, cache_type: type[KVCache]) -> None:
        self._wrap(model, cache_type, model.__dict__.get("forward"))

    def _wrap(self, model: PreTrainedModel, cache_type: type[KVCache], own: Callable[..., Any] | None) -> None:
        self._model, self._cache_type = model, cache_type
        self._original = types.MethodType(type(model).forward, model) if own is None else own
        self._signature = inspect.signature(self._original)
        self._turn = threading.RLock()
        functools.update_wrapper(self, self._original)
        setattr(self, _MARK, (own,))

    def __getstate__(self) -> tuple[Any, ...]:
        return self._model, self._cache_type, *getattr(self, _MARK)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._wrap(*state)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a call with a KVCache by it, any other one as it comes."""
        cache = next((kwargs[name] for name in CACHE_KEYWORDS if isinstance(kwargs.get(name), self._cache_type)), None)
        if cache is None and any(isinstance(value, self._cache_type) for value in args):
            cache = next(value for value in args if isinstance(value, self._cache_type))
        if cache is None:
            if torch.compiler.is_compiling():  # a graph cannot hold a lock
                return self._original(*args, **kwargs)
            with self._turn:
                return self._original(*args, **kwargs)
        if cache.model is not self._model:
            raise CacheError(
                f"this KVCache was built for another {type(cache.model).__name__}; build one for this model"
            )
        bound = self._signature.bind_partial(*args, **kwargs)
        for parameter in self._signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound.arguments.update(bound.arguments.pop(parameter.name, {}))
        with self._turn:
            return cache.run(bound.arguments, self._original)


def uninstall(model: PreTrainedModel) -> None:
    """Take the wrapper off `model.forward`; a model without one stays as it is.

    Caches built for the model can no longer be used with it.
    """
    mark: tuple[Callable[..., Any] | None] | None = getattr(model.forward, _MARK, None)
    if mark is None:
        return
    if mark[0] is None:
        del model.__dict__["forward"]
    else:
        model.forward = mark[0]


@contextmanager
def switched(model: PreTrainedModel, implementation: str = attention.IMPLEMENTATION) -> Iterator[None]:
    """Run the decoder's attention layers through an implementation, ours by default, inside this context."""
    config = models.text_config(model)
    previous = config._attn_implementation
    try:
        config._attn_implementation = implementation
        yield
    finally:
        config._attn_implementation = previous
