"""What a caller holds of a request: its tokens as they come, in a thread or in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from liquidfusion.run.sampling import Sampling

if TYPE_CHECKING:
    from liquidfusion.state.row import RowState

Reason = Literal["stop", "length", "cancelled", "error"]
_Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    `logprob`: its log-probability by the model's own logits, `top_logprobs` the most likely ids with theirs, the
    likeliest first; None and empty where the request did not ask.
    """

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Request:
    """One answer that an `Engine` writes: iterate over its tokens, once, with `for` or `async for`.

    The token that ended it, or the last one of a stop string, comes too. The iteration ends without an error whatever
    the reason: `finish_reason` says "stop", "length", "cancelled" or "error", and is None while it goes on.

    Parameters
    ----------
    prompt : tuple of int
        The ids that it answers.
    sampling : Sampling
        How.
    cancel : callable
        Tells the engine that nobody waits any more.
    keep : bool
        Whether the row's state is kept when the answer has ended.
    """

    def __init__(
        self, prompt: tuple[int, ...], sampling: Sampling, cancel: Callable[[Request], None], keep: bool = False
    ) -> None:
        self.prompt, self.sampling, self.keep = prompt, sampling, keep
        self.cached_tokens = 0
        """Tokens of the prompt that were not read for this request: its row held them already."""
        self.error: BaseException | None = None
        """Why it ended with "error"."""
        self.state: RowState | None = None
        """With `keep=True`, when it has ended with "stop" or "length": what its row held."""
        self._cancel = cancel
        self._reason: Reason | None = None
        self._tokens: deque[Token] = deque()
        self._changed = threading.Condition()
        self._waiter: _Waiter | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the answer."""
        return len(self.prompt)

    @property
    def finish_reason(self) -> Reason | None:
        """Why it has ended; None while it runs or waits."""
        return self._reason

    def cancel(self) -> None:
        """End it, from any thread, as often as one likes: its row is free for others with the next step."""
        waiters = Waiters()
        if self.end("cancelled", waiters):
            self._cancel(self)
        waiters.wake()

    def __iter__(self) -> Iterator[Token]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tokens or self._reason is not None)
                if not self._tokens:
                    return
                token = self._tokens.popleft()
            yield token

    async def __aiter__(self) -> AsyncIterator[Token]:
        while True:
            with self._changed:
                token = self._tokens.popleft() if self._tokens else None
                if token is None:
                    if self._reason is not None:
                        return
                    loop = asyncio.get_running_loop()
                    waiter = loop.create_future()
                    self._waiter = loop, waiter
            if token is None:
                await waiter
            else:
                yield token

    # What the engine does

    def put(self, token: Token, waiters: Waiters) -> None:
        """Hand over a token; nobody sees one that comes after the end."""
        with self._changed:
            if self._reason is None:
                self._tokens.append(token)
                self._wake(waiters)

    def end(self, reason: Reason, waiters: Waiters, error: BaseException | None = None) -> bool:
        """End the answer; False if it has ended before."""
        with self._changed:
            if self._reason is not None:
                return False
            self.error, self._reason = error, reason
            self._wake(waiters)
            return True

    def _wake(self, waiters: Waiters) -> None:
        self._changed.notify_all()
        if self._waiter is not None:
            waiters.add(self._waiter)
            self._waiter = None


@dataclass
class Waiters:
    """Those who wait in event loops for what a step has brought: each loop is told once."""

    _by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = field(default_factory=dict)

    def add(self, waiter: _Waiter) -> None:
        """One more."""
        self._by_loop.setdefault(waiter[0], []).append(waiter[1])

    def wake(self) -> None:
        """Tell them."""
        for loop, futures in self._by_loop.items():
            with contextlib.suppress(RuntimeError):  # a loop that has been closed has nobody who waits
                loop.call_soon_threadsafe(_set, futures)
        self._by_loop.clear()


def _set(futures: Iterable[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
