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

_WORDS = (
    "apple river stone cloud tiger piano bread candle garden window bottle anchor mirror ladder pencil rocket basket "
    "feather hammer island"
)
_LONGEST_QUESTION = 40
"""Tokens kept free for the question and its answer."""


def recall(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: CacheMaker = CacheOptions(),  # noqa: B008 - frozen
    *,
    limit: int = 32,
    context: Sequence[int] = (256,),
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
    words = _WORDS.split()
    names = [f"{one} {other}" for one in words for other in words if one != other]
    rng.shuffle(names)
    context = decoding.prefix(tokenizer) + decoding.encode(tokenizer, "The codes:\n")
    codes: dict[str, str] = {}
    room = length - len(context) - _LONGEST_QUESTION
    for name in names:
        code = str(rng.randrange(1000, 10000))
        line = decoding.encode(tokenizer, f"The code of {name} is {code}.\n")
        if len(line) > room:
            break
        room -= len(line)
        context += line
        codes[name] = code
    if len(codes) < 2:
        raise ConfigError(f"context {length} is too short for two pairs of key and value")
    asked = list(codes)[int(depth * len(codes))]
    question = decoding.encode(tokenizer, f"\nThe code of {asked} is ")
    return Trial(context, question, codes[asked], length, depth)


TASK = Task(
    name="recall",
    summary="look one value up among many keys that are all alike",
    measure=recall,
    metrics=metrics,
    reference=CacheOptions(strategy="full"),
    baseline=True,
    main="recall",
)
