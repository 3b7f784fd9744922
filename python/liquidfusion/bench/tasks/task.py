"""What every task is: a measurement that returns records, and the figures computed from records."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from liquidfusion.bench.caches import CacheMaker
from liquidfusion.bench.stats import Metric

Record = dict[str, Any]
"""One request and its result, as it is stored: see :func:`record`."""

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


@dataclass(frozen=True, slots=True)
class Task:
    """A named measurement.

    Attributes
    ----------
    name, summary
        What the user types, and one line that says what it measures.
    measure
        Called with a model, a tokenizer, the cache options and keyword options; returns records.
    metrics
        Computes the figures from records and, if there are any, from the full cache's records of the same requests.
    reference
        The unbounded cache that the figures are compared with.
    baseline
        Whether the reference is measured, too, unless asked otherwise.
    main
        The metric to draw and rank by.
    lower
        Whether less of it is better.
    """

    name: str
    summary: str
    measure: Callable[..., list[Record]]
    metrics: Callable[[Sequence[Record], Sequence[Record] | None], dict[str, Metric]]
    reference: CacheMaker
    baseline: bool
    main: str
    lower: bool = False

    def options(self) -> dict[str, Any]:
        """Return name → default of the keyword options of `measure`."""
        parameters = inspect.signature(self.measure).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "progress"}


def record(
    prompt: str,
    scores: dict[str, Any],
    *,
    text: str = "",
    logprobs: dict[str, Any] | None = None,
    finish_reason: str = "length",
    temperature: float = 0.0,
    max_tokens: int = 0,
    seconds: float = 0.0,
    batch_size: int = 1,
    **request: Any,
) -> Record:
    """Return a request with its result in the form of a result file.

    Parameters
    ----------
    prompt
        What the model was given; long ones may be shortened with :func:`shorten`.
    scores
        What this request contributes to the figures.
    seconds, batch_size
        The time of the whole batch and its rows.
    request
        More facts about the request: its length, the depth of the needle, the reference answer.
    """
    return {
        "request": {"prompt": prompt, "temperature": temperature, "max_tokens": max_tokens, **request},
        "result": {
            "choices": [{"text": text, "logprobs": logprobs, "finish_reason": finish_reason}],
            "request_time": {"batch_time": seconds, "batch_size": batch_size},
            "scores": scores,
        },
    }


def shorten(text: str, edge: int = 200) -> str:
    """Return a text with its middle left out, if it is longer than twice `edge` characters."""
    return text if len(text) <= 2 * edge + 3 else f"{text[:edge]} … {text[-edge:]}"


def scores(records: Sequence[Record] | None, name: str) -> list[Any] | None:
    """Return one score of every record; None for no records."""
    return None if records is None else [item["result"]["scores"][name] for item in records]
