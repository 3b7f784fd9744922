"""``reasoning``: long answers worked out step by step, so that tokens are evicted while the model writes."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from liquidfusion.bench.caches import CacheMaker, CacheOptions
from liquidfusion.bench.data import load_dataset
from liquidfusion.bench.stats import Metric
from liquidfusion.bench.tasks.answering import Prompt, answer, answered, balanced, compose, costs
from liquidfusion.bench.tasks.task import Progress, Record, Task, scores
from liquidfusion.bench.texts import read_jsonl
from liquidfusion.exceptions import ConfigError


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem as the model is given it, and its answer."""

    told: str
    truth: str


_BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."

DATASETS = {
    "gsm8k": ("openai/gsm8k", "main", "test", "question", "answer"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "aime": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    "aime25": ("math-ai/aime25", None, "test", "problem", "answer"),
}
"""Name → hub id, configuration, split, column of the problem, column of the answer."""

_FIELDS = (("question", "answer"), ("problem", "answer"), ("Problem", "answer"))


def reasoning(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: CacheMaker = CacheOptions(),  # noqa: B008 - frozen
    *,
    data: Path | None = None,
    dataset: str = "arithmetic",
    limit: int = 16,
    terms: int = 16,
    examples: int = 3,
    max_tokens: int = 512,
    chat: bool = True,
    chunk: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Record]:
    """Solve problems and count exact answers; a budget in tokens bounds prompt and answer together.

    Parameters
    ----------
    data
        A ``.jsonl`` file whose objects have ``question`` or ``problem``, and ``answer``.
    dataset
        ``"arithmetic"``, generated; or, without `data`, a name from :data:`DATASETS`, read through ``datasets``.
    limit
        Problems.
    terms
        Numbers to add in a generated problem: each takes about ten tokens of the answer.
    examples
        Generated problems shown with their solution before the one to solve.
    max_tokens
        Tokens to write at most.
    chat
        Ask through the tokenizer's chat template if it has one; generated problems are continued without it.
    chunk
        Prompt tokens fed in one call; None: all at once.
    batch_size
        Problems solved together, padded on the left.

    Returns
    -------
    list of Record
        ``scores``: ``score``, 100 for the exact answer and 0 otherwise, and what
        :func:`liquidfusion.bench.tasks.answering.answered` adds.

    Raises
    ------
    ConfigError
        The data cannot be read, or an option is out of range.
    """
    generated = data is None and dataset == "arithmetic"
    problems = _arithmetic(limit, terms, examples, random.Random(seed)) if generated else _read(data, dataset, limit)
    prompts = []
    for problem in problems:
        context, rest = compose(tokenizer, problem.told, "", chat=chat and not generated)
        both = context + rest
        # The problem is known before anything is written: only its last token comes after the others.
        prompts.append(Prompt(both[:-1], both[-1:], max_tokens, stop=("\n\n",) if generated else ()))
    given = answer(model, tokenizer, cache, prompts, chunk=chunk, batch_size=batch_size, progress=progress)
    return [
        answered(
            model,
            tokenizer,
            prompt,
            one,
            100.0 * same(one.text, problem.truth),
            question="seen",
            outputs=[problem.truth],
        )
        for problem, prompt, one in zip(problems, prompts, given, strict=True)
    ]


def _arithmetic(limit: int, terms: int, examples: int, rng: random.Random) -> list[Problem]:
    if terms < 2:
        raise ConfigError(f"terms {terms} is not at least 2")
    if examples < 0:
        raise ConfigError(f"examples {examples} is negative")

    def one() -> tuple[str, str, str]:
        numbers = [rng.randint(1, 9) for _ in range(terms)]
        steps, total = [], numbers[0]
        for number in numbers[1:]:
            steps.append(f"{total} + {number} = {total + number}")
            total += number
        return f"Problem: {' + '.join(map(str, numbers))} = ?\nSteps:", "; ".join(steps), str(total)

    found = []
    for _ in range(limit):
        shown = "".join(
            f"{asked} {steps}. Answer: {total}\n\n" for asked, steps, total in (one() for _ in range(examples))
        )
        asked, _, total = one()
        found.append(Problem(shown + asked, total))
    return found


def _read(data: Path | None, dataset: str, limit: int) -> list[Problem]:
    if data is not None:
        rows = read_jsonl(data, ("answer",), limit)
        found = next((pair for pair in _FIELDS if all(pair[0] in row for row in rows)), None)
        if found is None:
            raise ConfigError(f"{data}: each object needs question or problem, and answer")
        asked, truth = found
    elif dataset in DATASETS:
        hub_id, name, split, asked, truth = DATASETS[dataset]
        rows = load_dataset(hub_id, name, split, limit)
    else:
        raise ConfigError(
            f"dataset {dataset!r} is unknown; accepted: arithmetic, {', '.join(DATASETS)}, or a .jsonl file"
        )
    return [Problem(str(row[asked]).strip() + _BOXED, final(str(row[truth]))) for row in rows]


def final(text: str) -> str:
    r"""Return the final answer of a solution: after ``####`` (GSM8K), in the last ``\boxed{…}``, or the whole text."""
    if "####" in text:
        return text.rsplit("####", 1)[1].strip()
    found = boxed(text)
    return text.strip() if found is None else found


def boxed(text: str) -> str | None:
    r"""Return what stands in the last ``\boxed{…}`` of a text, brackets within it counted; None without one."""
    at = text.rfind("\\boxed{")
    if at < 0:
        return None
    depth, begin = 1, at + len("\\boxed{")
    for end in range(begin, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[begin:end].strip()
    return None


def same(text: str, truth: str) -> bool:
    """Whether an answer is the right one: in its box, after ``Answer:``, or else its last number."""
    found = boxed(text)
    if found is None and "Answer:" in text:
        found = text.rsplit("Answer:", 1)[1].strip().split("\n")[0].rstrip(". ")
    if found is None:
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        found = numbers[-1] if numbers else ""
    return _normal(found) == _normal(truth)


def _normal(answer: str) -> str:
    """Return an answer without what may be written in two ways: spaces, dollar signs, commas in numbers, sizes."""
    for mark in ("\\left", "\\right", "\\!", "\\,", "\\ ", "\\$", "$", "^\\circ", "^{\\circ}", "\\%", "%"):
        answer = answer.replace(mark, "")
    answer = answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    answer = re.sub(r"\\text\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", "".join(answer.split())).rstrip(".")
    if re.fullmatch(r"-?\d+(\.\d+)?", answer):
        value = float(answer)
        return str(int(value)) if value == int(value) else str(value)
    return answer


def metrics(records: Sequence[Record], full: Sequence[Record] | None = None) -> dict[str, Metric]:
    """Return the share of exact answers, how long answers are, tokens a second, and what it took."""

    def speed(items: Sequence[Record]) -> float:
        times = [item["result"]["request_time"] for item in items]
        written = sum(scores(items, "tokens") or [])
        seconds = sum(t["batch_time"] / t["batch_size"] for t in times)
        return float(written / seconds) if seconds else 0.0

    mean = balanced(records)
    other = balanced(full).value if full else None
    return {
        "reasoning": Metric(mean.value, "%", mean.low, mean.high, other),
        "tokens_per_second": Metric(speed(records), "tokens/s", full=speed(full) if full else None),
        "answer_tokens": Metric(float(np.mean(scores(records, "tokens") or [])), "tokens"),
        **costs(records, full),
    }


TASK = Task(
    name="reasoning",
    summary="long answers worked out step by step: generated arithmetic, GSM8K, MATH-500, AIME",
    measure=reasoning,
    metrics=metrics,
    reference=CacheOptions(strategy="full"),
    baseline=True,
    main="reasoning",
)
