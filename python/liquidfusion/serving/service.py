"""From a request to an answer: prompt, kept row, engine, text. It knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from liquidfusion.exceptions import CacheError, ConfigError, QueueFull
from liquidfusion.serving import schema
from liquidfusion.serving.choice import Choice, Piece
from liquidfusion.serving.conversations import Conversations, digest, digests
from liquidfusion.serving.errors import ApiError
from liquidfusion.serving.events import ChatWriter, CompletionWriter, Writer, fold
from liquidfusion.serving.metrics import Metrics
from liquidfusion.serving.schema import ChatRequest, Common, CompletionRequest, refusal
from liquidfusion.serving.text import Text
from liquidfusion.serving.tools import Caller, form_of

if TYPE_CHECKING:
    from liquidfusion.hf.engine import Engine
    from liquidfusion.run.request import Request
    from liquidfusion.run.sampling import Sampling
    from liquidfusion.state.row import RowState

log = logging.getLogger(__name__)

MOST_ANSWERS = 128
"""Answers to one request: prompts times n."""

_GAUGES = {
    "rows": "Rows that the engine has.",
    "active": "Rows in use.",
    "waiting": "Requests that wait for a row.",
    "nbytes": "Bytes of all rows.",
}
_COUNTERS = {
    "tokens": "Tokens written.",
    "prompt_tokens": "Prompt tokens read.",
    "cached_tokens": "Prompt tokens that a kept row saved reading.",
    "evictions": "Tokens evicted.",
    "steps": "Steps of the engine.",
}


@dataclass(frozen=True)
class Facts:
    """What is served: the model's names, the first of them its own, and how many positions it knows."""

    names: tuple[str, ...]
    positions: int | None


class Backend(Protocol):
    """What the HTTP routes need: a service in this process, or replicas elsewhere."""

    metrics: Metrics

    async def facts(self) -> Facts:
        """What is served."""

    def stream(self, body: Common, scope: str) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in chunks; the last one has the usage. ApiError before the first one, or later."""

    async def whole(self, body: Common, scope: str) -> dict[str, Any]:
        """The answer in one document."""

    async def healthy(self) -> bool:
        """Whether requests can be answered."""

    async def page(self) -> bytes:
        """The text of ``/metrics``."""


@dataclass(frozen=True)
class _Prompt:
    """One text to answer: its tokens; its text where it is echoed; a conversation's digests and messages."""

    tokens: list[int]
    echoed: str = ""
    chain: Sequence[str] = ()


class Service:
    """Answers requests with an engine in this process.

    Parameters
    ----------
    engine : Engine
        Runs the model.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's.
    name : str
        The model's name in requests.
    aliases : tuple of str
        Other names for it.
    ends : frozenset of int
        The model's own end tokens.
    defaults : mapping of str to float
        Sampling parameters that a request does not name, as the model's maker set them; OpenAI's where absent.
    conversations : Conversations, optional
        Where finished rows are kept.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        *,
        name: str,
        aliases: tuple[str, ...] = (),
        ends: frozenset[int] = frozenset(),
        defaults: Mapping[str, float] | None = None,
        conversations: Conversations | None = None,
    ) -> None:
        self.name, self.aliases = name, aliases
        self.positions: int | None = engine.positions
        self._engine = engine
        self._text = Text(tokenizer)
        self._form = form_of(self._text.template)
        self._ends, self._defaults = ends, dict(defaults or {})
        self._conversations = Conversations(0) if conversations is None else conversations
        self.metrics = Metrics(self._gauges, self._counters)
        # Long texts take a while, and the loop serves others meanwhile; one thread each, as neither is made for more.
        self._reader = ThreadPoolExecutor(1, "tokenizer")
        self._keeper = ThreadPoolExecutor(1, "conversations")

    async def stream(self, body: Common, scope: str) -> AsyncGenerator[dict[str, Any], None]:
        """Answer in chunks.

        Parameters
        ----------
        body : ChatRequest or CompletionRequest
            What was asked for.
        scope : str
            Whose conversations may be continued.

        Yields
        ------
        dict
            Chunks in OpenAI's form; the last one has no choices but the usage.

        Raises
        ------
        ApiError
            Before the first chunk where the request is refused; later where the engine fails.
        """
        arrived = time.monotonic()
        schema.check(body)
        if body.model not in (self.name, *self.aliases):
            raise ApiError(
                404,
                f"The model {schema.shown(body.model)} does not exist; this server has {self.name!r}.",
                param="model",
                code="model_not_found",
            )
        prompts = await self._prompts(body, scope)
        writer, texts = self._writer(body), [prompt.tokens for prompt in prompts]
        requests: list[tuple[_Prompt, Request]] = []
        try:
            for prompt in prompts:
                requests += [(prompt, request) for request in await self._submit(body, prompt)]
            choices = [
                self._choice(index, body, prompt, request, arrived) for index, (prompt, request) in enumerate(requests)
            ]
            for choice, (prompt, _) in zip(choices, requests, strict=True):
                if (first := writer.first(choice.index, prompt.echoed)) is not None:
                    yield first
            async with contextlib.aclosing(merged(choices)) as pieces:
                async for choice, piece in pieces:
                    if piece.finish is not None:
                        self._keep(requests[choice.index][0], choice)
                    chunk = writer.piece(choice, piece)
                    if body.stream_options is not None and body.stream_options.continuous_usage_stats:
                        chunk |= writer.usage(choices, texts)
                    yield chunk
            yield writer.chunk([]) | writer.usage(choices, texts)
        finally:
            for _, request in requests:
                request.cancel()

    async def whole(self, body: Common, scope: str) -> dict[str, Any]:
        """Answer in one document; see `stream`."""
        async with contextlib.aclosing(self.stream(body, scope)) as chunks:
            return fold([chunk async for chunk in chunks])

    async def facts(self) -> Facts:
        """What is served."""
        return Facts((self.name, *self.aliases), self.positions)

    async def healthy(self) -> bool:
        """Whether the engine runs."""
        return bool(self._engine.healthy)

    async def page(self) -> bytes:
        """The text of ``/metrics``."""
        return self.metrics.page()

    def figures(self) -> dict[str, tuple[str, float]]:
        """Name → (help, value) of everything that the engine and the conversations tell."""
        return self._gauges() | self._counters()

    def summary(self) -> str:
        """Rows and bytes, for people."""
        stats = self._engine.stats()
        return f"{stats.rows} rows, {stats.nbytes / 1e6:,.0f} MB"

    def close(self) -> None:
        """Stop the engine, and the workers once what they were given is done."""
        self._engine.close()
        self._reader.shutdown()
        self._keeper.shutdown()
        self._conversations.close()

    async def _prompts(self, body: Common, scope: str) -> list[_Prompt]:
        loop = asyncio.get_running_loop()
        if isinstance(body, ChatRequest):
            prompts = [await loop.run_in_executor(self._reader, self._chat_prompt, body, scope)]
        else:
            assert isinstance(body, CompletionRequest)
            prompts = await loop.run_in_executor(self._reader, self._text_prompts, body)
        answers = len(prompts) * (body.n or 1)
        if answers > MOST_ANSWERS:
            raise refusal(
                "n",
                f"{len(prompts)} prompts and n={body.n or 1} make {answers} answers; up to {MOST_ANSWERS} are accepted",
            )
        for prompt in prompts:
            self._check_length(body, prompt.tokens)
        return prompts

    def _chat_prompt(self, body: ChatRequest, scope: str) -> _Prompt:
        tools = body.tools if body.tool_choice != "none" else None
        if tools and not self._text.shows_tools:
            raise refusal("tools", f"tools: the chat template of {self.name} does not show them to the model")
        messages = [plain(message, index) for index, message in enumerate(body.messages)]
        extra = body.chat_template_kwargs or {}
        try:
            text = self._text.render(_for_template(messages), tools, extra)
        except ConfigError as error:
            raise refusal("messages", str(error)) from error
        chain = digests(scope, [tools, extra], messages) if self._conversations.budget else ()
        return _Prompt(self._text.encode(text), chain=chain)

    def _text_prompts(self, body: CompletionRequest) -> list[_Prompt]:
        given: Any = body.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given:
            raise refusal("prompt", "prompt is empty; a text or token ids are accepted")
        prompts = []
        for one in given:
            ids = self._text.encode(one, special=True) if isinstance(one, str) else list(one)
            echoed = "" if not body.echo else one if isinstance(one, str) else self._text.decode(ids)
            prompts.append(_Prompt(ids, echoed))
        return prompts

    def _check_length(self, body: Common, tokens: list[int]) -> None:
        param = "messages" if isinstance(body, ChatRequest) else "prompt"
        if not tokens:
            raise refusal(param, f"{param} has no tokens; at least one is needed")
        if self.positions is None:
            return
        asked = limit(body) or 1
        if len(tokens) + asked > self.positions:
            raise refusal(
                param,
                f"This model's maximum context length is {self.positions} tokens; {len(tokens)} are in {param}"
                + (f" and {asked} were asked for." if limit(body) else "."),
                code="context_length_exceeded",
            )

    async def _submit(self, body: Common, prompt: _Prompt) -> list[Request]:
        resume: RowState | None = None
        if prompt.chain:
            loop, find = asyncio.get_running_loop(), self._conversations.find
            resume, outcome = await loop.run_in_executor(self._keeper, find, prompt.chain, prompt.tokens)
            if outcome is not None:
                self.metrics.conversations.labels(outcome).inc()
        n = body.n or 1
        try:
            found = self._engine.submit(
                prompt.tokens, self._sampling(body, prompt), n=n, keep=bool(prompt.chain) and n == 1, resume=resume
            )
        except QueueFull as error:
            wait = self.metrics.retry_after(self._engine.stats().waiting)
            raise ApiError(
                429, f"The server is busy: {error}", code="queue_full", headers={"Retry-After": str(wait)}
            ) from error
        except CacheError as error:
            raise ApiError(503, f"The server is stopping: {error}", headers={"Retry-After": "5"}) from error
        except ConfigError as error:
            raise refusal("", str(error)) from error
        return list(found) if isinstance(found, Sequence) else [found]

    def _sampling(self, body: Common, prompt: _Prompt) -> Sampling:
        from liquidfusion.run.sampling import Sampling

        def value(name: str, otherwise: float) -> float:
            asked = getattr(body, name)
            return self._defaults.get(name, otherwise) if asked is None else asked

        room = None if self.positions is None else self.positions - len(prompt.tokens)
        return Sampling(
            max_tokens=limit(body) or (16 if isinstance(body, CompletionRequest) else room or 2**31 - 1),
            temperature=value("temperature", 1.0),
            top_k=max(0, int(value("top_k", 0))),
            top_p=value("top_p", 1.0),
            min_p=value("min_p", 0.0),
            repetition_penalty=value("repetition_penalty", 1.0),
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            seed=body.seed,
            logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
            stop_token_ids=tuple(body.stop_token_ids or ()),
            stop=tuple(body.stop or ()),
            logprobs=alternatives(body),
            ignore_eos=bool(body.ignore_eos),
        )

    def _choice(self, index: int, body: Common, prompt: _Prompt, request: Request, arrived: float) -> Choice:
        caller, raw = None, False
        if isinstance(body, ChatRequest) and body.tools and body.tool_choice != "none":
            raw = True  # calls are often written with special tokens
            if self._form is not None:
                caller = Caller(self._form, several=body.parallel_tool_calls is not False)
        return Choice(
            index=index,
            request=request,
            text=self._text,
            prompt=prompt.tokens,
            ends=(frozenset() if body.ignore_eos else self._ends) | frozenset(body.stop_token_ids or ()),
            stop=body.stop or (),
            caller=caller,
            raw=raw,
            metrics=self.metrics,
            arrived=arrived,
        )

    def _keep(self, prompt: _Prompt, choice: Choice) -> None:
        """Keep the row of a finished answer; the next turn's search runs in the same thread, so after it."""
        state = getattr(choice.request, "state", None)
        if not prompt.chain or state is None:
            return
        chain = [*prompt.chain, digest(prompt.chain[-1], choice.message)]

        def keep() -> None:
            try:
                self._conversations.keep(chain, state)
            except Exception:
                log.exception("a conversation was not kept")

        self._keeper.submit(keep)

    def _writer(self, body: Common) -> Writer:
        kind = ChatWriter if isinstance(body, ChatRequest) else CompletionWriter
        return kind(body.model, self._text, alternatives(body))

    def _gauges(self) -> dict[str, tuple[str, float]]:
        stats = self._engine.stats()
        figures = {name: (text, float(getattr(stats, name))) for name, text in _GAUGES.items()}
        figures["conversations_kept"] = "Conversations kept.", len(self._conversations)
        figures["conversations_nbytes"] = "Bytes of kept conversations.", self._conversations.nbytes
        return figures

    def _counters(self) -> dict[str, tuple[str, float]]:
        stats = self._engine.stats()
        return {name: (text, float(getattr(stats, name))) for name, text in _COUNTERS.items()}


def limit(body: Common) -> int | None:
    """Tokens that a request asks for at most."""
    return (getattr(body, "max_completion_tokens", None) or body.max_tokens) if body else None


def alternatives(body: Common) -> int | None:
    """How many alternatives are told with each token; None: no log-probabilities."""
    if isinstance(body, ChatRequest):
        return (body.top_logprobs or 0) if body.logprobs else None
    return body.logprobs if isinstance(body, CompletionRequest) else None


_LEFT_OUT: tuple[Any, ...] = (None, [], {})


def plain(message: schema.Message, index: int) -> dict[str, Any]:
    """A message as digests and templates take it: text content, nothing that says nothing.

    Raises
    ------
    ApiError
        400 for a field that is not understood and not empty.
    """
    for name, value in (message.model_extra or {}).items():
        if value not in _LEFT_OUT:
            raise refusal(
                f"messages[{index}].{name}", f"messages[{index}].{name}={schema.shown(value)} is not understood"
            )
    result: dict[str, Any] = {"role": message.role}
    content = schema.texts(message, index)
    if content is None and not message.tool_calls:
        raise refusal(f"messages[{index}].content", f"messages[{index}] has no content")
    if content or not message.tool_calls:
        result["content"] = content
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            result[name] = getattr(message, name)
    if message.tool_calls:
        result["tool_calls"] = message.tool_calls
    return result


def _for_template(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as chat templates want them: arguments as objects, a content always, no role that they do not know."""
    result = []
    for message in messages:
        copy = {"content": "", **message}
        if copy["role"] == "developer":
            copy["role"] = "system"
        calls = []
        for call in message.get("tool_calls", ()):
            function = dict(call.get("function") or {})
            with contextlib.suppress(TypeError, ValueError):
                function["arguments"] = json.loads(function.get("arguments", "{}"))
            calls.append({**call, "function": function})
        if calls:
            copy["tool_calls"] = calls
        result.append(copy)
    return result


async def merged(choices: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, Piece], None]:
    """The pieces of several answers as they come."""
    if len(choices) == 1:
        async with contextlib.aclosing(choices[0].pieces()) as pieces:
            async for piece in pieces:
                yield choices[0], piece
        return
    queue: asyncio.Queue[tuple[Choice, Piece] | asyncio.Task[None]] = asyncio.Queue()

    async def pump(choice: Choice) -> None:
        async for piece in choice.pieces():
            queue.put_nowait((choice, piece))

    tasks = [asyncio.ensure_future(pump(choice)) for choice in choices]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, asyncio.Task):
                left -= 1
                item.result()
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
