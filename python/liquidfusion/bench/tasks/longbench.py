"""``longbench``: LongBench, version 1 (21 data sets, each with its own score) and version 2 (multiple choice)."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from liquidfusion.bench.caches import CacheMaker, CacheOptions
from liquidfusion.bench.data import load_dataset, require
from liquidfusion.bench.stats import Metric, mean_metric
from liquidfusion.bench.tasks.answering import Prompt, answer, answered, balanced, compose, costs, grouped, only
from liquidfusion.bench.tasks.task import Progress, Record, Task, scores
from liquidfusion.bench.texts import read_jsonl
from liquidfusion.exceptions import ConfigError

_PLAIN = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
"""Data sets that the authors ask without a chat template."""

_FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
"""Data sets of whose answers only the first line counts."""

_V2 = (
    "Please read the following text and answer the question below.\n\n<text>\n{context}",
    "\n</text>\n\nWhat is the correct answer to this question: {question}\nChoices:\n(A) {choice_A}\n(B) {choice_B}\n"
    "(C) {choice_C}\n(D) {choice_D}\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".',
)
_V2_KEYS = ("context", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer")


@lru_cache(maxsize=1)
def subsets() -> dict[str, dict[str, Any]]:
    """Return name → ``template``, ``tokens`` to write and ``score`` of the data sets of version 1."""
    text = files("liquidfusion.bench.tasks").joinpath("longbench.yaml").read_text(encoding="utf8")
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return found


def longbench(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: CacheMaker = CacheOptions(),  # noqa: B008 - frozen
    *,
    data: Path | None = None,
    version: int = 1,
    subtasks: str = "qasper,hotpotqa,trec",
    limit: int = 20,
    context: int | None = None,
    question: str = "unseen",
    chat: bool = True,
    chunk: int | None = None,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> list[Record]:
    """Answer questions about long texts that people wrote.

    Parameters
    ----------
    data
        A ``.jsonl`` file with the rows of the data sets as their authors publish them: ``input``, ``context``,
        ``answers``, ``all_classes`` and ``dataset``, or those of version 2. None: read through ``datasets``.
    version
        1 or 2; a file of version 2's rows is known by its columns.
    subtasks
        Data sets of version 1 with commas between them.
    limit
        Rows of each data set, from the first on.
    context
        Tokens of a prompt at most, its middle left out; None: the positions of the model less the answer's tokens.
    question
        ``"unseen"`` or ``"seen"`` while tokens are evicted: what stands after the text in the authors' prompt.
    chat
        Ask through the tokenizer's chat template if it has one, where the authors do.
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
        The data cannot be read, a data set is unknown, or a package is missing.
    """
    rows = _rows(data, version, [name.strip() for name in subtasks.split(",") if name.strip()], limit)
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**31
    prompts = []
    for name, row in rows:
        told, asked, tokens = _parts(name, row)
        most = (context or positions) - tokens
        prompts.append(
            Prompt(*_shortened(*compose(tokenizer, told, asked, chat=chat and name not in _PLAIN), most), tokens)
        )
    given = answer(
        model, tokenizer, cache, prompts, chunk=chunk, batch_size=batch_size, question=question, progress=progress
    )
    return [
        answered(
            model,
            tokenizer,
            prompt,
            one,
            score(name, one.text, row),
            question=question,
            subtask=name,
            length=row.get("length"),
            outputs=row["answers"] if "answers" in row else [row["answer"]],
        )
        for (name, row), prompt, one in zip(rows, prompts, given, strict=True)
    ]


def _rows(data: Path | None, version: int, names: list[str], limit: int) -> list[tuple[str, dict[str, Any]]]:
    if version not in (1, 2):
        raise ConfigError(f"version {version} is unknown; accepted: 1, 2")
    if data is None and version == 2:
        return [("v2", row) for row in load_dataset("THUDM/LongBench-v2", None, "train", limit)]
    for name in names:
        if name not in subsets():
            raise ConfigError(f"subtask {name!r} is unknown; accepted: {', '.join(subsets())}")
    if data is None:
        return [(name, row) for name in names for row in load_dataset("THUDM/LongBench", name, "test", limit)]
    rows = read_jsonl(data, ("context",))
    if all(key in rows[0] for key in _V2_KEYS):
        return [("v2", row) for row in rows[:limit]]
    missing = [key for key in ("input", "context", "answers") if key not in rows[0]]
    if missing:
        raise ConfigError(f"{data}: each object needs input, context and answers, or version 2's {', '.join(_V2_KEYS)}")
    found: list[tuple[str, dict[str, Any]]] = []
    for row in rows:
        name = str(row.get("dataset", names[0] if len(names) == 1 else "")).removesuffix("_e")
        if name in names and sum(name == other for other, _ in found) < limit:
            found.append((name, row))
    if not found:
        raise ConfigError(f"{data} has no row of {', '.join(names)}; a row names its data set with the key dataset")
    return found


def _parts(name: str, row: dict[str, Any]) -> tuple[str, str, int]:
    """Return what is read, what is asked after it, and the tokens to write."""
    if name == "v2":
        known = {key: str(row[key]).strip() for key in _V2_KEYS}
        told, asked = _V2
        fields = ["question", *(key for key in _V2_KEYS if key.startswith("choice_"))]
        for key in fields:
            asked = asked.replace(f"{{{key}}}", known[key])
        return told.replace("{context}", known["context"]), asked, 128
    entry = subsets()[name]
    before, _, after = entry["template"].partition("{context}")
    return before + str(row["context"]), after.replace("{input}", str(row["input"])), int(entry["tokens"])


def _shortened(context: list[int], question: list[int], most: int) -> tuple[list[int], list[int]]:
    """Return a prompt of at most `most` tokens, the first and the last half of them kept as the authors do."""
    if len(context) + len(question) <= most:
        return context, question
    half = most // 2
    if half <= len(question):
        raise ConfigError(f"context {most} has no room for a question of {len(question)} tokens")
    return context[:half] + context[len(context) - (half - len(question)) :], question


def score(name: str, text: str, row: dict[str, Any]) -> float:
    """Return the score of an answer, 0 to 100: the best over the reference answers, by the data set's own measure."""
    if name == "v2":
        plain = text.replace("*", "")
        match = re.search(r"The correct answer is \(([A-D])\)", plain) or re.search(
            r"The correct answer is ([A-D])", plain
        )
        return 100.0 * (match is not None and match[1] == row["answer"])
    if name in _FIRST_LINE:
        text = text.lstrip("\n").split("\n")[0]
    measure = SCORES[subsets()[name]["score"]]
    return 100.0 * max((measure(text, str(truth), row.get("all_classes") or []) for truth in row["answers"]), default=0)


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def _plain(text: str) -> list[str]:
    """Return the words of a text without case, punctuation and articles."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _chinese(text: str) -> list[str]:
    cut: list[str] = list(require("jieba", "jieba").cut(text, cut_all=False))
    return cut


def _f1_chinese(text: str, truth: str, _: Sequence[str]) -> float:
    # Han characters, letters and digits count; what else a piece holds is punctuation or space.
    pieces = [["".join(filter(str.isalnum, piece.lower())) for piece in _chinese(part)] for part in (text, truth)]
    found, wanted = ([piece for piece in part if piece] for part in pieces)
    return _f1(found, wanted)


def _rouge(text: str, truth: str, _: Sequence[str]) -> float:
    try:
        return float(require("rouge", "rouge").Rouge().get_scores([text], [truth], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):  # an empty answer
        return 0.0


def _rouge_chinese(text: str, truth: str, _: Sequence[str]) -> float:
    return _rouge(" ".join(_chinese(text)), " ".join(_chinese(truth)), _)


def _count(text: str, truth: str, _: Sequence[str]) -> float:
    numbers = re.findall(r"\d+", text)
    return numbers.count(truth.strip()) / len(numbers) if numbers else 0.0


def _paragraph(text: str, truth: str, _: Sequence[str]) -> float:
    numbers = re.findall(r"\d+", truth)
    return _count(text, numbers[0] if numbers else "", _)


def _classes(text: str, truth: str, classes: Sequence[str]) -> float:
    named = [name for name in classes if name in text]
    # A class whose name is a part of the right one's is not held against an answer. As in the authors' loop, which
    # takes names out of the list that it walks, the one after a name that was taken out stays.
    at = 0
    while at < len(named):
        if named[at] in truth and named[at] != truth:
            del named[at]
        at += 1
    return 1 / len(named) if truth in named else 0.0


def _code(text: str, truth: str, _: Sequence[str]) -> float:
    lines = (line for line in text.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//")))
    return round(100 * SequenceMatcher(None, next(lines, ""), truth).ratio()) / 100


SCORES: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "f1": lambda text, truth, _: _f1(_plain(text), _plain(truth)),
    "f1_zh": _f1_chinese,
    "rouge": _rouge,
    "rouge_zh": _rouge_chinese,
    "count": _count,
    "paragraph": _paragraph,
    "classes": _classes,
    "code": _code,
}
"""Measure → its function of answer, reference and classes, 0 to 1, by the definitions in the authors' metrics."""


def metrics(records: Sequence[Record], full: Sequence[Record] | None = None) -> dict[str, Metric]:
    """Return the mean over data sets, each data set, and what it took."""
    mean = balanced(records, "subtask")
    other = balanced(full, "subtask").value if full else None
    found = {"longbench": Metric(mean.value, "%", mean.low, mean.high, other)}
    for name, own in grouped(records, "subtask").items():
        found[name] = mean_metric(scores(own, "score") or [], "%", scores(only(full, subtask=name), "score"))
    return found | costs(records, full)


TASK = Task(
    name="longbench",
    summary="LongBench, version 1 or 2: questions about long texts that people wrote",
    measure=longbench,
    metrics=metrics,
    reference=CacheOptions(strategy="full"),
    baseline=True,
    main="longbench",
)
