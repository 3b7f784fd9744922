"""Runs the application on a socket, until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT = 10.0
"""Seconds in which a connection must bring the head of a request."""


class PunctualProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which by itself would hold a connection that says nothing, or half a head, for ever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for."""
        self._rest()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Wait for the rest of another request's head."""
        super().on_message_begin()
        self._wait()

    def on_headers_complete(self) -> None:
        """Nothing to wait for."""
        self._rest()
        super().on_headers_complete()

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_TIMEOUT, self.transport.close)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def server(app: Any, *, host: str, port: int, drain: float = 30.0, log_level: str = "info") -> uvicorn.Server:
    """A server that is ready to run.

    SIGTERM and SIGINT stop it: it takes no more connections, gives running and waiting requests `drain` seconds, and
    then the application's own stop is awaited. A second SIGINT stops it at once.

    Parameters
    ----------
    app : ASGI application
        From `create_app`.
    host, port : str, int
        Where to listen; port 0 takes a free one.
    drain : float
        Seconds for requests to end when the server is stopped.
    log_level : str
        uvicorn's.
    """
    with contextlib.suppress(ValueError, OSError):  # idle connections cost a descriptor each
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=PunctualProtocol,
        ws="none",
        lifespan="on",
        log_level=log_level,
        access_log=log_level in ("debug", "trace"),
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(drain)),
    )
    return uvicorn.Server(config)


def run(running: uvicorn.Server, ready: Callable[[str], None]) -> None:
    """Serve until stopped; an interrupt is a stop in good order, too.

    Parameters
    ----------
    running : uvicorn.Server
        From `server`.
    ready : callable
        Called with the base URL once requests are taken.

    Raises
    ------
    OSError
        The address cannot be listened on.
    """
    config = running.config
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((config.host, config.port))
    except OSError as error:
        listening.close()
        raise OSError(error.errno, error.strerror, f"{config.host}:{config.port}") from error
    host = f"[{config.host}]" if family == socket.AF_INET6 else config.host
    listening.listen(config.backlog)
    ready(f"http://{host}:{listening.getsockname()[1]}")
    with contextlib.suppress(KeyboardInterrupt):
        running.run(sockets=[listening])
