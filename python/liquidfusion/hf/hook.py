"""How a model's calls reach its KVCaches: while caches are installed, the model is of a subclass of its own class.

The subclass runs calls that carry a cache by it and passes all others on. A class and not a wrapper on
`model.forward`: what others put on `forward` (Accelerate, hooks, torch.compile) stays where it is and may come and go
in any order, and copies and replicas of a model answer with their own weights.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from liquidfusion.exceptions import CacheError, UnsupportedError
from liquidfusion.hf.function import IMPLEMENTATION, register
from liquidfusion.run.backend import traced
from liquidfusion.run.graph import GROUPED

CACHE_KEYWORDS = ("cache", "past_key_values")
"""Names under which transformers passes a cache to `forward`: 5.24 and newer, and 5.17."""

Forward = Callable[..., Any]


class Serves(ABC):
    """A cache that runs the calls that carry it."""

    @property
    @abstractmethod
    def model(self) -> PreTrainedModel:
        """The model it was built for."""

    @abstractmethod
    def run(self, inputs: dict[str, Any], forward: Forward) -> Any:
        """Serve a call: arguments by name, and what computes it."""


class Makes(Protocol):
    """What an open `use` context does for calls of its model."""

    def cache(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Serves | None:
        """A cache for a call of `generate`, or None where it wants none."""

    def batch(self, *args: Any, **kwargs: Any) -> Any:
        """Run a call of `generate_batch`."""


@dataclass
class _State:
    """What is installed on a model.

    `turn`: which attention runs is a setting of the model, so calls of several threads take turns. `makers`: the open
    `use` contexts, the newest last. `own_generate`: what the model's instance had under that name, set aside.
    """

    turn: threading.RLock = field(default_factory=threading.RLock)
    makers: list[Makes] = field(default_factory=list)
    own_generate: Callable[..., Any] | None = None


_states: WeakKeyDictionary[PreTrainedModel, _State] = WeakKeyDictionary()
_installing = threading.RLock()
_serving: ContextVar[Serves | None] = ContextVar("liquidfusion_serving", default=None)


def cache_keyword(model: PreTrainedModel) -> str:
    """Name of the cache argument of `model.forward` and `model.generate` in the transformers version at hand.

    Parameters
    ----------
    model : PreTrainedModel
        Any model of transformers.

    Returns
    -------
    str
        `"cache"`, or `"past_key_values"` before transformers 5.24.
    """
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_KEYWORDS if name in parameters), CACHE_KEYWORDS[0])


def install(model: PreTrainedModel) -> None:
    """Let calls of a model that carry a cache be run by it; a model that is installed already stays as it is."""
    with _installing:
        register()
        _states.setdefault(model, _State())
        _reclass(model)


def installed(model: PreTrainedModel) -> bool:
    """Whether a model has KVCaches."""
    return isinstance(model, PreTrainedModel) and model in _states


def uninstall(model: PreTrainedModel) -> None:
    """Make a model as it was before its first KVCache; one without a KVCache stays as it is.

    Caches built for the model can no longer be used with it. What others have put on the model stays.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    """
    with _installing:
        state = _states.pop(model, None)
        if state is not None and state.own_generate is not None:
            model.generate = state.own_generate  # type: ignore[assignment]
        _reclass(model)


@contextmanager
def generating(model: PreTrainedModel, make: Makes) -> Iterator[None]:
    """Give every `model.generate` inside the context the cache that `make` makes, and let it run `generate_batch`.

    Contexts may be nested and may overlap: the newest that is open makes the cache.
    """
    with _installing:
        install(model)
        state = _states[model]
        if not state.makers:
            state.own_generate = model.__dict__.pop("generate", None)
        state.makers.append(make)
        _reclass(model)
    try:
        yield
    finally:
        with _installing:
            state.makers.remove(make)
            if not state.makers and state.own_generate is not None:
                model.__dict__.setdefault("generate", state.own_generate)
                state.own_generate = None
            _reclass(model)


@contextmanager
def switched(configs: Sequence[Any], implementation: str = IMPLEMENTATION, grouped: str = GROUPED) -> Iterator[None]:
    """Run the attention layers that read these configurations through an implementation, ours by default.

    `grouped`: what experts that would compute by grouped products compute by instead.
    """
    previous = [(config._attn_implementation, config._experts_implementation) for config in configs]
    try:
        for config, (_, experts) in zip(configs, previous, strict=True):
            config._attn_implementation = implementation
            if experts == GROUPED:
                config._experts_implementation = grouped
        yield
    finally:
        for config, (attention, experts) in zip(configs, previous, strict=True):
            config._attn_implementation, config._experts_implementation = attention, experts


def _reclass(model: PreTrainedModel) -> None:
    """Give a model the class that its state asks for, where nobody else has changed it since."""
    kind, state = type(model), _states.get(model)
    original: Any = kind.__dict__.get("_liquidfusion_original", kind)
    wanted = original if state is None else _subclass(original, bool(state.makers))
    if kind is not wanted:
        model.__class__ = wanted


@functools.cache
def _subclass(original: Any, makes_caches: bool) -> Any:
    """A subclass of a model's class, of the same name, whose calls may carry a KVCache."""

    @functools.wraps(original.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _serve(self, original, original.__call__, args, kwargs)

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _serve(self, original, original.forward, args, kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        # What copies or pickles the model gets one without caches.
        _, _, *rest = original.__reduce_ex__(self, protocol)
        return _unfilled, (original,), *rest

    members: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_liquidfusion_original": original,
        "__call__": call,
        "forward": forward,
        "__reduce_ex__": reduce,
    }
    if makes_caches:

        @functools.wraps(original.generate)
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            state = _states.get(self)
            own = None if state is None else state.own_generate
            if state is not None and state.makers and all(kwargs.get(name) is None for name in CACHE_KEYWORDS):
                cache = state.makers[-1].cache(args, kwargs)
                if cache is not None:
                    kwargs[cache_keyword(self)] = cache
            return original.generate(self, *args, **kwargs) if own is None else own(*args, **kwargs)

        def batch(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _states[self].makers[-1].batch(*args, **kwargs)

        def refuse(self: Any, *_: Any, **__: Any) -> Any:
            raise UnsupportedError(
                f"continuous batching of {type(self).__name__} brings a paged cache of its own; call generate_batch"
            )

        members |= {"generate": generate, "init_continuous_batching": refuse}
        if hasattr(original, "generate_batch"):
            members["generate_batch"] = functools.wraps(original.generate_batch)(batch)
    return type(original)(original.__name__, (original,), members)


def _unfilled(kind: Any) -> Any:
    """An instance whose contents come next, as copying and pickling make it."""
    return kind.__new__(kind)


def _carried(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Serves | None:
    """The cache among a call's arguments."""
    named = (kwargs.get(name) for name in CACHE_KEYWORDS)
    return next((value for value in (*named, *args) if isinstance(value, Serves)), None)


def _serve(model: Any, original: Any, call: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a call with a cache by it, any other one as it comes."""
    if torch.compiler.is_compiling():
        # A graph of somebody else's cannot hold a cache's work; ours is compiled from inside it.
        if traced() or _carried(args, kwargs) is None:
            return call(model, *args, **kwargs)
        return _apart(model, original, call, args, kwargs)
    state, cache = _states.get(model), _carried(args, kwargs)
    if state is None or (cache is not None and cache is _serving.get()):
        return call(model, *args, **kwargs)
    if cache is None:
        with state.turn:
            return call(model, *args, **kwargs)
    if cache.model is not model:
        raise CacheError(f"this KVCache was built for another {type(cache.model).__name__}; build one for this model")
    inputs = _by_name(original, args, kwargs)
    with state.turn:
        token = _serving.set(cache)
        try:
            return cache.run(inputs, types.MethodType(call, model))
        finally:
            _serving.reset(token)


_apart: Forward = torch.compiler.disable(_serve)  # type: ignore[no-untyped-call]


def _by_name(original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = _signature(original).bind_partial(None, *args, **kwargs)
    inputs = dict(bound.arguments)
    inputs.pop(next(iter(inputs)))  # self
    for parameter in _signature(original).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            inputs.update(inputs.pop(parameter.name, {}))
    return inputs


@functools.cache
def _signature(original: Any) -> inspect.Signature:
    return inspect.signature(original.forward)


def refuse_training(inputs: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Refuse a call that asks for a loss to learn from, before any work.

    Raises
    ------
    UnsupportedError
        Gradients would flow through the cache, and stored tokens have none.
    """
    if inputs.get("labels") is None or not torch.is_grad_enabled():
        return
    if any(weight.requires_grad for weight in model.parameters()):
        raise UnsupportedError(
            "the call has labels and gradients are on: they do not flow through a KVCache; train without a cache "
            "(use_cache=False), or compute the loss inside torch.no_grad()"
        )
