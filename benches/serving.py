"""A server under twice the load that it can bear, and what the next turn of a long conversation costs.

    python benches/serving.py overload --requests 1000
    python benches/serving.py turn --tokens 4096
    python benches/serving.py overload --model DIR --serve "--budget 2048 --bits 4 --rows 64"

`overload` measures the rate that the server sustains, then sends requests at twice that rate. Good is: every request is
answered or refused with a 429, memory stays flat, and nobody waits longer than a full queue takes. `turn` compares the
time to the first token of a kept conversation's next turn with that of the same messages read again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil

from liquidfusion.bench.jobs.loading import Lengths, Target, arrivals, metrics, run, text


@contextmanager
def serving(options: argparse.Namespace) -> Iterator[tuple[str, str, psutil.Process]]:
    """A server as a process: its URL, its model's name and the process."""
    command = [sys.executable, "-m", "liquidfusion.serving.cli", "serve", options.model, "--port", "0"]
    process = subprocess.Popen([*command, *shlex.split(options.serve)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            print(line, end="", file=sys.stderr)
            if found := re.match(r"(\S+) at (http\S+)", line):
                yield found[2], found[1], psutil.Process(process.pid)
                break
        else:
            sys.exit("the server did not start")
        process.send_signal(signal.SIGTERM)
        if process.wait(120):
            sys.exit(f"the server ended with {process.returncode}")
    finally:
        process.kill()


def figures(url: str) -> dict[str, float]:
    """The server's own figures."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as page:
        lines = page.read().decode().splitlines()
    return {name: float(value) for line in lines if line[0] != "#" for name, value in [line.rsplit(" ", 1)]}


def overload(options: argparse.Namespace) -> dict[str, Any]:
    lengths = Lengths(options.prompt_tokens), Lengths(options.max_tokens)
    with serving(options) as (url, model, process):
        target = Target(url=url, model=model, timeout=3600, extra={"temperature": 0})
        rows = int(figures(url)["liquidfusion_rows"])
        limit = options.queue_limit if options.queue_limit is not None else 4 * rows
        calm = arrivals(max(2 * rows, options.requests // 10), *lengths, rate=None, seed=1)
        records, seconds = asyncio.run(run(target, calm, concurrency=rows))
        assert all(record.error is None for record in records), next(r.error for r in records if r.error)
        rate = len(records) / seconds
        memory: list[int] = []
        over = threading.Event()

        def watch() -> None:
            while not over.wait(1):
                memory.append(process.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        plan = arrivals(options.requests, *lengths, rate=2 * rate, seed=2)
        records, seconds = asyncio.run(run(target, plan))
        over.set()
        watcher.join()
        after = figures(url)
    found = {name: metric.value for name, metric in metrics(records, seconds).items()}
    wait = float(np.percentile([record.first for record in records if record.first is not None], 99))
    answered = found["answered"] / seconds
    half = memory[len(memory) // 4 :] or memory  # the first quarter fills caches and rows
    return {
        "sustained_requests_per_second": rate,
        "sent_requests_per_second": 2 * rate,
        "answered": found["answered"],
        "refused": found["refused"],
        "lost": found["failed"],
        "rows_in_use_after": after["liquidfusion_active"],
        "memory_low_mb": min(half) / 1e6,
        "memory_high_mb": max(half) / 1e6,
        "memory_spread": max(half) / min(half) - 1,
        "wait_p99_s": wait,
        "queue_over_rate_s": limit / answered,
        "wait_over_bound": wait / (limit / answered),
        "time_between_tokens_p50_ms": found["between_tokens_p50"],
    }


def turn(options: argparse.Namespace) -> dict[str, Any]:
    def first(url: str, model: str, messages: list[dict[str, str]]) -> tuple[float, str, int]:
        body = {"model": model, "messages": messages, "max_tokens": 16, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        data = json.dumps(body).encode()
        request = urllib.request.Request(url + "/chat/completions", data, {"Content-Type": "application/json"})
        start, told, answer, cached = time.perf_counter(), None, "", 0
        with urllib.request.urlopen(request) as lines:
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    sys.exit(f"the server answered: {event['error']['message']}")
                if event.get("usage"):
                    cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]
                for choice in event["choices"]:
                    if choice["delta"].get("content"):
                        told = told or time.perf_counter() - start
                        answer += choice["delta"]["content"]
        assert told is not None
        return told, answer, cached

    kept, again = [], []
    with serving(options) as (url, model, _):
        for number in range(options.repeats):
            messages = [{"role": "user", "content": text(options.tokens, number, 0)}]
            _, answer, _ = first(url, model, messages)
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": text(40, number, 1)}]
            seconds, _, cached = first(url, model, messages)
            if cached:
                kept.append(seconds)
            # Another first word: the same length, and nothing of it is kept.
            messages[0]["content"] = "other " + messages[0]["content"].partition(" ")[2]
            again.append(first(url, model, messages)[0])
    return {
        "tokens": options.tokens,
        "continued": f"{len(kept)} of {options.repeats}",
        "next_turn_s": float(np.median(kept)) if kept else None,
        "read_again_s": float(np.median(again)),
        "ratio": float(np.median(kept) / np.median(again)) if kept else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overload", "turn"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--serve", default="--budget 512", help="more options of `liquidfusion serve`")
    parser.add_argument("--queue-limit", type=int, help="as given in --serve, if it is")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--prompt-tokens", default="16-64")
    parser.add_argument("--max-tokens", default="8-24")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(json.dumps({"overload": overload, "turn": turn}[options.what](options), indent=2))


if __name__ == "__main__":
    main()
