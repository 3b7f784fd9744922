"""What ``needle`` and ``recall`` share: a context is read and evicted from, then a question comes and is answered."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from liquidfusion.bench import decoding
from liquidfusion.bench.caches import CacheMaker, facts
from liquidfusion.bench.stats import Metric, mean_metric
from liquidfusion.bench.tasks.task import Progress, Record, record, scores, shorten


@dataclass(frozen=True, slots=True)
class Trial:
    """One context, the question asked after it, and the answer to find.

    Attributes
    ----------
    context, question
        Token ids. The question is fed in a call of its own, so nothing is evicted with knowledge of it.
    answer
        The text that the model must begin with.
    length
        Tokens of context, question and answer together: what a percentage refers to.
    depth
        Where the answer stands in the context, from 0 (beginning) to 1 (end).
    """

    context: list[int]
    question: list[int]
    answer: str
    length: int
    depth: float


def ask(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: CacheMaker,
    trials: Sequence[Trial],
    *,
    chunk: int | None,
    batch_size: int,
    progress: Progress | None,
) -> list[Record]:
    """Run the trials, those of equal length together, and return a record of each, in their order.

    Parameters
    ----------
    chunk
        Tokens of the context fed in one call; None: the whole context at once, and evicted from once.

    Returns
    -------
    list of Record
        ``scores``: ``recall``, 1 for an exact match and 0 otherwise.
    """
    records: dict[int, Record] = {}
    shapes = [(len(trial.context), len(trial.question)) for trial in trials]
    for shape in sorted(set(shapes)):
        alike = [index for index, other in enumerate(shapes) if other == shape]
        for at in range(0, len(alike), batch_size):
            batch = alike[at : at + batch_size]
            answers = _batch(model, tokenizer, cache, [trials[index] for index in batch], chunk)
            records |= zip(batch, answers, strict=True)
            if progress is not None:
                progress(len(records), len(trials))
    return [records[index] for index in range(len(trials))]


def _batch(
    model: PreTrainedModel, tokenizer: Any, cache: CacheMaker, trials: Sequence[Trial], chunk: int | None
) -> list[Record]:
    start = time.perf_counter()
    store = cache.make(model, min(trial.length for trial in trials))
    stream = decoding.Stream(model, store)
    stream.feed_chunks(torch.tensor([trial.context for trial in trials], device=model.device), chunk=chunk)
    logits = stream.feed(torch.tensor([trial.question for trial in trials], device=model.device), last=True)
    longest = max(len(decoding.encode(tokenizer, trial.answer)) for trial in trials)
    answers = [logits[:, -1].argmax(-1)]
    for _ in range(longest - 1):
        answers.append(stream.feed(answers[-1][:, None], last=True)[:, -1].argmax(-1))
    texts = [tokenizer.decode(row) for row in torch.stack(answers, 1).tolist()]
    seconds = time.perf_counter() - start
    return [
        record(
            shorten(tokenizer.decode(trial.context + trial.question)),
            {"recall": float(text.strip().startswith(trial.answer)), **facts(store)},
            text=text,
            max_tokens=longest,
            seconds=seconds,
            batch_size=len(trials),
            answer=trial.answer,
            length=trial.length,
            depth=trial.depth,
        )
        for trial, text in zip(trials, texts, strict=True)
    ]


def metrics(records: Sequence[Record], full: Sequence[Record] | None = None) -> dict[str, Metric]:
    """Return recall over all trials and, if there are several lengths, for each length."""
    found = {"recall": mean_metric(scores(records, "recall") or [], "", scores(full, "recall"))}
    lengths = sorted({item["request"]["length"] for item in records})
    for length in lengths if len(lengths) > 1 else []:
        own, other = ([r for r in group if r["request"]["length"] == length] for group in (records, full or []))
        found[f"recall_{length}"] = mean_metric(
            scores(own, "recall") or [], "", scores(other, "recall") if full else None
        )
    times = [item["result"]["request_time"] for item in records]
    found["seconds_per_question"] = Metric(float(np.mean([t["batch_time"] / t["batch_size"] for t in times])), "s")
    return found
