"""The parts of a report that `speed`, `stream` and `load` fill: time and throughput, a stream as it goes, a server."""

import math
import re
from collections.abc import Sequence
from typing import Any

from liquidfusion.bench.report.charts import Chart, Point, Section, Series, short
from liquidfusion.bench.report.rows import conditions, settings
from liquidfusion.bench.report.sections import look
from liquidfusion.bench.terminal.output import number

_CACHES = ("KVCache, compiled graph", "KVCache, graph", "DynamicCache", "StaticCache, compiled")
_GRAPH = "replayed from a CUDA graph"
_FLOOR = "floor of a step with one row, weights and slots read once at a copy's rate, ms"
_OLDER = {
    r"floor B=1, ms": _FLOOR,
    r"ours, graph, ms": f"a step of KVCache with one row, {_GRAPH}, ms",
    r"ours, compile, ms": f"a step of KVCache with one row, compiled and {_GRAPH}, ms",
    r"DynamicCache (\d+), ms": r"a step of DynamicCache with one row at \1 tokens, ms",
    r"StaticCache\+compile (\d+), ms": r"a step of StaticCache with one row at \1 tokens, compiled, ms",
    r"B=(\d+), graph, tokens/s": rf"throughput of KVCache with \1 rows, {_GRAPH}, tokens/s",
    r"B=(\d+), compile, tokens/s": rf"throughput of KVCache with \1 rows, compiled and {_GRAPH}, tokens/s",
    r"(Dynamic|Static)Cache B=(\d+) at (\d+), tokens/s": r"throughput of \1Cache with \2 rows at \3 tokens, tokens/s",
}
"""Names that figures had in older files, and what they are called now."""

_CACHE = r"(?P<cache>\w+Cache)(?:\(.*\))? with (?P<rows>one row|\d+ rows)(?: at (?P<context>\d+) tokens)?"
_HOW = rf"(?P<compiled>, compiled)?(?:(?:,| and) (?P<graph>{_GRAPH}))?"
_STEP = re.compile(rf"a step of {_CACHE}{_HOW}, ms")
_THROUGHPUT = re.compile(rf"throughput of {_CACHE}{_HOW}, tokens/s")
_ROOFLINE = re.compile(r"roofline of any exact engine at (\d+) tokens, (one row|\d+ rows) in memory, tokens/s")


def speed(document: dict[str, Any]) -> Section:
    """Return the section of a result of ``speed``."""
    metadata = document["metadata"]
    figures = {_name(name): value for name, value in document["figures"].items() if value is not None}
    model = str(metadata["model_name"])
    charts = {
        f"speed-{model}-decode": _decode(model, figures, metadata["contexts"]),
        f"speed-{model}-throughput": _throughput(model, figures),
    }
    failures = [[name, f"failed: {reason}"] for name, reason in document["failures"].items()]
    return Section(
        "speed",
        f"{model}, random weights, budget {metadata['budget']}{_bits(metadata)}, {metadata['dtype']}",
        "Time decode and prefill beside transformers' own caches. A bounded step costs the same at every context.",
        {stem: chart for stem, chart in charts.items() if chart.series},
        "medians",
        ["figure", "value"],
        [[name, f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"] for name, value in figures.items()] + failures,
    )


def _bits(metadata: dict[str, Any]) -> str:
    bits = metadata.get("bits")
    return "" if bits is None else f" at {' and '.join(map(str, bits)) if isinstance(bits, list) else bits} bits"


def _name(figure: str) -> str:
    """Return what a figure is called now."""
    for older, now in _OLDER.items():
        if match := re.fullmatch(older, figure):
            return match.expand(now)
    return figure


def _decode(model: str, figures: dict[str, float], contexts: Sequence[int]) -> Chart:
    lines: dict[str, list[Point]] = {name: [] for name in _CACHES}
    for name, value in figures.items():
        if match := _STEP.fullmatch(name):
            at = sorted(contexts) if match["context"] is None else [int(match["context"])]
            lines.setdefault(_label(match), []).extend(Point(float(context), value) for context in at)
    floor = figures.get(_FLOOR)
    reference = None if floor is None else ("floor: read weights and slots", Point(0.0, floor))
    return Chart(
        f"decode step of one sequence, {model}",
        "context (tokens)",
        "ms per token",
        _series(lines),
        reference,
        zero=True,
    )


def _throughput(model: str, figures: dict[str, float]) -> Chart:
    lines: dict[str, list[Point]] = {name: [] for name in _CACHES}
    for name, value in figures.items():
        if match := _THROUGHPUT.fullmatch(name):
            at = "" if match["context"] is None else f" at {short(int(match['context']))}"
            lines.setdefault(_label(match) + at, []).append(Point(_rows(match["rows"]), value))
        elif (match := _ROOFLINE.fullmatch(name)) and value > 0:
            label = f"roofline of any exact engine at {short(int(match[1]))}"
            lines.setdefault(label, []).append(Point(_rows(match[2]), value))
    return Chart(f"throughput, {model}", "sequences at once", "tokens/s", _series(lines), zero=True)


def _label(match: re.Match[str]) -> str:
    how = " ".join(word for word, group in (("compiled", "compiled"), ("graph", "graph")) if match[group])
    return f"{match['cache']}, {how}" if how else match["cache"]


def _rows(words: str) -> float:
    return 1.0 if words == "one row" else float(words.split()[0])


def _series(lines: dict[str, list[Point]]) -> list[Series]:
    return [
        Series(name, sorted(points, key=lambda point: point.x), look)
        for look, (name, points) in enumerate(lines.items())
        if points
    ]


def streams(documents: Sequence[dict[str, Any]]) -> list[Section]:
    """Return a section for each model whose streams were measured."""
    models = dict.fromkeys(document["metadata"]["model_name"] for document in documents)
    return [_stream(model, [d for d in documents if d["metadata"]["model_name"] == model]) for model in models]


def _stream(model: str, documents: Sequence[dict[str, Any]]) -> Section:
    kinds = (
        ("perplexity", "perplexity", "perplexity of each stretch", 1.0, False),
        ("step_ms", "ms per call", "time of a call", 1.0, True),
        ("resident_bytes", "memory in use (MiB)", "memory", 2.0**20, True),
    )
    charts, labels = {}, _labels(documents)
    for name, label, title, scale, zero in kinds:
        lines = []
        for at, document in enumerate(documents):
            points = [
                Point(float(row["tokens"]), row[name] / scale) for row in document["windows"] if row[name] is not None
            ]
            if points:
                lines.append(Series(labels[at], points, look(document["metadata"]["strategy"]), at))
        if lines:
            charts[f"stream-{model.replace('/', '-')}-{name}"] = Chart(
                f"{title}, {model}", "tokens fed", label, lines, log=False, zero=zero
            )
    header = ["cache", "tokens", "perplexity", "ms per call, first", "ms per call, last", "cache", "peak"]
    body = []
    for label, document in zip(labels, documents, strict=True):
        rows = document["windows"]
        body.append(
            [
                label,
                number(rows[-1]["tokens"]),
                number(_perplexity(rows)),
                number(rows[0]["step_ms"]),
                number(rows[-1]["step_ms"]),
                number(rows[-1]["cache_bytes"], "bytes"),
                number(rows[-1]["peak_bytes"], "bytes"),
            ]
        )
    summary = "A text without end goes through one cache."
    return Section("stream", model, summary, charts, "perplexity of the whole text, time and memory", header, body)


def _perplexity(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return the perplexity of all stretches together; None if one of them is not a number."""
    if any(row["perplexity"] is None for row in rows):
        return None
    ends = [0, *(row["tokens"] for row in rows)]
    loss = sum(math.log(row["perplexity"]) * (row["tokens"] - end) for row, end in zip(rows, ends, strict=False))
    return math.exp(loss / ends[-1])


def _labels(documents: Sequence[dict[str, Any]]) -> list[str]:
    """Return a name for each stream: strategy and budget, and whatever else tells it from the others."""
    told = [dict(settings(d["metadata"])) | dict(conditions(d["metadata"])) for d in documents]
    names = [name for name in dict.fromkeys(n for facts in told for n in facts) if len({f.get(name) for f in told}) > 1]
    found = []
    for document, facts in zip(documents, told, strict=True):
        used, strategy = document["metadata"]["budgets_used"], document["metadata"]["strategy"]
        words = [f"{name} {facts[name]}" for name in names if name in facts and not _own(name, document, documents)]
        found.append(", ".join([strategy, f"{used[0]} tokens" if used else "all tokens", *words]))
    return found


def _own(name: str, document: dict[str, Any], documents: Sequence[dict[str, Any]]) -> bool:
    """Whether a parameter is the same for all streams of a strategy: then its name says enough."""
    alike = [d for d in documents if d["metadata"]["strategy"] == document["metadata"]["strategy"]]
    return len({(dict(settings(d["metadata"])) | dict(conditions(d["metadata"]))).get(name) for d in alike}) == 1


def loads(documents: Sequence[dict[str, Any]]) -> list[Section]:
    """Return a section of every server that `load` measured: one line for each run."""
    if not documents:
        return []
    told = [{"model": d["metadata"]["model_name"]} | (d["metadata"].get("task_options") or {}) for d in documents]
    names = [
        name for name in dict.fromkeys(n for facts in told for n in facts) if len({str(f.get(name)) for f in told}) > 1
    ]
    figures = ["requests_per_second", "tokens_per_second", "time_to_first_token_p50", "time_to_first_token_p99"]
    figures += ["between_tokens_p50", "between_tokens_p99", "refused", "failed"]
    body = []
    for document, facts in zip(documents, told, strict=True):
        label = ", ".join(
            [str(facts["model"]), *(f"{n} {facts[n]}" for n in names if facts.get(n) is not None and n != "model")]
        )
        metrics = document["metrics"]
        cells = [number(m["value"], m["unit"]) if (m := metrics.get(name)) else "" for name in figures]
        body.append([label, *cells])
    header = ["server", *(name.replace("_", " ") for name in figures)]
    return [
        Section("load", "servers", "Requests as users send them.", {}, "of the requests that were served", header, body)
    ]
