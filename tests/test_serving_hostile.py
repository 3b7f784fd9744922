"""Clients that vanish, shout, mumble or say nothing: others do not notice, and nothing is left of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fakeengine import FakeEngine, service
from liveserver import live

pytest.importorskip("prometheus_client")

JSON = "Content-Type: application/json"
CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}


def post(url: str, body: Any = CHAT, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
    """Status and document."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", path, data, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def get(url: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def raw(url: str, body: Any, *, whole: bool = True) -> socket.socket:
    """A connection that has sent a request (or its head only) and read nothing."""
    host, _, port = url.removeprefix("http://").partition(":")
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n{JSON}\r\n\r\n"
    made = socket.create_connection((host, int(port)), timeout=20)
    made.sendall(head.encode() + (data if whole else b""))
    return made


def soon(what: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(rows=2, delay=0.005)


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with live(service(engine), body_timeout=2.0, most_bytes=2**20) as url:
        yield url


def fine(url: str) -> None:
    status, answer = post(url)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "You said: hello")


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_row_and_the_place_in_the_queue(engine: FakeEngine, url: str, stream: bool) -> None:
    long = CHAT | {"stream": stream, "ignore_eos": True, "max_tokens": 4000}
    left = [raw(url, long) for _ in range(4)]
    soon(lambda: engine.stats().active == 2 and engine.stats().waiting == 2)
    for connection in left:
        connection.close()
    soon(lambda: engine.stats().active == 0 and engine.stats().waiting == 0)
    fine(url)


def test_who_does_not_read_stops_nobody(engine: FakeEngine, url: str) -> None:
    lazy = raw(
        url, CHAT | {"stream": True, "ignore_eos": True, "max_tokens": 4000, "logprobs": True, "top_logprobs": 20}
    )
    soon(lambda: engine.stats().active == 1)
    for _ in range(3):
        fine(url)
    lazy.close()
    soon(lambda: engine.stats().active == 0)


def test_ten_megabytes(url: str) -> None:
    big = CHAT | {"messages": [{"role": "user", "content": "x" * 10_000_000}]}
    status, answer = post(url, big)
    assert status == 413
    assert "1048576 bytes" in answer["error"]["message"]
    fine(url)


def test_more_than_anybody_reads(url: str) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as made:
        made.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        made.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 1000:
                made.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                sent += 1
        assert sent < 1000
    fine(url)


@pytest.mark.parametrize(
    ("data", "status"),
    [(b"", 400), (b"{", 400), (b"[]", 400), (b'"x"', 400), (b"\xff\xfe", 400), (b"[" * 100_000, 400), (b"null", 400)],
)
def test_bodies_that_are_no_request(url: str, data: bytes, status: int) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        found, answer = post(url, data, path)
        assert found == status
        assert answer["error"]["type"] == "invalid_request_error"
    fine(url)


def test_other_types_and_paths(url: str) -> None:
    status, answer = post(url, CHAT, **{"Content-Type": "text/plain"})
    assert (status, answer["error"]["type"]) == (415, "invalid_request_error")
    status, answer = post(url, CHAT, "/v1/embeddings")
    assert status == 404
    assert "/v1/embeddings" in answer["error"]["message"]
    assert get(url, "/v1/chat/completions")[0] == 405
    fine(url)


def test_rubbish_instead_of_http(url: str) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    for data in (os.urandom(4096), b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9\r\n\r\n", b"\r\n" * 100):
        with socket.create_connection((host, int(port)), timeout=20) as made:
            made.sendall(data)
            made.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                assert not made.recv(65536).startswith(b"HTTP/1.1 200")
    fine(url)


def test_a_body_that_does_not_come(url: str) -> None:
    with raw(url, CHAT, whole=False) as made:
        assert made.recv(65536).startswith(b"HTTP/1.1 408")
        soon(lambda: made.recv(65536) == b"")
    fine(url)


def test_500_connections_that_never_speak(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from liquidfusion.serving import web

    monkeypatch.setattr(web, "HEAD_TIMEOUT", 4.0)
    host, _, port = url.removeprefix("http://").partition(":")
    fine(url)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection((host, int(port)), timeout=20)) for _ in range(500)]
        silent[0].sendall(b"POST /v1/completions HTTP/1.1\r\nHost:")
        began = time.monotonic()
        for _ in range(5):
            fine(url)
        assert time.monotonic() - began < 15
        for connection in silent:
            assert connection.recv(1) == b""
    fine(url)


def test_an_answer_that_takes_too_long() -> None:
    engine = FakeEngine(delay=0.01)
    with live(service(engine), timeout=0.3) as url:
        long = CHAT | {"ignore_eos": True, "max_tokens": 4000}
        status, answer = post(url, long)
        assert (status, answer["error"]["code"]) == (504, "timeout")
        with raw(url, long | {"stream": True}) as made:
            data = b""
            while b"[DONE]" not in data and (part := made.recv(65536)):
                data += part
                if b'"code":"timeout"' in data:
                    break
        assert b'"code":"timeout"' in data
        assert b"[DONE]" not in data
        soon(lambda: engine.stats().active == 0)


def test_health_and_metrics(engine: FakeEngine, url: str) -> None:
    fine(url)
    post(url, b"{")
    assert json.loads(get(url, "/health")[1]) == {"status": "ok"}
    status, page = get(url, "/metrics")
    assert status == 200
    for line in (
        'liquidfusion_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0',
        'liquidfusion_requests_total{endpoint="/v1/chat/completions",status="400"} 1.0',
        "liquidfusion_rows 2.0",
        "liquidfusion_waiting 0.0",
        "liquidfusion_tokens_total 16.0",
        "liquidfusion_time_to_first_token_seconds_count 1.0",
        "liquidfusion_time_per_token_seconds_count 15.0",
        "liquidfusion_evictions_total 0.0",
        "liquidfusion_nbytes 2000.0",
    ):
        assert line in page
    engine.healthy = False
    assert get(url, "/health")[0] == 503


def test_sigterm_lets_answers_end(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    here = Path(__file__).parent
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(here / "fakeengine.py")],
            env=os.environ | {"FAKE_PORT": str(port), "FAKE_DELAY": "0.05"},
            stderr=log,
            stdout=log,
        )
    try:
        url = f"http://127.0.0.1:{port}"

        def up() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                return get(url, "/health")[0] == 200
            except OSError:
                return False

        soon(up, 60)
        with raw(url, CHAT | {"stream": True}) as made:
            data = made.recv(100)
            process.send_signal(signal.SIGTERM)
            while part := made.recv(65536):
                data += part
        assert b"[DONE]" in data
        assert b'"finish_reason":"stop"' in data
        assert process.wait(10) == -signal.SIGTERM  # uvicorn raises it again once it is done
        with pytest.raises(ConnectionError):
            get(url, "/health")
    finally:
        process.kill()
        process.wait()
