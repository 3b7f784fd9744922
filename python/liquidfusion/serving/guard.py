"""What stands before the routes: the API key, the size of a body and the time that it may take to arrive."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from liquidfusion.serving.errors import ApiError
from liquidfusion.serving.metrics import Metrics

SCOPE = "liquidfusion.scope"
"""Key of the ASGI scope under which the routes find whose request it is."""

_ENDPOINTS = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"}
_DISCARD = 16
"""A body that is too large is read to its end, up to so many times the limit: a client that is still sending when the
connection closes never sees the answer."""


class Guard:
    """ASGI middleware.

    Parameters
    ----------
    app : ASGI application
        Gets requests whose body is in memory.
    keys : sequence of str
        Accepted API keys; none: everybody is served.
    most : int
        Bytes of a body.
    patience : float
        Seconds in which a body must arrive.
    metrics : Metrics
        Where answers are counted.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], most: int, patience: float, metrics: Metrics) -> None:
        self._app, self._most, self._patience, self._metrics = app, most, patience, metrics
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        endpoint = path if path in _ENDPOINTS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(endpoint, str(message["status"])).inc()
            await send(message)

        try:
            headers = dict(scope["headers"])
            scope[SCOPE] = self._identify(headers) if path.startswith("/v1/") else ""
            if scope["method"] == "POST":
                receive = replay(await self._body(headers, receive), receive)
        except ApiError as error:
            await respond(error, scope, receive, counted)
            return
        await self._app(scope, receive, counted)

    def _identify(self, headers: dict[bytes, bytes]) -> str:
        """A name for who asks, which does not tell the key."""
        if not self._keys:
            return ""
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # All are compared, so that the time taken tells nothing.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(
                401,
                "Incorrect API key provided."
                if key
                else "No API key provided; send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return hashlib.sha256(key.strip()).hexdigest()

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        # Also what keeps a web page from sending requests without asking: browsers send only other types unasked.
        if kind != b"application/json":
            raise ApiError(415, f"content-type {kind.decode('latin1')!r}; 'application/json' is accepted")
        body, size, more = bytearray(), 0, True
        try:
            async with asyncio.timeout(self._patience):
                while more and size <= _DISCARD * self._most:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "The client left.")
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    if size <= self._most:
                        body += part
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive in {self._patience:g} s.", headers=_CLOSE) from None
        if size > self._most:
            raise ApiError(413, f"The body has more than {self._most} bytes, which is the limit.", headers=_CLOSE)
        return bytes(body)


_CLOSE = {"Connection": "close"}


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a whole body, then what comes after it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def respond(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error."""
    await response(error)(scope, receive, send)


def response(error: ApiError) -> JSONResponse:
    """The answer that an error makes."""
    headers: dict[str, Any] = dict(error.headers)
    if error.status in (401, 413, 415, 504):
        headers["X-Should-Retry"] = "false"  # OpenAI's clients ask for it
    return JSONResponse(error.body, error.status, headers)
