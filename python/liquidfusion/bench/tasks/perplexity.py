"""``perplexity``: how well the model predicts a text that streams through its cache."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from liquidfusion.bench import decoding
from liquidfusion.bench.caches import CacheMaker, CacheOptions, facts
from liquidfusion.bench.stats import Metric, bootstrap, exp, interval
from liquidfusion.bench.tasks.task import Progress, Record, Task, record, scores, shorten
from liquidfusion.bench.texts import reference_text
from liquidfusion.exceptions import ConfigError

_BLOCK = 64
"""Tokens whose mean is one sample of the bootstrap: long enough to be nearly independent of its neighbours."""


def perplexity(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: CacheMaker = CacheOptions(),  # noqa: B008 - frozen
    *,
    text: str | None = None,
    limit: int = 4,
    context: int = 2048,
    chunk: int = 64,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> list[Record]:
    """Feed segments of a text, teacher-forced, and score the last three quarters of each.

    Parameters
    ----------
    text
        The text; None: the reference text of Python's standard library.
    limit
        Segments, taken from the beginning of the text.
    context
        Tokens in a segment. A percentage as cache size refers to it.
    chunk
        Tokens fed in one call. Eviction happens between calls, so 1 measures eviction while decoding.
    batch_size
        Segments fed together.

    Returns
    -------
    list of Record
        ``scores``: ``nll``, the mean negative log-likelihood of each block of 64 tokens, and ``counts``, their tokens.

    Raises
    ------
    ConfigError
        The text is too short for one segment.
    """
    begin = decoding.prefix(tokenizer)
    body = context - len(begin)
    tokens = decoding.encode(tokenizer, reference_text() if text is None else text)
    rows = [begin + tokens[at : at + body] for at in range(0, min(limit * body, len(tokens) - body + 1), body)]
    if not rows:
        raise ConfigError(f"the text has {len(tokens)} tokens, too few for one segment of {context}")
    first = context // 4
    records: list[Record] = []
    for at in range(0, len(rows), batch_size):
        batch = rows[at : at + batch_size]
        start = time.perf_counter()
        base = at * context

        def report(done: int, base: int = base, size: int = len(batch)) -> None:
            if progress is not None:
                progress(base + done * size, len(rows) * context)

        store = cache.make(model, context)
        nll = stream_nll(model, torch.tensor(batch, device=model.device), store, chunk, report)
        seconds = time.perf_counter() - start
        for row, losses in zip(batch, nll[:, first - 1 :].tolist(), strict=True):
            blocks = [losses[i : i + _BLOCK] for i in range(0, len(losses), _BLOCK)]
            records.append(
                record(
                    shorten(tokenizer.decode(row)),
                    {
                        "nll": [float(np.mean(block)) for block in blocks],
                        "counts": [len(block) for block in blocks],
                        **facts(store),
                    },
                    seconds=seconds,
                    batch_size=len(batch),
                    tokens=context,
                )
            )
    return records


def stream_nll(
    model: PreTrainedModel, ids: Tensor, cache: Cache, chunk: int, report: Callable[[int], None] | None = None
) -> Tensor:
    """Return the negative log-likelihood of every token but the first, float32 ``[batch, tokens - 1]``.

    Parameters
    ----------
    ids
        int64 ``[batch, tokens]``.
    cache
        A fresh cache.
    report
        Called with the tokens of each row fed so far.
    """
    stream = decoding.Stream(model, cache)
    losses = []
    for at in range(0, ids.shape[1], chunk):
        losses.append(stream.score(ids[:, at : at + chunk]))
        if report is not None:
            report(min(at + chunk, ids.shape[1]))
    return torch.cat(losses, 1).cpu()


def metrics(records: Sequence[Record], full: Sequence[Record] | None = None) -> dict[str, Metric]:
    """Return perplexity and, with the full cache's records, its ratio to theirs (paired, block by block)."""
    nll = np.concatenate(scores(records, "nll") or [])
    counts = np.concatenate(scores(records, "counts") or [])
    found = {"perplexity": _exp(nll, counts, "")}
    if full is not None:
        reference = np.concatenate(scores(full, "nll") or [])
        with np.errstate(invalid="ignore"):  # a model that computes no numbers
            ratio = _exp(nll - reference, counts, "x full")
            of_full = exp(float(np.average(reference, weights=counts)))
        found = {
            "perplexity": replace(found["perplexity"], full=of_full),
            "perplexity_ratio": replace(ratio, full=1.0),
        }
    times = [item["result"]["request_time"] for item in records]
    seconds = sum(entry["batch_time"] / entry["batch_size"] for entry in times)
    tokens = sum(item["request"]["tokens"] for item in records)
    found["tokens_per_second"] = Metric(tokens / seconds, "tokens/s")
    return found


def _exp(losses: NDArray[np.float64], counts: NDArray[np.float64], unit: str) -> Metric:
    """Return e to the mean of the losses of blocks with so many tokens each."""
    mean, low, high = bootstrap(losses, weights=counts)
    return Metric(exp(mean), unit, *interval(exp(low), exp(high)), n=len(losses))


TASK = Task(
    name="perplexity",
    summary="predict a text that streams through the cache, teacher-forced",
    measure=perplexity,
    metrics=metrics,
    reference=CacheOptions(strategy="full"),
    baseline=True,
    main="perplexity",
    lower=True,
)
