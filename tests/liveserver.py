"""A server in a thread of this process, on a free port of 127.0.0.1."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def live(service: Any, **options: Any) -> Iterator[str]:
    """Serve; the base URL, without ``/v1``."""
    pytest.importorskip("uvicorn")
    pytest.importorskip("httptools")
    from liquidfusion.serving.app import create_app
    from liquidfusion.serving.web import server

    running = server(create_app(service, **options), host="127.0.0.1", port=0, drain=2, log_level="warning")
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not running.started:
        assert thread.is_alive()
        assert time.monotonic() < end
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        running.should_exit = True
        thread.join(20)
        service.close()
        assert not thread.is_alive()
