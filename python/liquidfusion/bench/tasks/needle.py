"""``needle``: find a number that was hidden in a long text, asked for after the text has been read."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from liquidfusion.bench import decoding
from liquidfusion.bench.caches import CacheMaker, CacheOptions
from liquidfusion.bench.tasks.retrieval import Trial, ask, metrics
from liquidfusion.bench.tasks.task import Progress, Record, Task
from liquidfusion.bench.texts import reference_text
from liquidfusion.exceptions import ConfigError

_CITIES = (
    "Paris London Berlin Madrid Rome Vienna Lisbon Dublin Athens Oslo Prague Warsaw Moscow Cairo Tokyo Delhi Beijing "
    "Sydney Toronto Chicago Boston Seattle Dallas Denver Houston Miami Lima Havana Nairobi Jakarta Manila Seoul"
)
_EDGE = 1 / 16
"""Share of the text at either end in which no needle is hidden: the sinks and the recent window would find it."""


def needle(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: CacheMaker = CacheOptions(),  # noqa: B008 - frozen
    *,
    text: str | None = None,
    limit: int = 32,
    context: Sequence[int] = (2048,),
    depths: int = 8,
    needles: int = 1,
    mentions: int = 2,
    chunk: int | None = 64,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Record]:
    """Hide five digits in a text at every depth and length, read it, ask, and count exact answers.

    Parameters
    ----------
    text
        The haystack; None: the reference text of Python's standard library.
    limit
        Trials for each length, spread evenly over the depths.
    context
        Lengths in tokens, question and answer included.
    depths
        Equal parts of the text, in which the needles are hidden in turn.
    needles
        Numbers hidden, each belonging to a city; one of them is asked for. 1: a single number without a city.
    mentions
        How often the text says each number, 1 or 2; the second time directly after the first. What is said once is
        looked at by nobody until the question comes.
    chunk
        Tokens fed in one call; None: the whole text at once.

    Returns
    -------
    list of Record
        ``scores``: ``recall``, 1 for an exact match.

    Raises
    ------
    ConfigError
        The text is shorter than the longest context, or a context has no room for the needles.
    """
    if mentions not in (1, 2):
        raise ConfigError(f"mentions {mentions}: 1 or 2 is accepted")
    rng = random.Random(seed)
    hay = decoding.encode(tokenizer, reference_text() if text is None else text)
    cities = _cities(tokenizer, needles)
    plan = _Plan(depths, needles, mentions, cities)
    trials = [_trial(tokenizer, hay, length, index % depths, plan, rng) for length in context for index in range(limit)]
    return ask(model, tokenizer, cache, trials, chunk=chunk, batch_size=batch_size, progress=progress)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is hidden in every text: in how many depths in turn, how many numbers, said how often, of which cities."""

    depths: int
    needles: int
    mentions: int
    cities: list[str]


def _cities(tokenizer: Any, needles: int) -> list[str]:
    """Return cities whose questions have equally many tokens, so that no row of a batch needs padding."""
    if needles == 1:
        return [""]
    groups = defaultdict(list)
    for city in _CITIES.split():
        groups[len(decoding.encode(tokenizer, _question(city)))].append(city)
    best = max(groups.values(), key=len)
    if not 1 <= needles <= len(best):
        raise ConfigError(f"needles {needles}: 1 to {len(best)} can be hidden")
    return best


def _hint(city: str, digits: str, mentions: int) -> str:
    what = f"special magic number for {city}" if city else "special magic number"
    again = f" Remember it: the {what} is {digits}." if mentions == 2 else ""
    return f"\n\nThe {what} is {digits}.{again}\n\n"


def _question(city: str) -> str:
    what = f"special magic number for {city}" if city else "special magic number"
    return f"\n\nQuestion: What is the {what} mentioned in the text?\nAnswer: The {what} is "


def _trial(tokenizer: Any, hay: list[int], length: int, part: int, plan: _Plan, rng: random.Random) -> Trial:
    needles, depths = plan.needles, plan.depths
    names = rng.sample(plan.cities, needles)
    numbers = ["".join(rng.choices("0123456789", k=5)) for _ in names]
    hints = [decoding.encode(tokenizer, _hint(*pair, plan.mentions)) for pair in zip(names, numbers, strict=True)]
    question = decoding.encode(tokenizer, _question(names[0]))
    begin = decoding.prefix(tokenizer)
    answer = len(decoding.encode(tokenizer, numbers[0]))
    size = length - len(begin) - len(question) - answer - sum(map(len, hints))
    if size < 32:
        raise ConfigError(f"context {length} is too short for {needles} needles and the question")
    if len(hay) <= size:
        raise ConfigError(f"the text has {len(hay)} tokens, too few for a context of {length}")
    at = rng.randrange(len(hay) - size)
    share = _EDGE + (1 - 2 * _EDGE) * (part + rng.random()) / depths
    places = [share, *(rng.uniform(_EDGE, 1 - _EDGE) for _ in hints[1:])]
    context, done = list(begin), 0
    for place, hint in sorted(zip(places, hints, strict=True)):
        until = int(place * size)
        context += hay[at + done : at + until] + hint
        done = until
    context += hay[at + done : at + size]
    return Trial(context, question, numbers[0], length, share)


TASK = Task(
    name="needle",
    summary="find a number hidden in a long text, asked for after the text was read",
    measure=needle,
    metrics=metrics,
    reference=CacheOptions(strategy="full"),
    baseline=True,
    main="recall",
)
