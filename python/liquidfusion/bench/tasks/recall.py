"""``recall``: look one value up among many keys, all alike, so that only the question tells which one matters."""

import random
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from liquidfusion.bench import decoding
from liquidfusion.bench.caches import CacheMaker, CacheOptions
from liquidfusion.bench.tasks.retrieval import Trial, ask, metrics
from liquidfusion.bench.tasks.task import Progress, Record, Task
from liquidfusion.exceptions import ConfigError


def recall(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: CacheMaker = CacheOptions(),  # noqa: B008 - frozen
    *,
    limit: int = 32,
    context: Sequence[int] = (512,),
    chunk: int | None = 64,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Record]:
    """Read a list of keys and values that fills the context, then ask for the value of one key.

    Parameters
    ----------
    limit
        Trials for each length.
    context
        Lengths in tokens; the list has as many pairs as fit.
    chunk
        Tokens fed in one call; None: the whole list at once.

    Returns
    -------
    list of Record
        ``scores``: ``recall``, 1 for an exact match.

    Raises
    ------
    ConfigError
        A context has no room for two pairs.
    """
    rng = random.Random(seed)
    trials = [_trial(tokenizer, length, (index + 0.5) / limit, rng) for length in context for index in range(limit)]
    return ask(model, tokenizer, cache, trials, chunk=chunk, batch_size=batch_size, progress=progress)


def _trial(tokenizer: Any, length: int, depth: float, rng: random.Random) -> Trial:
    begin = decoding.prefix(tokenizer) + decoding.encode(tokenizer, "The code of each room:\n")
    room = length - len(begin) - len(_question(tokenizer, "1000")) - len(decoding.encode(tokenizer, "1000"))
    pair = len(decoding.encode(tokenizer, _line("1000", "1000")))
    if room < 2 * pair:
        raise ConfigError(f"context {length} is too short for two pairs of key and value")
    numbers = [str(number) for number in rng.sample(range(1000, 10000), 2 * (room // pair))]
    keys, values = numbers[::2], numbers[1::2]
    context = list(begin)
    for key, value in zip(keys, values, strict=True):
        context += decoding.encode(tokenizer, _line(key, value))
    asked = int(depth * len(keys))
    return Trial(context, _question(tokenizer, keys[asked]), values[asked], length, depth)


def _line(key: str, value: str) -> str:
    return f"Room {key} has code {value}.\n"


def _question(tokenizer: Any, key: str) -> list[int]:
    return decoding.encode(tokenizer, f"\nWhich code has room {key}?\nRoom {key} has code ")


TASK = Task(
    name="recall",
    summary="look one value up among many keys that are all alike",
    measure=recall,
    metrics=metrics,
    reference=CacheOptions(strategy="full"),
    baseline=True,
    main="recall",
)
