"""The HTTP routes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from liquidfusion.serving import schema
from liquidfusion.serving.errors import ApiError
from liquidfusion.serving.events import DONE, line
from liquidfusion.serving.guard import SCOPE, Guard, respond, response
from liquidfusion.serving.metrics import CONTENT_TYPE
from liquidfusion.serving.schema import ChatRequest, Common, CompletionRequest
from liquidfusion.serving.service import Backend, Facts

log = logging.getLogger(__name__)

MOST_BYTES = 8 * 2**20
"""Bytes of a body, unless told otherwise: more than a million tokens of text."""
TIMEOUT = 600.0
"""Seconds that a request may take, its wait included, unless told otherwise: what OpenAI's clients wait for."""
BODY_TIMEOUT = 30.0
"""Seconds in which a request's body must arrive."""
_FAREWELL = 5.0
"""Seconds in which a client that is slow to read can still take in an error."""


def create_app(
    backend: Backend,
    *,
    keys: Sequence[str] = (),
    most_bytes: int = MOST_BYTES,
    timeout: float = TIMEOUT,
    body_timeout: float = BODY_TIMEOUT,
    stop: Callable[[], Awaitable[None]] | None = None,
) -> FastAPI:
    """Make the ASGI application.

    Parameters
    ----------
    backend : Backend
        Answers.
    keys : sequence of str
        Accepted API keys; none: everybody is served.
    most_bytes : int
        Bytes of a request's body.
    timeout, body_timeout : float
        Seconds for a whole request, and for its body to arrive.
    stop : callable, optional
        Awaited when the server stops, after the last answer.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if stop is not None:
            await stop()

    app = FastAPI(title="LiquidFusion", docs_url="/docs", redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, keys=keys, most=most_bytes, patience=body_timeout, metrics=backend.metrics)
    _handle_errors(app)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Response:
        return Answer(backend, body, request.scope[SCOPE], timeout)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return Answer(backend, body, request.scope[SCOPE], timeout)

    created = int(time.time())

    def card(name: str, facts: Facts) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "liquidfusion",
            "max_model_len": facts.positions,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        facts = await backend.facts()
        return {"object": "list", "data": [card(name, facts) for name in facts.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        facts = await backend.facts()
        if name not in facts.names:
            raise ApiError(404, f"The model {name!r} does not exist.", param="model", code="model_not_found")
        return card(name, facts)

    @app.get("/health", response_model=None)
    async def health() -> Response:
        healthy = await backend.healthy()
        status = "ok" if healthy else "the engine has stopped"
        return Response(json.dumps({"status": status}), 200 if healthy else 503, media_type="application/json")

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(await backend.page(), headers={"Content-Type": CONTENT_TYPE})

    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return response(schema.invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        said = f"{request.method} {request.url.path}: {error.detail}."
        return response(ApiError(error.status_code, said, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        return response(ApiError(500, "The server failed; its log says how."))


class Answer(Response):
    """An answer that is worked out while it is sent, and given up when the client leaves.

    Parameters
    ----------
    backend : Backend
        Answers.
    body : Common
        What was asked for.
    who : str
        Whose conversations may be continued.
    timeout : float
        Seconds for all of it.
    """

    def __init__(self, backend: Backend, body: Common, who: str, timeout: float) -> None:
        super().__init__()
        self._backend, self._body, self._who, self._timeout = backend, body, who, timeout
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""

        async def work() -> None:
            try:
                async with asyncio.timeout(self._timeout):
                    if self._body.stream:
                        await self._stream(send)
                    else:
                        whole = await self._backend.whole(self._body, self._who)
                        text = json.dumps(whole, ensure_ascii=False, separators=(",", ":"))
                        await Response(text, media_type="application/json")(scope, receive, send)
            except TimeoutError:
                error = ApiError(504, f"The answer took more than {self._timeout:g} s.", code="timeout")
                await self._fail(error, scope, receive, send)
            except ApiError as error:
                await self._fail(error, scope, receive, send)
            except Exception:
                log.exception("a request failed")
                await self._fail(ApiError(500, "The server failed; its log says how."), scope, receive, send)

        await until_gone(receive, work())

    async def _stream(self, send: Send) -> None:
        options = self._body.stream_options
        wants_usage = bool(options and options.include_usage)
        async with contextlib.aclosing(self._backend.stream(self._body, self._who)) as chunks:
            async for chunk in chunks:
                if not chunk["choices"] and not wants_usage:
                    continue
                if wants_usage:
                    chunk.setdefault("usage", None)
                await self._send(send, line(chunk))
        await self._send(send, DONE, more=False)

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM})
        await send({"type": "http.response.body", "body": data, "more_body": more})

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL):
                if self._started:
                    await self._send(send, line(error.body), more=False)
                else:
                    await respond(error, scope, receive, send)


_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def until_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, or cancel it when the client leaves."""

    async def leaving() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leaving())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
