"""``choice``: pick the likeliest of several continuations, as COPA, PIQA, HellaSwag and MMLU ask for."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from liquidfusion.bench import decoding
from liquidfusion.bench.caches import CacheMaker, CacheOptions, facts
from liquidfusion.bench.data import load_dataset
from liquidfusion.bench.stats import Metric, mean_metric
from liquidfusion.bench.tasks.task import Progress, Record, Task, record, scores
from liquidfusion.bench.texts import read_jsonl
from liquidfusion.exceptions import ConfigError


@dataclass(frozen=True, slots=True)
class Question:
    """A context, its possible continuations (each with its leading space) and the index of the right one."""

    context: str
    choices: list[str]
    label: int


def _copa(row: dict[str, Any]) -> Question:
    link = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [f" {row[key][0].lower()}{row[key][1:]}" for key in ("choice1", "choice2")]
    return Question(f"{row['premise'].strip().rstrip('.')} {link}", choices, int(row["label"]))


def _piqa(row: dict[str, Any]) -> Question:
    choices = [f" {row['sol1'].strip()}", f" {row['sol2'].strip()}"]
    return Question(f"Question: {row['goal'].strip()}\nAnswer:", choices, int(row["label"]))


def _hellaswag(row: dict[str, Any]) -> Question:
    context = _clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return Question(context, [f" {_clean(ending)}" for ending in row["endings"]], int(row["label"]))


def _mmlu(row: dict[str, Any]) -> Question:
    letters = "ABCDEFGH"[: len(row["choices"])]
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, row["choices"], strict=True))
    return Question(
        f"{row['question'].strip()}\n{listed}\nAnswer:", [f" {letter}" for letter in letters], int(row["answer"])
    )


def _plain(row: dict[str, Any]) -> Question:
    choices = [text if text[:1].isspace() else f" {text}" for text in map(str, row["choices"])]
    return Question(str(row["context"]), choices, int(row["label"]))


def _clean(text: str) -> str:
    """Drop the marks that HellaSwag's source, WikiHow, left in its sentences."""
    return re.sub(r" {2,}", " ", re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))).strip()


_Row = Callable[[dict[str, Any]], Question]
DATASETS: dict[str, tuple[str, str | None, str, tuple[str, ...], _Row]] = {
    "copa": ("aps/super_glue", "copa", "validation", ("premise", "question", "choice1", "choice2", "label"), _copa),
    "piqa": ("baber/piqa", None, "validation", ("goal", "sol1", "sol2", "label"), _piqa),
    "hellaswag": (
        "Rowan/hellaswag",
        None,
        "validation",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        _hellaswag,
    ),
    "mmlu": ("cais/mmlu", "all", "test", ("question", "choices", "answer"), _mmlu),
}
"""Name → hub id, configuration, split, columns, and the question made of a row. Prompts as in lm-evaluation-harness."""


def choice(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: CacheMaker = CacheOptions(),  # noqa: B008 - frozen
    *,
    data: Path | None = None,
    dataset: str = "copa",
    limit: int = 100,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Score every continuation of each question; the likeliest per character is the model's choice.

    The context is read first and evicted from, then the choices are scored, so eviction does not know them.

    Parameters
    ----------
    data
        A ``.jsonl`` file whose objects have ``context``, ``choices`` and ``label`` (the index of the right choice), or
        the columns of `dataset`.
    dataset
        A name from :data:`DATASETS`; without `data` it is read through the package ``datasets``.
    limit
        Questions, from the first on.
    chunk
        Context tokens fed in one call; None: all at once.

    Returns
    -------
    list of Record
        ``scores``: ``accuracy`` (unnormalised), ``accuracy_normalised`` (by the length in characters), and the
        ``loglikelihoods`` of the choices.

    Raises
    ------
    ConfigError
        The data cannot be read, or a label names no choice.
    """
    if dataset not in DATASETS:
        raise ConfigError(f"dataset {dataset!r} is unknown; accepted: {', '.join(DATASETS)}")
    questions = _read(data, dataset, limit)
    records = []
    for number, question in enumerate(questions, 1):
        if not 0 <= question.label < len(question.choices):
            raise ConfigError(
                f"question {number}: label {question.label} names none of {len(question.choices)} choices"
            )
        start = time.perf_counter()
        values, held = _score(model, tokenizer, cache, question, chunk)
        lengths = [max(1, len(text.strip())) for text in question.choices]
        best = max(range(len(values)), key=values.__getitem__)
        normalised = max(range(len(values)), key=lambda index: values[index] / lengths[index])
        records.append(
            record(
                question.context,
                {
                    "accuracy_normalised": float(normalised == question.label),
                    "accuracy": float(best == question.label),
                    "loglikelihoods": values,
                    **held,
                },
                text=question.choices[normalised],
                finish_reason="stop",
                seconds=time.perf_counter() - start,
                choices=question.choices,
                label=question.label,
            )
        )
        if progress is not None:
            progress(number, len(questions))
    return records


def _read(data: Path | None, dataset: str, limit: int) -> list[Question]:
    hub_id, name, split, columns, question = DATASETS[dataset]
    if data is None:
        return [question(row) for row in load_dataset(hub_id, name, split, limit)]
    rows = read_jsonl(data, (), limit)
    if all(row.keys() >= {"context", "choices", "label"} for row in rows):
        return [_plain(row) for row in rows]
    if all(row.keys() >= set(columns) for row in rows):
        return [question(row) for row in rows]
    raise ConfigError(f"{data}: each object needs context, choices and label, or {dataset}'s {', '.join(columns)}")


def _score(
    model: PreTrainedModel, tokenizer: Any, cache: CacheMaker, question: Question, chunk: int | None
) -> tuple[list[float], dict[str, Any]]:
    """Return the log-likelihood of each choice, and facts about the cache."""
    # Tokenised together with its context, as the model would see it: a boundary may fall differently alone.
    begin = decoding.prefix(tokenizer)
    context = begin + decoding.encode(tokenizer, question.context)
    tails = []
    for text in question.choices:
        both = begin + decoding.encode(tokenizer, question.context + text)
        same = both[: len(context)] == context and len(both) > len(context)
        tails.append(both[len(context) :] if same else decoding.encode(tokenizer, text))
    store = cache.make(model, len(context))
    stream = decoding.Stream(model, store)
    device = model.device
    first = stream.feed_chunks(torch.tensor([context] * len(tails), device=device), chunk=chunk)
    longest = max(map(len, tails))
    ids = torch.tensor([tail + [0] * (longest - len(tail)) for tail in tails], device=device)
    mask = torch.tensor([[1] * len(tail) + [0] * (longest - len(tail)) for tail in tails], device=device)
    logits = first
    if longest > 1:
        logits = torch.cat((first, stream.feed(ids[:, :-1], mask[:, :-1])), 1)
    picked = logits.float().log_softmax(-1).gather(2, ids[..., None])[..., 0]
    return (picked * mask).sum(1).tolist(), facts(store)


def metrics(records: Sequence[Record], full: Sequence[Record] | None = None) -> dict[str, Metric]:
    """Return the share of right choices, with and without normalising by length."""
    return {
        name: mean_metric(scores(records, name) or [], "", scores(full, name))
        for name in ("accuracy_normalised", "accuracy")
    }


TASK = Task(
    name="choice",
    summary="pick the likeliest continuation: COPA, PIQA, HellaSwag, MMLU or your own",
    measure=choice,
    metrics=metrics,
    reference=CacheOptions(strategy="full"),
    baseline=True,
    main="accuracy_normalised",
)
