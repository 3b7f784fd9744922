"""``generate``: continue prompts and time every token."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from liquidfusion.bench import decoding, machine
from liquidfusion.bench.caches import CacheMaker, CacheOptions, FrameworkCache, facts
from liquidfusion.bench.stats import Metric, bootstrap, interval, mean_metric
from liquidfusion.bench.tasks.task import Progress, Record, Task, record
from liquidfusion.bench.texts import DEFAULT_PROMPT


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: CacheMaker = CacheOptions(),  # noqa: B008 - frozen
    *,
    prompts: Sequence[str] | None = None,
    limit: int | None = None,
    max_tokens: int = 32,
    temperature: float = 0.0,
    chunk: int | None = None,
    context: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Record]:
    """Continue each prompt and time every token.

    A short unmeasured run goes first, so that one-time costs of the framework are not counted.

    Parameters
    ----------
    prompts
        Texts to continue; None: one built-in text of about 500 tokens.
    limit
        Use the first `limit` prompts.
    max_tokens
        Tokens to write at most.
    temperature
        0: the likeliest token; above: sampled with `seed`.
    chunk
        Prompt tokens fed in one call; None: all at once.
    context
        Repeat or cut each prompt to this many tokens, for timing at a length.
    batch_size
        Prompts decoded together, padded on the left.

    Returns
    -------
    list of Record
        ``scores``: ``first`` (seconds to the first token), ``steps`` (seconds between tokens), ``prompt_tokens``,
        ``cache_bytes``, ``peak_memory`` (bytes), ``budget``, ``evictions``.
    """
    texts = list(prompts or [DEFAULT_PROMPT])[:limit]
    rows = [_fit(decoding.prefix(tokenizer) + decoding.encode(tokenizer, text), context) for text in texts]
    settings: dict[str, Any] = {"temperature": temperature, "seed": seed, "chunk": chunk}
    decoding.generate(model, tokenizer, [rows[0][-16:]], cache.make(model, 16), max_tokens=3, **settings)
    batches = [range(at, min(at + batch_size, len(rows))) for at in range(0, len(rows), batch_size)]
    records, done = [], 0
    for batch in batches:

        def step() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, len(batches) * max_tokens)

        machine.reset_peak_memory(model.device)
        store = cache.make(model, min(len(rows[index]) for index in batch))
        completions, timing = decoding.generate(
            model, tokenizer, [rows[index] for index in batch], store, max_tokens=max_tokens, on_token=step, **settings
        )
        measured = {
            "first": timing.first,
            "steps": timing.steps,
            "peak_memory": machine.peak_memory(model.device),
            **facts(store),
        }
        for index, completion in zip(batch, completions, strict=True):
            records.append(
                record(
                    texts[index],
                    {**measured, "prompt_tokens": len(rows[index]), "tokens": len(completion.tokens)},
                    text=completion.text,
                    logprobs=logprobs(tokenizer, completion),
                    finish_reason=completion.finish_reason,
                    temperature=temperature,
                    max_tokens=max_tokens,
                    seconds=timing.total,
                    batch_size=len(batch),
                )
            )
    return records


def _fit(ids: list[int], context: int | None) -> list[int]:
    return ids if context is None else (ids * -(-context // len(ids)))[:context]


def logprobs(tokenizer: Any, completion: decoding.Completion) -> dict[str, Any]:
    """Return tokens, their log-probabilities, the alternatives and each token's offset in the text."""
    tokens = completion.tokens
    return {
        "tokens": [tokenizer.decode([token]) for token in tokens],
        "token_logprobs": completion.logprobs,
        "top_logprobs": [{tokenizer.decode([token]): value for token, value in step} for step in completion.top],
        "text_offset": [len(tokenizer.decode(tokens[:index])) for index in range(len(tokens))],
    }


def metrics(records: Sequence[Record], full: Sequence[Record] | None = None) -> dict[str, Metric]:
    """Return speed and memory; the full figures are those of transformers' own cache."""
    own, other = _figures(records), {} if full is None else _figures(full)
    return {name: replace(metric, full=other[name].value) if name in other else metric for name, metric in own.items()}


def _figures(records: Sequence[Record]) -> dict[str, Metric]:
    scores = [item["result"]["scores"] for item in records]
    seconds = list(chain.from_iterable(score["steps"] for score in scores))
    rows = float(np.mean([item["result"]["request_time"]["batch_size"] for item in records]))
    figures = {"time_to_first_token": mean_metric([score["first"] for score in scores], "s")}
    if seconds:
        mean, low, high = bootstrap(seconds)
        figures["tokens_per_second"] = Metric(
            rows / mean, "tokens/s", *interval(rows / high, rows / low), n=len(seconds)
        )
        for percent in (50, 90, 99):
            figures[f"latency_p{percent}"] = Metric(1000 * float(np.percentile(seconds, percent)), "ms")
    figures["cache_bytes"] = Metric(max(score["cache_bytes"] for score in scores), "bytes")
    peaks = [score["peak_memory"] for score in scores if score["peak_memory"] is not None]
    if peaks:
        figures["peak_memory"] = Metric(max(peaks), "bytes")
    figures["prompt_tokens"] = Metric(float(np.mean([score["prompt_tokens"] for score in scores])), "tokens")
    figures["generated_tokens"] = Metric(sum(score["tokens"] for score in scores), "tokens")
    figures["evictions"] = Metric(sum(score["evictions"] for score in scores), "tokens")
    return figures


TASK = Task(
    name="generate",
    summary="continue a prompt; time to first token, tokens per second, latencies, memory",
    measure=generate,
    metrics=metrics,
    reference=FrameworkCache(),
    baseline=False,
    main="tokens_per_second",
)
