"""One answer: from the engine's tokens to text, log-probabilities, calls and the reason it ended."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from liquidfusion.run.stopping import Detokenizer, StopStrings
from liquidfusion.serving.errors import ApiError
from liquidfusion.serving.metrics import Metrics
from liquidfusion.serving.text import Text
from liquidfusion.serving.tools import Call, Caller

if TYPE_CHECKING:
    from liquidfusion.run.request import Request, Token


@dataclass(frozen=True)
class Said:
    """A token of the answer, where its text begins in it, and what the engine told of it."""

    token: Token
    offset: int


@dataclass(frozen=True)
class Piece:
    """What an answer has grown by; the last piece has the reason for its end."""

    text: str = ""
    said: tuple[Said, ...] = ()
    calls: tuple[Call, ...] = ()
    finish: str | None = None


@dataclass
class Choice:
    """One answer being written.

    Parameters
    ----------
    index : int
        Its place among the answers.
    request : Request
        The engine's.
    text : Text
        The tokenizer.
    prompt : sequence of int
        Tokens before the answer.
    ends : frozenset of int
        Tokens that end an answer and are not part of its text.
    stop : sequence of str
        Strings that end it.
    caller : Caller, optional
        Finds calls.
    raw : bool
        Whether special tokens are text.
    metrics : Metrics
        Where times are counted.
    arrived : float
        When the request came, as `time.monotonic` counts.
    """

    index: int
    request: Request
    text: Text
    prompt: Sequence[int]
    ends: frozenset[int]
    stop: Sequence[str]
    caller: Caller | None
    raw: bool
    metrics: Metrics
    arrived: float
    tokens: int = 0
    content: list[str] = field(default_factory=list)
    calls: tuple[Call, ...] = ()
    _length: int = 0

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The answer as it grows.

        Raises
        ------
        ApiError
            500 if the engine failed, 503 if it stopped.
        """
        detokenizer = Detokenizer(self.text, self.prompt, skip_special=not self.raw)
        stops = StopStrings(self.stop)
        said: list[Said] = []
        length, before, ready = 0, self.arrived, ""
        async for token in self.request:
            before = self._count(before)
            if token.id in self.ends:
                continue  # the engine ends the answer with it
            said.append(Said(token, length))
            grown = detokenizer.push(token.id)
            length += len(grown)
            ready = self._ready(stops.push(grown))
            if stops.found is not None:
                self.request.cancel()
                break
            if ready:
                yield Piece(ready, tuple(said))
                said = []
        yield self._last(detokenizer, stops, said, ready if stops.found is not None else "")
        self.metrics.finished(time.monotonic() - self.arrived)

    def _count(self, before: float) -> float:
        now = time.monotonic()
        (self.metrics.between if self.tokens else self.metrics.first).observe(now - before)
        self.tokens += 1
        return now

    def _ready(self, text: str) -> str:
        self._length += len(text)
        ready = text if self.caller is None else self.caller.push(text)
        self.content.append(ready)
        return ready

    def _last(self, detokenizer: Detokenizer, stops: StopStrings, said: list[Said], text: str) -> Piece:
        reason: str | None = self.request.finish_reason
        if stops.found is None:
            if reason == "error":
                raise ApiError(500, f"The engine failed: {self.request.error}")
            if reason not in ("stop", "length"):
                raise ApiError(503, "The server is stopping; send the request again.", headers={"Retry-After": "5"})
            text = self._ready(stops.push(detokenizer.flush()))
            if stops.found is None:
                text += self._ready(stops.flush())
        if stops.found is not None:
            said, reason = [one for one in said if one.offset < self._length], "stop"
        if self.caller is not None:
            calls, more = self.caller.rest()
            self.calls = tuple(calls)
            self.content.append(more)
            text += more
            reason = "tool_calls" if calls else reason
        return Piece(text, tuple(said), self.calls, reason)

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a client sends it back with its next turn."""
        content = "".join(self.content)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self.calls:
            message |= {"content": content or None, "tool_calls": [call.as_dict() for call in self.calls]}
        return message
