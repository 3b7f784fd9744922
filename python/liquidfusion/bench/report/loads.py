"""Sections of the report for runs of `load`."""

from collections.abc import Sequence
from typing import Any

from liquidfusion.bench.report.charts import Section
from liquidfusion.bench.terminal.output import number

_PERCENTILES = ("p50", "p90", "p99")


def loads(documents: Sequence[dict[str, Any]]) -> list[Section]:
    """Return a section for each model whose server was put under load."""
    models = dict.fromkeys(document["metadata"]["model_name"] for document in documents)
    return [_section(model, [d for d in documents if d["metadata"]["model_name"] == model]) for model in models]


def _section(model: str, documents: Sequence[dict[str, Any]]) -> Section:
    header = ["load", "prompt, answer", "answered", "refused", "failed", "requests/s", "tokens/s"]
    header += ["first token, ms", "between tokens, ms", "last token, ms"]
    body = []
    for document in documents:
        options, metrics = document["metadata"]["task_options"], document["metrics"]
        counts = [number(metrics[name]["value"]) for name in ("answered", "refused", "failed")]
        rates = [number(metrics[name]["value"]) for name in ("requests_per_second", "tokens_per_second")]
        names = ("time_to_first_token", "between_tokens", "time_to_last_token")
        lengths = options["trace"] or f"{options['prompt_tokens']}, {options['max_tokens']}"
        body.append([_label(options), lengths, *counts, *rates, *(_percentiles(metrics, name) for name in names)])
    summary = "What the senders of many requests saw; times count from when a request was due."
    return Section("load", model, summary, {}, f"times as {' / '.join(_PERCENTILES)}", header, body)


def _label(options: dict[str, Any]) -> str:
    if options["concurrency"] is not None:
        return f"{options['concurrency']} at once"
    return "trace" if options["trace"] else f"{options['rate']:g} requests/s"


def _percentiles(metrics: dict[str, Any], name: str) -> str:
    found = [metrics.get(f"{name}_{percent}") for percent in _PERCENTILES]
    return " / ".join("-" if metric is None else number(metric["value"]) for metric in found)
