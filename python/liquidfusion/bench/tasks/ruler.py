"""``ruler``: the thirteen tasks of NVIDIA's RULER, generated for the model's own tokenizer."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from liquidfusion.bench import decoding
from liquidfusion.bench.caches import CacheMaker, CacheOptions
from liquidfusion.bench.data import load_dataset
from liquidfusion.bench.stats import Metric, mean_metric
from liquidfusion.bench.tasks import ruler_data, ruler_documents
from liquidfusion.bench.tasks.answering import Prompt, answer, answered, balanced, compose, costs, grouped, only
from liquidfusion.bench.tasks.task import Progress, Record, Task, scores
from liquidfusion.bench.texts import reference_text
from liquidfusion.exceptions import ConfigError

_GENERATED = tuple(name for name in ruler_data.TASKS if not name.startswith("qa_"))


def ruler(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: CacheMaker = CacheOptions(),  # noqa: B008 - frozen
    *,
    text: str | None = None,
    essays: str = "",
    squad: str = "",
    hotpotqa: str = "",
    subtasks: str = "",
    limit: int = 10,
    context: Sequence[int] = (4096,),
    question: str = "unseen",
    chat: bool = True,
    early: bool = True,
    chunk: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Record]:
    """Answer generated questions about needles, variables, words and documents at each length.

    Parameters
    ----------
    text
        The essay that needles are hidden in; None: the reference text of Python's standard library.
    essays
        A data set of the hub with a column ``text`` instead, read through ``datasets``.
    squad, hotpotqa
        The documents of ``qa_1`` and ``qa_2``: the JSON files that the data sets' authors publish, ``.jsonl`` files
        with rows as on the hub, or ``hub`` to read them there. Without, these two tasks are left out.
    subtasks
        Names with commas between them; empty: all that there is data for.
    limit
        Texts of each task and length; the original has 500.
    context
        Lengths in tokens: text, question, chat template and the tokens to write together.
    question
        ``"unseen"`` or ``"seen"`` while tokens are evicted.
    chat
        Ask through the tokenizer's chat template if it has one.
    early
        End an answer as soon as it contains everything that is looked for: the score cannot change any more.
    chunk
        Tokens of the text fed in one call; None: all at once, and evicted from once.
    batch_size
        Rows run together, padded on the left.

    Returns
    -------
    list of Record
        ``scores``: ``score``, 0 to 100, and what :func:`liquidfusion.bench.tasks.answering.answered` adds.

    Raises
    ------
    ConfigError
        A subtask is unknown or has no data, a length is too short, or a package is missing.
    """
    names = [name.strip() for name in subtasks.split(",") if name.strip()]
    given = {"qa_1": squad, "qa_2": hotpotqa}
    if not names:
        names = [*_GENERATED, *(name for name, source in given.items() if source)]
    for name in names:
        if name not in ruler_data.TASKS:
            raise ConfigError(f"subtask {name!r} is unknown; accepted: {', '.join(ruler_data.TASKS)}")
        if name in given and not given[name]:
            what = "squad" if name == "qa_1" else "hotpotqa"
            raise ConfigError(f"subtask {name} needs documents: {what}=FILE, or {what}=hub")
    sources = ruler_data.Sources(_haystack(text, essays), _documents(given, names))
    items = [
        (name, length, sample)
        for name in names
        for length in context
        for sample in texts(tokenizer, name, length, limit, sources=sources, chat=chat, seed=seed)
    ]
    prompts = [
        Prompt(
            *compose(tokenizer, sample.context, sample.question, sample.prefix, chat=chat),
            max_tokens=ruler_data.TASKS[name](length, len).tokens,
            until=_until(name, sample) if early else (),
        )
        for name, length, sample in items
    ]
    given_answers = answer(
        model,
        tokenizer,
        cache,
        prompts,
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
            score(name, one.text, sample.outputs),
            question=question,
            subtask=name,
            length=length,
            outputs=sample.outputs,
        )
        for (name, length, sample), prompt, one in zip(items, prompts, given_answers, strict=True)
    ]


def texts(
    tokenizer: Any, name: str, length: int, limit: int, *, sources: ruler_data.Sources, chat: bool, seed: int
) -> list[ruler_data.Sample]:
    """Return `limit` texts of one task that fill `length` tokens, the tokens to write included.

    Raises
    ------
    ConfigError
        The length is too short for the task.
    """
    rng = random.Random(f"{seed} {name} {length}")

    def count(part: str) -> int:
        return len(decoding.encode(tokenizer, part))

    generator = ruler_data.TASKS[name](length, count)
    frame = sum(map(len, compose(tokenizer, "", "", chat=chat)))

    def fits(sample: ruler_data.Sample) -> bool:
        return frame + count(sample.context + sample.question + sample.prefix) + generator.tokens <= length

    try:
        largest = ruler_data.fit(generator, fits, length, rng, sources)
    except ConfigError as error:
        raise ConfigError(f"{name} at context {length}: {error}") from error
    found: list[ruler_data.Sample] = []
    for _ in range(limit):
        size = largest
        while not fits(sample := generator.sample(size, rng, sources)):
            if size == 0:
                raise ConfigError(f"{name} at context {length}: the context is too short for this task")
            size -= max(1, size // 50)
        found.append(sample)
    return found


def _until(name: str, sample: ruler_data.Sample) -> tuple[str, ...]:
    """Return what an answer must contain for its full score; a question with several answers needs only one."""
    if name.startswith("qa_") and len(sample.outputs) > 1:
        return ()
    return tuple(sample.outputs)


def _haystack(text: str | None, essays: str) -> list[str]:
    if text is not None and essays:
        raise ConfigError("give a text or essays, not both")
    if essays:
        text = " ".join(str(row["text"]) for row in load_dataset(essays, None, "train", 1000))
    return (reference_text() if text is None else text).split()


def _documents(given: dict[str, str], names: Sequence[str]) -> dict[str, ruler_documents.Documents]:
    readers = {"qa_1": ruler_documents.squad, "qa_2": ruler_documents.hotpotqa}
    return {
        name: read(None if given[name] == "hub" else Path(given[name]), 2000)
        for name, read in readers.items()
        if name in names
    }


def score(name: str, text: str, outputs: Sequence[str]) -> float:
    """Return how much of what is looked for stands in an answer, 0 to 100, whatever its case.

    ``qa_*`` needs one of the outputs (the original's ``string_match_part``), every other task is scored by the share
    of outputs found (``string_match_all``); control characters count as line breaks.
    """
    text = "".join("\n" if letter < " " else letter for letter in text.strip()).strip().lower()
    found = [output.lower() in text for output in outputs]
    return 100.0 * (any(found) if name.startswith("qa_") else sum(found) / len(found))


def metrics(records: Sequence[Record], full: Sequence[Record] | None = None) -> dict[str, Metric]:
    """Return the mean over tasks and lengths, each task, each length if there are several, and what it took."""

    def mean(own: Sequence[Record], other: Sequence[Record] | None) -> Metric:
        one = balanced(own, "subtask", "length")
        if not other:
            return one
        return Metric(one.value, "%", one.low, one.high, balanced(other, "subtask", "length").value)

    found = {"ruler": mean(records, full)}
    lengths = sorted(grouped(records, "length"))
    for length in lengths if len(lengths) > 1 else []:
        found[f"ruler_{length}"] = mean(only(records, length=length) or [], only(full, length=length))
    for name, own in grouped(records, "subtask").items():
        found[name] = mean(own, only(full, subtask=name))
        for length in lengths if len(lengths) > 1 else []:
            part, other = only(own, length=length) or [], only(full, subtask=name, length=length)
            found[f"{name}_{length}"] = mean_metric(scores(part, "score") or [], "%", scores(other, "score") or None)
    return found | costs(records, full)


TASK = Task(
    name="ruler",
    summary="RULER's thirteen tasks: needles, variables, words and documents in texts of a chosen length",
    measure=ruler,
    metrics=metrics,
    reference=CacheOptions(strategy="full"),
    baseline=True,
    main="ruler",
)
