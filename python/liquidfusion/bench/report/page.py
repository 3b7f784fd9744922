"""``report``: from a directory of results to one HTML page, Markdown tables, and charts for papers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from liquidfusion import files
from liquidfusion.bench import results
from liquidfusion.bench.parameters import strategy_names
from liquidfusion.bench.report import curves
from liquidfusion.bench.report.charts import COLOURS, Chart, Point, Section, Series, short
from liquidfusion.bench.sweep.cells import REFERENCE
from liquidfusion.bench.tasks import TASKS
from liquidfusion.bench.terminal.output import number
from liquidfusion.exceptions import ConfigError

_UNBOUNDED = (REFERENCE, "full")
_NAMES = {REFERENCE: "transformers' cache", "full": "full cache"}


@dataclass(frozen=True, slots=True)
class Row:
    """One result: where it belongs, and its figures.

    Attributes
    ----------
    budget
        Tokens kept; None: all.
    context
        Tokens of the prompt, segment or haystack.
    metrics
        Name → ``value``, ``unit``, ``low``, ``high``, ``full``.
    """

    model: str
    task: str
    strategy: str
    label: str
    budget: int | None
    context: int
    metrics: dict[str, dict[str, Any]]
    document: dict[str, Any]

    @property
    def bounded(self) -> bool:
        """Whether the cache forgets."""
        return self.strategy not in _UNBOUNDED


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was found in a directory: results of tasks, of `speed` and of `stream`, and failures."""

    rows: list[Row]
    errors: list[dict[str, Any]]
    speeds: list[dict[str, Any]] = field(default_factory=list)
    streams: list[dict[str, Any]] = field(default_factory=list)

    def groups(self) -> dict[tuple[str, str], list[Row]]:
        """Return (model, task) → rows, in order of budget."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: (row.model, row.task, row.budget or 0, row.context)):
            found.setdefault((row.model, row.task), []).append(row)
        return found

    def sections(self) -> list[Section]:
        """Return the parts of the report, in the order in which they are shown."""
        tasks = [_section(model, task, rows) for (model, task), rows in self.groups().items()]
        return tasks + [curves.speed(document) for document in self.speeds] + curves.streams(self.streams)


def read(directory: Path) -> Report:
    """Read every result below a directory; of equal measurements the newest counts.

    Raises
    ------
    ConfigError
        The directory does not exist or holds no result.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: there is no such directory")
    rows: dict[tuple[Any, ...], Row] = {}
    speeds: dict[str, dict[str, Any]] = {}
    streams: dict[tuple[Any, ...], dict[str, Any]] = {}
    errors = []
    for path in sorted(directory.rglob("*.json"), key=lambda path: path.stat().st_mtime):
        try:
            document = json.loads(path.read_text(encoding="utf8"))
            if path.name.endswith(".error.json"):
                errors.append({"task": str(document["task"]), "error": str(document["error"])})
            elif "figures" in document:
                speeds[document["metadata"]["model_name"]] = document
            elif "windows" in document:
                facts = document["metadata"]
                streams[facts["model_name"], facts["strategy"], *facts["budgets_used"]] = document
            else:
                row = _row(document)
                rows[row.model, row.task, row.strategy, row.label, row.context] = row
        except (ValueError, KeyError, TypeError, IndexError):
            continue  # other people's JSON
    if not (rows or speeds or streams):
        raise ConfigError(
            f"{directory} holds no result; measure with: liquidfusion-bench sweep --output-dir {directory}"
        )
    return Report(list(rows.values()), errors, list(speeds.values()), list(streams.values()))


def _row(document: dict[str, Any]) -> Row:
    metadata, metrics = document["metadata"], document["metrics"]
    budgets = metadata["budgets_used"]
    request = document["results"][0]["request"]
    tokens = metrics["prompt_tokens"]["value"] if "prompt_tokens" in metrics else request.get("tokens")
    return Row(
        model=metadata["model_name"],
        task=metadata["task"],
        strategy=metadata["strategy"],
        label=results.size_label(metadata["cache_size"], metadata["budget"]),
        budget=round(sum(budgets) / len(budgets)) if budgets else None,
        context=int(tokens or request.get("length") or 0),
        metrics=metrics,
        document=document,
    )


def _section(model: str, task: str, rows: Sequence[Row]) -> Section:
    stem = f"{task}-{model.replace('/', '-')}"
    found: dict[str, Chart] = {}
    if task == "generate":
        found = _speed(stem, model, rows)
    elif task in TASKS:
        main = TASKS[task].main
        for context in sorted({row.context for row in rows}):
            alike = [row for row in rows if row.context == context]
            title = f"{main.replace('_', ' ')}{f' at {short(context)} tokens' if context else ''}, {model}"
            chart = _against_budget(title, alike, main, main.replace("_", " "))
            if chart is not None:
                found[f"{stem}-{main}-{context}"] = chart
    header, body = _grid(rows, task)
    summary = f"{TASKS[task].summary.capitalize()}." if task in TASKS else ""
    return Section(task, model, summary, found, f"{_main(task).replace('_', ' ')} ({_unit(rows, task)})", header, body)


def _point(row: Row, x: float, name: str, scale: float = 1.0) -> Point:
    metric = row.metrics[name]
    low, high = (None if metric[key] is None else metric[key] / scale for key in ("low", "high"))
    return Point(x, metric["value"] / scale, low, high)


def _lines(rows: Sequence[Row], name: str, *, by_context: bool = False, scale: float = 1.0) -> list[Series]:
    lines: dict[tuple[int, int], Series] = {}
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    for row in rows:
        if name not in row.metrics or (row.budget is None and not by_context):
            continue
        label, dash = _NAMES.get(row.strategy, row.strategy), None
        if by_context and row.budget is not None:
            label, dash = f"{row.strategy}, {row.budget} tokens", budgets.index(row.budget)
        x = float(row.context if by_context else row.budget or 0)
        key = (_look(row.strategy), dash or 0)
        lines.setdefault(key, Series(label, [], key[0], dash)).points.append(_point(row, x, name, scale))
    for line in lines.values():
        line.points.sort(key=lambda point: point.x)
    return [line for _, line in sorted(lines.items(), key=lambda item: item[0])]


def _look(strategy: str) -> int:
    """Return the number of a strategy's colour and marker."""
    known = [*strategy_names(), REFERENCE]
    return known.index(strategy) if strategy in known else len(known)


def _reference(rows: Sequence[Row], name: str, scale: float = 1.0) -> tuple[str, Point] | None:
    for strategy in _UNBOUNDED:
        for row in rows:
            if row.strategy == strategy and name in row.metrics:
                return _NAMES[strategy], _point(row, 0.0, name, scale)
    for row in rows:
        if name in row.metrics and row.metrics[name]["full"] is not None:
            return _NAMES["full"], Point(0.0, row.metrics[name]["full"] / scale)
    return None


def _against_budget(
    title: str, rows: Sequence[Row], name: str, y_label: str, *, scale: float = 1.0, zero: bool = False
) -> Chart | None:
    lines = _lines([row for row in rows if row.bounded], name, scale=scale)
    if not lines:
        return None
    reference = _reference(rows, name, scale)
    return Chart(title, "budget (tokens kept per layer and head)", y_label, lines, reference, zero=zero)


def _speed(stem: str, model: str, rows: Sequence[Row]) -> dict[str, Chart]:
    """Return charts of speed, memory and latency; against the context if several were measured, else the budget."""
    found: dict[str, Chart] = {}
    kinds = (("tokens_per_second", "tokens/s", 1.0), ("cache_bytes", "cache (MiB)", 2.0**20))
    several = len({row.context for row in rows}) > 1
    for name, label, scale in kinds:
        title = f"{'speed' if name == 'tokens_per_second' else 'memory'} of generation, {model}"
        chart = (
            Chart(title, "context (tokens)", label, _lines(rows, name, by_context=True, scale=scale), zero=True)
            if several
            else _against_budget(title, rows, name, label, scale=scale, zero=True)
        )
        if chart is not None and chart.series:
            found[f"{stem}-{name}"] = chart
    largest = max(row.context for row in rows)
    shown = [row for row in rows if row.context == largest and "latency_p50" in row.metrics]
    best: dict[str, Row] = {}
    for row in shown:  # of each strategy the largest budget
        best[row.strategy] = row
    if best:
        names = ["p50", "p90", "p99"]
        lines = [
            Series(
                _NAMES.get(row.strategy, f"{row.strategy}, {row.budget} tokens"),
                [Point(float(i), row.metrics[f"latency_{name}"]["value"]) for i, name in enumerate(names)],
                _look(row.strategy),
            )
            for row in best.values()
        ]
        title = f"latency of a token after {short(largest)} tokens, {model}"
        found[f"{stem}-latency"] = Chart(
            title, "percentile", "ms per token", lines, log=False, zero=True, categories=names
        )
    return found


def markdown(report: Report) -> str:
    """Return a table for each section; for a task strategies down, sizes across, its main figure with its interval."""
    parts = ["# Results", ""]
    for section in report.sections():
        parts += [f"## {section.title}, {section.subject}", "", section.caption, ""]
        parts += [f"| {' | '.join(section.header)} |", f"|{'---|' * len(section.header)}"]
        parts += [f"| {' | '.join(line)} |" for line in section.body] + [""]
    parts += [f"- failed: {error['task']}: {error['error']}" for error in report.errors]
    return "\n".join(parts).rstrip() + "\n"


def _main(task: str) -> str:
    return TASKS[task].main if task in TASKS else next(iter(TASKS.values())).main


def _unit(rows: Sequence[Row], task: str) -> str:
    main = _main(task)
    unit = next((row.metrics[main]["unit"] for row in rows if main in row.metrics), "")
    return f"{unit}, 95 % interval" if unit else "95 % interval"


def _grid(rows: Sequence[Row], task: str) -> tuple[list[str], list[list[str]]]:
    main = _main(task)
    columns = list(dict.fromkeys((row.budget, row.context) for row in rows if row.bounded))
    contexts = {row.context for row in rows}
    header = ["strategy"] + [
        f"{budget} tokens" + (f" of {context}" if len(contexts) > 1 else "") for budget, context in columns
    ]
    body = []
    for strategy in dict.fromkeys(row.strategy for row in rows):
        own = [row for row in rows if row.strategy == strategy and main in row.metrics]
        if not own:
            continue
        cells = {(row.budget, row.context): _cell(row.metrics[main]) for row in own}
        if not own[0].bounded:
            of = {row.context: _cell(row.metrics[main]) for row in own}
            cells = {(budget, context): of.get(context, "") for budget, context in columns} or {(None, 0): ""}
            if not columns:
                cells, header = {(None, 0): next(iter(of.values()))}, ["strategy", "all tokens"]
        body.append([_NAMES.get(strategy, strategy), *(cells.get(column, "") for column in columns or [(None, 0)])])
    return header, body


def _cell(metric: dict[str, Any]) -> str:
    text = number(metric["value"])
    return text if metric["low"] is None else f"{text} ({number(metric['low'])} to {number(metric['high'])})"


_STYLE = """
:root { color-scheme: light dark; %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: .5rem 0 } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem }
p { max-width: 46rem; margin: .3rem 0 } .soft { color: var(--soft) }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%%, 22rem), 1fr)); gap: 1rem }
figure { margin: 0; border: 1px solid var(--grid); border-radius: .5rem; padding: .3rem }
svg { display: block; width: 100%%; height: auto }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: .5rem 0; font-size: .9rem }
caption { text-align: left; color: var(--soft) }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper) }
""".strip()


def html(report: Report) -> str:
    """Return one page that needs nothing else: charts, tables, machine and failures."""
    light, dark = ("; ".join(f"--{name}: {pair[i]}" for name, pair in COLOURS.items()) for i in (0, 1))
    body = ["<h1>LiquidFusion: results</h1>", *_facts(report)]
    for section in report.sections():
        title, subject = escape(section.title), escape(section.subject)
        body.append(f"<section><h2>{title} <span class='soft'>{subject}</span></h2>")
        if section.summary:
            body.append(f"<p>{escape(section.summary)}</p>")
        drawn = "".join(f"<figure>{chart.svg()}</figure>" for chart in section.charts.values())
        body.append(f"<div class='charts'>{drawn}</div>{_table(section)}</section>")
    if report.errors:
        failed = "".join(f"<li>{escape(str(e['task']))}: {escape(str(e['error']))}</li>" for e in report.errors)
        body.append(f"<section><h2>Failed</h2><ul>{failed}</ul></section>")
    style = _STYLE % {"light": light, "dark": dark}
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>LiquidFusion: results</title><style>{style}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _facts(report: Report) -> list[str]:
    documents = [*(row.document for row in report.rows), *report.speeds, *report.streams]
    metadata = documents[-1]["metadata"]
    machine, versions = metadata["machine"], metadata["versions"]
    device = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"
    told = f"{device}; {metadata['dtype']}; torch {versions['torch']}, transformers {versions['transformers']}"
    return [
        f"<p class='soft'>{escape(told)}; LiquidFusion {escape(str(versions['liquidfusion']))}</p>",
        "<p>Whiskers and grey bands are 95 % bootstrap intervals. A line across is a reference: the full cache, or a "
        "floor. Point at a mark to read its value.</p>",
    ]


def _table(section: Section) -> str:
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in section.header)
    lines = "".join(
        f"<tr><th scope='row'>{escape(line[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in line[1:])}</tr>"
        for line in section.body
    )
    return (
        f"<div class='scroll'><table><caption>{escape(section.caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )


def write(report: Report, directory: Path, *, images: Path | None = None, png: bool = False) -> list[Path]:
    """Write ``report.html`` and ``report.md``, and each chart as SVG (and PNG) into `images`; return the paths.

    Raises
    ------
    ConfigError
        PNG is wanted and the package cairosvg is missing.
    """
    written = [directory / "report.html", directory / "report.md"]
    files.write_text(written[0], html(report))
    files.write_text(written[1], markdown(report))
    if images is not None:
        from liquidfusion.bench.data import require

        draw = require("cairosvg", "cairosvg").svg2png if png else None
        drawn = {stem: chart for section in report.sections() for stem, chart in section.charts.items()}
        for stem, chart in drawn.items():
            path = images / f"{stem}.svg"
            files.write_text(path, chart.standalone())
            written.append(path)
            if draw is not None:
                draw(bytestring=chart.standalone().encode(), write_to=str(path.with_suffix(".png")), scale=3)
                written.append(path.with_suffix(".png"))
    return written
