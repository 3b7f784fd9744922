"""An engine without a model: it answers by a script, a token a step, with the interface of `liquidfusion.Engine`."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import random
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from liquidfusion.exceptions import CacheError, ConfigError, QueueFull
from liquidfusion.run.sampling import Sampling

_SPECIAL = ["<pad>", "<end>", "<|im_start|>", "<|im_end|>"]
END = 3
# Qwen's form: tools in the system message, calls as JSON between tags.
TEMPLATE = """{%- if tools %}<|im_start|>system
Tools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}
Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({word: i for i, word in enumerate([*_SPECIAL, *letters])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", "<end>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def echo(prompt: str, sampling: Sampling, index: int) -> str:
    """What was said last, or letters drawn by the seed."""
    if sampling.temperature and sampling.seed is not None:
        return "".join(random.Random(f"{sampling.seed} {index}").choices("abcdefgh", k=12))
    said = prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
    return f"You said: {said}" if "<|im_start|>" in prompt else f" and {prompt[-8:]}"


@dataclass(frozen=True)
class Token:
    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class State:
    tokens: tuple[int, ...]
    nbytes: int = 1000

    def to_file(self, path: str) -> None:
        Path(path).write_text(json.dumps(self.tokens))


@dataclass
class Stats:
    rows: int
    active: int = 0
    waiting: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    evictions: int = 0
    nbytes: int = 0
    steps: int = 0


@dataclass(eq=False)
class Request:
    prompt: tuple[int, ...]
    sampling: Sampling
    answer: deque[int]
    keep: bool = False
    cached_tokens: int = 0
    finish_reason: str | None = None
    error: Exception | None = None
    state: State | None = None
    written: list[int] = field(default_factory=list)
    cancelled: bool = False
    _ready: queue.SimpleQueue[Token | None] = field(default_factory=queue.SimpleQueue)
    _listeners: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    def cancel(self) -> None:
        self.cancelled = True

    def tell(self, token: Token | None) -> None:
        self._ready.put(token)
        for loop, event in self._listeners:
            loop.call_soon_threadsafe(event.set)

    def end(self, reason: str) -> None:
        self.finish_reason = reason
        self.tell(None)

    def __iter__(self) -> Iterator[Token]:
        while (token := self._ready.get()) is not None:
            yield token

    async def __aiter__(self) -> AsyncIterator[Token]:
        event = asyncio.Event()
        self._listeners.append((asyncio.get_running_loop(), event))
        while True:
            event.clear()
            while not self._ready.empty():
                token = self._ready.get()
                if token is None:
                    return
                yield token
            await event.wait()


class FakeEngine:
    """See the module; `delay` seconds a step, `script` from the prompt's text, the sampling and the answer's index."""

    def __init__(
        self,
        *,
        rows: int = 8,
        queue_limit: int | None = None,
        delay: float = 0.0,
        positions: int | None = 4096,
        script: Callable[[str, Sampling, int], str] = echo,
    ) -> None:
        self.rows, self.positions, self.row_nbytes, self.vocabulary = rows, positions, 1000, 260
        self.healthy = True
        self._limit, self._delay, self._script = queue_limit, delay, script
        self._running: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._stats = Stats(rows, nbytes=rows * 1000)
        self._wake = threading.Condition()
        self._stopping = self._closed = False
        self.fail: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        n: int = 1,
        keep: bool = False,
        resume: State | None = None,
    ) -> list[Request]:
        if self._stopping:
            raise CacheError("the engine takes no more requests")
        if not prompt or n > self.rows or any(not 0 <= token < self.vocabulary for token in prompt):
            raise ConfigError(f"{len(prompt)} tokens, n={n}; token ids below {self.vocabulary}, n up to {self.rows}")
        if resume is not None and tuple(prompt[: len(resume.tokens)]) != resume.tokens:
            raise ConfigError("the state is of another prompt")
        text = tokenizer().decode(prompt)
        made = []
        for index in range(n):
            answer = deque([*tokenizer().encode(self._script(text, sampling, index)), END])
            made.append(Request(tuple(prompt), sampling, answer, keep, len(resume.tokens) if resume else 0))
        with self._wake:
            if self._limit is not None and len(self._waiting) >= self._limit:
                raise QueueFull(f"{len(self._waiting)} requests wait")
            self._waiting.extend(made)
            self._stats.prompt_tokens += len(prompt) - made[0].cached_tokens
            self._stats.cached_tokens += made[0].cached_tokens
            self._wake.notify()
        return made

    def load_state(self, path: str) -> State:
        try:
            return State(tuple(json.loads(Path(path).read_text())))
        except ValueError as error:
            raise CacheError(f"{path} is no row") from error

    def stats(self) -> Stats:
        with self._wake:
            self._stats.active, self._stats.waiting = len(self._running), len(self._waiting)
            return self._stats

    def drain(self, timeout: float | None = None) -> bool:
        self._stopping = True
        end = time.monotonic() + (1e9 if timeout is None else timeout)
        while (self._running or self._waiting) and time.monotonic() < end:
            time.sleep(0.005)
        return not (self._running or self._waiting)

    def close(self) -> None:
        with self._wake:
            self._stopping = self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            with self._wake:
                if not self._running and not self._waiting:
                    self._wake.wait(0.05)
                while self._waiting and len(self._running) < self.rows:
                    self._running.append(self._waiting.popleft())
                for request in [r for r in self._waiting if r.cancelled]:
                    self._waiting.remove(request)
                    request.end("cancelled")
            time.sleep(self._delay)
            for request in list(self._running):
                if reason := self._step(request):
                    self._running.remove(request)
                    request.end(reason)
            self._stats.steps += 1
        for request in [*self._running, *self._waiting]:
            request.end("cancelled")

    def _step(self, request: Request) -> str | None:
        if request.cancelled:
            return "cancelled"
        if self.fail is not None:
            request.error = self.fail
            return "error"
        token = request.answer.popleft() if request.answer else END
        request.written.append(token)
        self._stats.tokens += 1
        asked = request.sampling.logprobs
        top = tuple((token + i, -0.5 - i) for i in range(asked or 0))
        request.tell(Token(token, None if asked is None else -0.5, top))
        if token == END and not request.sampling.ignore_eos:
            return self._finish(request, "stop")
        if token in request.sampling.stop_token_ids:
            return self._finish(request, "stop")
        if any(stop in tokenizer().decode(request.written) for stop in request.sampling.stop):
            return self._finish(request, "stop")
        if len(request.written) >= request.sampling.max_tokens:
            return self._finish(request, "length")
        return None

    def _finish(self, request: Request, reason: str) -> str:
        if request.keep:
            request.state = State((*request.prompt, *request.written[:-1]))
        return reason


def service(engine: FakeEngine | None = None, **more: Any) -> Any:
    """A service over a fake engine, named ``fake``."""
    from liquidfusion.serving.service import Service

    return Service(engine or FakeEngine(), tokenizer(), name="fake", ends=frozenset({END}), **more)  # type: ignore[arg-type]


def main() -> None:
    """Serve on the port that the environment names, until stopped: what tests run as a process of its own."""
    from liquidfusion.serving.app import create_app
    from liquidfusion.serving.web import server

    made = service(FakeEngine(delay=float(os.environ.get("FAKE_DELAY", "0"))))
    server(create_app(made), host="127.0.0.1", port=int(os.environ["FAKE_PORT"]), drain=10, log_level="warning").run()


if __name__ == "__main__":
    main()
