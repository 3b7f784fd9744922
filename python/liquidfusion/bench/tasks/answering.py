"""What the suites share: a prompt is read and evicted from, a question follows, and an answer is written and scored."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from liquidfusion.bench import decoding, machine
from liquidfusion.bench.caches import CacheMaker, facts
from liquidfusion.bench.rivals import Framework, Press
from liquidfusion.bench.stats import Metric, bootstrap, mean_metric
from liquidfusion.bench.tasks.task import Progress, Record, record, scores, shorten
from liquidfusion.exceptions import ConfigError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One text to read, the question after it, and when its answer ends.

    Attributes
    ----------
    context, question
        Token ids. The question comes in a call of its own: nothing of the context is evicted with knowledge of it.
    max_tokens
        Tokens to write at most.
    stop
        Strings that end the answer and are cut off it.
    until
        The answer ends when it contains all of these, whatever their case; () for never. Only for scores that what is
        written later cannot change.
    """

    context: list[int]
    question: list[int]
    max_tokens: int
    stop: tuple[str, ...] = ()
    until: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of context and question: what a percentage refers to."""
        return len(self.context) + len(self.question)

    def seen(self) -> "Prompt":
        """Return the prompt with its question seen while tokens are evicted: only its last token comes after."""
        both = self.context + self.question
        return Prompt(both[:-1], both[-1:], self.max_tokens, self.stop, self.until)


@dataclass(slots=True)
class Answer:
    """What was written, and what it took.

    Attributes
    ----------
    text, tokens
        The answer, cut before a stop string, and its ids without the token that ended it.
    finish_reason
        ``"stop"`` or ``"length"``.
    seconds, batch_size
        The time of the whole batch, and its rows.
    facts
        ``cache_bytes`` of this row at the end, ``allocated_bytes`` (with padding, room to grow and what is only
        masked), ``budget``, ``evictions``, and ``passes``: how often the context was fed to the model before the
        question.
    fed
        Tokens of the answer that were fed back: those that the cache has seen.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    seconds: float = 0.0
    batch_size: int = 1
    facts: dict[str, Any] = field(default_factory=dict)
    fed: int = 0


def compose(
    tokenizer: Any, context: str, question: str, prefix: str = "", *, chat: bool = True
) -> tuple[list[int], list[int]]:
    """Return the ids of context and question, through the tokenizer's chat template if it has one and `chat` is on.

    Parameters
    ----------
    context, question
        Two parts of one message of the user.
    prefix
        What the answer begins with.
    """
    begin, end = "", ""
    templated = chat and getattr(tokenizer, "chat_template", None) is not None
    if templated:
        mark = "⟪text⟫"
        shown: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False
        )
        begin, _, end = shown.partition(mark)
    head = [] if templated else decoding.prefix(tokenizer)
    return (
        head + decoding.encode(tokenizer, begin + context),
        decoding.encode(tokenizer, question + end + prefix),
    )


def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: CacheMaker,
    prompts: Sequence[Prompt],
    *,
    chunk: int | None = None,
    batch_size: int = 8,
    question: str = "unseen",
    progress: Progress | None = None,
) -> list[Answer]:
    """Answer every prompt greedily, those of similar length together, and return the answers in their order.

    Parameters
    ----------
    cache
        A cache of this process, or a rival that answers in another.
    chunk
        Tokens of the context fed in one call; None: the whole context at once, and evicted from once, as presses do.
    batch_size
        Rows run together, padded on the left. A percentage refers to the shortest of them.
    question
        ``"unseen"`` or ``"seen"`` while tokens of the context are evicted.

    Raises
    ------
    ConfigError
        `question` is neither.
    """
    if question not in ("unseen", "seen"):
        raise ConfigError(f"question {question!r} is unknown; accepted: unseen, seen")
    if question == "seen":
        prompts = [prompt.seen() for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].context))
    found: dict[int, Answer] = {}
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        chosen = [prompts[index] for index in batch]
        answers = (
            _ask_rival(model, tokenizer, cache, chosen)
            if isinstance(cache, Press)
            else _batch(model, tokenizer, cache, chosen, chunk)
        )
        found |= zip(batch, answers, strict=True)
        if progress is not None:
            progress(len(found), len(prompts))
    return [found[index] for index in range(len(prompts))]


def _batch(
    model: PreTrainedModel, tokenizer: Any, cache: CacheMaker, prompts: Sequence[Prompt], chunk: int | None
) -> list[Answer]:
    device = model.device
    ends = decoding.end_tokens(model, tokenizer)
    pad = min(ends, default=0)
    answers = [Answer(batch_size=len(prompts)) for _ in prompts]
    waiting = set(range(len(prompts)))
    machine.synchronize(device)
    start = time.perf_counter()
    store = cache.make(model, min(prompt.length for prompt in prompts))
    stream = decoding.Stream(model, store)
    stream.feed_chunks(*decoding.pad_left([prompt.context for prompt in prompts], pad, device), chunk=chunk)
    logits = stream.feed(*decoding.pad_left([prompt.question for prompt in prompts], pad, device), last=True)
    first = 0.0
    for step in range(max(prompt.max_tokens for prompt in prompts)):
        chosen: Tensor = logits[:, -1].argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            if row in waiting and _extend(answers[row], prompts[row], token, step, ends, tokenizer):
                waiting.discard(row)
        first = first or time.perf_counter() - start
        if not waiting:
            break
        logits = stream.feed(chosen[:, None], last=True)
    seconds = time.perf_counter() - start
    known: dict[str, Any] = {**facts(store), "passes": 1.0, "first": first}
    held = (cache.held(store) if isinstance(cache, Framework) else known["cache_bytes"]) // len(prompts)
    for prompt, one in zip(prompts, answers, strict=True):
        one.text = _cut(tokenizer.decode(one.tokens, skip_special_tokens=True), prompt.stop)
        one.seconds = seconds
        # An unbounded cache also holds the padding of shorter rows and room to grow: neither is the method's.
        own = min(held, full_bytes(model, prompt.length + one.fed)) if known["budget"] is None else held
        one.facts = {**known, "cache_bytes": own, "allocated_bytes": held}
    return answers


def _extend(answer: Answer, prompt: Prompt, token: int, step: int, ends: set[int], tokenizer: Any) -> bool:
    """Add a token to an answer; return whether the answer has ended."""
    answer.fed = len(answer.tokens)
    if token in ends:
        answer.finish_reason = "stop"
        return True
    answer.tokens.append(token)
    if prompt.stop or prompt.until:
        text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        found = prompt.until and all(part.lower() in text.lower() for part in prompt.until)
        if found or any(part in text for part in prompt.stop):
            answer.finish_reason = "stop"
            return True
    return step + 1 >= prompt.max_tokens


def _cut(text: str, stop: Sequence[str]) -> str:
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=None)]


def _ask_rival(model: PreTrainedModel, tokenizer: Any, rival: Press, prompts: Sequence[Prompt]) -> list[Answer]:
    kept = rival.kept(min(prompt.length for prompt in prompts), full_bytes(model, 1))
    replies = rival.start(model).answers(
        press=rival.press,
        chat=getattr(tokenizer, "chat_template", None) is not None and _templated(tokenizer, prompts[0]),
        ends=sorted(decoding.end_tokens(model, tokenizer)),
        prompts=[
            {
                "context": prompt.context,
                "question": prompt.question,
                "kept": kept,
                "max_tokens": prompt.max_tokens,
                "stop": prompt.stop,
                "until": prompt.until,
            }
            for prompt in prompts
        ],
    )
    return [
        Answer(
            _cut(tokenizer.decode(reply["tokens"], skip_special_tokens=True), prompt.stop),
            reply["tokens"],
            reply["finish_reason"],
            reply["seconds"],
            reply["batch_size"],
            {
                "cache_bytes": reply["cache_bytes"],
                "allocated_bytes": reply["allocated_bytes"],
                "budget": None if rival.press == "full" else kept,
                "evictions": 0 if rival.press == "full" else max(0, len(prompt.context) - kept),
                "passes": reply["passes"],
            },
            reply["fed"],
        )
        for prompt, reply in zip(prompts, replies, strict=True)
    ]


def _templated(tokenizer: Any, prompt: Prompt) -> bool:
    """Whether a prompt begins as the chat template does."""
    begin, _ = compose(tokenizer, "", "")
    return len(begin) > 0 and prompt.context[: len(begin)] == begin


def full_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return the bytes of a full cache of one row and `tokens` tokens in the model's dtype."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * tokens * config.num_hidden_layers * heads * width * model.dtype.itemsize)


def answered(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Prompt,
    given: Answer,
    score: float,
    *,
    question: str,
    **request: Any,
) -> Record:
    """Return the record of one answer.

    Parameters
    ----------
    score
        0 to 100.
    request
        What else tells this prompt from the others: its task, its length, its references.

    Returns
    -------
    Record
        ``scores``: ``score``, ``tokens`` written, ``prompt_tokens``, ``cache_bytes``, ``share`` (of the bytes of a full
        cache of the same tokens), ``budget``, ``evictions``, ``passes``, ``second_pass``, ``question_seen``.
    """
    tokens = prompt.length + given.fed
    return record(
        shorten(tokenizer.decode(prompt.context + prompt.question)),
        {
            "score": score,
            "tokens": len(given.tokens),
            "prompt_tokens": prompt.length,
            "share": given.facts["cache_bytes"] / full_bytes(model, tokens),
            "second_pass": given.facts["passes"] > 1.01,
            "question_seen": question == "seen",
            **given.facts,
        },
        text=given.text,
        finish_reason=given.finish_reason,
        max_tokens=prompt.max_tokens,
        seconds=given.seconds,
        batch_size=given.batch_size,
        **request,
    )


def grouped(records: Sequence[Record], key: str) -> dict[Any, list[Record]]:
    """Return the records by one of the facts of their requests, in the order of its first appearance."""
    found: dict[Any, list[Record]] = {}
    for item in records:
        found.setdefault(item["request"][key], []).append(item)
    return found


def balanced(records: Sequence[Record], *keys: str) -> Metric:
    """Return the mean score in which every group of equal `keys` counts the same, however many records it has."""
    names = [tuple(item["request"].get(key) for key in keys) for item in records]
    weights = [1 / names.count(name) for name in names]
    value, low, high = bootstrap(scores(records, "score") or [], weights=weights)
    return Metric(value, "%", low, high)


def costs(records: Sequence[Record], full: Sequence[Record] | None = None) -> dict[str, Metric]:
    """Return what the answers took: bytes held, their share of a full cache's, seconds, and passes over the context."""

    def seconds(items: Sequence[Record]) -> list[float]:
        times = [item["result"]["request_time"] for item in items]
        return [t["batch_time"] / t["batch_size"] for t in times]

    return {
        "cache_bytes": mean_metric(scores(records, "cache_bytes") or [], "bytes", scores(full, "cache_bytes")),
        "share": Metric(float(np.mean(scores(records, "share") or [])), ""),
        "seconds_per_question": mean_metric(seconds(records), "s", None if full is None else seconds(full)),
        "passes": Metric(float(np.mean(scores(records, "passes") or [])), ""),
    }


def only(records: Sequence[Record] | None, **facts: Any) -> list[Record] | None:
    """Return the records whose requests have these facts; None for no records."""
    if records is None:
        return None
    return [item for item in records if all(item["request"].get(name) == value for name, value in facts.items())]
