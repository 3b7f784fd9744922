"""``stream``: a text without end through one cache, with perplexity, time and memory as they go."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch

from liquidfusion.bench import decoding, machine, runner
from liquidfusion.bench.caches import CacheOptions
from liquidfusion.bench.models import Loaded
from liquidfusion.bench.stats import exp
from liquidfusion.bench.texts import reference_text
from liquidfusion.exceptions import ConfigError

STANDARD_INPUT = Path("-")
_PIECE = 65536
"""Characters tokenised together."""


@dataclass(frozen=True, slots=True)
class Window:
    """What happened while a stretch of the stream went through.

    Attributes
    ----------
    tokens
        Tokens of the stream up to the end of this stretch.
    perplexity
        Of this stretch alone.
    step_ms
        Mean milliseconds of a call.
    tokens_per_second
        Tokens fed a second.
    cache_bytes
        What the cache holds.
    evictions
        Tokens evicted so far, summed over layers, rows and kv heads.
    resident_bytes, peak_bytes
        Memory now and at its peak since the stream began: of torch's tensors on CUDA, of the process elsewhere. None:
        the system does not tell.
    """

    tokens: int
    perplexity: float
    step_ms: float
    tokens_per_second: float
    cache_bytes: int
    evictions: int
    resident_bytes: int | None
    peak_bytes: int | None


def read(source: Path | None = None) -> Iterator[str]:
    """Return the pieces of a text; a file is opened and its first piece read at once.

    Parameters
    ----------
    source
        A text file, repeated without end; ``-`` is standard input, line by line to its end; None is the reference text
        of Python's standard library, repeated.

    Raises
    ------
    ConfigError
        The file cannot be read, is not text or is empty; of a later piece, when that is reached.
    """
    if source is None:
        return repeat(reference_text())
    pieces = _lines() if source == STANDARD_INPUT else _pieces(source)
    return pieces if source == STANDARD_INPUT else chain([next(pieces)], pieces)


def _lines() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise ConfigError("cannot read standard input: it is not UTF-8 text") from error


def _pieces(source: Path) -> Iterator[str]:
    try:
        while True:
            with source.open(encoding="utf8") as file:
                empty = True
                while lines := file.readlines(_PIECE):
                    empty = False
                    yield "".join(lines)
            if empty:
                raise ConfigError(f"{source} is empty")
    except OSError as error:
        raise ConfigError(f"cannot read {source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {source}: it is not UTF-8 text") from error


def read_tokens(tokenizer: Any, text: Iterable[str]) -> Iterator[int]:
    """Yield the tokens of a text, piece by piece, with what this tokenizer puts before a text."""
    yield from decoding.prefix(tokenizer)
    for piece in text:
        yield from decoding.encode(tokenizer, piece)


def stream(
    loaded: Loaded,
    text: Iterator[int],
    cache: CacheOptions | None = None,
    *,
    tokens: int = 16384,
    chunk: int = 64,
    window: int = 1024,
) -> Iterator[Window]:
    """Feed a text through one cache and yield a row whenever `window` more tokens went through.

    Parameters
    ----------
    text
        Token ids, such as :func:`read_tokens` yields.
    cache
        The cache; a percentage as its size refers to `tokens`. None: the default strategy and size.
    tokens
        Where to stop, if the text does not end before.
    chunk
        Tokens fed in one call. Eviction happens between calls; 1 measures decoding.
    window
        Tokens of a row, rounded up to whole calls; the last row may have fewer.

    Raises
    ------
    ConfigError
        A number is below 1, or the text has fewer than two tokens.
    """
    for name, value in (("tokens", tokens), ("chunk", chunk), ("window", window)):
        if value < 1:
            raise ConfigError(f"{name} {value} is not at least 1")
    device = loaded.model.device
    text = islice(text, tokens)
    store = (cache or CacheOptions()).make(loaded.model, tokens)
    fed = decoding.Stream(loaded.model, store)
    machine.reset_peak_memory(device)
    done, ended = 0, False
    while not ended:
        loss, scored, before, calls = torch.zeros((), device=device), 0, done, 0
        start = time.perf_counter()
        while done - before < window and not ended:
            part = list(islice(text, chunk))
            ended = len(part) < chunk
            if part:
                nll = fed.score(torch.tensor([part], device=device))
                loss += nll.sum()
                scored += nll.numel()
                done += len(part)
                calls += 1
        if not scored:
            continue
        mean = float(loss) / scored  # waits for the device
        seconds = time.perf_counter() - start
        yield Window(
            tokens=done,
            perplexity=exp(mean),
            step_ms=1000 * seconds / calls,
            tokens_per_second=(done - before) / seconds,
            cache_bytes=store.nbytes,
            evictions=store.evictions,
            resident_bytes=machine.resident_memory(device),
            peak_bytes=machine.peak_memory(device),
        )
    if done < 2:
        raise ConfigError(f"the text has {done} tokens, too few to predict one from another")


def document(
    loaded: Loaded, cache: CacheOptions, windows: Sequence[Window], *, seconds: float, tokens: int, chunk: int
) -> dict[str, Any]:
    """Return the result of a stream, or of its beginning, as it is written to a file."""
    options, used = {"tokens": tokens, "chunk": chunk}, cache.spec(tokens).budget
    return {
        "metadata": runner.metadata(
            loaded, "stream", cache, options, seconds, budgets_used=[] if used is None else [used]
        ),
        "windows": [asdict(window) for window in windows],
    }
