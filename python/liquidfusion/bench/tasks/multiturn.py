"""``multiturn``: facts told early in a conversation, asked for many turns later, through the chat template."""

import random
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from liquidfusion.bench import decoding
from liquidfusion.bench.caches import CacheMaker, CacheOptions
from liquidfusion.bench.stats import Metric
from liquidfusion.bench.tasks.answering import Prompt, answer, answered, balanced, costs, grouped, only
from liquidfusion.bench.tasks.task import Progress, Record, Task
from liquidfusion.bench.texts import reference_text
from liquidfusion.exceptions import ConfigError

_FACTS = (
    ("my sister's name is {}", "What is my sister's name?", "Your sister's name is", "Clara Edith Naomi Greta Paula"),
    ("my dog is called {}", "What is my dog called?", "Your dog is called", "Biscuit Pepper Ziggy Nugget Hazel"),
    ("I was born in {}", "In which city was I born?", "You were born in", "Oslo Lisbon Nairobi Chicago Vienna"),
    ("I work as a {}", "What is my job?", "You work as a", "plumber dentist florist carpenter librarian"),
    ("my favourite colour is {}", "What is my favourite colour?", "Your favourite colour is", "orange green brown"),
    ("my locker number is {}", "What is my locker number?", "Your locker number is", "417 832 265 594 738 169"),
    ("my train leaves at {}", "When does my train leave?", "Your train leaves at", "6:15 7:40 9:25 4:50 8:05"),
    ("my flight goes to {}", "Where does my flight go?", "Your flight goes to", "Dublin Tokyo Athens Havana Denver"),
)
"""What the user tells, asks, how the answer begins, and what it must contain: one of these words."""

_TOLD = ("Let me tell you something about me: {}.", "Before we go on, please note that {}.", "By the way, {}.")
_HEARD = ("Thank you, I will remember that.", "Noted.", "Good to know.")
_ASKED = ("Here is a passage for my notes: {}", "Next passage: {}", "And then it says: {}")
_REPLIES = ("I have read it.", "Understood, please go on.", "Got it.")


def multiturn(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: CacheMaker = CacheOptions(),  # noqa: B008 - frozen
    *,
    text: str | None = None,
    limit: int = 16,
    context: Sequence[int] = (2048,),
    facts: int = 4,
    question: str = "unseen",
    chunk: int | None = 64,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Record]:
    """Tell facts in the first turns, talk of other things until the context is full, then ask for one of the facts.

    Parameters
    ----------
    text
        What the conversation goes on about; None: the reference text of Python's standard library.
    limit
        Conversations for each length; the facts are asked for in turn.
    context
        Lengths in tokens of the conversation with its last question.
    facts
        Facts told, one a turn, at most as many as there are.
    question
        ``"unseen"`` or ``"seen"`` while tokens are evicted.
    chunk
        Tokens of the conversation fed in one call, as the turns of a chat come little by little; None: all at once.
    batch_size
        Conversations run together, padded on the left.

    Returns
    -------
    list of Record
        ``scores``: ``score``, 100 if the answer contains the fact and 0 otherwise, and what
        :func:`liquidfusion.bench.tasks.answering.answered` adds.

    Raises
    ------
    ConfigError
        The tokenizer has no chat template, or a length has no room for the facts.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError("multiturn needs a model with a chat template")
    if not 1 <= facts <= len(_FACTS):
        raise ConfigError(f"facts {facts}: 1 to {len(_FACTS)} can be told")
    words = (reference_text() if text is None else text).split()
    rng = random.Random(seed)
    items = [
        (length, *_conversation(tokenizer, words, length, facts, index % facts, rng))
        for length in context
        for index in range(limit)
    ]
    given = answer(
        model,
        tokenizer,
        cache,
        [prompt for _, prompt, _, _ in items],
        chunk=chunk,
        batch_size=batch_size,
        question=question,
        progress=progress,
    )
    return [
        answered(
            model,
            tokenizer,
            prompt,
            one,
            100.0 * (fact.lower() in one.text.lower()),
            question=question,
            length=length,
            turns=turns,
            outputs=[fact],
        )
        for (length, prompt, fact, turns), one in zip(items, given, strict=True)
    ]


def _conversation(
    tokenizer: Any, words: list[str], length: int, facts: int, asked: int, rng: random.Random
) -> tuple[Prompt, str, int]:
    """Return the conversation as a prompt, the fact asked for, and the turns between telling and asking."""
    chosen = [(entry, rng.choice(entry[3].split())) for entry in rng.sample(_FACTS, facts)]
    messages: list[dict[str, str]] = []

    def say(user: str, reply: str) -> None:
        messages.extend(({"role": "user", "content": user}, {"role": "assistant", "content": reply}))

    for (told, *_), value in chosen:
        say(rng.choice(_TOLD).format(told.format(value)), rng.choice(_HEARD))
    (_, asks, begins, _), fact = chosen[asked]
    prompt = _prompt(tokenizer, messages, asks, begins, fact)
    at = rng.randrange(len(words))
    while True:
        passage = " ".join(words[(at + step) % len(words)] for step in range(rng.randint(20, 60)))
        at += 60
        say(rng.choice(_ASKED).format(passage), rng.choice(_REPLIES))
        longer = _prompt(tokenizer, messages, asks, begins, fact)
        if longer.length > length:
            break
        prompt = longer
    if prompt.length > length:
        raise ConfigError(f"context {length} is too short for {facts} facts and a question")
    return prompt, fact, len(messages) // 2 - 1 - asked


def _prompt(tokenizer: Any, messages: list[dict[str, str]], asks: str, begins: str, fact: str) -> Prompt:
    def render(turns: list[dict[str, str]], *, begin: bool) -> str:
        shown: str = tokenizer.apply_chat_template(turns, add_generation_prompt=begin, tokenize=False)
        return shown

    whole = render([*messages, {"role": "user", "content": asks}], begin=True) + begins
    # What the template writes for the turns before the question is the beginning of what it writes for all of them.
    before = render(messages, begin=False)
    cut = len(before) if whole.startswith(before) else whole.rindex(asks)
    return Prompt(decoding.encode(tokenizer, whole[:cut]), decoding.encode(tokenizer, whole[cut:]), 16, until=(fact,))


def metrics(records: Sequence[Record], full: Sequence[Record] | None = None) -> dict[str, Metric]:
    """Return the share of facts found, for each length if there are several, and what it took."""

    def mean(own: Sequence[Record], other: Sequence[Record] | None) -> Metric:
        one = balanced(own, "length")
        return Metric(one.value, "%", one.low, one.high, balanced(other, "length").value if other else None)

    found = {"multiturn": mean(records, full)}
    lengths = sorted(grouped(records, "length"))
    for length in lengths if len(lengths) > 1 else []:
        found[f"multiturn_{length}"] = mean(only(records, length=length) or [], only(full, length=length))
    return found | costs(records, full)


TASK = Task(
    name="multiturn",
    summary="facts told early in a chat, asked for many turns later",
    measure=multiturn,
    metrics=metrics,
    reference=CacheOptions(strategy="full"),
    baseline=True,
    main="multiturn",
)
