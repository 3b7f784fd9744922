"""``load``: many requests to an OpenAI-compatible server, and what their senders see.

Every request has a moment at which it is due. Times count from that moment and not from when the client got round to
sending: a server that stalls cannot hide it by keeping the client from asking.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from liquidfusion.bench import machine, results
from liquidfusion.bench.stats import Metric
from liquidfusion.exceptions import ConfigError

_WORDS = re.findall(
    r"\w+",
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water "
    "room mother area money story fact month lot right study book eye job word business issue side kind head "
    "house service friend",
)
"""Words that are one token each, with the space before them, for the usual tokenizers."""

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens: ``512``, evenly between two ``64-512``, or log-normal ``lognormal:MEDIAN,SIGMA``.

    Raises
    ------
    ConfigError
        The text says none of these.
    """

    text: str

    def __post_init__(self) -> None:
        self.draw(random.Random(0))

    def draw(self, source: random.Random) -> int:
        """One number, at least 1."""
        if match := re.fullmatch(r"(\d+)(?:-(\d+))?", self.text):
            least, most = int(match[1]), int(match[2] or match[1])
            if 1 <= least <= most:
                return source.randint(least, most)
        elif match := re.fullmatch(r"lognormal:(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)", self.text):
            return max(1, round(float(match[1]) * source.lognormvariate(0, float(match[2]))))
        raise ConfigError(f"length {self.text!r}; 512, 64-512 or lognormal:512,0.5 is accepted")


@dataclass(frozen=True)
class Due:
    """A request: seconds from the start at which it is due, tokens of its prompt (about), and of its answer."""

    at: float
    prompt: int
    answer: int


@dataclass(frozen=True, kw_only=True)
class Target:
    """Who is asked, and how.

    Parameters
    ----------
    url : str
        Base URL with ``/v1``.
    model : str
        The model's name there.
    key : str, optional
        API key.
    chat : bool
        Whether to use ``/chat/completions`` and not ``/completions``.
    ignore_eos : bool
        Ask for answers of full length: a server that does not know the field may refuse it.
    timeout : float
        Seconds for a request.
    extra : dict
        More fields of the body.
    """

    url: str
    model: str
    key: str | None = None
    chat: bool = True
    ignore_eos: bool = True
    timeout: float = 600.0
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise ConfigError(f"url {self.url!r}; http://HOST:PORT/v1 is accepted")


@dataclass
class Record:
    """What a request's sender saw; times in seconds since it was due."""

    at: float
    sent: float = 0.0
    status: int = 0
    error: str | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    first: float | None = None
    last: float | None = None
    gaps: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The fields as they are stored; of the gaps their mean."""
        kept = {name: value for name, value in vars(self).items() if name != "gaps"}
        return kept | {"between_tokens": float(np.mean(self.gaps)) if self.gaps else None}


def arrivals(
    requests: int, prompt: Lengths, answer: Lengths, *, rate: float | None, even: bool = False, seed: int = 0
) -> list[Due]:
    """Requests at random (Poisson) or even distances, `rate` a second; without a rate all are due at once."""
    source, at, made = random.Random(seed), 0.0, []
    for _ in range(requests):
        made.append(Due(at, prompt.draw(source), answer.draw(source)))
        if rate is not None:
            at += 1 / rate if even else source.expovariate(rate)
    return made


def trace(path: Path) -> list[Due]:
    """Requests of a file with a JSON object a line: ``timestamp`` in ms, ``input_length`` and ``output_length``.

    Raises
    ------
    ConfigError
        A line is not like that.
    """
    made = []
    for number, line in enumerate(path.read_text("utf8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            made.append(Due(found["timestamp"] / 1000, max(1, found["input_length"]), max(1, found["output_length"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}:{number} is no request; timestamp (ms), input_length and output_length are needed"
            ) from error
    if not made:
        raise ConfigError(f"{path} has no requests")
    start = min(due.at for due in made)
    return sorted((Due(due.at - start, due.prompt, due.answer) for due in made), key=lambda due: due.at)


async def run(
    target: Target,
    plan: Sequence[Due],
    *,
    concurrency: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Record], float]:
    """Send every request and wait for the last answer.

    Parameters
    ----------
    target : Target
        Who is asked.
    plan : sequence of Due
        What, and when.
    concurrency : int, optional
        Closed loop: so many at once, each due when one before it has ended. None: open loop, each at its own moment.
    seed : int
        Of the words of the prompts; two requests never begin alike.
    progress : callable, optional
        Called with requests done and in all.

    Returns
    -------
    list of Record
        In the plan's order.
    float
        Seconds from the start to the last answer.
    """
    start = time.perf_counter()
    gate = asyncio.Semaphore(concurrency) if concurrency else contextlib.nullcontext()
    done = 0

    async def one(number: int, due: Due) -> Record:
        nonlocal done
        if not concurrency:
            await asyncio.sleep(max(0.0, start + due.at - time.perf_counter()))
        async with gate:
            at = time.perf_counter() if concurrency else start + due.at
            record = Record(at - start)
            try:
                async with asyncio.timeout(target.timeout):
                    await _ask(target, text(due.prompt, seed, number), due.answer, record, at)
            except (OSError, ValueError, EOFError, TimeoutError) as error:
                record.error = f"{type(error).__name__}: {error}".rstrip(": ")
        done += 1
        if progress is not None:
            progress(done, len(plan))
        return record

    records = await asyncio.gather(*(one(number, due) for number, due in enumerate(plan)))
    return records, time.perf_counter() - start


def text(tokens: int, seed: int, number: int) -> str:
    """About so many tokens of text, the same for the same arguments."""
    source = random.Random(f"{seed} {number}")
    return " ".join(source.choice(_WORDS) for _ in range(tokens))


async def _ask(target: Target, prompt: str, tokens: int, record: Record, at: float) -> None:
    body: dict[str, Any] = {"model": target.model, "max_tokens": tokens, "stream": True}
    body["stream_options"] = {"include_usage": True}
    if target.ignore_eos:
        body["ignore_eos"] = True
    if target.chat:
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    before = None
    async with contextlib.aclosing(_events(target, body | target.extra, record, at)) as events:
        async for event in events:
            now = time.perf_counter() - at
            if event.get("error"):
                record.error = str(event["error"].get("message"))
            if event.get("usage"):
                record.prompt_tokens = event["usage"]["prompt_tokens"]
                record.tokens = event["usage"]["completion_tokens"]
            if any(_says(choice) for choice in event.get("choices", ())):
                if before is None:
                    record.first = now
                else:
                    record.gaps.append(now - before)
                before = record.last = now


def _says(choice: dict[str, Any]) -> bool:
    return bool(choice.get("text") or choice.get("delta", {}).get("content"))


async def _events(target: Target, body: dict[str, Any], record: Record, at: float) -> Any:
    """Server-sent events of one request. Plain HTTP/1.1: the client shall take little of the machine."""
    parts = urlsplit(target.url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=secure or None, limit=2**20)
    try:
        data = json.dumps(body).encode()
        path = parts.path.rstrip("/") + ("/chat/completions" if target.chat else "/completions")
        head = [f"POST {path} HTTP/1.1", f"Host: {parts.netloc}", "Content-Type: application/json"]
        head += [f"Content-Length: {len(data)}", "Connection: close", "Accept: text/event-stream"]
        head += [f"Authorization: Bearer {target.key}"] if target.key else []
        writer.write("\r\n".join([*head, "", ""]).encode() + data)
        await writer.drain()
        record.sent = time.perf_counter() - at
        record.status = int((await reader.readline()).split()[1])
        chunked = False
        while (line := (await reader.readline()).strip().lower()) != b"":
            chunked |= line.startswith(b"transfer-encoding:") and b"chunked" in line
        lines = _unchunked(reader) if chunked else _plain(reader)
        if record.status != 200:
            record.error = b"".join([line async for line in lines]).decode("utf8", "replace")[:500]
            return
        async for line in lines:
            if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                yield json.loads(line[5:])
    finally:
        writer.close()


async def _plain(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while line := await reader.readline():
        yield line


async def _unchunked(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    held = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        *lines, held = (held + await reader.readexactly(size)).split(b"\n")
        await reader.readexactly(2)
        for line in lines:
            yield line
    if held:
        yield held


def metrics(records: Sequence[Record], seconds: float) -> dict[str, Metric]:
    """Figures over all requests.

    Parameters
    ----------
    records : sequence of Record
        From `run`.
    seconds : float
        From the first request to the last answer.

    Returns
    -------
    dict
        How many were answered, refused (429) and failed, tokens and requests a second, and of the time to the first
        token, between tokens, and to the last token the percentiles of `PERCENTILES`.
    """
    good = [record for record in records if record.status == 200 and record.error is None]
    refused = sum(record.status == 429 for record in records)
    found = {
        "requests": Metric(len(records)),
        "answered": Metric(len(good)),
        "refused": Metric(refused),
        "failed": Metric(len(records) - len(good) - refused),
        "requests_per_second": Metric(len(good) / seconds, "1/s"),
        "tokens_per_second": Metric(sum(record.tokens for record in good) / seconds, "tokens/s"),
        "prompt_tokens_per_second": Metric(sum(record.prompt_tokens for record in good) / seconds, "tokens/s"),
    }
    series = {
        "time_to_first_token": [record.first for record in good if record.first is not None],
        "between_tokens": [gap for record in good for gap in record.gaps],
        "time_to_last_token": [record.last for record in good if record.last is not None],
        "sent_late": [record.sent for record in records if record.status],
    }
    for name, values in series.items():
        for percent in PERCENTILES if values else ():
            found[f"{name}_p{percent}"] = Metric(float(np.percentile(values, percent)) * 1e3, "ms")
    return found


def document(target: Target, records: Sequence[Record], seconds: float, options: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run: how it came to be, every request, and the figures."""
    return {
        "metadata": {
            "task": "load",
            "model_name": target.model,
            "url": target.url,
            "task_options": options,
            "created": results.now().isoformat(timespec="seconds"),
            "seconds": seconds,
            "versions": machine.versions(),
            "machine": machine.describe(torch.device("cpu")),  # the client's
        },
        "results": [record.as_dict() for record in records],
        "metrics": {name: metric.as_dict() for name, metric in metrics(records, seconds).items()},
    }


def shown(found: dict[str, Metric]) -> Iterator[tuple[str, str]]:
    """The figures as lines of a table: percentiles of one thing beside each other."""
    for name, metric in found.items():
        if name.endswith("_p50"):
            stem = name.removesuffix("_p50")
            values = " / ".join(f"{found[f'{stem}_p{percent}'].value:,.1f}" for percent in PERCENTILES)
            yield f"{stem.replace('_', ' ')}, p50 / p90 / p99", f"{values} {metric.unit}"
        elif not re.search(r"_p\d+$", name):
            yield name.replace("_", " "), f"{metric.value:,.{2 if metric.unit else 0}f} {metric.unit}".strip()
