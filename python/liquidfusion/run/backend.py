"""Who attends while a call of the model runs; the attention function, which never gets a cache, finds it here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from liquidfusion.compute.softmax import How
from liquidfusion.exceptions import CacheError


class Backend(ABC):
    """Attends layer by layer, each after it has handed over its keys and values.

    `attended`: layers that have attended in the running call. `reads`: layers that have no keys of their own and read
    another's. `windows`: those that the model's masks have asked for in the call, each in tokens and whether it is a
    chunk. `masks`: those handed to the model, which come back with the attention of its layers, and the version of
    their contents. `every_call`: whether masks must be looked at in every call, since what they do is not known.
    `handed`: what the layer that attends next has handed to its cache.
    """

    attended: int = 0
    reads: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self.windows: set[tuple[int, bool]] = set()
        self.masks: list[tuple[Tensor, int]] = []
        self.every_call = False
        self.handed: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def take(self, layer: int) -> None:
        """Note which layer attends next."""

    def hand(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Note it with what it has handed to its cache: keys and values, or a latent and a rotary key."""
        self.handed = key, value
        self.take(layer)

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        """Attend the new columns of that layer to what it stores, and store them.

        Parameters
        ----------
        query : Tensor
            `[batch, heads, columns, head_dim]`.
        key, value : Tensor
            `[batch, kv_heads, columns, head_dim]`.
        how : How
            Scale, window, softcap and sinks of the layer.

        Returns
        -------
        Tensor
            `[batch, heads, columns, head_dim of the values]`.
        """


_current: ContextVar[Backend | None] = ContextVar("liquidfusion_backend", default=None)
_traced: Backend | None = None  # the same while torch.compile traces: it cannot look into a ContextVar


def running() -> Backend:
    """Find the backend of the call that runs in this thread.

    Raises
    ------
    CacheError
        There is none.
    """
    backend = _traced if torch.compiler.is_compiling() else _current.get()
    if backend is None:
        raise CacheError("a KVCache works only in calls of the model it was built for: call model(...) itself")
    return backend


def traced() -> bool:
    """Whether torch.compile traces a call of a backend's own."""
    return _traced is not None


@contextmanager
def attending(backend: Backend, compiled: bool = False) -> Iterator[None]:
    """Let a backend attend inside this context; `compiled`: also while torch.compile traces."""
    global _traced
    token, before = _current.set(backend), _traced
    _traced = backend if compiled else before
    try:
        yield
    finally:
        _current.reset(token)
        _traced = before
